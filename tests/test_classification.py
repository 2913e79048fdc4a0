"""k-NN, linear and few-label classification: equal to references, able to learn, at chance on noise."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dataprep.synthetic import write_jpeg
from dense_ssl.backbones import Backbone, BackboneConfig, Features, make_backbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.classification import augmented, knn, linear, semi_supervised
from dense_ssl.evaluation.classification.accuracy import accuracies, confusion_sheet
from dense_ssl.evaluation.classification.augmented import Augmentation, TrainingCrops, seeded
from dense_ssl.evaluation.classification.data import (
    ClassifyData,
    LabelledPictures,
    Picture,
    held_out,
    open_class_folders,
    picture_size,
)
from dense_ssl.evaluation.classification.heads import Heads, Rule
from dense_ssl.evaluation.classification.subsets import draw_subset
from dense_ssl.evaluation.features import FeatureCache
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.readout import Readout
from dense_ssl.optim import LARS


class ColourBackbone(Backbone):
    """Cells are the mean colour of 8 x 8 pixels: nothing to learn, fast."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BackboneConfig(name="resnet18")
        self.trunk = nn.Linear(1, 1)
        self.dim, self.stride = 3, 8
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        maps = F.avg_pool2d(images, 8)
        dense = maps.flatten(2).transpose(1, 2)
        return Features(dense.mean(1, keepdim=True), dense, (maps.shape[2], maps.shape[3]))

    def compile_encoder(self) -> None: ...

    def checkpoint_gradients(self) -> None: ...


