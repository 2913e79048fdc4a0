"""FFCV as it comes: its public way to several views decodes the image once per view."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

from dataprep.manifest import Manifest
from dense_ssl.benches.task import MAX_FILES, Task
from dense_ssl.config import UserError


def batches(task: Task) -> Iterator[int]:
    """Yield the number of images of each batch."""
    path = Path(task.data, "ffcv", "images.beton")
    if not path.is_file():
        raise UserError("needs a shard set with FORMAT=ffcv or both")
    pipelines: dict[str, Any] = {
        f"view_{number}": PipelineSpec(
            "image",
            decoder=RandomResizedCropRGBImageDecoder(
                (crop.size, crop.size), crop.scale, crop.ratio
            ),
            transforms=[RandomHorizontalFlip(crop.flip), ToTensor(), ToTorchImage()],
        )
        for number, crop in enumerate(task.crops)
    }
    pipelines |= dict.fromkeys(("image", "label"))  # not wanted as they are
    loader = Loader(
        str(path),
        batch_size=task.batch,
        num_workers=task.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        indices=range(min(Manifest.load(Path(task.data)).num_images, MAX_FILES)),
        drop_last=True,
        pipelines=pipelines,
    )
    while True:
        for views in loader:
            yield len(views[0])
