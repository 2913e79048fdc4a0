"""Copy detection on INRIA Copydays (Douze et al. 2009), as DINO and iBOT measure it.

Images are squashed to a square (224 px: iBOT; DINO's best numbers are of 320). The feature is the class token
beside the generalised mean (power 4) of the last block's cells. A copy is searched by cosine among originals
and distractors; the first 20 count. Mean average precision by trapezoids of each block, `strong` above all.
Copies and originals belong together by the first four characters of their names.

| folder in the data             | holds                                                             |
|--------------------------------|-------------------------------------------------------------------|
| `original/`                    | the originals                                                     |
| `strong/`, `jpegqual/N/`, `crops/N/` | their copies; blocks that are not there are named and left out |
| `distractors/`                 | more images to search among; published: 10k of YFCC100M           |
| `whitening/`                   | images to learn a PCA whitening (power 1/2) from; published: 20k  |

The last two may be missing: then the protocol's name says `-plain`, for the published numbers have both.
Whitening divides by the roots of the second moments' eigenvalues after the mean is taken off, as published.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation.features import (
    FeatureCache,
    check_size,
    content_key,
    extract,
    file_stamp,
)
from dense_ssl.evaluation.omissions import Omissions, require_some
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.retrieval.ranking import generalised_mean, retrieval_precision
from dense_ssl.loaders.source import SUFFIXES
from dense_ssl.pictures import open_image
from dense_ssl.visualise.sheets import stacked, tiles_sheet

_QUALITIES = (3, 5, 8, 10, 15, 20, 30, 50, 75)
_CROPS = (10, 15, 20, 30, 40, 50, 60, 70, 80)
BLOCKS = (
    *("strong", "original"),
    *(f"jpegqual/{number}" for number in _QUALITIES),
    *(f"crops/{number}" for number in _CROPS),
)
_FIRST = 20  # places that count
_PREFIX = 4  # characters that a copy shares with its original
_FLOOR = 1e-5  # of the largest eigenvalue
_SHUFFLES = 5
_DRAWN, _FOUND, _TILE_PX = 6, 4, 140


class Config(BaseConfig):
    """Settings of the protocol."""

    size: Annotated[int, Field(ge=16)] = 224  # both sides of the input in pixels; DINO: 320
    batch_size: Annotated[int, Field(ge=1)] = 64
    seed: int = 0  # of chance


@dataclass(frozen=True, slots=True)
class CopyData:
    """Images by block; `original` is the database."""

    protocol: str
    blocks: dict[str, tuple[Path, ...]]
    distractors: tuple[Path, ...]
    whitening: tuple[Path, ...]
    content: str  # hash, other when a file is
    omitted: Omissions = field(compare=False)


class CopyFeature(nn.Module):
    """The class token beside the generalised mean of the cells: images to [B, 2 D]."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of normalised images [B, 3, H, W]."""
        features = self.backbone(images)
        return torch.cat([features.cls[:, 0], generalised_mean(features.dense)], dim=1).float()


def load(path: Path, config: Config) -> CopyData:
    """Return the blocks at `path`.

    Raises:
        UserError: there are no originals, or no copies.
    """
    omitted = Omissions()
    blocks = {name: _images(path / name) for name in BLOCKS}
    if not blocks["original"]:
        raise UserError(
            f"{path}: no images in original/; copydays reads original/, strong/, jpegqual/N/ and crops/N/ "
            "as Copydays has them"
        )
    for name, images in blocks.items():
        if not images:
            omitted.add("block without images", name)
    copies = [name for name, images in blocks.items() if images and name != "original"]
    require_some(copies, str(path), omitted)
    distractors, whitening = _images(path / "distractors"), _images(path / "whitening")
    everything = [
        *(image for images in blocks.values() for image in images),
        *distractors,
        *whitening,
    ]
    content = content_key(*map(file_stamp, everything))
    protocol = "copydays/v1" if distractors and whitening else "copydays-plain/v1"
    return CopyData(protocol, blocks, distractors, whitening, content, omitted)


