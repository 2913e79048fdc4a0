"""Optimisers, their schedules, clipping and freezing. Updates run fused where torch has it."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from dense_ssl.config import Config
from dense_ssl.methods.method import ParamGroup
from dense_ssl.schedule import Number, Schedule, Step


class ClipConfig(Config):
    """Gradient clipping: by the norm of all gradients together, or each tensor by its own (DINO)."""

    kind: Literal["global", "per_tensor"] = "global"
    norm: Annotated[float, Field(gt=0)]


class OptimConfig(Config):
    """The optimiser and what moves during training; defaults are DenseCL's on COCO."""

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: Number = Schedule(start=0.3, shape="cosine", per="epoch")
    lr_for_batch: Annotated[int, Field(ge=1)] | None = (
        None  # lr, but not its end, is for this batch
    )
    weight_decay: Number = Schedule(start=1e-4, shape="constant")
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    trust: Annotated[float, Field(gt=0)] = 0.001  # LARS trust coefficient
    clip: ClipConfig | None = None


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888) on SGD with momentum.

    Each tensor's step is scaled by trust * |w| / |g + decay * w|; tensors with one axis (biases,
    norms) take the plain step, as in the large-batch recipes of SimCLR and MoCo-v3.
    """

    def __init__(self, params: Any, lr: float, momentum: float, trust: float) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; runs as foreach kernels per group, without host synchronisation."""
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = torch._foreach_add(
                [p.grad for p in params], params, alpha=group["weight_decay"]
            )
            wide = [i for i, p in enumerate(params) if p.ndim > 1]
            if wide:
                norms = torch._foreach_norm([params[i] for i in wide])
                steps = torch._foreach_norm([grads[i] for i in wide])
                for i, weight, step in zip(wide, norms, steps, strict=True):
                    ratio = group["trust"] * weight / step
                    usable = (weight > 0) & (step > 0)
                    grads[i].mul_(torch.where(usable, ratio, torch.ones_like(ratio)))
            momenta = [self._momentum(p) for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, grads)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])

    def _momentum(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def make_optimizer(groups: list[ParamGroup], config: OptimConfig) -> Optimizer:
    """Return the configured optimiser over a method's groups; values are set by `apply_schedules`."""
    params = [
        {
            "params": group.params,
            "lr_factor": group.lr,
            "decay_factor": group.decay,
            "frozen_epochs": group.frozen_epochs,
        }
        for group in groups
        if group.params
    ]
    if config.name == "sgd":
        return SGD(params, lr=0.0, momentum=config.momentum, fused=True)
    if config.name == "adamw":
        return AdamW(params, lr=0.0, betas=config.betas, fused=True)
    return LARS(params, lr=0.0, momentum=config.momentum, trust=config.trust)


def apply_schedules(
    optimizer: Optimizer, config: OptimConfig, step: Step, batch_size: int
) -> dict[str, float]:
    """Set this step's learning rate and weight decay in every group; return both for the log."""
    schedule = config.lr
    if config.lr_for_batch is not None:
        factor = batch_size / config.lr_for_batch  # what a run ends with is no step size to scale
        scaled = {"start": schedule.start * factor, "warmup_start": schedule.warmup_start * factor}
        schedule = schedule.model_copy(update=scaled)
    lr = schedule.at(step)
    decay = config.weight_decay.at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
        group["weight_decay"] = decay * group["decay_factor"]
    return {"lr": lr, "weight_decay": decay}


def freeze(optimizer: Optimizer, step: Step) -> None:
    """Drop the gradients of groups that are not trained yet, so that not even decay moves them."""
    for group in optimizer.param_groups:
        if step.epoch < group["frozen_epochs"]:
            for p in group["params"]:
                p.grad = None


def clip_gradients(optimizer: Optimizer, config: ClipConfig | None) -> None:
    """Clip the gradients in place, without host synchronisation."""
    if config is None:
        return
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if config.kind == "global":
        nn.utils.clip_grad_norm_(params, config.norm, foreach=True)
        return
    clip_each_([p.grad for p in params if p.grad is not None], config.norm)


def clip_each_(grads: list[Tensor], norm: float) -> None:
    """Multiply each gradient by min(1, norm / (its own norm + 1e-6)), in place (DINO)."""
    factors = torch._foreach_add(torch._foreach_norm(grads), 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, norm)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(grads, factors)
