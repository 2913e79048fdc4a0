"""Rows of logits made into softmaxes: on a CPU by torch, on a GPU in one sweep over student and teacher.

The lanes of a program each keep a running maximum and sum of their own and meet once, at the end of the
row. Maxima stay in the units of the logits, before any temperature, so that the exponent of the largest logit
is exactly 0 however large it is.
"""

import torch
from torch import Tensor

from kernels.language import TO_BASE_2, TO_BASE_E, jit, tl

# exp of less is below the smallest normal float32. Such results cost a CPU ten times the others, and at a
# teacher's temperature most of a row is such.
LOWEST = -87.0
NOTHING = 2e-38  # a share that may stand for 0


def exp_(x: Tensor) -> Tensor:
    """Return exp(x) of x <= 0 in its own memory; shares below e^-87 are e^-87."""
    return x.clamp_min_(LOWEST).exp_()


def log_sum(x: Tensor) -> Tensor:
    """Return log(sum(exp(x))) over the last axis for x whose maximum there is 0."""
    return exp_(x.clone()).sum(-1).log_()


def log_softmax_(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-softmax over the last axis, in its own memory, the largest logit and the log of the sum.

    The log is that of the sum of exponentials relative to the largest logit.
    """
    top = x.amax(-1)
    x.sub_(top[..., None])
    log = log_sum(x)
    return x.sub_(log[..., None]), top, log


def shared_sum(shares: Tensor, x: Tensor) -> Tensor:
    """Return sum(shares x) over the last axis, where x may be -inf at shares of nothing."""
    return torch.where(shares > NOTHING, shares * x, 0).sum(-1)


@jit
def row_statistics(
    s_row, t_row, BIAS, k, student_scale, teacher_scale, temperature,
    BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Return the cross-entropy of two rows, and of each the largest logit and the log of its sum.

    The log is that of the sum of exponentials relative to the largest logit. `temperature` is the
    teacher's, by which its bias becomes a logit.
    """
    s_base, t_base = student_scale * TO_BASE_2, teacher_scale * TO_BASE_2
    s_top = tl.full([BLOCK], float("-inf"), tl.float32)
    t_top = tl.full([BLOCK], float("-inf"), tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    both = tl.zeros([BLOCK], tl.float32)  # sum of exp(t - t_top) s
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < k
        s = tl.load(s_row + at, mask=there, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + at, mask=there, other=float("-inf")).to(tl.float32)
        if BIASED:
            t += tl.load(BIAS + at, mask=there, other=0.0).to(tl.float32) * temperature
        new_s, new_t = tl.maximum(s_top, s), tl.maximum(t_top, t)
        # A lane that has met nothing but -inf stays at 0 and -inf.
        safe_s = tl.where(new_s == float("-inf"), 0.0, new_s)
        safe_t = tl.where(new_t == float("-inf"), 0.0, new_t)
        s_sum = s_sum * tl.exp2((s_top - safe_s) * s_base) + tl.exp2((s - safe_s) * s_base)
        shrink, share = tl.exp2((t_top - safe_t) * t_base), tl.exp2((t - safe_t) * t_base)
        t_sum = t_sum * shrink + share
        both = both * shrink + share * tl.where(share > 0, s, 0.0)
        s_top, t_top = new_s, new_t
    s_max, t_max = tl.max(s_top, 0), tl.max(t_top, 0)
    s_log = tl.log2(tl.sum(s_sum * tl.exp2((s_top - s_max) * s_base), 0)) * TO_BASE_E
    t_share = tl.exp2((t_top - t_max) * t_base)
    t_total = tl.sum(t_sum * t_share, 0)
    mean = tl.sum(both * t_share, 0) / t_total  # pyright: ignore
    loss = s_log + (s_max - mean) * student_scale
    return loss, s_max, s_log, t_max, tl.log2(t_total) * TO_BASE_E
