"""A run's configuration: what a recipe in `configs/` says, and where recipes are found."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dense_ssl.config import Config, UserError
from dense_ssl.loaders import DataConfig
from dense_ssl.methods import AnyMethodConfig
from dense_ssl.optim import OptimConfig
from dense_ssl.watch import WatchConfig
from kernels import launch


class TrainConfig(Config):
    """How long, how many images at a time, and in which precision. Changes results."""

    epochs: Annotated[float, Field(gt=0)] = 800  # the horizon of every schedule
    steps: Annotated[int, Field(ge=1)] | None = None  # stop earlier; schedules keep their horizon
    batch_size: Annotated[int, Field(ge=1)] = 256  # global: all ranks, all micro-batches
    micro_batch: Annotated[int, Field(ge=1)] | None = None  # the most images a GPU takes at once
    accumulate: Annotated[int, Field(ge=1)] = 1  # micro-batches per step on each rank, at least
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    seed: int = 0
    init: str | None = None  # a checkpoint to start from: ours, official MoCo / DenseCL, a backbone


class RunSection(Config):
    """Where and how it runs. Changes results by rounding at most."""

    dir: str
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$")] = "auto"
    kernels: launch.Choice = "auto"  # Triton on CUDA, torch elsewhere; or one of them everywhere
    compile: bool = False  # torch.compile the backbone
    checkpoint_gradients: bool = False  # recompute activations: less memory, more time
    grad_compression: Literal["none", "bf16"] = (
        "none"  # all-reduce in bf16, for cards without NVLink
    )
    deterministic: bool = False  # CUDA: bitwise repeatable algorithms, slower
    max_refused: Annotated[int, Field(ge=1)] = 10  # steps in a row whose gradient is not finite
    # No batch for so long, or no word from a rank for twice as long: the run ends, and can be resumed.
    stall_minutes: Annotated[float, Field(gt=0)] = 10
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 1000
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    keep_every_steps: Annotated[int, Field(ge=1)] | None = None
    log_every_steps: Annotated[int, Field(ge=1)] = 10
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)


class RunConfig(Config):
    """One run."""

    method: AnyMethodConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    watch: WatchConfig = WatchConfig()
    run: RunSection


def recipe_path(name: str) -> Path:
    """Return the YAML file of a recipe name or path.

    Raises:
        UserError: neither exists.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    folder = Path(__file__).resolve().parent.parent / "configs"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? There" if close else "there"
        raise UserError(f"METHOD={name}: no such recipe in configs/; {hint} are {', '.join(known)}")
    return path


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with what it does not say, because it is older, at its default.

    One that this version does not understand is returned as it is.
    """
    try:
        return RunConfig.model_validate(saved).model_dump(mode="json")
    except ValueError:
        return dict(saved)
