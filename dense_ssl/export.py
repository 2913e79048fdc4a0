"""Backbone weights for other libraries, each file checked by loading it there before it gets its name.

    python -m dense_ssl.export --run runs/a --to timm,torchvision,detectron2

| TO          | files                                  | read by                                          |
|-------------|----------------------------------------|--------------------------------------------------|
| timm        | backbone_timm.pth, .safetensors        | `timm.create_model(NAME, num_classes=0)`, strict |
| torchvision | backbone_torchvision.pth, .safetensors | `torchvision.models`, only `fc` missing          |
| safetensors | backbone_timm.safetensors              | as timm                                          |
| detectron2  | backbone_detectron2.pkl                | `MODEL.WEIGHTS`; STRIDE_IN_1X1 False, RGB        |
| official    | official_moco.pth.tar, and so on       | the authors' code: encoders and queues           |
| all         | each of these that the network has     |                                                  |

The check compares feature maps of one fixed input bit for bit. A .json beside each says what it holds, and
how timm is to build it: a ViT with two class tokens by `reg_tokens=1`. Only when named: `one_token`,
`second_token`, `no_token`, the same trunk with fewer class tokens, which is not the same network any more.
"""

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save
from torch import Tensor, nn

from dense_ssl.backbones import Backbone, BackboneConfig, make_backbone
from dense_ssl.checkpoint import FORMAT, file_sha256, write_atomically
from dense_ssl.config import UserError
from dense_ssl.weights import plain_pickle
from dense_ssl.weights.fewer_tokens import FEWER, fewer_tokens, timm_options
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.layouts import extract_backbone, listed, to_detectron2
from dense_ssl.weights.official import OFFICIAL_METHODS, from_official, layout_name, to_official
from dense_ssl.weights.place import checkpoint_file
from dense_ssl.weights.pretrained import (
    Loaded,
    exported_part,
    load_backbone,
    method_name,
    read_checkpoint,
)

TARGETS = ("timm", "torchvision", "safetensors", "detectron2", "official", *FEWER)
_IN_TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exported:
    """One written and checked file."""

    path: Path
    check: str  # what was compared with what, in one line
    max_abs_diff: (
        float  # of the feature maps; 0.0, or the file would not exist, or has fewer tokens
    )

    @property
    def equal(self) -> bool:
        """Whether it is the same network."""
        return self.max_abs_diff == 0.0


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported."""

    loaded: Loaded
    checkpoint: Mapping[str, Any]
    part: str  # student or teacher

    @property
    def trunk(self) -> dict[str, Tensor]:
        """The trunk's tensors, plain and contiguous."""
        state = self.loaded.backbone.trunk.state_dict()
        return {name: value.detach().contiguous() for name, value in state.items()}

    @property
    def arch(self) -> str:
        """The name in timm, without its tag."""
        return self.loaded.config.name.partition(".")[0]

    @property
    def side(self) -> int:
        """Side of the input to compare on, in pixels: a plain ViT takes its own only."""
        patches = getattr(self.loaded.backbone.trunk, "patch_embed", None)
        return 128 if patches is None else int(patches.img_size[0])

    @property
    def method(self) -> str | None:
        """The method of a checkpoint of ours."""
        own = self.checkpoint.get("format") == FORMAT
        return method_name(self.checkpoint) if own else None

    @property
    def class_tokens(self) -> int:
        """How many class tokens a ViT has."""
        return self.loaded.config.class_tokens


def export(spec: str, targets: Sequence[str], out: Path) -> list[Exported]:
    """Write the backbone of a run or checkpoint for each target; return the checked files.

    Raises:
        UserError: `spec` cannot be read, a target does not fit the network, `out` cannot be written,
            or a file does not give the same outputs when loaded back (it is then not kept).
    """
    path = checkpoint_file(Path(spec.partition("?arch=")[0]))
    checkpoint = read_checkpoint(path)
    source = Source(load_backbone(spec), checkpoint, exported_part(checkpoint, "auto"))
    chosen = _chosen(targets, source)
    expected = _features(_standard(source.loaded), source.side)
    done: list[Exported] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as aside:
            for target in chosen:
                for name, data, check in _files(target, source):
                    draft = Path(aside) / name
                    _write(draft, data)
                    described, network = check(draft, source)
                    found = _features(network, source.side)
                    # With fewer tokens only cells can be compared, and they do differ.
                    shared = slice(source.class_tokens if target in FEWER else 0, None)
                    found = found[:, -expected[:, shared].shape[1] :]
                    diff = float((found - expected[:, shared]).abs().max())
                    same = diff == 0.0 and _trunk_sha256(network) == source.loaded.sha256
                    if not same and target not in FEWER:
                        raise UserError(
                            f"{out / name}: not kept, {described} has other weights or gives features "
                            f"that differ (by {diff:.3g})"
                        )
                    draft.replace(out / name)
                    done.append(Exported(out / name, described, diff))
                    _describe(done[-1], target, spec, source)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    return done


