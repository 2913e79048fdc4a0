"""Pre-training: the run's configuration, the entry point, and the loop, top to bottom.

    python -m dense_ssl.pretrain densecl data.path=shards/coco run.dir=runs/a --gpus 8
    python -m dense_ssl.pretrain runs/a/config.yaml           # repeats or resumes the run

Exit codes: 0 done, 2 the user's input is wrong, 75 stopped by a signal with everything saved, or because
storage or another rank does not answer; the same command resumes.
"""

import argparse
import contextlib
import errno
import inspect
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dataprep.manifest import DataError
from dense_ssl import checkpoint, events
from dense_ssl.augment import POLICIES, Photometry
from dense_ssl.checkpoint_writer import CheckpointWriter
from dense_ssl.config import GaveUp, UserError, dump, load
from dense_ssl.distributed import World, any_rank, close_world, init_world, mean_over_ranks
from dense_ssl.incidents import StepGuard
from dense_ssl.launch import launch_ranks
from dense_ssl.loaders import Loader, make_loader, open_source
from dense_ssl.loaders.order import Order
from dense_ssl.loaders.prefetch import Prefetcher
from dense_ssl.log import Meter, RunLog, StepClock, logger, peak_memory_gb, setup_logging
from dense_ssl.lost_ranks import named
from dense_ssl.methods import Method, Step, make_method, warn_of_own_keys
from dense_ssl.micro_batches import MicroBatches, explain, free_memory, limited
from dense_ssl.optim import apply_schedules, clip_gradients, freeze, make_optimizer
from dense_ssl.run_config import RunConfig, RunSection, recipe_path, with_defaults
from dense_ssl.rundir import (
    check_same_run,
    check_same_start,
    claimed,
    data_fingerprint,
    restore,
)
from dense_ssl.shares import shared
from dense_ssl.signals import StopRequest
from dense_ssl.step_context import autocast, seed_everything, seed_noise
from dense_ssl.watch.watcher import Watcher
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.pretrained import start_from
from kernels import launch

DONE, WRONG_INPUT, STOPPED = 0, 2, 75  # 75: EX_TEMPFAIL, "try again", which schedulers requeue on
NO_WRITING = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Parse the command line and train; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.pretrain", description="Pre-train a method, or resume its run."
    )
    parser.add_argument("recipe", help="a name in configs/ (densecl, demo/moco) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=0.1")
    parser.add_argument("--gpus", type=int, default=1, help="ranks on this machine (default 1)")
    parser.add_argument("--nodes", type=int, default=1, help="machines, each running this command")
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="of several machines: the first one"
    )
    args = parser.parse_intermixed_args(argv)
    setup_logging(int(os.environ.get("RANK", "0")))
    try:
        config = load(RunConfig, recipe_path(args.recipe), args.overrides)
        if args.nodes > 1 and args.rendezvous is None:
            raise UserError(
                "--nodes: several machines need --rendezvous HOST:PORT of the first one"
            )
        if args.gpus * args.nodes > 1 and "RANK" not in os.environ:
            given = [args.recipe, *args.overrides]
            return launch_ranks(args.gpus, given, config, args.nodes, args.rendezvous)
        return train(config)
    except GaveUp as error:
        _leave(error)
    except (UserError, DataError, launch.ChoiceError) as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno in NO_WRITING:
            where = error.filename or "the run's folder"
            return _refuse(f"{where}: {error.strerror}; free space or choose another run.dir")
        raise


def train(config: RunConfig) -> int:
    """Run the recipe on this rank until it is done or told to stop; return the exit code."""
    # --- ranks ---------------------------------------------------------------------------------
    world = init_world(config.run.device, 2 * timedelta(minutes=config.run.stall_minutes))
    launch.choose(config.run.kernels, world.device)
    try:
        with StopRequest() as stop, named(world), claimed(Path(config.run.dir), world.rank):
            try:
                return _train(config, world, stop)
            except GaveUp:
                raise
            except UserError as error:
                if world.rank == 0:
                    events.ended(Path(config.run.dir), "refused", reason=str(error))
                raise
    except GaveUp as error:  # nothing is noted: storage may be what does not answer
        _leave(error)
    except torch.OutOfMemoryError as error:
        explain(error, config)
    finally:
        close_world(world)


