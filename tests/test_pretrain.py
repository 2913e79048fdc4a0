"""The loop as its user meets it: it resumes to the bit, stops when told, and refuses in one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dataprep.synthetic import write_random_images
from dense_ssl import checkpoint, pretrain
from tests.ranks import train_on_ranks

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """
method:
  name: {method}
  views: [{{name: global, count: 2, size: 64, photometric: moco_v2}}]
  backbone: {{name: {backbone}, init: {init}, bn_groups: {groups}}}
  hidden_dim: 16
  out_dim: 8
  queue_length: 32
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{lr: {{start: 0.1, per: step, warmup_epochs: 0.5}}}}
train: {{epochs: 4, batch_size: 8, precision: fp32}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 3, log_every_steps: 2, log: []}}
"""


DISTILLED = """method={{
  name: {name}, out_dim: 32, hidden_dim: 24, bottleneck_dim: 8, views: [
    {{name: global, count: 2, size: 64, photometric: [dino_1, dino_2]}},
    {{name: local, count: 2, size: 32, photometric: dino_local}}],
  backbone: {{name: test_vit, init: dino, positions: dino, drop_path: {drop_path}}}}}
"""
ADAMW = ("optim.name=adamw", "optim.clip={kind: per_tensor, norm: 0.3}", "optim.lr.start=0.002")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_random_images(folder, 44)  # 5 steps of 8 an epoch, 4 images dropped
    return folder


@pytest.fixture
def recipe(images, tmp_path):
    def write(run, method="densecl", backbone="test_resnet", init="fan_in", groups=2):
        path = tmp_path / f"{run}.yaml"
        path.write_text(
            RECIPE.format(
                method=method, backbone=backbone, init=init, groups=groups,
                images=images, run=tmp_path / run,
            )
        )  # fmt: skip
        return str(path)

    return write


def run(capsys, *argv):
    """Run in this process; return exit code, last line of stdout, and stderr."""
    code = pretrain.main(list(argv))
    out, err = capsys.readouterr()
    return code, out.strip().splitlines()[-1] if out.strip() else "", err


def start(*argv):
    return subprocess.Popen(
        [sys.executable, "-m", "dense_ssl.pretrain", *argv],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timing = {"images_per_s", "data_wait", "eta_s"}
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def wait_for_step(folder, step, process, timeout=120):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if log_of(folder)[-1]["step"] >= step:
                return
        except (OSError, ValueError, IndexError):
            pass
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    pytest.fail(f"step {step} not reached in {timeout} s")


def test_resumed_at_any_step_it_ends_with_the_same_weights_and_log(recipe, tmp_path, capsys):
    code, want, _ = run(capsys, recipe("whole"), "train.steps=13")
    assert code == 0
    assert want.startswith("weights sha256: ")
    for stop in (1, 3, 5, 6, 12):  # before, at and after checkpoints, log lines and the epoch's end
        broken = recipe(f"at{stop}")
        assert run(capsys, broken, f"train.steps={stop}")[0] == 0
        code, got, err = run(capsys, broken, "train.steps=13")
        assert (code, got) == (0, want)
        assert f"resuming at step {stop} of 13" in err
        whole, resumed = log_of(tmp_path / "whole"), log_of(tmp_path / f"at{stop}")
        # a run stopped at an odd step also logs that step; every other line is the same to the bit
        extra = [line["step"] for line in resumed if line not in whole]
        assert [line for line in whole if line not in resumed and line["step"] > stop + 1] == []
        assert all(step in (stop, stop + 1) for step in extra)


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "set"
    command = [
        "folder",
        "--src",
        str(images),
        "--out",
        str(out),
        "--format",
        "both",
        "--size",
        "96",
    ]
    subprocess.run(
        [sys.executable, "-m", "dataprep", *command], cwd=ROOT, check=True, capture_output=True
    )
    return out


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param("ffcv", marks=pytest.mark.ffcv),
        pytest.param("dali", marks=pytest.mark.dali),
        "folder",
    ],
)
def test_every_loader_resumes_to_the_bit(recipe, shards, capsys, loader):
    if loader != "folder":
        pytest.importorskip({"ffcv": "ffcv", "dali": "nvidia.dali"}[loader])
    data = (f"data.path={shards}", f"data.loader={loader}", "data.workers=1")
    _, want, _ = run(capsys, recipe(f"{loader}-whole"), *data, "train.steps=9")
    for stop in (4, 5):  # within an epoch and at its end
        path = recipe(f"{loader}-{stop}")
        assert run(capsys, path, *data, f"train.steps={stop}")[0] == 0
        code, got, _ = run(capsys, path, *data, "train.steps=9")
        assert (code, got) == (0, want)


def test_a_finished_run_says_so_again(recipe, capsys):
    path = recipe("twice")
    _, first, _ = run(capsys, path, "train.steps=4")
    code, second, _ = run(capsys, path, "train.steps=4")
    assert (code, second) == (0, first)


def test_log_lines_hold_what_scripts_rely_on(recipe, tmp_path, capsys):
    run(capsys, recipe("log"), "train.steps=4")
    for line in map(json.loads, (tmp_path / "log" / "log.jsonl").read_text().splitlines()):
        assert {"step", "epoch", "loss", "lr", "images_per_s", "data_wait"} <= line.keys()
        assert 0 <= line["data_wait"] <= 1
        assert line["images_per_s"] > 0


def test_the_saved_configuration_repeats_the_run(recipe, tmp_path, capsys):
    _, want, _ = run(capsys, recipe("first"), "train.steps=4", "optim.lr=0.05")
    saved = tmp_path / "first" / "config.yaml"
    code, got, _ = run(capsys, str(saved), f"run.dir={tmp_path / 'second'}")
    assert (code, got) == (0, want)


def test_it_starts_from_a_whole_state_or_a_backbone(recipe, tmp_path, capsys):
    from dense_ssl.weights.official import to_official

    run(capsys, recipe("before", backbone="resnet18"), "train.steps=3")
    saved = checkpoint.load_newest(tmp_path / "before" / "checkpoints")
    official = tmp_path / "official.pth"
    torch.save({"state_dict": to_official("densecl", saved["method"])}, official)
    options = ("train.steps=1", "optim.lr=0")
    for name, path in (("ours", tmp_path / "before"), ("official", official)):
        code, _, err = run(
            capsys, recipe(name, backbone="resnet18"), *options, f"train.init={path}"
        )
        assert code == 0
        assert "starting from the densecl state" in err
        after = checkpoint.load_newest(tmp_path / name / "checkpoints")["method"]
        for key, value in saved["method"].items():
            if "student." in key and "running" not in key and "num_batches" not in key:
                assert torch.equal(after[key], value), key
    code, _, err = run(
        capsys,
        recipe("other", method="moco", backbone="resnet18"),
        *options,
        f"train.init={official}",
    )
    assert code == 0
    assert "heads and queues are fresh" in err
    code, _, err = run(
        capsys, recipe("bad", backbone="resnet18"), "method.out_dim=4", f"train.init={official}"
    )
    assert code == 2
    assert "does not fit this recipe" in err


def test_accumulation_and_precision_and_compression_run(recipe, capsys):
    assert run(capsys, recipe("a"), "train.steps=2", "train.accumulate=2")[0] == 0
    assert run(capsys, recipe("b"), "train.steps=2", "train.precision=bf16")[0] == 0
    assert run(capsys, recipe("c", method="moco"), "train.steps=2", "optim.name=lars")[0] == 0
    assert run(capsys, recipe("d"), "train.steps=2", "run.checkpoint_gradients=true")[0] == 0


@pytest.mark.slow
def test_sigkill_of_two_ranks_and_resume_is_the_undisturbed_run(recipe, tmp_path):
    want, _ = train_on_ranks(2, [recipe("whole", groups=1)], tmp_path)
    broken = recipe("broken", groups=1)
    process = start(broken, "--gpus", "2")
    wait_for_step(tmp_path / "broken", 8, process)
    for pid in ranks_below(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=240)
    assert process.returncode != 0
    got, said = train_on_ranks(2, [broken], tmp_path)
    assert got == want, said
    assert want.startswith("weights sha256: ")
    assert "resuming at step" in said
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_workers_end_with_a_killed_run(recipe, tmp_path):
    process = start(recipe("orphans"), "data.workers=1", "train.epochs=4000")
    wait_for_step(tmp_path / "orphans", 2, process)
    below = ranks_below(process.pid)
    assert below
    process.kill()
    process.communicate(timeout=240)  # returns only when nobody holds its pipes any more
    deadline = time.monotonic() + 120
    while alive := [pid for pid in below if is_alive(pid)]:
        assert time.monotonic() < deadline, f"{alive} of {below} outlive the run"
        time.sleep(0.1)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ranks_below(pid):
    """Return the processes below `pid`, whichever of its threads started them."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for found in lists for child in found]
    return children + [below for child in children for below in ranks_below(child)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loader", "ranks"),
    [
        ("folder", 1),
        ("folder", 2),
        pytest.param("ffcv", 1, marks=pytest.mark.ffcv),
        pytest.param("dali", 1, marks=pytest.mark.dali),
    ],
)
def test_a_signal_to_every_process_of_a_run_saves_exits_with_75_and_resumes(
    recipe, shards, tmp_path, capsys, loader, ranks
):
    """As Slurm sends it: to the run, its ranks, the loader's workers and those who start them."""
    if loader != "folder":
        pytest.importorskip({"ffcv": "ffcv", "dali": "nvidia.dali"}[loader])
    path = recipe("stopped", groups=1)
    # Four passes a step: more batches than are ready when the signal comes.
    data = (f"data.path={shards}", f"data.loader={loader}", "data.workers=1", "train.accumulate=4")
    long = (*data, "train.epochs=400", "run.checkpoint_every_steps=100000", "watch.on=false")
    process = start(path, *long, "--gpus", str(ranks))
    wait_for_step(tmp_path / "stopped", 2, process)
    for pid in [process.pid, *ranks_below(process.pid)]:
        os.kill(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 75, err
    assert "the same command resumes" in err
    assert not any(word in err for word in ("rror", "Traceback", "Warning", "worker")), err
    saved = checkpoint.load_newest(tmp_path / "stopped" / "checkpoints")["step"]
    assert saved >= 2
    if (loader, ranks) == ("folder", 1):
        code, _, err = run(capsys, path, *long, "data.workers=0", f"train.steps={saved + 1}")
        assert code == 0
        assert f"resuming at step {saved}" in err


@pytest.mark.parametrize("name", ["densecl", "ibot", "dino"])
def test_two_ranks_are_one_rank_with_the_batch_doubled(recipe, tmp_path, capsys, name):
    """Where no BatchNorm ties samples together, the split over ranks changes rounding only."""
    vit = {"backbone": "test_vit", "init": "timm", "groups": 1}
    options = ("train.steps=6", "run.log_every_steps=1")
    if name == "densecl":
        options += ("optim.lr=0.02",)
    else:
        options += (DISTILLED.format(name=name, drop_path=0), *ADAMW)
    train_on_ranks(2, [recipe("two", **vit), *options], tmp_path)
    assert run(capsys, recipe("one", **vit), *options)[0] == 0
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-4)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["optim.lr=0.2"], "holds a run with other settings: optim.lr.start (0.1 there, 0.2 now)"),
        (["train.batch_size=4"], "train.batch_size (8 there, 4 now)"),
    ],
)
def test_resuming_with_another_recipe_is_refused(recipe, capsys, overrides, sentence):
    path = recipe("kept")
    run(capsys, path, "train.steps=1")
    code, _, err = run(capsys, path, "train.steps=2", *overrides)
    assert code == 2
    assert sentence in err
    assert "another RUN" in err
    assert run(capsys, path, "train.steps=2")[0] == 0  # nothing was lost


