"""Landmarks and copies: layouts as distributed, what can be found is found, chance, and bad data."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dataprep.synthetic import write_jpeg
from dense_ssl.backbones import Backbone, BackboneConfig, Features, make_backbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.__main__ import main
from dense_ssl.evaluation.retrieval import copydays, landmarks
from dense_ssl.evaluation.retrieval.copydays import mean_precision, whitened


class Colours(Backbone):
    """Cells of 8 x 8 pixels, each its mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BackboneConfig(name="resnet18")
        self.trunk = nn.Linear(1, 1)
        self.dim, self.stride, self.seen = 3, 8, []

    def forward(self, images):
        self.seen.append(tuple(images.shape[2:]))
        cells = F.avg_pool2d(images, 8)
        dense = cells.flatten(2).transpose(1, 2)
        return Features(dense.mean(1, keepdim=True), dense, (cells.shape[2], cells.shape[3]))

    def compile_encoder(self): ...

    def checkpoint_gradients(self): ...


COLOURS = [(220, 40, 40), (40, 220, 40), (40, 40, 220), (200, 200, 40)]


def picture(path, colour, size=(50, 70), seed=0):
    noise = np.random.default_rng(seed).normal(0, 10, (*size, 3))
    write_jpeg(path, np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def write_oxford(root, *, random=False, arrays=True):
    """Four places in the layout of roxford5k, each with easy, hard and junk images."""
    home = root / "roxford5k"
    rng = np.random.default_rng(0)
    names, gnd = [], []
    for place, colour in enumerate(COLOURS):
        for number in range(6):
            names.append(f"place{place}_{number}")
            picture(home / "jpg" / f"{names[-1]}.jpg", colour, seed=len(names))
    for place, colour in enumerate(COLOURS):
        picture(home / "jpg" / f"query{place}.jpg", colour, (40, 90), seed=100 + place)
        own = np.arange(6) + 6 * place
        own = rng.permutation(24)[:6] if random else own
        parts = {"easy": own[:3], "hard": own[3:5], "junk": own[5:]}
        if not arrays:
            parts = {name: part.tolist() for name, part in parts.items()}
        gnd.append({**parts, "bbx": [5.0, 5.0, 80.0, 35.0]})
    truth = {"gnd": gnd, "imlist": names, "qimlist": [f"query{place}" for place in range(4)]}
    (home / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return home


def found(root, backbone=None, **settings):
    config = landmarks.Config(**settings)
    data = landmarks.load(root, config)
    return landmarks.run(backbone or Colours(), data, config), data


@pytest.mark.parametrize("arrays", [True, False])
def test_places_are_found_and_random_truth_is_chance(tmp_path, arrays):
    write_oxford(tmp_path / "a", arrays=arrays)
    values, data = found(tmp_path / "a")
    assert data.protocol == "landmarks-roxford5k/v1" and data.omitted.lines() == []
    assert all(values[f"{kind}-mAP"] > 95 for kind in ("medium", "hard"))
    assert values["medium-mP@1"] == 100 and values["medium-mP@5"] == 100
    assert values["chance/medium-mAP"] < 50 and values["chance/hard-mAP"] < 40
    write_oxford(tmp_path / "b", random=True)
    control, _ = found(tmp_path / "b")
    assert abs(control["medium-mAP"] - control["chance/medium-mAP"]) < 25


def test_three_scales_of_whole_cells_at_the_images_own_shape(tmp_path):
    write_oxford(tmp_path)
    backbone = Colours()
    found(tmp_path / "roxford5k", backbone, size=64)
    assert backbone.seen[:3] == [(40, 64), (32, 40), (16, 32)]  # 46 x 64 and its smaller ones
    backbone = Colours()
    found(tmp_path, backbone, size=512, multi_scale=False, crop_queries=True)
    assert set(backbone.seen) == {(48, 64), (24, 72)}  # 50 x 70, and 30 x 75 of 40 x 90


def test_scales_are_averaged_before_the_norm():
    torch.manual_seed(0)
    vit = make_backbone(BackboneConfig(name="test_vit")).eval()
    images = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        got = landmarks.MultiScale(vit, "cls", (1.0, 0.5))(images)
        half = F.interpolate(images, scale_factor=0.5, mode="bilinear")[:, :, :48, :64]
        expected = vit(images).cls[:, 0] + vit(half).cls[:, 0]
    assert torch.allclose(got, F.normalize(expected, dim=1), atol=1e-6)


def test_missing_images_are_named_and_not_ranked(tmp_path):
    home = write_oxford(tmp_path)
    (home / "jpg/place0_0.jpg").unlink()
    (home / "jpg/query3.jpg").write_bytes(b"no image")
    values, data = found(tmp_path)
    assert values["hard-mAP"] > 95
    lines = "\n".join(data.omitted.lines())
    assert "database: image not readable: 1 (place0_0.jpg" in lines
    assert "queries: image not readable: 1 (query3.jpg" in lines


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_landmark_data_that_cannot_be_used_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="no roxford5k/gnd_roxford5k.pkl nor rparis6k"):
        landmarks.load(tmp_path, landmarks.Config())
    home = write_oxford(tmp_path)
    with pytest.raises(UserError, match="no rparis6k/gnd_rparis6k.pkl in it"):
        landmarks.load(tmp_path, landmarks.Config(dataset="rparis6k"))
    (tmp_path / "rparis6k").mkdir()
    truth = home / "gnd_roxford5k.pkl"
    shutil.copy(truth, tmp_path / "rparis6k/gnd_rparis6k.pkl")
    with pytest.raises(UserError, match="choose one by dataset="):
        landmarks.load(tmp_path, landmarks.Config())
    whole = pickle.loads(truth.read_bytes())
    for content, message in (
        (pickle.dumps({"gnd": Evil()}), "no code of a pickle is run: fetch"),
        (truth.read_bytes()[:200], "cannot be read as plain data"),
        (pickle.dumps([1, 2]), "not the revisited ground truth, which has gnd"),
        (pickle.dumps(whole | {"imlist": whole["imlist"][:3]}), "beyond the 3 of the database"),
        (pickle.dumps(whole | {"gnd": whole["gnd"][:2]}), "not the revisited ground truth"),
        (pickle.dumps(whole | {"gnd": [{"easy": []}] * 4}), "not the revisited ground truth"),
    ):
        truth.write_bytes(content)
        with pytest.raises(UserError, match=message):
            landmarks.load(home, landmarks.Config())
    assert "code was run" not in capsys.readouterr().out
    truth.write_bytes(pickle.dumps(whole))
    shutil.rmtree(home / "jpg")
    with pytest.raises(UserError, match="nothing usable: image file missing: 24"):
        landmarks.load(home, landmarks.Config())


# --- copies


def write_copies(root, *, random=False):
    rng = np.random.default_rng(1)
    colours = rng.integers(0, 256, (12, 3))
    for number, colour in enumerate(colours):
        picture(root / "original" / f"{2000 + number}00.jpg", colour, seed=number)
        shown = rng.integers(0, 256, 3) if random else colour
        for copy in range(2):
            name = f"{2000 + number}{copy + 1:02d}.jpg"
            picture(root / "strong" / name, shown, (30, 60), seed=50 + number)
        picture(root / "crops/50" / f"{2000 + number}01.jpg", shown, (20, 30), seed=90 + number)
    for number in range(8):
        picture(root / "distractors" / f"d{number}.jpg", rng.integers(0, 256, 3), seed=number)
        picture(root / "whitening" / f"w{number}.jpg", rng.integers(0, 256, 3), seed=number)


def detected(root, **settings):
    config = copydays.Config(**{"size": 32} | settings)
    data = copydays.load(root, config)
    return copydays.run(Colours(), data, config), data


def test_copies_are_found_and_strangers_are_not(tmp_path):
    write_copies(tmp_path / "a")
    values, data = detected(tmp_path / "a")
    assert data.protocol == "copydays/v1"
    assert values["mAP@original"] == 100 and values["mAP@strong"] > 95 > values["chance/mAP"]
    assert values["mAP@crops"] == values["note/crops-50"] and "mAP@jpegqual" not in values
    assert any("block without images: 17 (jpegqual/3" in line for line in data.omitted.lines())
    write_copies(tmp_path / "b", random=True)
    control, _ = detected(tmp_path / "b")
    assert control["mAP@strong"] < 60


def test_published_needs_distractors_and_whitening(tmp_path):
    write_copies(tmp_path)
    shutil.rmtree(tmp_path / "whitening")
    values, data = detected(tmp_path)
    assert data.protocol == "copydays-plain/v1" and values["mAP@original"] == 100
    picture(tmp_path / "strong/999901.jpg", (1, 2, 3))
    (tmp_path / "original/200000.jpg").write_bytes(b"no image")
    values, data = detected(tmp_path)
    lines = "\n".join(data.omitted.lines())
    assert "strong: copies without an original: 2 (2000, 9999)" in lines
    assert "original: image not readable: 1 (200000.jpg" in lines or "200000.jpg" in lines
    shutil.rmtree(tmp_path / "original")
    with pytest.raises(UserError, match="no images in original/"):
        detected(tmp_path)
    (tmp_path / "only/original").mkdir(parents=True)
    picture(tmp_path / "only/original/200000.jpg", (9, 9, 9))
    with pytest.raises(UserError, match="nothing usable: block without images"):
        detected(tmp_path / "only")


def test_precision_by_the_definition():
    owners = ["a", "b", "c", *[""] * 30]
    order = np.array([[3, 1, *range(4, 33), 0, 2]])
    assert mean_precision(order, owners, ["b"]) == pytest.approx((0 / 1 + 1 / 2) / 2)
    assert mean_precision(order, owners, ["a"]) == 0  # beyond the twentieth place
    assert mean_precision(np.arange(33)[None], owners, ["a"]) == 1


def test_whitened_samples_have_unit_second_moments():
    torch.manual_seed(0)
    sample = torch.randn(400, 6) @ torch.randn(6, 6)
    sample = sample - sample.mean(0)  # then moments are covariances
    white = whitened(sample, sample).double()
    assert torch.allclose(white.T @ white / 400, torch.eye(6).double(), atol=1e-4)
    decomposition = pytest.importorskip("sklearn.decomposition")
    theirs = decomposition.PCA(whiten=True).fit(sample.numpy()).transform(sample[:5].numpy())
    ours = whitened(sample[:5], sample).numpy()
    scale = np.sqrt(399 / 400)  # scikit-learn divides by n - 1
    assert np.abs(np.sort(np.abs(ours)) - np.sort(np.abs(theirs / scale))).max() < 1e-3


def test_both_are_tasks(tmp_path):
    write_oxford(tmp_path / "o")
    write_copies(tmp_path / "c")
    given = [
        "landmarks,copydays", "--checkpoint", "random:test_resnet", "--device", "cpu", "size=64",
        "--data", f"landmarks={tmp_path / 'o'},copydays={tmp_path / 'c'}", "--out", str(tmp_path / "r"),
    ]  # fmt: skip
    assert main(given) == 0
    metrics = [json.loads(line) for line in (tmp_path / "r/eval.jsonl").read_text().splitlines()]
    assert {m["metric"] for m in metrics} >= {"medium-mAP", "hard-mP@10", "mAP@strong"}
    assert all(m["chance"] is not None for m in metrics)
    for name in ("landmarks-found", "copydays-found"):
        with Image.open(tmp_path / f"r/eval/{name}.png") as sheet:
            assert min(sheet.size) > 200
