"""Photometry: uint8 crops become normalised floats, in the colours their view's policy asks for.

The random numbers of a policy are a pure function of (seed, epoch, image, crop position) and drawn on
the host, so they depend neither on the rank, nor on what else is in the batch, nor on the device.
They go to the device in one small copy per chunk of crops and nothing comes back, so the host never
waits.

Geometry happened before this and happens nowhere else: no operation here moves a pixel.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from dense_ssl import photometry_ops as ops
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.photometry_policies import (
    POLICIES,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    OneOf,
    Op,
    Policy,
    Solarize,
    view_policies,
)
from dense_ssl.rng import fold_np, key_of, uniform_np
from dense_ssl.views import ViewSpec

__all__ = ["MEAN", "POLICIES", "STD", "Photometry"]

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as every published backbone expects
STD = (0.229, 0.224, 0.225)

STREAM = int.from_bytes(b"colours", "big")  # this module's branch of the random numbers of a seed

_NUMBERS = 9  # uniform numbers per operation and crop: whether, and up to eight parameters

# Bytes of float pixels worked on at once: on a CPU what stays in its cache, on a GPU what bounds the
# memory of intermediate images.
_CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**27}


class Photometry(nn.Module):
    """The photometric policies of a recipe's views, with the normalisation; holds no state.

    Every crop position of the recipe draws its own numbers, so a twin view, cut from the same boxes,
    gets other colours.

    Args:
        views: the recipe, in the order in which loaders return it.
        seed: of the run.
        dtype: of the returned images. All arithmetic before the last rounding is float32.
    """

    def __init__(
        self, views: Sequence[ViewSpec], seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.policies = {view.name: view_policies(view) for view in views}
        self.seed = seed
        self.dtype = dtype
        std = torch.tensor(STD).view(3, 1, 1)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -torch.tensor(MEAN).view(3, 1, 1) / std, persistent=False)

    @torch.no_grad()
    def forward(self, batch: MultiCropBatch, epoch: int) -> MultiCropBatch:
        """Return the batch with normalised float images; boxes, flips, index and label as they were.

        `batch.index` stays on the host, the images may be anywhere. A view that holds fewer images
        than the batch belongs to the last rows of the index.
        """
        assert batch.index.device.type == "cpu", "the index keys draws on the host"
        keys = fold_np(key_of(self.seed, STREAM, epoch), batch.index.numpy())
        views: dict[str, Crops] = {}
        position = 0
        for name, crops in batch.views.items():
            count, images = crops.images.shape[:2]
            positions = np.arange(position, position + count)
            view_keys = fold_np(keys[len(keys) - images :], positions[:, None])
            out = self._view(crops.images, self.policies[name], view_keys)
            views[name] = Crops(out, crops.boxes, crops.flipped)
            position += count
        return MultiCropBatch(views, batch.index, batch.label)

    def _view(self, images: Tensor, policies: Sequence[Policy], keys: np.ndarray) -> Tensor:
        """Return [V, B, 3, S, S] uint8 crops as normalised floats, given their keys [V, B]."""
        out = torch.empty_like(images, dtype=self.dtype)
        size = max(1, _CHUNK_BYTES[images.device.type] // (4 * images[0, 0].numel()))
        first = 0
        for shared, group in groupby(policies):
            last = first + len(list(group))
            sources = images[first:last].flatten(0, 1).split(size)
            targets = out[first:last].flatten(0, 1).split(size)
            flat = keys[first:last].ravel()
            for number, (source, target) in enumerate(zip(sources, targets)):
                self._chunk(source, target, shared, flat[number * size : (number + 1) * size])
            first = last
        return out

    def _chunk(self, source: Tensor, target: Tensor, policy: Policy, keys: np.ndarray) -> None:
        """Write the normalised floats of uint8 crops [n, 3, S, S] into `target`."""
        steps = list(_draw(policy.ops, keys, np.arange(len(keys))))
        arrays = [array for step in steps for array in (step.rows, *step.parameters)]
        tensors = iter(_to_device(arrays, source.device))
        with torch.autocast(source.device.type, enabled=False):
            x = source.float().mul_(1 / 255)
            for step in steps:
                rows = next(tensors)
                parameters = [next(tensors) for _ in step.parameters]
                if len(rows) == len(x):
                    x = _apply(step.op, x, parameters)
                else:
                    x.index_copy_(0, rows, _apply(step.op, x.index_select(0, rows), parameters))
            target.copy_(torch.addcmul(self.shift, x, self.scale))


@dataclass(frozen=True)
class _Step:
    """An operation, the crops it is done to as rows of the chunk, and their parameters."""

    op: Op
    rows: np.ndarray  # int64 [m], ascending
    parameters: tuple[np.ndarray, ...]


def _draw(sequence: Sequence[Op | OneOf], keys: np.ndarray, rows: np.ndarray) -> Iterator[_Step]:
    """Yield the steps of the crops `rows` of a chunk; `keys` holds a key per crop of the chunk.

    Operation number n draws below child n of a crop's key: no operation's numbers depend on what
    another one does.
    """
    for number, op in enumerate(sequence):
        below = fold_np(keys, number)
        u = uniform_np(below, _NUMBERS)
        if isinstance(op, OneOf):
            branch = (u[:, 0] * len(op.branches)).astype(np.int64)
            for choice, operations in enumerate(op.branches):
                yield from _draw(operations, below, rows[branch[rows] == choice])
        else:
            chosen = rows[u[rows, 0] < op.p]
            if len(chosen):
                yield _Step(op, chosen, _parameters(op, u[chosen, 1:]))


def _parameters(op: Op, u: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return what `_apply` needs for n crops, given uniform numbers [n, 8]."""
    match op:
        case ColorJitter():
            strengths = np.array([op.brightness, op.contrast, op.saturation, op.hue])
            spread = strengths * (2 * u[:, :4] - 1)
            order = np.argsort(u[:, 4:], axis=1)
            matrices, means = ops.jitter_steps(order, *(1 + spread[:, :3]).T)
            return matrices, means, spread[:, 3].astype(np.float32)
        case GaussianBlur():
            low, high = op.sigma
            return (ops.blur_kernels(low + (high - low) * u[:, 0], ops.blur_radius(high)),)
        case _:
            return ()


def _apply(op: Op, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return float crops [n, 3, S, S] in [0, 1] after one operation, contiguous."""
    match op:
        case ColorJitter():
            return ops.color_jitter(x, *parameters)
        case Grayscale():
            return ops.to_grey(x)
        case GaussianBlur():
            return ops.blur(x, *parameters)
        case Solarize():
            return ops.solarize(x, op.threshold)


def _to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return the arrays as tensors on `device`, sent there in one copy the host does not wait for."""
    if device.type == "cpu" or not arrays:
        return [torch.from_numpy(array) for array in arrays]
    padded = [-(-array.nbytes // 16) * 16 for array in arrays]  # typed views need aligned starts
    packed = torch.empty(sum(padded), dtype=torch.uint8, pin_memory=True)
    host = packed.numpy()
    starts = np.cumsum([0, *padded])[:-1].tolist()
    for array, start in zip(arrays, starts):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, starts)
    ]
