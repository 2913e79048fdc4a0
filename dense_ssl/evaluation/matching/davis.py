"""DAVIS-2017 by label propagation: the first frame's masks carried along a video by frozen cells.

Two published settings. `dino` (DINO, iBOT, SERE, UDI): shorter side 480 and the other a
multiple of 64, the first and seven recent frames, a square neighbourhood of 12 cells, the five most similar,
temperature 0.1. `revisiting` (Jabri et al. 2020, Van Gansbeke et al. 2021): native size,
the first frame whole and 20 recent ones, a disc of 12 cells, ten, 0.05. ViTs give their last patch tokens;
ResNets in both settings the third stage at stride 8. J and F by the official rules: per object, first and
last frame left out, mean over objects.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from dataprep import plain_json
from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.distributed import rank, world_size
from dense_ssl.evaluation.features import FeatureCache, content_key
from dense_ssl.evaluation.matching.davis_data import DavisData, Video, open_davis, read_frame
from dense_ssl.evaluation.matching.davis_masks import Recipe, encoder_of, masks_of
from dense_ssl.evaluation.matching.davis_metrics import (
    contour_accuracy,
    region_similarity,
    scores,
    statistics,
)
from dense_ssl.evaluation.matching.label_propagation import DINO, REVISITING
from dense_ssl.evaluation.omissions import require_some
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.ranks import everyone
from dense_ssl.evaluation.tinted import beside_truth, label_colours
from dense_ssl.pictures import open_image
from dense_ssl.visualise.sheets import stacked, tiles_sheet

Series = tuple[list[float], list[float], list[float], list[float]]  # J, F; of the still mask too
_DRAWN, _COLUMNS, _TILE_PX = 4, 6, 220  # sequences, and frames of each, in pictures


class Config(BaseConfig):
    """Settings of the protocol; what is None is as published."""

    settings: Literal["dino", "revisiting"] = "dino"
    split: str = "val"
    resolution: str = "480p"  # folder below JPEGImages and Annotations
    size: Annotated[int, Field(ge=16)] | None = None  # shorter side of the input in pixels
    recent: Annotated[int, Field(ge=1)] | None = None  # frames before the target, besides the first
    radius: Annotated[int, Field(ge=1)] | None = None  # of the neighbourhood in cells
    topk: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None

    def recipe(self) -> Recipe:
        """Return the published recipe of these settings, with what is given in its place."""
        given = self.model_dump(include={"recent", "radius", "topk", "temperature"})
        published = DINO if self.settings == "dino" else REVISITING
        rules = replace(published, **{k: v for k, v in given.items() if v is not None})
        return Recipe(self.settings, self.size, rules)


def load(path: Path, config: Config) -> DavisData:
    """Return the sequences at `path`, in DAVIS-2017's layout.

    Raises:
        UserError: the layout is another, or no sequence is usable.
    """
    protocol = f"davis-{config.settings}/v1"
    return open_davis(path, config.split, config.resolution, protocol)


def run(
    backbone: Backbone, data: DavisData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `J&F`, `J`, `F` and the recall and decay of both in percent.

    `chance/...` is the first frame's mask in every frame. With a cache, finished sequences are kept: what
    was interrupted goes on with the next one. Ranks share the sequences.

    Raises:
        UserError: no sequence can be read, or the network cannot take the input's size.
    """
    encoder = encoder_of(backbone)
    device = next(backbone.parameters()).device
    folder = _folder(data, config, device, cache)
    own: dict[str, list[Series] | str] = {}
    videos = data.videos[rank() :: world_size()]
    total = sum(len(video.frames) for video in videos)
    with tqdm(total=total, desc="frames", unit="img", leave=False, disable=None) as progress:
        for video in videos:
            found = _stored(folder, video)
            if found is None:
                predicted = _kept(masks_of(encoder, video, config.recipe(), device), folder, video)
                try:
                    found = _score(video, predicted, progress)
                except (OSError, ValueError, SyntaxError) as error:
                    own[video.name] = str(error)
                    continue
                _keep(folder, video, found)
            else:
                progress.update(len(video.frames))
            own[video.name] = found
    return _totals([pair for part in everyone(own) for pair in part.items()], data, config)


