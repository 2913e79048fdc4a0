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
    result: str = ""  # "kernel": it returns what the kernel does, or the sum of it


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


def _torch_loss() -> tuple[Callable[..., torch.Tensor], object]:
    """Return torch's linear_cross_entropy and the options by which it stores no logits."""
    if not hasattr(F, "linear_cross_entropy"):
        name = f"F.linear_cross_entropy of a newer torch than {torch.__version__}"
        raise ModuleNotFoundError(name=name)
    return F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()


def _torch_linear(given: Arguments) -> Bound:
    loss, options = _torch_loss()
    labels = _labels(given)
    scaled = 1 / given["temperature"]
    return lambda: loss(
        given["q"] * scaled, given["queue"], labels, reduction="sum", options=options
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


# prototype_cross_entropy: both linear layers included


def _teacher_probabilities(given: Arguments) -> torch.Tensor:
    """Return softmax(x_t W_t^T / Tt + u) [N, K]: rivals that take a target need it as a whole."""
    with torch.no_grad():
        logits = F.linear(given["teacher"], given["teacher_prototypes"])
        bias = 0 if given["teacher_bias"] is None else given["teacher_bias"]
        return F.softmax(logits / given["teacher_temperature"] + bias, dim=1).to(logits.dtype)


def _torch_prototypes(given: Arguments) -> Bound:
    loss, options = _torch_loss()
    return lambda: loss(
        given["student"] / given["student_temperature"],
        given["student_prototypes"],
        _teacher_probabilities(given),
        options=options,
    )


def _liger_prototypes(given: Arguments) -> Bound:
    from liger_kernel.transformers.functional import liger_fused_linear_kl_div as loss

    return lambda: loss(
        given["student"],
        given["student_prototypes"],
        _teacher_probabilities(given),
        temperature=given["student_temperature"],
    )


def _liger_divergence(given: Arguments) -> Bound:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd as loss

    # One temperature for both: the teacher's goes into its features.
    sharper = given["student_temperature"] / given["teacher_temperature"]
    return lambda: loss(
        given["student"],
        given["student_prototypes"],
        given["teacher"] * sharper,
        given["teacher_prototypes"],
        jsd_beta=0.0,
        temperature=given["student_temperature"],
    )


# photometric, gaussian_blur. torch-eager of both cutter and photometric is torchvision v2.


def _refuse_blur(given: Arguments) -> None:
    if given["blur"] is not None:
        raise NotImplementedError("it is compared on the shapes without a blur")


def _kornia_colours(given: Arguments) -> Bound:
    from kornia import augmentation as K

    _refuse_blur(given)
    colours = torch.nn.Sequential(
        K.ColorJitter(0.4, 0.4, 0.4, 0.1),
        K.RandomGrayscale(p=0.2),
        K.RandomSolarize(0.0, 0.0, p=0.2),
        K.Normalize(mean=given["mean"], std=given["std"]),
    )
    return lambda: colours(given["images"] / 255).to(given["dtype"])


def _kornia_compiled(given: Arguments) -> Bound:
    from kornia import enhance

    _refuse_blur(given)
    order = given["kinds"][:, :4].argsort(1)  # where each image has its brightness, contrast, ...
    strength = given["factors"].gather(1, order)
    grey = (given["kinds"][:, 4:] == 2).any(1).view(-1, 1, 1, 1)
    threshold = given["threshold"].view(-1, 1, 1, 1)
    mean, std = (torch.tensor(given[name]).to(strength) for name in ("mean", "std"))

    def colours(images: torch.Tensor) -> torch.Tensor:
        x = enhance.adjust_brightness(images / 255, strength[:, 0])
        x = enhance.adjust_contrast_with_mean_subtraction(x, strength[:, 1])
        x = enhance.adjust_saturation_with_gray_subtraction(x, strength[:, 2])
        x = enhance.adjust_hue(x, strength[:, 3] * 2 * torch.pi)
        x = torch.where(grey, x.mean(1, keepdim=True), x)
        x = torch.where(x < threshold, x, 1 - x)
        return enhance.normalize(x, mean, std).to(given["dtype"])

    torch._dynamo.reset()
    compiled = torch.compile(colours, dynamic=False)
    return lambda: compiled(given["images"])


def _kornia_blur(given: Arguments) -> Bound:
    from kornia.filters import filter2d_separable

    images, kernels = given["images"], given["kernels"].to(given["images"].dtype)
    return lambda: filter2d_separable(images, kernels, kernels, border_type="replicate")


def _torchvision_blur(given: Arguments) -> Bound:
    from torchvision.transforms.v2.functional import gaussian_blur

    taps = given["kernels"].shape[1]
    return lambda: torch.stack(
        [gaussian_blur(x, [taps, taps], [1.0, 1.0]) for x in given["images"]]
    )


RIVALS = (
    Rival("queue_info_nce", "liger", _liger_linear, RECAST, needs_cuda=True),
    Rival("queue_info_nce", "cce", _cce("high"), f"{RECAST}; leaves small gradients out", True),
    Rival("queue_info_nce", "cce_exact", _cce(None), RECAST, needs_cuda=True),
    Rival("queue_info_nce", "torch-linear-ce", _torch_linear, RECAST),
    Rival(
        "soft_cross_entropy",
        "liger",
        _liger_kl,
        "softmaxes by torch, divergence by Liger; less by the teacher's entropy",
        needs_cuda=True,
    ),
    Rival(
        "prototype_cross_entropy",
        "torch-linear-ce",
        _torch_prototypes,
        "the teacher's probabilities as a whole, by torch",
        result="kernel",
    ),
    Rival(
        "prototype_cross_entropy",
        "liger-kl",
        _liger_prototypes,
        "the teacher's probabilities as a whole, by torch; less by their entropy",
        needs_cuda=True,
    ),
    Rival(
        "prototype_cross_entropy",
        "liger-jsd",
        _liger_divergence,
        "no teacher bias; less by the teacher's entropy",
        needs_cuda=True,
    ),
    Rival(
        "photometric",
        "kornia",
        _kornia_colours,
        "one order for the whole batch; draws its own numbers",
    ),
    Rival("photometric", "kornia-compile", _kornia_compiled, "one fixed order"),
    Rival("gaussian_blur", "kornia", _kornia_blur, result="kernel"),
    Rival(
        "gaussian_blur", "torchvision", _torchvision_blur, "a Gaussian, the same for every image"
    ),
)
