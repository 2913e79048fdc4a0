"""ONNX: the backbone from normalised images to cells and class tokens, checked in onnxruntime.

    images [B, 3, H, W] float32  ->  cells [B, N, D], row by row, and class_tokens [B, T, D]

B, H and W are free; H and W must be multiples of a ViT's patch. A ResNet's one class token is its mean cell.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dense_ssl.backbones import Backbone
from dense_ssl.backbones.vit import ViTBackbone
from dense_ssl.export.source import (
    Checked,
    Source,
    described,
    features,
    images,
    other_sides,
    within_rounding,
)
from dense_ssl.export.target import Draft, Target

NAME = "backbone.onnx"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INPUT, OUTPUTS = "images", ("cells", "class_tokens")
_OPSET = 20  # Resize with antialiasing is in ONNX since 18; GELU as one operator since 20


def missing_packages() -> str | None:
    """Return the sentence that says how to get what ONNX needs, or None."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return (
        f"needs {', '.join(missing)}, not installed; run .venv/bin/python -m pip install -c "
        "constraints.txt onnx onnxruntime onnxscript"
    )


def _obstacle(_: Source) -> str | None:
    return missing_packages()


def _drafts(source: Source) -> list[Draft]:
    return [Draft(NAME, lambda path: _write(path, source), _check)]


def _write(path: Path, source: Source) -> None:
    # Traced at a size that is not the table's own, so that positions are resampled in the graph; at the
    # table's own size resampling gives the table back.
    example = images(*other_sides(source))
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with _quiet():
        program: Any = torch.onnx.export(
            _Exported(source.standard).eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=(free,),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=_OPSET,
            verbose=False,
        )
    told = described(source)
    told["class_tokens"] = str(source.class_tokens)
    program.model.metadata_props.update(told)
    program.save(str(path))


class _Exported(nn.Module):
    """The backbone with named tensors as outputs, and positions resampled by arithmetic ONNX has."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cells [B, N, D] and class tokens [B, T, D] of images [B, 3, H, W]."""
        backbone = self.backbone
        if not isinstance(backbone, ViTBackbone) or backbone.config.positions == "timm":
            found = backbone(x)
            return found.dense, found.cls
        patches = backbone.embed(x)
        trunk: Any = backbone.trunk
        first, table = backbone.prefix, trunk.pos_embed
        tokens = [t for t in (trunk.cls_token, trunk.reg_token) if t is not None]
        prefix = torch.cat(tokens, dim=1) + table[:, :first]
        side = int(trunk.patch_embed.grid_size[0])
        cells = dino_positions(table[:, first:], side, patches.shape[1], patches.shape[2])
        placed = patches.flatten(1, 2) + cells
        together = torch.cat((prefix.expand(placed.shape[0], -1, -1), placed), dim=1)
        _, out = backbone.run_blocks(together)
        return out[:, first:], out[:, :first]


def dino_positions(table: Tensor, side: int, rows: int, columns: int) -> Tensor:
    """Return `vit.interpolate_positions` as two products, which needs no decision on the size.

    table: [1, side * side, D]. Result: [1, rows * columns, D].
    """
    # As tensors, so that the graph holds for every size.
    counts = [table.new_ones(count).sum() for count in (rows, columns)]
    own = (counts[0] == side) & (counts[1] == side)
    vertical, horizontal = (
        _bicubic(count, number, side, own)
        for count, number in zip((rows, columns), counts, strict=True)
    )
    maps = table.unflatten(1, (side, side))  # [1, side, side, D]
    return torch.einsum("ri,ijd,cj->rcd", vertical, maps[0], horizontal).flatten(0, 1)[None]


def _bicubic(count: int, number: Tensor, side: int, own: Tensor) -> Tensor:
    """Return weights [count, side] of a bicubic filter (a = -0.75) at scale (count + 0.1) / side.

    At the table's own size (`own`) the scale is 1 and the weights are the identity.
    """
    scale = torch.where(own, torch.ones_like(number), (number + 0.1) / side)
    place = (torch.arange(count, dtype=number.dtype) + 0.5) / scale - 0.5
    left = place.floor()
    weights = number.new_zeros(1)
    cells = torch.arange(side, dtype=number.dtype)
    a = -0.75
    for tap in range(-1, 3):
        x = (place - left - tap).abs()
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weight = near if tap in (0, 1) else far
        at = (left + tap).clamp(0, side - 1)
        weights = weights + weight[:, None] * (at[:, None] == cells)
    return weights


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and its warnings about itself from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check(path: Path, source: Source) -> Checked:
    """Compare what onnxruntime computes at the network's own size, at another, and for one image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    description = f"onnxruntime {onnxruntime.__version__}, CPU, free batch and size"

    def run(x: Tensor) -> Tensor:
        cells, tokens = map(torch.from_numpy, session.run(None, {INPUT: x.numpy()}))
        return cells if source.is_resnet else torch.cat((tokens, cells), dim=1)

    difference = within_rounding(run(images(source.side)), source.features, description)
    sides = other_sides(source)[::-1]  # not the size it was traced at
    one = images(*sides)[:1]
    elsewhere = within_rounding(run(one), features(source.standard, one), description)
    size = " x ".join(map(str, sides))
    remarks = {"other_size": size, "max_abs_diff_at_other_size": elsewhere}
    return Checked(description, difference, remarks=remarks)


ONNX = Target(_obstacle, _drafts)
