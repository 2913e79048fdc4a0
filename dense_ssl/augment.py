"""Photometry: uint8 crops become normalised floats, in the colours their view's policy asks for.

The random numbers of a policy are a pure function of (seed, epoch, image, crop position) and drawn on
the host, so they depend neither on the rank, nor on what else is in the batch, nor on the device.
They go to the device in one small copy per chunk of crops, or per view, and nothing comes back, so the
host never waits.

Where kernels run in Triton, all crops of a view go through `kernels.photometric` together, policies that
it cannot express excepted; elsewhere operation after operation, in torch. Both take the same numbers.

Geometry happened before this and happens nowhere else: no operation here moves a pixel, except
AutoAugment's, which a method that computes with boxes refuses. They work on the 8-bit crops, before
everything else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import torch
from torch import Tensor, nn

from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.photometry import autoaugment
from dense_ssl.photometry import ops as ops
from dense_ssl.photometry.policies import (
    POLICIES,
    AutoAugment,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    OneOf,
    Op,
    Policy,
    Solarize,
    branches,
    view_policies,
)
from dense_ssl.rng import fold_np, key_of, uniform_np
from dense_ssl.views import ViewSpec
from kernels import launch
from kernels.colours import NOTHING, SATURATION
from kernels.photometric import photometric

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
        if any(policy.moves_pixels for policy in policies):
            images = images.clone(memory_format=torch.contiguous_format)
            for policy, own, (crops,) in _chunks(policies, keys, images):
                _autoaugment_(crops, policy, own)
        if launch.on_triton(images) and all(_is_fused(policy) for policy in policies):
            program = _to_device(_program(policies, keys), images.device)
            out = photometric(images.flatten(0, 1), *program, mean=MEAN, std=STD, dtype=self.dtype)
            return out.view(images.shape)
        out = torch.empty_like(images, dtype=self.dtype)
        for policy, own, (source, target) in _chunks(policies, keys, images, out):
            self._chunk(source, target, policy, own)
        return out

    def _chunk(self, source: Tensor, target: Tensor, policy: Policy, keys: np.ndarray) -> None:
        """Write the normalised floats of uint8 crops [n, 3, S, S] into `target`."""
        steps = _colour_steps(policy, keys)
        parameters = [step.parameters for step in steps]
        arrays = [a for step, own in zip(steps, parameters) for a in (step.rows, *own)]
        tensors = iter(_to_device(arrays, source.device))
        with torch.autocast(source.device.type, enabled=False):
            x = source.float().mul_(1 / 255)
            for step, own in zip(steps, parameters):
                rows = next(tensors)
                sent = [next(tensors) for _ in own]
                if len(rows) == len(x):
                    x = _apply(step.op, x, sent)
                else:
                    x.index_copy_(0, rows, _apply(step.op, x.index_select(0, rows), sent))
            target.copy_(torch.addcmul(self.shift, x, self.scale))


def _chunks(
    policies: Sequence[Policy], keys: np.ndarray, *views: Tensor
) -> Iterator[tuple[Policy, np.ndarray, list[Tensor]]]:
    """Yield policy, keys [n] and crops [n, ...] of each view [V, B, ...], chunk by chunk."""
    images = views[0]
    size = max(1, _CHUNK_BYTES[images.device.type] // (4 * images[0, 0].numel()))
    first = 0
    for shared, group in groupby(policies):
        last = first + len(list(group))
        flat = keys[first:last].ravel()
        rows = [view[first:last].flatten(0, 1) for view in views]
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            yield shared, flat[part], [row[part] for row in rows]
        first = last


@dataclass(frozen=True)
class _Step:
    """An operation, the crops it is done to as rows of the chunk, and their random numbers."""

    op: Op
    rows: np.ndarray  # int64 [m], ascending
    u: np.ndarray  # float64 [m, 8], uniform

    @property
    def parameters(self) -> tuple[np.ndarray, ...]:
        """What `_apply` needs beside the images."""
        match self.op:
            case ColorJitter():
                order, factors = _jitter(self.op, self.u)
                matrices, means = ops.jitter_steps(order, *factors[:, :3].T)
                return matrices, means, factors[:, 3].astype(np.float32)
            case GaussianBlur():
                sigma = _sigma(self.op, self.u)
                return (ops.blur_kernels(sigma, ops.blur_radius(self.op.sigma[1])),)
            case _:
                return ()


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
                yield _Step(op, chosen, u[chosen, 1:])


def _colour_steps(policy: Policy, keys: np.ndarray) -> list[_Step]:
    """Return the steps after AutoAugment of crops, given their keys [n]."""
    steps = _draw(policy.ops, keys, np.arange(len(keys)))
    return [step for step in steps if not isinstance(step.op, AutoAugment)]


def _autoaugment_(crops: Tensor, policy: Policy, keys: np.ndarray) -> None:
    """Do AutoAugment, in place, to those of uint8 crops [n, 3, H, W] that a policy gives it to."""
    size = (crops.shape[2], crops.shape[3])
    done = [
        operation
        for step in _draw(policy.ops, keys, np.arange(len(keys)))
        if isinstance(step.op, AutoAugment)
        for operation in autoaugment.drawn(step.u, step.rows, size)
    ]
    sent = iter(_to_device([a for x in done for a in (x.rows, x.numbers)], crops.device))
    for operation in done:
        autoaugment.apply_(crops, operation.kind, next(sent), next(sent))


def _jitter(op: ColorJitter, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order [n, 4] of brightness, contrast, saturation, hue, and their factors [n, 4]."""
    strengths = np.array([op.brightness, op.contrast, op.saturation, op.hue])
    spread = strengths * (2 * u[:, :4] - 1)
    return np.argsort(u[:, 4:], axis=1), spread + np.array([1, 1, 1, 0])


