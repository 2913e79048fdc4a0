"""Matches between crops: where the boxes say, and what perfect, blind and noisy features score."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dataprep.synthetic import coordinate_image, write_jpeg
from dense_ssl.augment import MEAN, STD
from dense_ssl.backbones import Backbone, BackboneConfig, Features
from dense_ssl.config import UserError
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.evaluation import suite
from dense_ssl.evaluation.matching import correspondence
from dense_ssl.evaluation.matching.cell_matches import hits, match_rates, matched
from dense_ssl.visualise.__main__ import expected_cells


class Places(Backbone):
    """Cells of 8 x 8 pixels that know what they show: a wave of the mean red (x) and green (y).

    kind: `seen` as said; `position`, the cell's own place in the crop; `noise`, nothing.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.config = BackboneConfig(name="resnet18")
        self.trunk = nn.Linear(1, 1)
        self.dim, self.stride, self.kind = 4, 8, kind

    def forward(self, images):
        std, mean = (torch.tensor(v).view(3, 1, 1) for v in (STD, MEAN))
        places = F.avg_pool2d(images * std + mean, 8)[:, :2]  # 0..1
        grid = (places.shape[2], places.shape[3])
        if self.kind == "position":
            rows, columns = (torch.linspace(0, 1, n) for n in grid)
            stacked = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
            places = stacked.expand(len(images), -1, -1, -1)
        if self.kind == "noise":
            places = torch.rand(places.shape)
        # On a circle per axis: the cosine falls with the distance on either axis.
        waves = torch.cat([(torch.pi * places).cos(), (torch.pi * places).sin()], dim=1)
        dense = waves.flatten(2).transpose(1, 2)
        return Features(dense.mean(1, keepdim=True), dense, grid)

    def compile_encoder(self): ...

    def checkpoint_gradients(self): ...


@pytest.fixture(scope="module")
def coordinates(tmp_path_factory):
    root = tmp_path_factory.mktemp("coordinates")
    for number, size in enumerate([(90, 120), (120, 90), (100, 100), (64, 200)] * 3):
        write_jpeg(root / f"{number:02d}.jpg", coordinate_image(*size), quality=98)
    return root


def scores(root, kind, **settings):
    config = correspondence.Config(size=64, photometric="none", batch_size=5, **settings)
    data = correspondence.load(root, config)
    return correspondence.run(Places(kind), data, config, None)


def test_features_that_know_their_place_match_and_others_do_not(coordinates):
    seen = scores(coordinates, "seen")
    assert seen["one-cell"] == 100 and seen["same-cell"] > 90
    blind = scores(coordinates, "position")
    assert blind["one-cell"] == pytest.approx(blind["chance/one-cell"])
    assert blind["same-cell"] == pytest.approx(blind["chance/same-cell"])
    noise = scores(coordinates, "noise")  # four of 64 cells lie within one of the true point
    assert noise["one-cell"] < 12 and noise["same-cell"] < 5


def random_pair(seed, mirrored):
    rng = np.random.default_rng(seed)
    low, side = rng.uniform(0, 0.4, (2, 2)), rng.uniform(0.4, 0.6, (2, 2))
    boxes = np.concatenate([low, low + side], axis=1).astype(np.float32)
    return boxes, np.array(mirrored)


