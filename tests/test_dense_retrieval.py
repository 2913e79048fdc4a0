"""Looking up cells and segments: against loops, on sets one can and cannot learn, at their ends."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dataprep.synthetic import write_camvid_discs
from dense_ssl.backbones import Backbone, BackboneConfig, Features
from dense_ssl.config import UserError
from dense_ssl.evaluation import suite
from dense_ssl.evaluation.features import FeatureCache
from dense_ssl.evaluation.matching import hummingbird, retrieve
from dense_ssl.evaluation.matching.hummingbird import Memory, chosen, class_shares, look_up
from dense_ssl.evaluation.matching.segments import packed_segments, unpacked

needs_sklearn = pytest.mark.skipif(find_spec("sklearn") is None, reason="needs scikit-learn")


class Colours(Backbone):
    """Cells of 8 x 8 pixels, each its mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BackboneConfig(name="resnet18")
        self.trunk = nn.Linear(1, 1)
        self.dim, self.stride, self.calls = 3, 8, 0

    def forward(self, images):
        self.calls += 1
        cells = F.avg_pool2d(images, 8)
        dense = cells.flatten(2).transpose(1, 2)
        return Features(dense.mean(1, keepdim=True), dense, (cells.shape[2], cells.shape[3]))

    def compile_encoder(self): ...

    def checkpoint_gradients(self): ...


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    root = tmp_path_factory.mktemp("discs")
    write_camvid_discs(root / "true", 8)
    write_camvid_discs(root / "random", 8, random_labels=True)
    return root


# --- hummingbird


def test_class_shares_equal_a_loop():
    labels = np.random.default_rng(0).integers(0, 5, (12, 20)).astype(np.uint8)
    labels[labels == 4] = 255
    labels[:4, :4] = 255
    got = class_shares(labels, (3, 5), 4)
    for row in range(3):
        for column in range(5):
            cell = labels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            known = cell[cell != 255]
            expected = [np.mean(known == c) if known.size else 0 for c in range(4)]
            assert got[row * 5 + column] == pytest.approx(expected, abs=1e-6)


def test_a_full_memory_prefers_cells_of_rare_classes():
    shares = np.zeros((100, 3), np.float32)
    shares[:80, 0] = 1
    shares[80:84, 1] = 1  # rare
    shares[84:86] = (0.5, 0.5, 0)  # rare and common
    assert not shares[86:].any()  # void
    counts = np.zeros(100)
    for seed in range(200):
        kept = chosen(shares, 10, np.random.default_rng(seed))
        assert len(set(kept)) == 10 and (np.diff(kept) > 0).all()
        counts[kept] += 1
    assert counts[86:].sum() == 0
    assert counts[80:84].min() > 150 and counts[:80].mean() < 25
    assert abs(counts[84:86].mean() - counts[:80].mean()) < 15  # both classes count
    every = chosen(shares, None, np.random.default_rng(0))
    assert every.tolist() == chosen(shares, 86, np.random.default_rng(0)).tolist() == [*range(86)]


def test_looking_up_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    cells = F.normalize(torch.randn(50, 6, generator=generator), dim=1)
    labels = torch.rand(50, 4, generator=generator)
    queries = F.normalize(torch.randn(7, 6, generator=generator), dim=1)
    for k in (1, 5, 80):
        got = look_up(queries, Memory(cells, labels), k, 0.1)
        for row, query in zip(got, queries.double()):
            cosine = (cells.double() @ query).numpy()
            nearest = np.argsort(-cosine)[:k]
            weights = np.exp(cosine[nearest] / 0.1)
            expected = weights @ labels.double().numpy()[nearest] / weights.sum()
            assert row.numpy() == pytest.approx(expected, abs=1e-5)


def hummingbird_scores(root, cache=None, backbone=None, **settings):
    config = hummingbird.Config(**({"size": (72, 96), "k": 5} | settings))
    data = hummingbird.load(root, config)
    assert data.protocol == "hummingbird/v1"
    return hummingbird.run(backbone or Colours(), data, config, cache)


def test_hummingbird_learns_a_separable_set_and_not_random_labels(discs):
    values = hummingbird_scores(discs / "true")
    assert values["aAcc"] > 93 and values["mIoU"] > 75
    assert values["mAcc"] > values["chance/mAcc"] == pytest.approx(100 / 3)
    assert hummingbird_scores(discs / "true") == values
    control = hummingbird_scores(discs / "random")
    assert control["aAcc"] < 45 and control["mAcc"] < 45


