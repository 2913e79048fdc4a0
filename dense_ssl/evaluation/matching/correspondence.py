"""Matches between two crops of one image, right where their boxes say so. No labels needed.

Every cell of one crop is matched with the most similar cell (cosine) of the other. The boxes tell where its
centre really lies; cells that the other crop does not show count nowhere. This is the measure behind
iBOT's pictures of correspondence, at the accuracy of a cell: `same-cell` is the share of
matches whose cell holds the true point, `one-cell` of those within one cell of it on either axis (boxes as
DenseCL's matching is judged in `make visualise KIND=correspondence`). A coarser grid makes both easier:
compare networks of the same stride, or the gain over chance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from dense_ssl.augment import Photometry
from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.crops import MultiCropBatch
from dense_ssl.evaluation.features import (
    FeatureCache,
    check_size,
    content_key,
    file_stamp,
    in_order,
    thinned,
)
from dense_ssl.evaluation.matching.cell_matches import TOLERANCES, counts, matched
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.loaders.batch import assemble
from dense_ssl.loaders.folder import cut_one
from dense_ssl.loaders.source import FolderSource, ShardSource, decode, open_path
from dense_ssl.views import CropPlan, ViewSpec, draw_epoch
from dense_ssl.visualise.__main__ import mutual_matches
from dense_ssl.visualise.samples import shown
from dense_ssl.visualise.sheets import correspondence_sheet, stacked

PROTOCOL = "correspondence/v1"
_VIEW = "pair"
_DRAWN = 4  # images in the picture


class Config(BaseConfig):
    """Settings of the protocol; sizes and scales are iBOT's."""

    size: Annotated[int, Field(ge=16)] = 224  # side of a crop in pixels
    scale: tuple[float, float] = (0.4, 1.0)  # share of the image's area
    photometric: str = "moco_v2"  # the colours of both crops; `none` leaves them
    max_images: Annotated[int, Field(ge=1)] | None = 1000  # evenly spaced
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0  # of boxes and colours

    def view(self) -> ViewSpec:
        """Return the two crops as the crop plan knows them.

        Raises:
            UserError: the scale is out of range.
        """
        try:
            return ViewSpec(
                name=_VIEW,
                count=2,
                size=self.size,
                scale=self.scale,
                photometric=self.photometric,
            )
        except ValueError as error:
            raise UserError(f"correspondence: {error}") from None


@dataclass(frozen=True, slots=True)
class CorrespondenceData:
    """Images of a folder or a shard set, and which of them are asked for."""

    protocol: str
    source: FolderSource | ShardSource
    index: np.ndarray  # int64 [n]
    content: str  # hash, other when a file or the choice of files is
    omitted: Omissions = field(compare=False)


def load(path: Path, config: Config) -> CorrespondenceData:
    """Return the images at `path`: a shard set, or all images below a folder.

    Raises:
        UserError: there is no image, or none is readable.
    """
    source = open_path(path)
    index = np.array(thinned(range(len(source.sizes)), config.max_images), np.int64)
    if isinstance(source, FolderSource):
        paths = source.paths
        content = [file_stamp(paths[i]) for i in index]
    else:
        content = [source.manifest.checksums[i].tobytes().hex() for i in index]
    return CorrespondenceData(PROTOCOL, source, index, content_key(*content), Omissions())


def run(
    backbone: Backbone,
    data: CorrespondenceData,
    config: Config,
    cache: FeatureCache | None = None,
) -> dict[str, float]:
    """Return `same-cell` and `one-cell` in percent, over the cells of both crops of all images.

    `chance/...` is of an answer that ignores the image: the cell at the same place of the other crop.

    Raises:
        UserError: no image can be read, or the crops of none overlap.
    """
    check_size((config.size,), backbone.stride)
    totals = torch.zeros(len(TOLERANCES) + 1, 2, dtype=torch.float64)
    device = next(backbone.parameters()).device
    count = len(data.index)
    with tqdm(total=count, desc="pairs", unit="img", leave=False, disable=None) as progress:
        for batch in _batches(data, config, device):
            with torch.inference_mode():
                crops = batch.views[_VIEW]
                totals += counts(backbone, crops).cpu()
            progress.update(len(batch.index))
    seen = float(totals[-1, 0])
    if not seen:
        reasons = "; ".join(data.omitted.lines()) or "no two crops overlap"
        raise UserError(f"correspondence: nothing to match: {reasons}")
    values = {name: 100 * float(totals[i, 0]) / seen for i, name in enumerate(TOLERANCES)}
    chance = {f"chance/{name}": 100 * float(totals[i, 1]) / seen for i, name in enumerate(values)}
    return values | chance


