"""What a backbone makes of whole images: attention, principal components, and what a method masks.

The arrays behind the pictures of `visualise`, apart from their drawing. Images are whole, resized so that
both sides are multiples of the stride; nothing is cropped.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dense_ssl.augment import MEAN, STD
from dense_ssl.backbones import Backbone, ViTBackbone
from dense_ssl.config import UserError
from dense_ssl.methods import MethodConfig, Step
from dense_ssl.methods.masks import MaskConfig, draw_masks


def whole_image(source: np.ndarray, shorter: int, stride: int) -> tuple[np.ndarray, Tensor]:
    """Return an image resized for the network, as uint8 [H, W, 3] and normalised float [1, 3, H, W].

    Its shorter side is about `shorter`, both sides are multiples of `stride`.
    """
    height, width = source.shape[:2]
    scale = shorter / min(height, width)
    rows, columns = (max(round(scale * side / stride), 1) * stride for side in (height, width))
    image = Image.fromarray(source).resize((columns, rows), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    normalised = (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - mean) / std
    return pixels, normalised[None]


@torch.no_grad()
def attention_maps(backbone: Backbone, image: Tensor) -> tuple[list[str], np.ndarray]:
    """Return where the image-level feature looks, one map a head: names, and float [M, h, w] in 0..1.

    A ViT's class tokens attend in the last block (each head's weights over the largest one). A ResNet has
    no attention: its one map is the cosine similarity of each cell to the pooled feature, from 0 up.
    """
    if isinstance(backbone, ViTBackbone):
        weights = backbone.last_attention(image)[0]  # [heads, T, N]
        heads, tokens = weights.shape[:2]
        names = [
            f"head {head}" if tokens == 1 else f"token {token}, head {head}"
            for token in range(tokens)
            for head in range(heads)
        ]
        maps = weights.transpose(0, 1).flatten(0, 1)
    else:
        features = backbone(image)
        maps = torch.cosine_similarity(features.dense[0], features.cls[0], dim=1)[None].clamp(min=0)
        names = ["similarity to the pooled feature"]
    maps = maps / maps.amax(1, keepdim=True).clamp(min=1e-12)
    rows, columns = (side // backbone.stride for side in image.shape[2:])
    return names, maps.view(-1, rows, columns).numpy()


@torch.no_grad()
def component_maps(backbone: Backbone, images: list[Tensor]) -> list[np.ndarray]:
    """Return the first three principal components of all images' cells as colours, uint8 [h, w, 3] each.

    Components are common to the images, so that a colour means the same in all of them. Each is
    stretched from its 1st to its 99th percentile; its sign makes the larger tail the bright one.
    """
    maps = [backbone(image) for image in images]
    cells = torch.cat([features.dense[0] for features in maps]).double()
    centred = cells - cells.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    values = centred @ directions[:3].T  # [all cells, up to 3]
    values = torch.nn.functional.pad(values, (0, 3 - values.shape[1]))
    values = values * torch.where((values**3).sum(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(values, torch.tensor([0.01, 0.99], dtype=values.dtype), dim=0)
    colours = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(255).round()
    parts = colours.to(torch.uint8).split([features.dense.shape[1] for features in maps])
    return [part.view(*features.grid, 3).numpy() for part, features in zip(parts, maps)]


def masks_of(
    config: MethodConfig, index: Tensor, epoch: int, seed: int, grid: tuple[int, int], crops: int
) -> np.ndarray:
    """Return which patches of the global crops the method hides from its student, bool [V, B, h, w].

    Raises:
        UserError: the method has no masks.
    """
    settings = dict(config).get("mask")
    if not isinstance(settings, MaskConfig):
        raise UserError(f"KIND=masks: {dict(config)['name']} hides no patches from its student")
    return draw_masks(settings, Step(epoch, 1, epoch + 1, seed), index, crops, grid)


def with_hidden(view: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Return a view uint8 [S, S, 3] with the patches of `hidden`, bool [h, w], greyed and hatched."""
    rows, columns = hidden.shape
    y = np.arange(view.shape[0]) * rows // view.shape[0]
    x = np.arange(view.shape[1]) * columns // view.shape[1]
    stripes = (np.arange(view.shape[0])[:, None] + np.arange(view.shape[1])) // 3 % 2 == 0
    grey = np.where(stripes, 168, 148).astype(np.uint8)
    return np.where(hidden[y][:, x, None], grey[..., None], view)
