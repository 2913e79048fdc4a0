"""One image file to one record: decoded once, proved whole, upright, sRGB, and stored as JPEG.

What becomes of the odd ones: EXIF orientation is applied; grey, palette and 1-bit images become RGB;
16-bit and float ones are scaled to 8 bits; transparency is laid over white; CMYK and every colour
profile are brought to sRGB; of several frames the first is taken. Larger images are shrunk with
Lanczos until the shorter side is `size`; nothing is enlarged.

A JPEG is decoded by simplejpeg where it is installed: the same pixels as Pillow's, bit for bit, but
it also reports the damage that libjpeg only warns of and Pillow never mentions.
"""

import io
import re
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageCms, UnidentifiedImageError, features

from dataprep.jpeg import read_layout

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # none runs a program
MAX_PIXELS = 120_000_000  # read from the header, before any memory is asked for
MAX_SIDE = 65_500  # libjpeg's limit
MAX_SCANS = 100  # of a progressive JPEG: about ten are usual, each costs a pass over the image,
MAX_SCANNED = 3_000_000_000  # so this many pixels in all scans together
DRAFT_PIXELS = 16_000_000  # JPEGs above are shrunk by libjpeg while decoding, to twice the size
SRGB = ImageCms.createProfile("sRGB")
SRGB_TOLERANCE = 3  # of 255; a profile that moves no colour further is taken for sRGB itself
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # EXIF tag
_SIXTEEN_TO_EIGHT = np.rint(np.arange(65536) / 257).astype(np.uint8)


class BadImage(ValueError):
    """An image that must not enter a shard; the message is the reason, `kind: details`."""


@dataclass(frozen=True)
class EncodeOptions:
    """What decides about the stored pixels."""

    size: int = 256  # shorter side in pixels; 0 keeps the size, and clean JPEGs byte for byte
    quality: int = 90

    def as_dict(self) -> dict[str, int]:
        """Return the options for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """One record."""

    jpeg: bytes
    height: int
    width: int


def encode(data: bytes, options: EncodeOptions) -> Encoded:
    """Return an image file as a record.

    Raises:
        BadImage: it is not an image, not whole, or too large.
    """
    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")  # Pillow's remarks on broken metadata
            return _encode(data, options, remarks)
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError as error:
        (pixels,) = re.findall(r"\d+", str(error))[:1] or ("0",)
        raise BadImage(_too_many(f"{int(pixels):,}")) from None
    except MemoryError:
        raise BadImage("too many pixels: not enough memory to decode it") from None
    except BadImage:
        raise
    except (
        Exception
    ) as error:  # decoders of hostile files raise anything, from KeyError to zlib.error
        message = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(_kind(message)) from None


def check_decodes(jpeg: bytes) -> tuple[int, int]:
    """Return (height, width) of a stored record after decoding all of it.

    Raises:
        BadImage: it does not decode to RGB.
    """
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            pixels = _decode_jpeg(jpeg, image, 1)
    except Exception as error:
        raise BadImage(_kind(" ".join(str(error).split()))) from None
    if pixels.mode != "RGB":
        raise BadImage(f"mode {pixels.mode} where RGB is expected")
    return pixels.height, pixels.width


def versions() -> dict[str, str | None]:
    """Return the versions of everything that decides about the stored bytes."""
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "littlecms2": features.version("littlecms2"),
        "numpy": np.__version__,
        "simplejpeg": simplejpeg.__version__ if simplejpeg else None,
    }


def _encode(data: bytes, options: EncodeOptions, remarks: list[Any]) -> Encoded:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(_too_many(f"{width} x {height}"))
        layout = None
        if image.format in ("JPEG", "MPO"):  # MPO: several JPEGs in one file
            layout = read_layout(data)
            if layout and layout.scans > min(MAX_SCANS, MAX_SCANNED / (width * height)):
                raise BadImage(f"too many scans: {layout.scans} of {width} x {height} pixels")
            pixels = _decode_jpeg(data, image, _draft_factor(image.size, options.size))
        else:
            image.load()
            pixels = image
        orientation = _orientation(image)
        profile = image.info.get("icc_profile")
        upright = orientation == 1 and not remarks
        if options.size == 0 and layout and layout.plain and upright and _is_srgb(profile):
            return Encoded(data[: layout.end], height, width)
        pixels = _shrink(_flatten(pixels), options.size)
        pixels = _to_srgb(pixels, profile)
    if orientation in TRANSPOSED:
        pixels = pixels.transpose(TRANSPOSED[orientation])
    if max(pixels.size) > MAX_SIDE:
        raise BadImage(f"too long: {max(pixels.size)} pixels, a JPEG ends at {MAX_SIDE}")
    pixels.info = {}  # a comment would be carried over
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=options.quality, subsampling="4:2:0")
    return Encoded(file.getvalue(), pixels.height, pixels.width)


def _decode_jpeg(data: bytes, image: Image.Image, factor: int) -> Image.Image:
    """Return the pixels of an opened JPEG at 1/factor of its size; damaged data raises."""
    colours = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[image.mode]
    width, height = (-(-side // factor) for side in image.size)
    if simplejpeg is not None:
        try:
            array = simplejpeg.decode_jpeg(
                data, colours, min_height=height, min_width=width, min_factor=factor
            )
        except ValueError as error:
            # TurboJPEG knows the usual chroma samplings only; libjpeg, below, knows all
            if "subsampling" not in str(error):
                raise
        else:
            if colours != "CMYK":  # whether its values are inverted, Pillow knows
                return Image.fromarray(array[:, :, 0] if colours == "GRAY" else array)
    if factor > 1:
        image.draft(image.mode, (width, height))
    image.load()
    return image


def _draft_factor(size: tuple[int, int], short_side: int) -> int:
    """Return how much libjpeg shrinks while decoding: 1 but for very large images."""
    if short_side == 0 or size[0] * size[1] <= DRAFT_PIXELS:
        return 1
    return next((f for f in (8, 4, 2) if min(size) // f >= 2 * short_side), 1)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none and 0 where it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF raises anything, and says nothing about the pixels
        return 0


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image as L, RGB or CMYK of 8 bits, transparency laid over white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image)
    if image.has_transparency_data or image.mode in ("RGBa", "La"):
        if image.mode in ("RGBa", "La"):
            image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 bits (0..65535) or of floats (0..1 or 0..255) as 8-bit grey."""
    values = np.asarray(image)
    low, high = values.min(), values.max()  # not a number, if any value is not
    if image.mode == "F":
        limit = 1.0 if high <= 1 else 255.0
    else:
        limit = 65535
    if not (low >= 0 and high <= limit):
        raise BadImage(f"odd values: {low:g} to {high:g}, no brightness known for them")
    if image.mode == "F":
        return Image.fromarray(np.rint(values * np.float32(255 / limit)).astype(np.uint8))
    return Image.fromarray(_SIXTEEN_TO_EIGHT[values])


