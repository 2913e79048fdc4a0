"""One contract for all loaders: what the plan says is shown, in the order that the order says."""

import importlib
import io
import logging
import multiprocessing
import shutil
import sys
import threading
from contextlib import closing
from pathlib import Path

import numba as nb
import numpy as np
import pytest
import torch
from PIL import Image

from dataprep.convert import Manner, convert
from dataprep.encode import EncodeOptions
from dataprep.job import Job
from dataprep.manifest import Manifest, RecordReader
from dataprep.synthetic import coordinate_image, random_image, write_class_folders, write_jpeg
from dense_ssl.config import UserError
from dense_ssl.loaders import DataConfig, make_loader, open_source
from dense_ssl.loaders.order import Order, SequentialOrder
from dense_ssl.views import ViewSpec, draw_epoch, positions

CPU = torch.device("cpu")
COUNT = 24
SIZES = ((96, 128), (150, 100), (120, 120), (77, 201))
VIEWS = (
    ViewSpec(name="global", count=2, size=64, scale=(0.3, 1.0)),
    ViewSpec(name="local", count=3, size=28, scale=(0.05, 0.3), filter="bicubic"),
    ViewSpec(name="twin", count=2, size=64, twin_of="global", part=0.5),
)
HOST = [
    "folder",
    pytest.param("ffcv", marks=pytest.mark.ffcv),
    pytest.param("dali", marks=pytest.mark.dali),
]
# The same loaders, handing over whole images to be cut where they are used: on this CPU, by the host cutter.
DEVICE = [
    "folder-device",
    pytest.param("ffcv-device", marks=pytest.mark.ffcv),
    pytest.param("dali-device", marks=pytest.mark.dali),
]
# How far pixels may be from the reference's, in levels: (mean, at most). FFCV asks libjpeg-turbo for
# the fast inverse DCT; DALI has its own filters; the host cutter rounds its weights.
DIFFERENCE = {
    "folder": (0, 0),
    "ffcv": (1.2, 12),
    "dali": (0.4, 14),
    "folder-device": (0.2, 2),
    "ffcv-device": (1.2, 12),
    "dali-device": (0.2, 2),
}


@pytest.fixture(params=[*HOST, *DEVICE])
def kind(request):
    return available(request.param)


@pytest.fixture(params=HOST)
def host_kind(request):
    return available(request.param)


def available(kind):
    loader = kind.partition("-")[0]
    if loader != "folder":
        pytest.importorskip(f"dense_ssl.loaders.{loader}", exc_type=ImportError)
    return kind