def _train(recipe: RunConfig, world: World, stop: StopRequest) -> int:
    """Train `recipe` on this rank; what follows from the number of ranks is not stored with the run."""
    folder = Path(recipe.run.dir)
    saved = checkpoint.load_newest(folder / "checkpoints")
    config = shared(limited(recipe, world, saved), world.size)
    train_cfg, run_cfg = config.train, config.run

    # --- data: source, order, plan and loader ----------------------------------------------------
    source = open_source(config.data)
    order = Order(
        num_images=len(source.sizes),
        batch_size=train_cfg.batch_size,
        world_size=world.size,
        rank=world.rank,
        accumulate=train_cfg.accumulate,
        seed=train_cfg.seed,
    )
    views = config.method.views
    total_steps = int(train_cfg.epochs * order.steps_per_epoch)
    last_step = min(total_steps, train_cfg.steps or total_steps)
    if last_step == 0:
        raise UserError(
            f"train.epochs: {train_cfg.epochs} of {order.steps_per_epoch} steps an epoch is no step at all"
        )

    # --- method and optimiser ----------------------------------------------------------------------
    seed_everything(train_cfg.seed, run_cfg.deterministic)
    warn_of_own_keys(config.method, order.num_images)
    method = make_method(config.method).to(world.device)
    method = method.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    _check_photometry(method, config)
    photometry = Photometry(views, seed=train_cfg.seed).to(world.device)
    optimizer = make_optimizer(method.param_groups(), config.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=train_cfg.precision == "fp16")
    meter = Meter(world.device)
    micro_batches = MicroBatches(config, order.micro_batch, world, recipe.method.backbone.bn_images)

    # --- resume ------------------------------------------------------------------------------------
    fingerprint = data_fingerprint(source.sizes)
    asked = recipe.model_dump(mode="json")
    done = 0
    if saved is not None:
        saved["config"] = with_defaults(saved["config"])
        check_same_run(saved, asked, fingerprint)
        done = int(saved["step"])
    check_same_start(asked, done, fingerprint, world)
    if saved is not None:
        loads = {"method": method, "optimizer": optimizer, "scaler": scaler, "meter": meter}
        restore(saved, run_cfg.dir, {name: part.load_state_dict for name, part in loads.items()})
        del saved
    elif train_cfg.init is not None:
        start_from(train_cfg.init, method, config.method.name)
    if world.rank == 0 and not (folder / "config.yaml").exists():
        checkpoint.write_atomically(folder / "config.yaml", dump(recipe).encode())

    trained: nn.Module = _prepare_for_ranks(method, world, run_cfg)
    log = watcher = None
    if world.rank == 0:
        events.announce(recipe, config, method, order, world, done, last_step)
        log = RunLog(
            folder, done, last_step, run_cfg.log, name=f"{config.method.name}-{folder.name}"
        )
        watcher = Watcher(config, method, source, order, log)

    writer = CheckpointWriter(
        folder / "checkpoints", run_cfg.keep_checkpoints, run_cfg.keep_every_steps
    )

    def save(step: int) -> None:
        if world.rank == 0:
            checkpoint.require_finite(method.student.parameters(), step)
            payload = {
                "step": step,
                "epoch": step / order.steps_per_epoch,
                "config": asked,
                "data": fingerprint,
                "method": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "meter": meter.state_dict(),
                "micro_batch": micro_batches.images,
                "ranks": world.size,
            }
            writer.save(payload)

    def at(step: int) -> Step:
        return Step(step, order.steps_per_epoch, train_cfg.epochs, train_cfg.seed)

    def passes(batches: Iterator[Any], step: Step, epoch: int) -> tuple[list[Any], list[Any]]:
        """Leave the gradients of a step; return the carries and the losses of its micro-batches."""
        carries, losses = [], []
        guard.begin()
        for micro, batch in micro_batches.of_step(batches, clock):
            guard.seen(batch)
            batch = photometry(batch, epoch)
            seed_noise(step.at_micro(micro), world.rank)
            with _no_sync_before_last(trained, micro, micro_batches.count):
                with autocast(world.device, train_cfg.precision):
                    output = trained(batch, step.at_micro(micro))
                scaler.scale(output.loss / micro_batches.count).backward()
            carries.append(output.carry)
            losses.append({"loss": output.loss, **{f"loss_{k}": v for k, v in output.logs.items()}})
        return carries, losses

    # --- loop --------------------------------------------------------------------------------------
    loader = make_loader(config.data, views, order, world.device, source)
    clock = StepClock()
    guard = StepGuard(method, config, world.rank)
    saved_at = done
    stopping = False
    patience_s = 60 * run_cfg.stall_minutes
    try:
        if watcher is not None and done == 0:
            watcher.look(at(0), last_step)
            clock.restart()
        for epoch, batches in _epochs(loader, order, world, done, last_step, patience_s):
            while done < last_step and done // order.steps_per_epoch == epoch and not stopping:
                step = at(done)
                micro_batches.begin()
                made = None
                while made is None:
                    try:
                        made = passes(batches, step, epoch)
                    except torch.OutOfMemoryError as error:
                        micro_batches.halve(error)
                    if made is None:  # once more, in smaller pieces
                        optimizer.zero_grad(set_to_none=True)
                        method.regroup(micro_batches.bn_groups)
                        guard.undo()
                        free_memory()
                carries, losses = made
                # Before anything waits for the GPU: hosts hear of a lost rank, NCCL only waits for it.
                stopping = any_rank(stop.requested, world)
                values = apply_schedules(optimizer, config.optim, step, train_cfg.batch_size)
                scaler.unscale_(optimizer)
                if guard.accepts(scaler):
                    freeze(optimizer, step)
                    clip_gradients(optimizer, config.optim.clip)
                    writer.finish_copy()
                    scaler.step(optimizer)
                    method.after_step(carries, step)
                    for values_of_micro in losses:
                        meter.add(values_of_micro)
                else:
                    guard.refuse(step, epoch, losses)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                done += 1
                clock.seen(train_cfg.batch_size)

                if done % run_cfg.log_every_steps == 0 or done == last_step:
                    means = _read_means(meter, done)
                    images_per_s, data_wait = clock.read()
                    if log is not None:
                        log.write(
                            {
                                "step": done,
                                "epoch": done / order.steps_per_epoch,
                                **means,
                                **values,
                                "images_per_s": images_per_s,
                                "data_wait": data_wait,
                                "replaced": len(loader.replaced),
                                **guard.counted(),
                                **peak_memory_gb(world.device),
                                "eta_s": (last_step - done) * train_cfg.batch_size / images_per_s,
                            }
                        )
                if watcher is not None:
                    watcher.look(at(done), last_step, clock)
                if done % run_cfg.checkpoint_every_steps == 0 or stopping or done == last_step:
                    save(done)
                    saved_at = done
            if stopping:
                break
        writer.wait()
    finally:
        writer.close()
        loader.close()
        if log is not None:
            log.close()

    # --- close -------------------------------------------------------------------------------------
    if world.rank == 0:
        events.ended(folder, "stopped" if done < last_step else "done", step=done)
    if done < last_step:
        logger.info("stopped at step %d, everything saved; the same command resumes", saved_at)
        return STOPPED
    if world.rank == 0:
        sys.stdout.write(f"weights sha256: {weights_sha256(method.state_dict())}\n")
        sys.stdout.flush()
    return DONE