def _batches(
    data: CorrespondenceData, config: Config, device: torch.device
) -> Iterator[MultiCropBatch]:
    """Yield the crops of all readable images, normalised, on `device`; others are left out and named."""
    view = config.view()
    plan = draw_epoch((view,), data.source.sizes, config.seed, 0, data.index)
    photometry = Photometry((view,), config.seed).to(device)

    def cut(row: int) -> Tensor:
        try:
            picture = decode(data.source.read(int(data.index[row])))
        except (OSError, ValueError, SyntaxError) as error:
            data.omitted.add("image not readable", f"{_name(data, row)}: {error}")
            return torch.empty(0)
        crops = zip(plan.boxes[row], plan.flipped[row], strict=True)
        return torch.stack([cut_one(picture, box, bool(flip), view) for box, flip in crops])

    ready: list[tuple[int, Tensor]] = []
    for row, crops in enumerate(in_order(cut, range(len(data.index)), 2 * config.batch_size)):
        if crops.numel():
            ready.append((row, crops))
        if len(ready) == config.batch_size or (ready and row == len(data.index) - 1):
            yield _batch(data, view, plan, ready, photometry, device)
            ready = []


def _batch(
    data: CorrespondenceData,
    view: ViewSpec,
    plan: CropPlan,
    ready: Sequence[tuple[int, Tensor]],
    photometry: Photometry,
    device: torch.device,
) -> MultiCropBatch:
    rows = np.array([row for row, _ in ready])
    index = data.index[rows]
    images = torch.stack([crops for _, crops in ready], dim=1).to(device)  # [2, B, 3, S, S]
    part = CropPlan(plan.boxes[rows], plan.flipped[rows])
    sizes, labels = data.source.sizes[index], data.source.labels[index]
    return photometry(assemble((view,), {_VIEW: images}, part, sizes, index, labels), 0)


def _name(data: CorrespondenceData, row: int) -> str:
    number = int(data.index[row])
    return data.source.paths[number].name if isinstance(data.source, FolderSource) else f"{number}"


def pictures(
    backbone: Backbone,
    data: CorrespondenceData,
    config: Config,
    cache: FeatureCache | None = None,
) -> dict[str, Image.Image]:
    """Return a sheet of the first images: matches drawn between two crops, right ones green."""
    few = CorrespondenceData(
        data.protocol, data.source, data.index[:_DRAWN], data.content, Omissions()
    )
    rows = []
    for batch in _batches(few, config, next(backbone.parameters()).device):
        crops = batch.views[_VIEW]
        with torch.inference_mode():
            query, key = (backbone(crops.images[v]) for v in (0, 1))
            found = matched(query, key, crops.boxes, crops.flipped)
        for b in range(len(batch.index)):
            pairs, similarity, best = mutual_matches(query.dense[b].cpu(), key.dense[b].cpu())
            both = (shown(crops.images[0, b]), shown(crops.images[1, b]))
            strong = (similarity > 0.9).numpy()
            places = found.expected[b].flip(1).cpu().numpy()  # (row, column)
            drawn = (best.numpy(), pairs.numpy(), strong, places)
            rows.append(correspondence_sheet(both, (query.grid, key.grid), *drawn))
    named = marked(data.protocol, "correspondence", config)
    return {"matches": stacked(rows, f"{named}: matches between two crops")} if rows else {}
