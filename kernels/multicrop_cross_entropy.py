"""The [CLS] self-distillation loss over all pairs of crops (DINO, arXiv:2104.14294, eq. 3), in one launch.

    loss_cb = sum_g a_cg CE(softmax(t_gb / Tt + u), softmax(s_cb / Ts))

student s [C, B, K], teacher t [G, B, K], teacher bias u [K]; a [C, G] weighs the pairs, by default 1 for two
different crops and 0 for one crop with itself (teacher crop g is student crop g). The cross-entropy is
linear in its target, so a student row needs one logsumexp and one product with each teacher row:

    loss_cb = sum_g a_cg (logsumexp(s_cb / Ts) - sum_k p_gbk s_cbk / Ts)
    dloss_cb / ds_cbk = (sum_g a_cg) softmax(s_cb / Ts)_k / Ts - sum_g a_cg p_gbk / Ts

Moved: each student row once forward, once backward with its gradient; teacher rows once per student crop,
from the L2 cache (2 x 128 rows of 8192 bf16 are 4 MB). The published loop makes float32 softmaxes of
all and goes over 2 C - 2 pairs one by one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import launch
from kernels.language import LOG2_E, TO_BASE_2, ceil_div, jit, power_of_two, rounded, tl
from kernels.row_softmax import exp_, log_sum, row_statistics, shared_sum
from kernels.spec import KernelSpec


def multicrop_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    teacher_bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    pair_weight: Tensor | None = None,
) -> Tensor:
    """Return the loss of each student crop summed over teacher crops, float32 [C, B].

    student [C, B, K] and teacher [G, B, K] are logits, teacher_bias float32 [K]. pair_weight float32
    [C, G]; None: 1, but 0 where c = g. Gradients flow to student only.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    fits = student.ndim == teacher.ndim == 3 and student.shape[1:] == teacher.shape[1:]
    fits = fits and student.shape[2] > 0
    wanted = "student [C, B, K] and teacher [G, B, K] with K > 0"
    launch.check("multicrop_cross_entropy", wanted, fits, student, teacher)
    launch.check_vector(
        "multicrop_cross_entropy", "teacher_bias", teacher_bias, student.shape[2], student
    )
    pairs = (len(student), len(teacher))
    if pair_weight is None:
        pair_weight = other_crops(*pairs, device=student.device)
    elif pair_weight.shape != pairs or pair_weight.device != student.device:
        raise ValueError(
            f"multicrop_cross_entropy: pair_weight {list(pairs)} on {student.device} expected, "
            f"got {tuple(pair_weight.shape)} on {pair_weight.device}"
        )
    with launch.no_autocast(student):
        scales = 1 / student_temperature, 1 / teacher_temperature
        loss, _, _ = _forward(student, teacher.detach(), teacher_bias, pair_weight, *scales)
    return loss


def other_crops(crops: int, teachers: int, device: torch.device | None = None) -> Tensor:
    """Return float32 [C, G]: 1 for pairs of different crops, 0 for a crop with itself."""
    return 1 - torch.eye(crops, teachers, device=device)


def reference(
    student: Tensor,
    teacher: Tensor,
    teacher_bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    pair_weight: Tensor | None = None,
) -> Tensor:
    """Return loss [C, B] the plain way."""
    scaled = teacher / teacher_temperature
    target = torch.softmax(scaled if teacher_bias is None else scaled + teacher_bias, dim=2)
    if pair_weight is None:
        pair_weight = other_crops(len(student), len(teacher), device=student.device)
    log_share = torch.log_softmax(student / student_temperature, dim=2)
    pair_weight = pair_weight.to(log_share.dtype)
    return -torch.einsum("gbk,cbk,cg->cb", target.to(log_share.dtype), log_share, pair_weight)


def eager(
    student: Tensor,
    teacher: Tensor,
    teacher_bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    pair_weight: Tensor | None = None,
) -> Tensor:
    """Return loss [C, B] by the published sequence: chunks, float32 softmaxes, a loop over pairs."""
    wide = torch.promote_types(student.dtype, torch.float32)
    students = [x / student_temperature for x in student.to(wide).unbind(0)]
    center = 0 if teacher_bias is None else -teacher_bias * teacher_temperature
    targets = F.softmax((teacher.to(wide) - center) / teacher_temperature, dim=-1)
    losses = [torch.zeros(student.shape[1], dtype=wide, device=student.device) for _ in students]
    for g, target in enumerate(targets.detach().unbind(0)):
        for c, logits in enumerate(students):
            if pair_weight is None and c == g:
                continue
            weight = 1 if pair_weight is None else pair_weight[c, g]
            pair = torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1)
            losses[c] = losses[c] + weight * pair
    return torch.stack(losses)


# The operators: loss [C, B], statistics of the student [2, C, B], of the teacher as each crop met it
# [2, C, G, B]; and the gradient. The statistics are the largest logit (with the bias, before the temperature)
# and the log of the sum of exponentials relative to it.


