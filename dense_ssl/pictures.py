"""Images from elsewhere, opened by Pillow: bounded in pixels and time, and two kinds of error."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dataprep.encode import FORMATS, MAX_PIXELS, MAX_SCANNED, MAX_SCANS
from dataprep.jpeg import read_layout


@contextlib.contextmanager
def open_image(source: Path | bytes) -> Iterator[Image.Image]:
    """Open an image file, or its bytes; what is done with it inside is under the same promise.

    Raises:
        OSError, ValueError: it is no image, not whole, larger than MAX_PIXELS, or of so many scans that
            decoding it would take minutes. Pillow raises about ten other things at damaged files.
    """
    try:
        where = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(where, formats=FORMATS) as image:
            _check(image, source)
            yield image
    except (OSError, ValueError):
        raise
    except (MemoryError, Exception) as error:
        raise ValueError(f"not decodable: {str(error) or type(error).__name__}") from None


def _check(image: Image.Image, source: Path | bytes) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}")
    if image.format == "JPEG" and "progressive" in image.info:
        data = source if isinstance(source, bytes) else source.read_bytes()
        layout = read_layout(data)
        if layout is not None and layout.scans > min(MAX_SCANS, MAX_SCANNED / pixels):
            raise ValueError(f"{layout.scans} scans of {image.width} x {image.height} pixels")