def _chosen(targets: Sequence[str], source: Source) -> list[str]:
    """Return the targets to write; a target named on its own must fit, `all` takes those that do."""
    unknown = [target for target in targets if target not in (*TARGETS, "all")]
    if unknown or not targets:
        raise UserError(f"TO={','.join(targets)}: choose from {', '.join(TARGETS)}, all")
    if "all" in targets:
        left_out = ("safetensors", *FEWER)
        return [t for t in TARGETS if t not in left_out and _obstacle(t, source) is None]
    for target in targets:
        problem = _obstacle(target, source)
        if problem:
            raise UserError(f"TO={target}: {problem}")
    covered = "safetensors" in targets and "timm" in targets
    return [t for t in dict.fromkeys(targets) if not (covered and t == "safetensors")]


def _obstacle(target: str, source: Source) -> str | None:
    """Return why a target cannot be written for this network, or None."""
    resnet = "conv1.weight" in source.trunk
    if target == "torchvision" and source.arch not in _IN_TORCHVISION:
        return f"torchvision has no {source.arch}; take timm"
    if target in ("detectron2", "official") and not resnet:
        return f"that layout holds ResNets only, and this is {source.arch}; take timm"
    if target in FEWER and source.class_tokens == 1:
        return f"{source.arch} has no second class token to do without; take timm"
    if target == "official" and source.method not in OFFICIAL_METHODS:
        known = ", ".join(OFFICIAL_METHODS)
        return f"only checkpoints of this project's {known} runs hold such a training state"
    return None


Check = Callable[[Path, Source], tuple[str, nn.Module]]  # -> what was checked, the loaded network


def _files(target: str, source: Source) -> list[tuple[str, bytes, Check]]:
    """Return (name, bytes, check) of each file of a target."""
    if target == "detectron2":
        data = plain_pickle.dumps(to_detectron2(source.trunk))
        return [("backbone_detectron2.pkl", data, _check_detectron2)]
    if target == "official":
        return [_official_file(source)]
    if target in FEWER:
        return [_fewer_tokens_file(target, source)]
    check = _check_torchvision if target == "torchvision" else _check_timm
    name = "backbone_torchvision" if target == "torchvision" else "backbone_timm"
    described = {"arch": source.arch, "weights_sha256": source.loaded.sha256}
    pickled = (f"{name}.pth", _saved(source.trunk), check)
    safe = (f"{name}.safetensors", save(source.trunk, metadata=described), check)
    return [safe] if target == "safetensors" else [pickled, safe]


def _official_file(source: Source) -> tuple[str, bytes, Check]:
    """Return the training state as the authors' code saves it, without an optimiser."""
    method = str(source.method)
    state = to_official(method, source.checkpoint["method"])
    epoch = int(source.checkpoint["epoch"])
    if method != "densecl":
        content = {"epoch": epoch, "arch": source.arch, "state_dict": state}
        return f"official_{method}.pth.tar", _saved(content), _check_official
    meta = {"epoch": epoch, "iter": int(source.checkpoint["step"])}
    return "official_densecl.pth", _saved({"meta": meta, "state_dict": state}), _check_official


def _fewer_tokens_file(target: str, source: Source) -> tuple[str, bytes, Check]:
    """Return a trunk with fewer class tokens, and a check that timm has exactly its weights."""
    state = fewer_tokens(source.trunk, target)
    options = timm_options(target, source.class_tokens)

    def check(path: Path, source: Source) -> tuple[str, nn.Module]:
        plain = _plain_timm(source, _read_written(path), options)
        if weights_sha256(plain.state_dict()) != weights_sha256(state):
            raise UserError(f"{path.name}: not kept, it does not read back to its own weights")
        return f"NOT the same network; timm {timm.__version__} {source.arch}, strict", plain

    return f"backbone_timm_{target}.pth", _saved(state), check


def _read_written(path: Path) -> dict[str, Any]:
    """Return what was just written, from the disk."""
    return read_checkpoint(path)


def _check_timm(path: Path, source: Source) -> tuple[str, nn.Module]:
    options = timm_options("timm", source.class_tokens)
    plain = _plain_timm(source, _read_written(path), options)
    told = "".join(f" {name}={value}" for name, value in options.items())
    return f"timm {timm.__version__} {source.arch}{told}, strict", plain


