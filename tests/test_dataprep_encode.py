"""One image file to one record: what the pixels become, and what is refused."""

import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from dataprep.encode import MAX_SCANS, BadImage, EncodeOptions, check_decodes, encode
from dataprep.jpeg import read_layout
from dataprep.synthetic import coordinate_image, random_image

AS_IS = EncodeOptions(size=0, quality=95)


def save(image, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(record) -> np.ndarray:
    with Image.open(io.BytesIO(record.jpeg)) as image:
        assert image.mode == "RGB"
        assert image.size == (record.width, record.height)
        assert "icc_profile" not in image.info
        return np.asarray(image).astype(np.float64)


def test_shrinks_the_shorter_side_and_never_enlarges():
    picture = Image.fromarray(random_image(300, 401, 0))
    record = encode(save(picture, quality=95), EncodeOptions(size=100, quality=95))
    assert (record.height, record.width) == (100, 134)
    reference = picture.resize((134, 100), Image.Resampling.LANCZOS)
    with Image.open(io.BytesIO(save(reference, quality=95))) as stored:
        assert np.abs(pixels(record) - np.asarray(stored)).mean() < 1.5
    small = encode(save(Image.fromarray(random_image(60, 90, 0))), EncodeOptions(size=100))
    assert (small.height, small.width) == (60, 90)


def test_size_zero_keeps_clean_jpegs_byte_for_byte():
    picture = Image.fromarray(random_image(64, 96, 1))
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}):
        data = save(picture, **options)
        assert encode(data, AS_IS).jpeg == data
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010E] = "a text"
    data = save(picture, exif=exif.tobytes())
    assert encode(data, AS_IS).jpeg == data
    assert encode(data + b"rubbish behind the end", AS_IS).jpeg == data


