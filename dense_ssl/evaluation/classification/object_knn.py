"""k nearest neighbours of objects by their own cells, and again with another background (iBOT + DC: O-KNN).

COCO's objects of 32 px or more. The network sees a square window around an object, larger than it by a margin
on each side; the cells under its box are averaged (RoIAlign, 7 x 7) and compared by cosine, with the vote of
`knn`. Then all of the window but the box of each validation object is replaced by another image: what
features have taken in from beyond the object is lost, and `drop` says how much that costs. The bank keeps its
backgrounds.

Assumed, because the paper (Qiu et al., ICLR 2024) does not say: the window and its margin, RoIAlign, k and
temperature, and that the bank keeps its backgrounds. ResNets are dilated to stride 16.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation import coco
from dense_ssl.evaluation.classification.accuracy import accuracies, chance
from dense_ssl.evaluation.classification.data import (
    ClassifyData,
    LabelledPictures,
    Picture,
    open_coco_objects,
    read_picture,
)
from dense_ssl.evaluation.classification.knn import knn_scores, neighbours
from dense_ssl.evaluation.features import (
    Extracted,
    FeatureCache,
    check_size,
    content_key,
    extract,
)
from dense_ssl.evaluation.matching.finer import dilated
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.pictures import open_image
from dense_ssl.visualise.sheets import stacked, tiles_sheet

PROTOCOL = "object-knn/v1"
_STRIDE = 16  # of ResNets, dilated
_BINS = 7  # of RoIAlign, per side
_DRAWN, _NEAREST = 6, 2
_TILE_PX = 144


class Config(BaseConfig):
    """Settings of the protocol."""

    size: Annotated[int, Field(ge=16)] = 224  # both sides of the window as the network sees it
    margin: Annotated[float, Field(ge=0)] = 0.5  # beyond the box, in its longer side
    k: Annotated[int, Field(ge=1)] = 20
    temperature: Annotated[float, Field(gt=0)] = 0.07
    batch_size: Annotated[int, Field(ge=1)] = 64
    seed: int = 0  # of the other backgrounds
    max_train: Annotated[int, Field(ge=1)] | None = None  # objects, evenly spaced
    max_val: Annotated[int, Field(ge=1)] | None = None


class ObjectCells(nn.Module):
    """From windows and the boxes in them to one vector per object."""

    def __init__(self, backbone: Backbone) -> None:
        """Read a ViT as it is, a ResNet dilated to stride 16."""
        super().__init__()
        self.backbone = dilated(backbone, _STRIDE)
        self.stride = self.backbone.stride

    def forward(self, windows: Tensor, boxes: Tensor) -> Tensor:
        """Return unit vectors [B, D] of normalised windows [B, 3, S, S].

        boxes: [B, 4], left, top, right and bottom in fractions of the window.
        """
        features = self.backbone(windows)
        maps = features.dense.float().transpose(1, 2).unflatten(2, features.grid)
        scale = boxes.new_tensor([features.grid[1], features.grid[0]]).repeat(2)
        each = [box[None] for box in boxes * scale]
        return F.normalize(roi_align(maps, each, _BINS, aligned=True).mean((2, 3)), dim=1)


def load(path: Path, config: Config) -> ClassifyData:
    """Return the objects of the COCO data set at `path`.

    Raises:
        UserError: it is none, or no object in it is usable.
    """
    if not coco.is_coco(path):
        raise UserError(f"{path}: no annotations/instances_*.json in it; object-knn reads COCO's")
    return open_coco_objects(path, (config.max_train, config.max_val), PROTOCOL)


def run(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `top1@k` and `top5@k` in percent, `elsewhere-top1@k` on other backgrounds, and the `drop@k`.

    The last three are of the objects that can be read in both ways.
    """
    where = next(backbone.parameters()).device
    bank, bank_y = _of_split(_vectors(backbone, data, "train", config, cache), data.train, where)
    own = _vectors(backbone, data, "val", config, cache)
    other = _vectors(backbone, data, "elsewhere", config, cache)
    k, classes = min(config.k, len(bank)), len(data.classes)

    def judged(extracted: Extracted) -> dict[str, float]:
        queries, labels = _of_split(extracted, data.val, where)
        scores = knn_scores(bank, bank_y, queries, k, config.temperature, classes)
        truth = labels.cpu()
        return accuracies(scores, truth) | chance(bank_y.cpu(), truth, classes)

    found = judged(own)
    both = judged(_only(own, other.kept)), judged(_only(other, own.kept))
    values = {f"{name}@{k}": found[name] for name in ("top1", "top5")}
    values |= {f"elsewhere-{name}@{k}": both[1][name] for name in ("top1", "top5")}
    values[f"drop@{k}"] = both[0]["top1"] - both[1]["top1"]
    values |= {f"chance/{name}": found[f"chance/{name}"] for name in ("top1", "top5")}
    for name in ("top1", "top5"):
        values[f"chance/elsewhere-{name}"] = both[1][f"chance/{name}"]
    return values