@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True), (True, True)])
def test_cells_lie_where_the_boxes_say(mirrored):
    grids = ((5, 7), (4, 6))
    query, key = (Features(torch.rand(1, 1, 3), torch.rand(1, h * w, 3), (h, w)) for h, w in grids)
    for seed in range(4):
        boxes, flipped = random_pair(seed, mirrored)
        found = matched(
            query, key, torch.from_numpy(boxes)[:, None], torch.from_numpy(flipped)[:, None]
        )
        expected = expected_cells(boxes, flipped, grids)  # rows first
        np.testing.assert_allclose(found.expected[0].flip(1), expected, rtol=1e-4, atol=1e-4)
        cosine = torch.cosine_similarity(query.dense[0][:, None], key.dense[0], dim=2)
        assert (found.best[0] == cosine.argmax(1)).all()
        for tolerance in (0.5, 1.0):
            by_hand = [
                bool(abs(b // 6 + 0.5 - y) <= tolerance and abs(b % 6 + 0.5 - x) <= tolerance)
                for b, (y, x) in zip(found.best[0].tolist(), expected)
            ]
            assert hits(found, tolerance)[0].tolist() == by_hand


def test_rates_of_a_training_batch_are_those_of_the_task(coordinates):
    config = correspondence.Config(size=64, photometric="none", batch_size=12)
    data = correspondence.load(coordinates, config)
    (batch,) = correspondence._batches(data, config, torch.device("cpu"))
    torch.manual_seed(0)
    rates = match_rates(Places("noise"), batch)
    torch.manual_seed(0)
    values = correspondence.run(Places("noise"), data, config, None)
    assert {name: 100 * float(rate) for name, rate in rates.items()} == pytest.approx(
        {name: value for name, value in values.items() if "/" not in name}, abs=1e-4
    )
    local = Crops(torch.rand(1, 2, 3, 64, 64), torch.rand(1, 2, 4), torch.zeros(1, 2).bool())
    one = MultiCropBatch({"local": local}, batch.index[:2], batch.label[:2])
    with pytest.raises(ValueError, match="none of the views local has two crops"):
        match_rates(Places("seen"), one)
    both = MultiCropBatch({"local": local, **batch.views}, batch.index, batch.label)
    assert match_rates(Places("seen"), both)["one-cell"] == 1


def test_crops_that_share_nothing_count_nowhere():
    boxes = torch.tensor([[[0, 0, 0.4, 0.4]], [[0.5, 0.5, 1, 1]]])
    crops = Crops(torch.rand(2, 1, 3, 64, 64), boxes, torch.zeros(2, 1, dtype=torch.bool))
    batch = MultiCropBatch({"global": crops}, torch.zeros(1).long(), torch.zeros(1).long())
    assert match_rates(Places("seen"), batch)["one-cell"].isnan()


def test_colours_make_it_harder_and_nothing_is_random(coordinates):
    plain, coloured = (scores(coordinates, "seen", seed=s) for s in (0, 0))
    assert plain == coloured
    config = correspondence.Config(size=64, photometric="moco_v2")
    data = correspondence.load(coordinates, config)
    values = [correspondence.run(Places("seen"), data, config, None) for _ in range(2)]
    assert values[0] == values[1] and values[0]["one-cell"] < 90
    mistakes: list[tuple[dict[str, Any], str]] = [
        (
            {"size": 64, "photometric": "moco_v3"},
            "no photometric policy 'moco_v3'; did you mean moco_v",
        ),
        ({"size": 64, "scale": (0.9, 0.1)}, "scale of view 'pair' must satisfy"),
        ({"size": 60}, "size: 60 is not a multiple of the stride 8"),
    ]
    for wrong, message in mistakes:
        settings = correspondence.Config(**wrong)
        with pytest.raises(UserError, match=message):
            correspondence.run(Places("seen"), data, settings)


def test_unreadable_images_are_named_and_pictures_drawn(tmp_path):
    for number in range(3):
        write_jpeg(tmp_path / f"{number}.jpg", coordinate_image(80, 80))
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    config = correspondence.Config(size=64, photometric="none")
    data = correspondence.load(tmp_path, config)
    correspondence.run(Places("seen"), data, config, None)
    (line,) = data.omitted.lines()
    assert line.startswith("image not readable: 1 (1.jpg:")
    (sheet,) = correspondence.pictures(Places("seen"), data, config, None).values()
    assert sheet.width > 600
    for number in (0, 2):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(path.read_bytes()[: len(whole) // 2])
    with pytest.raises(UserError, match="nothing to match: image not readable: 3"):
        correspondence.run(Places("seen"), correspondence.load(tmp_path, config), config, None)


def test_correspondence_is_a_task(coordinates, tmp_path):
    found = suite.evaluate(
        ["correspondence"], "random:test_resnet", str(coordinates), ["size=64", "max_images=4"],
        out=tmp_path,
    )  # fmt: skip
    assert [result.metric for result in found] == ["same-cell", "one-cell"]
    assert all(result.protocol == "correspondence/v1*" and result.chance for result in found)
    assert (tmp_path / "eval/correspondence-matches.png").is_file()
