"""A source to a complete shard set: the same bytes whatever happens, read by everybody's readers."""

import errno
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep import assemble, convert
from dataprep.__main__ import main
from dataprep.encode import EncodeOptions
from dataprep.files import locked
from dataprep.job import Job
from dataprep.manifest import DataError, Manifest, RecordReader
from dataprep.synthetic import random_image, write_class_folders, write_random_images
from dataprep.verify import verify
from dataprep.write_dali import plan_shards
from dataprep.write_ffcv import MIN_PAGE, allocate, page_size_for

ROOT = Path(__file__).resolve().parent.parent


def run(job: Job, workers: int = 1, max_bad: float = 0.01) -> str:
    """Convert and return what was said."""
    said: list[str] = []
    convert.convert(job, convert.Manner(workers, max_bad, io.StringIO(), said.append))
    return "\n".join(said)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dataprep", *map(str, arguments)]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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
    run(Job("imagenet", source, "train", out, encode=options, shard_bytes=40_000))
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


def test_number_of_workers_does_not_show(source, tmp_path):
    for workers in (1, 2):
        out = tmp_path / str(workers)
        run(Job("imagenet", source, "train", out, encode=EncodeOptions(64, 80)), workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


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
    reader = RecordReader(manifest)
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


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    write_copies(tmp_path / "all", 400)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--size", 100, "--shard-mib", 1)
    began = time.monotonic()
    subprocess.run(
        command("folder", "--src", tmp_path / "all", "--out", whole, *options, "--workers", 1),
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    takes = time.monotonic() - began
    again = command("folder", "--src", tmp_path / "all", "--out", killed, *options, "--workers", 2)
    moments = random.Random(0)
    for _ in range(4):
        with subprocess.Popen(again, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            time.sleep(takes * moments.uniform(0.2, 0.9))
            process.kill()
        assert not (killed / "manifest.json").exists() or Manifest.load(killed)
    subprocess.run(again, cwd=ROOT, check=True, capture_output=True)
    assert tree(killed) == tree(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(tmp_path, number):
    write_copies(tmp_path / "all", 3000)
    again = command("folder", "--src", tmp_path / "all", "--out", tmp_path / "out", "--workers", 1)
    with subprocess.Popen(again, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "out" / ".work" / "part-000000.json")
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert f"stopped by {number.name}; the same command continues" in errors
    assert "Traceback" not in errors
    stopped = {path.name for path in (tmp_path / "out" / ".work").iterdir()}
    assert "job.json" in stopped


def test_a_worker_that_dies_is_reported(tmp_path):
    write_copies(tmp_path / "all", 3000)
    again = command("folder", "--src", tmp_path / "all", "--out", tmp_path / "out", "--workers", 1)
    with subprocess.Popen(again, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "out" / ".work" / "part-000000.json")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(int(child), signal.SIGKILL)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "a worker process died (SIGKILL) while at 0" in errors
    assert "Traceback" not in errors


def write_copies(folder: Path, count: int) -> None:
    """Write the same few images again and again, under many names."""
    images = [path.read_bytes() for path in write_random_images(folder, 3)]
    for index in range(count):
        (folder / f"{index:06d}.jpg").write_bytes(images[index % 3])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_bad_images_stop_it_until_they_are_allowed(tmp_path):
    paths = write_random_images(tmp_path / "all", 20)
    paths[3].write_bytes(paths[3].read_bytes()[:500])
    paths[7].write_text("no image")
    job = Job("folder", tmp_path / "all", "", tmp_path / "out")
    with pytest.raises(DataError, match=r"2 bad among 20 images.*allows 1 of 20"):
        run(job, max_bad=0.05)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert "2 bad" not in run(job, max_bad=0.1)
    refused = [
        json.loads(line)
        for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [item["name"] for item in refused] == ["000003.jpg", "000007.jpg"]
    assert refused[0]["reason"].startswith("truncated")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.num_images == 18
    assert manifest.num_quarantined == 2
    assert "000003.jpg" not in manifest.names
    for path in paths:
        path.write_text("no image")
    with pytest.raises(DataError, match="none of its 20 images can be used"):
        run(Job("folder", tmp_path / "all", "", tmp_path / "none"), max_bad=1)


def test_a_finished_or_begun_folder_is_kept_for_its_own_job(source, tmp_path, monkeypatch):
    job = Job("imagenet", source, "train", tmp_path / "out")
    other = Job("imagenet", source, "train", tmp_path / "out", encode=EncodeOptions(100))
    with monkeypatch.context() as patch:
        patch.setattr(convert, "assemble", broken(errno.ENOSPC))
        with pytest.raises(DataError, match=r"No space left.*make room and repeat the command"):
            run(job)
    with pytest.raises(DataError, match="not finished"):
        Manifest.load(tmp_path / "out")
    with pytest.raises(DataError, match="holds an unfinished conversion with size 256, not 100"):
        run(other)
    assert "continuing" in run(job)
    before = tree(tmp_path / "out")
    assert "already complete, 12 images" in run(job)
    with pytest.raises(DataError, match="holds a shard set with size 256, not 100"):
        run(other)
    assert tree(tmp_path / "out") == before


def broken(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_within_a_shard_leaves_nothing_half_written(source, tmp_path, monkeypatch):
    job = Job("imagenet", source, "train", tmp_path / "out")

    def fill(file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "write_shard", fill)
        with pytest.raises(DataError, match="No space left"):
            run(job)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not list((tmp_path / "out").rglob("*.tar"))
    run(job)
    assert verify(tmp_path / "out") == []


def test_a_limit_on_file_size_in_a_worker_is_one_sentence(tmp_path):
    write_random_images(tmp_path / "all", 40, sizes=[(200, 260)])
    arguments = command("folder", "--src", tmp_path / "all", "--out", tmp_path / "out")
    limited = ["bash", "-c", f"ulimit -f 100; exec {' '.join(arguments)} --workers 1"]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    again = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "continuing" in again.stdout


def test_a_source_that_changes_stops_it(tmp_path, monkeypatch):
    paths = write_random_images(tmp_path / "all", 5)
    job = Job("folder", tmp_path / "all", "", tmp_path / "out")
    listed = convert.list_source

    def list_then_change(*arguments):
        listing = listed(*arguments)
        paths[4].write_bytes(b"other")
        return listing

    with monkeypatch.context() as patch:
        patch.setattr(convert, "list_source", list_then_change)
        with pytest.raises(DataError, match=r"000004\.jpg: changed while it was being converted"):
            run(job)
    with pytest.raises(DataError, match="the source has changed since its conversion began"):
        run(job)


def test_targets_that_cannot_be(source, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        run(Job("imagenet", source, "train", tmp_path / "file"))
    with pytest.raises(DataError, match=r"holds files but no manifest\.json"):
        run(Job("imagenet", source, "train", tmp_path))
    with pytest.raises(DataError, match="lies within the source"):
        run(Job("imagenet", source, "train", source / "train" / "out"))
    with pytest.raises(DataError, match="cannot be written"):
        run(Job("imagenet", source, "train", Path("/proc/nowhere")))
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    with locked(work), pytest.raises(DataError, match="another conversion is writing here"):
        run(Job("imagenet", source, "train", tmp_path / "out"))


def test_verify_names_every_kind_of_damage(shards, tmp_path):
    assert verify(shards, workers=2) == []

    def damaged(name: str) -> Path:
        copy = tmp_path / name
        for path, data in tree(shards).items():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes(data)
        return copy

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


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    write_random_images(tmp_path / "coco" / "train2017", 4)
    arguments = ["coco", "--src", str(tmp_path / "coco"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--workers", "1", "--format", "dali", "--limit", "3"]) == 0
    said = capsys.readouterr()
    assert "is complete" in said.out
    assert Manifest.load(tmp_path / "out").formats == ("dali",)
    assert Manifest.load(tmp_path / "out").labels.tolist() == [-1, -1, -1]
    assert main([*arguments, "--format", "dali", "--limit", "3"]) == 0
    assert main([*arguments, "--format", "both", "--limit", "3"]) == 2
    assert "holds a shard set with format dali, not ffcv+dali" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "sizes.npy").write_bytes(b"")
    assert main(["verify", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "1 problem; convert it again" in capsys.readouterr().err
    assert main(["folder", "--src", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--quality", "200"])


def test_scenes_are_rendered_and_converted(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    out = tmp_path / "scenes"
    assert main(["scenes", "--out", str(out), "--count", "10", "--workers", "1"]) == 0
    assert (tmp_path / "scenes-source" / "annotations" / "instances_train2017.json").is_file()
    assert Manifest.load(out).num_images == 9  # a tenth is val


def test_large_records_get_larger_pages(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3200, 3), dtype=np.uint8)
    (tmp_path / "all").mkdir()
    Image.fromarray(noise).save(tmp_path / "all" / "big.jpg", quality=100, subsampling=0)
    Image.fromarray(random_image(50, 60, 0)).save(tmp_path / "all" / "small.jpg")
    assert (tmp_path / "all" / "big.jpg").stat().st_size > MIN_PAGE
    run(Job("folder", tmp_path / "all", "", tmp_path / "out", ("ffcv",), EncodeOptions(size=0)))
    assert verify(tmp_path / "out") == []
