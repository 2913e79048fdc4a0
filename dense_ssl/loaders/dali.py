"""DALI executes the plan: encoded bytes and boxes in, one decode per image, every crop out.

Decoding and resizing happen on the GPU where the batches are wanted on one, on the CPU otherwise.
A region whose start exceeds its end comes out mirrored, so a flip costs nothing. Where the device cutter is
asked for, DALI decodes and that is all.

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
from PIL import ExifTags
from torch import Tensor

from dense_ssl.loaders.batch import cut_views
from dense_ssl.loaders.decoded import Decoded
from dense_ssl.loaders.loader import Pixels, Reading
from dense_ssl.loaders.replace import Replacements
from dense_ssl.loaders.source import ImageSource, ShardSource, decode
from dense_ssl.pictures import open_image
from dense_ssl.views import CropPlan, positions

# DALI has no name of its own for "triangular": it is the linear filter with antialiasing.
FILTERS = {
    "bilinear": types.DALIInterpType.INTERP_LINEAR,
    "bicubic": types.DALIInterpType.INTERP_CUBIC,
}
HARDWARE_SHARE = 0.65  # of the JPEGs, given to the hardware decoder of GPUs that have one
QUEUE_DEPTH = 2  # batches DALI works on ahead of the one returned

_log = logging.getLogger(__name__)


class DaliReader:
    """Reads any source, to `reading.device`: decoded there if it is a GPU."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._records = _Records(reading.source, reading.replacements)
        self._feed: _Feed | None = None  # of the running epoch
        self._idle: Pipeline | None = None  # after a whole epoch: ready for the next one

    def close(self) -> None:
        """End DALI's threads and give back its memory."""
        self._idle = self._feed = None

    def read(
        self, plan: CropPlan, order: Sequence[np.ndarray]
    ) -> Generator[tuple[np.ndarray, Pixels]]:
        """Yield the records shown, int64 [B], and their pixels, batch by batch."""
        with ThreadPoolExecutor(self._reading.workers) as pool:
            feed = self._feed = _Feed(self._records, pool, plan, order)
            pipeline, self._idle = self._idle or self._pipeline(), None
            pipeline.reset()
            for done in range(len(order)):
                try:
                    outputs = self._run(pipeline)
                except RuntimeError as error:
                    self._records.distrust(np.concatenate(feed.shown), error)
                    feed = self._feed = _Feed(self._records, pool, plan, order[done:])
                    pipeline = self._pipeline()
                    outputs = self._run(pipeline)
                index = feed.shown.popleft()
                if self._reading.cut == "host":
                    yield index, self._crops(outputs)
                else:
                    yield index, self._decoded(index, outputs[0])
        self._idle = pipeline

    def _images(self) -> list[np.ndarray]:
        """Return what DALI asks for where it only decodes, or end its epoch by StopIteration."""
        assert self._feed is not None
        return self._feed.next()[1]

    def _images_and_regions(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return the same, and the corners (y, x) of all regions, float32 [B, V, 2] twice."""
        assert self._feed is not None
        index, encoded = self._feed.next()
        return encoded, *self._feed.corners(index)

    def _pipeline(self) -> Pipeline:
        """Return a pipeline whose outputs are all crops, uint8 [B, S, S, 3] each, in recipe order.

        Where the device cuts, the one output is the decoded images, uint8 [H, W, 3].
        """
        views, device = self._reading.views, self._reading.device
        device_id, decoder = None, dict[str, Any](device="cpu")
        if device.type == "cuda":
            device_id = torch.cuda.current_device() if device.index is None else device.index
            decoder = dict[str, Any](
                device="mixed",
                jpeg_fancy_upsampling=True,  # of colour, as libjpeg does it on a CPU
                hw_decoder_load=HARDWARE_SHARE,
            )
        pipeline = Pipeline(
            batch_size=self._reading.micro_batch,
            num_threads=self._reading.workers,
            device_id=device_id,
            prefetch_queue_depth=QUEUE_DEPTH,
        )
        where = positions(views)
        with pipeline:
            starts = ends = None
            if self._reading.cut == "host":
                source = {"source": self._images_and_regions, "num_outputs": 3}
                encoded, starts, ends = fn.external_source(**source, batch=True)
            else:
                encoded = fn.external_source(source=self._images, batch=True)
            # Images that are not upright reach DALI upright, see _Records.
            decoded = fn.decoders.image(
                encoded, output_type=types.DALIImageType.RGB, adjust_orientation=False, **decoder
            )
            if starts is None or ends is None:
                pipeline.set_outputs(decoded)
            else:
                crops = [
                    fn.resize(
                        decoded,
                        roi_start=starts[v],
                        roi_end=ends[v],
                        size=[view.size, view.size],
                        interp_type=FILTERS[view.filter],
                        antialias=True,
                    )
                    for view in cut_views(views)
                    for v in range(where[view.name].start, where[view.name].stop)
                ]
                pipeline.set_outputs(*crops)
        pipeline.build()
        return pipeline

    def _run(self, pipeline: Pipeline) -> Sequence[Any]:
        """Return DALI's outputs for the next batch, good until it is run again.

        On a GPU everything is queued on the current stream: DALI hands its outputs over on it, and
        gets their memory back behind the copies made here.
        """
        device = self._reading.device
        return pipeline.run(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    def _crops(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """Return the crops, uint8 [V, B, 3, S, S] by view, in memory of their own."""
        left = iter(outputs)
        images: dict[str, Tensor] = {}
        for view in cut_views(self._reading.views):
            crops = [torch.from_dlpack(next(left).as_tensor()) for _ in range(view.count)]
            shape = (view.count, len(crops[0]), 3, view.size, view.size)
            images[view.name] = torch.empty(shape, dtype=torch.uint8, device=self._reading.device)
            for target, crop in zip(images[view.name], crops, strict=True):
                target.copy_(crop.permute(0, 3, 1, 2))
        return images

    def _decoded(self, index: np.ndarray, output: Any) -> Decoded:
        """Return the decoded images of the records shown, in memory of their own."""
        reading = self._reading
        images = [torch.from_dlpack(output[row]) for row in range(len(index))]
        decoded = Decoded(reading.views, reading.source.sizes[index], reading.device)
        torch.cat([image.flatten() for image in images], out=decoded.pixels)
        return decoded


class _Records:
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
    """What goes into DALI, batch by batch."""

    def __init__(
        self,
        records: _Records,
        pool: ThreadPoolExecutor,
        plan: CropPlan,
        order: Sequence[np.ndarray],
    ) -> None:
        self.shown: deque[np.ndarray] = deque()  # records of the batches not returned yet, [B] each
        self._records, self._pool, self._plan = records, pool, plan
        self._order = iter(order)

    def next(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the records of the next batch, int64 [B], and their encoded images."""
        index, encoded = self._records.read(next(self._order), self._pool)
        self.shown.append(index)
        return index, encoded

    def corners(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where all regions of these records start and end, (y, x), float32 [B, V, 2] each."""
        x0, y0, x1, y1 = np.moveaxis(self._plan.boxes[index].astype(np.float32), -1, 0)
        flipped = self._plan.flipped[index]
        starts = np.stack([y0, np.where(flipped, x1, x0)], axis=-1)
        ends = np.stack([y1, np.where(flipped, x0, x1)], axis=-1)
        return starts, ends


def _is_plain_jpeg(encoded: bytes) -> bool:
    """Return whether every decoder makes the same upright RGB image of these bytes."""
    with open_image(encoded) as image:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image.format == "JPEG" and image.mode in ("L", "RGB") and upright
