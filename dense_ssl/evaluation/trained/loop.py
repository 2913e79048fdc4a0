"""The loop of a network trained end to end: a rate per step, micro-batches, and a state now and then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from dense_ssl.distributed import rank
from dense_ssl.evaluation.classification.augmented import seeded
from dense_ssl.evaluation.ranks import share_buffers
from dense_ssl.evaluation.trained.job import Job, require_finite
from dense_ssl.evaluation.trained.settings import TrainedSettings, learning_rate
from dense_ssl.rng import key_of

_SHOWN_EVERY = 10  # steps: reading the loss waits for the device


def take_steps(
    model: nn.Module,
    optimizer: Optimizer,
    config: TrainedSettings,
    job: Job,
    *,
    start: int,
    total: int,
    steps_per_epoch: int,
    loss_of: Callable[[int, int], Tensor],
    after: Callable[[int], None] = lambda done: None,
    last: Callable[[], None] = lambda: None,
) -> None:
    """Take the steps from `start` up to `total` and keep the final state; others when they are due.

    Args:
        model: as it is kept; it is in training mode from here on.
        optimizer: whose groups have an `lr_scale`.
        config: rates, accumulation and the task's name.
        job: that states are kept in.
        start: steps taken before.
        total: steps of the whole run.
        steps_per_epoch: of the data.
        loss_of: the loss of micro-batch (step, number), a mean over its samples.
        after: called with the number of steps taken, after each, before a state is kept.
        last: called after the last step, before the final state is kept.

    Raises:
        UserError: weights are not finite where they would be kept.
    """
    progress = tqdm(
        total=total, initial=start, desc=config.task, unit="step", leave=False,
        disable=True if rank() else None,
    )  # fmt: skip
    model.train()
    with progress:
        for step in range(start, total):
            lr = learning_rate(config, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            for micro in range(config.accumulate):
                loss = loss_of(step, micro)
                (loss / config.accumulate).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not progress.disable and step % _SHOWN_EVERY == 0:
                progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)  # pyright: ignore
            progress.update()
            after(step + 1)
            if step + 1 < total and job.due():
                require_finite(model, step + 1)
                job.keep(model, optimizer, step + 1)
    require_finite(model, total)
    last()
    share_buffers(model)
    job.keep(model, optimizer, total)


@contextmanager
def drawn_for(
    config: TrainedSettings, stream: int, step: int, micro: int, device: torch.device
) -> Iterator[None]:
    """Run a network forward at the protocol's precision, what it draws keyed by step and rank."""
    with seeded(int(key_of(config.seed, stream, step, micro, rank()))):
        with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
            yield
