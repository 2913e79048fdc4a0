"""Training files of DINO, iBOT, denseSSL and SERE: what is read from them, and what is refused."""

import argparse

import pytest
import timm
import torch

from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError
from dense_ssl.methods import make_method
from dense_ssl.methods.ibot import DinoConfig, IBotConfig
from dense_ssl.methods.sere import SereConfig
from dense_ssl.views import ViewSpec
from dense_ssl.weights.layouts import extract_backbone, published_vit_of, select
from dense_ssl.weights.official import from_official
from dense_ssl.weights.pretrained import load_backbone, start_from

TINY = BackboneConfig(name="vit_tiny_patch16_224", init="dino", positions="dino")
VIEWS = (ViewSpec(name="global", count=2, size=32),)
SMALL = {
    "backbone": TINY, "views": VIEWS, "out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8,
    "norm_last_layer": False,
}  # fmt: skip


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def method_of(config):
    method = make_method(config)
    with torch.no_grad():
        for tensor in (*method.parameters(), *method.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return method


def official(method, name, module_teacher=False):
    """What the official code would save: its names, duplicates of tied layers, an argparse object."""
    parts = {}
    for side in ("student", "teacher"):
        state = select(method.state_dict(), f"{side}.")
        head = select(state, "head.")
        if name != "dino" and "last_layer2.weight_v" not in head:
            head |= {k.replace("layer.", "layer2."): v for k, v in head.items() if "last" in k}
        trunk = select(state, "backbone.trunk.")
        for key, value in state.items():
            if "_sere" in key:
                trunk[key] = value[:, :, None, None] if key.endswith("tor.0.weight") else value
        if name != "dino" and side == "student":
            trunk["masked_embed"] = method.masking.token.detach()
        prefix = "module." if side == "student" or module_teacher else ""
        parts[side] = prefixed(f"{prefix}backbone.", trunk) | prefixed(f"{prefix}head.", head)
    loss = {"center": method.objective.center[None]}
    if name != "dino":
        loss["center2"] = method.objective.patch_center[None, None]
    options = argparse.Namespace(arch="vit_tiny", epochs=800)
    return parts | {
        "optimizer": {},
        "epoch": 3,
        "args": options,
        "dino_loss" if name == "dino" else "ibot_loss": loss,
    }


LOCAL = ViewSpec(name="local", count=2, size=16)
CASES = {
    "ibot": ("ibot", IBotConfig(**SMALL)),
    "ibot, own patch prototypes": ("ibot", IBotConfig(**SMALL, patch_out_dim=10)),
    "dino": ("dino", DinoConfig(**SMALL)),
    "sere": ("sere", SereConfig(**{**SMALL, "views": (*VIEWS, LOCAL)})),
}


@pytest.fixture(params=CASES)
def case(request):
    name, config = CASES[request.param]
    return name, config, method_of(config)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("module_teacher", [False, True])
def test_a_whole_state_comes_back(case, module_teacher):
    name, _, method = case
    found, state = from_official(official(method, name, module_teacher))
    assert found == name
    assert same(dict(sorted(state.items())), dict(sorted(method.state_dict().items())))


def test_the_backbone_is_the_teachers_unless_asked_otherwise(case, tmp_path):
    name, _, method = case
    path = tmp_path / "checkpoint.pth"
    torch.save(official(method, name), path)
    for which in ("auto", "teacher", "student"):
        loaded = load_backbone(str(path), which=which)
        side = "teacher" if which == "auto" else which
        want = select(method.state_dict(), f"{side}.backbone.trunk.")
        assert same(dict(loaded.backbone.trunk.state_dict()), want)
        assert loaded.config == BackboneConfig(name="vit_tiny_patch16_224", positions="dino")


def test_backbone_files_are_read_whatever_is_around_them(tmp_path):
    method = method_of(CASES["ibot"][1])
    trunk = select(method.state_dict(), "teacher.backbone.trunk.")
    files = {
        "dino": trunk,
        "ibot": {"state_dict": trunk | {"masked_embed": torch.ones(1, 192)}},
        "deit": {"model": trunk | {"head.weight": torch.ones(5, 192), "head.bias": torch.ones(5)}},
        "extracted": {"state_dict": prefixed("module.backbone.", trunk)},
        "sere": {"model": trunk | {"pixel_sere.projection.0.weight": torch.ones(192)}},
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        loaded = load_backbone(f"{path}?arch=vit_tiny_patch16_224")
        assert same(dict(loaded.backbone.trunk.state_dict()), trunk), name
    with pytest.raises(UserError, match=r"write FILE\?arch=NAME"):
        load_backbone(str(path))


def test_a_file_with_fewer_tensors_is_refused(tmp_path):
    name, config = CASES["ibot"]
    content = official(method_of(config), name)
    for side, prefix in (("student", "module."), ("teacher", "")):
        del content[side][f"{prefix}backbone.blocks.3.mlp.fc1.bias"]
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"149 of 150 tensors .*1 missing .blocks.3.mlp.fc1.bias"):
        load_backbone(str(path))
    with pytest.raises(UserError, match="does not fit this recipe"):
        start_from(str(path), make_method(config), "ibot")


def test_training_starts_from_the_whole_state_and_de_coupling_from_ibots(tmp_path):
    name, config = CASES["ibot"]
    method = method_of(config)
    path = tmp_path / "checkpoint.pth"
    torch.save(official(method, name), path)
    for recipe in ("ibot", "ibot_dc"):
        fresh = make_method(config)
        start_from(str(path), fresh, recipe)
        assert same(fresh.state_dict(), method.state_dict())
    other = make_method(CASES["dino"][1])
    head = {n: p.clone() for n, p in other.student["head"].state_dict().items()}
    start_from(str(path), other, "dino")  # the teacher's trunk alone, in both networks
    want = method.teacher["backbone"].state_dict()
    assert same(other.student["backbone"].state_dict(), want)
    assert same(other.teacher["backbone"].state_dict(), want)
    assert same(other.student["head"].state_dict(), head)


def test_another_head_is_refused():
    name, config = CASES["ibot"]
    wide = IBotConfig(**{**SMALL, "out_dim": 20})
    _, state = from_official(official(method_of(config), name))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_method(wide).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("ibot_loss"), "center of its loss missing"),
        (lambda c: c["ibot_loss"].pop("center2"), "center2 of its loss missing"),
        (lambda c: c["teacher"].pop("head.mlp.2.bias"), "head of teacher: 1 tensors missing"),
        (
            lambda c: c["student"].update({"module.head.mlp.1.weight": torch.ones(2)}),
            "head of student: 0 tensors missing .none., 1 unknown",
        ),
        (
            lambda c: c["student"].update({"module.queue": torch.ones(2)}),
            "1 tensors of student have no place .queue",
        ),
        (
            lambda c: c["student"].pop("module.backbone.masked_embed"),
            "its student has no masked_embed",
        ),
        (
            lambda c: c["student"].update({"module.head.last_layer2.weight_v": torch.ones(12, 8)}),
            "in one of student and teacher only",
        ),
    ],
)
def test_an_incomplete_training_state_is_refused(change, message):
    name, config = CASES["ibot"]
    content = official(method_of(config), name)
    change(content)
    with pytest.raises(UserError, match=message):
        from_official(content)


@pytest.mark.parametrize(
    "name",
    [
        "tiny_patch16",
        "small_patch16",
        "small_patch8",
        "base_patch16",
        "base_patch8",
        "large_patch16",
    ],
)
def test_the_architecture_of_a_published_vit_is_read_from_its_tensors(name):
    with torch.device("meta"):
        trunk = timm.create_model(f"vit_{name}_224", num_classes=0).state_dict()
    assert published_vit_of(extract_backbone(trunk)) == f"vit_{name}_224"


def test_a_vit_of_another_width_asks_for_its_name():
    with torch.device("meta"):
        trunk = timm.create_model("test_vit", num_classes=0).state_dict()
    with pytest.raises(UserError, match=r"width 64 and depth 6 .* name it: FILE\?arch=NAME"):
        published_vit_of(trunk)
