"""Every method's refused step leaves a bundle that repeats it, by the command that the run has named."""

import json
import math

import pytest
import torch

from dataprep.synthetic import write_random_images
from dense_ssl import pretrain, replay
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.methods import METHODS
from tests.test_resume import METHODS_BY_NAME, RECIPE

BAD_STEP, BAD_MICRO = 2, 1  # in the second epoch, where what begins late has begun


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_random_images(folder, 16)  # 2 steps of 8 an epoch
    return folder


@pytest.mark.parametrize("name", METHODS_BY_NAME)
def test_a_refused_step_of_every_method_is_repeated(name, images, tmp_path, monkeypatch, capsys):
    views, backbone, more = METHODS_BY_NAME[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(
        RECIPE.format(
            name=name, views=views, backbone=backbone, more=more,
            images=images, run=tmp_path / "run",
        )
    )  # fmt: skip
    method = METHODS[name]
    forward = method.forward

    def poisoned(self, batch, step):
        if (step.index, step.micro) == (BAD_STEP, BAD_MICRO):
            bad = {}
            for view, crops in batch.views.items():
                pixels = crops.images.clone()
                pixels[:, -1] = float("nan")  # of one image
                bad[view] = Crops(pixels, crops.boxes, crops.flipped)
            batch = MultiCropBatch(bad, batch.index, batch.label)
        return forward(self, batch, step)

    monkeypatch.setattr(method, "forward", poisoned)
    assert pretrain.main([str(path), "train.steps=3", "train.accumulate=2"]) == 0
    said = capsys.readouterr().err
    (bundle,) = (tmp_path / "run" / "incidents").glob("*.pt")
    assert f"python -m dense_ssl.replay {bundle} repeats it" in said

    assert replay.main([str(bundle), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    first = "trunk.conv1" if backbone.startswith("{name: test_resnet") else "patch_embed"
    (named,) = [line for line in out.splitlines() if line.startswith("the first that is not")]
    assert first in named
    assert "gradients that are not finite: student." in out

    found = replay.repeat(replay.read_bundle(bundle), torch.device("cpu")).losses
    (line,) = (tmp_path / "run" / "incidents" / "incidents.jsonl").read_text().splitlines()
    noted = json.loads(line)["losses"]
    assert found.keys() == noted.keys()
    assert math.isnan(noted[f"loss[{BAD_MICRO}]"])
    assert math.isnan(found[f"loss[{BAD_MICRO}]"])
    healthy = {key: value for key, value in noted.items() if math.isfinite(value)}
    assert f"loss[{1 - BAD_MICRO}]" in healthy
    assert {key: found[key] for key in healthy} == healthy  # to the bit
