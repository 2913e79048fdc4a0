"""The floor: libjpeg-turbo decodes every image once, and nothing else happens."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simplejpeg import decode_jpeg

from dense_ssl.benches.task import Task


def batches(task: Task) -> Iterator[int]:
    """Yield the number of images of each batch."""
    encoded = [path.read_bytes() for path in sorted(Path(task.files).glob("*/*"))]
    with ThreadPoolExecutor(task.workers) as pool:
        for batch in task.order(len(encoded)).tolist():
            for _ in pool.map(lambda index: decode_jpeg(encoded[index]), batch):
                pass
            yield len(batch)
