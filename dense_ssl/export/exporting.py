"""Writing a backbone for other libraries: each file is checked by loading it there, then gets its name."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dense_ssl.checkpoint import file_sha256, write_atomically
from dense_ssl.config import UserError
from dense_ssl.export.fewer import FEWER_TOKENS
from dense_ssl.export.official import OFFICIAL
from dense_ssl.export.onnx_file import ONNX
from dense_ssl.export.plain import DETECTRON2, SAFETENSORS, TIMM, TORCHVISION
from dense_ssl.export.source import MEAN, STD, Checked, Differs, Source
from dense_ssl.export.target import Draft, Target
from dense_ssl.export.timm_hub import TIMM_HUB
from dense_ssl.export.transformers_folder import TRANSFORMERS
from dense_ssl.weights.place import checkpoint_file
from dense_ssl.weights.pretrained import exported_part, load_backbone, read_checkpoint

TARGETS: Mapping[str, Target] = {
    "timm": TIMM,
    "torchvision": TORCHVISION,
    "safetensors": SAFETENSORS,
    "detectron2": DETECTRON2,
    "timm-hub": TIMM_HUB,
    "transformers": TRANSFORMERS,
    "onnx": ONNX,
    "official": OFFICIAL,
    **FEWER_TOKENS,
}
GROUPS = {"huggingface": ("timm-hub", "transformers")}  # one word for several targets


@dataclass(frozen=True, slots=True)
class Exported:
    """One written and checked file or folder."""

    path: Path
    check: str  # what was compared with what, in one line
    max_abs_diff: float  # of the features; above rounding only with fewer tokens
    equal: bool  # whether it is the same network

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(file.stat().st_size for file in _files(self.path))


def export(spec: str, targets: Sequence[str], out: Path) -> list[Exported]:
    """Write the backbone of a run or checkpoint for each target; return the checked files.

    Raises:
        UserError: `spec` cannot be read, a target does not fit the network, `out` cannot be written,
            or a file does not give the same outputs when loaded back (it is then not kept).
    """
    given = Path(spec.partition("?arch=")[0])
    checkpoint = read_checkpoint(checkpoint_file(given))
    run = given if given.is_dir() else None
    source = Source(load_backbone(spec), checkpoint, exported_part(checkpoint, "auto"), run)
    chosen = _chosen(targets, source)
    done: list[Exported] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as aside:
            for target in chosen:
                for draft in TARGETS[target].drafts(source):
                    checked = _written(draft, Path(aside), out, source)
                    path = out / draft.name
                    done.append(
                        Exported(path, checked.description, checked.max_abs_diff, checked.equal)
                    )
                    _describe(path, draft, checked, spec, source)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    return done


def _written(draft: Draft, aside: Path, out: Path, source: Source) -> Checked:
    """Write a draft aside, check it, and give it its name; return what the check said."""
    path = aside / draft.name
    draft.write(path)
    try:
        checked = draft.check(path, source)
    except Differs as error:
        raise UserError(f"{out / draft.name}: not kept, {error}") from None
    final = out / draft.name
    if final.is_dir():  # a folder cannot be replaced in one step
        final.rename(aside / f"{draft.name}.before")
        path.rename(final)
        shutil.rmtree(aside / f"{draft.name}.before")
    else:
        path.replace(final)
    return checked


def _chosen(targets: Sequence[str], source: Source) -> list[str]:
    """Return the targets to write; a target named on its own must fit, `all` takes those that do."""
    unknown = [t for t in targets if t not in TARGETS and t not in GROUPS and t != "all"]
    if unknown or not targets:
        known = ", ".join((*TARGETS, *GROUPS, "all"))
        raise UserError(f"TO={','.join(targets)}: choose from {known}")
    if "all" in targets:
        return [t for t, what in TARGETS.items() if what.in_all and what.obstacle(source) is None]
    named = [name for target in targets for name in GROUPS.get(target, (target,))]
    for target in named:
        problem = TARGETS[target].obstacle(source)
        if problem:
            raise UserError(f"TO={target}: {problem}")
    covered = "safetensors" in named and "timm" in named
    return [t for t in dict.fromkeys(named) if not (covered and t == "safetensors")]


def _describe(path: Path, draft: Draft, checked: Checked, spec: str, source: Source) -> None:
    """Write the .json beside an exported file or folder."""
    files = _files(path)
    if path.is_dir():
        hashes: dict[str, Any] = {"files": {file.name: file_sha256(file) for file in files}}
    else:
        hashes = {"sha256": file_sha256(path)}
    record = {
        "file": path.name,
        **hashes,
        "source": spec,
        "method": source.method,
        "step": source.checkpoint.get("step") if source.method else None,
        "network": source.part,
        "architecture": source.arch,
        "positions": source.loaded.config.positions,
        **({} if draft.options is None else {"timm_options": dict(draft.options)}),
        "weights_sha256": source.loaded.sha256,
        "normalisation": {"mean": MEAN, "std": STD},
        "check": checked.description,
        "equivalent": checked.equal,
        "max_abs_diff": checked.max_abs_diff,
        "largest_feature": float(source.features.abs().max()),
        **checked.remarks,
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(path.with_name(path.name + ".json"), text.encode())


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]
