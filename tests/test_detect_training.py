"""Training and testing detectors: learning, chance, resuming to the bit, ranks, refusals, the command."""

import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn

from dataprep.synthetic_objects import write_rectangles
from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.config import UserError, validate
from dense_ssl.evaluation.__main__ import main
from dense_ssl.evaluation.detection import train as detect
from dense_ssl.evaluation.detection.augment import TrainingExamples
from dense_ssl.evaluation.detection.model import build
from dense_ssl.evaluation.detection.protocols import DetectConfig
from dense_ssl.evaluation.features import FeatureCache
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.trained import job as trained_job
from dense_ssl.evaluation.trained.samples import TrainingSamples
from dense_ssl.weights.layouts import to_detectron2
from dense_ssl.weights.pretrained import load_backbone
from tests.ranks import on_ranks

# pycocotools 2.0 speaks to numpy 2 in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SMALL = {
    "short": 64, "batch_size": 4, "workers": 0, "precision": "fp32", "width": 32, "hidden": 64,
    "rois": 32, "proposals": "100,60", "kept": "60,30", "anchors": "24,24,24,32,64", "bn_steps": 4,
}  # fmt: skip
TINY = SMALL | {"width": 16, "hidden": 32, "rois": 16}


def settings(name, **given):
    return validate(DetectConfig, SMALL | {"settings": name} | given, "detect")


def tiny(name, **given):
    return validate(DetectConfig, TINY | {"settings": name, "bn_steps": 0} | given, "detect")


def vit():
    torch.manual_seed(0)
    return make_backbone(BackboneConfig(name="test_vit")).eval()


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory):
    return write_rectangles(tmp_path_factory.mktemp("rectangles"))


# --- learning


# Rectangles of 22 to 32 px, doubled and more: strides of 16 px are too wide for the small ones above, and the
# random deconvolutions of a ViT's pyramid draw a pattern on its finest level that has to be learnt away.
EASY = {
    "batch_size": 4, "workers": 0, "precision": "fp32", "schedule": "cosine", "warmup": 0.05, "short": 128,
    "width": 16, "hidden": 256, "rois": 16, "proposals": "200,100", "kept": "100,40", "bn_steps": 6,
    "anchors": "56,56,56,56,56",
}  # fmt: skip
OF_VITS = {"lr": 3e-3, "layer_decay": 1.0, "drop_path": 0.0, "crop": "none"}
FAMILIES = {
    "voc-c4": {"steps": 130, "lr": 0.05, "short": 192, "anchors": "72,96", "train_years": 2007},
    "coco-fpn-1x": {"steps": 110, "lr": 0.05},
    "coco-simple-1x": OF_VITS | {"steps": 100, "box_head": "layers", "normed": ()},
    "coco-cascade-small-1x": OF_VITS | {"steps": 110},
}


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    return write_rectangles(tmp_path_factory.mktemp("easy"), train=48, val=12, sides=(22, 32))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_learns_coloured_rectangles(easy, tiny_resnet, name):
    config = validate(DetectConfig, EASY | {"settings": name} | FAMILIES[name], "detect")
    backbone = vit() if config.of.head in ("blocks", "simple") else tiny_resnet
    before = {key: x.clone() for key, x in backbone.state_dict().items()}
    root = easy if name == "voc-c4" else easy / "coco"
    values = detect.run(backbone, detect.load(root, config), config)
    kinds = ("",) if name == "voc-c4" else ("box-", "mask-")
    for kind in kinds:
        assert values[f"{kind}AP50"] > 95 and values[f"chance/{kind}AP50"] < 10
    assert all(torch.equal(x, before[key]) for key, x in backbone.state_dict().items())
    if name == "voc-c4":
        assert set(values) == {f"{c}{n}" for c in ("", "chance/") for n in ("AP", "AP50", "AP75")}


def test_nothing_is_learnt_of_annotations_of_other_images(tiny_resnet, tmp_path):
    root = write_rectangles(tmp_path / "shuffled", shuffled=True)
    config = settings("coco-fpn-1x", steps=40, lr=0.05)
    values = detect.run(tiny_resnet, detect.load(root / "coco", config), config)
    assert values["box-AP50"] < 15 and values["mask-AP50"] < 15


# --- the same to the bit