def test_size_zero_encodes_what_is_not_clean():
    picture = Image.fromarray(random_image(64, 96, 1))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for data in (
        save(picture, exif=rotated.tobytes()),
        save(picture.convert("L")),
        save(picture.convert("CMYK")),
        save(picture, icc_profile=linear),
        save(picture, "PNG"),
        save(picture, keep_rgb=True),
    ):
        record = encode(data, AS_IS)
        assert record.jpeg != data
        layout = read_layout(record.jpeg)
        assert layout is not None
        assert layout.plain
        assert layout.end == len(record.jpeg)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(kind, orientation):
    upright = Image.fromarray(coordinate_image(80, 120))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse Transpose of each
    stored = upright if orientation == 1 else upright.transpose(back[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    record = encode(save(stored, kind, exif=exif.tobytes(), **options), AS_IS)
    assert (record.height, record.width) == (80, 120)
    assert np.abs(pixels(record) - coordinate_image(80, 120)).mean() < 3


def test_colour_modes_become_rgb():
    grey = np.asarray(Image.fromarray(random_image(64, 96, 2)).convert("L"))
    three = np.repeat(grey[:, :, None], 3, axis=2).astype(np.float64)
    same = {
        "grey JPEG": save(Image.fromarray(grey), quality=95),
        "grey PNG": save(Image.fromarray(grey), "PNG"),
        "16-bit PNG": save(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "float TIFF, 0..255": save(Image.fromarray(grey.astype(np.float32)), "TIFF"),
        "float TIFF, 0..1": save(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "32-bit TIFF": save(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"),
        "palette": save(Image.fromarray(grey).convert("P"), "PNG"),
        "GIF": save(Image.fromarray(grey), "GIF"),
        "CMYK": save(Image.fromarray(three.astype(np.uint8)).convert("CMYK"), quality=95),
    }
    for name, data in same.items():
        assert np.abs(pixels(encode(data, AS_IS)) - three).mean() < 3, name
    one_bit = Image.fromarray(grey).convert("1")
    got = pixels(encode(save(one_bit, "PNG"), EncodeOptions(size=0, quality=100)))
    assert np.abs(got[:, :, 1] - 255.0 * np.asarray(one_bit)).mean() < 10


def test_transparency_lies_over_white():
    colours = np.zeros((40, 60, 4), np.uint8)
    colours[:, 30:, 3] = 255  # left: black but invisible, right: black
    for image, kind in (
        (Image.fromarray(colours), "PNG"),
        (Image.fromarray(colours), "WEBP"),
        (Image.fromarray(colours).convert("LA"), "PNG"),
    ):
        got = pixels(encode(save(image, kind), AS_IS))
        assert got[:, :24].mean() > 250
        assert got[:, 36:].mean() < 5


def test_icc_profiles_are_applied():
    picture = coordinate_image(64, 96)
    # sRGB's primaries, swapped: a profile under which red is stored as blue
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(srgb[128 + 4 + 12 * i :][:4]): 128 + 4 + 12 * i for i in range(srgb[131])}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    srgb[red + 4 : red + 12], srgb[blue + 4 : blue + 12] = (
        srgb[blue + 4 : blue + 12],
        srgb[red + 4 : red + 12],
    )
    data = save(Image.fromarray(picture), "PNG", icc_profile=bytes(srgb))
    assert np.abs(pixels(encode(data, AS_IS)) - picture[:, :, ::-1]).mean() < 3


def test_srgb_and_broken_profiles_leave_the_pixels():
    picture = coordinate_image(64, 96)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    clean = save(Image.fromarray(picture), icc_profile=srgb)
    assert encode(clean, AS_IS).jpeg == clean
    broken = save(Image.fromarray(picture), "PNG", icc_profile=b"not a profile" * 20)
    assert np.abs(pixels(encode(broken, AS_IS)) - picture).mean() < 3


def test_very_large_jpegs_are_shrunk_while_decoding():
    big = Image.fromarray(coordinate_image(60, 84)).resize((5200, 3700))
    record = encode(save(big, quality=80), EncodeOptions(size=64, quality=95))
    assert (record.height, record.width) == (64, 90)
    assert np.abs(pixels(record) - coordinate_image(64, 90)).mean() < 4


def damaged() -> dict[str, tuple[bytes, str]]:
    picture = Image.fromarray(random_image(120, 160, 4))
    good = save(picture)
    scan = good.index(b"\xff\xda") + 40
    progressive = save(picture, progressive=True)
    return {
        "nothing": (b"", "empty file"),
        "text": (b"hello, world", "not an image"),
        "half": (good[: len(good) // 2], "truncated"),
        "no end": (good[:-2], "truncated"),
        "half a PNG": (save(picture, "PNG")[:9000], "truncated"),
        "half a GIF": (save(picture, "GIF")[:3000], "truncated"),
        "zeros within": (good[:scan] + bytes(900) + good[scan + 900 :], "corrupt"),
        "PNG with a flipped bit": (flip(save(picture, "PNG"), 5000), "corrupt"),
        "PNG of 900 million pixels": (png_header(30000, 30000), "too many pixels"),
        "PNG of 130 million pixels": (png_header(13000, 10000), "too many pixels"),
        "a thousand scans": (with_scans(progressive, MAX_SCANS), "too many scans"),
        "too long": (save(Image.new("RGB", (70_000, 2)), "PNG"), "too long"),
        "no numbers": (save(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "odd"),
    }


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :]


def png_header(width: int, height: int) -> bytes:
    data = bytearray(save(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = width.to_bytes(4) + height.to_bytes(4)
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


def with_scans(data: bytes, times: int) -> bytes:
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * times + data[-2:]


@pytest.mark.parametrize("name", list(damaged()))
def test_damage_is_refused_with_a_reason(name):
    data, reason = damaged()[name]
    for options in (AS_IS, EncodeOptions(size=64)):
        with pytest.raises(BadImage, match=f"^{reason}"):
            encode(data, options)


def test_damage_that_pillow_overlooks_is_refused():
    pytest.importorskip("simplejpeg")
    good = save(Image.fromarray(random_image(200, 300, 5)))
    scan = good.index(b"\xff\xda") + 14
    rng = np.random.default_rng(0)
    overlooked = refused = 0
    for position in rng.integers(scan, len(good) - 2, 100):
        data = flip(good, int(position))
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except Exception:
            continue
        overlooked += 1
        try:
            encode(data, AS_IS)
        except BadImage:
            refused += 1
    assert overlooked > 20
    assert refused > 0


def test_a_record_that_does_not_decode_is_told():
    record = encode(save(Image.fromarray(random_image(64, 96, 6))), AS_IS)
    assert check_decodes(record.jpeg) == (64, 96)
    with pytest.raises(BadImage):
        check_decodes(record.jpeg[:-200])


def test_nasty_files_come_out_as_expected(real_images):
    folder = real_images / "nasty"
    expected = json.loads((folder / "expected.json").read_text())["files"]
    # 900 Mpixel and 4 Gpixel: refused by Pillow as well; 108 Mpixel is still taken
    for name, entry in expected.items():
        good = isinstance(entry["pillow_open"], dict) and entry["pillow_rgb"] == "ok"
        data = (folder / "images" / name).read_bytes()
        try:
            record = encode(data, EncodeOptions(size=128))
        except BadImage as error:
            assert not good, f"{name}: {error}"
        else:
            assert good, name
            assert check_decodes(record.jpeg) == (record.height, record.width)
            if "exif_orientation_" in name and "invalid" not in name:
                assert (record.width, record.height) == (96, 64)
                got = pixels(record)
                corners = got[8, 8].argmax(), got[8, -8].argmax(), got[-8, 8].argmax()
                assert corners == (0, 1, 2), name
