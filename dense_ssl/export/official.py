"""The whole training state as the authors' code saves it, without an optimiser."""

from pathlib import Path

from dense_ssl.export.plain import only_resnets
from dense_ssl.export.source import Checked, Differs, Source, compare, plain_timm, read_written
from dense_ssl.export.target import Draft, Target, file, pickled
from dense_ssl.weights.fewer_tokens import timm_options
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.layouts import extract_backbone
from dense_ssl.weights.official import OFFICIAL_METHODS, from_official, layout_name, to_official
from dense_ssl.weights.official_udi import to_udi


def _obstacle(source: Source) -> str | None:
    if source.method == "udi":
        return None
    if source.is_resnet and source.method not in OFFICIAL_METHODS:
        known = ", ".join((*OFFICIAL_METHODS, "udi"))
        return f"only checkpoints of this project's {known} runs hold such a training state"
    return only_resnets(source)


def _drafts(source: Source) -> list[Draft]:
    method = str(source.method)
    if method == "udi":
        content = {"epoch": int(source.checkpoint["epoch"]), **to_udi(source.checkpoint["method"])}
        return [file("official_udi.pth", pickled(content), _check)]
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
    part = "teacher" if source.part == "teacher" else "student"
    options = timm_options("timm", source.class_tokens)
    plain = plain_timm(source, extract_backbone(content, part), options)
    return compare(
        plain, source, f"read back to all {len(state)} tensors of the run; trunk in timm, strict"
    )


OFFICIAL = Target(_obstacle, _drafts)
