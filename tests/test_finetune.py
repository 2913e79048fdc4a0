"""Fine-tuning: the recipes' numbers, layer decay, exact resume, two ranks, and that it learns."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dataprep.synthetic import write_jpeg
from dense_ssl.backbones import BackboneConfig, Projection, make_backbone
from dense_ssl.checkpoint import FORMAT
from dense_ssl.config import UserError
from dense_ssl.evaluation import suite
from dense_ssl.evaluation.classification import finetune, knn, linear
from dense_ssl.evaluation.classification.data import ClassifyData, LabelledPictures
from dense_ssl.evaluation.features import FeatureCache
from dense_ssl.evaluation.suite import configs_of
from dense_ssl.evaluation.trained.layer_decay import parameter_groups
from dense_ssl.methods.ibot import DinoConfig, IBot
from dense_ssl.methods.prototype_head import PrototypeHead
from dense_ssl.weights.layouts import first_projection
from dense_ssl.weights.pretrained import load_backbone
from tests.ranks import on_ranks

TINY = {"size": 32, "precision": "fp32", "workers": 0, "warmup_epochs": 0, "lr_per": None}


def network(name="test_vit", seed=0):
    torch.manual_seed(seed)
    return make_backbone(BackboneConfig(name=name, init="dino" if "vit" in name else "fan_in"))


def write_levels(root: Path, per_class: int, levels=(60, 190), seed: int = 0) -> None:
    """Class folders whose class is how bright the images are."""
    rng = np.random.default_rng(seed)
    for level in levels:
        for number in range(per_class):
            image = rng.normal(level, 15, (36, 36, 3)).clip(0, 255).astype(np.uint8)
            write_jpeg(root / f"{level:03d}" / f"{number}.jpg", image)


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("halves")
    write_levels(root / "train", 10)
    write_levels(root / "val", 10, seed=1)
    return root


# --- the recipes


def test_recipes_set_what_is_not_given():
    mae, udi = finetune.Config(), finetune.Config(recipe="udi")
    assert (mae.read, mae.lr, mae.lr_per, mae.layer_decay) == ("mean", 5e-4, 256, 0.65)
    assert (mae.epochs, mae.warmup_epochs, mae.drop_path, mae.resampling) == (
        100,
        5,
        0.1,
        "bicubic",
    )
    assert (udi.read, udi.lr, udi.lr_per, udi.layer_decay) == ("cls", 1e-3, None, 0.55)
    assert (udi.epochs, udi.warmup_epochs, udi.resampling) == (200, 20, "bilinear")
    large = finetune.Config(recipe="beit-large", epochs=3)
    assert (large.epochs, large.drop_path, large.warmup_epochs) == (3, 0.4, 5)
    words = ["recipe=beit-base", "layer_decay=0.5", "randaugment=", "crop_scale=0.3,1"]
    given = configs_of(["finetune"], words)["finetune"]
    assert given.layer_decay == 0.5 and given.drop_path == 0.2
    assert given.randaugment is None and given.crop_scale == (0.3, 1)
    with pytest.raises(UserError, match=r"^finetune: recipe: Input should be 'mae'[^;]*$"):
        configs_of(["finetune"], ["recipe=vgg"])
    with pytest.raises(UserError, match=r"randaugment: String should match pattern '\^rand-m"):
        configs_of(["finetune"], ["randaugment=auto"])
    with pytest.raises(UserError, match="batch_size must be a multiple of accumulate"):
        configs_of(["finetune"], ["accumulate=3"])


def test_the_recipes_of_deit_and_their_names(halves):
    transfer, semi = (
        finetune.Config(recipe="transfer"),
        finetune.Config(recipe="semi", subset="10%"),
    )
    assert (transfer.lr, semi.lr, semi.lr_per, semi.epochs) == (7.5e-6, 5e-6, 512, 1000)
    assert transfer.repeats == semi.repeats == 3 and semi.from_head and not transfer.from_head
    assert (transfer.batch_size, transfer.layer_decay, transfer.warmup_epochs) == (768, 1, 5)
    for name, settings in {
        "finetune/v1": {},
        "finetune-semi/v1": {"recipe": "semi"},
        "finetune-transfer-last2/v1": {"recipe": "transfer", "tuned_blocks": 2},
    }.items():
        assert finetune.load(halves, finetune.Config(**settings)).protocol == name
    with pytest.raises(UserError, match="from_head: heads are trained on the class token"):
        configs_of(["finetune"], ["from_head=true"])


def test_the_first_layer_of_the_head_is_kept():
    """Of a checkpoint of ours: its own projection, then a fresh linear layer."""
    config = finetune.Config(recipe="semi", drop_path=0)
    backbone = network()
    with pytest.raises(UserError, match="no projection head is known of this test_vit"):
        finetune._classifier(backbone, 3, config)
    head = PrototypeHead(64, 8, hidden_dim=20)
    first = head.mlp[0]
    layers = head.state_dict().items()
    for checkpoint in (
        {"format": FORMAT, "method": {f"teacher.head.{name}": value for name, value in layers}},
        {"teacher": {f"module.head.{name}": value for name, value in layers}},
        {"teacher": {f"head.{i}.{name}": value for i in range(3) for name, value in layers}},  # UDI
    ):
        found = first_projection(checkpoint, "teacher", 64)
        assert found is not None and torch.equal(found[0], first.weight) and found[2] == "gelu"
        assert first_projection(checkpoint, "teacher", 32) is None
    backbone.projection = Projection(*found)
    model = finetune._classifier(backbone, 3, config).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = torch.nn.functional.gelu(first(backbone(images).cls[:, 0]))
        torch.testing.assert_close(model(images), model.head(hidden))
    groups = parameter_groups(model, 0.5, 0.05)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.projection[0].weight)] == 1


def test_runs_carry_their_projection_and_the_untrained_network_a_fresh_one(tmp_path):
    small = {"out_dim": 16, "hidden_dim": 32, "bottleneck_dim": 8}
    method = IBot(DinoConfig(backbone=BackboneConfig(name="test_vit"), **small))
    config = {"method": {"name": "dino", "backbone": {"name": "test_vit"}}}
    path = tmp_path / "last.pt"
    torch.save({"format": FORMAT, "config": config, "method": method.state_dict()}, path)
    loaded = load_backbone(str(path))
    known = loaded.backbone.projection
    assert torch.equal(known.weight, method.teacher["head"].mlp[0].weight)
    fresh = suite._untrained(loaded).backbone.projection
    assert fresh.weight.shape == known.weight.shape and not torch.equal(fresh.weight, known.weight)
    assert load_backbone("random:test_vit").backbone.projection is None


@pytest.mark.parametrize(("blocks", "first"), [(0, 6), (2, 4), (6, 0)])
def test_only_the_last_blocks_are_tuned(blocks, first):
    model = finetune._classifier(network(), 3, finetune.Config(tuned_blocks=blocks))
    trained = {
        n.removeprefix("backbone.trunk.") for n, p in model.named_parameters() if p.requires_grad
    }
    assert {n for n in trained if n.startswith("blocks")} == {
        n for n, _ in model.backbone.trunk.named_parameters()
        if n.startswith("blocks") and int(n.split(".")[1]) >= first
    }  # fmt: skip
    assert {"head.weight", "fc_norm.weight"} <= trained and "patch_embed.proj.weight" not in trained
    groups = parameter_groups(model, 1.0, 0.05)
    assert sum(len(group["params"]) for group in groups) == len(trained)
    with pytest.raises(UserError, match="tuned_blocks=7: test_vit has 6 blocks"):
        finetune._classifier(network(), 3, finetune.Config(tuned_blocks=7))
    with pytest.raises(UserError, match="tuned_blocks=1: test_resnet has 0 blocks"):
        finetune._classifier(network("test_resnet"), 3, finetune.Config(tuned_blocks=1))


def test_repeated_augmentation_shows_fewer_images_more_often(halves):
    config = finetune.Config(**TINY, epochs=1, batch_size=12, lr=1e-3, repeats=3, randaugment=None)
    crops = finetune._crops(finetune.load(halves, config), config)
    assert crops.batch_size == 12 and crops.steps_per_epoch == 1  # 20 images: one batch of 4 x 3
    ((images, labels),) = list(crops.epoch(0))
    assert len(images) == 12 and (labels.view(4, 3) == labels.view(4, 3)[:, :1]).all()
    assert len({image.numpy().tobytes() for image in images}) == 12  # three crops of each
    ((again, _),) = list(finetune._crops(finetune.load(halves, config), config).epoch(0))
    assert torch.equal(again, images)
    seen = set()
    for epoch in range(8):
        for images, _ in crops.epoch(epoch):
            seen.add(images.numpy().tobytes())
    assert len(seen) == 8


def test_semi_learns_a_separable_set_from_its_head(halves):
    config = finetune.Config(
        **TINY | {"lr_per": None}, recipe="semi", epochs=24, batch_size=12, lr=2e-3, min_lr=1e-3,
        drop_path=0, randaugment=None, mixup=0, cutmix=0, subset="6/class",
    )  # fmt: skip
    backbone = network()
    layer = torch.nn.Linear(64, 32)
    backbone.projection = Projection(layer.weight.detach(), layer.bias.detach(), "gelu")
    values = finetune.run(backbone, finetune.load(halves, config), config)
    assert values["top1"] > 95 and values["chance/top1"] == 50


def test_learning_rates_over_a_run():
    step = finetune.Step
    mae = finetune._schedule(finetune.Config(), 1024)
    assert mae.at(step(0, 10, 100)) == 0
    assert mae.at(step(25, 10, 100)) == pytest.approx(1e-3)  # half of 5e-4 x 1024 / 256
    assert mae.at(step(50, 10, 100)) == pytest.approx(2e-3)
    assert mae.at(step(1000, 10, 100)) == pytest.approx(1e-6)
    beit = finetune._schedule(finetune.Config(recipe="beit-small"), 64)
    assert beit.at(step(200, 10, 200)) == pytest.approx(1e-3)  # whatever the batch


@pytest.mark.parametrize(("name", "layers"), [("test_vit", 6), ("test_resnet", 4)])
def test_every_parameter_is_in_one_group_of_its_layer(name, layers):
    config = finetune.Config(layer_decay=0.5)
    model = finetune._classifier(network(name), 3, config)
    groups = parameter_groups(model, 0.5, 0.05)
    where = {id(p): group for group in groups for p in group["params"]}
    assert len(where) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    found = {}
    for parameter_name, parameter in model.named_parameters():
        group = where[id(parameter)]
        found[parameter_name.removeprefix("backbone.trunk.")] = group
        bare = parameter.ndim == 1 or parameter_name.endswith(("cls_token", "pos_embed"))
        assert group["weight_decay"] == (0 if bare else 0.05)
    first, last = ("blocks.0", f"blocks.{layers - 1}") if "vit" in name else ("layer1", "layer4")
    scales = {
        prefix: {g["lr_scale"] for n, g in found.items() if n.startswith(prefix)}
        for prefix in ("head", f"{last}.", f"{first}.", "patch_embed" if "vit" in name else "conv1")
    }
    expected = [1, 0.5, 0.5**layers, 0.5 ** (layers + 1)]
    assert [value for (value,) in scales.values()] == pytest.approx(expected)


def test_mae_reads_the_mean_of_cells_under_a_norm_of_its_own():
    backbone = network()
    model = finetune._classifier(backbone, 3, finetune.Config(drop_path=0)).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        cells = backbone(images).hidden.mean(1)
        expected = torch.nn.functional.layer_norm(cells, (64,), eps=1e-6) @ model.head.weight.T
        torch.testing.assert_close(model(images), expected + model.head.bias)
    assert isinstance(backbone.trunk.norm, torch.nn.LayerNorm)  # the one given is left alone


# --- learning


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_learns_a_separable_set(halves, name):
    config = finetune.Config(
        **TINY, epochs=6, batch_size=10, lr=2e-3, layer_decay=1, min_lr=1e-3, drop_path=0,
        randaugment=None, mixup=0, cutmix=0, read="cls",
    )  # fmt: skip
    data = finetune.load(halves, config)
    backbone = network(name)
    before = {n: v.clone() for n, v in backbone.state_dict().items()}
    values = finetune.run(backbone, data, config)
    assert values["top1"] > 95 and values["chance/top1"] == 50
    assert all(torch.equal(v, before[n]) for n, v in backbone.state_dict().items())


def test_random_labels_stay_at_chance(tmp_path):
    levels = range(20, 240, 40)
    write_levels(tmp_path / "train", 5, levels)
    write_levels(tmp_path / "val", 5, levels, seed=1)
    config = finetune.Config(**TINY, epochs=3, batch_size=10, lr=1e-3, randaugment=None)
    data = finetune.load(tmp_path, config)
    train = LabelledPictures(data.train.pictures, data.train.labels[torch.randperm(30)])
    mixed = ClassifyData(data.protocol, data.classes, train, data.val, "x", data.omitted)
    values = finetune.run(network(), mixed, config)
    assert values["top1"] < 50 and values["chance/top1"] == pytest.approx(100 / 6)


def test_a_subset_of_the_labels_can_be_tuned_on(halves):
    config = finetune.Config(**TINY, epochs=1, batch_size=64, lr=1e-3, subset="4/class")
    data = finetune.load(halves, config)
    assert finetune._crops(data, config).batch_size == 8
    with pytest.raises(UserError, match="subset=lots: write 1%"):
        finetune.load(halves, config.model_copy(update={"subset": "lots"}))


def test_a_stopped_job_goes_on_to_the_same_weights(halves, tmp_path, monkeypatch):
    """With everything that is random switched on, and two micro-batches per step."""
    config = finetune.Config(**TINY, epochs=3, batch_size=8, accumulate=2, drop_path=0.3, lr=1e-3)
    data = finetune.load(halves, config)
    whole = finetune._trained(network(), data, config, FeatureCache(tmp_path / "a", "w"))
    cache, save = FeatureCache(tmp_path / "b", "w"), finetune.checkpoint.save

    def save_and_die(folder, payload, keep):
        save(folder, payload, keep)
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(finetune.checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(network(), data, config, cache)
        monkeypatch.undo()
        torch.manual_seed(123)  # nothing outside matters
    resumed = finetune._trained(network(), data, config, cache)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    (sheet,) = finetune.pictures(network(), data, config, cache).values()
    assert sheet.width > 100


def test_weights_that_are_not_finite_are_not_kept(halves, tmp_path):
    config = finetune.Config(
        **TINY, epochs=2, batch_size=10, lr=1e30, mixup=0, cutmix=0, drop_path=0
    )
    data = finetune.load(halves, config)
    cache = FeatureCache(tmp_path, "w")
    with pytest.raises(UserError, match="not finite after epoch 1; lower lr"):
        finetune.run(network(), data, config, cache)
    assert not list(tmp_path.rglob("*.pt"))


# --- two ranks


def _on_a_rank(world, root, folder):
    config = finetune.Config(**_PLAIN)
    data = finetune.load(root, config)
    cache = FeatureCache(folder / "features", "w")
    values = finetune.run(network(), data, config, cache)
    model = finetune._trained(network(), data, config, cache)
    frozen = _frozen(root, cache)
    return values, model.state_dict(), data.omitted.lines(), frozen


def _frozen(root, cache):
    """What k-NN and the linear sweep say of the same network."""
    few = knn.Config(size=32, k=(3,))
    sweep = linear.Config(size=32, lr=(0.1, 3), epochs=3, batch_size=6, workers=0)
    backbone = network().eval()
    found = knn.run(backbone, knn.load(root, few), few, cache)
    outcome = linear._outcome(backbone, linear.load(root, sweep), sweep, cache)
    return found, outcome.scores, outcome.rule.lr


# Mixup pairs the images of a rank, and erasing is drawn by the rank: without them ranks change nothing.
_PLAIN = {**TINY, "epochs": 2, "batch_size": 8, "lr": 1e-3, "drop_path": 0, "mixup": 0, "cutmix": 0}
_PLAIN |= {"erase": 0, "smoothing": 0.1}


def test_two_ranks_train_and_judge_as_one(halves, tmp_path):
    (halves / "val/060/broken.jpg").write_bytes(b"no image")
    try:
        ranks = on_ranks(2, partial(_on_a_rank, root=halves, folder=tmp_path), tmp_path)
        config = finetune.Config(**_PLAIN)
        data = finetune.load(halves, config)
        alone = finetune._trained(network(), data, config, None).state_dict()
        values = finetune.run(network(), data, config)
        found, scores, lr = _frozen(halves, None)
    finally:
        (halves / "val/060/broken.jpg").unlink()
    for theirs, state, omitted, frozen in ranks:
        assert theirs == pytest.approx(values)
        assert frozen[0] == pytest.approx(found) and frozen[2] == lr
        torch.testing.assert_close(frozen[1], scores, rtol=1e-3, atol=1e-4)
        assert len(omitted) == 1 and omitted[0].startswith("val: image not readable: 1 (broken.jpg")
        for name, value in state.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=2e-5)


def test_ranks_that_see_other_states_of_a_job_are_told(monkeypatch, tmp_path):
    from dense_ssl.evaluation import ranks

    assert ranks.start_of_all(3, tmp_path) == 3
    monkeypatch.setattr(ranks, "everyone", lambda start: [start, 0])
    with pytest.raises(UserError, match="put the run onto a disk they share"):
        ranks.start_of_all(3, tmp_path)
