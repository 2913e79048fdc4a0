"""Short memory halves micro-batches, and what comes of it is what more accumulation would have made."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from dataprep.synthetic import write_random_images
from dense_ssl import pretrain
from dense_ssl.config import GaveUp, UserError, validate
from dense_ssl.crops import MultiCropBatch
from dense_ssl.distributed import World
from dense_ssl.loaders import DataConfig, make_loader
from dense_ssl.loaders.order import Order
from dense_ssl.methods.moco import MoCo
from dense_ssl.micro_batches import MicroBatches, cut, limited, noted
from dense_ssl.run_config import RunConfig
from dense_ssl.shares import shared
from dense_ssl.views import ViewSpec

VIEWS = (
    ViewSpec(name="global", count=2, size=32),
    ViewSpec(name="extra", count=2, size=32, twin_of="global", part=0.5),
    ViewSpec(name="local", count=3, size=16, scale=(0.05, 0.4)),
)
RECIPE = """
method:
  name: moco
  views: [{{name: global, count: 2, size: 32, photometric: moco_v2}}]
  backbone: {{name: test_resnet, init: fan_in, bn_images: 2}}
  hidden_dim: 16
  out_dim: 8
  queue_length: 16
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{lr: 0.05}}
train: {{epochs: 3, batch_size: 8, precision: fp32}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 2, log_every_steps: 1, log: []}}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_random_images(folder, 24, sizes=((40, 48), (48, 40)))
    return folder


@pytest.fixture
def recipe(images, tmp_path):
    def write(run):
        path = tmp_path / f"{run}.yaml"
        path.write_text(RECIPE.format(images=images, run=tmp_path / run))
        return str(path)

    return write


@pytest.fixture
def room(monkeypatch):
    """Let forward passes fail from a step on that are of more images than there is room for."""
    forward = MoCo.forward

    def install(largest, since):
        def limited(self, batch, step):
            output = forward(self, batch, step)
            if step.index >= since and len(batch.index) > largest:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. And")
            return output

        monkeypatch.setattr(MoCo, "forward", limited)

    return install


def run(capsys, *argv):
    code = pretrain.main(list(argv))
    out, err = capsys.readouterr()
    return code, out.strip().splitlines()[-1] if out.strip() else "", err


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def batches_of(images, accumulate):
    data = DataConfig(path=str(images), loader="folder", workers=0)
    loader = make_loader(data, VIEWS, Order(24, 8, accumulate=accumulate), torch.device("cpu"))
    return [batch for batch in loader.epoch(0) if isinstance(batch, MultiCropBatch)]


def test_pieces_are_what_the_loader_gives_for_more_accumulation(images):
    whole, wanted = batches_of(images, 1), batches_of(images, 2)
    pieces = [piece for batch in whole for piece in cut(batch, VIEWS, 2)]
    assert len(pieces) == len(wanted) == 6
    for piece, want in zip(pieces, wanted):
        assert torch.equal(piece.index, want.index)
        assert piece.views.keys() == want.views.keys()
        for name, crops in want.views.items():
            assert torch.equal(piece.views[name].images, crops.images)
            assert torch.equal(piece.views[name].boxes, crops.boxes)
            assert torch.equal(piece.views[name].flipped, crops.flipped)


def test_a_step_that_does_not_fit_goes_on_in_halves(recipe, room, tmp_path, capsys):
    assert run(capsys, recipe("by hand"), "train.steps=4")[0] == 0
    code, want, _ = run(capsys, recipe("by hand"), "train.accumulate=2")
    assert code == 0
    room(4, since=4)
    code, got, err = run(capsys, recipe("halved"))
    assert (code, got) == (0, want)
    assert losses(tmp_path / "halved") == losses(tmp_path / "by hand")
    assert err.count("out of memory") == 1
    assert "from here on 2 micro-batches of 4 images" in err
    # stopped after the halving, it goes on in halves without meeting the error again
    assert run(capsys, recipe("stopped"), "train.steps=6")[0] == 0
    code, got, err = run(capsys, recipe("stopped"))
    assert (code, got) == (0, want)
    assert "out of memory" not in err


def test_what_cannot_be_halved_is_refused_in_one_sentence(recipe, room, tmp_path, capsys):
    room(1, since=3)
    code, _, err = run(capsys, recipe("small"))
    assert code == 2
    sentence = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(sentence) == 1
    assert "CUDA out of memory: take run.checkpoint_gradients=true or a smaller" in sentence[0]
    assert "Traceback" not in err
    assert err.count("from here on") == 2  # four images, two; one is no batch for BatchNorm
    room(1000, since=0)
    assert run(capsys, recipe("small"))[0] == 0  # nothing was lost


@pytest.mark.parametrize(("bn_images", "groups"), [(2, [4, 2, 1]), (None, [2, 2])])
def test_halves_are_in_groups_of_as_many_images_as_asked(images, tmp_path, bn_images, groups):
    text = RECIPE.format(images=images, run=tmp_path)
    alone = World(rank=0, size=1, device=torch.device("cpu"), flags=None)
    config = shared(validate(RunConfig, yaml.safe_load(text), "test"), ranks=1)
    backbone = config.method.backbone.model_copy(update={"bn_groups": groups[0]})
    method = config.method.model_copy(update={"backbone": backbone})
    config = config.model_copy(update={"method": method})
    micro_batches = MicroBatches(config, 8, alone, bn_images)
    found = [micro_batches.bn_groups]
    with pytest.raises(UserError):
        while True:
            micro_batches.halve(torch.OutOfMemoryError("CUDA out of memory."))
            found.append(micro_batches.bn_groups)
    assert found == groups


def test_several_ranks_leave_a_note_for_the_next_start(images, tmp_path):
    text = RECIPE.format(images=images, run=tmp_path)
    config = validate(RunConfig, yaml.safe_load(text), "test")
    alone = World(rank=0, size=1, device=torch.device("cpu"), flags=None)
    assert noted(config) is None
    assert limited(config, alone) == config
    with pytest.raises(GaveUp, match=r"takes 4 images at a time, as with train\.micro_batch=4"):
        MicroBatches(config, micro_batch=8, world=replace(alone, rank=1, size=2)).halve(
            torch.OutOfMemoryError("CUDA out of memory.")
        )
    assert noted(config) == 4
    assert shared(limited(config, alone), ranks=1).train.accumulate == 2
    (tmp_path / "micro_batch.json").write_text("{}")
    assert noted(config) is None
