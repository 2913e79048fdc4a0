"""DALI shows what the plan says and what the reference loader shows, broken records included."""

import io
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from dataprep.synthetic import coordinate_image, random_image, write_jpeg
from dense_ssl.config import UserError
from dense_ssl.loaders import DataConfig, make_loader
from dense_ssl.loaders.order import Order, SequentialOrder
from dense_ssl.loaders.source import FolderSource
from dense_ssl.views import ViewSpec

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali")
dali = pytest.importorskip("dense_ssl.loaders.dali")
pytestmark = pytest.mark.dali

CPU = torch.device("cpu")
SIZES = ((96, 128), (150, 100), (120, 120), (77, 201))
VIEWS = (
    ViewSpec(name="global", count=2, size=64, scale=(0.3, 1.0)),
    ViewSpec(name="local", count=3, size=32, scale=(0.05, 0.3), filter="bicubic"),
    ViewSpec(name="twin", count=2, size=64, twin_of="global", part=0.5),
)


def write_images(folder, count, make, quality=95):
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        write_jpeg(folder / f"{number:03d}.jpg", make(height, width, number), quality)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 12, random_image)


def loaders(folder, order=None, views=VIEWS, max_replaced=0.5, workers=2):
    """The loader under test and the reference, on the same images, in the same order."""
    source = FolderSource(folder)
    order = order or Order(len(source.sizes), batch_size=4, seed=7)
    tested = load("dali", source, order, views, max_replaced=max_replaced, workers=workers)
    return tested, load("folder", source, order, views, max_replaced=max_replaced, workers=0)


def load(kind, source, order, views=VIEWS, device=CPU, **data):
    config = DataConfig(path="given", loader=kind, **data)
    return make_loader(config, views, order, device, source)


def assert_same(one, other, mean=0.0, most=0.0):
    """Boxes, flips, index, label equal; pixels within mean and most levels of each other."""
    assert torch.equal(one.index, other.index)
    assert torch.equal(one.label, other.label)
    assert list(one.views) == list(other.views)
    for name, crops in one.views.items():
        expected = other.views[name]
        assert torch.equal(crops.boxes, expected.boxes)
        assert torch.equal(crops.flipped, expected.flipped)
        assert crops.images.dtype == torch.uint8
        assert crops.images.shape == expected.images.shape
        difference = (crops.images.int() - expected.images.int()).abs()
        assert difference.float().mean() <= mean
        assert difference.max() <= most


def test_it_shows_what_the_reference_loader_shows(folder):
    tested, reference = loaders(folder)
    for epoch in range(3):
        batches = list(tested.epoch(epoch))
        assert len(batches) == tested.steps_per_epoch == 3
        for ours, theirs in zip(batches, reference.epoch(epoch), strict=True):
            assert_same(ours, theirs, mean=0.4, most=14)
    assert tested.replaced == {}
    tested.close()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_lie_where_the_boxes_say(tmp_path, interpolation):
    """Red and green of the source are its own x and y: a crop reads its box off its pixels."""
    write_images(tmp_path, 12, lambda height, width, _: coordinate_image(height, width), 98)
    views = (
        ViewSpec(name="large", count=2, size=80, scale=(0.3, 1), filter=interpolation),
        ViewSpec(name="small", count=4, size=24, scale=(0.05, 0.3), filter=interpolation),
    )
    tested, _ = loaders(tmp_path, Order(12, batch_size=6, seed=1), views)
    seen = Counter()
    for batch in tested.epoch(0):
        for name, crops in batch.views.items():
            size = crops.images.shape[-1]
            u = (torch.arange(size) + 0.5) / size
            x0, y0, x1, y1 = crops.boxes[..., None].unbind(2)
            x, y = x0 + u * (x1 - x0), y0 + u * (y1 - y0)  # [V, B, S]
            x = torch.where(crops.flipped[..., None], x.flip(-1), x)
            red, green, blue = (crops.images.float() / 255).unbind(2)
            half_pixel = 0.5 / 77 + 2.5 / 255  # of the smallest side, and what JPEG and rounding do
            inner = slice(2, -2)  # at the image's edge no ramp continues for the filter to see
            off_x = (red - x[:, :, None, :])[..., inner, inner].abs()
            off_y = (green - y[:, :, :, None])[..., inner, inner].abs()
            assert off_x.max() < half_pixel
            assert off_y.max() < half_pixel
            assert (blue - 128 / 255).abs().max() < 4 / 255
            seen.update([(name, bool(flip)) for flip in crops.flipped.flatten()])
    assert len(seen) == 4  # both views, straight and mirrored


def test_starting_in_the_middle_is_exact(folder):
    tested, _ = loaders(folder)
    whole = list(tested.epoch(1))
    for start in (1, 2, 3):
        part = list(tested.epoch(1, start_step=start))
        assert len(part) == 3 - start
        for ours, theirs in zip(part, whole[start:]):
            assert_same(ours, theirs)


def test_skipped_steps_are_not_read(folder):
    tested, _ = loaders(folder)
    source, read = tested._reading.source, []

    class Noting:
        sizes, labels = source.sizes, source.labels

        def read(self, index):
            read.append(index)
            return source.read(index)

    tested._reader._records._source = Noting()
    (batch,) = tested.epoch(0, start_step=2)
    assert sorted(read) == sorted(batch.index.tolist())


def test_an_epoch_left_early_does_not_leak_into_the_next(folder):
    tested, _ = loaders(folder)
    expected = list(tested.epoch(1))
    running = tested.epoch(0)
    next(running)
    for ours, theirs in zip(tested.epoch(1), expected, strict=True):
        assert_same(ours, theirs)
    assert list(running) == []  # ended by the epoch after it


