"""A checkpoint that is copied while the next step runs is the one that a loop which waits would save."""

import shutil
import time

import pytest
import torch

from dataprep.synthetic import write_random_images
from dense_ssl import checkpoint, checkpoint_writer, pretrain
from dense_ssl.checkpoint_writer import CheckpointWriter
from dense_ssl.config import UserError

RECIPE = """
method:
  name: moco
  views: [{{name: global, count: 2, size: 32, photometric: moco_v2}}]
  backbone: {{name: test_resnet, init: fan_in, bn_groups: 2}}
  hidden_dim: 16
  out_dim: 8
  queue_length: 16
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{name: adamw, lr: 0.01}}
train: {{epochs: 4, batch_size: 8, precision: fp32}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 2, keep_checkpoints: 9, log_every_steps: 9, log: []}}
"""


@pytest.fixture
def writer(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "LATE_BYTES", 0)
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=9, keep_every=None)
    yield writer
    writer.close()


@pytest.fixture
def slow(monkeypatch):
    """Let the thread begin its copy long after the loop has gone on."""
    copy = CheckpointWriter._all_copied

    def later(self, begun, ready):
        time.sleep(0.2)
        return copy(self, begun, ready)

    monkeypatch.setattr(CheckpointWriter, "_all_copied", later)


def test_what_passes_move_is_copied_at_once_and_the_rest_before_it_may_change(writer, slow):
    weight, mean = torch.randn(50, 3), torch.randn(4)
    want = {"a.weight": weight.clone(), "a.running_mean": mean.clone()}
    for step in (1, 2):  # new buffers, and those of the copy before
        state = {"a.weight": weight, "a.running_mean": mean}
        writer.save({"step": step, "method": state, "groups": [{"lr": step, "betas": (0.9, 0.99)}]})
        mean.add_(1)  # as a forward pass may
        writer.finish_copy()
        weight.mul_(2)  # as the optimiser does
        writer.wait()
        saved = checkpoint.load_newest(writer._folder)
        assert saved["step"] == step
        assert saved["groups"] == [{"lr": step, "betas": (0.9, 0.99)}]
        assert all(torch.equal(saved["method"][name], value) for name, value in want.items())
        want = {"a.weight": weight.clone(), "a.running_mean": mean.clone()}


def test_a_save_does_not_wait_for_the_copy(writer, monkeypatch):
    order = []
    copy = CheckpointWriter._all_copied

    def later(self, begun, ready):
        time.sleep(0.2)
        order.append("copied")
        return copy(self, begun, ready)

    monkeypatch.setattr(CheckpointWriter, "_all_copied", later)
    writer.save({"step": 1, "method": {"weight": torch.ones(9)}})
    order.append("passes")
    writer.finish_copy()
    order.append("optimiser")
    assert order == ["passes", "copied", "optimiser"]


def test_an_error_in_the_thread_lets_the_loop_go_on_and_is_said_at_the_next_save(
    writer, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        writer.save({"step": 1})
        writer.finish_copy()
        with pytest.raises(UserError, match="No space left on device"):
            writer.save({"step": 2})
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "_all_copied", full)
        writer.save({"step": 3})
        writer.finish_copy()
        with pytest.raises(OSError, match="No space"):
            writer.wait()
    writer.save({"step": 4})
    writer.wait()
    assert checkpoint.load_newest(writer._folder)["step"] == 4


def test_a_run_saves_the_same_bytes_as_one_that_waits_for_every_copy(
    tmp_path, monkeypatch, capsys, request
):
    write_random_images(tmp_path / "images", 24)  # 3 steps an epoch
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(images=tmp_path / "images", run=tmp_path / "run"))

    def saved(late_bytes):
        monkeypatch.setattr(checkpoint_writer, "LATE_BYTES", late_bytes)
        assert pretrain.main([str(path), "train.steps=6"]) == 0
        files = sorted((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
        assert [file.name for file in files] == [f"step-0000000{n}.pt" for n in (2, 4, 6)]
        found = [file.read_bytes() for file in files]
        shutil.rmtree(tmp_path / "run")
        return found

    want = saved(1 << 40)  # nothing is left to the thread
    request.getfixturevalue("slow")
    assert saved(0) == want
