"""Whole images cut where they are used: one copy to the device, the same crops, nothing kept.

Plainly the host cutter makes the crops; with TRITON_INTERPRET=1 and DENSE_SSL_KERNELS=triton the device
cutter does.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from dataprep.synthetic import coordinate_image, random_image
from dense_ssl.loaders.batch import assemble
from dense_ssl.loaders.decoded import Decoded
from dense_ssl.loaders.folder import cut_one
from dense_ssl.loaders.prefetch import Prefetcher
from dense_ssl.views import ViewSpec, draw_epoch, positions

CPU = torch.device("cpu")
SIZES = np.array([(20, 17), (9, 31), (14, 14), (33, 12)], np.int32)
VIEWS = (
    ViewSpec(name="large", count=2, size=12, scale=(0.3, 1)),
    ViewSpec(name="small", count=2, size=7, scale=(0.1, 0.3), filter="bicubic"),
    ViewSpec(name="twin", count=2, size=12, twin_of="large", part=0.5),
)


def source_batch(images, epoch=0, views=VIEWS, device=CPU):
    """The batch of these images, and what is known of it: records 10, 11, ... with labels 0, 1, ..."""
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    decoded = Decoded(views, sizes, device)
    for row, image in enumerate(images):
        decoded.image(row).copy_(torch.from_numpy(image))
    plan = draw_epoch(views, sizes, seed=3, epoch=epoch)
    count = np.arange(len(images))
    return decoded.batch(plan, count + 10, count), plan, sizes


def by_pillow(images, plan, sizes, views=VIEWS):
    """The same batch, cut as the reference loader cuts."""
    where = positions(views)
    crops = {
        view.name: torch.stack(
            [
                torch.stack(
                    [
                        cut_one(Image.fromarray(image), plan.boxes[b, v], plan.flipped[b, v], view)
                        for b, image in enumerate(images)
                    ]
                )
                for v in range(where[view.name].start, where[view.name].stop)
            ]
        )
        for view in views
        if view.twin_of is None
    }
    count = np.arange(len(images))
    return assemble(views, crops, plan, sizes, count + 10, count)


def assert_same(one, other, most):
    assert torch.equal(one.index, other.index)
    assert torch.equal(one.label, other.label)
    assert list(one.views) == list(other.views)
    for name, crops in one.views.items():
        expected = other.views[name]
        assert torch.equal(crops.boxes, expected.boxes)
        assert torch.equal(crops.flipped, expected.flipped)
        assert crops.images.shape == expected.images.shape
        error = (crops.images.int() - expected.images.int()).abs()
        assert error.max() <= most
        assert error.float().mean() <= 0.1


def test_crops_of_a_ragged_batch_are_pillows():
    for epoch in range(2):
        images = [random_image(*size, seed=n) for n, size in enumerate(SIZES)]
        batch, plan, sizes = source_batch(images, epoch)
        assert_same(batch.cut(), by_pillow(images, plan, sizes), most=2)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_pixels_lie_where_the_boxes_say(filter):
    """The coordinate test: red and green of the source are its own x and y."""
    views = (ViewSpec(name="v", count=4, size=8, scale=(0.2, 1), filter=filter),)
    batch, _, sizes = source_batch([coordinate_image(h, w) for h, w in SIZES], views=views)
    crops = batch.cut().views["v"]
    assert len(set(crops.flipped.flatten().tolist())) == 2
    u = (torch.arange(8) + 0.5) / 8
    x0, y0, x1, y1 = crops.boxes[..., None].unbind(2)
    x, y = x0 + u * (x1 - x0), y0 + u * (y1 - y0)  # [V, B, S]
    x = torch.where(crops.flipped[..., None], x.flip(-1), x)
    red, green, _ = (crops.images.float() / 255).unbind(2)
    half_a_pixel = torch.from_numpy(0.5 / sizes).float() + 2 / 255  # [B, 2], and two roundings
    inner = slice(1, -1)  # at an image's border the filter sees a shorter ramp
    off_x, off_y = (red - x[..., None, :]).abs(), (green - y[..., None]).abs()
    assert (off_x[..., inner] < half_a_pixel[:, 1, None, None]).all()
    assert (off_y[..., inner, :] < half_a_pixel[:, 0, None, None]).all()


def test_the_prefetcher_hands_over_crops():
    images = [random_image(*size, seed=n) for n, size in enumerate(SIZES)]
    given = [source_batch(images, epoch)[0] for epoch in range(3)]
    with Prefetcher(iter(given), CPU) as ready:
        got = list(ready)
    for batch, source in zip(got, given, strict=True):
        assert_same(batch, source.cut(), most=0)


def test_nothing_of_the_decoded_images_is_kept():
    batch, _, _ = source_batch([random_image(*size, seed=0) for size in SIZES])
    cut = batch.cut()
    before = cut.views["large"].boxes.clone(), cut.label.clone()
    batch.memory.zero_()
    assert torch.equal(cut.views["large"].boxes, before[0])
    assert torch.equal(cut.label, before[1])
    for crops in cut.views.values():
        for tensor in (crops.boxes, crops.flipped):
            assert tensor.untyped_storage().nbytes() < batch.memory.nbytes


@pytest.mark.parametrize("size", [(9, 31), (40, 50), (3, 2)])
def test_an_image_of_another_size_takes_the_place_of_one(size):
    images = [random_image(*size, seed=n) for n, size in enumerate(SIZES)]
    decoded = Decoded(VIEWS, SIZES, CPU)
    for row, image in enumerate(images):
        decoded.image(row).copy_(torch.from_numpy(image))
    images[2] = random_image(*size, seed=9)
    decoded.put(2, torch.from_numpy(images[2]))
    for row, image in enumerate(images):
        np.testing.assert_array_equal(decoded.image(row), image)
    sizes = np.array([image.shape[:2] for image in images])
    plan = draw_epoch(VIEWS, sizes, seed=3, epoch=0)
    batch = decoded.batch(plan, np.arange(4) + 10, np.arange(4))
    assert_same(batch.cut(), by_pillow(images, plan, sizes), most=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_are_cut_on_the_gpu():
    device = torch.device("cuda")
    images = [random_image(*size, seed=n) for n, size in enumerate(SIZES)]
    given = [source_batch(images, epoch) for epoch in range(8)]
    decoded_there, _, _ = source_batch(images, 7, device=device)
    batches = [*(batch for batch, _, _ in given), decoded_there]
    with Prefetcher(iter(batches), device) as ready:
        for batch, (_, plan, sizes) in zip(ready, [*given, given[-1]], strict=True):
            assert batch.views["large"].images.is_cuda
            assert not batch.index.is_cuda
            assert_same(batch.to(CPU), by_pillow(images, plan, sizes), most=2)
