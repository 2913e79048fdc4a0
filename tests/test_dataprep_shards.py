"""What a shard set holds: the same records in every format, for everybody's readers, and verified."""

import io
import os
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep.convert import Manner, convert
from dataprep.encode import EncodeOptions
from dataprep.job import Job
from dataprep.manifest import DataError, Manifest, RecordReader
from dataprep.synthetic import random_image, write_class_folders
from dataprep.verify import verify
from dataprep.write_dali import plan_shards
from dataprep.write_ffcv import MIN_PAGE, allocate, page_size_for

QUIETLY = Manner(1, 0.0, io.StringIO(), lambda _: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Three classes of four images, 96 x 128."""
    root = tmp_path_factory.mktemp("source")
    write_class_folders(root / "train", classes=3, per_class=4)
    return root


@pytest.fixture(scope="module")
def shards(source) -> Path:
    """The source in both formats as it is, over several tar shards."""
    out = source.parent / f"{source.name}-shards"
    options = EncodeOptions(size=0)
    convert(Job("imagenet", source, "train", out, encode=options, shard_bytes=40_000), QUIETLY)
    return out


def test_round_trip_of_bytes_sizes_labels_and_names(source, shards):
    manifest = Manifest.load(shards)
    assert manifest.num_images == 12
    assert manifest.classes == ("class_0", "class_1", "class_2")
    assert manifest.labels.tolist() == sorted([0, 1, 2] * 4)
    assert manifest.formats == ("ffcv", "dali")
    assert len(manifest.shards) > 2
    assert not (shards / ".work").exists()
    for kind in manifest.formats:
        with RecordReader(manifest, kind) as reader:
            copy = pickle.loads(pickle.dumps(reader))
            for index, name in enumerate(manifest.names):
                data = reader.read(index)
                assert data == (source / name).read_bytes() == copy.read(index)
                assert manifest.sizes[index].tolist() == [96, 128]


@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore")  # FFCV's and numba's own
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_it(shards, os_cache):
    pytest.importorskip("ffcv")
    import torch
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    manifest = Manifest.load(shards)
    threads = torch.get_num_threads()
    loader = Loader(
        str(manifest.beton),
        batch_size=5,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        drop_last=False,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    images, labels = [], []
    for image, label in loader:
        images.append(np.array(image))
        labels += np.asarray(label).ravel().tolist()
    torch.set_num_threads(threads)
    assert labels == manifest.labels.tolist()
    reader = RecordReader(manifest, "dali")
    for index, got in enumerate(np.concatenate(images)):
        with Image.open(io.BytesIO(reader.read(index))) as reference:
            # FFCV decodes with libjpeg's fast transform
            assert np.abs(got - np.asarray(reference, np.float64)).mean() < 3


@pytest.mark.dali
@pytest.mark.filterwarnings("ignore")  # DALI's own
def test_dali_reads_it(shards):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    manifest = Manifest.load(shards)

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline():
        jpeg, label = fn.readers.webdataset(
            paths=[str(path) for path in manifest.shards],
            index_paths=[str(path.with_suffix(".idx")) for path in manifest.shards],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            name="reader",
        )
        return jpeg, label, fn.decoders.image(jpeg, output_type=types.RGB)

    built = pipeline()
    built.build()
    assert built.epoch_size("reader") == manifest.num_images
    reader = RecordReader(manifest)
    for start in range(0, manifest.num_images, 4):
        jpegs, labels, images = built.run()
        for row in range(4):
            assert bytes(jpegs.at(row)) == reader.read(start + row)
            assert int(bytes(labels.at(row))) == manifest.labels[start + row]
            assert images.at(row).shape == (96, 128, 3)


@pytest.mark.filterwarnings("ignore")  # webdataset's own
def test_webdataset_reads_it(shards):
    webdataset = pytest.importorskip("webdataset")
    manifest = Manifest.load(shards)
    reader = RecordReader(manifest)
    paths = [str(path) for path in manifest.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [int(sample["__key__"]) for sample in samples] == list(range(manifest.num_images))
    assert [int(sample["cls"]) for sample in samples] == manifest.labels.tolist()
    assert [sample["jpg"] for sample in samples] == [reader.read(i) for i in range(len(samples))]


def test_more_shards_than_may_be_open_are_one_sentence(shards):
    manifest = Manifest.load(shards)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, hard))  # two more at most
    try:
        assert len(manifest.shards) > 2
        with pytest.raises(DataError, match=r"Too many open files.*ulimit -n"):
            RecordReader(manifest, "dali")
        again = os.open(os.devnull, os.O_RDONLY)
        os.close(again)
        assert again == lowest  # those that were opened are closed
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_pages_of_ffcv_hold_whole_records():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 3 << 20, 200)
    lengths[[3, 77]] = MIN_PAGE  # exactly a page
    addresses = allocate(lengths, MIN_PAGE).astype(np.int64)
    ends = addresses + lengths
    assert (addresses // MIN_PAGE == (ends - 1) // MIN_PAGE).all()
    assert (addresses[1:] >= ends[:-1]).all()
    assert page_size_for(MIN_PAGE + 1) == 2 * MIN_PAGE


def test_tar_shards_hold_every_record_once():
    lengths = np.random.default_rng(0).integers(1, 50_000, 300)
    shards = plan_shards(lengths, 200_000)
    assert [start for start, _ in shards[1:]] == [stop for _, stop in shards[:-1]]
    assert (shards[0][0], shards[-1][1]) == (0, 300)
    for start, stop in shards:
        packed = sum(3 * 512 + -(-int(n) // 512) * 512 for n in lengths[start:stop]) + 1024
        assert packed <= 200_000
    assert plan_shards(np.array([10, 999_999, 10]), 5_000) == [(0, 1), (1, 2), (2, 3)]


def test_large_records_get_larger_pages(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3200, 3), dtype=np.uint8)
    (tmp_path / "all").mkdir()
    Image.fromarray(noise).save(tmp_path / "all" / "big.jpg", quality=100, subsampling=0)
    Image.fromarray(random_image(50, 60, 0)).save(tmp_path / "all" / "small.jpg")
    assert (tmp_path / "all" / "big.jpg").stat().st_size > MIN_PAGE
    job = Job("folder", tmp_path / "all", "", tmp_path / "out", ("ffcv",), EncodeOptions(size=0))
    convert(job, QUIETLY)
    assert verify(tmp_path / "out") == []


def test_verify_names_every_kind_of_damage(shards, tmp_path):
    assert verify(shards, workers=2) == []

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(shards, tmp_path / name))

    for kind, file in (("ffcv", "ffcv/images.beton"), ("dali", "dali/shard-000000.tar")):
        copy = damaged(f"bit-{kind}")
        with RecordReader(Manifest.load(copy), kind) as reader:
            middle = int(reader._offsets[1] + reader._lengths[1] // 2)
        data = bytearray((copy / file).read_bytes())
        data[middle] ^= 1
        (copy / file).write_bytes(data)
        problems = verify(copy)
        assert any(f"{file}: its content" in problem for problem in problems)
        assert any(f"record 1 (train/class_0/001.jpg) in format {kind}" in p for p in problems)

    copy = damaged("cut")
    beton = copy / "ffcv" / "images.beton"
    beton.write_bytes(beton.read_bytes()[:-1])
    assert ["bytes where the manifest says" in problem for problem in verify(copy)] == [True]
    with pytest.raises(DataError, match="bytes where the manifest says"):
        Manifest.load(copy)

    copy = damaged("missing")
    (copy / "dali" / "shard-000001.tar").unlink()
    assert [problem.endswith("shard-000001.tar: missing") for problem in verify(copy)] == [True]

    copy = damaged("extra")
    (copy / "dali" / "shard-000099.tar").write_bytes(b"")
    assert ["not in the manifest" in problem for problem in verify(copy)] == [True]

    copy = damaged("labels")
    labels = np.load(copy / "labels.npy")
    labels[0] = 2
    np.save(copy / "labels.npy", labels)
    problems = "\n".join(verify(copy))
    assert "labels.npy: its content" in problems
    assert "images.beton: its labels are not those of the manifest" in problems
    assert "000000000.cls has another label" in problems

    copy = damaged("index")
    index = copy / "dali" / "shard-000000.idx"
    index.write_text(index.read_text().replace("jpg 512 ", "jpg 513 "))
    assert "000000000.jpg does not lie where it says" in "\n".join(verify(copy))

    copy = damaged("no manifest")
    (copy / "manifest.json").write_text("{}")
    assert ["not readable as a manifest" in problem for problem in verify(copy)] == [True]