class Cutting:
    """A loader of whole images as the trainer sees it: behind the device cutter."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def epoch(self, *args, **kwargs):
        with closing(self._loader.epoch(*args, **kwargs)) as batches:
            for batch in batches:
                yield batch.to(CPU).cut()


def shard_set(folder, out):
    job = Job("folder", folder, "", out, encode=EncodeOptions(size=0))
    convert(job, Manner(1, 0.0, io.StringIO(), lambda _: None))
    return out


def images(folder, make, quality=95):
    for number in range(COUNT):
        height, width = SIZES[number % len(SIZES)]
        write_jpeg(folder / f"{number:03d}.jpg", make(height, width, number), quality)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("loaders")
    return shard_set(images(root / "images", random_image), root / "shards")


def load(kind, shards, order=None, views=VIEWS, **data):
    name, _, cut = kind.partition("-")
    data = {"workers": 0 if name == "folder" else 2, "max_replaced": 0.2} | data
    data |= {"path": str(shards), "loader": name, "cut": cut or "host"}
    order = order or Order(COUNT, batch_size=4, seed=7)
    loader = make_loader(DataConfig(**data), views, order, CPU)
    return Cutting(loader) if cut else loader


def assert_same(one, other, mean=0.0, most=0.0):
    """Boxes, flips, index and label equal; pixels within `mean` and `most` levels of each other."""
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


def assert_all_same(ones, others, **tolerance):
    for one, other in zip(ones, others, strict=True):
        assert_same(one, other, **tolerance)


# --- what is shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_pixels_lie_where_the_boxes_say(kind, filter, tmp_path):
    """The coordinate test: red and green of the source are its own x and y."""
    folder = images(tmp_path / "images", lambda h, w, _: coordinate_image(h, w), quality=95)
    views = (
        ViewSpec(name="large", count=2, size=80, scale=(0.3, 1), filter=filter),
        ViewSpec(name="small", count=4, size=24, scale=(0.05, 0.3), filter=filter),
    )
    loader = load(kind, shard_set(folder, tmp_path / "shards"), views=views)
    noise = (5 + DIFFERENCE[kind][1]) / 255
    seen = set()
    for batch in loader.epoch(0):
        for name, crops in batch.views.items():
            size = crops.images.shape[-1]
            u = (torch.arange(size) + 0.5) / size
            x0, y0, x1, y1 = crops.boxes[..., None].unbind(2)
            x, y = x0 + u * (x1 - x0), y0 + u * (y1 - y0)  # [V, B, S]
            x = torch.where(crops.flipped[..., None], x.flip(-1), x)
            red, green, blue = (crops.images.float() / 255).unbind(2)
            # Means along the constant axis, so that what JPEG adds to single pixels cancels out.
            half_a_pixel = 0.5 / 77 + 1 / 255  # of the shortest side; rounding
            inner = slice(2, -2)  # at an image's border the filter sees a shorter ramp
            assert ((red.mean(dim=-2) - x)[..., inner].abs() < half_a_pixel).all()
            assert ((green.mean(dim=-1) - y)[..., inner].abs() < half_a_pixel).all()
            assert ((red - x[:, :, None, :])[..., inner].abs() < half_a_pixel + noise).all()
            assert ((green - y[:, :, :, None])[:, :, inner].abs() < half_a_pixel + noise).all()
            assert ((blue - 128 / 255).abs() < noise).all()
            seen.update((name, flip) for flip in crops.flipped.flatten().tolist())
    assert len(seen) == 4  # both views, straight and mirrored
    loader.close()


def test_all_loaders_show_the_same(kind, shards):
    tested, reference = load(kind, shards), load("folder", shards)
    mean, most = DIFFERENCE[kind]
    for epoch in range(2):
        assert_all_same(tested.epoch(epoch), reference.epoch(epoch), mean=mean, most=most)
    assert tested.replaced == {}
    tested.close()


def test_boxes_and_flips_are_the_plans(kind, shards):
    loader = load(kind, shards)
    sizes = open_source(DataConfig(path=str(shards))).sizes
    plan = draw_epoch(VIEWS, sizes, seed=7, epoch=3)
    fractions, where = plan.fractions(sizes), positions(VIEWS)
    for batch in loader.epoch(3):
        index = batch.index.numpy()
        for view in VIEWS:
            rows = index[len(index) - int(view.part * len(index)) :]
            crops = batch.views[view.name]
            boxes = fractions[rows][:, where[view.name]].swapaxes(0, 1)
            np.testing.assert_array_equal(crops.boxes, boxes)
            np.testing.assert_array_equal(crops.flipped, plan.flipped[rows][:, where[view.name]].T)
    loader.close()


def test_a_twin_shows_the_last_part_of_the_batch_again(kind, shards):
    loader = load(kind, shards)
    for batch in loader.epoch(0):
        twin, crops = batch.views["twin"], batch.views["global"]
        assert twin.images.shape == (2, 2, 3, 64, 64)
        assert torch.equal(twin.images, crops.images[:, 2:])
        assert torch.equal(twin.boxes, crops.boxes[:, 2:])
    loader.close()


def test_batches_stay_what_they_were(kind, shards):
    """No memory is used again while somebody holds the batch."""
    loader = load(kind, shards)
    kept = list(loader.epoch(0))
    for batch, again in zip(kept, loader.epoch(0), strict=True):
        assert_same(batch, again)
    loader.close()


def test_labels_are_those_of_the_records(host_kind, tmp_path):
    write_class_folders(tmp_path / "images/train", classes=3, per_class=4)
    out = tmp_path / "shards"
    convert(
        Job("imagenet", tmp_path / "images", "train", out, encode=EncodeOptions(size=0)),
        Manner(1, 0.0, io.StringIO(), lambda _: None),
    )
    labels = Manifest.load(out).labels
    loader = load(host_kind, out, Order(12, 4))
    for batch in loader.epoch(0):
        np.testing.assert_array_equal(batch.label, labels[batch.index.numpy()])
    loader.close()


# --- in which order --------------------------------------------------------------------------------


def test_ranks_share_a_global_batch_without_overlap_or_loss(host_kind, shards):
    whole = load(host_kind, shards, Order(COUNT, 8, seed=7))
    ranks = [load(host_kind, shards, Order(COUNT, 8, 2, rank, seed=7)) for rank in range(2)]
    for together, *parts in zip(whole.epoch(1), *(rank.epoch(1) for rank in ranks), strict=True):
        assert torch.equal(torch.cat([part.index for part in parts]), together.index)
        for name in ("global", "local"):
            halves = [part.views[name].images for part in parts]
            assert torch.equal(torch.cat(halves, dim=1), together.views[name].images)
            halves = [part.views[name].boxes for part in parts]
            assert torch.equal(torch.cat(halves, dim=1), together.views[name].boxes)
    for loader in (whole, *ranks):
        loader.close()


@pytest.mark.parametrize("start", [2, 6])  # 6: nothing is left
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(kind, shards, start):
    order = Order(COUNT, 4, accumulate=2, seed=7)
    loader = load(kind, shards, order, views=VIEWS[:2])
    whole = list(loader.epoch(2))
    loader.close()
    fresh = load(kind, shards, order, views=VIEWS[:2])
    assert_all_same(fresh.epoch(2, start_step=start), whole[2 * start :])
    fresh.close()


def test_a_last_partial_batch_is_shown_as_it_is(kind, shards):
    loader = load(kind, shards, SequentialOrder(COUNT, batch_size=10))
    batches = list(loader.epoch(0))
    assert [len(batch.index) for batch in batches] == [10, 10, 4]
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(COUNT))
    assert batches[-1].views["global"].images.shape == (2, 4, 3, 64, 64)
    assert batches[-1].views["twin"].images.shape == (2, 2, 3, 64, 64)
    reference = load("folder", shards, SequentialOrder(COUNT, batch_size=10))
    mean, most = DIFFERENCE[kind]
    assert_all_same(batches, reference.epoch(0), mean=mean, most=most)
    loader.close()


# --- broken records --------------------------------------------------------------------------------


def _locate(shards, index):
    """Where record `index` lies: (file, offset, length) in either format."""
    data = (reader := RecordReader(Manifest.load(shards))).read(index)
    reader.close()
    for path in (Manifest.load(shards).beton, *Manifest.load(shards).shards):
        at = path.read_bytes().find(data)
        if at >= 0:
            yield path, at, len(data)


DAMAGES = {  # what becomes of the bytes of a record
    "noise": lambda data: data[: len(data) // 2] + b"\x5a\xa5" * 20 + data[len(data) // 2 + 40 :],
    "one bit": lambda data: data[:-40] + bytes([data[-40] ^ 4]) + data[-39:],
    "end missing": lambda data: data[: len(data) // 3] + bytes(len(data) - len(data) // 3),
    "other size": lambda data: data.replace(
        b"\xff\xc0\x00\x11\x08\x00", b"\xff\xc0\x00\x11\x08\x01"
    ),
    "no image": lambda data: b"P6 no JPEG at all".ljust(len(data), b"\0"),
}


def damage(shards, out, damages):
    """A copy of the shard set in which records are broken in every format."""
    shutil.copytree(shards, out)
    for index, how in damages.items():
        places = list(_locate(shards, index))
        assert len(places) == 2
        for path, at, length in places:
            path = out / path.relative_to(shards)
            whole = path.read_bytes()
            broken = DAMAGES[how](whole[at : at + length])
            assert len(broken) == length
            assert broken != whole[at : at + length]
            path.write_bytes(whole[:at] + broken + whole[at + length :])
    return out


def test_broken_records_are_replaced_by_their_neighbours(kind, shards, tmp_path, caplog):
    bad = {3: "noise", 4: "end missing", 11: "other size", 17: "one bit", COUNT - 1: "no image"}
    broken = damage(shards, tmp_path / "shards", bad)
    loader, reference = load(kind, broken, max_replaced=0.21), load("folder", shards)
    mean, most = DIFFERENCE[kind]
    shown_instead = {3: 5, 4: 5, 11: 12, 17: 18, COUNT - 1: 0}
    with caplog.at_level(logging.WARNING):
        for epoch in range(2):
            right = {}  # what the whole set shows of each record; boxes belong to the record
            for batch in reference.epoch(epoch):
                for row, index in enumerate(batch.index.tolist()):
                    right[index] = [batch.views[v].images[:, row] for v in ("global", "local")]
            order = np.concatenate(Order(COUNT, 4, seed=7).batches(epoch)).tolist()
            shown = []
            for batch in loader.epoch(epoch):
                for row, index in enumerate(batch.index.tolist()):
                    shown.append(index)
                    for view, expected in zip(("global", "local"), right[index], strict=True):
                        error = (batch.views[view].images[:, row].int() - expected.int()).abs()
                        assert error.float().mean() <= mean
                        assert error.max() <= most
            assert shown == [shown_instead.get(index, index) for index in order]
    assert sorted(loader.replaced) == sorted(bad)
    for index in bad:  # said once, not once per epoch
        assert sum(f"record {index} is replaced" in line for line in caplog.messages) == 1
    loader.close()


def test_too_many_broken_records_end_the_run(host_kind, shards, tmp_path):
    broken = damage(shards, tmp_path / "shards", {2: "noise", 9: "no image", 15: "end missing"})
    loader = load(host_kind, broken, max_replaced=0.1)
    with pytest.raises(UserError, match=r"3 of 24 records .*data\.max_replaced=0\.1"):
        list(loader.epoch(0))
    loader.close()


def test_records_that_are_skipped_are_not_even_read(host_kind, shards, tmp_path):
    order = Order(COUNT, 4, seed=7)
    skipped = int(order.batches(0)[0][1])
    broken = damage(shards, tmp_path / "shards", {skipped: "no image"})
    loader = load(host_kind, broken, order)
    assert len(list(loader.epoch(0, start_step=1))) == 5
    assert loader.replaced == {}
    loader.close()


# --- coming and going ------------------------------------------------------------------------------


def test_leaving_early_leaves_nothing_behind(kind, shards):
    threads, before = torch.get_num_threads(), set(threading.enumerate())
    loader = load(kind, shards)
    for _ in range(3):
        epoch = loader.epoch(0)
        next(epoch)
        epoch.close()
    next(loader.epoch(1))  # and then the loader itself is closed
    loader.close()
    assert not multiprocessing.active_children()
    assert {t for t in set(threading.enumerate()) - before if not t.daemon} == set()
    assert not [t for t in set(threading.enumerate()) - before if "Epoch" in type(t).__name__]
    assert torch.get_num_threads() == threads


def test_a_new_epoch_ends_the_one_before(host_kind, shards):
    loader = load(host_kind, shards)
    left = loader.epoch(0)
    next(left)
    assert_all_same(loader.epoch(1), load(host_kind, shards).epoch(1))
    assert next(left, None) is None
    loader.close()


def test_two_loaders_run_side_by_side(host_kind, shards):
    alone = [list(load(host_kind, shards, Order(COUNT, 4, seed=seed)).epoch(0)) for seed in (1, 2)]
    both = [load(host_kind, shards, Order(COUNT, 4, seed=seed)) for seed in (1, 2)]
    for one, two, *wanted in zip(*(loader.epoch(0) for loader in both), *alone, strict=True):
        assert_same(one, wanted[0])
        assert_same(two, wanted[1])
    for loader in both:
        loader.close()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(host_kind, shards, workers):
    loader = load(host_kind, shards, workers=workers)
    assert_all_same(loader.epoch(0), load(host_kind, shards).epoch(0))
    loader.close()


# --- whole images, for the device cutter ------------------------------------------------------------


@pytest.mark.ffcv
def test_on_a_cpu_ffcv_shows_the_same_bits_whoever_cuts(shards):
    available("ffcv")
    host, device = load("ffcv", shards), load("ffcv-device", shards)
    for epoch in range(2):
        assert_all_same(device.epoch(epoch), host.epoch(epoch))
    host.close()
    device.close()


@pytest.mark.ffcv
def test_numba_can_write_bytes_after_ffcv_was_opened(shards):
    available("ffcv")
    loader = load("ffcv-device", shards)
    next(loader.epoch(0))
    loader.close()
    written = np.zeros(3, np.uint8)
    nb.njit(lambda array: array.fill(7))(written)
    assert written.tolist() == [7, 7, 7]
    assert nb.types.Array(nb.uint8, 1, "C").mutable
    assert nb.uint8[::1].mutable


@pytest.mark.parametrize("kind", DEVICE)
def test_whole_images_are_the_decoded_records(kind, shards):
    """One piece of memory: what the plan says, then the images, nothing between them."""
    available(kind)
    loader = load(kind, shards)._loader
    sizes = open_source(DataConfig(path=str(shards))).sizes
    reader = RecordReader(Manifest.load(shards))
    for batch in loader.epoch(0):
        shown = sizes[batch.index.numpy()]
        lengths = 3 * shown.prod(1)
        images = np.split(batch.memory.numpy()[-lengths.sum() :], lengths.cumsum()[:-1])
        for index, size, image in zip(batch.index.tolist(), shown.tolist(), images, strict=True):
            exact = np.asarray(Image.open(io.BytesIO(reader.read(index)))).astype(int)
            error = np.abs(image.reshape(*size, 3) - exact)
            mean, most = DIFFERENCE[kind]
            assert error.mean() <= (mean if "ffcv" in kind else 0)
            assert error.max() <= (most if "ffcv" in kind else 0)
    loader.close()
    reader.close()


# --- what cannot be loaded -------------------------------------------------------------------------


def test_a_folder_of_images_is_read_upright_and_labelled_by_class(tmp_path):
    for name, height in (("b/1.png", 40), ("b/2.JPG", 50), ("a/deep/3.jpg", 60)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_image(height, 30, 0)).save(path)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(random_image(20, 70, 1)).save(tmp_path / "a/0.jpg", exif=turned)
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / "a/broken.jpg").write_bytes(b"no image either")
    source = open_source(DataConfig(path=str(tmp_path)))
    assert [path.name for path in source.paths] == ["0.jpg", "3.jpg", "1.png", "2.JPG"]
    assert source.sizes.tolist() == [[70, 20], [60, 30], [40, 30], [50, 30]]
    assert source.labels.tolist() == [0, 0, 1, 1]
    loader = load("folder", tmp_path, Order(4, 4), views=VIEWS[:1])
    assert len(list(loader.epoch(0))) == 1


def test_one_folder_is_no_class(tmp_path):
    write_jpeg(tmp_path / "images/0.jpg", random_image(20, 30, 0))
    assert open_source(DataConfig(path=str(tmp_path))).labels.tolist() == [-1]


def test_worker_processes_show_what_the_main_process_shows(shards):
    inline, apart = load("folder", shards), load("folder", shards, workers=2)
    epoch = apart.epoch(0)
    assert_all_same([next(epoch), next(epoch)], list(inline.epoch(0))[:2])
    assert multiprocessing.active_children()
    apart.close()
    assert not multiprocessing.active_children()


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        open_source(DataConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no image below this folder"):
        open_source(DataConfig(path=str(tmp_path)))
    (tmp_path / "0.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 1 images has a readable header"):
        open_source(DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="not a folder"):
        open_source(DataConfig(path=str(tmp_path / "0.jpg")))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not readable"):
        open_source(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["ffcv", "dali"])
def test_a_missing_library_is_named_with_the_remedy(kind, shards, monkeypatch):
    monkeypatch.setitem(sys.modules, {"ffcv": "ffcv.libffcv", "dali": "nvidia.dali"}[kind], None)
    monkeypatch.delitem(sys.modules, f"dense_ssl.loaders.{kind}", raising=False)
    monkeypatch.delattr(importlib.import_module("dense_ssl.loaders"), kind, raising=False)
    with pytest.raises(UserError, match=r"make setup.*data\.loader=folder"):
        load(kind, shards)


@pytest.mark.ffcv
def test_ffcv_needs_ffcvs_format(tmp_path):
    available("ffcv")
    write_jpeg(tmp_path / "0.jpg", random_image(20, 30, 0))
    with pytest.raises(UserError, match=r"no FFCV file.*FORMAT=ffcv"):
        load("ffcv", tmp_path, Order(1, 1), views=VIEWS[:1])


@pytest.mark.ffcv
@pytest.mark.parametrize(
    ("at", "message"),
    [
        (0, "not an FFCV file of version 2 .*convert it again"),
        (2107, "not that of the shard set.*make verify"),
        (-16, "table of records.*make verify"),
    ],
)
def test_a_damaged_ffcv_file_is_named(shards, tmp_path, at, message):
    available("ffcv")
    out = tmp_path / "shards"
    shutil.copytree(shards, out)
    beton = Manifest.load(out).beton
    data = bytearray(beton.read_bytes())
    data[at] ^= 0x10
    beton.write_bytes(data)
    with pytest.raises(UserError, match=f"images.beton: .*{message}"):
        load("ffcv", out)


def test_a_twin_of_no_image_is_refused(shards):
    with pytest.raises(UserError, match="view 'twin': part=0.5 of 1 images"):
        load("folder", shards, Order(COUNT, 1))


def test_frame_headers_are_read_as_pillow_reads_them():
    from dense_ssl.loaders.jpeg import jpeg_size

    variants = [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 3}]
    variants += [{"comment": b"\xff\xc0 a comment"}, {"icc_profile": bytes(70_000)}]
    for number, options in enumerate(variants):
        for mode in ("RGB", "L"):
            stream = io.BytesIO()
            image = Image.fromarray(random_image(30 + number, 300 + number, 0)).convert(mode)
            image.save(stream, "JPEG", **options)
            data = np.frombuffer(stream.getvalue(), np.uint8)
            assert jpeg_size(data) == (30 + number, 300 + number)
            for length in range(0, 12):
                assert jpeg_size(data[:length]) == (0, 0)
    assert jpeg_size(np.zeros(100, np.uint8)) == (0, 0)


def test_real_images_look_alike(host_kind, real_images, tmp_path):
    """Photographs: subsampled chroma, every size, grey ones among them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(Path(real_images, "imagenet-samples").rglob("*.JPEG"))[:16]:
        shutil.copy(path, folder)
    out = tmp_path / "shards"
    convert(
        Job("folder", folder, "", out, encode=EncodeOptions(size=128)),
        Manner(1, 0.0, io.StringIO(), lambda _: None),
    )
    views = (ViewSpec(name="a", count=3, size=96), ViewSpec(name="b", count=2, size=32))
    tested, reference = (load(k, out, Order(16, 8), views=views) for k in (host_kind, "folder"))
    for one, other in zip(tested.epoch(0), reference.epoch(0), strict=True):
        assert_same(one, other, mean=2.0, most=40)
    tested.close()