def pictures(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return a few objects, each before both backgrounds, beside the nearest objects of the bank."""
    train = _vectors(backbone, data, "train", config, cache)
    bank, bank_y = _of_split(train, data.train, next(backbone.parameters()).device)
    ways = [_vectors(backbone, data, name, config, cache) for name in ("val", "elsewhere")]
    ways = [_only(ways[0], ways[1].kept), _only(ways[1], ways[0].kept)]
    others = _others(data, config.seed)
    count = len(ways[0].kept)
    rows = []
    for row in np.linspace(0, count - 1, min(_DRAWN, count)).round().astype(int).tolist():
        picture = data.val.pictures[int(ways[0].kept[row])]
        label = data.classes[int(data.val.labels[ways[0].kept[row]])]
        names, tiles = [], []
        for way, other in zip(ways, (None, others[picture]), strict=True):
            names.append(label if other is None else f"{label}, elsewhere")
            tiles.append(_window(picture, other, config))
            _, nearest = neighbours(bank, way.features[row][None].to(bank.device), _NEAREST)
            for i in nearest[0].tolist():
                names.append(f"nearest: {data.classes[int(bank_y[i])]}")
                tiles.append(_window(data.train.pictures[int(train.kept[i])], None, config))
        arrays = [tile.permute(1, 2, 0).numpy() for tile in tiles]
        rows.append(tiles_sheet(names, arrays, _TILE_PX))
    named = marked(data.protocol, "object-knn", config)
    return {"objects": stacked(rows, f"{named}: the same objects before two backgrounds")}


def object_window(
    box: tuple[float, float, float, float], width: int, height: int, margin: float
) -> tuple[tuple[float, float, float, float], tuple[float, float, float, float]]:
    """Return the square window around a box, and the box in it.

    Args:
        box: x, y, width and height in pixels.
        width: of the image.
        height: of the image.
        margin: on each side, in the box's longer side; the window is no larger than the image and is
            pushed into it.

    Returns:
        left, top, right, bottom: of the window in pixels; of the box, clipped, in fractions of the window.
    """
    x, y, w, h = box
    side = min(max(w, h) * (1 + 2 * margin), width, height)
    left = min(max(x + w / 2 - side / 2, 0), width - side)
    top = min(max(y + h / 2 - side / 2, 0), height - side)
    corners = ((x - left) / side, (y - top) / side, (x + w - left) / side, (y + h - top) / side)
    inside = tuple(min(max(corner, 0.0), 1.0) for corner in corners)
    return (left, top, left + side, top + side), inside  # pyright: ignore[reportReturnType]


def moved(window: Tensor, other: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """Return `other` with the pixels of `box` from `window`, both uint8 [3, S, S]; box in fractions."""
    side = window.shape[1]
    left, top, right, bottom = (round(corner * side) for corner in box)
    result = other.clone()
    result[:, top:bottom, left:right] = window[:, top:bottom, left:right]
    return result


def _vectors(
    backbone: Backbone, data: ClassifyData, name: str, config: Config, cache: FeatureCache | None
) -> Extracted:
    """Unit vectors [n, D] of the objects of train, of val, or of val elsewhere."""
    network = ObjectCells(backbone)
    check_size((config.size,), network.stride)
    others = _others(data, config.seed) if name == "elsewhere" else {}
    settings = (name, config.size, config.margin, network.stride, config.seed if others else None)
    return extract(
        network,
        (data.train if name == "train" else data.val).pictures,
        lambda picture: _window(picture, others.get(picture), config),
        lambda vectors: vectors,
        batch_size=config.batch_size,
        key=content_key(PROTOCOL, *settings, data.content),
        cache=cache,
        omitted=data.omitted,
        label=name,
        beside=lambda picture: torch.tensor(_place(picture, config)[1]),
    )


def _of_split(
    extracted: Extracted, split: LabelledPictures, where: torch.device
) -> tuple[Tensor, Tensor]:
    """Vectors and labels, on a device."""
    return extracted.features.to(where), split.labels[extracted.kept].to(where)


def _only(extracted: Extracted, kept: Tensor) -> Extracted:
    """Those of the pictures whose positions are in `kept` too."""
    common = torch.isin(extracted.kept, kept)
    return Extracted(extracted.features[common], extracted.kept[common])


def _others(data: ClassifyData, seed: int) -> dict[Picture, Picture]:
    """Of every validation object the whole image that its background is taken from, never its own.

    Raises:
        UserError: there is one image only.
    """
    paths = sorted({picture.path for picture in data.val.pictures})
    if len(paths) < 2:
        raise UserError("val: objects of one image only; other backgrounds need a second one")
    place = {path: number for number, path in enumerate(paths)}
    random = np.random.default_rng(seed)
    found = {}
    for picture in data.val.pictures:
        drawn = int(random.integers(len(paths) - 1))
        found[picture] = Picture(paths[drawn + (drawn >= place[picture.path])])
    return found


def _place(
    picture: Picture, config: Config
) -> tuple[tuple[float, float, float, float], tuple[float, float, float, float]]:
    """The window of an object in pixels, and its box in the window."""
    assert picture.box is not None
    with open_image(picture.path) as opened:
        width, height = opened.size
    return object_window(picture.box, width, height, config.margin)


def _window(picture: Picture, other: Picture | None, config: Config) -> Tensor:
    """An object in its window, or before the middle of another image; uint8 [3, S, S]."""
    window, box = _place(picture, config)
    with open_image(picture.path) as opened:
        size = (config.size, config.size)
        cut = opened.convert("RGB").resize(size, Image.Resampling.BILINEAR, box=window)
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)
    if other is None:
        return pixels
    return moved(pixels, read_picture(other, config.size, config.size), box)
