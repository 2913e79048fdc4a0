"""Functions of "Revisiting Contrastive Methods" (arXiv:2106.05967).

Conventions are the official code's: boxes (top, left, height, width) in pixels, queues as columns
([D, K]), rows image-major (the large query of an image, then its small ones), raw inputs that the
function normalises.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dense_ssl import autoaugment
from dense_ssl.autoaugment import Definition


def autoaugment_subpolicy(
    img: Image.Image | Tensor,
    id: int,
    u: tuple[float, float],
    sign: tuple[int, int],
    definition: Definition = "published",
) -> Image.Image | Tensor:
    """Return an image, Pillow's or uint8 [3, H, W], after sub-policy `id`.

    Each of its two operations is done where u is at most its probability; a sign of 0 is negative.
    """
    if isinstance(img, Image.Image):
        pixels = torch.from_numpy(np.array(img.convert("RGB"))).permute(2, 0, 1)
        out = autoaugment_subpolicy(pixels, id, u, sign, definition)
        assert isinstance(out, Tensor)
        return Image.fromarray(out.permute(1, 2, 0).numpy())
    done = autoaugment.operations(
        np.array([id]), np.array([u]), np.array([sign]) > 0, np.zeros(1, np.int64),
        (img.shape[1], img.shape[2]), definition,
    )  # fmt: skip
    out = img[None].clone(memory_format=torch.contiguous_format)
    for x in done:
        numbers = torch.from_numpy(x.numbers).to(out.device)
        autoaugment.apply_(out, x.kind, torch.from_numpy(x.rows).to(out.device), numbers)
    return out[0]
