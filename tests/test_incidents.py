"""A step whose gradient is not finite changes nothing, is kept, and can be repeated."""

import copy
import json

import pytest
import torch
import yaml

from dataprep.synthetic import write_random_images
from dense_ssl import checkpoint, pretrain, replay
from dense_ssl.config import validate
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.incidents import BUNDLES, StepGuard
from dense_ssl.methods import make_method
from dense_ssl.methods.moco import MoCo
from dense_ssl.run_config import RunConfig
from dense_ssl.schedule import Step

RECIPE = """
method:
  name: moco
  views: [{{name: global, count: 2, size: 32, photometric: moco_v2}}]
  backbone: {{name: test_resnet, init: fan_in, bn_groups: 2}}
  hidden_dim: 16
  out_dim: 8
  queue_length: 16
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{lr: 0.05}}
train: {{epochs: 4, batch_size: 8, accumulate: 2, precision: fp32}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 2, log_every_steps: 1, log: [], max_refused: 3}}
"""
POISONED = 7  # the image whose crops turn to NaN


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_random_images(folder, 24)  # 3 steps of 8 an epoch
    return folder


@pytest.fixture
def recipe(images, tmp_path):
    def write(run):
        path = tmp_path / f"{run}.yaml"
        path.write_text(RECIPE.format(images=images, run=tmp_path / run))
        return str(path)

    return write


@pytest.fixture
def poison(monkeypatch):
    """Let the crops of some images be NaN once a step is reached."""
    forward = MoCo.forward

    def install(images, since=0):
        def poisoned(self, batch, step):
            hit = torch.isin(batch.index, torch.tensor(images))
            if hit.any() and step.index >= since:
                crops = batch.views["global"]
                bad = crops.images.masked_fill(hit[None, :, None, None, None], float("nan"))
                views = {"global": Crops(bad, crops.boxes, crops.flipped)}
                batch = MultiCropBatch(views, batch.index, batch.label)
            return forward(self, batch, step)

        monkeypatch.setattr(MoCo, "forward", poisoned)

    return install


def run(capsys, *argv):
    code = pretrain.main(list(argv))
    out, err = capsys.readouterr()
    return code, out.strip().splitlines()[-1] if out.strip() else "", err


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_goes_on_without_the_step_and_resumes_to_the_bit(recipe, poison, tmp_path, capsys):
    poison([POISONED], since=3)  # once in each of three epochs
    code, want, err = run(capsys, recipe("whole"), "train.steps=12")
    assert code == 0
    assert err.count("refused: its gradient is not finite") == 3
    assert "python -m dense_ssl.replay" in err
    log = lines_of(tmp_path / "whole" / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 13))
    assert log[-1]["refused"] == 3
    assert sum("loss" not in line for line in log) == 3
    saved = checkpoint.load_newest(tmp_path / "whole" / "checkpoints")
    assert all(v.isfinite().all() for v in saved["method"].values() if v.is_floating_point())
    records = lines_of(tmp_path / "whole" / "incidents" / "incidents.jsonl")
    assert [record["kind"] for record in records] == ["gradient not finite"] * 3
    assert len({record["step"] // 3 for record in records}) == 3  # an epoch each
    for stop in (records[0]["step"], records[0]["step"] + 1):  # just before, and just after
        assert run(capsys, recipe(f"at{stop}"), f"train.steps={stop}")[0] == 0
        assert run(capsys, recipe(f"at{stop}"), "train.steps=12")[:2] == (0, want)


def test_a_refused_step_changes_nothing(images, tmp_path):
    text = RECIPE.format(images=images, run=tmp_path / "guarded")
    config = validate(RunConfig, yaml.safe_load(text), "test")
    torch.manual_seed(0)
    method = make_method(config.method)
    guard, scaler = StepGuard(method, config, rank=0), torch.amp.GradScaler("cpu", enabled=False)
    pixels = torch.randn(2, 8, 3, 32, 32)
    boxes = torch.tensor([0.0, 0, 1, 1]).expand(2, 8, 4)
    for bad in (False, True):
        pixels[0, 0] = float("nan") if bad else 0.0
        crops = Crops(pixels.clone(), boxes, torch.zeros(2, 8, dtype=torch.bool))
        batch = MultiCropBatch({"global": crops}, torch.arange(8), torch.full((8,), -1))
        before = copy.deepcopy(method.state_dict())
        guard.begin()
        guard.seen(batch)
        step = Step(0, 3, 4)
        output = method(batch, step)
        output.loss.backward()
        moved = [k for k, v in method.state_dict().items() if not torch.equal(v, before[k])]
        assert moved
        assert guard.accepts(scaler) is not bad
        if bad:
            guard.refuse(step, 0, [{"loss": output.loss}])
            state = method.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in before.items())
        method.zero_grad()
    assert guard.counted() == {"refused": 1}


def test_too_many_in_a_row_end_the_run_in_one_sentence(recipe, poison, tmp_path, capsys):
    poison(list(range(24)), since=4)
    code, _, err = run(capsys, recipe("diverged"))
    assert code == 2
    assert "the gradients of 3 steps in a row, up to 6, are not finite" in err
    assert "Traceback" not in err
    assert checkpoint.load_newest(tmp_path / "diverged" / "checkpoints")["step"] <= 6
    bundles = list((tmp_path / "diverged" / "incidents").glob("*.pt"))
    assert len(bundles) == min(3, BUNDLES)


def test_a_bundle_repeats_its_step_and_names_where_it_starts(recipe, poison, tmp_path, capsys):
    poison([POISONED])
    assert run(capsys, recipe("kept"), "train.steps=3")[0] == 0
    (bundle,) = (tmp_path / "kept" / "incidents").glob("*.pt")
    assert replay.main([str(bundle), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "loss[0] nan" in out or "loss[1] nan" in out
    assert "the first that is not finite: student.backbone.trunk.conv1" in out
    assert "gradients that are not finite: student.backbone" in out
    # a healthy step: the same losses as training had, to the bit
    found = replay.repeat(replay.read_bundle(bundle), torch.device("cpu"))
    record = lines_of(tmp_path / "kept" / "incidents" / "incidents.jsonl")[0]
    healthy = {k: v for k, v in record["losses"].items() if v == v}
    assert healthy
    assert {k: found.losses[k] for k in healthy} == healthy


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_bundle_that_is_none_is_refused(damage, tmp_path, capsys):
    path = tmp_path / "step-00000001-rank0.pt"
    if damage == "cut":
        torch.save({"format": "dense_ssl-replay/1", "x": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:1500])
    if damage == "other":
        torch.save({"format": "something"}, path)
    assert replay.main([str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}")
    assert err.count("\n") == 1


def test_a_disk_without_room_costs_the_bundle_not_the_run(recipe, poison, tmp_path, capsys):
    poison([POISONED])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "incidents").write_text("in the way")
    code, _, err = run(capsys, recipe("full"), "train.steps=3")
    assert code == 0
    assert "no bundle written" in err
