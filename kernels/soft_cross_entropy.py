"""Patch-wise cross-entropy of student against centred, sharpened teacher (DINO, arXiv:2104.14294, eq. 2).

    loss_n = -w_n sum_k softmax(t_n / Tt + u)_k log_softmax(s_n / Ts)_k
           =  w_n (logsumexp(s_n / Ts) - sum_k softmax(t_n / Tt + u)_k s_nk / Ts)

student s, teacher t [N, K]; teacher bias u [K]: -center / Tt for centring, or the prototype scales of
`sinkhorn_bias`; row weights w [N]. Only the student gets a gradient:

    dloss_n / ds_nk = w_n / Ts (softmax(s_n / Ts)_k - softmax(t_n / Tt + u)_k)

Moved: the forward pass reads both matrices once and leaves three numbers a row; the backward pass reads
them again and writes the gradient, over the student's logits where `inplace` says so. Nothing else of size
[N, K] exists. The published sequence keeps float32 softmaxes and log-softmaxes of both.

Numbers: one program per row meets its tiles in order; everything is float32 but the stored gradient.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import launch
from kernels.language import LOG2_E, TO_BASE_2, ceil_div, jit, power_of_two, rounded, tl
from kernels.row_softmax import exp_, log_sum, row_statistics, shared_sum
from kernels.spec import KernelSpec

ELEMENTS_AT_ONCE = 2**20  # of the reference behind the operators: 4 MB in float32, within a cache


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    teacher_bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    row_weight: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Return the loss of each row, float32 [N]; a row of weight 0 has loss and gradient 0.

    student and teacher are logits [N, K], teacher_bias float32 [K], row_weight float32 [N]. Gradients
    flow to student only. `inplace` lets the backward pass overwrite the student's logits with their
    gradient: for logits nobody else reads, such as those of a linear layer; backward works once then.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    fits = student.ndim == 2 and student.shape == teacher.shape and student.shape[1] > 0
    wanted = "student [N, K] and teacher [N, K] with K > 0"
    launch.check("soft_cross_entropy", wanted, fits, student, teacher)
    launch.check_vector(
        "soft_cross_entropy", "teacher_bias", teacher_bias, student.shape[1], student
    )
    launch.check_vector("soft_cross_entropy", "row_weight", row_weight, len(student), student)
    with launch.no_autocast(student):
        loss, _ = _forward(
            student,
            teacher.detach(),
            teacher_bias,
            row_weight,
            1 / student_temperature,
            1 / teacher_temperature,
            inplace,
        )
    return loss


def reference(
    student: Tensor,
    teacher: Tensor,
    teacher_bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    row_weight: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Return loss [N] the plain way."""
    scaled = teacher / teacher_temperature
    target = torch.softmax(scaled if teacher_bias is None else scaled + teacher_bias, dim=1)
    loss = -(target * torch.log_softmax(student / student_temperature, dim=1)).sum(1)
    return loss if row_weight is None else torch.where(row_weight == 0, 0, loss * row_weight)