def _shrink(image: Image.Image, short_side: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    if short_side == 0 or short <= short_side:
        return image
    target = [max(1, (2 * side * short_side + short) // (2 * short)) for side in (width, height)]
    return image.resize((target[0], target[1]), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return L, RGB or CMYK as RGB in sRGB; a profile that is broken or not of this image is left."""
    if not profile or (image.mode != "CMYK" and _is_srgb(profile)):
        return image.convert("RGB")
    space = _colour_space(profile)
    if space == "RGB" and image.mode in ("L", "RGB"):
        image = image.convert("RGB")
    transform = _transform(profile, image.mode)
    if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) != image.mode or transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=32)
def _is_srgb(profile: bytes | None) -> bool:
    """Return whether a profile leaves the colours of a coarse grid where they are."""
    if not profile:
        return True
    transform = _transform(profile, "RGB") if _colour_space(profile) == "RGB" else None
    if transform is None:
        return False
    steps = np.arange(0, 256, 51, dtype=np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    moved = ImageCms.applyTransform(Image.fromarray(grid), transform)
    difference = np.asarray(moved).astype(np.int64) - grid
    return bool(np.abs(difference).max() <= SRGB_TOLERANCE)


def _colour_space(profile: bytes) -> str:
    """Return the signature in a profile's header: "RGB", "GRAY", "CMYK" or another."""
    return profile[16:20].decode("latin-1").strip()


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> Any:
    """Return the transform from a profile to sRGB, None where the profile does not give one."""
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            SRGB,
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _too_many(pixels: str) -> str:
    return f"too many pixels: {pixels}, the limit is {MAX_PIXELS // 10**6} million"


def _kind(message: str) -> str:
    """Return a decoder's message as `kind: details`."""
    lowered = message.lower()
    cut = ("truncated", "premature end of jpeg", "unexpected end", "not enough data", "eof")
    return ("truncated: " if any(word in lowered for word in cut) else "corrupt: ") + message