def _fake(
    student: Tensor, teacher: Tensor, bias: Tensor | None, pairs: Tensor, *_: float
) -> tuple[Tensor, Tensor, Tensor]:
    precise = torch.float64 if student.dtype == torch.float64 else torch.float32
    c, b = student.shape[:2]
    return (
        student.new_empty((c, b), dtype=precise),
        student.new_empty((2, c, b), dtype=precise),
        student.new_empty((2, *pairs.shape, b), dtype=precise),
    )


@launch.operator("multicrop_cross_entropy", _fake)
def _forward(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    pairs: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if student.numel() and launch.on_triton(student):
        return _launch_forward(student, teacher, bias, pairs, student_scale, teacher_scale)
    s, t = _unscaled(student, teacher, bias, teacher_scale)
    s_top, t_top = s.amax(2), t.amax(2)  # [C, B], [G, B]
    s = s.sub_(s_top[..., None]).mul_(student_scale)
    t = t.sub_(t_top[..., None]).mul_(teacher_scale)
    s_log, t_log = log_sum(s), log_sum(t)
    pairs = pairs.to(s.dtype)
    mixed = torch.einsum("cg,gbk->cbk", pairs, exp_(t.sub_(t_log[..., None])))
    loss = s_log * pairs.sum(1)[:, None] - shared_sum(mixed, s)
    of_teacher = torch.stack([t_top, t_log])[:, None].expand(-1, len(student), -1, -1)
    return loss, torch.stack([s_top, s_log]), of_teacher.clone()


def _fake_gradient(student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


@launch.operator("multicrop_cross_entropy_gradient", _fake_gradient)
def _gradient(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    pairs: Tensor,
    of_student: Tensor,
    of_teacher: Tensor,
    factor: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:
    """Return factor_cb sum_g a_cg (softmax(s_cb) - p_gb), [C, B, K] in the student's dtype."""
    if student.numel() and launch.on_triton(student):
        given = (of_student, of_teacher, factor, student_scale, teacher_scale)
        return _launch_gradient(student, teacher, bias, pairs, *given)
    s, t = _unscaled(student, teacher, bias, teacher_scale)
    (s_top, s_log), (t_top, t_log) = of_student[..., None], of_teacher[:, 0, ..., None]
    s = exp_(s.sub_(s_top).mul_(student_scale).sub_(s_log))
    t = exp_(t.sub_(t_top).mul_(teacher_scale).sub_(t_log))
    pairs = pairs.to(s.dtype)
    s = s.mul_(pairs.sum(1)[:, None, None]) - torch.einsum("cg,gbk->cbk", pairs, t)
    return s.mul_(factor[..., None]).to(student.dtype)


def _unscaled(
    student: Tensor, teacher: Tensor, bias: Tensor | None, teacher_scale: float
) -> tuple[Tensor, Tensor]:
    """Return float32 logits before temperature, with bias, in memory of their own."""
    precise = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t = student.to(precise, copy=True), teacher.to(precise, copy=True)
    return s, t if bias is None else t.add_(bias.to(precise) / teacher_scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, bias, pairs, *scales = inputs
    ctx.save_for_backward(student, teacher, bias, pairs, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.scales = scales


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    factor = grad * ctx.scales[0]
    gradient = _gradient(*ctx.saved_tensors, factor, *ctx.scales)
    return gradient, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)


# Triton


def _launch_forward(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    pairs: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (x if x.stride(2) == 1 else x.contiguous() for x in (student, teacher))
    c, b, k = student.shape
    g = len(teacher)
    loss = launch.empty(c, b, dtype=torch.float32, like=student)
    of_student = launch.empty(2, c, b, dtype=torch.float32, like=student)
    of_teacher = launch.empty(2, c, g, b, dtype=torch.float32, like=student)
    with launch.on_device_of(student):
        _statistics[b, c](
            *(student, teacher, student if bias is None else bias, pairs.contiguous()),
            *(loss, of_student, of_teacher, c, b, k, g),
            *(student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1)),
            *(student_scale, teacher_scale, 1 / teacher_scale),
            BLOCK=min(1024, power_of_two(k, 16)),
            BIASED=bias is not None,
            num_warps=4,
        )
    return loss, of_student, of_teacher


def _launch_gradient(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    pairs: Tensor,
    of_student: Tensor,
    of_teacher: Tensor,
    factor: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:
    student, teacher = (x if x.stride(2) == 1 else x.contiguous() for x in (student, teacher))
    c, b, k = student.shape
    out = launch.empty(c, b, k, dtype=student.dtype, like=student)
    block = min(1024, power_of_two(k, 16))
    with launch.on_device_of(student):
        _differences[b, c, ceil_div(k, block)](
            *(out, student, teacher, student if bias is None else bias, pairs.contiguous()),
            *(of_student, of_teacher, factor.contiguous(), c, b, k, len(teacher)),
            *(student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1)),
            *(student_scale * LOG2_E, teacher_scale * LOG2_E, 1 / teacher_scale),
            BLOCK=block,
            BIASED=bias is not None,
            num_warps=4,
        )
    return out


@jit
def _statistics(
    STUDENT, TEACHER, BIAS, PAIRS, LOSS, OF_STUDENT, OF_TEACHER, c, b, k, g,
    s_crop, s_image, t_crop, t_image, student_scale, teacher_scale, temperature,
    BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Leave loss and statistics of one crop of one image against all teacher crops."""
    image, crop = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    s_row = STUDENT + crop * s_crop + image * s_image
    loss = 0.0
    s_top = 0.0
    s_log = 0.0
    for target in range(0, g):
        t_row = TEACHER + tl.cast(target, tl.int64) * t_crop + image * t_image
        pair, s_top, s_log, t_top, t_log = row_statistics(
            *(s_row, t_row, BIAS, k, student_scale, teacher_scale, temperature, BLOCK, BIASED),
        )
        loss += tl.load(PAIRS + crop * g + target).to(tl.float32) * pair
        t_at = OF_TEACHER + (crop * g + target) * b + image
        tl.store(t_at, t_top)
        tl.store(t_at + c * g * b, t_log)
    s_at = crop * b + image
    tl.store(LOSS + s_at, loss)
    tl.store(OF_STUDENT + s_at, s_top)
    tl.store(OF_STUDENT + c * b + s_at, s_log)


@jit
def _differences(
    OUT, STUDENT, TEACHER, BIAS, PAIRS, OF_STUDENT, OF_TEACHER, FACTOR, c, b, k, g,
    s_crop, s_image, t_crop, t_image, s_base, t_base, temperature,
    BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Leave the gradient of one tile of one crop of one image; bases are scale log2(e)."""
    image, crop = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there = at < k
    row = crop * b + image
    s_at = STUDENT + crop * s_crop + image * s_image + at
    s = tl.load(s_at, mask=there, other=float("-inf"))
    s_top = tl.load(OF_STUDENT + row)
    s_log = tl.load(OF_STUDENT + c * b + row) * TO_BASE_2
    s_share = tl.exp2((s.to(tl.float32) - s_top) * s_base - s_log)
    bias = tl.zeros([BLOCK], tl.float32)
    if BIASED:
        bias = tl.load(BIAS + at, mask=there, other=0.0).to(tl.float32) * temperature
    gradient = tl.zeros([BLOCK], tl.float32)
    for target in range(0, g):
        t_row = TEACHER + tl.cast(target, tl.int64) * t_crop + image * t_image
        t = tl.load(t_row + at, mask=there, other=float("-inf")).to(tl.float32) + bias
        t_at = OF_TEACHER + (crop * g + target) * b + image
        t_top = tl.load(t_at)
        t_log = tl.load(t_at + c * g * b) * TO_BASE_2
        weight = tl.load(PAIRS + crop * g + target).to(tl.float32)
        gradient += weight * (s_share - tl.exp2((t - t_top) * t_base - t_log))
    gradient *= tl.load(FACTOR + row).to(tl.float32)
    tl.store(OUT + row * k + at, rounded(gradient, OUT.dtype.element_ty), mask=there)


# For tests and the bench


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    c, g, b, k = shape["C"], shape["G"], shape["B"], shape["K"]
    scale = shape.get("scale", 1)
    return {
        "student": (torch.randn(c, b, k) * scale).to(dtype),
        "teacher": (torch.randn(g, b, k) * scale).to(dtype),
        "teacher_bias": None if shape.get("plain") else torch.randn(k),
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "pair_weight": torch.rand(c, g) if shape.get("weighted") else None,
    }


SPEC = KernelSpec(
    name="multicrop_cross_entropy",
    call=multicrop_cross_entropy,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(
        {"C": 3, "G": 2, "B": 2, "K": 7},
        {"C": 1, "G": 1, "B": 1, "K": 1},
        {"C": 4, "G": 2, "B": 2, "K": 1030, "plain": True},
        {"C": 3, "G": 2, "B": 3, "K": 70, "weighted": True},
        {"C": 3, "G": 2, "B": 2, "K": 65, "scale": 100},
        {"C": 2, "G": 2, "B": 0, "K": 5},
    ),
    real={
        "DINO 2 + 10 crops, 128 images, K 8192": {"C": 12, "G": 2, "B": 128, "K": 8192},
        "DINO 2 + 10 crops, 128 images, K 65536": {"C": 12, "G": 2, "B": 128, "K": 65536},
    },
    grads=("student",),
    bytes_moved=lambda s, size: size * s["B"] * s["K"] * (3 * s["C"] + 2 * s["G"]),
)
