"""From an image of any size to a class for every pixel of its label map.

| test   | what the network sees                               | how its scores get to the labels' size     |
|--------|-----------------------------------------------------|--------------------------------------------|
| squash | the image at the training crop's size               | classes enlarged by nearest neighbour      |
| native | the image as it is                                  | scores enlarged                            |
| whole  | the image fitted into `scale`                       | scores to its size, then to the labels'    |
| slide  | windows of that, which overlap                      | means of their scores, then to the labels' |
| short  | the image with a shorter side of size x 256 / 224   | scores to its size, then to the labels'    |

With several `test_scales`, or `test_flip`, the network sees the image in all these sizes, and mirrored: the
means of its probabilities decide, taken at the labels' size (mmsegmentation's augmented test).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.evaluation.features import normalised
from dense_ssl.evaluation.segmentation.augment import fitted, resized, resized_labels
from dense_ssl.evaluation.segmentation.protocols import TrainedConfig

_LARGEST = 1000  # longer side that `short` enlarges scores to; beyond, classes are enlarged


@torch.inference_mode()
def predict(
    network: Callable[[Tensor], Tensor],
    image: np.ndarray,
    config: TrainedConfig,
    *,
    multiple: int,
    device: torch.device,
) -> np.ndarray:
    """Return the class of every pixel, int64 [H, W], of an image uint8 [H, W, 3].

    network: from normalised images [1, 3, h, w] to scores [1, C, h', w'].
    multiple: what the sides it can take are multiples of; an image is filled up with the mean colour.
    """
    size = (image.shape[0], image.shape[1])
    decided = size  # where classes are
    if config.test == "squash":
        decided = config.size
    elif config.test == "short" and size[0] * size[1] > _LARGEST**2:
        decided = fitted(size, (_LARGEST, _LARGEST))
    views = [
        (s, m)
        for s in config.test_scales
        for m in ((False, True) if config.test_flip else (False,))
    ]
    total = torch.zeros((), device=device)
    for scale, mirrored in views:
        shown = resized(image, _input_size(size, config, scale), config.resampling)
        pixels = np.ascontiguousarray(shown[:, ::-1] if mirrored else shown)
        x = normalised(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device))
        scores = _scores(network, x, config, multiple)
        scores = enlarged(scores.flip(3) if mirrored else scores, decided, config.align_corners)
        # One view: its scores say the same as its probabilities.
        total = total + scores.softmax(1) if len(views) > 1 else scores
    classes = total[0].argmax(0).cpu().numpy()
    return classes if decided == size else resized_labels(classes, size)


def _scores(
    network: Callable[[Tensor], Tensor], x: Tensor, config: TrainedConfig, multiple: int
) -> Tensor:
    """Scores [1, C, h, w] of images [1, 3, h, w], from windows or of the whole."""
    if config.test != "slide":
        return filled_up(network, x, multiple, config.align_corners)
    assert config.window_stride is not None
    return slid(network, x, config.size, config.window_stride, multiple, config.align_corners)


def slid(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    window: Sequence[int],
    stride: int,
    multiple: int,
    align_corners: bool,
) -> Tensor:
    """Return the scores [1, C, h, w] of images [1, 3, h, w]: means over all windows a pixel is in.

    The last window of a row or column ends with the image.
    """
    height, width = x.shape[2:]
    total, count = None, x.new_zeros(1, 1, height, width)
    for bottom in _ends(height, window[0], stride):
        for right in _ends(width, window[1], stride):
            rows = slice(max(bottom - window[0], 0), bottom)
            columns = slice(max(right - window[1], 0), right)
            scores = filled_up(network, x[:, :, rows, columns], multiple, align_corners)
            if total is None:
                total = scores.new_zeros(1, scores.shape[1], height, width)
            total[:, :, rows, columns] += scores
            count[:, :, rows, columns] += 1
    assert total is not None
    return total / count


def filled_up(
    network: Callable[[Tensor], Tensor], x: Tensor, multiple: int, align_corners: bool
) -> Tensor:
    """Return scores [1, C, h, w] of images [1, 3, h, w], filled up to whole cells for the network."""
    height, width = x.shape[2:]
    whole = F.pad(x, (0, -width % multiple, 0, -height % multiple))
    scores = enlarged(network(whole).float(), whole.shape[2:], align_corners)
    return scores[:, :, :height, :width]


def enlarged(scores: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Return scores [B, C, h, w] at another size by bilinear interpolation."""
    if tuple(scores.shape[2:]) == tuple(size):
        return scores
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=align_corners)


def _input_size(size: tuple[int, int], config: TrainedConfig, scale: float) -> tuple[int, int]:
    """Height and width of what the network sees of an image, `scale` times those of the protocol."""
    if config.test in ("squash", "native"):
        height, width = config.size if config.test == "squash" else size
        return max(round(scale * height), 1), max(round(scale * width), 1)
    if config.test == "short":
        shorter = scale * config.size[0] * 256 / 224
        return fitted(size, (max(size) * shorter, shorter))
    return fitted(size, (scale * config.scale[0], scale * config.scale[1]))


def _ends(length: int, window: int, stride: int) -> list[int]:
    """Where the windows along one side end."""
    count = -(-max(length - window, 0) // stride) + 1
    return [min(number * stride + window, length) for number in range(count)]
