"""Classes found without labels: the head that is read, the assignment, and what its numbers are of."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dataprep.synthetic import write_class_folders
from dense_ssl.backbones import BackboneConfig, ClassHead, make_backbone
from dense_ssl.checkpoint import FORMAT
from dense_ssl.config import UserError
from dense_ssl.evaluation.__main__ import main
from dense_ssl.evaluation.classification import cluster, knn
from dense_ssl.evaluation.suite import network_key
from dense_ssl.methods.ibot import DinoConfig, IBot
from dense_ssl.weights.class_head import class_head
from dense_ssl.weights.pretrained import load_backbone
from tests.test_evaluation import ColourBackbone, write_colour_folders

SMALL = {"out_dim": 5, "hidden_dim": 32, "bottleneck_dim": 8}


def linear_head(directions):
    """A head that passes its tokens on, to prototypes in these directions."""
    unchanged, shift = torch.eye(directions.shape[1]), torch.full(directions.shape[1:], 50.0)
    layers = ((unchanged, shift), (unchanged, 0 * shift), (unchanged, -shift))  # past both GELUs
    return ClassHead(layers, F.normalize(directions, dim=1))


def test_prototypes_of_the_classes_are_found_and_others_are_chance(tmp_path):
    write_colour_folders(tmp_path / "train", 6)
    write_colour_folders(tmp_path / "val", 25, seed=1)
    backbone = ColourBackbone()
    colours = knn.load(tmp_path, knn.Config(size=32))
    features, labels = knn._embedded(
        backbone, colours, colours.train, "train", knn.Config(size=32), None
    )
    means = torch.stack([features[labels == label].mean(0) for label in range(4)])
    config = cluster.Config(size=32)
    data = cluster.load(tmp_path, config)
    assert data.protocol == "cluster/v1" and len(data.val.pictures) == 100
    # In another order, and one that no image is near: numbers of clusters mean nothing.
    backbone.class_head = linear_head(torch.cat([-means[:1], means[[2, 0, 3, 1]]]))
    values = cluster.run(backbone, data, config)
    assert {values[name] for name in ("accuracy", "NMI", "ARI", "FMI")} == {100}
    assert values["note/prototypes"] == 5 and values["note/prototypes used"] == 4
    assert abs(values["chance/ARI"]) < 5 and 25 <= values["chance/accuracy"] < 45
    sheet = cluster.pictures(backbone, data, config)["confusion"]
    assert sheet.size[0] > 100
    shuffled = data.val.labels[torch.randperm(100)]
    mixed = type(data)(
        data.protocol, data.classes, data.train, type(data.val)(data.val.pictures, shuffled),
        data.content, data.omitted,
    )  # fmt: skip
    values = cluster.run(backbone, mixed, config)
    assert abs(values["ARI"]) < 6 and values["accuracy"] < 45 and values["NMI"] < 20


@pytest.mark.parametrize(("clusters", "classes"), [(4, 4), (6, 3), (2, 5)])
def test_the_assignment_is_the_best_of_all(clusters, classes):
    counts = np.random.default_rng(0).integers(0, 9, (clusters, classes))
    square = np.zeros((max(counts.shape),) * 2, int)
    square[:clusters, :classes] = counts
    rows = range(len(square))
    best = max(int(square[rows, list(order)].sum()) for order in permutations(rows))
    pairs = cluster.matched(counts)
    assert sum(counts[pair] for pair in pairs) == best
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == min(counts.shape)
    said = np.repeat(np.arange(clusters), counts.sum(1))
    truth = np.concatenate([np.repeat(np.arange(classes), row) for row in counts])
    found = cluster.agreement(7 * said, truth)
    assert found["accuracy"] == pytest.approx(100 * best / len(truth))


def test_the_head_of_a_checkpoint_is_its_methods():
    method = IBot(DinoConfig(backbone=BackboneConfig(name="test_vit"), **SMALL))
    with torch.no_grad():
        for value in method.teacher["head"].parameters():
            value.add_(0.1 * torch.randn_like(value))
    tokens = torch.randn(3, 1, 64)
    expected, _ = method.teacher["head"](tokens)
    state = method.state_dict()
    official = {k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")}
    for checkpoint in (
        {"format": FORMAT, "method": state},
        {"student": {}, "teacher": {f"module.{name}": value for name, value in official.items()}},
        {"student": {}, "teacher": {k.replace("head.", "head.0."): v for k, v in official.items()}},
    ):
        head = class_head(checkpoint, "teacher", 64)
        assert head is not None
        torch.testing.assert_close(head.logits(tokens[:, 0]), expected)
        assert class_head(checkpoint, "teacher", 32) is None
    fresh = head.fresh()
    assert fresh.prototypes.shape == head.prototypes.shape
    assert not torch.equal(fresh.layers[0][0], head.layers[0][0])
    for name, value in (("last_layer.weight_g", torch.ones(3, 1)), ("mlp.2.bias", None)):
        broken = state | {f"teacher.head.{name}": value}
        assert class_head({"format": FORMAT, "method": broken}, "teacher", 64) is None


def test_a_run_is_clustered_and_a_backbone_alone_is_not(tmp_path, capsys):
    method = IBot(DinoConfig(backbone=BackboneConfig(name="test_vit"), **SMALL))
    config = {"method": {"name": "dino", "backbone": {"name": "test_vit"}}}
    content = {"format": FORMAT, "config": config, "method": method.state_dict()}
    torch.save(content, tmp_path / "last.pt")
    for split in ("train", "val"):
        write_class_folders(tmp_path / "d" / split, 3, 4)
    words = ["--data", str(tmp_path / "d"), "--out", str(tmp_path / "run"), "size=32"]
    assert main(["cluster", "--checkpoint", str(tmp_path / "last.pt"), *words]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {row[1]: row for row in table if row and row[0].startswith("cluster/")}
    assert set(rows) == {"accuracy", "NMI", "ARI", "FMI"} and "-" not in rows["accuracy"]
    # Features are of the head too, which the hash of the weights leaves out.
    loaded = load_backbone(str(tmp_path / "last.pt"))
    with_head = network_key(loaded)
    assert loaded.backbone.class_head is not None
    loaded.backbone.class_head = loaded.backbone.class_head.fresh()
    assert network_key(loaded) != with_head
    backbone = make_backbone(BackboneConfig(name="test_vit"))
    with pytest.raises(UserError, match="no head over class tokens is known of this test_vit"):
        cluster.Prototypes(backbone)
    assert main(["cluster", "--checkpoint", "random:test_vit", *words]) == 2
    assert "give a run of dino" in capsys.readouterr().err
