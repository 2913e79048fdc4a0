"""DALI executes the plan: encoded bytes and boxes in, one decode per image, every crop out.

Decoding and resizing happen on the GPU where the batches are wanted on one, on the CPU otherwise.
A region whose start exceeds its end comes out mirrored, so a flip costs nothing.

Pixels are not those of the other loaders to the bit: DALI's triangular and cubic filters differ from
Pillow's by 0.15 of 255 levels on average (12 at most, seen with the cubic one), and a GPU decodes JPEGs
with its own arithmetic. Boxes, flips and the order of records are the same.
"""

import io
import logging
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from PIL import ExifTags, Image
from torch import Tensor

from dense_ssl.crops import MultiCropBatch
from dense_ssl.loaders.batch import assemble, check_recipe, cut_views
from dense_ssl.loaders.order import Batches
from dense_ssl.loaders.replace import Replacements
from dense_ssl.loaders.source import ImageSource, ShardSource, decode
from dense_ssl.views import CropPlan, ViewSpec, draw_epoch, positions

# DALI has no name of its own for "triangular": it is the linear filter with antialiasing.
FILTERS = {
    "bilinear": types.DALIInterpType.INTERP_LINEAR,
    "bicubic": types.DALIInterpType.INTERP_CUBIC,
}
QUEUE_DEPTH = 2  # batches DALI works on ahead of the one returned

_log = logging.getLogger(__name__)


class DaliLoader:
    """Batches from any source, on `device`.

    Args:
        source: of encoded images.
        views: the recipe.
        order: of this rank.
        device: a GPU, where decoding and resizing happen there, or the CPU.
        workers: threads of DALI, and threads that read.
        max_replaced: share of records that may be unreadable.
        hw_decoder_load: share of the JPEGs given to the hardware decoder of GPUs that have one.
    """

    def __init__(
        self,
        source: ImageSource,
        views: Sequence[ViewSpec],
        order: Batches,
        device: torch.device,
        *,
        workers: int,
        max_replaced: float,
        hw_decoder_load: float = 0.65,
    ) -> None:
        check_recipe(views, order.micro_batch)
        self.steps_per_epoch = order.steps_per_epoch
        self._source, self._views, self._order, self._device = source, tuple(views), order, device
        self._workers = workers
        self._hw_decoder_load = hw_decoder_load
        self._replacements = Replacements(len(source.sizes), max_replaced)
        self._reader = _Reader(source, self._replacements)
        self._feed: _Feed | None = None  # of the running epoch
        self._idle: Pipeline | None = None  # after a whole epoch: ready for the next one
        self._live: Generator[MultiCropBatch] | None = None

    @property
    def replaced(self) -> dict[int, str]:
        """Records that could not be shown, with the reason."""
        return self._replacements.reasons

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[MultiCropBatch]:
        """Yield the micro-batches of one epoch from `start_step` on; ends the epoch before it."""
        if self._live is not None:
            self._live.close()
        self._live = self._batches(epoch, start_step)
        return self._live

    def close(self) -> None:
        """End the running epoch, and DALI's threads with its memory."""
        if self._live is not None:
            self._live.close()
        self._live = self._idle = self._feed = None

    def _batches(self, epoch: int, start_step: int) -> Generator[MultiCropBatch]:
        plan = draw_epoch(self._views, self._source.sizes, self._order.seed, epoch)
        order = self._order.batches(epoch, start_step)
        with ThreadPoolExecutor(self._workers) as pool:
            feed = self._feed = _Feed(self._reader, pool, plan, order)
            pipeline, self._idle = self._idle or self._pipeline(), None
            pipeline.reset()
            for done in range(len(order)):
                try:
                    images = self._run(pipeline)
                except RuntimeError as error:
                    self._reader.distrust(np.concatenate(feed.shown), error)
                    feed = self._feed = _Feed(self._reader, pool, plan, order[done:])
                    pipeline = self._pipeline()
                    images = self._run(pipeline)
                index = feed.shown.popleft()
                yield assemble(
                    self._views,
                    images,
                    CropPlan(plan.boxes[index], plan.flipped[index]),
                    self._source.sizes[index],
                    index,
                    self._source.labels[index],
                )
        self._idle = pipeline

    def _next(self) -> "tuple[list[np.ndarray], np.ndarray, np.ndarray]":
        """Return what DALI asks for, or end its epoch by StopIteration."""
        assert self._feed is not None
        return self._feed.next()

    def _pipeline(self) -> Pipeline:
        """Return a pipeline whose outputs are all crops, uint8 [B, S, S, 3] each, in recipe order."""
        device_id, decoder = None, dict[str, Any](device="cpu")
        if self._device.type == "cuda":
            index = self._device.index
            device_id = torch.cuda.current_device() if index is None else index
            decoder = dict[str, Any](
                device="mixed",
                jpeg_fancy_upsampling=True,  # of colour, as libjpeg does it on a CPU
                hw_decoder_load=self._hw_decoder_load,
            )
        pipeline = Pipeline(
            batch_size=self._order.micro_batch,
            num_threads=self._workers,
            device_id=device_id,
            prefetch_queue_depth=QUEUE_DEPTH,
        )
        where = positions(self._views)
        with pipeline:
            encoded, starts, ends = fn.external_source(source=self._next, num_outputs=3, batch=True)
            # Images that are not upright reach DALI upright, see _Reader.
            decoded = fn.decoders.image(
                encoded, output_type=types.DALIImageType.RGB, adjust_orientation=False, **decoder
            )
            crops = [
                fn.resize(
                    decoded,
                    roi_start=starts[v],
                    roi_end=ends[v],
                    size=[view.size, view.size],
                    interp_type=FILTERS[view.filter],
                    antialias=True,
                )
                for view in cut_views(self._views)
                for v in range(where[view.name].start, where[view.name].stop)
            ]
            pipeline.set_outputs(*crops)
        pipeline.build()
        return pipeline

    def _run(self, pipeline: Pipeline) -> dict[str, Tensor]:
        """Return the next batch, uint8 [V, B, 3, S, S] by view, in memory of its own.

        On a GPU everything is queued on the current stream: DALI hands its outputs over on it, and
        gets their memory back behind the copies made here.
        """
        on_gpu = self._device.type == "cuda"
        outputs = iter(pipeline.run(torch.cuda.current_stream(self._device) if on_gpu else None))
        images: dict[str, Tensor] = {}
        for view in cut_views(self._views):
            crops = [torch.from_dlpack(next(outputs).as_tensor()) for _ in range(view.count)]
            shape = (view.count, len(crops[0]), 3, view.size, view.size)
            images[view.name] = torch.empty(shape, dtype=torch.uint8, device=self._device)
            for target, crop in zip(images[view.name], crops, strict=True):
                target.copy_(crop.permute(0, 3, 1, 2))
        return images


