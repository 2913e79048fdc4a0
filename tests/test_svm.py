"""Linear SVMs on VOC: the reader, average precision against scikit-learn, and both ways with difficult."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dataprep.synthetic import write_jpeg
from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.classification import svm, svm_fit
from dense_ssl.evaluation.classification.stages import StageFeatures
from dense_ssl.evaluation.classification.voc_data import open_voc
from dense_ssl.evaluation.voc import average_precision, svm_cost_grid

sklearn = pytest.importorskip("sklearn")
CLASSES = ("blue", "green", "red")
CHANNEL = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return make_backbone(BackboneConfig(name="test_resnet")).eval()


def write_voc(root: Path, train: int = 12, test: int = 9, noise: bool = False) -> Path:
    """VOC2007 with a class per colour; image i shows class i % 3, and with `noise` a random one is said."""
    home = root / "VOCdevkit/VOC2007"
    rng = np.random.default_rng(1)
    (home / "ImageSets/Main").mkdir(parents=True)
    for split, count, first in (("trainval", train, 0), ("test", test, 100)):
        names = [f"{first + i:06d}" for i in range(count)]
        for i, name in enumerate(names):
            image = np.full((60, 80, 3), 60) + rng.normal(0, 10, (60, 80, 3))
            image[..., CHANNEL[CLASSES[i % 3]]] += 120
            write_jpeg(home / "JPEGImages" / f"{name}.jpg", image.clip(0, 255).astype(np.uint8))
        said = [int(rng.integers(3)) if noise else i % 3 for i in range(count)]
        for number, label in enumerate(CLASSES):
            lines = [f"{n} {1 if s == number else -1:2d}\n" for n, s in zip(names, said)]
            (home / f"ImageSets/Main/{label}_{split}.txt").write_text("".join(lines))
    return root


def change(home: Path, name: str, line: int, text: str) -> None:
    path = home / "ImageSets/Main" / name
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines) + "\n")


# --- average precision


def test_average_precision_is_scikit_learns_where_that_is_monotone():
    """Ours never lets precision fall towards smaller recall; where it does not, both are the same sum."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    equal = 0
    for _ in range(200):
        labels = rng.random(12) < 0.4
        labels[0] = True
        scores = rng.permutation(12) + 3 * labels + 0.01 * rng.random(12)
        theirs = metrics.average_precision_score(labels, scores)
        ours = average_precision(labels.astype(int).tolist(), scores.tolist())
        ranked = labels[np.argsort(-scores)]
        precision = (np.cumsum(ranked) / np.arange(1, 13))[ranked]
        if (np.diff(precision) <= 0).all():
            assert ours == pytest.approx(theirs)
            equal += 1
        else:
            assert ours > theirs
    assert 20 < equal < 180


def test_average_precision_by_brute_force():
    rng = np.random.default_rng(1)
    for _ in range(50):
        labels, scores = rng.integers(-1, 2, 15), rng.normal(size=15)
        labels[0] = 1
        kept = [(s, bool(t == 1)) for s, t in zip(scores, labels) if t != -1]
        ranked = [true for _, true in sorted(kept, reverse=True)]
        precision = [sum(ranked[: i + 1]) / (i + 1) for i in range(len(ranked))]
        best = [max(precision[i:]) for i in range(len(ranked)) if ranked[i]]
        assert average_precision(labels, scores) == pytest.approx(np.mean(best))


# --- the machines


def test_the_cost_is_the_best_of_three_folds():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(2)
    positive = np.arange(45) % 3 == 0
    x = svm_fit.unit_rows(rng.normal(size=(45, 6)) + 0.8 * positive[:, None], single=False)
    folds = np.empty(45, int)  # unshuffled and stratified: thirds of each side, in order
    for side in (positive, ~positive):
        members = np.flatnonzero(side)
        folds[members] = np.arange(len(members)) * 3 // len(members)
    means = []
    for cost in svm_cost_grid():
        precisions = []
        for fold in range(3):
            train = folds != fold
            machine = svm_fit.fit(x[train], positive[train], cost)
            scores = machine.decision_function(x[~train])
            precisions.append(average_precision_score(positive[~train], scores))
        means.append(np.mean(precisions))
    assert svm_fit.cross_validated_cost(x, positive) == svm_cost_grid()[int(np.argmax(means))]


def test_rows_have_their_norm_taken_out():
    rows = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert svm_fit.unit_rows(rows, single=False)[0] == pytest.approx([3 / 5.00001, 4 / 5.00001])
    assert svm_fit.unit_rows(rows, single=False).dtype == np.float64
    assert svm_fit.unit_rows(rows, single=True).dtype == np.float32


# --- the protocols


@pytest.mark.parametrize("variant", ["cost-grid", "fixed", "low-shot"])
def test_learns_separable_classes_and_not_random_ones(tmp_path, tiny, variant):
    config = svm.Config(variant=variant, workers=1, shots=(1, 2, 40), samplings=2)
    data = svm.load(write_voc(tmp_path / "a"), config)
    assert data.classes == CLASSES and data.protocol == f"svm-{variant}/v1"
    values = svm.run(tiny, data, config)
    metrics = [name for name in values if name.startswith("mAP")]
    expected = {
        "cost-grid": ["mAP@feat5"], "fixed": ["mAP@pooled"],
        "low-shot": ["mAP@feat5,k=1", "mAP@feat5,k=2"],
    }  # fmt: skip
    assert metrics == expected[variant]
    assert values[metrics[-1]] > 95 and values["chance/mAP"] == pytest.approx(100 / 3)
    if variant == "low-shot":
        assert data.omitted.lines() == ["shots: more than any class has: 1 (40)"]
        assert svm.run(tiny, data, config) == values  # samplings are keyed
        return
    assert values[f"note/AP@{metrics[0].split('@')[1]} red"] > 95
    noise = svm.load(write_voc(tmp_path / "b", 30, 30, noise=True), config)
    assert svm.run(tiny, noise, config)[metrics[0]] < 70


