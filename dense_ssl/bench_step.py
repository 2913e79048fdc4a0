"""`make bench-step METHOD=ibot`: one training step beside the published sequence of operations.

Same weights, same batch, same process, taking turns: forward and backward of the loss as the method makes
it and as `published` does. Times are medians, on a CPU of what all threads together took, so that other work
on the machine counts little; memory is the most that was allocated above weights and batch, counted by
torch's allocator. The two losses are printed: they are the same number.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dense_ssl.config import UserError, load
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.methods import MethodConfig, make_method
from dense_ssl.published import SEQUENCES
from dense_ssl.run_config import RunConfig, recipe_path
from dense_ssl.schedule import Step
from dense_ssl.views import draw_epoch, positions
from kernels.bench_measure import peak_bytes

SEED = 0
ROUNDS = 5
SOURCE_PX = (375, 500)  # height and width of the images that boxes are drawn for


@dataclass
class Row:
    """What one way of making the loss takes."""

    name: str
    run: Callable[[], Tensor]
    seconds: list[float] = field(default_factory=list)
    peak: int = 0  # bytes above weights and batch
    loss: float = 0.0


def main(argv: Sequence[str]) -> int:
    """Measure and print the table; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.bench_step",
        description="A training step beside the published sequence of operations.",
    )
    parser.add_argument("method", help="a recipe in configs/: ibot, demo/ibot, ...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=0.1")
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=where, help="cuda, cpu (cuda where there is one)")
    args = parser.parse_intermixed_args(argv)
    try:
        unused = ("data.path=none", "run.dir=none")
        config = load(RunConfig, recipe_path(args.method), (*unused, *args.overrides))
        if config.method.name not in SEQUENCES:
            raise UserError(
                f"{config.method.name}: its published sequence is not written out; there are "
                f"{', '.join(SEQUENCES)}"
            )
        if (
            config.method.name not in ("moco", "densecl", "revisiting")
            and "vit" not in config.method.backbone.name
        ):
            raise UserError(
                f"method.backbone.name: the published sequence of {config.method.name} is that of a ViT"
            )
        if args.batch < 1:
            raise UserError(f"--batch {args.batch}: at least one image")
        rows = measure(config, args.batch, torch.device(args.device))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    unit = "s a step" if torch.device(args.device).type == "cuda" else "CPU s"
    sys.stdout.write(described(config, args.batch, args.device) + "\n" + table(rows, unit) + "\n")
    return 0


def measure(config: RunConfig, images: int, device: torch.device) -> list[Row]:
    """Return the published sequence and ours, measured in turns on one random batch."""
    torch.manual_seed(SEED)
    method: Any = make_method(config.method).to(device)
    batch = random_batch(config.method, images, device)
    step = Step(10_000_000, steps_per_epoch=100, epochs=200_000, seed=SEED)  # past every warm-up
    sequence = SEQUENCES[config.method.name]

    def backward(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            method.zero_grad(set_to_none=True)
            torch.manual_seed(SEED)  # both drop the same paths
            with torch.autocast(device.type, torch.bfloat16, config.train.precision == "bf16"):
                value = loss()
            value.backward()
            return value.detach()

        return run

    rows = [
        Row("published", backward(lambda: sequence(method, batch, step)["loss"])),
        Row("ours", backward(lambda: method(batch, step).loss)),
    ]
    for row in rows:
        row.loss = float(row.run())
        method.zero_grad(set_to_none=True)
        row.peak = peak_bytes(row.run, device)
    for _ in range(ROUNDS):
        for row in rows:
            row.seconds.append(timed(row.run, device))
    return rows


def random_batch(config: MethodConfig, images: int, device: torch.device) -> MultiCropBatch:
    """Return a batch of noise, cut by boxes as the recipe draws them."""
    sizes = torch.tensor([SOURCE_PX] * images).numpy()
    plan = draw_epoch(config.views, sizes, SEED, 0)
    boxes = torch.from_numpy(plan.fractions(sizes)).transpose(0, 1).contiguous()
    flipped = torch.from_numpy(plan.flipped).transpose(0, 1).contiguous()
    where, views = positions(config.views), {}
    for view in config.views:
        shown = slice(images - max(round(images * view.part), 1), images)
        count = shown.stop - shown.start
        pixels = torch.randn(view.count, count, 3, view.size, view.size)
        at = where[view.name]
        crops = Crops(pixels, boxes[at, shown], flipped[at, shown])
        views[view.name] = Crops(
            *(x.to(device) for x in (crops.images, crops.boxes, crops.flipped))
        )
    index = torch.arange(images)
    return MultiCropBatch(views, index, torch.full((images,), -1))


def timed(run: Callable[[], Tensor], device: torch.device) -> float:
    """Return the seconds one run takes: on CUDA by the wall clock, else of all threads together."""
    if device.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def described(config: RunConfig, images: int, device: str) -> str:
    """Return one line on what is measured."""
    method = config.method
    views = " + ".join(f"{v.count} x {v.size}" for v in method.views)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return (
        f"{method.name}, {method.backbone.name}, {images} images of {views} px, "
        f"{config.train.precision}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def table(rows: Sequence[Row], unit: str) -> str:
    """Return the rows as text, with their ratios to the first; `unit` heads the times."""
    first = rows[0]
    lines = [f"{'':10} {unit:>9} {'min-max':>14} {'x':>5} {'peak MB':>9} {'x':>5}  {'loss':>9}"]
    for row in rows:
        seconds = median(row.seconds)
        span = f"{min(row.seconds):.3f}-{max(row.seconds):.3f}"
        lines.append(
            f"{row.name:10} {seconds:9.3f} {span:>14} {median(first.seconds) / seconds:5.2f} "
            f"{row.peak / 1e6:9.0f} {first.peak / row.peak:5.2f}  {row.loss:9.5f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
