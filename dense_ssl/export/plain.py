"""timm, safetensors, torchvision, detectron2: the trunk's tensors under their names."""

from functools import partial
from pathlib import Path

import timm
import torchvision
from safetensors.torch import save

from dense_ssl.config import UserError
from dense_ssl.export.source import (
    Checked,
    Differs,
    Source,
    compare,
    described,
    plain_timm,
    read_written,
)
from dense_ssl.export.target import Draft, Target, always, file, pickled
from dense_ssl.weights import plain_pickle
from dense_ssl.weights.fewer_tokens import timm_options
from dense_ssl.weights.layouts import extract_backbone, listed, to_detectron2

_IN_TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d",
)  # fmt: skip


def _timm_drafts(source: Source, with_pickle: bool) -> list[Draft]:
    options = timm_options("timm", source.class_tokens)
    safe = save(source.trunk, metadata=described(source))
    drafts = [file("backbone_timm.safetensors", safe, _check_timm, options=options)]
    if with_pickle:
        plain = pickled(source.trunk)
        drafts.insert(0, file("backbone_timm.pth", plain, _check_timm, options=options))
    return drafts


def _check_timm(path: Path, source: Source) -> Checked:
    options = timm_options("timm", source.class_tokens)
    told = "".join(f" {name}={value}" for name, value in options.items())
    plain = plain_timm(source, read_written(path), options)
    return compare(plain, source, f"timm {timm.__version__} {source.arch}{told}, strict")


def _not_in_torchvision(source: Source) -> str | None:
    known = source.arch in _IN_TORCHVISION
    return None if known else f"torchvision has no {source.arch}; take timm"


def _torchvision_drafts(source: Source) -> list[Draft]:
    safe = save(source.trunk, metadata=described(source))
    return [
        file("backbone_torchvision.pth", pickled(source.trunk), _check_torchvision),
        file("backbone_torchvision.safetensors", safe, _check_torchvision),
    ]


def _check_torchvision(path: Path, source: Source) -> Checked:
    plain = torchvision.models.get_model(source.arch, weights=None)
    result = plain.load_state_dict(read_written(path), strict=False)
    if set(result.missing_keys) != {"fc.weight", "fc.bias"} or result.unexpected_keys:
        raise Differs(
            f"torchvision misses {listed(result.missing_keys)} and does not know "
            f"{listed(result.unexpected_keys)}"
        )
    described = f"torchvision {torchvision.__version__} {source.arch}, only fc missing"
    return compare(plain, source, described)


def only_resnets(source: Source) -> str | None:
    """Return why a layout of ResNets cannot hold this network, or None."""
    if source.is_resnet and "conv1.weight" in source.trunk:  # deep stems have several
        try:
            extract_backbone(source.trunk)
            return None
        except UserError:  # another stem, or other shortcuts
            pass
    return f"that layout holds plain ResNets only, and this is {source.arch}; take timm"


def _detectron2_drafts(source: Source) -> list[Draft]:
    data = plain_pickle.dumps(to_detectron2(source.trunk))
    return [file("backbone_detectron2.pkl", data, _check_detectron2)]


def _check_detectron2(path: Path, source: Source) -> Checked:
    plain = plain_timm(source, extract_backbone(read_written(path)))
    described = f"names mapped back into timm {timm.__version__} {source.arch}, strict"
    return compare(plain, source, described)


TIMM = Target(always, partial(_timm_drafts, with_pickle=True))
SAFETENSORS = Target(always, partial(_timm_drafts, with_pickle=False), in_all=False)
TORCHVISION = Target(_not_in_torchvision, _torchvision_drafts)
DETECTRON2 = Target(only_resnets, _detectron2_drafts)
