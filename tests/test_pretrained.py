"""Files from anywhere: what is read, what is refused, and what `load_backbone` makes of a spec."""

import argparse
import collections
import hashlib
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from dense_ssl import checkpoint
from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError
from dense_ssl.methods import make_method
from dense_ssl.methods.densecl import DenseCLConfig
from dense_ssl.methods.moco import MoCoConfig
from dense_ssl.weights import plain_pickle, pretrained
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.layouts import (
    extract_backbone,
    to_detectron2,
)
from dense_ssl.weights.official import to_official
from dense_ssl.weights.pretrained import load_backbone, read_checkpoint

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


def save_run(folder, config, state, **more):
    payload = {
        "step": 12,
        "epoch": 1.5,
        "config": {"method": config.model_dump(mode="json")},
        "method": state,
        **more,
    }
    return checkpoint.save(folder / "checkpoints", payload, keep=1)


# --- files -----------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    content = {"state_dict": {}, "args": Bomb(tmp_path / "ran")}
    torch.save(content, tmp_path / "new.pth")
    torch.save(content, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    (tmp_path / "d2.pkl").write_bytes(pickle.dumps(content))
    for name in ("new.pth", "old.pth.tar", "d2.pkl"):
        with pytest.raises(
            UserError, match=r"Python object of \w+.mkdir, and code .* is never run"
        ):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_plain_values_of_official_checkpoints_are_read(tmp_path, trunk):
    content = {
        "state_dict": collections.OrderedDict(trunk),
        "args": argparse.Namespace(lr=0.1, out=tmp_path),
        "best": np.float64(71.5),
        "count": np.int64(3),
        "meta": {"time": "now", "iter": 5},
    }
    for name, zipped in (("new.pth", True), ("old.pth.tar", False)):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        found = read_checkpoint(tmp_path / name)
        assert same(found["state_dict"], trunk)
        assert found["args"].lr == 0.1
        assert found["best"] == 71.5


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_foreign_detectron2_pickles_are_read(tmp_path, trunk, protocol):
    content = to_detectron2(trunk) | {"score": np.float32(0.5)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_checkpoint(tmp_path / "x.pkl")
    assert found["score"] == 0.5
    assert same(extract_backbone(found), trunk)


def test_our_pickles_need_nothing_but_public_numpy_names():
    data = plain_pickle.dumps(
        {"a": np.arange(6, dtype="f4").reshape(2, 3), "n": np.zeros((), "i8")}
    )
    assert b"numpy.core" not in data
    assert b"numpy._core" not in data
    back = pickle.loads(data)  # the reader of detectron2
    assert back["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back["a"].flags.writeable
    assert back["n"].shape == ()


@pytest.mark.parametrize("array", [np.array([None, {}], object), np.array(["text"])])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, array):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": array}))
    with pytest.raises(UserError, match="damaged, or no checkpoint"):
        read_checkpoint(tmp_path / "x.pkl")


def test_bytes_never_become_pointers(tmp_path):
    crafted = b"cnumpy\nndarray\n((I2\ntX\x01\x00\x00\x00Ocbuiltins\nbytearray\n(ctR."
    (tmp_path / "x.pkl").write_bytes(crafted)
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "x.pkl")


def test_damaged_and_foreign_files_give_one_sentence(tmp_path, trunk):
    torch.save(trunk, tmp_path / "zip.pth")
    torch.save(trunk, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(trunk, tmp_path / "safe.safetensors")
    (tmp_path / "d2.pkl").write_bytes(plain_pickle.dumps(to_detectron2(trunk)))
    for whole in list(tmp_path.iterdir()):
        data = whole.read_bytes()
        for label, part in (
            ("half", data[: len(data) // 2]),
            ("empty", b""),
            ("text", b"hello\n" * 9),
        ):
            path = tmp_path / f"{label}{whole.suffix}"
            path.write_bytes(part)
            with pytest.raises(UserError, match=r"damaged|cannot be read") as caught:
                read_checkpoint(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, not a dictionary"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"format": "dense_ssl/9"}, tmp_path / "new.pth")
    with pytest.raises(UserError, match="dense_ssl/9"):
        read_checkpoint(tmp_path / "new.pth")
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "nothing.pth")


def test_a_flipped_bit_in_our_own_checkpoint_is_noticed(tmp_path, densecl):
    _, state = densecl
    path = save_run(tmp_path, DenseCLConfig(**SMALL), state)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16  # within a tensor: torch reads it without a word
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    for spec in (str(tmp_path), str(path), str(path.with_name("last.pt"))):
        with pytest.raises(UserError, match="do not match its checksum"):
            load_backbone(spec)
    path.with_suffix(".json").unlink()  # taken away from its run, it is a file like others
    load_backbone(str(path))


# --- load_backbone ---------------------------------------------------------------------------------


def test_a_run_gives_what_its_method_exports(tmp_path, densecl):
    _, state = densecl
    config = DenseCLConfig(**SMALL)
    path = save_run(tmp_path, config, state)
    for spec in (str(tmp_path), str(path)):
        loaded = load_backbone(spec)
        assert same(extract_backbone(loaded.backbone.trunk.state_dict()), extract_backbone(state))
        assert loaded.config == config.backbone
        assert loaded.name == spec
        assert not loaded.backbone.training
    teacher = load_backbone(str(tmp_path), which="teacher").backbone.trunk.state_dict()
    assert same(extract_backbone(teacher), extract_backbone(state, "teacher"))


def test_random_networks_repeat_and_leave_the_generator_alone(tmp_path, densecl):
    save_run(tmp_path, DenseCLConfig(**SMALL), densecl[1])
    before = torch.get_rng_state()
    first, again, other = (load_backbone("random:resnet18", seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert first.sha256 == again.sha256 != other.sha256
    like_run = load_backbone(f"random:{tmp_path}", 3)
    assert like_run.config.bn_groups == 2
    assert like_run.sha256 == first.sha256 != load_backbone(str(tmp_path)).sha256


def test_official_files_load_by_shape_or_by_name(tmp_path, moco):
    torch.save({"state_dict": to_official("moco", moco[1])}, tmp_path / "moco.pth.tar")
    spec = str(tmp_path / "moco.pth.tar")
    loaded = load_backbone(spec)
    assert loaded.config.name == "resnet18"
    assert load_backbone(f"{spec}?arch=resnet18").sha256 == loaded.sha256
    with pytest.raises(UserError, match=r"120 of 216 tensors of resnet34 fit: 96 missing"):
        load_backbone(f"{spec}?arch=resnet34")


def test_a_vit_file_needs_its_name(tmp_path):
    state = load_backbone("random:vit_tiny_patch16_224").backbone.trunk.state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"\?arch=NAME"):
        load_backbone(str(tmp_path / "vit.safetensors"))
    loaded = load_backbone(f"{tmp_path / 'vit.safetensors'}?arch=vit_tiny_patch16_224")
    assert loaded.sha256 == weights_sha256(state)


def test_a_vit_fine_tuned_on_the_mean_of_its_cells_is_read_and_told_of(tmp_path, caplog):
    state = load_backbone("random:test_vit").backbone.trunk.state_dict()
    tuned = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
             for name, value in state.items()}  # fmt: skip
    torch.save({"model": tuned | {"head.weight": torch.zeros(9, 64)}}, tmp_path / "tuned.pth")
    loaded = load_backbone(f"{tmp_path / 'tuned.pth'}?arch=test_vit")
    assert loaded.sha256 == weights_sha256(state)
    assert "its norm was trained on the mean of the cells" in caplog.text


def test_a_resnet_with_a_deep_stem_is_read_by_its_name(tmp_path):
    state = load_backbone("random:test_resnet").backbone.trunk.state_dict()
    torch.save(state, tmp_path / "deep.pth")
    loaded = load_backbone(f"{tmp_path}/deep.pth?arch=test_resnet")
    assert loaded.sha256 == weights_sha256(state)
    with pytest.raises(UserError, match=r"tensors of resnet18 fit"):
        load_backbone(f"{tmp_path}/deep.pth?arch=resnet18")
    with pytest.raises(UserError, match=r"write FILE\?arch=NAME"):
        load_backbone(f"{tmp_path}/deep.pth")


def test_what_is_not_there_gives_one_sentence(tmp_path, monkeypatch):
    for spec, words in {
        str(tmp_path): "no checkpoints/last.pt",
        str(tmp_path / "none.pt"): "no such checkpoint file or run folder",
        "random:resnet1": "no model 'resnet1'",
        "timm:vgg16": "not supported",
    }.items():
        with pytest.raises(UserError, match=words):
            load_backbone(spec)

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(pretrained, "_fetch", offline)
    with pytest.raises(UserError, match=r"could not be fetched .ConnectionError."):
        load_backbone("timm:resnet18")


def test_timm_weights_are_loaded_whole(monkeypatch):
    published = timm.create_model("resnet18", num_classes=0).state_dict()
    monkeypatch.setattr(pretrained, "_fetch", lambda name: published)
    assert load_backbone("timm:resnet18").sha256 == weights_sha256(published)


# --- the hash --------------------------------------------------------------------------------------


def test_the_hash_is_over_names_types_shapes_and_bytes():
    b = torch.tensor([[1.0, 2.0]])
    a = torch.tensor(3, dtype=torch.int64)
    text = b"a\0torch.int64\0()\0" + np.int64(3).tobytes()
    text += b"b\0torch.float32\0(1, 2)\0" + np.float32([1, 2]).tobytes()
    assert weights_sha256({"b": b, "a": a}) == hashlib.sha256(text).hexdigest()


def test_the_hash_ignores_order_and_memory_format_and_sees_everything_else():
    x = torch.randn(4, 3, 2, 2)
    base = weights_sha256({"x": x, "y": x})
    assert weights_sha256({"y": x, "x": x.to(memory_format=torch.channels_last)}) == base
    nudged = x.clone()
    nudged[0, 0, 0, 0] = torch.nextafter(x[0, 0, 0, 0], torch.tensor(9.0))
    for other in (
        {"x": x, "y": nudged},
        {"x": x},
        {"x": x, "z": x},
        {"x": x, "y": x.reshape(3, 4, 2, 2)},
    ):
        assert weights_sha256(other) != base
    assert weights_sha256({"x": torch.zeros(2)}) != weights_sha256({"x": torch.zeros(2).int()})
    weights_sha256(
        {"half": torch.zeros(2, dtype=torch.bfloat16), "flag": torch.zeros(3, dtype=torch.bool)}
    )
