"""What a run says while it trains: JSON lines always, one live console line, TensorBoard, W&B if asked.

Losses are summed on the device and read once per logged step, so a step never waits for the host.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from dataprep import plain_json
from dense_ssl.config import UserError
from dense_ssl.watch import RECORDS

logger = logging.getLogger("dense_ssl")


def setup_logging(rank: int) -> None:
    """Send this project's messages to stderr, from rank 0 only unless something is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.propagate = False


class Meter:
    """Sums of device-side scalars since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's detached scalars; nothing is read back."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def means(self) -> dict[str, Tensor]:
        """Return the means since the last call, still on the device, and start again."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, so that a resumed run logs the same means."""
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from sums saved by `state_dict`."""
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}
        self._count = int(state["count"])


class RunLog:
    """The log of one run on rank 0: `log.jsonl`, the console, TensorBoard and W&B."""

    def __init__(
        self, folder: Path, start_step: int, total_steps: int, writers: tuple[str, ...], name: str
    ) -> None:
        self._file = _continued(folder / "log.jsonl", start_step)
        self._looks = _continued(folder / RECORDS, start_step)
        self._total = total_steps
        self._live = sys.stderr.isatty()
        self._tensorboard = _tensorboard(folder, start_step) if "tensorboard" in writers else None
        self._wandb = _wandb(folder, name) if "wandb" in writers else None

    def write(self, record: dict[str, Any]) -> None:
        """Log one step: a JSON line (flushed), the console line, and the optional writers."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        line = console_line(record, self._total)
        if self._live:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            sys.stderr.write("\r\x1b[2K" + line[: width - 1])
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()
        self._to_writers(record, "")

    def write_look(self, record: dict[str, Any], line: str) -> None:
        """Log what `dense_ssl.watch` has seen at a step, and show `line`."""
        self._looks.write(json.dumps(record) + "\n")
        self._looks.flush()
        sys.stderr.write(("\r\x1b[2K" if self._live else "") + line + "\n")
        sys.stderr.flush()
        self._to_writers(record, "watch/")

    def _to_writers(self, record: Mapping[str, Any], prefix: str) -> None:
        values = {
            prefix + k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"
        }
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=record["step"])

    def close(self) -> None:
        """Flush and close everything; ends the live line."""
        if self._live:
            sys.stderr.write("\n")
        self._file.close()
        self._looks.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def console_line(record: Mapping[str, Any], total_steps: int) -> str:
    """Return one line a person can read at a glance."""
    parts = " ".join(
        f"{name.removeprefix('loss_')} {value:.3f}"
        for name, value in record.items()
        if name.startswith("loss_")
    )
    loss = f"loss {record['loss']:.4f}" if "loss" in record else "every step refused"
    memory = f"  {record['memory_gb']:.1f} GB" if "memory_gb" in record else ""
    return (
        f"step {record['step']}/{total_steps}  epoch {record['epoch']:.2f}  {loss}"
        f"{f' ({parts})' if parts else ''}  lr {record['lr']:.3g}  {record['images_per_s']:.0f} img/s"
        f"  data wait {100 * record['data_wait']:.0f} %{memory}  ETA {duration(record['eta_s'])}"
    )


def duration(seconds: float) -> str:
    """Return seconds as `4 d 03 h`, `2 h 05 min`, `12 min 30 s` or `8 s`."""
    seconds = int(seconds)
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {secs:02d} s"
    return f"{secs} s"


def keep_lines_before(path: Path, step: int) -> None:
    """Drop the lines of steps after `step` from a JSON-lines log, and a last line cut short.

    A resumed run repeats the steps since its checkpoint; without this they would be logged twice.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = plain_json.parse(line, not_numbers=True)
        except ValueError:
            break
        at = record.get("step") if isinstance(record, dict) else None
        if not isinstance(at, int) or at > step:
            break
        kept.append(line)
    aside = path.with_suffix(".writing")
    aside.write_text("".join(line + "\n" for line in kept))
    aside.replace(path)


def _continued(path: Path, step: int) -> TextIO:
    """Open a JSON-lines log to go on after a step."""
    keep_lines_before(path, step)
    return path.open("a")


class StepClock:
    """Wall time and time spent waiting for data since the last reading."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start counting from now."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for the loader."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Leave out time that training was not what was done."""
        self._start += seconds

    def seen(self, images: int) -> None:
        """Add source images trained on, over all ranks."""
        self._images += images

    def read(self) -> tuple[float, float]:
        """Return images/s and the share of time spent waiting for data, then start again."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        result = self._images / elapsed, min(self._waited / elapsed, 1.0)
        self.restart()
        return result


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """Return the peak of allocated CUDA memory in GB, or nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}


def _tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("TensorBoard is not installed: log.jsonl is written, event files are not")
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)


def _wandb(folder: Path, name: str) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "run.log: wandb is asked for but not installed; pip install wandb"
        ) from None
    return wandb.init(project="dense-ssl", name=name, id=folder.name, dir=folder, resume="allow")