def test_batches_own_their_memory(folder):
    tested, _ = loaders(folder)
    kept = list(tested.epoch(0))
    copies = [batch.views["global"].images.clone() for batch in kept]
    list(tested.epoch(1))
    assert all(torch.equal(b.views["global"].images, c) for b, c in zip(kept, copies))


def test_workers_do_not_change_a_bit(folder):
    one, _ = loaders(folder, workers=1)
    two, _ = loaders(folder, workers=3)
    for a, b in zip(one.epoch(0), two.epoch(0), strict=True):
        assert_same(a, b)


def test_a_last_partial_batch(folder):
    tested, reference = loaders(folder, SequentialOrder(12, batch_size=5))
    for ours, theirs in zip(tested.epoch(0), reference.epoch(0), strict=True):
        assert_same(ours, theirs, mean=0.4, most=14)
    assert len(ours.index) == 2


def test_other_formats_look_as_pillow_makes_them(tmp_path):
    """Rotation flags, CMYK, alpha, palettes, grey: everything but a plain JPEG goes through Pillow."""
    image = Image.fromarray(random_image(96, 128, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "0.jpg", quality=95, exif=exif)
    image.convert("CMYK").save(tmp_path / "1.jpg", quality=95)
    image.convert("RGBA").save(tmp_path / "2.png")
    image.quantize(32).save(tmp_path / "3.png")
    image.convert("L").save(tmp_path / "4.jpg", quality=95)
    image.save(tmp_path / "5.jpg", quality=95, progressive=True)
    image.save(tmp_path / "6.webp", lossless=True)
    image.save(tmp_path / "7.bmp")
    tested, reference = loaders(tmp_path)
    for ours, theirs in zip(tested.epoch(0), reference.epoch(0), strict=True):
        assert_same(ours, theirs, mean=0.4, most=14)
    assert tested.replaced == {}


def break_some(folder):
    path = folder / "002.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "003.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image any more")
    Image.fromarray(random_image(50, 60, 0)).save(folder / "011.jpg")  # not the size it had


def test_broken_records_are_replaced_as_by_the_reference_loader(tmp_path, caplog):
    write_images(tmp_path, 12, random_image)
    tested, reference = loaders(tmp_path)
    break_some(tmp_path)
    with caplog.at_level(logging.CRITICAL):
        for _ in range(2):
            for ours, theirs in zip(tested.epoch(0), reference.epoch(0), strict=True):
                assert_same(ours, theirs, mean=0.4, most=14)
                assert not {2, 3, 11} & set(ours.index.tolist())
    assert set(tested.replaced) == set(reference.replaced) == {2, 3, 11}


def test_too_many_broken_records_stop_the_run(tmp_path):
    write_images(tmp_path, 12, random_image)
    tested, _ = loaders(tmp_path, max_replaced=0.2)
    break_some(tmp_path)
    with pytest.raises(UserError, match="3 of 12 records are unreadable"):
        list(tested.epoch(0))


def test_what_only_dali_cannot_read_is_left_to_pillow(tmp_path, monkeypatch, caplog):
    write_images(tmp_path, 12, random_image)
    gif = io.BytesIO()
    Image.fromarray(random_image(150, 100, 5)).save(gif, "GIF")
    (tmp_path / "005.jpg").write_bytes(gif.getvalue())
    monkeypatch.setattr(dali, "_is_plain_jpeg", lambda encoded: True)
    tested, reference = loaders(tmp_path)
    with caplog.at_level(logging.WARNING):
        batches = list(tested.epoch(0))
    assert "Pillow decodes them from now on" in caplog.text
    assert tested.replaced == {}
    for ours, theirs in zip(batches, reference.epoch(0), strict=True):
        assert_same(ours, theirs, mean=0.4, most=14)
    caplog.clear()
    for ours, theirs in zip(tested.epoch(1), reference.epoch(1), strict=True):
        assert_same(ours, theirs, mean=0.4, most=14)
    assert caplog.text == ""


def test_decoded_images_are_pillows(folder):
    """With boxes of the whole image at its own size nothing is resampled: the decoder shows itself."""
    source = FolderSource(folder)
    view = ViewSpec(name="v", count=1, size=120, scale=(1, 1), ratio=(1, 1), flip=0)
    squares = [i for i in range(12) if tuple(source.sizes[i]) == (120, 120)]
    tested = load("dali", source, SequentialOrder(12, 4), (view,), workers=1)
    for batch in tested.epoch(0):
        for row, index in enumerate(batch.index.tolist()):
            if index in squares:
                expected = np.asarray(Image.open(source.paths[index])).transpose(2, 0, 1)
                np.testing.assert_array_equal(batch.views["v"].images[0, row].numpy(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cut", ["host", "device"])
def test_on_a_gpu(folder, cut):
    source = FolderSource(folder)
    order = Order(12, batch_size=4, seed=7)
    tested = load("dali", source, order, device=torch.device("cuda"), workers=2, cut=cut)
    reference = load("folder", source, order, workers=0)
    for ours, theirs in zip(tested.epoch(0), reference.epoch(0), strict=True):
        if cut == "device":
            assert ours.memory.is_cuda
            ours = ours.cut()
        assert ours.views["global"].images.is_cuda
        assert not ours.index.is_cuda
        on_host = type(ours)(
            {name: crops.map(lambda x: x.cpu()) for name, crops in ours.views.items()},
            ours.index,
            ours.label.cpu(),
        )
        assert_same(on_host, theirs, mean=1.5, most=40)
    tested.close()
