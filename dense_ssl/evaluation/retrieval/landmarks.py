"""Retrieval of landmarks: revisited Oxford and Paris (Radenovic et al. 2018), as DINO and iBOT measure it.

Every image is made to fit 512 px (never enlarged); the class token is read at that size and at 1 / sqrt 2 and
a half of it, the mean is made a unit vector, and the database is ranked by cosine. Medium: easy and hard
images are to be found, junk is ignored; hard: easy ones are ignored as well. Mean average precision by
trapezoids, and mean precision at 1, 5 and 10. Queries are whole images, as in those codes;
`crop_queries=true` cuts them to their boxes, as the benchmark's own protocol does.

Data: `roxford5k/` or `rparis6k/` with `gnd_roxford5k.pkl` and `jpg/`, as distributed. The ground truth is a
pickle; it is read as plain data, and no code in it is run. A ViT does not see the border that fills no patch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation.choices import Pool
from dense_ssl.evaluation.features import Extracted, FeatureCache, content_key, extract, file_stamp
from dense_ssl.evaluation.omissions import Omissions, require_some
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.readout import Readout
from dense_ssl.evaluation.retrieval.ranking import rankings_scores
from dense_ssl.pictures import open_image
from dense_ssl.visualise.sheets import stacked, tiles_sheet
from dense_ssl.weights import plain_pickle

PROTOCOL = "landmarks/v1"
DATASETS = ("roxford5k", "rparis6k")
_SCALES = (1.0, 1 / math.sqrt(2), 0.5)  # DINO, iBOT
_PLACES = (1, 5, 10)
_SHUFFLES = 5  # random rankings that chance is the mean of
_DRAWN, _FOUND, _TILE_PX = 6, 5, 140


class Config(BaseConfig):
    """Settings of the protocol."""

    dataset: Literal["roxford5k", "rparis6k"] | None = None  # None: the one that is there
    size: Annotated[int, Field(ge=16)] = 512  # longer side in pixels
    multi_scale: bool = True
    crop_queries: bool = False
    pool: Pool = "cls"
    seed: int = 0  # of chance


@dataclass(frozen=True, slots=True)
class Landmark:
    """An image and the part of it that is the picture, left, top, right, bottom in pixels."""

    path: Path
    box: tuple[float, float, float, float] | None = None

    def __str__(self) -> str:
        return self.path.name


@dataclass(frozen=True, slots=True)
class Query:
    """What is searched, and the positions of its images in the database."""

    image: Landmark
    easy: tuple[int, ...]
    hard: tuple[int, ...]
    junk: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LandmarkData:
    """The database and its queries."""

    protocol: str
    database: tuple[Landmark, ...]
    queries: tuple[Query, ...]
    content: str  # hash, other when a file or the truth is
    omitted: Omissions = field(compare=False)


class MultiScale(nn.Module):
    """Unit vectors [B, D]: the mean of what is read at all scales of normalised images [B, 3, H, W]."""

    def __init__(self, backbone: Backbone, pool: Pool, scales: Sequence[float]) -> None:
        super().__init__()
        self.readout, self.scales = Readout(backbone, pool), tuple(scales)
        self.stride = backbone.stride

    def forward(self, images: Tensor) -> Tensor:
        """Return the vectors."""
        total = torch.zeros((), device=images.device)
        for scale in self.scales:
            x = images
            if scale != 1:
                x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            height, width = (max(side // self.stride, 1) * self.stride for side in x.shape[2:])
            x = F.pad(x, (0, max(width - x.shape[3], 0), 0, max(height - x.shape[2], 0)))
            total = total + self.readout(x[:, :, :height, :width])
        return F.normalize(total, dim=1)


def load(path: Path, config: Config) -> LandmarkData:
    """Return the database and the queries of the benchmark at `path`.

    Raises:
        UserError: it is not there, its ground truth cannot be read, or none of its images exists.
    """
    name, home = _home(path, config.dataset)
    truth = _truth(home / f"gnd_{name}.pkl")
    try:
        database = tuple(Landmark(home / "jpg" / f"{image}.jpg") for image in truth["imlist"])
        queries = tuple(
            Query(
                Landmark(
                    home / "jpg" / f"{image}.jpg",
                    _corners(entry["bbx"]) if config.crop_queries else None,
                ),
                *(
                    tuple(_positions(entry[kind], len(database)))
                    for kind in ("easy", "hard", "junk")
                ),
            )
            for image, entry in zip(truth["qimlist"], truth["gnd"], strict=True)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{home}/gnd_{name}.pkl: not the revisited ground truth ({error}); fetch it again"
        ) from None
    there = {x.path for x in (*database, *(q.image for q in queries)) if x.path.is_file()}
    missing = Omissions()
    for image in database:
        if image.path not in there:
            missing.add("image file missing", image.path.name)
    require_some((image for image in database if image.path in there), f"{home}/jpg", missing)
    content = content_key(
        *map(file_stamp, sorted(there)),
        *((str(q.image.path), q.image.box, q.easy, q.hard, q.junk) for q in queries),
    )
    # What is missing is named when it is to be read.
    return LandmarkData(f"landmarks-{name}/v1", database, queries, content, Omissions())


def run(
    backbone: Backbone, data: LandmarkData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `medium-mAP`, `hard-mAP` and `...-mP@k` in percent, and what random rankings reach."""
    database, queries = _vectors(backbone, data, config, cache)
    truths = _truths(data, database, queries)
    ranks = (database.features @ queries.features.T).argsort(dim=0, descending=True, stable=True)
    values = _scored(ranks.numpy(), truths)
    random = np.random.default_rng(config.seed)
    shuffled = [
        _scored(random.permuted(ranks.numpy().copy(), axis=0), truths) for _ in range(_SHUFFLES)
    ]
    for kind in truths:
        for name in (f"{kind}-mAP", f"{kind}-mP@{_PLACES[-1]}"):
            mean = float(np.mean([each[name] for each in shuffled]))
            values["chance/" + name.partition("@")[0]] = mean
    return values


