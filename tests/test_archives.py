"""Small data sets in their own files: what is read from them, and what is refused."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dataprep.synthetic import write_jpeg
from dense_ssl.config import UserError
from dense_ssl.evaluation.classification import archives, cluster, knn, semi_supervised
from dense_ssl.evaluation.classification.augmented import Augmentation
from dense_ssl.evaluation.classification.data import open_classification, open_picture, picture_size
from dense_ssl.evaluation.classification.linear import TrainingCrops
from tests.test_evaluation import ColourBackbone

COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)], np.uint8)


@pytest.fixture(autouse=True)
def _nothing_read_before():
    archives._records.cache_clear()


def images(labels, seed):
    """Uint8 [n, 3072] as CIFAR stores them: all of red, then green, then blue."""
    noise = np.random.default_rng(seed).integers(0, 40, (len(labels), 3, 1024))
    return (COLOURS[labels][:, :, None] + noise).astype(np.uint8).reshape(len(labels), -1)


def write_cifar(root, folder):
    """Ten images a file, in the two ways CIFAR-10 and CIFAR-100 are distributed."""
    home = root / folder
    home.mkdir(parents=True)
    ten, binary = "10-" in folder, not folder.endswith(("py", "python"))
    train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    names = ["red", "green", "blue", "yellow"]
    truth = {}
    for number, file in enumerate([*train, "test_batch" if ten else "test"]):
        labels = (np.arange(10) + number) % 4
        pixels = truth[file] = images(labels, number)
        if binary:
            before = [labels[:, None]] if ten else [labels[:, None] // 2, labels[:, None]]
            records = np.concatenate([*before, pixels], axis=1).astype(np.uint8)
            records.tofile(home / f"{file}.bin")
        else:
            key = "labels" if ten else "fine_labels"
            content = {"data": pixels, key: labels.tolist(), "filenames": ["a.png"] * 10}
            (home / file).write_bytes(pickle.dumps(content, protocol=2))
    if binary:
        (home / ("batches.meta.txt" if ten else "fine_label_names.txt")).write_text(
            "\n".join(names) + "\n\n"
        )
    else:
        key = "label_names" if ten else "fine_label_names"
        (home / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps({key: names}))
    return truth


FOLDERS = [stored.folder for stored in archives._CIFARS]


@pytest.mark.parametrize("folder", FOLDERS)
def test_cifar_is_read_as_it_is_distributed(folder, tmp_path):
    truth = write_cifar(tmp_path, folder)
    for root in (tmp_path, tmp_path / folder):
        data = open_classification(root, (None, 7), "knn")
        assert data.protocol == "knn/v1" and data.classes == ("red", "green", "blue", "yellow")
        assert len(data.train.pictures) == (50 if "10-" in folder else 10)
        assert len(data.val.pictures) == 7 and data.omitted.lines() == []
    picture = data.train.pictures[3]
    image, window = open_picture(picture)
    first = next(iter(truth.values()))
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1).ravel(), first[3])
    assert window == (0, 0, 32, 32) and picture_size(picture) == (32, 32)
    assert str(picture).endswith("[3]") and data.train.labels[:5].tolist() == [0, 1, 2, 3, 0]


def test_protocols_take_them(tmp_path):
    write_cifar(tmp_path, "cifar-10-batches-py")
    backbone = ColourBackbone()
    config = knn.Config(size=32, k=3)
    assert knn.run(backbone, knn.load(tmp_path, config), config)["top1@3"] == 100
    few = semi_supervised.Config(size=32, subset="2/class", lambdas=1.0)
    assert semi_supervised.run(backbone, semi_supervised.load(tmp_path, few), few)["top1"] == 100
    assert len(cluster.load(tmp_path, cluster.Config()).val.pictures) == 10
    data = knn.load(tmp_path, config)
    crops = TrainingCrops(
        data.train.pictures, data.train.labels, Augmentation(24, "bicubic"), batch_size=10, seed=0,
        workers=0, omitted=data.omitted,
    )  # fmt: skip
    shown, labels = next(crops.epoch(0))
    assert shown.shape == (10, 3, 24, 24)
    nearest = (shown.float().mean((2, 3))[:, None].numpy() - COLOURS - 20) ** 2
    assert (nearest.sum(2).argmin(1) == labels.numpy()).all()


def matlab(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content)


def write_flowers(root):
    for number in range(1, 7):
        write_jpeg(
            root / "jpg" / f"image_{number:05d}.jpg", np.full((20, 30, 3), 40 * number, np.uint8)
        )
    matlab(root / "imagelabels.mat", labels=np.array([[1, 2, 102, 1, 2, 102]], np.uint8))
    matlab(root / "setid.mat", trnid=[[1, 2]], valid=[[3]], tstid=[[4, 5, 6]])


def write_cars(root):
    kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    matlab(root / "devkit/cars_meta.mat", class_names=np.array(["A 1", "B 2"], object)[None])
    for split, file, count in (
        ("train", "devkit/cars_train_annos.mat", 3),
        ("test", "cars_test_annos_withlabels.mat", 2),
    ):
        rows = [(5, i % 2 + 1, f"{i:05d}.jpg") for i in range(count)]
        matlab(root / file, annotations=np.array(rows, kind)[None])
        for _, _, name in rows:
            write_jpeg(root / f"cars_{split}" / name, np.zeros((20, 30, 3), np.uint8))


def write_inaturalist(root):
    for split, count in (("train", 3), ("val", 2)):
        files = [f"train_val2018/Birds/{split}{i}.jpg" for i in range(count)]
        content = {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(files)],
            "annotations": [{"image_id": i, "category_id": (7, 3)[i % 2]} for i in range(count)],
            "categories": [{"id": 7, "name": "heron"}, {"id": 3, "name": "gull"}],
        }
        (root / f"{split}2018.json").write_text(json.dumps(content))
        for name in files:
            write_jpeg(root / name, np.zeros((20, 30, 3), np.uint8))


@pytest.mark.parametrize(
    ("write", "classes", "train", "val", "file", "image"),
    [
        (write_flowers, 102, [0, 1, 101], [0, 1, 101], "setid.mat", "jpg/image_00002.jpg"),
        (write_cars, 2, [0, 1, 0], [0, 1], "devkit/cars_meta.mat", "cars_train/00001.jpg"),
        (
            write_inaturalist, 2, [1, 0, 1], [1, 0], "val2018.json",
            "train_val2018/Birds/train1.jpg",
        ),
    ],
)  # fmt: skip
def test_images_beside_a_listing(write, classes, train, val, file, image, tmp_path):
    write(tmp_path)
    data = open_classification(tmp_path, (None, None), "finetune-transfer")
    assert len(data.classes) == classes and data.protocol == "finetune-transfer/v1"
    assert data.train.labels.tolist() == train and data.val.labels.tolist() == val
    assert isinstance(open_picture(data.val.pictures[0])[0], Image.Image)
    (tmp_path / image).unlink()
    data = open_classification(tmp_path, (None, None), "knn")
    assert data.train.labels.tolist() == [train[0], train[2]]
    assert data.omitted.lines() == [f"train: image file missing: 1 ({image.split('/')[-1]})"]
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:40])
    with pytest.raises(UserError, match=r"cannot be read .*; fetch it again|lacks"):
        open_classification(tmp_path, (None, None), "knn")
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match="no such file"):
        open_classification(tmp_path, (None, None), "knn")


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_what_is_damaged_or_hostile_is_refused(tmp_path, capsys):
    write_cifar(tmp_path, "cifar-10-batches-py")
    home = tmp_path / "cifar-10-batches-py"
    whole = (home / "data_batch_2").read_bytes()
    for content, says in (
        (pickle.dumps(Code()), "not an allowed global"),
        (whole[: len(whole) // 2], "cannot be read"),
        (pickle.dumps({"data": images(np.zeros(3, int), 0), "labels": [0, 1]}), r"3, 3072\), 2"),
        (pickle.dumps({"data": images(np.zeros(1, int), 0), "labels": [9]}), "class 9 of 4"),
    ):
        archives._records.cache_clear()
        (home / "data_batch_2").write_bytes(content)
        with pytest.raises(UserError, match=f"data_batch_2: .*{says}"):
            open_classification(tmp_path, (None, None), "knn")
    assert "this ran" not in capsys.readouterr().out
    archives._records.cache_clear()
    (home / "data_batch_2").unlink()
    with pytest.raises(UserError, match="no such file; cifar-10-batches-py has one"):
        open_classification(tmp_path, (None, None), "knn")
    write_cifar(tmp_path / "b", "cifar-100-binary")
    with (tmp_path / "b/cifar-100-binary/test.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="test.bin: cannot be read"):
        open_classification(tmp_path / "b", (None, None), "knn")
