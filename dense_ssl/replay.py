"""Repeat a refused step: `python -m dense_ssl.replay runs/a/incidents/step-00001234-rank0.pt`.

A bundle holds the method as it was before the step, the micro-batches as the loader gave them, and where
training stood: colours and drop path are functions of that, so the step is the same to the bit on the
device it was made on. Of a run on several ranks it repeats one rank's share, alone. Shown are the layers in
the order they ran, up to the first whose result is not finite, and then the parameters whose gradient is not.

Exit codes: 0 the step was repeated, 2 the bundle cannot be used.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dense_ssl import plain_torch
from dense_ssl.augment import Photometry
from dense_ssl.config import UserError, validate
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.incidents import FORMAT
from dense_ssl.methods import Method, make_method
from dense_ssl.run_config import RunConfig
from dense_ssl.schedule import Step
from dense_ssl.step_context import autocast, seed_noise


@dataclass(frozen=True, slots=True)
class Statistic:
    """What a tensor holds."""

    name: str
    shape: tuple[int, ...]
    finite: float  # share of the elements
    largest: float  # magnitude, of the finite ones
    mean: float  # of those

    @staticmethod
    def of(name: str, x: Tensor) -> "Statistic":
        """Return the statistic of a tensor."""
        x = x.detach().float()
        good = x.isfinite()
        kept = x[good]
        some = kept.numel() > 0
        return Statistic(
            name,
            tuple(x.shape),
            float(good.float().mean()) if x.numel() else 1.0,
            float(kept.abs().max()) if some else 0.0,
            float(kept.mean()) if some else 0.0,
        )

    @property
    def whole(self) -> bool:
        """Return whether all elements are finite."""
        return self.finite == 1.0


@dataclass(frozen=True)
class Replay:
    """What repeating a step showed."""

    losses: dict[str, float]
    layers: list[Statistic]  # in the order they ran, up to the first that is not finite
    first: Statistic | None  # that one
    gradients: list[Statistic]  # those that are not finite


def main(argv: Sequence[str]) -> int:
    """Parse the command line, repeat and print; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.replay",
        description="Repeat a refused step and show where it stops being finite.",
    )
    parser.add_argument("bundle", type=Path, help="a file in RUN/incidents/")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=where, help="cuda, cpu (cuda where there is one)")
    parser.add_argument("--layers", type=int, default=12, help="how many to show (default 12)")
    args = parser.parse_args(argv)
    try:
        bundle, replay = replayed(args.bundle, torch.device(args.device))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{args.bundle}: step {bundle['step']['index']}, rank {bundle['rank']}\n")
    sys.stdout.write(described(replay, args.layers) + "\n")
    return 0


def replayed(path: Path, device: torch.device) -> tuple[dict[str, Any], Replay]:
    """Return a bundle, and what its step shows when it is made again.

    Raises:
        UserError: it is no bundle, damaged, or not of this version.
    """
    bundle = read_bundle(path)
    try:
        return bundle, repeat(bundle, device)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}; take --device cpu") from None
    except Exception as error:  # tensors of any shape, names and numbers of any kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: its step cannot be repeated, at least by this version ({reason})"
        ) from None


def read_bundle(path: Path) -> dict[str, Any]:
    """Return the content of a bundle; code in it is refused.

    Raises:
        UserError: it is no bundle, or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such bundle; a run writes them to its folder incidents/")
    try:
        payload = plain_torch.load(path)
    except (OSError, plain_torch.NotPlain) as error:
        raise UserError(f"{path}: not readable: {str(error)[:150]}") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(f"{path}: not a bundle (no format {FORMAT!r})")
    return payload


def repeat(bundle: dict[str, Any], device: torch.device) -> Replay:
    """Return what the step shows when it is made again."""
    config = validate(RunConfig, bundle["config"], "the bundle's configuration")
    method = make_method(config.method)
    method.load_state_dict(bundle["method"])
    method = method.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    photometry = Photometry(config.method.views, seed=config.train.seed).to(device)
    step = Step(**bundle["step"])
    watch = Watch(method)
    losses: dict[str, float] = {}
    for micro, plain in enumerate(bundle["batches"]):
        batch = photometry(from_plain(plain).to(device), bundle["epoch"])
        for name, crops in batch.views.items():
            watch.note(f"view {name}", crops.images)
        seed_noise(step.at_micro(micro), bundle["rank"])
        with autocast(device, config.train.precision):
            output = method(batch, step.at_micro(micro))
        (output.loss / len(bundle["batches"])).backward()
        losses[f"loss[{micro}]"] = float(output.loss.detach())
        losses |= {f"loss_{name}[{micro}]": float(value) for name, value in output.logs.items()}
    gradients = [
        Statistic.of(name, p.grad)
        for name, p in method.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    return Replay(losses, watch.seen, watch.first, gradients)


class Watch:
    """Notes what every layer returns until one returns something that is not finite."""

    def __init__(self, method: Method) -> None:
        self.seen: list[Statistic] = []
        self.first: Statistic | None = None
        for name, module in method.named_modules():
            if name and not list(module.children()):
                module.register_forward_hook(lambda _m, _i, out, name=name: self._hook(name, out))

    def note(self, name: str, x: Tensor) -> None:
        """Note a tensor, unless the first that is not finite has been found."""
        if self.first is None and x.is_floating_point():
            found = Statistic.of(name, x)
            self.seen.append(found)
            if not found.whole:
                self.first = found

    def _hook(self, name: str, out: Any) -> None:
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.note(name, x)


def from_plain(plain: dict[str, Any]) -> MultiCropBatch:
    """Return the batch that `incidents.as_plain` has taken apart."""
    views = {name: Crops(**parts) for name, parts in plain["views"].items()}
    return MultiCropBatch(views, plain["index"], plain["label"])


def described(replay: Replay, layers: int) -> str:
    """Return the page: losses, the last layers before the first bad one, gradients."""
    lines = ["  ".join(f"{name} {value:.6g}" for name, value in replay.losses.items()), ""]
    rows = [("layer", "shape", "finite", "largest", "mean")]
    shown = replay.layers[-layers:]
    if len(shown) < len(replay.layers):
        lines.append(f"{len(replay.layers) - len(shown)} layers before these are finite")
    rows += [_row(found) for found in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    if replay.first is None:
        lines.append("every layer's result is finite")
    else:
        lines.append(f"the first that is not finite: {replay.first.name}")
    if replay.gradients:
        names = ", ".join(found.name for found in replay.gradients[:5])
        more = f" and {len(replay.gradients) - 5} more" if len(replay.gradients) > 5 else ""
        lines.append(f"gradients that are not finite: {names}{more}")
    else:
        lines.append("every gradient is finite: the step does not fail alone, or on this device")
    return "\n".join(lines)


def _row(found: Statistic) -> tuple[str, ...]:
    shape = " x ".join(str(side) for side in found.shape)
    return (found.name, shape, f"{found.finite:.1%}", f"{found.largest:.4g}", f"{found.mean:.4g}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
