"""Pre-trained weights from anywhere, as a backbone: a run, a file, timm, or random ones to compare with.

| spec                        | backbone                                                                 |
|-----------------------------|--------------------------------------------------------------------------|
| runs/a                      | of the run's `checkpoints/last.pt`, the network its method exports       |
| FILE                        | a checkpoint of ours, official MoCo / OpenSelfSup / DenseCL / MaskContrast / DINO / iBOT / SERE / UDI, torchvision, transformers, detectron2; .pt .pth .pth.tar .safetensors .pkl |
| FOLDER                      | one for Hugging Face's hub, as `export` writes it: model.safetensors and config.json |
| FILE.onnx                   | our ONNX export, run by onnxruntime: for what asks for cells and class tokens only |
| FILE?arch=NAME              | the same, where NAME (timm's) cannot be read from the tensors: ViTs alone |
| timm:NAME                   | timm's published weights                                                 |
| random:NAME, random:runs/a  | the same network at random initialisation                                |

No code from a file is ever run: pickles are read with allow-lists of plain data types.
"""  # noqa: E501  (a table row cannot wrap)

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PosixPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dense_ssl import plain_torch
from dense_ssl.backbones import Backbone, BackboneConfig, Projection, make_backbone
from dense_ssl.checkpoint import FORMAT, damage_of, file_sha256
from dense_ssl.config import UserError, validate
from dense_ssl.log import logger
from dense_ssl.methods import METHODS, Method
from dense_ssl.weights import plain_pickle
from dense_ssl.weights.class_head import class_head
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.layouts import (
    Part,
    class_tokens_of,
    extract_backbone,
    first_projection,
    is_distillation,
    listed,
    published_vit_of,
    resnet_of,
    tensors,
)
from dense_ssl.weights.official import from_official
from dense_ssl.weights.place import checkpoint_file
from dense_ssl.weights.told import told_beside

_HARMLESS = [  # plain data that official checkpoints hold beside tensors
    argparse.Namespace,
    PosixPath,
    *((stand_in, name) for name, stand_in in plain_pickle.NUMBERS.items()),
]
_FAMILY = {"ibot_dc": "ibot", "densecl_dc": "densecl"}  # methods whose states have the same tensors


@dataclass(frozen=True, slots=True)
class Loaded:
    """A backbone ready for evaluation: in eval mode, on the CPU."""

    backbone: Backbone
    name: str  # the spec, as given
    sha256: str  # of the trunk's weights
    config: BackboneConfig