def test_difficult_images(tmp_path, tiny):
    """A difficult image of a class: negative in training for both; tested as negative by `fixed` alone."""
    home = write_voc(tmp_path) / "VOCdevkit/VOC2007"
    change(home, "red_test.txt", 2, "000102  0")  # image 2 is red and scores high
    change(home, "red_trainval.txt", 2, "000002  0")
    data = svm.load(tmp_path, svm.Config())
    labels = data.train.labels, data.test.labels
    assert labels[0][2].tolist() == [-1, -1, 0] and labels[1][2].tolist() == [-1, -1, 0]
    for out, tested in ((True, 8), (False, 9)):
        red = svm._problems(data, *labels, out)[2]
        assert red.name == "red" and red.tested.sum() == tested
        assert not red.positive[2] and red.positive.sum() == 3 and red.truth.sum() == 2


def test_classes_that_cannot_be_judged_are_named(tmp_path, tiny):
    home = write_voc(tmp_path) / "VOCdevkit/VOC2007"
    for name in ("red_test.txt", "blue_trainval.txt"):
        path = home / "ImageSets/Main" / name
        path.write_text(path.read_text().replace(" 1\n", "-1\n"))
    path = home / "ImageSets/Main/green_trainval.txt"
    path.write_text(path.read_text().replace(" 1\n", "-1\n", 2))
    (home / "JPEGImages/000100.jpg").write_bytes(b"no image")
    (home / "JPEGImages/000000.jpg").unlink()
    config = svm.Config(workers=1)
    data = svm.load(tmp_path, config)
    values = svm.run(tiny, data, config)
    assert [name for name in values if name.startswith("note/AP")] == ["note/AP@feat5 green"]
    lines = data.omitted.lines()
    assert lines[0] == "trainval: image file missing: 1 (000000.jpg)"
    assert lines[1].startswith("test: image not readable: 1 (000100.jpg")
    assert "class with no positive or no negative training image: 1 (blue)" in lines
    assert "class with no positive test image: 1 (red)" in lines
    assert "trainval: fewer than 3 images a side, so cost 1 untuned: 1 (green)" in lines
    path.write_text(path.read_text().replace(" 1\n", "-1\n"))
    with pytest.raises(UserError, match="no class has positive images in both splits"):
        svm.run(tiny, svm.load(tmp_path, config), config)


def test_malformed_lists_are_refused_by_name(tmp_path):
    home = write_voc(tmp_path) / "VOCdevkit/VOC2007"
    for place in (tmp_path, tmp_path / "VOCdevkit", home):
        assert len(open_voc(place, "2007", "trainval", "test", "x").train.pictures) == 12
    with pytest.raises(UserError, match="no VOC2012/ImageSets/Main"):
        svm.load(tmp_path, svm.Config(year="2012"))
    with pytest.raises(UserError, match="no CLASS_val.txt in it"):
        svm.load(tmp_path, svm.Config(train="val"))
    change(home, "green_test.txt", 3, "000103 2")
    with pytest.raises(UserError, match=r"green_test.txt, line 4: expected `IMAGE LABEL`"):
        svm.load(tmp_path, svm.Config())
    change(home, "green_test.txt", 3, "000777 1")
    with pytest.raises(UserError, match=r"green_test.txt: lists other images than blue_test.txt"):
        svm.load(tmp_path, svm.Config())
    change(home, "green_test.txt", 3, "000103 1")
    shutil.rmtree(home / "JPEGImages")
    (home / "JPEGImages").mkdir()
    with pytest.raises(UserError, match="nothing usable: trainval: image file missing: 12"):
        svm.load(tmp_path, svm.Config())


def test_features_of_the_stages(tiny):
    names = ("feat1", "feat3", "pooled", "feat5")
    reader = StageFeatures(tiny, names)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        found = reader(images)
        maps = tiny.trunk.forward_intermediates(images, intermediates_only=True)
    assert list(reader.columns) == list(names) and found.shape[1] == reader.columns["feat5"].stop
    last, third = maps[-1], maps[-3]
    # 6 x 6 windows of a 7 x 7 map, one apart
    corner = last[:, :, 1:7, 0:6].mean((2, 3))
    feat5 = found[:, reader.columns["feat5"]].unflatten(1, (-1, 2, 2))
    torch.testing.assert_close(feat5[:, :, 1, 0], corner, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, reader.columns["pooled"]], last.mean((2, 3)))
    feat3 = found[:, reader.columns["feat3"]].unflatten(1, (third.shape[1], 4, 4))
    window = third[:, :, 5:18, 10:23].mean((2, 3))
    torch.testing.assert_close(feat3[:, :, 1, 2], window, rtol=1e-4, atol=1e-5)
    vit = make_backbone(BackboneConfig(name="test_vit", init="dino"))
    assert StageFeatures.default(vit, False) == ("pooled",) and StageFeatures(vit, ["pooled"])
    with pytest.raises(UserError, match="features=feat5: specified for ResNets of stride 32"):
        StageFeatures(vit, ["feat5"])


def test_real_lists_are_read(real_images):
    data = svm.load(real_images / "voc-mini", svm.Config())
    assert len(data.classes) == 20 and data.classes[0] == "aeroplane"
    assert data.train.labels.shape == (62, 20) and data.test.labels.shape == (40, 20)
    assert int((data.train.labels == 0).sum()) == 14 and int((data.train.labels == 1).sum()) == 85
    assert not data.omitted.lines()
