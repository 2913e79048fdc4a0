"""Public implementations of the same or nearly the same operations, for the bench only.

Each is a function that binds a kernel's arguments: what can be prepared once is prepared there, and the
call it returns is measured. Packages are imported when one is bound; what is not installed, or cannot run
on this device, is listed with the reason. Where a rival computes something else, its note says what.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kernels.bench_measure import Bound
from kernels.spec import Arguments


@dataclass(frozen=True)
class Rival:
    """One implementation by others of a kernel's operation."""

    kernel: str
    name: str
    bind: Callable[[Arguments], Bound]
    note: str = ""  # what it does otherwise
    needs_cuda: bool = False
    same: bool = False  # whether its result is the kernel's, or the sum of it


# queue_info_nce as a linear layer and cross-entropy with hard labels: the work is the same, but the positive
# is a row of the queue. Sums, because that is the fast path of all of them.
RECAST = "a linear layer and hard labels: the positive is a row of the queue"


def _labels(given: Arguments) -> torch.Tensor:
    return torch.arange(len(given["q"]), device=given["q"].device) % len(given["queue"])


def _liger_linear(given: Arguments) -> Bound:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    labels = _labels(given)
    return lambda: loss(given["q"] / given["temperature"], given["queue"], labels, reduction="sum")


def _cce(filter_eps: str | None) -> Callable[[Arguments], Bound]:
    def bind(given: Arguments) -> Bound:
        from cut_cross_entropy import linear_cross_entropy as loss

        labels = _labels(given)
        return lambda: loss(
            given["q"] / given["temperature"],
            given["queue"],
            labels,
            reduction="sum",
            filter_eps=filter_eps,
        )

    return bind


def _torch_linear(given: Arguments) -> Bound:
    if not hasattr(F, "linear_cross_entropy"):
        raise ModuleNotFoundError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    labels, options = _labels(given), torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(
        given["q"] / given["temperature"],
        given["queue"],
        labels,
        reduction="sum",
        options=options,
    )


# soft_cross_entropy


def _liger_kl(given: Arguments) -> Bound:
    from liger_kernel.transformers.functional import liger_kl_div

    def run() -> torch.Tensor:
        bias = 0 if given["teacher_bias"] is None else given["teacher_bias"]
        logs = F.log_softmax(given["student"] / given["student_temperature"], dim=1)
        with torch.no_grad():
            target = F.softmax(given["teacher"] / given["teacher_temperature"] + bias, dim=1)
        return liger_kl_div(logs, target.to(logs.dtype), reduction="sum")

    return run


RIVALS = (
    Rival("queue_info_nce", "liger", _liger_linear, RECAST, needs_cuda=True),
    Rival("queue_info_nce", "cce", _cce("high"), f"{RECAST}; small gradients left out", True),
    Rival("queue_info_nce", "cce_exact", _cce(None), RECAST, needs_cuda=True),
    Rival("queue_info_nce", "torch-linear-ce", _torch_linear, RECAST),
    Rival(
        "soft_cross_entropy",
        "liger",
        _liger_kl,
        "softmaxes by torch, KL by Liger: less by the teacher's entropy",
        needs_cuda=True,
    ),
)