def load_backbone(
    spec: str, seed: int = 0, which: Literal["auto", "student", "teacher"] = "auto"
) -> Loaded:
    """Return the backbone that `spec` names (see the table above).

    `which` chooses between the networks of a checkpoint of ours; `auto` is what its method exports.
    `seed` is of random initialisation and touches nothing outside.

    Raises:
        UserError: there is no such file, run or model, it cannot be read, or its tensors do not fit.
    """
    kind, separator, name = spec.partition(":")
    if separator and kind == "random":
        config = _config_named(name)
        trunk = projection = head = None
    elif separator and kind == "timm":
        config = BackboneConfig(name=name)
        make_backbone(config)  # refuses unknown names before anything is fetched
        trunk, projection, head = _published(name), None, None
    else:
        text, _, arch = spec.partition("?arch=")
        path = checkpoint_file(Path(text))
        if path.suffix == ".onnx":
            return _of_onnx(path)
        checkpoint = read_checkpoint(path)
        try:
            part = exported_part(checkpoint, which)
            trunk = extract_backbone(checkpoint, part)
            config = backbone_config(checkpoint, trunk, arch, told_beside(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        projection = partial(first_projection, checkpoint, part)
        head = partial(class_head, checkpoint, part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = make_backbone(config)
    if trunk is not None:
        load_trunk(backbone, trunk, spec)
    found = projection(backbone.dim) if projection else None
    backbone.projection = Projection(*found) if found else None
    backbone.class_head = head(backbone.dim) if head else None
    return Loaded(backbone.eval(), spec, weights_sha256(backbone.trunk.state_dict()), config)


def exported_part(
    checkpoint: Mapping[str, Any], which: Literal["auto", "student", "teacher"]
) -> Part:
    """Return which network of a checkpoint to take: the one asked for, or what its method exports."""
    if which != "auto":
        return which
    if checkpoint.get("format") != FORMAT:
        return "teacher" if is_distillation(checkpoint) else "student"
    name = method_name(checkpoint)
    if name not in METHODS:
        raise UserError(f"of method {name!r}, which is none of {', '.join(METHODS)}")
    return METHODS[name].exports


def method_name(checkpoint: Mapping[str, Any]) -> str:
    """Return the name of the method that a checkpoint of ours is of."""
    return str(checkpoint["config"]["method"]["name"])


def backbone_config(
    checkpoint: Mapping[str, Any],
    trunk: Mapping[str, Tensor],
    arch: str = "",
    told: Mapping[str, str] | None = None,
) -> BackboneConfig:
    """Return the configuration of the network whose trunk this is: named, stored, told, or from shapes."""
    distilled = is_distillation(checkpoint)
    told = told or {}
    # As its code resamples them; exports of ours say it.
    positions: Any = told.get("positions") or ("dino" if distilled else "timm")
    tokens = class_tokens_of(trunk)
    arch = arch or told.get("arch", "")
    if arch:
        given = {"name": arch, "positions": positions, "class_tokens": tokens}
        return validate(BackboneConfig, given, "method.backbone")
    if checkpoint.get("format") == FORMAT:
        return validate(
            BackboneConfig, checkpoint["config"]["method"]["backbone"], "method.backbone"
        )
    if distilled and "patch_embed.proj.weight" in trunk:
        name = published_vit_of(trunk)
        return BackboneConfig(name=name, positions=positions, class_tokens=tokens)
    if "conv1.weight" not in trunk:
        raise UserError("its tensors do not tell its name; write FILE?arch=NAME with timm's name")
    return BackboneConfig(name=resnet_of(trunk))


def _of_onnx(path: Path) -> Loaded:
    """Return the network of an ONNX file of ours."""
    from dense_ssl.weights.onnx_backbone import OnnxBackbone  # onnxruntime is an extra

    backbone = OnnxBackbone(path)
    return Loaded(backbone.eval(), str(path), file_sha256(path), backbone.config)


def load_trunk(backbone: Backbone, trunk: Mapping[str, Tensor], origin: str) -> None:
    """Load every tensor of a trunk into `backbone`, or none.

    A ViT fine-tuned on the mean of its cells (MAE's code) has its last norm behind that mean, as `fc_norm`.

    Raises:
        UserError: a tensor is missing, left over, or of another shape; the message counts them.
    """
    expected = backbone.trunk.state_dict()
    if "norm.weight" in expected and "norm.weight" not in trunk and "fc_norm.weight" in trunk:
        trunk = {name.removeprefix("fc_"): value for name, value in trunk.items()}
        logger.warning("%s: its norm was trained on the mean of the cells, not on each", origin)
    missing = [name for name in expected if name not in trunk]
    strange = [name for name in trunk if name not in expected]
    other = [n for n in expected if n in trunk and trunk[n].shape != expected[n].shape]
    if missing or strange or other:
        raise UserError(
            f"{origin}: {len(expected) - len(missing) - len(other)} of {len(expected)} tensors of "
            f"{backbone.config.name} fit: {len(missing)} missing ({listed(missing)}), {len(strange)} "
            f"unknown ({listed(strange)}), {len(other)} of another shape ({listed(other)})"
        )
    backbone.trunk.load_state_dict(trunk)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the dictionary stored in a .pt, .pth, .pth.tar, .safetensors or detectron2 .pkl file.

    Raises:
        UserError: the file is missing, damaged, no dictionary, or would need code to be run.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    damage = damage_of(path)
    if damage is not None:
        raise UserError(f"{path}: {damage}; give an older one of its folder")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif path.suffix == ".pkl":
            content = plain_pickle.read(path)
        else:
            content = plain_torch.load(path, _HARMLESS)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, or no safetensors file: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything at all
        raise UserError(f"{path}: {_reason(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary by name")
    if str(content.get("format", FORMAT)) != FORMAT:
        raise UserError(f"{path}: has format {content['format']!r}; this version reads {FORMAT}")
    return content


def _reason(error: Exception) -> str:
    """Return why a pickle could not be read, in words for its owner."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return (
            f"holds a Python object of {refused[1]}, and code from a checkpoint is never run; "
            "save its tensors again as a plain dictionary"
        )
    return f"damaged, or no checkpoint ({type(error).__name__})"


def _config_named(name: str) -> BackboneConfig:
    """Return the backbone configuration of a run, of a checkpoint file, or of a timm model's name."""
    path = Path(name)
    if not path.exists():
        return BackboneConfig(name=name)
    path = checkpoint_file(path)
    checkpoint = read_checkpoint(path)
    try:
        trunk = extract_backbone(checkpoint)
        return backbone_config(checkpoint, trunk, told=told_beside(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _published(name: str) -> dict[str, Tensor]:
    """Return the weights that timm publishes under a model's name."""
    try:
        return _fetch(name)
    except Exception as error:  # whatever the hub's client raises without a network
        raise UserError(
            f"timm:{name}: its weights could not be fetched ({type(error).__name__}); they need a "
            "network, or timm's cache filled on a machine that has one"
        ) from None


def _fetch(name: str) -> dict[str, Tensor]:
    """Return timm's published trunk, from its cache or the network."""
    import timm  # takes 2 s, see backbones.features.create_trunk

    return timm.create_model(name, pretrained=True, num_classes=0).state_dict()


def start_from(path: str, method: Method, name: str) -> None:
    """Load a checkpoint into a fresh method: the whole state of the same method, else the trunk alone.

    A whole state is a checkpoint of ours or an official training file (MoCo, DenseCL, DINO, iBOT, SERE, UDI),
    key encoder, queues and centres with it; optimiser states are never taken. What was loaded is logged.

    Raises:
        UserError: the file cannot be read, or its tensors do not fit this recipe.
    """
    checkpoint = read_checkpoint(checkpoint_file(Path(path)))
    state = _whole_state(checkpoint, name)
    if state is None:
        trunk = extract_backbone(checkpoint, exported_part(checkpoint, "auto"))
        for encoder in (method.student, method.teacher):
            load_trunk(encoder["backbone"], trunk, path)  # pyright: ignore
        logger.info("starting from the backbone of %s; heads and queues are fresh", path)
        return
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"train.init: {path} does not fit this recipe: {reason}") from None
    logger.info("starting from the %s state of %s; the optimiser is fresh", name, path)


def _whole_state(checkpoint: Mapping[str, Any], name: str) -> Mapping[str, Tensor] | None:
    """Return the state of a method of this name, or None when the file holds another's or a trunk."""
    family = _FAMILY.get(name, name)
    if checkpoint.get("format") == FORMAT:
        theirs = method_name(checkpoint)
        return checkpoint["method"] if _FAMILY.get(theirs, theirs) == family else None
    if is_distillation(checkpoint):
        if family not in ("dino", "ibot", "sere", "udi"):
            return None
    elif not any("encoder_k." in key for key in tensors(checkpoint)):
        return None
    theirs, state = from_official(checkpoint)
    return state if theirs == family else None