def _check_torchvision(path: Path, source: Source) -> tuple[str, nn.Module]:
    plain = torchvision.models.get_model(source.arch, weights=None)
    result = plain.load_state_dict(_read_written(path), strict=False)
    if set(result.missing_keys) != {"fc.weight", "fc.bias"} or result.unexpected_keys:
        raise UserError(
            f"{path.name}: not kept, torchvision misses {listed(result.missing_keys)} and does not "
            f"know {listed(result.unexpected_keys)}"
        )
    return f"torchvision {torchvision.__version__} {source.arch}, only fc missing", plain


def _check_detectron2(path: Path, source: Source) -> tuple[str, nn.Module]:
    plain = _plain_timm(source, extract_backbone(_read_written(path)))
    return f"names mapped back into timm {timm.__version__} {source.arch}, strict", plain


def _check_official(path: Path, source: Source) -> tuple[str, nn.Module]:
    content = _read_written(path)
    method, state = from_official(content)
    expected = layout_name(str(source.method), source.checkpoint["method"])
    if method != expected or weights_sha256(state) != weights_sha256(source.checkpoint["method"]):
        raise UserError(f"{path.name}: not kept, it does not read back to the run's own state")
    plain = _plain_timm(source, extract_backbone(content))
    return f"read back to all {len(state)} tensors of the run; trunk in timm, strict", plain


def _plain_timm(
    source: Source, state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None
) -> nn.Module:
    plain = timm.create_model(source.arch, pretrained=False, num_classes=0, **(options or {}))
    plain.load_state_dict(state, strict=True)
    return plain


def _standard(loaded: Loaded) -> Backbone:
    """Return the backbone at its published stride: dilation is not in the weights."""
    config = BackboneConfig.model_validate(loaded.config.model_dump() | {"output_stride": 32})
    backbone = make_backbone(config)
    backbone.load_state_dict(loaded.backbone.state_dict())
    return backbone


@torch.no_grad()
def _features(network: nn.Module, side: int) -> Tensor:
    """Return cells [2, N, D] of one fixed input; a ViT's class tokens come before its cells."""
    network.eval()
    images = torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(0))
    # One memory format for all: convolutions in another one round differently.
    images = images.contiguous(memory_format=torch.channels_last)
    if isinstance(network, Backbone):
        features = network(images)
        is_map = "conv1.weight" in network.trunk.state_dict()
        return features.dense if is_map else torch.cat((features.cls, features.dense), dim=1)
    # torchvision has no name for "all but pooling and fc", its last two children.
    without_fc = nn.Sequential(*list(network.children())[:-2])
    out = getattr(network, "forward_features", without_fc)(images)
    return out.flatten(2).transpose(1, 2) if out.ndim == 4 else out


def _trunk_sha256(network: nn.Module) -> str:
    """Return the hash of a plain network's weights without a classifier."""
    state = network.state_dict()
    return weights_sha256(
        {name: value for name, value in state.items() if not name.startswith("fc.")}
    )


def _saved(content: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _describe(exported: Exported, target: str, spec: str, source: Source) -> None:
    """Write the .json beside an exported file."""
    trunk = fewer_tokens(source.trunk, target) if target in FEWER else source.trunk
    record = {
        "file": exported.path.name,
        "sha256": file_sha256(exported.path),
        "source": spec,
        "method": source.method,
        "step": source.checkpoint.get("step") if source.method else None,
        "network": source.part,
        "architecture": source.arch,
        "timm_options": timm_options(target, source.class_tokens),
        "weights_sha256": weights_sha256(trunk),
        "normalisation": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "check": exported.check,
        "equivalent": exported.equal,
        "max_abs_diff": exported.max_abs_diff,
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(exported.path.with_name(exported.path.name + ".json"), text.encode())


def main(argv: list[str]) -> int:
    """Parse the command line and export; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.export", description="Write a run's backbone for other libraries."
    )
    parser.add_argument("--run", required=True, help="a run folder or a checkpoint file")
    parser.add_argument("--to", default="timm", help=f"comma-separated: {', '.join(TARGETS)}, all")
    parser.add_argument("--out", type=Path, help="folder (default: RUN/export)")
    args = parser.parse_args(argv)
    try:
        if args.out is None and not Path(args.run).is_dir():
            raise UserError(f"{args.run}: not a run folder; give --out (OUT=) as well")
        out = args.out or Path(args.run) / "export"
        for file in export(args.run, args.to.split(","), out):
            size = file.path.stat().st_size / 1e6
            outputs = "outputs equal" if file.equal else f"cells differ by {file.max_abs_diff:.2g}"
            sys.stdout.write(f"{file.path}  {size:.1f} MB  {outputs} ({file.check})\n")
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
