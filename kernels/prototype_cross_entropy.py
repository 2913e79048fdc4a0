"""The last linear layer and its soft cross-entropy, without [N, K] logits (iBOT, arXiv:2111.07832, eq. 3).

    loss = sum_n w_n CE(softmax(x_t,n W_t^T / Tt + u), softmax(x_s,n W_s^T / Ts))

student features x_s, teacher features x_t [N, D], prototypes W_s, W_t [K, D], teacher bias u [K], row weights
w [N] (1 / N each if none are given). Gradients go to x_s and W_s.

Rows go through in chunks: two matrix products give a chunk's logits, `soft_cross_entropy` writes their
gradient over the student's, two more products add that to the gradients of x_s and W_s. Only a chunk's
logits ever exist. The loss is one number, so the incoming gradient is one number and may come last.

Numbers: products run in the dtype of the features; the gradient of W_s is summed over chunks in float32, and
what is stored in 16 bits is w_n / max w (p_s - p_t), in -1..1, never divided by the number of rows.

The centre needs no logits either: mean_n(x_n W^T) = W mean_n(x_n), `mean_logits`.

Memory above inputs: 2 x chunk x K logits and the gradients. N = 15053, K = 65536, D = 256 in bf16: 0.4 GB, of
which the gradients are 75 MB; all logits and what autograd keeps of them would be 20 GB.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import launch
from kernels.soft_cross_entropy import reference as soft_reference
from kernels.soft_cross_entropy import write_loss_and_gradient_
from kernels.spec import KernelSpec

CHUNK_ELEMENTS = {"cuda": 2**26, "cpu": 2**21}  # of one logit matrix: 128 MB in bf16 on a GPU
LEAST_ROWS = 128  # of a chunk, so that its products keep the machine busy


def prototype_cross_entropy(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    teacher_bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    row_weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the weighted sum of all rows' losses, a float32 scalar; None as weights: their mean.

    student and teacher are features [N, D] of one dtype, prototypes [K, D] of any float dtype,
    teacher_bias float32 [K], row_weight float32 [N], chunk the rows at a time (None: by K). Gradients
    flow to student and student_prototypes. No rows: 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    name = "prototype_cross_entropy"
    wanted = "student [N, D] and teacher [N, D]"
    fits = student.ndim == 2 and student.shape == teacher.shape
    launch.check(name, wanted, fits, student, teacher)
    shapes = (student_prototypes.shape, teacher_prototypes.shape)
    if student_prototypes.ndim != 2 or shapes[0] != shapes[1] or shapes[0][1:] != student.shape[1:]:
        raise ValueError(f"{name}: prototypes [K, {student.shape[1]}] twice expected, got {shapes}")
    for prototypes in (student_prototypes, teacher_prototypes):
        if prototypes.device != student.device or not prototypes.is_floating_point():
            got = f"{prototypes.dtype} on {prototypes.device}"
            raise ValueError(f"{name}: float prototypes on {student.device} expected, got {got}")
    launch.check_vector(name, "teacher_bias", teacher_bias, len(student_prototypes), student)
    launch.check_vector(name, "row_weight", row_weight, len(student), student)
    if chunk is not None and chunk < 1:
        raise ValueError(f"{name}: chunk >= 1 expected, got {chunk}")
    if len(student) == 0:
        return (student.sum() + student_prototypes.sum() * 0).float()
    if row_weight is None:
        row_weight = torch.full_like(student[:, 0], 1 / len(student), dtype=torch.float32)
    graded = torch.is_grad_enabled()
    with launch.no_autocast(student):
        loss, _, _ = _forward(
            student,
            student_prototypes,
            teacher.detach(),
            teacher_prototypes.detach(),
            teacher_bias,
            row_weight,
            1 / student_temperature,
            1 / teacher_temperature,
            chunk or rows_at_once(student, len(student_prototypes)),
            graded and student.requires_grad,
            graded and student_prototypes.requires_grad,
        )
    return loss


def mean_logits(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return the mean over rows of features prototypes^T, float32 [K], without those logits.

    features [N, D], N > 0; prototypes [K, D]. What a centre moves by.
    """
    with launch.no_autocast(features):
        return prototypes.float() @ features.float().mean(0)