def pictures(
    backbone: Backbone, data: LandmarkData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return a few queries beside the images found first, each called right, junk or wrong."""
    database, queries = _vectors(backbone, data, config, cache)
    truth = _truths(data, database, queries)["medium"]
    ranks = (database.features @ queries.features.T).argsort(dim=0, descending=True, stable=True)
    rows = []
    count = len(queries.kept)
    for column in np.linspace(0, count - 1, min(_DRAWN, count)).round().astype(int).tolist():
        query = data.queries[int(queries.kept[column])].image
        names, tiles = [query.path.stem[:20]], [_opened(query, _TILE_PX)]
        for row in ranks[:_FOUND, column].tolist():
            kinds = {"right": truth[column]["ok"], "junk": truth[column]["junk"]}
            names.append(next((kind for kind, those in kinds.items() if row in those), "wrong"))
            tiles.append(_opened(data.database[int(database.kept[row])], _TILE_PX))
        arrays = [tile.permute(1, 2, 0).numpy() for tile in tiles]
        rows.append(tiles_sheet(names, arrays, _TILE_PX))
    named = marked(data.protocol, "landmarks", config)
    return {"found": stacked(rows, f"{named}: a query, and the images found first")}


def _scored(
    ranks: np.ndarray, truths: Mapping[str, Sequence[Mapping[str, Sequence[int]]]]
) -> dict[str, float]:
    values: dict[str, float] = {}
    for kind, truth in truths.items():
        mean, _, at, _ = rankings_scores(ranks, truth, _PLACES)
        if math.isnan(mean):
            raise UserError(f"{kind}: no query has an image to be found; is the database whole?")
        values[f"{kind}-mAP"] = 100 * mean
        values |= {
            f"{kind}-mP@{place}": 100 * float(x) for place, x in zip(_PLACES, at, strict=True)
        }
    return values


def _truths(
    data: LandmarkData, database: Extracted, queries: Extracted
) -> dict[str, list[dict[str, list[int]]]]:
    """For both difficulties and every readable query, rows of the database to be found, and to be ignored."""
    row = {position: number for number, position in enumerate(database.kept.tolist())}

    def rows(*parts: Sequence[int]) -> list[int]:
        return [row[position] for part in parts for position in part if position in row]

    chosen = [data.queries[position] for position in queries.kept.tolist()]
    return {
        "medium": [{"ok": rows(q.easy, q.hard), "junk": rows(q.junk)} for q in chosen],
        "hard": [{"ok": rows(q.hard), "junk": rows(q.junk, q.easy)} for q in chosen],
    }


def _vectors(
    backbone: Backbone, data: LandmarkData, config: Config, cache: FeatureCache | None
) -> tuple[Extracted, Extracted]:
    """Unit vectors of the database and of the queries."""
    scales = _SCALES if config.multi_scale else (1.0,)
    network = MultiScale(backbone, config.pool, scales)
    parts = []
    for name, images in (
        ("database", data.database),
        ("queries", tuple(query.image for query in data.queries)),
    ):
        key = content_key(PROTOCOL, name, config.size, scales, config.pool, data.content)
        extracted = extract(
            network,
            images,
            lambda image: _opened(image, config.size),
            lambda vectors: vectors.float(),
            batch_size=1,  # of different sizes
            key=key,
            cache=cache,
            omitted=data.omitted,
            label=name,
        )
        parts.append(extracted)
    return parts[0], parts[1]


def _opened(image: Landmark, longest: int) -> Tensor:
    """The image, or its part, made to fit a square; uint8 [3, H, W]."""
    with open_image(image.path) as opened:
        picture = opened.convert("RGB")
    if image.box is not None:
        picture = picture.crop(tuple(round(edge) for edge in image.box))  # pyright: ignore
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _home(root: Path, wanted: str | None) -> tuple[str, Path]:
    """The data set's name, and the folder with its ground truth."""
    found = {
        name: home
        for name in DATASETS
        for home in (root / name, root)
        if (home / f"gnd_{name}.pkl").is_file()
    }
    if wanted is None and len(found) > 1:
        raise UserError(f"{root}: both {' and '.join(found)} are there; choose one by dataset=")
    name = wanted or next(iter(found), None)
    if name is None or name not in found:
        names = " nor ".join(f"{n}/gnd_{n}.pkl" for n in ((wanted,) if wanted else DATASETS))
        raise UserError(
            f"{root}: no {names} in it; landmarks reads the revisited Oxford and Paris benchmarks, "
            "gnd_*.pkl beside jpg/"
        )
    return name, found[name]


def _truth(path: Path) -> Mapping[str, Any]:
    """The dictionary in the ground truth's pickle."""
    try:
        content = plain_pickle.read(path)
    except Exception as error:  # a damaged pickle can raise anything at all
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: cannot be read as plain data ({reason}); no code of a pickle is run: fetch the file "
            "of the revisitop project again"
        ) from None
    keys = ("gnd", "imlist", "qimlist")
    if not isinstance(content, Mapping) or not all(key in content for key in keys):
        raise UserError(f"{path}: not the revisited ground truth, which has {', '.join(keys)}")
    return content


def _positions(values: Any, count: int) -> list[int]:
    positions = [int(value) for value in values]
    if any(not 0 <= position < count for position in positions):
        raise ValueError(f"an image beyond the {count} of the database")
    return positions


def _corners(box: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(edge) for edge in box)
    return left, top, right, bottom
