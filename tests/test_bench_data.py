"""The data bench: what it counts, how it compares, and what it says of an arm that cannot run."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from dataprep.synthetic import write_random_images
from dense_ssl import bench_data
from dense_ssl.benches.task import AHEAD_BATCHES, MAX_FILES, WARM_BATCHES, Task, cpu_seconds


def task(**changes):
    fields = {
        "arm": "decode_only",
        "loader": "",
        "data": "",
        "files": "",
        "recipe": "2x224",
        "filter": "bilinear",
        "images": 8,
        "batch": 4,
        "workers": 1,
        "device": "cpu",
    }
    return Task(**(fields | changes))


def result(title, kind, cpu_ms, peer=False):
    return {
        "title": title,
        "filter": kind,
        "peer": peer,
        "images": 1000,
        "cpu_s": cpu_ms,
        "wall_s": cpu_ms / 2,
        "warm_s": 1.0,
    }


def test_table_compares_with_the_best_peer_of_the_same_filter():
    rounds = [
        result("ours", "bilinear", 1.0),
        result("ours", "bilinear", 30.0),
        result("ours", "bilinear", 1.5),
        result("ours", "bicubic", 2.0),
        result("Pillow", "bilinear", 3.0, peer=True),
        result("Pillow", "bicubic", 5.0, peer=True),
        result("FFCV", "area", 4.0, peer=True),
        result("decoding alone", "-", 0.5),
        {"title": "DALI", "filter": "bilinear", "peer": True, "absent": "nvidia is not installed"},
    ]
    lines = bench_data.table("2x224", rounds).splitlines()
    cells = {tuple(line.split()[:2]): line.split() for line in lines}
    assert cells["ours", "bilinear"][2] == "1.50"  # the median
    assert cells["ours", "bilinear"][3] == "667"
    assert cells["ours", "bilinear"][-1] == "2.00"  # Pillow's 3.0
    assert cells["ours", "bicubic"][-1] == "2.00"  # FFCV's 4.0
    assert cells["FFCV", "area"][-1] == "1.00"
    assert "DALI" in lines[-1]
    assert lines[-1].endswith("nvidia is not installed")
    order = [line.split()[0] for line in lines if line.startswith("  ")][2:]
    assert order == ["decoding", "ours", "ours", "Pillow", "FFCV", "Pillow", "DALI"]


def test_order_passes_over_all_images_again_and_again():
    rows = task(images=50, batch=8).order(10)
    assert rows.shape == (WARM_BATCHES + 7 + AHEAD_BATCHES, 8)
    passes = rows.ravel()[: rows.size // 10 * 10].reshape(-1, 10)
    assert (np.sort(passes, 1) == np.arange(10)).all()
    assert task().order(10 * MAX_FILES).max() < MAX_FILES


def test_processor_time_counts_children_alive_and_ended():
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    before = cpu_seconds(os.getpid())
    subprocess.run([sys.executable, "-c", burn], check=True)
    ended = cpu_seconds(os.getpid()) - before
    assert ended >= 0.25
    child = subprocess.Popen([sys.executable, "-c", burn + "input()"], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while cpu_seconds(child.pid) < 0.25 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cpu_seconds(child.pid) >= 0.25
    assert cpu_seconds(os.getpid()) - before - ended >= 0.25
    child.communicate(b"\n")


def test_end_to_end_with_an_arm_that_is_not_installed(tmp_path, monkeypatch, capsys):
    write_random_images(tmp_path / "images", 6)
    missing = tmp_path / "path" / "simplejpeg.py"
    missing.parent.mkdir()
    missing.write_text("raise ModuleNotFoundError('no', name='simplejpeg')")
    monkeypatch.setenv("PYTHONPATH", str(missing.parent))
    kept = [a for a in bench_data.ARMS if a.module in ("ours", "decode_only")]
    monkeypatch.setattr(bench_data, "ARMS", [a for a in kept if a.filter != "bicubic"])
    out = tmp_path / "rounds.jsonl"
    argv = f"--data {tmp_path / 'images'} --recipes 2x224 --rounds 1 --images 4 --batch 2"
    argv += f" --workers 1 --out {out} --only"
    assert bench_data.main([*argv.split(), "folder"]) == 0
    assert bench_data.main([*argv.split(), "ffcv"]) == 0
    assert bench_data.main([*argv.split(), "decoding"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    folder = [line for line in lines if line.get("loader") == "folder"]
    assert len(folder) == 1
    assert all(line["images"] >= 4 and line["cpu_s"] >= 0 for line in folder)
    assert all(line["cores"] and line["versions"]["torch"] for line in lines)
    text = capsys.readouterr().out
    assert "simplejpeg is not installed" in text
    assert "6 images, mean 115 x 115 px" in text
    shown = [line for line in lines if line.get("loader") == "ffcv"]
    assert all(
        "make shards" in line["absent"] or "not installed" in line["absent"] for line in shown
    )


@pytest.mark.parametrize("kind", ["absent", "empty"])
def test_bad_data_is_one_sentence(tmp_path, capsys, kind):
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    assert bench_data.main(["--data", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
