"""Steps whose gradient is not finite: refused, and kept so that they can be repeated.

A refused step changes nothing: no weight, no moving average, no queue, no running statistic. The data and
the schedules go on. What made it is written to `runs/a/incidents/`, from where `dense_ssl.replay` repeats
it. After `run.max_refused` of them in a row the run ends, with its checkpoints as they were.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods import Method
from dense_ssl.run_config import RunConfig
from dense_ssl.schedule import Step
from dense_ssl.step_context import moved_by_forward

logger = logging.getLogger("dense_ssl")

FOLDER, RECORDS = "incidents", "incidents.jsonl"
FORMAT = "dense_ssl-replay/1"
BUNDLES = 3  # a bundle holds the whole method: later ones would say the same and fill the disk


class StepGuard:
    """Watches the gradients of one rank, and undoes what a refused step has done."""

    def __init__(self, method: Method, config: RunConfig, rank: int) -> None:
        self._method, self._config, self._rank = method, config, rank
        self._folder = Path(config.run.dir) / FOLDER
        self._trained = [p for p in method.parameters() if p.requires_grad]
        self._volatile = [
            buffer for name, buffer in method.named_buffers() if moved_by_forward(name)
        ]
        self._before = [buffer.clone() for buffer in self._volatile]
        self._batches: list[MultiCropBatch] = []
        self._in_a_row = 0
        self._refused = 0

    def begin(self) -> None:
        """Remember what the forward passes of a step will move."""
        self._batches.clear()
        if self._volatile:
            torch._foreach_copy_(self._before, self._volatile)

    def seen(self, batch: MultiCropBatch) -> None:
        """Keep a micro-batch, as it came from the loader, until the step is over."""
        self._batches.append(batch)

    def undo(self) -> None:
        """Take back what the forward passes of this step have moved, and forget its micro-batches."""
        self._batches.clear()
        self._restore()

    def accepts(self, scaler: torch.amp.GradScaler) -> bool:
        """Return whether the gradient is finite; the same answer on all ranks, who share it.

        In float16 a scale that was too high is the scaler's to lower: it is refused at scale 1 only.
        """
        gradients = [p.grad for p in self._trained if p.grad is not None]
        finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if finite or (scaler.is_enabled() and scaler.get_scale() > 1):
            self._in_a_row = 0
            return True
        return False

    def refuse(self, step: Step, epoch: int, losses: Sequence[Mapping[str, Tensor]]) -> None:
        """Undo a step, say so, and write what repeats it.

        Raises:
            UserError: it is the last of too many in a row.
        """
        bundle = self._folder / f"step-{step.index:08d}-rank{self._rank}.pt"
        self._restore()
        self._in_a_row += 1
        self._refused += 1
        if self._refused <= BUNDLES:
            write_bundle(bundle, self._payload(step, epoch))
        found = {
            f"{name}[{micro}]": float(value.detach())
            for micro, values in enumerate(losses)
            for name, value in values.items()
        }
        record = {
            "step": step.index, "rank": self._rank, "kind": "gradient not finite", "losses": found,
            "bundle": bundle.name if bundle.exists() else None,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }  # fmt: skip
        self._record(record)
        logger.warning(
            "step %d refused: its gradient is not finite (loss %s); %s",
            step.index,
            ", ".join(f"{value:.4g}" for name, value in found.items() if name.startswith("loss[")),
            f"python -m dense_ssl.replay {bundle} repeats it" if bundle.exists() else "as before",
        )
        if self._in_a_row >= self._config.run.max_refused:
            first = sorted(self._folder.glob("*.pt"))
            raise UserError(
                f"the gradients of {self._in_a_row} steps in a row, up to {step.index}, are not finite: "
                "training diverged. The checkpoints before it are intact; lower optim.lr, or "
                f"train.precision=fp32; `python -m dense_ssl.replay {first[0] if first else bundle}` "
                "shows where it starts"
            )

    def counted(self) -> dict[str, int]:
        """Return {"refused": n} where steps have been refused since this process began."""
        return {"refused": self._refused} if self._refused else {}

    @torch.no_grad()
    def _restore(self) -> None:
        if self._volatile:
            torch._foreach_copy_(self._volatile, self._before)

    def _payload(self, step: Step, epoch: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "config": self._config.model_dump(mode="json")
            | {"method": self._method.config.model_dump(mode="json")},
            "step": {
                "index": step.index, "steps_per_epoch": step.steps_per_epoch,
                "epochs": step.epochs, "seed": step.seed,
            },
            "epoch": epoch,
            "rank": self._rank,
            "method": self._method.state_dict(),
            "batches": [as_plain(batch) for batch in self._batches],
        }  # fmt: skip

    def _record(self, record: Mapping[str, Any]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / RECORDS).open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # the run itself may still go on
            logger.warning("%s: not recorded: %s", self._folder, error.strerror)


def write_bundle(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a bundle under its name when it is whole; without room for it the run goes on."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            torch.save(dict(payload), file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        logger.warning("%s: no bundle written: %s", path, str(error).splitlines()[0])


def as_plain(batch: MultiCropBatch) -> dict[str, Any]:
    """Return a batch as containers of tensors, which can be read without running code."""
    views = {
        name: {"images": crops.images, "boxes": crops.boxes, "flipped": crops.flipped}
        for name, crops in batch.views.items()
    }
    return {"views": views, "index": batch.index, "label": batch.label}