def test_an_interrupted_run_ends_with_the_same_weights(
    rectangles, tiny_resnet, tmp_path, monkeypatch
):
    config = tiny("coco-fpn-1x", steps=4, lr=0.05, bn_steps=2)
    data = detect.load(rectangles / "coco", config)
    whole = detect._trained(tiny_resnet, data, config, None).state_dict()
    cache = FeatureCache(tmp_path, "w")
    monkeypatch.setattr(trained_job, "KEEP_SECONDS", 0.0)
    losses, calls = detect._losses, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr(detect, "_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detect._trained(tiny_resnet, data, config, cache)
    again = detect._trained(tiny_resnet, data, config, cache).state_dict()
    assert len(calls) == 3 + 2 + 2  # two steps kept, two taken, two batches for the statistics
    assert all(torch.equal(x, whole[name]) for name, x in again.items())
    detect._trained(tiny_resnet, data, config, cache)
    assert len(calls) == 7  # what is finished is read


def test_final_statistics_are_means_over_batches(rectangles, tiny_resnet):
    config = tiny("coco-fpn-1x", bn_steps=3)
    data = detect.load(rectangles / "coco", config)
    model = build(tiny_resnet, 3, config).train()
    samples = TrainingSamples(data.train, TrainingExamples(config), config, Omissions(), stream=1)
    batches = list(samples.batches(0, 3))
    detect._settle_norms(model, iter(batches), config, 0)
    norm = model.trunk.maps.backbone.trunk.bn1
    means = []
    for batch in batches:
        images = [torch.from_numpy(example.image).permute(2, 0, 1) for example in batch]
        x = model._batch(images).tensors
        means.append(model.trunk.maps.backbone.trunk.conv1(x).mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    assert all(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def _on_a_rank(world, root, folder):
    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # as above
    config = tiny("coco-cascade-small-1x", steps=2, lr=1e-3, max_val=3)
    data = detect.load(root, config)
    cache = FeatureCache(folder, "w")
    values = detect.run(vit(), data, config, cache)
    model = detect._trained(vit(), data, config, cache)
    return values, torch.stack([p.double().sum() for p in model.parameters()]).detach()


def test_two_ranks_train_one_network_and_share_the_test(rectangles, tmp_path):
    work = partial(_on_a_rank, root=rectangles / "coco", folder=tmp_path)
    (values, weights), (others, same) = on_ranks(2, work, tmp_path)
    assert values == others and "mask-AP" in values
    assert torch.equal(weights, same) and weights.isfinite().all()


# --- refusals


def test_unreadable_images_are_replaced_and_left_out(rectangles, tiny_resnet, tmp_path):
    config = tiny("coco-fpn-1x", steps=2)
    data = detect.load(rectangles / "coco", config)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(data.train[0].path.read_bytes()[:300])
    torn = replace(data.train[0], path=broken)
    data = replace(data, train=(torn, *data.train[1:4]), val=(torn, *data.val[1:4]))
    values = detect.run(tiny_resnet, data, config)
    assert 0 <= values["box-AP"] <= 100
    lines = [line for line in data.omitted.lines() if "not readable" in line]
    assert len(lines) == 2 and all("image not readable: 1 (broken.jpg: " in line for line in lines)
    with pytest.raises(UserError, match="train: none of 4 images can be decoded"):
        detect.run(tiny_resnet, replace(data, train=(torn,) * 4), config)
    with pytest.raises(UserError, match="test: no image can be read"):
        detect.run(tiny_resnet, replace(data, val=(torn,)), config)
    many = config.model_copy(update={"batch_size": 8})
    with pytest.raises(UserError, match="4 images make no batch of 8; lower batch_size"):
        detect.run(tiny_resnet, data, many)


def test_divergence_is_said(rectangles, tiny_resnet, tmp_path):
    config = tiny("coco-fpn-1x", steps=4, lr=1e30)
    data = detect.load(rectangles / "coco", config)
    with pytest.raises(UserError, match=r"training diverged at step \d: the loss of .* lower lr"):
        detect.run(tiny_resnet, data, config, FeatureCache(tmp_path, "w"))
    assert not list(tmp_path.rglob("*.pt"))  # no such state is kept


# --- from the command, with weights from anywhere


def test_command_writes_results_and_pictures(rectangles, tmp_path, capsys):
    root = rectangles / "coco"
    arguments = [
        "detect", "--checkpoint", "random:test_vit", "--out", str(tmp_path), "--data", str(root),
        "settings=coco-simple-1x", "steps=2", "max_val=3", "--device", "cpu",
        *(f"{name}={value}" for name, value in TINY.items()),
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "detect/coco-simple-1x/v1*" in shown and "mask-AP75" in shown
    lines = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    names = [line["metric"] for line in lines]
    assert names[:3] == ["box-AP", "box-AP50", "box-AP75"] and "mask-AP" in names
    assert "box-APl" not in names and lines[0]["chance"] is not None
    with Image.open(tmp_path / "eval" / "detect-detections.png") as sheet:
        assert sheet.width > 700 and sheet.height > 300
    assert main([*arguments, "settings=voc-c4"]) == 2
    assert "the data are COCO's" in capsys.readouterr().err


def test_published_layouts_become_the_same_detector(tmp_path):
    original = make_backbone(BackboneConfig(name="resnet50"))
    state = original.trunk.state_dict()
    moco = {f"module.encoder_q.{name}": x for name, x in state.items()}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": moco}, tmp_path / "moco.pth.tar")
    told = to_detectron2(state)["model"]
    torch.save(
        {"model": {name: torch.as_tensor(x) for name, x in told.items()}}, tmp_path / "d2.pth"
    )
    for file in ("moco.pth.tar", "d2.pth"):
        model = build(
            load_backbone(str(tmp_path / file)).backbone, 20, tiny("voc-c4", anchors="24")
        )
        found = model.trunk.backbone.trunk.state_dict() | {
            f"layer4.{name}": x for name, x in model.shared.stage.state_dict().items()
        }
        assert set(found) == set(state)
        assert all(torch.equal(x, state[name]) for name, x in found.items())
