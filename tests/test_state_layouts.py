"""Trunks and training states under other projects' names, in and out."""

import numpy as np
import pytest
import timm
import torch

from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError
from dense_ssl.methods import make_method
from dense_ssl.methods.densecl import DenseCLConfig
from dense_ssl.methods.moco import MoCoConfig
from dense_ssl.methods.revisiting import RevisitingConfig
from dense_ssl.weights.layouts import (
    extract_backbone,
    from_detectron2_name,
    resnet_of,
    to_detectron2,
    to_detectron2_name,
)
from dense_ssl.weights.official import from_official, to_official

SMALL = {
    "backbone": BackboneConfig(name="resnet18", bn_groups=2),
    "hidden_dim": 24,
    "out_dim": 8,
    "queue_length": 32,
}


def method_state(config):
    torch.manual_seed(1)
    method = make_method(config)
    with torch.no_grad():
        for parameter in method.teacher.parameters():  # student and teacher must be told apart
            parameter.add_(1)
    method.queue.pointer.fill_(7)
    return method, method.state_dict()


@pytest.fixture(scope="module")
def moco():
    return method_state(MoCoConfig(**SMALL))


@pytest.fixture(scope="module")
def densecl():
    return method_state(DenseCLConfig(**SMALL))


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(2)
    return timm.create_model("resnet18", num_classes=0).state_dict()


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- reading trunks --------------------------------------------------------------------------------


def test_every_known_layout_gives_the_trunk(trunk):
    noise = {name: torch.zeros_like(value) for name, value in trunk.items()}
    head = {"fc.0.weight": torch.ones(3, 3), "fc.2.bias": torch.ones(3)}
    layouts = {
        "MoCo": {
            "epoch": 3,
            "state_dict": prefixed("module.encoder_q.", trunk | head)
            | prefixed("module.encoder_k.", noise)
            | {"module.queue": torch.ones(4, 8)},
        },
        "OpenSelfSup": prefixed("encoder_q.0.", trunk)
        | {"encoder_q.1.mlp.0.weight": torch.ones(2, 2)}
        | prefixed("backbone.", noise),  # the original wins over its alias
        "DenseCL backbone": {"state_dict": trunk, "author": "DenseCL"},
        "mmselfsup": {
            "meta": {},
            "state_dict": prefixed("backbone.", trunk) | {"head.w": head["fc.2.bias"]},
        },
        "MaskContrast": {"model": prefixed("module.model_q.backbone.", trunk)},
        "torchvision": trunk | {"fc.weight": torch.ones(5, 512), "fc.bias": torch.ones(5)},
        "DDP": prefixed("module.", trunk),
        "detectron2": to_detectron2(trunk),
        "student": {"format": "dense_ssl/1", "method": prefixed("student.backbone.trunk.", trunk)},
        "arrays": {"model": {name: value.numpy() for name, value in trunk.items()}},
    }
    for name, layout in layouts.items():
        assert same(extract_backbone(layout), trunk), name
    own = {"format": "dense_ssl/1", "method": prefixed("teacher.backbone.trunk.", trunk)}
    assert same(extract_backbone(own, "teacher"), trunk)


def test_counters_of_batches_that_old_files_lack_are_zero(trunk):
    old = {name: value for name, value in trunk.items() if not name.endswith("num_batches_tracked")}
    found = extract_backbone(old)
    assert list(found) == list(trunk)
    assert int(found["layer2.0.bn1.num_batches_tracked"]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("layer3.1.conv2.weight"),
            "119 of 120 .* 1 missing .layer3.1.conv2.weight",
        ),
        (lambda t: t.update(strange=torch.ones(1)), "0 missing .none., 1 unknown .strange"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("layer4")],
            "missing .layer4.0.conv1.weight",
        ),
        (lambda t: t.pop("conv1.weight"), "no backbone among its 119 tensors"),
        (lambda t: t.clear(), "no backbone among its 0 tensors .none"),
    ],
)
def test_a_partial_or_foreign_trunk_is_refused_with_counts(trunk, change, words):
    broken = dict(trunk)
    change(broken)
    with pytest.raises(UserError, match=words):
        extract_backbone(broken)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "wide_resnet50_2",
        "resnext50_32x4d",
    ],
)
def test_the_architecture_is_read_from_the_tensors(name):
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    found = extract_backbone(state)
    assert list(found) == list(state)
    assert resnet_of(found) == name


def test_an_unknown_resnet_asks_for_its_name():
    with torch.device("meta"):
        state = timm.create_model("resnet26", num_classes=0).state_dict()
    with pytest.raises(UserError, match=r"2-2-2-2 .* name it: FILE\?arch=NAME"):
        resnet_of(extract_backbone(state))


# --- detectron2 ------------------------------------------------------------------------------------


def test_detectron2_names_of_the_specification():
    for ours, theirs in {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer3.0.downsample.1.bias": "res4.0.shortcut.norm.bias",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer4.2.conv3.weight": "res5.2.conv3.weight",
        "layer2.1.bn2.weight": "res3.1.conv2.norm.weight",
    }.items():
        assert to_detectron2_name(ours) == theirs
        assert from_detectron2_name(theirs) == ours


def test_detectron2_object_has_what_its_reader_wants(trunk):
    content = to_detectron2({"state_dict": prefixed("module.encoder_q.", trunk)})
    assert content["matching_heuristics"] is True
    assert isinstance(content["__author__"], str)
    assert len(content["model"]) == len(trunk)
    assert all(isinstance(value, np.ndarray) for value in content["model"].values())


