"""The evaluation protocols: equal to other libraries, able to learn, at chance where nothing is."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dataprep.scenes import render
from dataprep.synthetic import write_camvid_discs, write_jpeg
from dense_ssl.backbones import Backbone, BackboneConfig, Features
from dense_ssl.config import UserError
from dense_ssl.evaluation.classification import knn
from dense_ssl.evaluation.classification.data import Picture, read_picture
from dense_ssl.evaluation.features import FeatureCache, in_order, thinned
from dense_ssl.evaluation.segmentation import probe as segment


class ColourBackbone(Backbone):
    """Cells are the mean and deviation of each colour over 8 x 8 pixels: nothing to learn, fast."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BackboneConfig(name="resnet18")
        self.trunk = nn.Linear(1, 1)
        self.dim, self.stride = 6, 8
        self.calls = 0

    def forward(self, images: Tensor) -> Features:
        self.calls += 1
        mean = F.avg_pool2d(images, 8)
        cells = torch.cat([mean, F.avg_pool2d(images**2, 8) - mean**2], dim=1)
        dense = cells.flatten(2).transpose(1, 2)
        return Features(dense.mean(1, keepdim=True), dense, (cells.shape[2], cells.shape[3]))

    def compile_encoder(self) -> None: ...

    def checkpoint_gradients(self) -> None: ...