def _epochs(
    loader: Loader, order: Order, world: World, done: int, last_step: int, patience_s: float
) -> Iterator[tuple[int, Iterator[Any]]]:
    """Yield each epoch that is left with its batches on the device, the first from where it stopped."""
    for epoch in range(done // order.steps_per_epoch, -(-last_step // order.steps_per_epoch)):
        start = max(done - epoch * order.steps_per_epoch, 0)
        with Prefetcher(loader.epoch(epoch, start), world.device, patience_s) as batches:
            yield epoch, iter(batches)


def _prepare_for_ranks(method: Method, world: World, run_cfg: RunSection) -> nn.Module:
    """Return the method ready to be called: compiled, checkpointed and wrapped as asked for."""
    if run_cfg.checkpoint_gradients:
        method.student["backbone"].checkpoint_gradients()  # pyright: ignore
    if run_cfg.compile:
        method.student["backbone"].compile_encoder()  # pyright: ignore
        method.teacher["backbone"].compile_encoder()  # pyright: ignore
    if world.size == 1:
        return method
    # Queues and centres are built from gathered values and BatchNorm is local: nothing to broadcast.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    no_broadcast: dict[str, Any] = {name: False}
    ddp = DistributedDataParallel(method, gradient_as_bucket_view=True, **no_broadcast)
    if run_cfg.grad_compression == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


def _no_sync_before_last(trained: nn.Module, micro: int, accumulate: int) -> Any:
    if isinstance(trained, DistributedDataParallel) and micro < accumulate - 1:
        return trained.no_sync()
    return contextlib.nullcontext()


def _check_photometry(method: Method, config: RunConfig) -> None:
    """Refuse policies that move pixels where the method computes with boxes."""
    for view in config.method.views:
        names = (view.photometric,) if isinstance(view.photometric, str) else view.photometric
        for name in names:
            if method.uses_boxes and name in POLICIES and POLICIES[name].moves_pixels:
                raise UserError(
                    f"method.views: {view.name} uses {name}, which moves pixels, but "
                    f"{config.method.name} computes with crop boxes; take a photometric-only policy"
                )


def _read_means(meter: Meter, step: int) -> dict[str, float]:
    """Return the logged means over ranks as floats; the one place where a step reads the device.

    Raises:
        UserError: the loss is not finite; nothing has been saved since it was.
    """
    means = {name: float(mean_over_ranks(value)) for name, value in meter.means().items()}
    if not all(abs(value) < float("inf") for value in means.values()):
        raise UserError(
            f"the loss is {means['loss']} at step {step}: training diverged. The checkpoints before it "
            "are intact; lower optim.lr, or train.precision=fp32"
        )
    return means


def _leave(error: GaveUp) -> NoReturn:
    """Say why and end this process at once: threads and ranks that hang would be waited for."""
    _refuse(str(error))
    sys.stdout.flush()
    os._exit(STOPPED)


def _refuse(message: str) -> int:
    rank = int(os.environ.get("RANK", "0"))
    sys.stderr.write(f"{f'[rank {rank}] ' if rank else ''}error: {message}\n")
    return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
