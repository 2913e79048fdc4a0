"""A source to a complete shard set: the same bytes whatever happens, read by everybody's readers."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataprep import assemble, convert
from dataprep.__main__ import main
from dataprep.encode import EncodeOptions
from dataprep.files import locked
from dataprep.job import Job
from dataprep.manifest import DataError, Manifest
from dataprep.synthetic import write_class_folders, write_random_images
from dataprep.verify import verify

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


def test_number_of_workers_does_not_show(source, tmp_path):
    for workers in (1, 2):
        out = tmp_path / str(workers)
        run(Job("imagenet", source, "train", out, encode=EncodeOptions(64, 80)), workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    write_copies(tmp_path / "all", 2000)
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
            time.sleep(takes * moments.uniform(0.3, 0.95))
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
        _, errors = process.communicate(timeout=120)
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
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "a worker process died (SIGKILL) while at 0" in errors
    assert "Traceback" not in errors


def write_copies(folder: Path, count: int) -> None:
    """Write the same few images again and again, under many names."""
    images = [path.read_bytes() for path in write_random_images(folder, 3)]
    for index in range(count):
        (folder / f"{index:06d}.jpg").write_bytes(images[index % 3])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
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
