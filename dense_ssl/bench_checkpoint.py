"""How long a checkpoint keeps the loop: `python -m dense_ssl.bench_checkpoint [--backbone NAME]`.

A timm network is trained on noise, with a teacher that follows it and AdamW, in the order of the real loop.
Its checkpoints are saved the way a run does it, behind the loop's back, and the way it would be done without:
written and synced to the disk while the loop waits. Counted is what the loop's thread spends in the save
and, before the optimiser's step after it, in waiting for the rest of the copy.
"""

import argparse
import os
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
from torch import nn

from dense_ssl import checkpoint
from dense_ssl.checkpoint_writer import CheckpointWriter

Spent = tuple[float, float]  # seconds: wall, processor of this thread


def main(argv: Sequence[str]) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dense_ssl.bench_checkpoint")
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="timm's name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=1, help="of a step (default 1)")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind (default 5)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (a temporary one)")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder))
    writer = CheckpointWriter(folder, keep=1, keep_every=None)
    try:
        loop = Loop(args.backbone, torch.device(args.device), args.images)
        loop.step()  # AdamW makes its state
        _say(
            f"{args.backbone} on {args.device}: {size_of(loop.payload()) / 1e9:.2f} GB of student, "
            f"teacher, AdamW; {args.images} images a step; load {os.getloadavg()[0]:.1f} "
            f"on {os.cpu_count()} cores"
        )
        rows: dict[str, list[tuple[Spent, Spent, Spent]]] = {}
        for number in range(1 + args.repeats):
            name = "behind the loop, later" if number else "behind the loop, first"
            rows.setdefault(name, []).append(loop.saved_by(writer.save, writer.finish_copy))
            writer.wait()
        for _ in range(args.repeats):
            spent = loop.saved_by(lambda x: checkpoint.save(folder, x, keep=1), lambda: None)
            rows.setdefault("the loop waits", []).append(spent)
        idle = [loop.saved_by(lambda _: None, lambda: None) for _ in range(args.repeats)]
        rows["no checkpoint"] = idle
        for name, found in rows.items():
            _say(_row(name, found))
    finally:
        writer.close()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


class Loop:
    """A student, its teacher and AdamW, trained on noise."""

    def __init__(self, backbone: str, device: torch.device, images: int) -> None:
        self._student = timm.create_model(backbone, num_classes=0).to(device)
        self._teacher = timm.create_model(backbone, num_classes=0).to(device).requires_grad_(False)
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=1e-5, fused=True)
        self._images = torch.randn(images, 3, 224, 224, device=device)
        self._done = 0

    def payload(self) -> dict[str, Any]:
        """Return what a run saves, heads aside."""
        return {
            "step": self._done,
            "student": self._student.state_dict(),
            "teacher": self._teacher.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def step(self, before_optimizer: Callable[[], None] = lambda: None) -> None:
        """Make one step; `before_optimizer` is called where a run waits for a copy."""
        wanted = self._teacher(self._images)
        nn.functional.mse_loss(self._student(self._images), wanted).backward()
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None])
        bool(norm.isfinite())  # as a run asks before every step: the passes are over then
        before_optimizer()
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self._teacher.parameters()), self._parameters(), 0.01)
        self._done += 1

    def saved_by(
        self, save: Callable[[dict[str, Any]], Any], finish: Callable[[], None]
    ) -> tuple[Spent, Spent, Spent]:
        """Save and make a step; return what the save, the wait before the optimiser and both with it took."""
        waits: list[Spent] = []
        start = _now()
        checkpoint.require_finite(self._student.parameters(), self._done)
        save(self.payload())
        saved = _since(start)

        def timed() -> None:
            begun = _now()
            finish()
            waits.append(_since(begun))

        self.step(timed)
        return saved, waits[0], _since(start)

    def _parameters(self) -> list[torch.Tensor]:
        return list(self._student.parameters())


def size_of(x: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    if isinstance(x, torch.Tensor):
        return x.nbytes
    if isinstance(x, dict | list | tuple):
        return sum(size_of(part) for part in (x.values() if isinstance(x, dict) else x))
    return 0


def _now() -> Spent:
    return time.perf_counter(), time.thread_time()


def _since(start: Spent) -> Spent:
    wall, cpu = _now()
    return wall - start[0], cpu - start[1]


def _row(name: str, found: Sequence[tuple[Spent, Spent, Spent]]) -> str:
    """Return medians of wall and thread seconds: kept in all, of that waiting, and with the step."""
    kept = [tuple(a + b for a, b in zip(saved, wait, strict=True)) for saved, wait, _ in found]
    columns = [("kept", kept), ("of that waiting", [wait for _, wait, _ in found])]
    columns.append(("with the step", [whole for *_, whole in found]))
    cells = []
    for title, spent in columns:
        wall, cpu = (statistics.median(column) for column in zip(*spent, strict=True))
        cells.append(f"{title} {wall:.3f} s wall, {cpu:.3f} s of this thread")
    return f"{name} (median of {len(found)}):\n    " + "\n    ".join(cells)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