def test_a_run_saved_before_a_setting_existed_resumes_with_its_default(recipe, tmp_path, capsys):
    path = recipe("older")
    assert run(capsys, path, "train.steps=2")[0] == 0
    folder = tmp_path / "older" / "checkpoints"
    payload = checkpoint.load_newest(folder)
    del payload["config"]["data"]["cut"]
    del payload["config"]["method"]["backbone"]["class_tokens"]
    checkpoint.save(folder, payload, keep=2)
    code, _, err = run(capsys, path, "train.steps=3")
    assert code == 0, err
    assert "resuming at step 2" in err


def test_resuming_on_other_data_is_refused(recipe, tmp_path, capsys):
    path = recipe("kept")
    run(capsys, path, "train.steps=1")
    write_random_images(tmp_path / "others", 20)
    code, _, err = run(capsys, path, "train.steps=2", f"data.path={tmp_path / 'others'}")
    assert code == 2
    assert "was trained on 44 images" in err


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["train.batch_size=64"], "44 images, fewer than one global batch"),
        (["run.device=cuda"], "run.device"),
        (["run.kernels=triton"], "TRITON_INTERPRET=1"),
        (["run.dir=/proc/nowhere"], "/proc/nowhere"),
        (["optim.lrr=1"], "did you mean optim.lr"),
        (["method.queue_length=4"], "method.queue_length: 4 is shorter than the 8 keys"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(recipe, capsys, overrides, sentence):
    code, out, err = run(capsys, recipe("bad"), *overrides)
    assert code == 2
    assert out == ""
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    assert sentence in message[0]
    assert "Traceback" not in err


def test_divergence_stops_before_it_is_saved(recipe, tmp_path, capsys):
    path = recipe("diverged")
    run(capsys, path, "train.steps=2")
    code, _, err = run(capsys, path, "train.steps=20")
    assert code == 0
    worse = recipe("worse")
    code, _, err = run(capsys, worse, "optim.lr=1e30", "train.steps=12")
    assert code == 2
    assert "training diverged" in err
    saved = checkpoint.load_newest(tmp_path / "worse" / "checkpoints")
    assert saved is None or all(
        value.isfinite().all() for value in saved["method"].values() if value.is_floating_point()
    )


def test_two_processes_cannot_train_in_one_run(recipe, tmp_path, capsys):
    import fcntl

    path = recipe("held")
    (tmp_path / "held").mkdir()
    with (tmp_path / "held" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = run(capsys, path, "train.steps=1")
        assert code == 2
        assert "another process is training" in err