def run(
    backbone: Backbone, data: CopyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `mAP@strong`, `mAP@original`, and the means `mAP@jpegqual`, `mAP@crops` in percent.

    Each of the last two's blocks is a note. Chance ranks at random.

    Raises:
        UserError: no copy has its original among the images that can be read.
    """
    found = _vectors(backbone, data, config, cache)
    database = torch.cat([found["original"].vectors, found["distractors"].vectors])
    owners = found["original"].names + [""] * len(found["distractors"].paths)
    values: dict[str, float] = {}
    random = np.random.default_rng(config.seed)
    chances = []
    for block in BLOCKS:
        names = found[block].names
        for name in sorted(set(names) - set(owners)):
            data.omitted.add(f"{block}: copies without an original", name)
        kept = [i for i, name in enumerate(names) if name in owners]
        if not kept:
            continue
        wanted = [names[i] for i in kept]
        orders = (found[block].vectors[kept] @ database.T).argsort(
            dim=1, descending=True, stable=True
        )
        values[block] = 100 * mean_precision(orders.numpy(), owners, wanted)
        for _ in range(_SHUFFLES):
            shuffled = random.permuted(orders.numpy().copy(), axis=1)
            chances.append(100 * mean_precision(shuffled, owners, wanted))
    if not set(values) - {"original"}:
        raise UserError("no copy has its original among the images that can be read")
    return _summed_up(values) | {"chance/mAP": float(np.mean(chances))}


def pictures(
    backbone: Backbone, data: CopyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return a few copies of the hardest block beside the images found first."""
    found = _vectors(backbone, data, config, cache)
    block = next(name for name in BLOCKS if name != "original" and found[name].paths)
    parts = [found["original"], found["distractors"]]
    database = torch.cat([part.vectors for part in parts])
    paths = [path for part in parts for path in part.paths]
    orders = (found[block].vectors @ database.T).argsort(dim=1, descending=True, stable=True)
    copies, count = found[block], len(found[block].paths)
    rows = []
    for row in np.linspace(0, count - 1, min(_DRAWN, count)).round().astype(int).tolist():
        captions, tiles = [f"{block}: {copies.paths[row].stem}"], [copies.paths[row]]
        for place in orders[row, :_FOUND].tolist():
            original = place < len(found["original"].paths)
            right = original and paths[place].stem[:_PREFIX] == copies.names[row]
            captions.append(f"{'right' if right else 'wrong'}: {paths[place].stem}"[:22])
            tiles.append(paths[place])
        arrays = [_opened(path, _TILE_PX).permute(1, 2, 0).numpy() for path in tiles]
        rows.append(tiles_sheet(captions, arrays, _TILE_PX))
    named = marked(data.protocol, "copydays", config)
    return {"found": stacked(rows, f"{named}: a copy, and the images found first")}


def mean_precision(orders: np.ndarray, owners: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the mean over copies of the average precision within the first 20 places, 0..1.

    Args:
        orders: int [n, M], the database in descending similarity to each copy.
        owners: which original each of the M images is, "" for a distractor.
        wanted: which original each copy is of.
    """
    precisions = []
    for order, name in zip(orders[:, :_FIRST], wanted, strict=True):
        positions = np.flatnonzero([owners[place] == name for place in order.tolist()])
        precisions.append(retrieval_precision(positions, owners.count(name)))
    return float(np.mean(precisions))


def whitened(features: Tensor, sample: Tensor) -> Tensor:
    """Return features [n, D] in the whitened principal axes of a sample [m, D].

    x' = V^T (x - mean) / sqrt(d), where d and V are of the sample's second moments (its mean is not taken off
    them, as published), d at least 1e-5 of the largest.
    """
    sample = sample.double()
    values, axes = torch.linalg.eigh(sample.T @ sample / len(sample))
    values = values.clamp(min=float(values.max()) * _FLOOR)
    return ((features.double() - sample.mean(0)) @ axes / values.sqrt()).float()


@dataclass(frozen=True, slots=True)
class _Block:
    """The images of a block that can be read."""

    paths: list[Path]
    vectors: Tensor  # [n, 2 D], unit

    @property
    def names(self) -> list[str]:
        """Which original each is."""
        return [path.stem[:_PREFIX] for path in self.paths]


def _summed_up(values: dict[str, float]) -> dict[str, float]:
    """The headline rows, and single blocks as notes."""
    rows = {f"mAP@{name}": values[name] for name in ("strong", "original") if name in values}
    for kind in ("jpegqual", "crops"):
        of_kind = {name: value for name, value in values.items() if name.startswith(kind)}
        if of_kind:
            rows[f"mAP@{kind}"] = float(np.mean(list(of_kind.values())))
        rows |= {f"note/{name.replace('/', '-')}": value for name, value in of_kind.items()}
    return rows


def _vectors(
    backbone: Backbone, data: CopyData, config: Config, cache: FeatureCache | None
) -> dict[str, _Block]:
    """Unit vectors of the readable images of every block and of the distractors."""
    check_size((config.size,), backbone.stride)
    network = CopyFeature(backbone)
    groups = data.blocks | {"distractors": data.distractors, "whitening": data.whitening}
    found: dict[str, _Block] = {}
    for name, images in groups.items():
        if not images:
            found[name] = _Block([], torch.zeros(0, 2 * backbone.dim))
            continue
        extracted = extract(
            network,
            images,
            lambda path: _opened(path, config.size),
            lambda vectors: vectors,
            batch_size=config.batch_size,
            key=content_key("copydays", name, config.size, data.content),
            cache=cache,
            omitted=data.omitted,
            label=name,
        )
        paths = [images[position] for position in extracted.kept.tolist()]
        found[name] = _Block(paths, extracted.features)
    sample = found.pop("whitening").vectors
    for name, block in found.items():
        vectors = whitened(block.vectors, sample) if len(sample) else block.vectors
        found[name] = _Block(block.paths, F.normalize(vectors, dim=1))
    return found


def _images(folder: Path) -> tuple[Path, ...]:
    """The images right in a folder, by name; none where it is not there."""
    if not folder.is_dir():
        return ()
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return tuple(path for path in paths if not path.name.startswith("."))


def _opened(path: Path, side: int) -> Tensor:
    """An image squashed to a square, uint8 [3, side, side]."""
    with open_image(path) as opened:
        small = opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)