class _Reader:
    """Bytes that DALI decodes to what every other loader shows, or the bytes of a neighbour.

    DALI stops at the first broken image and knows no EXIF-free, alpha-free, CMYK-free RGB as Pillow
    makes it. So it is given plain JPEGs only, proved by Pillow when they are met for the first time
    (those of a shard set were proved at conversion); anything else goes through Pillow and reaches
    DALI as an uncompressed bitmap.
    """

    def __init__(self, source: ImageSource, replacements: Replacements) -> None:
        self._source = source
        self._replacements = replacements
        self._as_is = np.full(len(source.sizes), isinstance(source, ShardSource))
        self._distrusted: set[int] = set()

    def read(
        self, wanted: np.ndarray, pool: ThreadPoolExecutor
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the records to show for those wanted, int64 [B], and their encoded images."""
        index, encoded = wanted.copy(), []
        for row, result in enumerate(pool.map(self._try, wanted.tolist())):
            if isinstance(result, str):
                self._replacements.note(int(wanted[row]), result)
                index[row], result = self._replacements.show(int(wanted[row]), self._encoded)
            encoded.append(np.frombuffer(result, np.uint8))
        return index, encoded

    def distrust(self, records: np.ndarray, error: RuntimeError) -> None:
        """Give these records to DALI as bitmaps from now on.

        Raises:
            RuntimeError: `error`, where they were bitmaps already.
        """
        suspects = set(records.tolist()) - self._distrusted
        if not suspects:
            raise error
        _log.warning(
            "DALI failed on one of %d records, Pillow decodes them from now on: %s",
            *(len(suspects), " ".join(str(error).split())[:300]),
        )
        self._distrusted |= suspects
        self._as_is[list(suspects)] = False

    def _try(self, index: int) -> bytes | str:
        try:
            return self._encoded(index)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    def _encoded(self, index: int) -> bytes:
        """Return what DALI gets for a record.

        Raises:
            OSError, ValueError: the record cannot be shown.
        """
        encoded = self._source.read(index)
        if self._as_is[index]:
            return encoded
        image = decode(encoded)
        height, width = self._source.sizes[index]
        if image.size != (width, height):
            raise ValueError(f"{image.width} x {image.height} px instead of {width} x {height}")
        if index not in self._distrusted and _is_plain_jpeg(encoded):
            self._as_is[index] = True
            return encoded
        bitmap = io.BytesIO()
        image.save(bitmap, "BMP")
        return bitmap.getvalue()


class _Feed:
    """What goes into DALI, batch by batch: encoded images, and where their crops start and end."""

    def __init__(
        self,
        reader: _Reader,
        pool: ThreadPoolExecutor,
        plan: CropPlan,
        order: Sequence[np.ndarray],
    ) -> None:
        self.shown: deque[np.ndarray] = deque()  # records of the batches not returned yet, [B] each
        self._reader, self._pool, self._plan = reader, pool, plan
        self._order = iter(order)

    def next(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return the images, and the corners (y, x) of all regions, float32 [B, V, 2] twice."""
        index, encoded = self._reader.read(next(self._order), self._pool)
        self.shown.append(index)
        x0, y0, x1, y1 = np.moveaxis(self._plan.boxes[index].astype(np.float32), -1, 0)
        flipped = self._plan.flipped[index]
        starts = np.stack([y0, np.where(flipped, x1, x0)], axis=-1)
        ends = np.stack([y1, np.where(flipped, x0, x1)], axis=-1)
        return encoded, starts, ends


def _is_plain_jpeg(encoded: bytes) -> bool:
    """Return whether every decoder makes the same upright RGB image of these bytes."""
    with Image.open(io.BytesIO(encoded)) as image:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image.format == "JPEG" and image.mode in ("L", "RGB") and upright