def pictures(
    backbone: Backbone, data: DavisData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return a sheet per sequence, of the first few: predicted masks over frames, true ones below."""
    device = next(backbone.parameters()).device
    folder = _folder(data, config, device, cache)
    encoder = encoder_of(backbone)
    sheets = {}
    for video in data.videos[:_DRAWN]:
        try:
            found = _stored(folder, video)
            if found is None or folder is None:
                masks = list(masks_of(encoder, video, config.recipe(), device))
                found = _score(video, iter(masks), tqdm(disable=True))
            else:
                paths = (folder / video.name / f"{frame.stem}.png" for frame in video.frames)
                masks = [_mask(path) for path in paths]
            sheets[video.name] = _sheet(video, masks, found, marked(data.protocol, "davis", config))
        except (OSError, ValueError, SyntaxError):
            continue  # `run` has named it
    return sheets


def _mask(path: Path) -> np.ndarray:
    with open_image(path) as opened:
        return np.array(opened)


def _score(video: Video, predicted: Iterator[np.ndarray], progress: tqdm) -> list[Series]:
    """Values of every object's frames but the first and the last."""
    found: list[Series] = [([], [], [], []) for _ in video.objects]
    first = np.zeros(video.size, np.uint8)
    for number, said in enumerate(predicted):
        progress.update()
        if not number:
            first = said
        if number in (0, len(video.frames) - 1):
            continue
        truth = video.truth(number)
        for values, one in zip(found, video.objects):
            masks = truth == one, said == one, first == one
            values[0].append(region_similarity(masks[0], masks[1]))
            values[1].append(contour_accuracy(masks[0], masks[1]))
            values[2].append(region_similarity(masks[0], masks[2]))
            values[3].append(contour_accuracy(masks[0], masks[2]))
    return found


def _sheet(
    video: Video, masks: Sequence[np.ndarray], found: Sequence[Series], protocol: str
) -> Image.Image:
    last = len(masks) - 1
    chosen = sorted({round(i * last / (_COLUMNS - 1)) for i in range(_COLUMNS)})
    frames = [read_frame(video.frames[i], video.size).permute(1, 2, 0).numpy() for i in chosen]
    colours = label_colours(max(video.objects))
    truth = [video.truth(i) for i in chosen]
    said, true = beside_truth(frames, [masks[i] for i in chosen], truth, colours)
    j, f = (100 * float(np.mean([s[k] for s in found])) for k in (0, 1))
    names = ["given", *(f"frame {i}" for i in chosen[1:])]
    rows = [tiles_sheet(names, said, _TILE_PX), tiles_sheet(["truth"] * len(true), true, _TILE_PX)]
    title = f"{protocol}: {video.name}, {len(found)} object(s), J {j:.1f}, F {f:.1f}"
    return stacked(rows, title)


def _totals(
    scored: Sequence[tuple[str, list[Series] | str]], data: DavisData, config: Config
) -> dict[str, float]:
    """Scores over all objects; sequences with a reason in place of values are left out and named."""
    objects: list[Series] = []
    for name, found in sorted(scored):
        if isinstance(found, str):
            data.omitted.add(f"{config.split}: sequence not readable", f"{name}: {found}")
        else:
            objects += found
    require_some(objects, config.split, data.omitted)
    j, f, j_still, f_still = ([statistics(series) for series in each] for each in zip(*objects))
    chance = {f"chance/{name}": value for name, value in scores(j_still, f_still).items()}
    return scores(j, f) | chance


def _folder(
    data: DavisData, config: Config, device: torch.device, cache: FeatureCache | None
) -> Path | None:
    """Where the values and the masks of finished sequences are kept."""
    if cache is None:
        return None
    return cache.job(
        content_key(data.protocol, config.model_dump_json(), data.content, device.type)
    )


def _stored(folder: Path | None, video: Video) -> list[Series] | None:
    file = folder / f"{video.name}.json" if folder else None
    if file is None or not file.is_file():
        return None
    try:
        return plain_json.read(file)
    except (OSError, ValueError):
        return None  # computed again


def _keep(folder: Path | None, video: Video, found: Sequence[Series]) -> None:
    """Write the values of a sequence, after its masks: what has values is whole."""
    if folder is None:
        return
    shutil.rmtree(folder / video.name, ignore_errors=True)
    _aside(folder, video).replace(folder / video.name)
    aside = folder / f".{video.name}.{os.getpid()}.part"
    aside.write_text(json.dumps(found))
    aside.replace(folder / f"{video.name}.json")


def _kept(
    predicted: Iterator[np.ndarray], folder: Path | None, video: Video
) -> Iterator[np.ndarray]:
    """The predicted masks, each written as DAVIS's own tools read them: SEQUENCE/00000.png."""
    palette = label_colours(max(video.objects)).tobytes()
    for mask, frame in zip(predicted, video.frames, strict=True):
        if folder is not None:
            image = Image.fromarray(mask).convert("P")
            image.putpalette(palette)
            try:
                _aside(folder, video).mkdir(parents=True, exist_ok=True)
                image.save(_aside(folder, video) / f"{frame.stem}.png")
            except OSError as error:
                raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
        yield mask


def _aside(folder: Path, video: Video) -> Path:
    """Where masks go until their sequence is finished."""
    return folder / f".{video.name}.masks"
