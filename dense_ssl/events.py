"""What happened to a run, one line each in `events.jsonl`: started, resumed, ended, and why.

The log has what training says, `incidents/` steps that were refused; here is the rest, for the report.
"""

import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from dense_ssl.config import UserError
from dense_ssl.distributed import World
from dense_ssl.loaders.order import Order
from dense_ssl.methods import Method
from dense_ssl.run_config import RunConfig

logger = logging.getLogger("dense_ssl")

EVENTS = "events.jsonl"


def note(folder: Path, kind: str, **facts: Any) -> None:
    """Append an event with its time; where that cannot be written the run goes on."""
    record = {"kind": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
    try:
        with (folder / EVENTS).open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        logger.warning("%s: not recorded: %s", folder / EVENTS, error.strerror)


def ended(folder: Path, kind: str, **facts: Any) -> None:
    """Note how a run has ended, and leave its page; without the page it has ended all the same."""
    from dense_ssl.report.__main__ import write_report  # not needed before

    if not (folder / "config.yaml").is_file():
        return  # it has not begun
    note(folder, kind, **facts)
    try:
        write_report(folder)
    except UserError as error:
        logger.warning("no report: %s", error)


def announce(
    recipe: RunConfig,
    config: RunConfig,
    method: Method,
    order: Order,
    world: World,
    done: int,
    last_step: int,
) -> None:
    """Say what is about to be trained, on what, and where it goes; note the start.

    `config` is `recipe` on so many ranks.
    """
    millions = sum(p.numel() for p in method.student.parameters()) / 1e6
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else "CPU"
    train, backbone = config.train, config.method.backbone
    logger.info(
        "%s  %s, %.1f M parameters, on %s",
        config.method.name, backbone.name, millions,
        device if world.size == 1 else f"{world.size} x {device}",
    )  # fmt: skip
    logger.info(
        "batch %d%s%s, %s; %d images from %s by %s",
        train.batch_size, _divided(train.batch_size, world.size, train.accumulate),
        f" in {backbone.bn_groups} BatchNorm groups" if backbone.bn_groups > 1 else "",
        train.precision, order.num_images, config.data.path, config.data.loader,
    )  # fmt: skip
    logger.info(
        "%d steps = %.3g epochs of %d  -> %s",
        last_step, last_step / order.steps_per_epoch, order.steps_per_epoch, config.run.dir,
    )  # fmt: skip
    wanted, per_group = recipe.method.backbone.bn_images, order.micro_batch // backbone.bn_groups
    if wanted is not None and per_group != wanted:
        logger.warning(
            "BatchNorm statistics are of %d images, not of method.backbone.bn_images=%d: a rank takes %d "
            "at a time", per_group, wanted, order.micro_batch,
        )  # fmt: skip
    if done:
        share = f"{100 * done / last_step:.0f} %"
        logger.info("resuming at step %d of %d (%s)", done, last_step, share)
    note(
        Path(config.run.dir), "started", step=done, ranks=world.size, device=device,
        machine=machine(), pid=os.getpid(),
    )  # fmt: skip


def machine() -> str:
    """Return this machine in words: processor, cores, GPUs, versions."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        f"{processor}, {os.cpu_count()} cores, {', '.join(gpus) or 'no CUDA GPU'}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _divided(batch: int, ranks: int, accumulate: int) -> str:
    """Return how a batch is divided, where it is."""
    if ranks * accumulate == 1:
        return ""
    parts = [f"{ranks} ranks"] * (ranks > 1) + [f"{accumulate} accumulated"] * (accumulate > 1)
    return f" = {' x '.join(parts)} x {batch // ranks // accumulate}"
