"""DALI as it comes: its webdataset reader, one decode, its own random crops, linear or cubic."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nvidia.dali.fn
import torch
from nvidia.dali import types
from nvidia.dali.pipeline import Pipeline

from dense_ssl.benches.task import Task
from dense_ssl.config import UserError

fn: Any = nvidia.dali.fn  # its type stubs tell single batches and lists apart where it does not

FILTERS = {
    "bilinear": types.DALIInterpType.INTERP_LINEAR,
    "bicubic": types.DALIInterpType.INTERP_CUBIC,
}


def batches(task: Task) -> Iterator[int]:
    """Yield the number of images of each batch."""
    tars = sorted(Path(task.data, "dali").glob("*.tar"))
    if not tars:
        raise UserError("needs a shard set with FORMAT=dali or both")
    on_gpu = torch.device(task.device).type == "cuda"
    pipeline = Pipeline(
        batch_size=task.batch, num_threads=task.workers, device_id=0 if on_gpu else None, seed=0
    )
    with pipeline:
        encoded = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg"],
            random_shuffle=True,
            name="reader",
        )
        shape = fn.peek_image_shape(encoded)
        image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu")
        views = []
        for crop in task.crops:
            start, extent = fn.random_crop_generator(
                shape, random_area=list(crop.scale), random_aspect_ratio=list(crop.ratio)
            )
            start, extent = (fn.cast(x, dtype=types.DALIDataType.FLOAT) for x in (start, extent))
            view = fn.resize(
                image,
                roi_start=start,
                roi_end=start + extent,
                size=[crop.size, crop.size],
                interp_type=FILTERS[task.filter],
            )
            flip = fn.random.coin_flip(probability=crop.flip)
            views.append(fn.flip(view, horizontal=flip))
        pipeline.set_outputs(*views)
    pipeline.build()
    while True:
        tensors = [torch.from_dlpack(view.as_tensor()) for view in pipeline.run()]  # [B, S, S, 3]
        yield len(tensors[0])
