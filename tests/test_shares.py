"""One recipe on any number of ranks: the same batch, passes that fit, BatchNorm's groups as they were."""

import json
from pathlib import Path

import pytest
import torch

from dataprep.synthetic import write_random_images
from dense_ssl import pretrain
from dense_ssl.config import UserError, load
from dense_ssl.distributed import World
from dense_ssl.loaders.order import Order
from dense_ssl.micro_batches import limited
from dense_ssl.run_config import RunConfig, TrainConfig
from dense_ssl.shares import groups_of, passes, shared

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
RANKS = (1, 2, 4, 8)
SMALL = """
method:
  name: revisiting
  views:
    - {{name: global, count: 2, size: 32, scale: [0.2, 1.0], photometric: [moco_v2_autoaugment, moco_v2]}}
    - {{name: small, count: 2, size: 32, scale: [0.05, 0.14], photometric: moco_v2_autoaugment,
       near: {{kind: overlap, of: "global[1]", amount: 0.1}}}}
  backbone: {{name: test_resnet, init: fan_out, bn_images: 4}}
  hidden_dim: 16
  out_dim: 8
  queue_length: 32
  aux_neighbours: 3
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{lr: 0.05}}
train: {{epochs: 3, batch_size: 16, precision: fp32}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 100, log_every_steps: 1, log: []}}
"""


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_the_same_training_on_any_gpus(recipe, ranks):
    given = load(RunConfig, recipe, ("data.path=x", "run.dir=y"))
    config = shared(given, ranks)
    train, asked = config.train, given.method.backbone.bn_images
    order = Order(10_000, train.batch_size, ranks, accumulate=train.accumulate)
    assert train.batch_size == given.train.batch_size
    assert order.micro_batch <= (train.micro_batch or train.batch_size)
    if asked is not None:
        per_group = order.micro_batch // config.method.backbone.bn_groups
        assert per_group == min(asked, order.micro_batch)
        assert ranks * config.method.backbone.bn_groups > 1  # there is something to shuffle


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "accumulate", "ranks", "want"),
    [
        (1024, 64, 1, 8, 2), (1024, 64, 1, 1, 16), (1024, None, 1, 1, 1), (1024, None, 4, 2, 4),
        (1024, 64, 4, 8, 4),  # more micro-batches than needed, where they are asked for
        (96, 64, 1, 1, 2), (100, 64, 1, 2, 1), (100, 30, 1, 2, 2), (14, 4, 1, 2, 7), (2, 1, 1, 2, 1),
        (10, 4, 3, 2, 5),
    ],
)  # fmt: skip
def test_passes_are_the_fewest_that_fit_and_divide(
    batch_size, micro_batch, accumulate, ranks, want
):
    train = TrainConfig(batch_size=batch_size, micro_batch=micro_batch, accumulate=accumulate)
    assert passes(train, ranks) == want


def test_ranks_that_do_not_divide_the_batch_are_refused_as_ever():
    train = TrainConfig(batch_size=1024, micro_batch=64)
    with pytest.raises(UserError, match="1024 does not divide among 3 ranks"):
        Order(10_000, train.batch_size, 3, accumulate=passes(train, 3))


@pytest.mark.parametrize(
    ("images", "wanted", "want"), [(256, 32, 8), (32, 32, 1), (16, 32, 1), (100, 32, 2), (7, 2, 1)]
)
def test_groups_are_equal_and_no_smaller_than_asked(images, wanted, want):
    assert groups_of(images, wanted) == want


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_on_fewer_gpus_a_pass_and_its_groups_stay_as_they_were(ranks):
    given = load(RunConfig, Path("configs/densecl.yaml"), ("data.path=x", "run.dir=y"))
    alone = World(rank=0, size=1, device=torch.device("cpu"), flags=None)
    config = shared(limited(given, alone, {"micro_batch": 32}), ranks)  # of eight
    order = Order(10_000, config.train.batch_size, ranks, accumulate=config.train.accumulate)
    assert (order.micro_batch, config.method.backbone.bn_groups) == (32, 1)


def test_groups_and_their_images_cannot_both_be_given():
    changed = ("data.path=x", "run.dir=y", "method.backbone.bn_groups=2")
    with pytest.raises(UserError, match="bn_images=null to choose it"):
        load(RunConfig, CONFIGS / "densecl.yaml", changed)


@pytest.fixture
def recipe(tmp_path):
    images = tmp_path / "images"
    write_random_images(images, 32, sizes=((40, 48), (48, 40)))

    def write(run):
        path = tmp_path / f"{run}.yaml"
        path.write_text(SMALL.format(images=images, run=tmp_path / run))
        return str(path)

    return write


def test_a_pass_takes_no_more_images_than_said(recipe, tmp_path, capsys):
    assert pretrain.main([recipe("whole"), "train.steps=2", "train.accumulate=2"]) == 0
    assert pretrain.main([recipe("passes"), "train.steps=2", "train.micro_batch=8"]) == 0
    line = "16 = 2 accumulated x 8 in 2 BatchNorm groups"
    assert capsys.readouterr().err.count(line) == 2
    assert losses_of(tmp_path / "passes") == losses_of(tmp_path / "whole")


def losses_of(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_fewer_images_than_a_group_are_said(recipe, capsys):
    options = ["train.steps=1", "method.backbone.bn_images=32"]
    assert pretrain.main([recipe("few"), *options]) == 0
    err = capsys.readouterr().err
    assert "statistics are of 16 images, not of method.backbone.bn_images=32" in err
