"""Where encoded images come from: a shard set, or a plain folder of images."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image

from dataprep.manifest import DataError, Manifest, RecordReader, record_checksum
from dense_ssl.config import UserError
from dense_ssl.pictures import open_image

MANIFEST = "manifest.json"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
_TRANSPOSING = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange height and width

_log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Encoded images by index, with what is known of them before they are read."""

    sizes: np.ndarray  # int32 [n, 2], height and width in pixels, upright
    labels: np.ndarray  # int64 [n], -1 where there is none

    def read(self, index: int) -> bytes:
        """Return the encoded image.

        Raises:
            OSError, ValueError: it cannot be read, or its bytes are not those once written.
        """
        ...


class ShardSource:
    """The records of a complete shard set, checked against their checksums when they are read."""

    def __init__(self, root: Path) -> None:
        try:
            self.manifest = Manifest.load(root)
            self._reader = RecordReader(self.manifest)
        except DataError as error:
            raise UserError(str(error)) from None
        self.sizes = self.manifest.sizes
        self.labels = self.manifest.labels
        self._checked = np.zeros(self.manifest.num_images, np.bool_)

    def read(self, index: int) -> bytes:
        """Return the JPEG bytes of record `index`.

        Raises:
            OSError, ValueError: they cannot be read, or differ from those that were written.
        """
        encoded = self._reader.read(index)
        self.check(index, encoded)
        return encoded

    def check(self, index: int, encoded: bytes | memoryview) -> None:
        """Raise ValueError unless these are the bytes that were written.

        The checksum is computed when this process meets the record for the first time: a decoder
        does not notice every damaged byte, and once per run is next to nothing.
        """
        if self._checked[index]:
            return
        if record_checksum(encoded) != self.manifest.checksums[index].tobytes():
            raise ValueError("its bytes differ from those written at conversion")
        self._checked[index] = True


class FolderSource:
    """All images below a folder, in the order of their paths; sizes come from a scan of headers.

    Where every image lies in a sub-folder and there are at least two of those, the first folder level
    is the class: labels count the folders in alphabetical order. Files whose header cannot be read
    are left out and counted in the log.
    """

    def __init__(self, root: Path) -> None:
        candidates = sorted(_images_below(root), key=lambda name: name.split("/"))
        if not candidates:
            raise UserError(f"{root}: no image below this folder ({', '.join(sorted(SUFFIXES))})")
        with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
            sizes = list(pool.map(lambda name: upright_size(root / name), candidates))
        self._root = root
        # Text: every worker gets a copy, and a million Paths take half a gigabyte there.
        self._names = [name for name, size in zip(candidates, sizes) if size is not None]
        refused = [name for name, size in zip(candidates, sizes) if size is None]
        if refused:
            _log.warning(
                "%s: %d of %d files are left out, their headers are not readable (first: %s)",
                *(root, len(refused), len(candidates), root / refused[0]),
            )
        if not self._names:
            raise UserError(f"{root}: none of the {len(candidates)} images has a readable header")
        self.sizes = np.array([size for size in sizes if size is not None], np.int32)
        self.classes = _classes(self._names)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array(
            [numbers.get(name.split("/")[0], -1) for name in self._names], np.int64
        )

    @property
    def paths(self) -> list[Path]:
        """The image files, in order."""
        return [self._root / name for name in self._names]

    def read(self, index: int) -> bytes:
        """Return the bytes of image file `index`."""
        return (self._root / self._names[index]).read_bytes()


def open_path(path: Path) -> ShardSource | FolderSource:
    """Return the source at `path`: a shard set where there is a manifest, else a folder of images."""
    if not path.exists():
        raise UserError(f"data.path={path}: no such file or folder")
    if not path.is_dir():
        raise UserError(f"data.path={path}: not a folder; name a shard set or a folder of images")
    if (path / MANIFEST).exists():
        return ShardSource(path)
    return FolderSource(path)


def decode(encoded: bytes) -> Image.Image:
    """Return the image, upright and RGB.

    Raises:
        OSError, ValueError: not an image, or a truncated one.
    """
    with open_image(encoded) as image:
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        rgb = image.convert("RGB")
    method = _UPRIGHT.get(orientation)
    return rgb if method is None else rgb.transpose(method)


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _images_below(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root, followlinks=True):
        inside = os.path.relpath(folder, root)
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield name if inside == os.curdir else os.path.join(inside, name)  # noqa: PTH118


def upright_size(path: Path) -> tuple[int, int] | None:
    """Return (height, width) as stored in the header, None when it cannot be read."""
    try:
        with open_image(path) as image:
            width, height = image.size
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError):
        return None
    return (width, height) if orientation in _TRANSPOSING else (height, width)


def _classes(names: list[str]) -> list[str]:
    tops = sorted({name.split("/")[0] for name in names})
    return tops if len(tops) > 1 and all("/" in name for name in names) else []