def eager(
    student: Tensor,
    teacher: Tensor,
    teacher_bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    row_weight: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Return loss [N] by the published sequence: centre, softmax, log-softmax in float32, mask."""
    student = student.to(torch.promote_types(student.dtype, torch.float32)) / student_temperature
    teacher = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    center = 0 if teacher_bias is None else -teacher_bias * teacher_temperature
    target = F.softmax((teacher - center) / teacher_temperature, dim=-1).detach()
    loss = torch.sum(-target * F.log_softmax(student, dim=-1), dim=-1)
    return loss if row_weight is None else loss * row_weight


# The operators: loss [N] with statistics [4, N], and the gradient. The statistics are, of student and of
# teacher, the largest logit (with the bias, before the temperature) and the log of the sum of exponentials
# relative to it: their sum, the logsumexp, would not be exact enough for large logits.


def _fake(student: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    precise = torch.float64 if student.dtype == torch.float64 else torch.float32
    n = len(student)
    return student.new_empty(n, dtype=precise), student.new_empty((4, n), dtype=precise)


@launch.operator("soft_cross_entropy", _fake)
def _forward(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    if len(student) and launch.on_triton(student):
        return _launch_forward(student, teacher, bias, weight, student_scale, teacher_scale)
    loss, statistics = _fake(student)
    for rows, s, t in _row_blocks(student, teacher, bias, teacher_scale):
        s_top, t_top = s.amax(1), t.amax(1)
        s = s.sub_(s_top[:, None]).mul_(student_scale)
        t = t.sub_(t_top[:, None]).mul_(teacher_scale)
        s_log, t_log = log_sum(s), log_sum(t)
        statistics[:, rows] = torch.stack([s_top, s_log, t_top, t_log])
        loss[rows] = s_log - shared_sum(exp_(t.sub_(t_log[:, None])), s)
    return loss if weight is None else torch.where(weight == 0, 0, loss * weight), statistics


@launch.operator(
    "soft_cross_entropy_gradient", lambda student, *_: student.new_empty(student.shape)
)
def _gradient(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    factor: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:
    """Return factor_n (softmax(s_n) - softmax(t_n)) in the student's dtype."""
    out = launch.empty(*student.shape, dtype=student.dtype, like=student)
    _write_gradient(out, student, teacher, bias, statistics, factor, student_scale, teacher_scale)
    return out


@launch.operator("soft_cross_entropy_gradient_", lambda *_: None, mutates=("student",))
def _gradient_(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    factor: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> None:
    """As `_gradient`, written over the student's logits."""
    scales = (student_scale, teacher_scale)
    _write_gradient(student, student, teacher, bias, statistics, factor, *scales)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, bias, weight, student_scale, teacher_scale, inplace = inputs
    ctx.save_for_backward(student, teacher, bias, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.options = student_scale, teacher_scale, inplace


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    student, teacher, bias, weight, statistics = ctx.saved_tensors
    student_scale, teacher_scale, inplace = ctx.options
    factor = grad * student_scale
    if weight is not None:
        factor = factor * weight
    given = (teacher, bias, statistics, factor, student_scale, teacher_scale)
    if inplace:
        gradient = student.detach()
        _gradient_(gradient, *given)
    else:
        gradient = _gradient(student, *given)
    return gradient, None, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)


def write_loss_and_gradient_(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:
    """Return the unweighted loss [N]; write factor_n (softmax(s_n) - softmax(t_n)) over student."""
    scales = (student_scale, teacher_scale)
    loss, statistics = _forward(student, teacher, bias, None, *scales, True)
    _gradient_(student, teacher, bias, statistics, factor, *scales)
    return loss


def _write_gradient(
    out: Tensor,
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    factor: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> None:
    if len(student) and launch.on_triton(student):
        scales = (student_scale, teacher_scale)
        _launch_gradient(out, student, teacher, bias, statistics, factor, *scales)
        return
    for rows, s, t in _row_blocks(student, teacher, bias, teacher_scale):
        s_top, s_log, t_top, t_log = statistics[:, rows, None]
        s = exp_(s.sub_(s_top).mul_(student_scale).sub_(s_log))
        t = exp_(t.sub_(t_top).mul_(teacher_scale).sub_(t_log))
        of_rows = factor[rows, None]
        out[rows] = torch.where(of_rows == 0, 0, s.sub_(t).mul_(of_rows)).to(out.dtype)


def _row_blocks(
    student: Tensor, teacher: Tensor, bias: Tensor | None, teacher_scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows and their float32 logits before temperature, with bias, in memory of their own."""
    precise = torch.float64 if student.dtype == torch.float64 else torch.float32
    size = max(1, ELEMENTS_AT_ONCE // student.shape[1])
    shift = None if bias is None else bias.to(precise) / teacher_scale
    for start in range(0, len(student), size):
        rows = slice(start, start + size)
        s, t = student[rows].to(precise, copy=True), teacher[rows].to(precise, copy=True)
        yield rows, s, t if shift is None else t.add_(shift)


# Triton


def _launch_forward(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor]:
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    n, k = student.shape
    loss = launch.empty(n, dtype=torch.float32, like=student)
    statistics = launch.empty(4, n, dtype=torch.float32, like=student)
    with launch.on_device_of(student):
        _statistics[(n,)](
            *(student, teacher, student if bias is None else bias),
            *(student if weight is None else weight, loss, statistics),
            *(n, k, student.stride(0), teacher.stride(0), student_scale, teacher_scale),
            1 / teacher_scale,
            BLOCK=min(1024, power_of_two(k, 16)),
            BIASED=bias is not None,
            WEIGHTED=weight is not None,
            num_warps=4,
        )
    return loss, statistics


def _launch_gradient(
    out: Tensor,
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    factor: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> None:
    n, k = student.shape
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    block = min(1024, power_of_two(k, 16))
    with launch.on_device_of(student):
        _difference[n, ceil_div(k, block)](
            *(out, student, teacher, student if bias is None else bias, statistics),
            *(factor.contiguous(), n, k, out.stride(0), out.stride(1)),
            *(student.stride(0), student.stride(1), teacher.stride(0)),
            *(student_scale * LOG2_E, teacher_scale * LOG2_E, 1 / teacher_scale),
            BLOCK=block,
            BIASED=bias is not None,
            num_warps=4,
        )


@jit
def _statistics(
    STUDENT, TEACHER, BIAS, WEIGHT, LOSS, STATISTICS, n, k, student_stride, teacher_stride,
    student_scale, teacher_scale, temperature,
    BLOCK: tl.constexpr, BIASED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Leave loss, largest logits and logs of sums of one row."""
    row = tl.program_id(0).to(tl.int64)
    loss, s_top, s_log, t_top, t_log = row_statistics(
        *(STUDENT + row * student_stride, TEACHER + row * teacher_stride, BIAS, k),
        *(student_scale, teacher_scale, temperature, BLOCK, BIASED),
    )
    if WEIGHTED:
        weight = tl.load(WEIGHT + row).to(tl.float32)
        loss = tl.where(weight == 0, 0.0, loss * weight)
    tl.store(LOSS + row, loss)
    tl.store(STATISTICS + row, s_top)
    tl.store(STATISTICS + n + row, s_log)
    tl.store(STATISTICS + 2 * n + row, t_top)
    tl.store(STATISTICS + 3 * n + row, t_log)


@jit
def _difference(
    OUT, STUDENT, TEACHER, BIAS, STATISTICS, FACTOR, n, k, out_stride, out_column,
    student_stride, student_column, teacher_stride, s_base, t_base, temperature,
    BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Leave factor (softmax(s) - softmax(t)) of one tile of one row; bases are scale log2(e)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # times a stride below
    there = at < k
    factor = tl.load(FACTOR + row).to(tl.float32)
    s_top = tl.load(STATISTICS + row)
    s_log = tl.load(STATISTICS + n + row) * TO_BASE_2
    t_top = tl.load(STATISTICS + 2 * n + row)
    t_log = tl.load(STATISTICS + 3 * n + row) * TO_BASE_2
    s_at = STUDENT + row * student_stride + at * student_column
    t_at = TEACHER + row * teacher_stride + at
    s = tl.load(s_at, mask=there, other=float("-inf")).to(tl.float32)
    t = tl.load(t_at, mask=there, other=float("-inf")).to(tl.float32)
    if BIASED:
        t += tl.load(BIAS + at, mask=there, other=0.0).to(tl.float32) * temperature
    gradient = tl.exp2((s - s_top) * s_base - s_log) - tl.exp2((t - t_top) * t_base - t_log)
    gradient = tl.where(factor == 0, 0.0, factor * gradient)
    out_at = OUT + row * out_stride + at * out_column
    tl.store(out_at, rounded(gradient, OUT.dtype.element_ty), mask=there)


# For tests and the bench


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    n, k, scale = shape["N"], shape["K"], shape.get("scale", 1)
    student, teacher = torch.randn(n, k) * scale, torch.randn(n, k) * scale
    if shape.get("one_hot"):
        teacher[:, 0] = 1e4
    if shape.get("equal"):
        student, teacher = student * 0, teacher * 0
    if shape.get("masked"):  # the tail of the prototypes switched off
        teacher[:, k // 2 :] = float("-inf")
    weight = torch.rand(n) if shape.get("weighted") else None
    if weight is not None:
        weight[: n // 2] = 0
    return {
        "student": student.to(dtype),
        "teacher": teacher.to(dtype),
        "teacher_bias": None if shape.get("plain") else torch.randn(k),
        "student_temperature": 0.1,
        "teacher_temperature": shape.get("Tt", 0.04),
        "row_weight": weight,
        "inplace": shape.get("inplace", False),
    }


SPEC = KernelSpec(
    name="soft_cross_entropy",
    call=soft_cross_entropy,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(
        {"N": 4, "K": 7},
        {"N": 1, "K": 1},
        {"N": 5, "K": 300, "weighted": True},
        {"N": 3, "K": 2100, "plain": True},
        {"N": 4, "K": 130, "scale": 100},
        {"N": 4, "K": 65, "one_hot": True},
        {"N": 3, "K": 40, "equal": True},
        {"N": 3, "K": 64, "masked": True},
        {"N": 0, "K": 5},
    ),
    real={
        "iBOT masked patches, K 8192": {"N": 15053, "K": 8192, "inplace": True},
        "iBOT all patches, K 8192": {"N": 50176, "K": 8192, "inplace": True},
        "UDI, K 65536": {"N": 15053, "K": 65536, "inplace": True},
    },
    grads=("student",),
    bytes_moved=lambda s, size: 5 * size * s["N"] * s["K"] + 20 * s["N"],
)
