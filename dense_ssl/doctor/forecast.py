"""What a recipe would need of this machine: a few real steps and batches, and what follows from them."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dense_ssl.bench_step import random_batch
from dense_ssl.config import UserError
from dense_ssl.doctor.findings import Finding, Severity
from dense_ssl.loaders import make_loader, open_source
from dense_ssl.loaders.order import Order
from dense_ssl.log import duration
from dense_ssl.methods import make_method
from dense_ssl.optim import make_optimizer
from dense_ssl.run_config import RunConfig
from dense_ssl.schedule import Step
from dense_ssl.shares import shared
from kernels.bench_measure import peak_bytes

GB = 1e9
# On a CPU, two small batches, whose difference tells what an image costs; eight BN groups divide both.
CPU_IMAGES = (8, 16)
STEPS = 3  # at most
PATIENCE = 4.0  # seconds after which a step is not repeated
LOADER_SECONDS = 8.0
COMFORTABLE = 0.92  # share of a GPU's memory; the rest is the context, the allocator's gaps
IMAGENET = 1_281_167  # where no data is given


@dataclass(frozen=True)
class Cost:
    """What a step takes on one device, in the image count per device n: fixed + n * per image."""

    seconds: float  # per image and device
    fixed_bytes: float  # weights, teacher, optimiser state, gradients
    bytes_per_image: float

    def memory(self, images: int) -> float:
        """Return the bytes of a step of so many images."""
        return self.fixed_bytes + images * self.bytes_per_image


def forecast(config: RunConfig, gpus: int, with_data: bool) -> list[Finding]:
    """Return what the recipe needs, what will limit it, and what to change.

    Raises:
        UserError: the recipe or its data cannot be used.
    """
    ranks, cuda = max(gpus, 1), torch.cuda.is_available()
    config = shared(config, ranks)
    train = config.train
    per_rank = train.batch_size // (ranks * train.accumulate)
    if per_rank < 1 or train.batch_size % (ranks * train.accumulate):
        raise UserError(
            f"train.batch_size: {train.batch_size} is no multiple of {ranks} ranks x "
            f"{train.accumulate} micro-batches"
        )
    cost = measure_step(config, per_rank if cuda else 0)
    compute = ranks / cost.seconds
    images, loader = IMAGENET, None
    if with_data:
        images, loader = measure_loader(config)
    rate = min(compute, loader * (ranks if cuda else 1) if loader else compute)
    where = f"{ranks} GPU(s)" if cuda else "this CPU, one process"
    what = f"{images} images" if with_data else f"{images} images (no data given: ImageNet's count)"
    findings = [
        Finding("step", f"{compute:.3g} images/s on {where}, {_sharing(config, ranks, per_rank)}"),
        _memory(cost, per_rank),
        _checkpoints(cost, config),
    ]
    if loader is not None:
        findings.append(_loader(loader, compute / ranks if cuda else compute))
    seconds = train.epochs * images / rate
    findings.append(
        Finding(
            "whole run",
            f"{train.epochs:g} epochs of {what}: {duration(seconds)} at {rate:.3g} images/s, "
            f"{duration(seconds / train.epochs)} an epoch",
        )
    )
    findings.append(_limit(config, loader is not None and rate < compute, cuda))
    return findings


def _limit(config: RunConfig, by_data: bool, cuda: bool) -> Finding:
    """Return what makes the run no faster, and what would."""
    if by_data:
        cut = "" if config.data.cut == "device" or not cuda else "data.cut=device; "
        return Finding(
            "limit", f"the loader ({config.data.loader})", Severity.GOOD,
            f"{cut}data.workers up to the cores; smaller shards; data.loader=ffcv",
        )  # fmt: skip
    if not cuda:
        return Finding(
            "limit", "the network, on a CPU", Severity.GOOD, "a CUDA GPU; nothing else helps much"
        )
    wishes = []
    if config.train.precision == "fp32":
        wishes.append("train.precision=bf16")
    if not config.run.compile:
        wishes.append("run.compile=true")
    if config.run.checkpoint_gradients:
        wishes.append("run.checkpoint_gradients=false if memory allows")
    return Finding("limit", "the network", Severity.GOOD, "; ".join([*wishes, "more GPUs"]))


def _checkpoints(cost: Cost, config: RunConfig) -> Finding:
    """Return how much of the disk checkpoints take, and whether it is there."""
    folder = Path(config.run.dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    # One more is on its way while the others are still there. Gradients, counted in, are not saved.
    need = (config.run.keep_checkpoints + 1) * cost.fixed_bytes
    value = f"at most {need / GB:.1f} GB, of {free / GB:.0f} free at {there}"
    if config.run.keep_every_steps:
        value += f", and {cost.fixed_bytes / GB:.1f} GB every {config.run.keep_every_steps} steps"
    if need > free:
        return Finding(
            "checkpoints", value, Severity.BROKEN, "free some, or set RUN to another disk"
        )
    return Finding("checkpoints", value)


def measure_step(config: RunConfig, images: int) -> Cost:
    """Return the cost of steps of `images`; 0: of two small batches, by their difference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    method: Any = make_method(config.method).to(device)
    optimizer = make_optimizer(method.param_groups(), config.optim)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    step = Step(0, steps_per_epoch=100, epochs=config.train.epochs, seed=0)

    def run(batch: Any) -> None:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = method(batch, step).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def cost_of(count: int) -> tuple[float, int]:
        batch = random_batch(config.method, count, device)
        run(batch)
        peak = peak_bytes(lambda: run(batch), device)
        seconds: list[float] = []
        while len(seconds) < STEPS and sum(seconds) < PATIENCE:
            start = time.perf_counter()
            run(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds), peak

    state = sum(x.nbytes for x in (*method.parameters(), *method.buffers()))
    if images:
        (seconds, peak), (_, half) = cost_of(images), cost_of(max(images // 2, 1))
        sizes = (max(images // 2, 1), images)
        per_image = (peak - half) / max(sizes[1] - sizes[0], 1)
        moments = torch.cuda.memory_allocated(device) - state
        return Cost(seconds / images, state + moments + peak - images * per_image, per_image)
    low, high = CPU_IMAGES
    (_, less), (seconds, more) = cost_of(low), cost_of(high)
    per_image = (more - less) / (high - low)
    kept = [x for of_one in optimizer.state.values() for x in of_one.values()]
    moments = sum(x.nbytes for x in kept if isinstance(x, torch.Tensor))
    return Cost(seconds / high, state + moments + max(less - low * per_image, 0), per_image)


def _sharing(config: RunConfig, ranks: int, images: int) -> str:
    """Return how a step is shared, as training says it."""
    train, groups = config.train, config.method.backbone.bn_groups
    normed = f" in {groups} BatchNorm groups" if groups > 1 else ""
    return f"batch {train.batch_size} = {ranks} x {train.accumulate} accumulated x {images}{normed}"


def _memory(cost: Cost, images: int) -> Finding:
    need = cost.memory(images)
    value = f"{need / GB:.1f} GB per process at {images} images"
    if not torch.cuda.is_available():
        return Finding("memory", f"{value} (counted on the CPU from small batches)")
    total = torch.cuda.get_device_properties(0).total_memory
    if need <= COMFORTABLE * total:
        return Finding("memory", f"{value}, of {total / GB:.0f}")
    fits = int((COMFORTABLE * total - cost.fixed_bytes) / cost.bytes_per_image)
    if fits < 1:
        remedy = "not one image fits: run.checkpoint_gradients=true, smaller views, or a smaller backbone"
        return Finding("memory", f"{value}, of {total / GB:.0f}", Severity.BROKEN, remedy)
    remedy = f"train.micro_batch={fits} keeps the global batch; or run.checkpoint_gradients=true"
    return Finding("memory", f"{value}, of {total / GB:.0f}", Severity.BROKEN, remedy)


def measure_loader(config: RunConfig) -> tuple[int, float]:
    """Return the number of images, and how many a second the configured loader makes ready here."""
    source = open_source(config.data)
    batch = min(config.train.batch_size, max(len(source.sizes) // 2, 1), 64)
    order = Order(
        num_images=len(source.sizes), batch_size=batch, world_size=1, rank=0, accumulate=1, seed=0
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = make_loader(config.data, config.method.views, order, device, source)
    seen, start = 0, 0.0
    try:
        for number, _ in enumerate(loader.epoch(0)):
            if number == 0:  # compiles, starts workers
                start = time.perf_counter()
                continue
            seen += batch
            if time.perf_counter() - start > LOADER_SECONDS:
                break
        seconds = time.perf_counter() - start
    finally:
        loader.close()
    if not seen:
        raise UserError(
            f"{config.data.path}: {len(source.sizes)} images are too few to time a loader"
        )
    return len(source.sizes), seen / seconds


def _loader(rate: float, needed: float) -> Finding:
    value = f"{rate:.3g} images/s; a device takes {needed:.3g}"
    if rate < needed:
        remedy = "data.workers up to the cores, shards at SIZE=256; with a GPU data.cut=device"
        return Finding("loader", value, Severity.WARNING, remedy)
    return Finding("loader", value)