def test_a_small_memory_still_knows_the_classes(discs):
    few = hummingbird_scores(discs / "true", memory_size=40)
    assert few["mIoU"] > 60
    assert few != hummingbird_scores(discs / "true", memory_size=40, seed=1)
    config = hummingbird.Config(size=(72, 96), memory_size=40)
    data = hummingbird.load(discs / "true", config)
    memory = hummingbird._memory(Colours(), data, config, None)
    assert len(memory.cells) == len(memory.labels) == 40
    torch.testing.assert_close(memory.cells.float().norm(dim=1), torch.ones(40), rtol=0, atol=2e-3)
    torch.testing.assert_close(memory.labels.float().sum(1), torch.ones(40), rtol=0, atol=2e-3)


def test_the_memory_is_kept(discs, tmp_path):
    cache, backbone = FeatureCache(tmp_path / "features", "weights"), Colours()
    values = hummingbird_scores(discs / "true", cache, backbone)
    calls = backbone.calls
    assert hummingbird_scores(discs / "true", cache, backbone) == values
    assert backbone.calls == calls
    assert hummingbird_scores(discs / "true", cache, backbone, k=1) != values
    assert backbone.calls == calls
    for file in (tmp_path / "features").rglob("memory.safetensors"):
        file.write_bytes(b"broken")
    assert hummingbird_scores(discs / "true", cache, backbone) == values


def test_what_cannot_be_read_is_left_out(tmp_path):
    write_camvid_discs(tmp_path, 4)
    (tmp_path / "train/002.jpg").write_bytes((tmp_path / "train/002.jpg").read_bytes()[:700])
    (tmp_path / "valannot/001.png").unlink()
    config = hummingbird.Config(size=(72, 96), k=5)
    data = hummingbird.load(tmp_path, config)
    assert hummingbird.run(Colours(), data, config)["aAcc"] > 90
    assert [line.split(":")[1] for line in data.omitted.lines()] == [
        " mask missing", " image not readable",
    ]  # fmt: skip
    with pytest.raises(UserError, match="size: 70 is not a multiple of the stride 8"):
        hummingbird.run(Colours(), data, hummingbird.Config(size=(70, 96)))


@needs_sklearn
def test_a_split_that_is_void_everywhere_is_refused(discs):
    config = hummingbird.Config(size=(72, 96), k=5)
    data = hummingbird.load(discs / "true", config)
    void = tuple(
        replace(image, read_labels=lambda: np.full((72, 96), 255, np.uint8)) for image in data.val
    )
    for task, settings in ((hummingbird, config), (retrieve, retrieve.Config(size=(72, 96)))):
        with pytest.raises(UserError, match="train: every pixel is void"):
            task.run(Colours(), replace(data, train=void), settings)
        with pytest.raises(UserError, match="val: every pixel is void"):
            task.run(Colours(), replace(data, val=void), settings)


# --- segment retrieval


@needs_sklearn
def test_segments_are_the_clusters_of_an_image():
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(3, 8, generator=generator), dim=1)
    truth = torch.randint(0, 3, (2, 20), generator=generator)
    cells = 4 * centres[truth] + 0.01 * torch.randn(2, 20, 8, generator=generator)
    features = Features(cells.mean(1, keepdim=True), cells, (4, 5))
    found = unpacked(packed_segments(features, 3, seed=0), 3, (4, 5))
    assert found.maps.shape == (2, 4, 5) and found.prototypes.shape == (2, 3, 8)
    for image in range(2):
        clusters = found.maps[image].flatten().long()
        same = clusters[:, None] == clusters
        assert torch.equal(same, truth[image][:, None] == truth[image])
        torch.testing.assert_close(
            found.prototypes[image][clusters], centres[truth[image]], rtol=0, atol=0.02
        )


@needs_sklearn
def test_an_image_of_one_colour_has_one_segment():
    cells = torch.ones(1, 6, 4)
    found = unpacked(packed_segments(Features(cells[:, :1], cells, (2, 3)), 5, 0), 5, (2, 3))
    assert (found.maps == 0).all()
    assert found.prototypes[0].norm(dim=1).tolist() == pytest.approx([1, 0, 0, 0, 0])


def test_pixels_of_segments_equal_a_loop():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 3, (4, 5)).astype(np.uint8)
    labels = rng.integers(0, 4, (8, 20)).astype(np.uint8)
    labels[labels == 3] = 255
    got = retrieve.class_pixels(clusters, labels, 3, 3)
    large = np.kron(clusters, np.ones((2, 4), np.uint8))
    for cluster in range(3):
        for label in range(3):
            assert got[cluster, label] == np.sum((large == cluster) & (labels == label))


