"""Label maps in the folders that data sets are distributed in; what is broken is counted and named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dense_ssl.config import UserError
from dense_ssl.evaluation.label_maps import VOID, Code, read_coded, signed
from dense_ssl.evaluation.metrics import confusion, foreground_f, segmentation_scores
from dense_ssl.evaluation.segmentation import probe as segment
from dense_ssl.evaluation.segmentation import train as segment_train
from dense_ssl.evaluation.segmentation.data import SegmentData, open_segmentation
from dense_ssl.evaluation.segmentation.layouts import CITYSCAPES, VOC_CLASSES
from dense_ssl.evaluation.segmentation.protocols import FcnConfig, FinetuneConfig

SIZE = (6, 9)


def write_image(path: Path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (90, 120, 30)).save(path)


def write_mask(path: Path, numbers, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.broadcast_to(np.asarray(numbers, np.uint8), SIZE).copy())
    if palette:
        image.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    image.save(path)


def opened(root, labels="category", **options) -> SegmentData:
    return open_segmentation(root, labels, None, None, **options)


def values(data: SegmentData, split: str) -> list[set[int]]:
    return [set(np.unique(image.read_labels()).tolist()) for image in getattr(data, split)]


def voc(root: Path):
    home = root / "VOCdevkit" / "VOC2012"
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, row in (("a", [0] * 8 + [255]), ("b", [20] * 9), ("c", [15] * 9)):
        write_image(home / "JPEGImages" / f"{name}.jpg")
        write_mask(home / "SegmentationClass" / f"{name}.png", row, palette=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\nc\n")
    return home


def test_voc_and_its_additional_masks(tmp_path):
    home = voc(tmp_path)
    data = opened(tmp_path)
    assert data.layout == "voc" and data.classes == VOC_CLASSES and len(data.classes) == 21
    assert values(data, "train") == [{0, VOID}] and values(data, "val") == [{20}, {15}]
    assert opened(home).content == data.content  # the folder itself is understood too
    with pytest.raises(UserError, match="no trainaug.txt .* take train_split=train"):
        opened(tmp_path, train_split="trainaug")
    (home / "ImageSets/Segmentation/trainaug.txt").write_text("a\nd\n")
    write_image(home / "JPEGImages/d.jpg")
    for name in "ad":
        write_mask(home / f"SegmentationClassAug/{name}.png", [3] * 9)
    for split in (None, "trainaug"):
        assert values(opened(tmp_path, train_split=split), "train") == [{3}, {3}]
    assert len(opened(tmp_path, train_split="train").train) == 1


def test_archive_of_voc(tmp_path):
    home = voc(tmp_path / "x")
    (home / "JPEGImages").rename(home / "images")
    (home / "ImageSets/Segmentation").rename(home / "sets")
    home.rename(tmp_path / "archive")
    assert values(opened(tmp_path / "archive"), "val") == [{20}, {15}]


def test_cityscapes_ids(tmp_path):
    for split in ("train", "val"):
        stem = f"ulm_{split}_000019"
        write_image(tmp_path / f"leftImg8bit/{split}/ulm/{stem}_leftImg8bit.png")
        write_mask(
            tmp_path / f"gtFine/{split}/ulm/{stem}_gtFine_labelIds.png",
            [0, 7, 8, 33, 26, 29, 255, 11, 3],
        )
    data = opened(tmp_path)
    assert data.layout == "cityscapes" and len(data.classes) == 19 == len(CITYSCAPES)
    assert data.val[0].read_labels()[0].tolist() == [255, 0, 1, 18, 13, 255, 255, 2, 255]
    write_mask(tmp_path / f"gtFine/val/ulm/{stem}_gtFine_labelIds.png", [40] * 9)
    with pytest.raises(UserError, match="mask has number 40, which means nothing: 1"):
        opened(tmp_path)


def test_ade20k_has_no_class_zero(tmp_path):
    home = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        write_image(home / f"images/{split}/ADE_1.jpg")
        write_mask(home / f"annotations/{split}/ADE_1.png", [0, 1, 150] * 3)
    (home / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.1\twall\n2\t0.1\tbuilding, x\n")
    for root in (tmp_path, home):
        data = opened(root)
        assert data.layout == "ade20k" and len(data.classes) == 150
        assert data.classes[:3] == ("wall", "building", "class 3")
        assert data.train[0].read_labels()[0, :3].tolist() == [VOID, 0, 149]


def test_coco_stuff_in_both_distributions(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / f"{split}2017/1.jpg")
        write_mask(tmp_path / f"annotations/stuff_{split}2017_pixelmaps/1.png", [0, 92, 183] * 3)
    data = opened(tmp_path, "stuff")
    assert data.layout == "coco-stuff" and len(data.classes) == 92 and data.classes[-1] == "other"
    assert data.val[0].read_labels()[0, :3].tolist() == [VOID, 0, 91]
    for split in ("train", "val"):
        write_mask(tmp_path / f"stuffthingmaps/{split}2017/1.png", [0, 181, 255] * 3)
    (tmp_path / "labels.txt").write_text("0: unlabeled\n1: person\n")
    data = opened(tmp_path, "stuff")
    assert len(data.classes) == 171 and data.classes[0] == "person"
    assert data.val[0].read_labels()[0, :3].tolist() == [0, 170, VOID]
    write_mask(tmp_path / "stuffthingmaps/val2017/1.png", [11] * 9)  # a category of no image
    with pytest.raises(UserError, match="number 11, which means nothing"):
        opened(tmp_path, "stuff")


@pytest.mark.parametrize("synsets", [2, 300])
def test_imagenet_s_numbers_are_red_and_green(tmp_path, synsets):
    for number in range(1, synsets + 1):
        (tmp_path / "train-semi" / f"n{number:08d}").mkdir(parents=True)
    for split in ("train-semi", "validation"):
        folder = f"n{synsets:08d}"
        write_image(tmp_path / split / folder / "x.JPEG")
        row = np.array([0, 1, synsets, 1000, 0, 0, 0, 0, 0])
        colours = np.stack([row % 256, row // 256, row * 0], -1).astype(np.uint8)
        path = tmp_path / f"{split}-segmentation" / folder / "x.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.broadcast_to(colours, (*SIZE, 3)).copy()).save(path)
    config = FinetuneConfig()
    data = segment_train.load(tmp_path, config)
    assert data.protocol == "segment-finetune/imagenet-s/v1" and len(data.classes) == synsets + 1
    labels = signed(data.train[0].read_labels())
    assert labels[0, :4].tolist() == [0, 1, synsets, -1] and labels.dtype == np.int16
    if synsets > 254:
        with pytest.raises(UserError, match="301 classes; this task takes 254 at most"):
            segment.load(tmp_path, segment.Config())


def test_what_is_broken_is_counted_and_named(tmp_path):
    home = voc(tmp_path)
    names = ["missing", "unmasked", "smaller", "garbled", "void", "strange", "colour", "torn"]
    (home / "ImageSets/Segmentation/train.txt").write_text("\n".join(["a", *names]))
    for name in names[1:]:
        write_image(home / f"JPEGImages/{name}.jpg", (5, 5) if name == "smaller" else SIZE)
        write_mask(home / f"SegmentationClass/{name}.png", [4] * 9)
    (home / "SegmentationClass/unmasked.png").unlink()
    (home / "SegmentationClass/garbled.png").write_bytes(b"no image")
    write_mask(home / "SegmentationClass/void.png", [255] * 9)
    write_mask(home / "SegmentationClass/strange.png", [21] * 9)
    Image.new("RGB", SIZE[::-1]).save(home / "SegmentationClass/colour.png")
    (home / "JPEGImages/torn.jpg").write_bytes(b"\xff\xd8torn")
    data = opened(tmp_path)
    assert [image.path.stem for image in data.train] == ["a"]
    assert data.omitted.lines() == [
        "train: image file missing: 1 (missing.jpg)",
        "train: mask missing: 1 (unmasked.jpg)",
        "train: mask of another size than its image: 1 (smaller.jpg)",
        "train: mask not readable: 1 (garbled.jpg)",
        "train: mask is void everywhere: 1 (void.jpg)",
        "train: mask has class 21 of 21: 1 (strange.jpg)",
        "train: mask is RGB, not one class index per pixel: 1 (colour.jpg)",
        "train: image header not readable: 1 (torn.jpg)",
    ]
    (home / "ImageSets/Segmentation/train.txt").write_text("missing\n")
    with pytest.raises(UserError, match=r"\(train\): nothing usable: train: image file missing: 1"):
        opened(tmp_path)
    shutil.rmtree(home / "SegmentationClass")
    with pytest.raises(UserError, match="neither COCO .* nor Cityscapes .* in it"):
        opened(tmp_path)


def test_codes_and_both_kinds_of_void(tmp_path):
    write_mask(tmp_path / "m.png", [5, 6, 9] * 3)
    narrow = read_coded(tmp_path / "m.png", Code({5: 0, 6: 1}, void=(9,)))
    assert narrow.dtype == np.uint8 and narrow[0, :3].tolist() == [0, 1, VOID]
    wide = read_coded(tmp_path / "m.png", Code({5: 0, 6: 300}, void=(9,)))
    assert wide.dtype == np.int16 and wide[0, :3].tolist() == [0, 300, -1]
    assert signed(narrow)[0, :3].tolist() == [0, 1, -1]
    with pytest.raises(ValueError, match="not R \\+ 256 G of a colour image"):
        read_coded(tmp_path / "m.png", Code({5: 0}, colours=True))


# --- metrics


@pytest.mark.parametrize("case", ["mixed", "absent", "one pixel", "all wrong", "wide"])
def test_metrics_equal_scikit_learn(case):
    """The F-measure of the foreground too."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 5, (40, 50)), rng.integers(0, 5, (40, 50))
    truth[rng.random(truth.shape) < 0.2] = -1
    if case == "absent":  # of the truth, of the prediction, and of both
        truth[truth == 1], said[said == 2] = 0, 0
        truth[truth == 4], said[said == 4] = 0, 0
    elif case == "one pixel":
        truth, said = np.zeros((40, 50), int), np.zeros((40, 50), int)
        truth[7, 9] = 3
    elif case == "all wrong":
        said = (truth + 1) % 5
    elif case == "wide":  # a class whose number is VOID's
        truth[truth == 3], said[said == 3] = 255, 255
    classes = 256 if case == "wide" else 5
    labels = torch.from_numpy(truth.astype(np.int16))
    matrix = confusion(labels, torch.from_numpy(said), classes)
    y, p = truth[truth >= 0], said[truth >= 0]
    expected = metrics.confusion_matrix(y, p, labels=range(classes))
    assert (matrix.numpy() == expected).all()
    f = metrics.fbeta_score(y > 0, p > 0, beta=0.3**0.5, zero_division=0)
    assert foreground_f(truth, said) == pytest.approx(f)
    assert foreground_f(np.where(truth > 0, -1, truth), said) == 0
    scores = segmentation_scores(matrix)
    occurring = np.union1d(y, p)
    iou = metrics.jaccard_score(y, p, labels=occurring, average="macro", zero_division=0)
    recall = metrics.recall_score(y, p, labels=np.unique(y), average="macro", zero_division=0)
    assert scores["mIoU"] == pytest.approx(100 * iou)
    assert scores["mAcc"] == pytest.approx(100 * recall)
    assert scores["aAcc"] == pytest.approx(100 * metrics.accuracy_score(y, p))


def test_nothing_but_void_is_no_score():
    matrix = confusion(torch.full((4, 4), -1), torch.zeros(4, 4, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="no labelled pixel"):
        segmentation_scores(matrix)


def test_real_voc_under_a_protocol(real_images):
    config = FcnConfig(train_split="train")
    data = segment_train.load(real_images / "voc-real4", config)
    assert data.protocol == "segment-fcn/voc-densecl/v1*" and (len(data.train), len(data.val)) == (
        2,
        2,
    )
    assert all(VOID in labels and 0 in labels for labels in values(data, "train"))
