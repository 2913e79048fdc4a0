"""Files of the official UDI code: backbones with one or two class tokens, training states, refusals."""

import argparse

import pytest
import torch

from dense_ssl import checkpoint
from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError
from dense_ssl.export import export
from dense_ssl.methods import make_method
from dense_ssl.methods.udi import UdiConfig
from dense_ssl.views import ViewSpec
from dense_ssl.weights.layouts import select
from dense_ssl.weights.official import from_official
from dense_ssl.weights.official_udi import to_udi
from dense_ssl.weights.pretrained import load_backbone, start_from

TINY = BackboneConfig(
    name="vit_tiny_patch16_224", init="dino", positions="dino", class_tokens=2
)  # fmt: skip
CONFIG = UdiConfig(
    backbone=TINY, views=(ViewSpec(name="global", count=2, size=48),), out_dim=12, hidden_dim=16,
    bottleneck_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    method = make_method(CONFIG)
    with torch.no_grad():
        for tensor in (*method.parameters(), *method.buffers()):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return method


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def official_trunk(method, side):
    trunk = select(method.state_dict(), f"{side}.backbone.trunk.")
    trunk["cls_token"] = torch.cat([trunk["cls_token"], trunk.pop("reg_token")], 1)
    return trunk


def official(method, module_teacher=False):
    """What the official code would save: three aliases of the head, an argparse object, a count of zeros."""
    content = {}
    for side in ("student", "teacher"):
        state = select(method.state_dict(), f"{side}.")
        names = prefixed("backbone.backbone.", official_trunk(method, side))
        names |= prefixed("backbone.", select(state, "sampler."))
        for kind in range(3):
            names |= prefixed(f"head.{kind}.", select(state, "head."))
        wrapped = side == "student" or module_teacher
        content[side] = prefixed("module." if wrapped else "", names)
    own = method.objective
    centers = torch.stack([own.center, own.plus_center, own.patch_center])
    return content | {
        "optimizer": {},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny", number_cls_token=2),
        "udi_loss": {"centering.center": centers, "centering.count": torch.zeros(3, 1)},
        "fp16_scaler": {"scale": 65536.0},
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("module_teacher", [False, True])
def test_a_whole_state_comes_back(method, module_teacher):
    content = official(method, module_teacher)
    shapes = {name: tuple(v.shape) for name, v in content["student"].items()}
    assert shapes["module.backbone.backbone.cls_token"] == (1, 2, 192)
    assert shapes["module.backbone.backbone.pos_embed"] == (1, 198, 192)
    assert shapes["module.backbone.attn.qkv.weight"] == (576, 192)
    assert shapes["module.head.2.last_layer.weight_g"] == (12, 1)
    name, state = from_official(content)
    assert name == "udi"
    assert same(dict(sorted(state.items())), dict(sorted(method.state_dict().items())))


def test_what_is_written_is_what_the_official_code_saves(method):
    want = official(method)
    written = to_udi(method.state_dict())
    for part in ("student", "teacher", "udi_loss"):
        assert same(dict(sorted(written[part].items())), dict(sorted(want[part].items())))
    assert same(dict(from_official(written)[1]), dict(method.state_dict()))
    with pytest.raises(UserError, match="tensors have no place in the official udi layout"):
        to_udi(method.state_dict() | {"queue.keys": torch.ones(1)})


def test_a_run_is_exported_as_the_official_code_saves_it(method, tmp_path):
    payload = {
        "step": 20, "epoch": 2.5, "config": {"method": CONFIG.model_dump(mode="json")},
        "method": method.state_dict(),
    }  # fmt: skip
    checkpoint.save(tmp_path / "run" / "checkpoints", payload, keep=1)
    (written,) = export(str(tmp_path / "run"), ["official"], tmp_path / "out")
    assert (written.path.name, written.max_abs_diff) == ("official_udi.pth", 0.0)
    content = torch.load(written.path, weights_only=True)
    assert set(content) == {"epoch", "student", "teacher", "udi_loss"}
    assert content["epoch"] == 2
    again = make_method(CONFIG)
    start_from(str(written.path), again, "udi")
    assert same(dict(again.state_dict()), dict(method.state_dict()))


@pytest.mark.parametrize("variant", [{"patches": True}, {"patches": False}])
def test_a_run_with_one_class_token_is_written_and_comes_back(variant):
    backbone = TINY.model_copy(update={"class_tokens": 1})
    one = make_method(CONFIG.model_copy(update={"backbone": backbone, **variant}))
    written = to_udi(one.state_dict())
    assert written["udi_loss"]["centering.center"].shape == (3, 12)
    assert same(dict(from_official(written)[1]), dict(one.state_dict()))


def test_the_backbone_of_a_training_file_needs_no_name(method, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(official(method), path)
    for which, side in (("auto", "teacher"), ("teacher", "teacher"), ("student", "student")):
        loaded = load_backbone(str(path), which=which)
        want = select(method.state_dict(), f"{side}.backbone.trunk.")
        assert same(dict(loaded.backbone.trunk.state_dict()), want)
        assert loaded.config == BackboneConfig(
            name="vit_tiny_patch16_224", positions="dino", class_tokens=2
        )
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features = load_backbone(str(path)).backbone(images)
        want = method.teacher["backbone"](images)
    assert features.cls.shape == (1, 2, 192)
    assert torch.equal(features.cls, want.cls) and torch.equal(features.dense, want.dense)


def test_backbone_files_are_read_whatever_is_around_them(method, tmp_path):
    trunk = official_trunk(method, "teacher")
    sampler = select(method.state_dict(), "teacher.sampler.")
    one = trunk | {
        "cls_token": trunk["cls_token"][:, :1],
        "pos_embed": trunk["pos_embed"][:, [0, *range(2, 198)]],
    }
    files = {
        "bare": trunk,
        "state_dict": {"state_dict": trunk | sampler},
        "one prefix": {"model": prefixed("backbone.", trunk) | sampler},
        "two prefixes": prefixed("module.backbone.backbone.", trunk)
        | prefixed("module.backbone.", sampler),
        "one class token": one,
    }
    want = select(method.state_dict(), "teacher.backbone.trunk.")
    for name, content in files.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        loaded = load_backbone(f"{path}?arch=vit_tiny_patch16_224")
        two = name != "one class token"
        assert loaded.config.class_tokens == 1 + two
        assert same(dict(loaded.backbone.trunk.state_dict()), want if two else one), name


def test_training_starts_from_the_whole_state(method, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(official(method), path)
    fresh = make_method(CONFIG)
    start_from(str(path), fresh, "udi")
    assert same(fresh.state_dict(), method.state_dict())
    other = make_method(CONFIG.model_copy(update={"out_dim": 20}))
    with pytest.raises(UserError, match="does not fit this recipe"):
        start_from(str(path), other, "udi")


def test_a_file_with_fewer_tensors_of_the_backbone_is_refused(method, tmp_path):
    content = official(method)
    for side, prefix in (("student", "module."), ("teacher", "")):
        del content[side][f"{prefix}backbone.backbone.blocks.3.mlp.fc1.bias"]
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"150 of 151 tensors .*1 missing .blocks.3.mlp.fc1.bias"):
        load_backbone(str(path))
    with pytest.raises(UserError, match="does not fit this recipe"):
        start_from(str(path), make_method(CONFIG), "udi")


def test_positions_of_another_number_of_tokens_are_refused(method, tmp_path):
    trunk = official_trunk(method, "teacher")
    trunk["pos_embed"] = trunk["pos_embed"][:, 1:]
    path = tmp_path / "odd.pth"
    torch.save(trunk, path)
    with pytest.raises(UserError, match="2 class tokens and 195 positions of patches"):
        load_backbone(f"{path}?arch=vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["udi_loss"].pop("centering.center"), "centering.center .* missing"),
        (
            lambda c: c["teacher"].pop("head.0.mlp.2.bias"),
            "head of teacher: its 3 heads are not one",
        ),
        (
            lambda c: c["student"]["module.head.1.mlp.0.bias"].add_(1),
            "head of student: its 3 heads are not one and the same",
        ),
        (
            lambda c: [c["teacher"].pop(f"head.{i}.mlp.2.bias") for i in range(3)],
            "head of teacher: 1 tensors missing",
        ),
        (
            lambda c: c["student"].update({"module.backbone.queue": torch.ones(2)}),
            "1 tensors of student have no place .backbone.queue",
        ),
    ],
)
def test_an_incomplete_training_state_is_refused(method, change, message):
    content = official(method)
    content["student"] = {name: value.clone() for name, value in content["student"].items()}
    change(content)
    with pytest.raises(UserError, match=message):
        from_official(content)