def test_detectron2_has_no_names_for_a_vit():
    with pytest.raises(UserError, match="ResNets only"):
        to_detectron2({"patch_embed.proj.weight": torch.ones(1)})


# --- official training states ----------------------------------------------------------------------


def test_official_counts_of_a_resnet50():
    with torch.device("meta"):
        state = make_method(DenseCLConfig()).state_dict()
    official = to_official("densecl", state)
    assert len(official) == 974
    assert sum(name.startswith("encoder_q.") for name in official) == 326
    assert sum(name.startswith("backbone.") for name in official) == 318
    assert official["queue"].shape == official["queue2"].shape == (128, 65536)
    assert official["queue2_ptr"].shape == (1,)
    assert official["encoder_q.1.mlp.2.weight"].shape == (128, 2048)
    assert official["encoder_k.1.mlp2.0.weight"].shape == (2048, 2048, 1, 1)


def test_densecl_round_trip(densecl):
    method, state = densecl
    official = to_official("densecl", state)
    assert torch.equal(official["queue2"][:, 3], state["dense_queue.keys"][3])
    alias, query = official["backbone.conv1.weight"], official["encoder_q.0.conv1.weight"]
    assert alias.data_ptr() == query.data_ptr()
    name, back = from_official({"meta": {"epoch": 1}, "state_dict": official, "optimizer": {}})
    assert name == "densecl"
    assert same(dict(sorted(back.items())), dict(sorted(state.items())))
    method.load_state_dict(back, strict=True)
    assert same(to_official("densecl", back), official)


def test_moco_round_trip(moco):
    method, state = moco
    official = to_official("moco", state)
    assert all(name.startswith("module.") for name in official)
    assert int(official["module.queue_ptr"]) == 7
    assert official["module.encoder_q.fc.2.weight"].shape == (8, 24)
    name, back = from_official({"epoch": 1, "arch": "resnet18", "state_dict": official})
    assert name == "moco"
    method.load_state_dict(back, strict=True)
    assert same(to_official("moco", back), official)
    assert same(extract_backbone(official), extract_backbone(state))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_revisiting_round_trip_with_one_pointer(dtype):
    method, state = method_state(RevisitingConfig(**SMALL, queue_backbone_dtype=dtype))
    method.backbone_queue.pointer.fill_(7)
    official = to_official("revisiting", state)
    assert sum("queue" in name for name in official) == 3
    assert official["module.queue_backbone"].shape == (512, 32)
    assert int(official["module.queue_ptr"]) == 7
    name, back = from_official({"epoch": 1, "arch": "resnet18", "state_dict": official})
    assert name == "revisiting"
    assert int(back["backbone_queue.pointer"]) == 7
    assert same(dict(sorted(back.items())), dict(sorted(state.items())))
    method.load_state_dict(back, strict=True)
    assert same(extract_backbone(official), extract_backbone(state))


def test_revisiting_without_neighbours_has_mocos_layout(moco):
    _, state = method_state(RevisitingConfig(**SMALL, aux_weight=0))
    official = to_official("revisiting", state)
    assert official.keys() == to_official("moco", moco[1]).keys()
    assert from_official({"state_dict": official})[0] == "moco"


def test_official_counts_of_revisiting():
    with torch.device("meta"):
        state = make_method(RevisitingConfig()).state_dict()
    official = to_official("revisiting", state)
    assert sum(name.startswith("module.encoder_q.") for name in official) == 322
    assert (
        sum(v.numel() for n, v in official.items() if "encoder_q" in n and is_weight(n))
        == 27_966_656
    )
    assert official["module.queue"].shape == (128, 65536)
    assert official["module.queue_backbone"].shape == (2048, 65536)


def is_weight(name):
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_openselfsup_moco_is_read_too(moco):
    _, state = moco
    official = to_official("moco", state)
    renamed = {}
    for key, value in official.items():
        key = key.removeprefix("module.").replace(".fc.", ".1.mlp.")
        for side in ("encoder_q.", "encoder_k."):
            if key.startswith(side) and not key.startswith(f"{side}1."):
                key = f"{side}0.{key.removeprefix(side)}"
        renamed[key] = value
    name, back = from_official(renamed | prefixed("backbone.", extract_backbone(official)))
    assert name == "moco"
    assert same(dict(sorted(back.items())), dict(sorted(state.items())))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("module.queue"), "queue missing; only a backbone"),
        (lambda s: [s.pop(n) for n in list(s) if "encoder_k" in n], r"encoder_k\.\* missing"),
        (
            lambda s: s.pop("module.encoder_q.fc.2.bias"),
            r"encoder_q.fc.\* is not a head of two layers",
        ),
        (lambda s: s.pop("module.encoder_q.bn1.bias"), "1 missing .bn1.bias"),
        (
            lambda s: s.update({"module.center": torch.ones(1)}),
            "no place in moco .center",
        ),
    ],
)
def test_an_incomplete_training_state_is_refused(moco, change, words):
    official = to_official("moco", moco[1])
    change(official)
    with pytest.raises(UserError, match=words):
        from_official(official)


def test_methods_without_an_official_layout_are_refused(moco):
    with pytest.raises(UserError, match="no official layout"):
        to_official("ibot", moco[1])
    with pytest.raises(UserError, match=r"1 of .* tensors have no place"):
        to_official("moco", moco[1] | {"center": torch.ones(1)})