def test_mean_iou_equals_that_of_the_pixels():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 30, (6, 4, 5))
    pixels[..., 4] = 0  # a class that truth lacks
    answers = rng.integers(0, 4, (6, 4))
    truth = np.concatenate([np.repeat(np.arange(5), row) for row in pixels.reshape(-1, 5)])
    said = np.repeat(answers.ravel(), pixels.reshape(-1, 5).sum(1))

    def ours(first=0):
        return retrieve.mean_iou(torch.from_numpy(answers), torch.from_numpy(pixels), first)

    every = metrics.jaccard_score(truth, said, average=None)
    assert ours() == pytest.approx(100 * every.mean())
    assert ours(first=1) == pytest.approx(100 * every[1:].mean())


def test_segments_take_the_class_of_the_nearest():
    memory = F.normalize(torch.tensor([[[1.0, 0], [0, 1]], [[1, 1], [-1, 0]]]), dim=2)
    pixels = torch.tensor([[[5, 1, 0], [0, 3, 2]], [[0, 0, 9], [0, 0, 0]]])  # the last one is void
    queries = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.7, 0.7], [-1, -0.2]]])
    assert retrieve.retrieved(memory, pixels, queries).tolist() == [[0, 1], [2, 1]]


def retrieve_scores(root, **settings):
    config = retrieve.Config(**({"size": (72, 96), "clusters": 3} | settings))
    data = retrieve.load(root, config)
    assert data.protocol == "retrieve-kmeans/v1"
    return retrieve.run(Colours(), data, config)


@needs_sklearn
def test_retrieval_learns_a_separable_set_and_not_random_labels(discs):
    values = retrieve_scores(discs / "true")
    assert set(values) == {"mIoU", "chance/mIoU"}
    assert values["mIoU"] > 70 > 40 > values["chance/mIoU"]
    assert retrieve_scores(discs / "true") == values
    assert retrieve_scores(discs / "random")["mIoU"] < 30


def write_voc(root):
    """VOC's layout: an aeroplane (red) or a dog (green) on blue, the colour telling the class."""
    home = root / "VOC2012"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        names = [f"{split}_{n}" for n in range(4)]
        listing = home / f"ImageSets/Segmentation/{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(names))
        for n, name in enumerate(names):
            mask, image = (
                np.zeros((64, 64), np.uint8),
                np.full((64, 64, 3), (40, 40, 200), np.uint8),
            )
            y, x = rng.integers(1, 5, 2) * 8
            place = slice(y, y + 24), slice(x, x + 24)
            mask[place] = (1, 12)[n % 2]
            image[place] = ((220, 30, 30), (30, 220, 30))[n % 2]
            for folder, suffix, pixels in (
                ("JPEGImages", "jpg", image),
                ("SegmentationClass", "png", mask),
            ):
                (home / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(home / folder / f"{name}.{suffix}")


def birds_for_dogs(image):
    def read():
        labels = image.read_labels()
        return np.where(labels == 12, np.uint8(3), labels)

    return read


@needs_sklearn
def test_seven_classes_of_voc_are_scored_without_the_others(tmp_path):
    write_voc(tmp_path)
    config = retrieve.Config(size=(64, 64), clusters=2)
    data = retrieve.load(tmp_path, config)
    values = retrieve.run(Colours(), data, config)
    assert values["mIoU-21"] > 95 and values["mIoU-7"] > 95
    assert values["chance/mIoU-7"] == 0  # background everywhere, which is not scored
    # Dogs are void in the second score: what is said of them costs nothing there.
    wrong = tuple(replace(image, read_labels=birds_for_dogs(image)) for image in data.train)
    confused = retrieve.run(Colours(), replace(data, train=wrong), config)
    assert confused["mIoU-7"] == values["mIoU-7"] and confused["mIoU-21"] < 70


@needs_sklearn
def test_both_are_tasks_with_pictures(discs, tmp_path):
    found = suite.evaluate(
        ["hummingbird", "retrieve"], "random:test_resnet", str(discs / "true"),
        ["size=64", "max_train=4", "max_val=3"], out=tmp_path,
    )  # fmt: skip
    assert {result.protocol for result in found} == {"hummingbird/v1*", "retrieve-kmeans/v1*"}
    assert all(result.chance is not None for result in found)
    assert (tmp_path / "eval/hummingbird-predictions.png").is_file()
    assert (tmp_path / "eval/retrieve-nearest.png").is_file()