def write_colour_folders(root: Path, per_class: int, classes: int = 4, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for label in range(classes):
        colour = np.array([40 + 60 * label, 200 - 50 * label, 128])
        for number in range(per_class):
            noise = rng.normal(0, 12, (40, 48, 3))
            image = np.clip(colour + noise, 0, 255).astype(np.uint8)
            write_jpeg(root / f"class_{label}" / f"{number}.jpg", image)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "s"
    render(out, count=24, seed=1, workers=1, val_share=0.25)
    return out


# --- kNN


@pytest.mark.parametrize("k", [1, 5, 40, 1000])
def test_knn_equals_scikit_learn(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = torch.Generator().manual_seed(0)
    train = F.normalize(torch.randn(200, 16, generator=generator), dim=1)
    labels = torch.randint(0, 7, (200,), generator=generator)
    test = F.normalize(torch.randn(700, 16, generator=generator), dim=1)
    model = neighbors.KNeighborsClassifier(
        n_neighbors=min(k, 200), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    expected = model.fit(train.double().numpy(), labels.numpy()).predict(test.double().numpy())
    assert (knn.knn_classify(train, labels, test, k).numpy() == expected).all()


def test_published_settings_of_knn_are_the_defaults():
    """DINO (arXiv:2104.14294), whose evaluation Wu et al.'s temperature and these numbers are from."""
    config = knn.Config()
    assert (config.temperature, config.k, config.size) == (0.07, (10, 20, 100, 200), 224)


def test_knn_scores_equal_a_loop():
    generator = torch.Generator().manual_seed(1)
    train = F.normalize(torch.randn(30, 5, generator=generator), dim=1).double()
    labels = torch.randint(0, 3, (30,), generator=generator)
    test = F.normalize(torch.randn(4, 5, generator=generator), dim=1).double()
    scores = knn.knn_scores(train, labels, test, 7, 0.1, classes=4)
    for row, feature in zip(scores, test):
        similarity = [float(feature @ other) for other in train]
        nearest = sorted(range(30), key=lambda i: -similarity[i])[:7]
        votes = torch.zeros(4, dtype=torch.float64)
        for i in nearest:
            votes[labels[i]] += np.exp(similarity[i] / 0.1)
        assert torch.allclose(row.double() / row.sum(), votes / votes.sum(), atol=1e-5)


def test_knn_learns_separable_classes_and_not_random_ones(tmp_path):
    write_colour_folders(tmp_path / "train", 12)
    write_colour_folders(tmp_path / "val", 10, seed=1)
    config = knn.Config(size=32, k=(5, 20))
    data = knn.load(tmp_path, config)
    assert data.protocol == "knn/v1" and len(data.classes) == 4
    values = knn.run(ColourBackbone(), data, config)
    assert values["top1@5"] > 95 and values["top5@5"] == 100 and values["chance/top1"] == 25
    shuffled = data.train.labels[torch.randperm(48)]
    mixed = type(data)(
        data.protocol, data.classes, type(data.train)(data.train.pictures, shuffled), data.val,
        data.content, data.omitted,
    )  # fmt: skip
    assert knn.run(ColourBackbone(), mixed, config)["top1@20"] < 65


def test_knn_clips_k_to_the_training_images(tmp_path):
    write_colour_folders(tmp_path / "train", 2, classes=2)
    write_colour_folders(tmp_path / "val", 2, classes=2)
    config = knn.Config(size=32)
    values = knn.run(ColourBackbone(), knn.load(tmp_path, config), config)
    assert set(values) == {"top1@4", "top5@4", "chance/top1", "chance/top5"}


def test_knn_on_coco_objects(scenes):
    config = knn.Config(size=64, k=(5,), max_train=40)
    data = knn.load(scenes, config)
    assert data.protocol == "knn-objects/v1"
    assert len(data.classes) == 14 and len(data.train.pictures) == 40
    assert all(min(p.box[2:]) >= 32 for p in data.train.pictures)
    values = knn.run(ColourBackbone(), data, config)
    assert 0 <= values["top1@5"] <= 100


def test_pictures_are_resized_and_cropped(tmp_path):
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, 50:150] = 255  # the centre square is white
    write_jpeg(tmp_path / "a.jpg", image, quality=100)
    centre = read_picture(Picture(tmp_path / "a.jpg"), 64, 64)
    assert centre.shape == (3, 64, 64) and centre.float().mean() > 250
    wider = read_picture(Picture(tmp_path / "a.jpg"), 32, 32)
    assert wider.float().mean() > 245
    framed = read_picture(Picture(tmp_path / "a.jpg", (60, 10, 80, 20)), 64, 64)
    assert framed.shape == (3, 64, 64) and framed.float().mean() > 250
    at_the_edge = read_picture(Picture(tmp_path / "a.jpg", (190, 0, 40, 30)), 64, 64)
    assert at_the_edge.float().mean() < 5


def test_unreadable_images_are_counted_and_named(tmp_path):
    write_colour_folders(tmp_path / "train", 4)
    write_colour_folders(tmp_path / "val", 4)
    (tmp_path / "val/class_1/0.jpg").write_bytes(b"no image")
    (tmp_path / "val/class_1/.hidden.jpg").write_bytes(b"")
    (tmp_path / "val/class_1/Thumbs.db").write_bytes(b"")
    config = knn.Config(size=32, k=(1,))
    data = knn.load(tmp_path, config)
    assert len(data.val.pictures) == 16
    assert knn.run(ColourBackbone(), data, config)["top1@1"] > 95
    (line,) = data.omitted.lines()
    assert line.startswith("val: image not readable: 1 (0.jpg")


def test_an_image_said_to_be_huge_is_left_out_and_not_decoded(tmp_path):
    """A header of four gigapixels: Pillow refuses it as a bomb, with an error of its own kind."""
    write_colour_folders(tmp_path / "train", 4)
    write_colour_folders(tmp_path / "val", 4)
    png = b"\x89PNG\r\n\x1a\n"
    for kind in (b"IHDR" + struct.pack(">IIBBBBB", 65500, 65500, 8, 2, 0, 0, 0), b"IDAT"):
        png += struct.pack(">I", len(kind) - 4) + kind + struct.pack(">I", zlib.crc32(kind))
    (tmp_path / "train/class_0/0.jpg").write_bytes(png)
    (tmp_path / "val/class_1/1.jpg").write_bytes(b"no image")
    config = knn.Config(size=32, k=(1,))
    data = knn.load(tmp_path, config)
    assert knn.run(ColourBackbone(), data, config)["top1@1"] > 95
    train, val = data.omitted.lines()
    assert train.startswith(
        "train: image not readable: 1 (0.jpg: not decodable: Image size (4290250000"
    )
    assert val == "val: image not readable: 1 (1.jpg: no image format that is known)"


def test_class_folder_mistakes_are_refused(tmp_path):
    write_colour_folders(tmp_path / "train", 1)
    with pytest.raises(UserError, match="no folder val/"):
        knn.load(tmp_path, knn.Config())
    write_colour_folders(tmp_path / "val", 1, classes=5)
    with pytest.raises(UserError, match="classes that train has not: class_4"):
        knn.load(tmp_path, knn.Config())
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val/class_0").mkdir(parents=True)
    with pytest.raises(UserError, match="nothing usable: val: class folder without images: 1"):
        knn.load(tmp_path, knn.Config())
    with pytest.raises(UserError, match="224 is not|100 is not a multiple of the stride 8; take"):
        write_colour_folders(tmp_path / "val", 1)
        knn.run(ColourBackbone(), knn.load(tmp_path, knn.Config(size=100)), knn.Config(size=100))


# --- the segmentation protocol


def test_segmentation_learns_a_separable_set_and_not_random_labels(tmp_path):
    write_camvid_discs(tmp_path / "a", 10)
    write_camvid_discs(tmp_path / "b", 10, random_labels=True)
    config = segment.Config(size=(72, 96), steps=150, batch_size=4)
    data = segment.load(tmp_path / "a", config)
    assert data.classes == ("Sky", "Red disc", "Green disc") and not data.omitted.lines()
    values = segment.run(ColourBackbone(), data, config)
    assert values["aAcc"] > 95 and values["mIoU"] > 60
    assert values["mAcc"] > values["chance/mAcc"] == pytest.approx(100 / 3)
    control = segment.run(ColourBackbone(), segment.load(tmp_path / "b", config), config)
    assert control["aAcc"] < 45 and control["mAcc"] < 45
    assert segment.run(ColourBackbone(), data, config) == values  # to the bit


def test_linear_probe_separates_cells_above_95_percent():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (24, 6, 8), generator=generator)
    features = F.one_hot(truth.flatten(1), 4).float() * 2
    features = features + 0.3 * torch.randn(features.shape, generator=generator)
    config = segment.Config(steps=200, batch_size=8)

    def accuracy(labels: Tensor) -> float:
        cpu = torch.device("cpu")
        probe = segment.fit_probe(features, labels.to(torch.uint8), (6, 8), 4, config, cpu)
        said = probe.scores(features, (6, 8)).argmax(1)
        return (said == labels).float().mean().item()

    assert accuracy(truth) > 0.95
    assert accuracy(torch.randint(0, 4, truth.shape, generator=generator)) < 0.35


def test_scores_are_taken_at_label_resolution(tmp_path):
    """One pixel of another class per label map: visible only where labels are never resized."""
    write_camvid_discs(tmp_path, 3)
    for path in (tmp_path / "valannot").glob("*.png"):
        labels = np.zeros((72, 96), np.uint8)
        labels[35, 47] = 1
        Image.fromarray(labels).save(path)
    config = segment.Config(size=(24, 32), steps=5, batch_size=2)
    values = segment.run(ColourBackbone(), segment.load(tmp_path, config), config)
    assert values["chance/aAcc"] == pytest.approx(100 * (1 - 1 / (72 * 96)), rel=1e-9)


def test_upsampling_equals_interpolate():
    maps = torch.randn(2, 3, 5, 7)
    for size in [(40, 56), (33, 100), (5, 7), (3, 4)]:
        ours = segment._upsampled(maps, size)
        theirs = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_segmentation_of_scenes(scenes):
    config = segment.Config(size=(64, 64), steps=40, batch_size=4)
    data = segment.load(scenes, config)
    assert len(data.classes) == 15 and data.classes[0] == "background"
    coarse = segment.load(scenes, segment.Config(labels="supercategory", max_train=5))
    assert coarse.classes == ("background", "toy", "container", "tool", "plant", "animal")
    assert len(coarse.train) == 5 and coarse.content != data.content
    assert max(int(image.read_labels().max()) for image in coarse.val) <= 5
    values = segment.run(ColourBackbone(), data, config)
    assert values["aAcc"] >= 0.8 * values["chance/aAcc"]


# --- features and their cache


def test_features_are_kept_by_weights_and_content(tmp_path):
    write_colour_folders(tmp_path / "d/train", 3)
    write_colour_folders(tmp_path / "d/val", 2)
    config = knn.Config(size=32, k=(1,))
    backbone = ColourBackbone()
    cache = FeatureCache(tmp_path / "features", "a" * 64)
    first = knn.run(backbone, knn.load(tmp_path / "d", config), config, cache)
    calls = backbone.calls
    assert knn.run(backbone, knn.load(tmp_path / "d", config), config, cache) == first
    assert backbone.calls == calls  # nothing computed
    knn.run(backbone, knn.load(tmp_path / "d", config), config, FeatureCache(cache.folder, "b"))
    assert backbone.calls == 2 * calls  # other weights
    write_jpeg(tmp_path / "d/val/class_0/new.jpg", np.zeros((40, 40, 3), np.uint8))
    knn.run(backbone, knn.load(tmp_path / "d", config), config, cache)
    assert backbone.calls > 2 * calls  # other data
    for path in cache.folder.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert knn.run(backbone, knn.load(tmp_path / "d", config), config, cache)["top1@1"] > 80


def test_an_image_that_was_away_counts_again_once_it_is_back(tmp_path):
    write_colour_folders(tmp_path / "d/train", 3)
    write_colour_folders(tmp_path / "d/val", 2)
    config = knn.Config(size=32, k=(1,))
    cache = FeatureCache(tmp_path / "features", "a" * 64)
    backbone, image = ColourBackbone(), tmp_path / "d/val/class_0/0.jpg"
    data = knn.load(tmp_path / "d", config)
    image.rename(tmp_path / "away")  # storage hiccups: after it was listed, and with the same stamp
    knn.run(backbone, data, config, cache)
    assert any("image not readable" in line for line in data.omitted.lines())
    calls = backbone.calls
    knn.run(backbone, data, config, cache)
    assert backbone.calls == calls  # still away: nothing to compute
    (tmp_path / "away").rename(image)
    data = knn.load(tmp_path / "d", config)
    knn.run(backbone, data, config, cache)
    assert data.omitted.lines() == []


def test_reading_ahead_keeps_the_order():
    got = list(in_order(lambda i: torch.tensor(i), range(300), ahead=7))
    assert [int(x) for x in got] == list(range(300))
    assert thinned(range(10), None) == tuple(range(10))
    assert thinned(range(10), 3) in ((0, 4, 9), (0, 5, 9))
    assert thinned(range(10), 1) == (0,)
