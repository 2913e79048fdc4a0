"""How long a checkpoint keeps the loop: `python -m dense_ssl.bench_checkpoint [--backbone NAME]`.

A student, a teacher and AdamW's two moments of a timm network are saved the way a run does it, behind the
loop's back, and the way it would be done without: written and synced to the disk while the loop waits.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from dense_ssl import checkpoint
from dense_ssl.checkpoint_writer import CheckpointWriter

REPEATS = 5


def main(argv: Sequence[str]) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dense_ssl.bench_checkpoint")
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="timm's name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (a temporary one)")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder))
    try:
        payload = state_of(args.backbone, torch.device(args.device))
        _say(
            f"{args.backbone} on {args.device}: {size_of(payload) / 1e9:.2f} GB of student, teacher, AdamW"
        )
        writer = CheckpointWriter(folder, keep=1, keep_every=None)
        _say(_row("behind the loop, first", [_timed(writer.save, payload, writer.wait)]))
        _say(
            _row(
                "behind the loop, later",
                [_timed(writer.save, payload, writer.wait) for _ in range(REPEATS)],
            )
        )
        writer.close()
        blocking = [_timed(lambda x: checkpoint.save(folder, x, keep=1), payload) for _ in range(2)]
        _say(_row("the loop waits", blocking))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def state_of(backbone: str, device: torch.device) -> dict[str, Any]:
    """Return what a run on this backbone saves, heads aside."""
    network = timm.create_model(backbone, num_classes=0)
    weights = {name: value.to(device) for name, value in network.state_dict().items()}
    copies = {
        part: {name: torch.rand_like(value.float()) for name, value in weights.items()}
        for part in ("teacher", "exp_avg", "exp_avg_sq")
    }
    return {"step": 1, "student": weights, **copies}


def size_of(payload: dict[str, Any]) -> int:
    """Return the bytes of all tensors."""
    parts = [part for part in payload.values() if isinstance(part, dict)]
    return sum(x.numel() * x.element_size() for part in parts for x in part.values())


def _timed(
    save: Callable[[dict[str, Any]], Any],
    payload: dict[str, Any],
    after: Callable[[], None] | None = None,
) -> tuple[float, float]:
    """Return wall and processor seconds that a save keeps its caller; `after` is not counted."""
    payload["step"] += 1
    wall, cpu = time.perf_counter(), time.thread_time()
    save(payload)
    spent = time.perf_counter() - wall, time.thread_time() - cpu
    if after is not None:
        after()
    return spent


def _row(name: str, spent: Sequence[tuple[float, float]]) -> str:
    wall, cpu = (statistics.median(column) for column in zip(*spent))
    return f"{name:<24} {wall:7.3f} s wall  {cpu:7.3f} s of this thread  (median of {len(spent)})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