def _sigma(op: GaussianBlur, u: np.ndarray) -> np.ndarray:
    """Return the standard deviations [n] of a blur, in pixels."""
    low, high = op.sigma
    return low + (high - low) * u[:, 0]


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
        case AutoAugment():
            raise AssertionError("it works on 8-bit crops, before all others")


# In `photometric`; AutoAugment is done before it
_PLACES = {AutoAugment: -1, ColorJitter: 0, Grayscale: 0, GaussianBlur: 1, Solarize: 2}
_STEPS = {ColorJitter: 4, Grayscale: 1}  # of `photometric`, for one operation


def _is_fused(policy: Policy) -> bool:
    """Return whether `photometric` can do a policy: one jitter and greys, one blur, one solarising."""
    for path in policy.paths():
        places = [_PLACES[type(op)] for op in path]
        jitters = sum(isinstance(op, ColorJitter) for op in path)
        if places != sorted(places) or max(jitters, places.count(1), places.count(2)) > 1:
            return False
    return True


def _program(policies: Sequence[Policy], keys: np.ndarray) -> list[np.ndarray]:
    """Return kinds, factors, threshold and, if a crop is blurred, blur and kernels of `photometric`.

    They are for the crops of a view in one row, given its policies [V] and the keys [V, B].
    """
    every = [
        [op for choice in policy.ops for branch in branches(choice) for op in branch]
        for policy in policies
    ]
    width = max(sum(_STEPS.get(type(op), 0) for op in operations) for operations in every)
    kinds = np.full((keys.size, width), NOTHING, np.int32)
    factors = np.zeros((keys.size, width), np.float32)
    threshold = np.full(keys.size, np.inf, np.float32)
    sigma = np.full(keys.size, np.nan)
    first = 0
    for policy, group in groupby(policies):
        own = keys.ravel()[first : first + len(list(group)) * keys.shape[1]]
        used = 0
        for step in _colour_steps(policy, own):
            rows = first + step.rows
            match step.op:
                case ColorJitter():
                    order, strengths = _jitter(step.op, step.u)
                    kinds[rows, used : used + 4] = order
                    factors[rows, used : used + 4] = np.take_along_axis(strengths, order, axis=1)
                case Grayscale():
                    kinds[rows, used] = SATURATION
                case GaussianBlur():
                    sigma[rows] = _sigma(step.op, step.u)
                case Solarize():
                    threshold[rows] = step.op.threshold
            used += _STEPS.get(type(step.op), 0)
        first += len(own)
    blurred = np.flatnonzero(~np.isnan(sigma))
    if len(blurred) == 0:
        return [kinds, factors, threshold]
    blur = np.full(keys.size, -1, np.int32)
    blur[blurred] = np.arange(len(blurred))
    widest = max(op.sigma[1] for op in chain.from_iterable(every) if isinstance(op, GaussianBlur))
    kernels = ops.blur_kernels(sigma[blurred], ops.blur_radius(widest))
    return [kinds, factors, threshold, blur, kernels]


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