def rows_at_once(features: Tensor, prototypes: int) -> int:
    """Return the rows of a chunk for K prototypes where the features are."""
    elements = CHUNK_ELEMENTS["cuda" if features.is_cuda or features.is_meta else "cpu"]
    return min(max(elements // prototypes, LEAST_ROWS), max(len(features), 1))


def reference(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    teacher_bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    row_weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the loss the plain way, with all logits in memory."""
    student_logits = student @ student_prototypes.to(student.dtype).T
    teacher_logits = teacher @ teacher_prototypes.to(student.dtype).T
    temperatures = (student_temperature, teacher_temperature)
    losses = soft_reference(student_logits, teacher_logits, teacher_bias, *temperatures, row_weight)
    if len(student) == 0:
        return losses.sum()
    return losses.mean() if row_weight is None else losses.sum()


def eager(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    teacher_bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    row_weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the loss by the published sequence: two linear layers, float32 softmaxes."""
    wide = torch.promote_types(student.dtype, torch.float32)
    logits = F.linear(student, student_prototypes.to(student.dtype)).to(wide) / student_temperature
    with torch.no_grad():
        target = F.linear(teacher, teacher_prototypes.to(student.dtype)).to(wide)
        center = 0 if teacher_bias is None else -teacher_bias * teacher_temperature
        target = F.softmax((target - center) / teacher_temperature, dim=-1)
    losses = torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1)
    return losses.mean() if row_weight is None else (losses * row_weight).sum()


# The operator: loss, and its gradients to x_s [N, D] and W_s [K, D] (empty where not wanted)


def _fake(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    student_scale: float,
    teacher_scale: float,
    chunk: int,
    wants_features: bool,
    wants_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    precise = torch.float64 if student.dtype == torch.float64 else torch.float32
    return (
        student.new_empty((), dtype=precise),
        student.new_empty(student.shape if wants_features else (0,)),
        student.new_empty(student_prototypes.shape if wants_prototypes else (0,), dtype=precise),
    )


@launch.operator("prototype_cross_entropy", _fake)
def _forward(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    student_scale: float,
    teacher_scale: float,
    chunk: int,
    wants_features: bool,
    wants_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = student.dtype
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    w_s, w_t = student_prototypes.to(dtype), teacher_prototypes.to(dtype)
    # What is stored fills the range of its dtype: float16 has no small numbers to spare.
    gain = 1024.0 if dtype == torch.float16 else 1.0
    largest = weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    factor = weight / largest * gain
    back = largest * (student_scale / gain)
    loss = student.new_zeros((), dtype=precise)
    to_features = student.new_empty(student.shape if wants_features else (0,))
    to_prototypes = student.new_zeros(w_s.shape if wants_prototypes else (0,), dtype=precise)
    for start in range(0, len(student), chunk):
        rows = slice(start, start + chunk)
        x = student[rows]
        logits, target = x @ w_s.T, teacher[rows] @ w_t.T
        losses = write_loss_and_gradient_(
            logits, target, bias, factor[rows], student_scale, teacher_scale
        )
        weights = weight[rows]
        loss += torch.where(weights == 0, 0, losses * weights).sum()
        if wants_features:
            torch.mm(logits, w_s, out=to_features[rows])
        if wants_prototypes:
            _add_product(to_prototypes, logits.T, x)
    if wants_features:
        to_features = (to_features.to(precise) * back).to(dtype)
    return loss, to_features, to_prototypes.mul_(back)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the float32 total, rounding nothing to the dtype of a and b on the way."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total.copy_(torch.addmm(total, a, b, out_dtype=total.dtype))
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.dtype, ctx.wants = inputs[1].dtype, inputs[9:11]


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    to_features, to_prototypes = ctx.saved_tensors
    features = (grad * to_features.to(grad.dtype)).to(to_features.dtype) if ctx.wants[0] else None
    prototypes = (grad * to_prototypes).to(ctx.dtype) if ctx.wants[1] else None
    return features, prototypes, *[None] * 9


_forward.register_autograd(_backward, setup_context=_save)


# For tests and the bench


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    n, k, d = shape["N"], shape["K"], shape["D"]
    weight = torch.rand(n) if shape.get("weighted") else None
    if weight is not None:
        weight[: n // 2] = 0
    return {
        "student": F.normalize(torch.randn(n, d), dim=1).to(dtype),
        "student_prototypes": F.normalize(torch.randn(k, d), dim=1).to(dtype),
        "teacher": F.normalize(torch.randn(n, d), dim=1).to(dtype),
        "teacher_prototypes": F.normalize(torch.randn(k, d), dim=1).to(dtype),
        "teacher_bias": None if shape.get("plain") else torch.randn(k),
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "row_weight": weight,
        "chunk": shape.get("chunk"),
    }


def _peak_logits(shape: Mapping[str, Any], size: int) -> int:
    """Bytes moved by the logits alone: written, read, rewritten, read; both matrices."""
    return size * shape["N"] * shape["K"] * 8


SPEC = KernelSpec(
    name="prototype_cross_entropy",
    call=prototype_cross_entropy,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(
        {"N": 5, "K": 7, "D": 4, "chunk": 2},
        {"N": 1, "K": 1, "D": 1},
        {"N": 20, "K": 130, "D": 16, "chunk": 8, "weighted": True},
        {"N": 9, "K": 33, "D": 8, "plain": True},
    ),
    real={
        "iBOT masked patches, K 8192": {"N": 15053, "K": 8192, "D": 256},
        "UDI, K 65536": {"N": 15053, "K": 65536, "D": 256},
    },
    grads=("student", "student_prototypes"),
    bytes_moved=_peak_logits,
    flops=lambda s: 8 * s["N"] * s["K"] * s["D"],
    # Logits are rounded to the inputs' dtype, as a linear layer's are.
    tolerance={
        torch.float32: (1e-6, 2e-6),
        torch.bfloat16: (1e-3, 5e-3),
        torch.float16: (1e-3, 1e-3),
    },
)