def write_colours(root: Path, per_class: int, classes: int = 3, seed: int = 0) -> None:
    """Class folders whose class is a colour."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        colour = 60 + 120 * np.eye(3)[label % 3] + 40 * (label // 3)
        for number in range(per_class):
            image = np.clip(colour + rng.normal(0, 12, (40, 48, 3)), 0, 255).astype(np.uint8)
            write_jpeg(root / f"class_{label}" / f"{number}.jpg", image)


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    write_colours(root / "train", 20)
    write_colours(root / "val", 8, seed=1)
    return root


def with_train_labels(data: ClassifyData, labels) -> ClassifyData:
    train = LabelledPictures(data.train.pictures, labels)
    return ClassifyData(
        data.protocol, data.classes, train, data.val, data.content + "x", data.omitted
    )


# --- what is read from a network


@pytest.fixture(scope="module")
def vit() -> Backbone:
    torch.manual_seed(0)
    return make_backbone(BackboneConfig(name="test_vit", init="dino", class_tokens=2)).eval()


def test_tokens_of_the_last_blocks_are_timms(vit):
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        taps = vit.trunk.forward_intermediates(
            images, indices=3, norm=True, return_prefix_tokens=True, intermediates_only=True
        )
        expected = torch.cat([prefix[:, 0] for _, prefix in taps], dim=1)
        mean = taps[-1][0].flatten(2).mean(2)
        torch.testing.assert_close(Readout(vit, "cls", 3)(images), expected)
        torch.testing.assert_close(
            Readout(vit, "cls+mean", 3)(images), torch.cat([expected, mean], 1)
        )
        torch.testing.assert_close(Readout(vit, "mean")(images), mean)
        both = torch.cat([taps[-1][1][:, 0], taps[-1][1][:, 1]], dim=1)
        torch.testing.assert_close(Readout(vit, "both")(images), both)
        torch.testing.assert_close(Readout(vit, "second")(images), taps[-1][1][:, 1])
    for pool, blocks in (("cls", 3), ("cls+mean", 2), ("both", 2), ("mean", 1)):
        reader = Readout(vit, pool, blocks)
        assert reader(images).shape == (2, reader.dim)


def test_what_a_network_has_not_is_refused(vit):
    with pytest.raises(UserError, match="pool=second: resnet18 has one class token"):
        Readout(ColourBackbone(), "second")
    with pytest.raises(UserError, match=r"blocks=2: resnet18 has class tokens after 1 block"):
        Readout(ColourBackbone(), "cls", 2)
    with pytest.raises(UserError, match="blocks=7"):
        Readout(vit, "cls", 7)
    with pytest.raises(UserError, match="pool=mean reads the last block alone"):
        Readout(vit, "mean", 2)


def test_defaults_follow_the_width():
    config = linear.Config()
    wide = make_backbone(BackboneConfig(name="test_vit", init="dino"))
    assert linear._reading(wide, config) == ("cls", 4)
    wide.dim = 768
    assert linear._reading(wide, config) == ("cls+mean", 1)
    assert linear._reading(ColourBackbone(), config) == ("cls", 1)
    assert linear._reading(wide, linear.Config(pool="mean")) == ("mean", 1)


# --- k-NN


def test_chunks_change_nothing(monkeypatch):
    train, test = torch.randn(50, 4), torch.randn(23, 4)
    for k in (1, 9, 50, 80):
        whole = (test @ train.T).topk(min(k, 50), dim=1)
        monkeypatch.setattr(knn, "_CHUNK", 5)
        monkeypatch.setattr(knn, "_BANK_CHUNK", 7)
        similarity, nearest = knn.neighbours(train, test, k)
        torch.testing.assert_close(similarity, whole.values)
        assert torch.equal(nearest, whole.indices)


def test_half_precision_bank_and_the_picture(colours, tmp_path):
    config = knn.Config(size=32, k=(5,), bank="fp16", pool="mean", resampling="bicubic")
    data = knn.load(colours, config)
    cache = FeatureCache(tmp_path, "w")
    values = knn.run(ColourBackbone(), data, config, cache)
    assert values["top1@5"] == 100 and values["top5@5"] == 100
    stored = torch.load(next(tmp_path.glob("*.pt")), weights_only=True)["features"]
    assert stored.dtype == torch.float16
    backbone = ColourBackbone()
    (sheet,) = knn.pictures(backbone, data, config, cache).values()
    assert backbone.calls == 0 and sheet.width > 100


# --- linear: the solver


def optimiser_of(rule, layer):
    if rule.optimizer == "sgd":
        return torch.optim.SGD(
            layer.parameters(), 0.0, momentum=0.9, weight_decay=rule.weight_decay
        )
    plain = {"params": [layer.bias], "weight_decay": 0.0}
    groups = [{"params": [layer.weight], "weight_decay": rule.weight_decay}, plain]
    return LARS(groups, lr=0.0, momentum=0.9, trust=0.001)


def test_heads_step_as_torchs_sgd_does():
    """And as LARS does, which training has of its own."""
    torch.manual_seed(1)
    rules = [Rule(0.1), Rule(1.0), Rule(3.0, 0.01), Rule(2.0, 0.0, "lars"), Rule(20.0, 0.1, "lars")]
    heads = Heads(rules, classes=4, dim=5, seed=3, device=torch.device("cpu"))
    layers = [nn.Linear(5, 4) for _ in rules]
    for i, layer in enumerate(layers):
        layer.weight.data.copy_(heads.weight[i])
        layer.bias.data.zero_()
    optimisers = [optimiser_of(rule, layer) for rule, layer in zip(rules, layers)]
    for factor in (1.0, 0.7, 0.2):
        x, labels = torch.randn(8, 5), torch.randint(0, 4, (8,))
        heads.step(x, labels, factor)
        for layer, optimiser, rule in zip(layers, optimisers, rules):
            for group in optimiser.param_groups:
                group["lr"] = factor * rule.lr
            optimiser.zero_grad()
            F.cross_entropy(layer(x), labels).backward()
            optimiser.step()
    x = torch.randn(6, 5)
    expected = torch.stack([layer(x) for layer in layers])
    torch.testing.assert_close(heads.scores(x), expected, rtol=1e-4, atol=1e-5)


def test_rates_fall_as_published():
    cosine, step = (linear._schedule(linear.Config(schedule=s)) for s in ("cosine", "step"))
    at = [linear.Step(10 * epoch + 3, 10, 100) for epoch in (0, 50, 59, 60, 79, 80, 99)]
    assert [cosine.at(s) for s in at[:2]] == pytest.approx([1, 0.5])
    assert [step.at(s) for s in at] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert len(linear.Config().lr) == 45 and linear.Config().lr[-1] == pytest.approx(9)
    sweep = linear.Config(weight_decay="0,1e-6", optimizer="sgd,lars")
    assert len(sweep.rules()) == 180 and sweep.rules()[3] == Rule(1e-4, 1e-6, "lars")
    assert linear.Config(lr="0.1,3").lr == (0.1, 3.0) and linear.Config(lr=30).lr == (30.0,)


# --- linear: the protocol


@pytest.mark.parametrize("variant", ["cached", "augmented"])
def test_linear_learns_separable_classes_and_not_random_ones(colours, variant):
    config = linear.Config(
        variant=variant, size=32, lr=(0.01, 1, 10), epochs=12, batch_size=20, workers=0
    )
    data = linear.load(colours, config)
    assert data.protocol == {"cached": "linear-cached/v1", "augmented": "linear/v1"}[variant]
    values = linear.run(ColourBackbone(), data, config)
    assert values["top1"] > 95 and values["chance/top1"] == pytest.approx(100 / 3)
    assert values["note/lr"] in config.lr and values["note/features"] == 3
    torch.manual_seed(3)
    mixed = with_train_labels(data, data.train.labels[torch.randperm(60)])
    assert linear.run(ColourBackbone(), mixed, config)["top1"] < 75


def test_the_learning_rate_is_not_chosen_on_what_is_reported(colours):
    """Wrong validation labels change the reported number and nothing else, unless asked for."""
    config = linear.Config(variant="cached", size=32, lr=(1e-6, 3), epochs=10)
    data = linear.load(colours, config)
    flipped = LabelledPictures(data.val.pictures, (data.val.labels + 1) % 3)
    wrong = ClassifyData(
        data.protocol, data.classes, data.train, flipped, data.content, data.omitted
    )
    honest = linear.run(ColourBackbone(), data, config), linear.run(ColourBackbone(), wrong, config)
    assert honest[0]["note/lr"] == honest[1]["note/lr"] == 3
    assert honest[0]["top1"] > 95 and honest[1]["top1"] < 5
    published = config.model_copy(update={"select": "val"})
    values = linear.run(ColourBackbone(), wrong, published)
    assert values["note/lr"] == 1e-6 and "top1@best-on-val" in values and "top1" not in values


@pytest.mark.parametrize("variant", ["cached", "augmented"])
def test_a_stopped_sweep_goes_on_to_the_same_weights(colours, tmp_path, monkeypatch, variant):
    config = linear.Config(
        variant=variant, size=32, lr=(0.1, 1), epochs=4, batch_size=16, workers=0
    )
    data = linear.load(colours, config)
    whole = linear._outcome(ColourBackbone(), data, config, FeatureCache(tmp_path / "a", "w"))
    cache, save = FeatureCache(tmp_path / "b", "w"), linear.checkpoint.save

    def save_and_die(folder, payload, keep):
        save(folder, payload, keep)
        if payload["step"] == 2:
            raise KeyboardInterrupt

    if variant == "augmented":
        monkeypatch.setattr(linear.checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            linear.run(ColourBackbone(), data, config, cache)
        monkeypatch.undo()
    resumed = linear._outcome(ColourBackbone(), data, config, cache)
    assert torch.equal(resumed.scores, whole.scores) and resumed.rule == whole.rule
    finished = ColourBackbone()
    (sheet,) = linear.pictures(finished, data, config, cache).values()
    assert finished.calls == 0 and sheet.height > 100  # nothing is trained or computed again


def test_absent_classes_one_image_and_nothing_to_hold_out(tmp_path):
    write_colours(tmp_path / "train", 8, classes=4)
    write_colours(tmp_path / "val", 2, classes=2)  # two classes absent
    config = linear.Config(variant="cached", size=32, lr=(0.1, 1), epochs=5)
    values = linear.run(ColourBackbone(), linear.load(tmp_path, config), config)
    assert values["top1"] > 70
    write_colours(tmp_path / "one/train", 1, classes=1)
    write_colours(tmp_path / "one/val", 1, classes=1)
    data = linear.load(tmp_path / "one", config)
    with pytest.raises(UserError, match="1 training images leave none to choose the learning rate"):
        linear.run(ColourBackbone(), data, config)
    single = config.model_copy(update={"lr": (0.1,)})
    assert linear.run(ColourBackbone(), data, single)["top1"] == 100


def test_held_out_takes_a_share_of_every_class_and_never_the_last_image():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 4 + [3])
    apart = held_out(labels, 0.1, seed=5)
    assert [int((apart & (labels == c)).sum()) for c in range(4)] == [4, 2, 0, 0]
    assert torch.equal(apart, held_out(labels, 0.1, 5))
    assert not torch.equal(apart, held_out(labels, 0.1, 6))
    assert not held_out(torch.tensor([1]), 0.9, 0).any()


# --- few labels


def test_logistic_regression_is_the_minimum():
    pytest.importorskip("sklearn")
    for classes, strength in ((2, 0.1), (4, 1.0), (3, 0.01)):
        x = F.normalize(torch.randn(60, 5, dtype=torch.float64), dim=1)
        y = torch.randint(0, classes, (60,))
        weights = semi_supervised.fit_logistic(x, y, strength, classes, iterations=1000)

        def objective(w, x=x, y=y, strength=strength):
            penalty = strength / (2 * len(x)) * (w**2).sum()
            return F.cross_entropy(x @ w.T, y) + penalty

        best = torch.zeros(classes, 5, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([best], max_iter=500, line_search_fn="strong_wolfe")

        def closure(solver=solver, best=best, objective=objective):
            solver.zero_grad()
            value = objective(best)
            value.backward()
            return value

        solver.step(closure)
        lowest = float(objective(best.detach()))
        assert float(objective(weights)) == pytest.approx(lowest, rel=1e-4)
        torch.testing.assert_close(weights, best.detach(), rtol=0, atol=0.05)


def test_few_labels_suffice_for_separable_classes(colours):
    pytest.importorskip("sklearn")
    config = semi_supervised.Config(subset="4/class", size=32, samplings=2, lambdas=0.01)
    data = semi_supervised.load(colours, config)
    values = semi_supervised.run(ColourBackbone(), data, config)
    assert values["top1"] > 95 and values["note/labelled images"] == 12
    assert values["note/top1 deviation"] < 5
    random_labels = with_train_labels(data, torch.arange(60) % 3)
    assert semi_supervised.run(ColourBackbone(), random_labels, config)["top1"] < 75
    tuned = config.model_copy(update={"lambdas": (0.01, 1.0), "subset": "10/class"})
    assert semi_supervised.run(ColourBackbone(), data, tuned)["top1"] > 95
    published = tuned.model_copy(update={"select": "val"})
    assert "top1@best-on-val" in semi_supervised.run(ColourBackbone(), data, published)
    with pytest.raises(UserError, match="3 labelled images leave none to choose lambda"):
        few = tuned.model_copy(update={"subset": "1%"})
        semi_supervised.run(ColourBackbone(), data, few)


def test_classes_without_a_label_are_never_answered():
    weights = torch.zeros(3, 2, dtype=torch.float64)
    scores = semi_supervised.class_scores(
        torch.ones(4, 2), weights, torch.tensor([False, True, True])
    )
    assert (scores.argmax(1) != 0).all() and torch.isinf(scores[:, 0]).all()
    assert accuracies(scores, torch.zeros(4, dtype=torch.int64))["top1"] == 0


def test_subsets(colours, tmp_path):
    train = open_class_folders(colours, (None, None), "x/v1").train
    omitted = Omissions()

    def counts(subset, seed=0):
        return torch.bincount(draw_subset(train, subset, seed, omitted).labels).tolist()

    assert counts("10%") == [2, 2, 2] and counts("1%") == [1, 1, 1] and counts("100 %") == [20] * 3
    assert counts("7/class") == [7, 7, 7] and not omitted.lines()
    assert counts("30/class") == [20, 20, 20] and omitted.lines()[0].endswith(
        "class 0, class 1, class 2)"
    )
    first, second = (draw_subset(train, "10%", seed, omitted).pictures for seed in (0, 1))
    assert first != second and first == draw_subset(train, "10%", 0, omitted).pictures
    names = tmp_path / "list.txt"
    names.write_text("3.jpg\nclass_0/5.jpg\n\nmissing.jpg\n")
    assert counts(str(names)) == [2, 2, 2]  # the names of this set repeat in every class
    assert "list.txt: image not in train: 1 (missing.jpg)" in omitted.lines()
    names.write_text("nothing.jpg\n")
    for wrong, sentence in (
        (str(names), "names no image of the training split"), ("some", "write 1%, 8/class"),
        ("0%", "above 0 %"), ("101%", "above 0 %"), ("0/class", "at least 1/class"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            counts(wrong)


# --- augmented crops


def crops_of(pictures, **options) -> TrainingCrops:
    given = {
        "batch_size": 8, "seed": 1, "workers": 0, "omitted": Omissions(),
        "augmentation": Augmentation(16, "bicubic", randaugment="rand-m9-mstd0.5-inc1"),
    } | options  # fmt: skip
    labels = torch.arange(len(pictures))
    return TrainingCrops(pictures, labels, given.pop("augmentation"), **given)


def test_crops_are_keyed_by_image_and_epoch(colours):
    pictures = open_class_folders(colours, (None, None), "x/v1").train.pictures[:20]
    by_image = {}
    for workers in (0, 1):
        crops = crops_of(pictures, workers=workers)
        assert crops.steps_per_epoch == 2
        state = random.getstate(), torch.get_rng_state()
        for images, labels in crops.epoch(3):
            assert images.shape == (8, 3, 16, 16) and images.dtype == torch.uint8
            for image, label in zip(images, labels.tolist()):
                assert torch.equal(by_image.setdefault(label, image), image)
        if not workers:
            assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert len(by_image) == 16
    again = {label: x for batch in crops_of(pictures).epoch(4) for x, label in zip(*batch)}
    assert any(not torch.equal(x, by_image[int(i)]) for i, x in again.items() if int(i) in by_image)


def test_crops_lie_where_the_plan_says(tmp_path):
    """Red is the column of a pixel, so a crop's red range is its box."""
    ramp = np.zeros((64, 256, 3), np.uint8)
    ramp[..., 0] = np.arange(256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    picture = Picture(tmp_path / "ramp.png", (100, 0, 64, 64))
    assert picture_size(picture) == (64, 64)
    plain = Augmentation(16, "bilinear", scale=(1.0, 1.0))
    crops = crops_of([picture] * 2, batch_size=2, augmentation=plain)
    ((images, _),) = list(crops.epoch(0))
    assert 98 < images[:, 0].min() < 107 and 156 < images[:, 0].max() < 166


def test_unreadable_training_images_are_replaced_and_named(tmp_path):
    write_colours(tmp_path, 3, classes=2)
    paths = sorted(tmp_path.rglob("*.jpg"))
    paths[0].write_bytes(b"no image")
    cut = paths[1].read_bytes()
    paths[1].write_bytes(cut[: len(cut) // 2])
    omitted = Omissions()
    crops = crops_of([Picture(path) for path in paths], batch_size=5, omitted=omitted)
    ((images, labels),) = list(crops.epoch(0))
    assert len(images) == 5 and sorted(labels.tolist()) == [2, 2, 3, 4, 5]
    list(crops.epoch(1))
    assert [line.split(" (")[0] for line in omitted.lines()] == [
        "train: image header not readable: 1", "train: image not readable: 1",
    ]  # fmt: skip
    for path in paths[2:]:
        path.write_bytes(cut[: len(cut) // 2])
    with pytest.raises(UserError, match="none of 5 images can be decoded"):
        list(crops.epoch(2))


def test_batches_that_cannot_be_made_are_refused(colours):
    pictures = open_class_folders(colours, (None, None), "x/v1").train.pictures
    assert crops_of(pictures[:7], batch_size=64, multiple=2).batch_size == 6
    with pytest.raises(UserError, match="batch_size=7 is not a multiple of 2"):
        crops_of(pictures, batch_size=7, multiple=2)
    with pytest.raises(UserError, match=r"1 readable image\(s\) make no batch of 2"):
        crops_of(pictures[:1], multiple=2)


def test_posterising_to_nothing_is_black():
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    assert augmented._posterize(image, 8) is image
    assert augmented._posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert augmented._posterize(image, 1).getpixel((0, 0)) == (128, 0, 0)


def test_seeds_are_put_back():
    before = random.getstate()
    with seeded(2**63 + 11):
        first = random.random(), int(np.random.get_state()[1][5]), float(torch.rand(()))  # noqa: NPY002
    assert random.getstate() == before
    with seeded(2**63 + 11):
        state = np.random.get_state()  # noqa: NPY002
        assert first == (random.random(), int(state[1][5]), float(torch.rand(())))


# --- the picture


def test_confusion_is_drawn_in_its_cell():
    labels, said = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 2, 2])
    sheet = np.asarray(confusion_sheet(labels, said, ["a", "b", "c", "unused"], "title"))
    dark = (sheet == (20, 62, 130)).all(2)
    rows, columns = np.nonzero(dark)
    side = 28
    assert dark.sum() == 3 * side * side
    row, column = (rows - rows.min()) // side, (columns - columns.min()) // side
    assert set(zip(row.tolist(), column.tolist())) == {(0, 0), (1, 2), (2, 2)}
    many = confusion_sheet(labels, said, [str(i) for i in range(1000)], "title")
    assert many.width < 1200 and many.height < 1200
