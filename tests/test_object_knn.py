"""Nearest neighbours of objects: where their cells are, what another background costs, and chance."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dataprep.synthetic import write_jpeg
from dense_ssl.backbones import Backbone, BackboneConfig, Features
from dense_ssl.config import UserError
from dense_ssl.evaluation.__main__ import main
from dense_ssl.evaluation.classification import object_knn
from dense_ssl.evaluation.classification.object_knn import ObjectCells, moved, object_window

COLOURS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]])


class Colours(Backbone):
    """Cells of 8 x 8 pixels: their mean colour, or (`coupled`) the mean of the whole image."""

    def __init__(self, coupled: bool = False) -> None:
        super().__init__()
        self.config = BackboneConfig(name="resnet18")
        self.trunk = nn.Linear(1, 1)
        self.dim, self.stride, self.coupled = 3, 8, coupled

    def forward(self, images):
        maps = F.avg_pool2d(images, 8)
        if self.coupled:
            maps = maps.mean((2, 3), keepdim=True).expand_as(maps)
        dense = maps.flatten(2).transpose(1, 2)
        return Features(dense.mean(1, keepdim=True), dense, (maps.shape[2], maps.shape[3]))

    def compile_encoder(self): ...

    def checkpoint_gradients(self): ...


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """COCO with coloured rectangles, each class on a background of another class's colour."""
    root = tmp_path_factory.mktemp("boxes")
    (root / "annotations").mkdir()
    for split, count in (("train2017", 18), ("val2017", 12)):
        rng = np.random.default_rng(count)
        images, annotations = [], []
        for number in range(count):
            label = number % 3
            image = rng.integers(0, 20, (120, 160, 3)) + COLOURS[(label + 1) % 3] // 2
            x, y, w, h = (int(v) for v in rng.integers((20, 10, 40, 40), (80, 50, 70, 60)))
            image[y : y + h, x : x + w] = COLOURS[label] + rng.integers(0, 20, (h, w, 3))
            write_jpeg(root / split / f"{number}.jpg", image.astype(np.uint8), quality=95)
            images.append({"id": number, "file_name": f"{number}.jpg", "height": 120, "width": 160})
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"id": number, "image_id": number, "category_id": label + 1, "iscrowd": 0,
                 "bbox": [x, y, w, h], "segmentation": [outline]}
            )  # fmt: skip
        names = [{"id": i + 1, "name": name} for i, name in enumerate(("red", "green", "blue"))]
        content = {"images": images, "annotations": annotations, "categories": names}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def scored(root, backbone, data=None, **settings):
    config = object_knn.Config(**{"size": 64, "k": 3, "batch_size": 8} | settings)
    data = data or object_knn.load(root, config)
    return object_knn.run(backbone, data, config)


def test_cells_under_the_box_are_averaged():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    boxes = torch.tensor([[0.25, 0.125, 0.75, 0.5], [0.0, 0.0, 1.0, 1.0]])
    got = ObjectCells(Colours())(images, boxes)
    maps = F.avg_pool2d(images, 8)
    whole = F.normalize(maps[1].mean((1, 2)), dim=0)
    assert torch.allclose(got[1], whole, atol=0.08)  # samples between cells, all of equal weight
    even = torch.zeros(1, 3, 64, 64)
    even[:, 1, 8:32, 16:48] = 5.0  # whole cells of the first box alone
    inside = ObjectCells(Colours())(even, boxes[:1])
    assert torch.allclose(inside, torch.tensor([[0.0, 1.0, 0.0]]))


def test_windows_hold_their_box_and_stay_in_the_image():
    window, box = object_window((40, 30, 20, 10), 200, 100, 0.5)
    assert window == (30, 15, 70, 55) and box == (0.25, 0.375, 0.75, 0.625)
    for corner in ((0, 0, 30, 30), (170, 70, 30, 30), (5, 5, 190, 90)):
        (left, top, right, bottom), box = object_window(corner, 200, 100, 1.0)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
        assert right - left == bottom - top and all(0 <= edge <= 1 for edge in box)
    assert object_window((40, 30, 20, 20), 200, 100, 0)[1] == (0, 0, 1, 1)


def test_only_the_box_is_moved():
    window, other = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 9).byte()
    result = moved(window, other, (0.25, 0.5, 1.0, 0.75))
    assert (result == 0).sum() == 3 * 6 * 2 and (result[:, 4:6, 2:] == 0).all()
    assert (other == 9).all()


def test_objects_are_found_and_context_is_what_the_drop_shows(boxes):
    own = scored(boxes, Colours())
    assert own["top1@3"] > 95 and own["elsewhere-top1@3"] > 95 and abs(own["drop@3"]) < 5
    coupled = scored(boxes, Colours(coupled=True))
    assert coupled["top1@3"] > 95 and coupled["drop@3"] > 30
    assert own["chance/top1"] == own["chance/elsewhere-top1"] == pytest.approx(100 / 3)


def test_random_labels_stay_at_chance(boxes):
    data = object_knn.load(boxes, object_knn.Config())
    random = torch.randint(
        0, 3, data.train.labels.shape, generator=torch.Generator().manual_seed(3)
    )
    mixed = replace(data, train=type(data.train)(data.train.pictures, random))
    assert scored(boxes, Colours(), mixed, k=18)["top1@18"] < 70


def test_what_cannot_be_read_is_named_and_left_out_of_both(boxes, tmp_path):
    shutil.copytree(boxes, tmp_path / "d")
    config = object_knn.Config(size=64, k=3)
    data = object_knn.load(tmp_path / "d", config)
    (tmp_path / "d/val2017/4.jpg").write_bytes(b"damaged since")
    values = object_knn.run(Colours(), data, config)
    assert values["top1@3"] > 95 and abs(values["drop@3"]) < 10
    assert any(line.startswith("val: image not readable: 1") for line in data.omitted.lines())


def test_refusals(boxes, tmp_path):
    with pytest.raises(UserError, match=r"no annotations/instances_\*\.json in it"):
        object_knn.load(tmp_path, object_knn.Config())
    config = object_knn.Config(max_val=1, size=64)
    with pytest.raises(UserError, match="other backgrounds need a second one"):
        object_knn.run(Colours(), object_knn.load(boxes, config), config)


def test_object_knn_is_a_task(boxes, tmp_path, capsys):
    given = ["object-knn", "--checkpoint", "random:test_resnet", "--data", str(boxes)]
    assert main([*given, "--out", str(tmp_path / "run"), "--device", "cpu", "size=64", "k=3"]) == 0
    assert "elsewhere-top1@3" in capsys.readouterr().out
    with Image.open(tmp_path / "run/eval/object-knn-objects.png") as sheet:
        assert min(sheet.size) > 300
