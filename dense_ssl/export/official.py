"""The whole training state as the authors' code saves it, without an optimiser."""

from pathlib import Path

from dense_ssl.export.plain import only_resnets
from dense_ssl.export.source import Checked, Differs, Source, compare, plain_timm, read_written
from dense_ssl.export.target import Draft, Target, file, pickled
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.layouts import extract_backbone
from dense_ssl.weights.official import OFFICIAL_METHODS, from_official, layout_name, to_official


def _obstacle(source: Source) -> str | None:
    if source.is_resnet and source.method not in OFFICIAL_METHODS:
        known = ", ".join(OFFICIAL_METHODS)
        return f"only checkpoints of this project's {known} runs hold such a training state"
    return only_resnets(source)


def _drafts(source: Source) -> list[Draft]:
    method = str(source.method)
    state = to_official(method, source.checkpoint["method"])
    epoch = int(source.checkpoint["epoch"])
    if method != "densecl":
        content = {"epoch": epoch, "arch": source.arch, "state_dict": state}
        return [file(f"official_{method}.pth.tar", pickled(content), _check)]
    meta = {"epoch": epoch, "iter": int(source.checkpoint["step"])}
    return [file("official_densecl.pth", pickled({"meta": meta, "state_dict": state}), _check)]


def _check(path: Path, source: Source) -> Checked:
    content = read_written(path)
    method, state = from_official(content)
    expected = layout_name(str(source.method), source.checkpoint["method"])
    if method != expected or weights_sha256(state) != weights_sha256(source.checkpoint["method"]):
        raise Differs("it does not read back to the run's own state")
    plain = plain_timm(source, extract_backbone(content))
    return compare(
        plain, source, f"read back to all {len(state)} tensors of the run; trunk in timm, strict"
    )


OFFICIAL = Target(_obstacle, _drafts)
