"""Exported files load in plain timm and torchvision with equal outputs, or do not exist."""

import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

from dense_ssl import checkpoint
from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError
from dense_ssl.export import export, exporting, onnx_file, plain
from dense_ssl.export.__main__ import main
from dense_ssl.export.source import Source
from dense_ssl.methods import make_method
from dense_ssl.methods.densecl import DenseCLConfig
from dense_ssl.methods.moco import MoCoConfig
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.official import from_official
from dense_ssl.weights.pretrained import load_backbone, read_checkpoint


def make_run(folder: Path, config_type, name: str, **backbone) -> Path:
    """Write a run of an untrained method whose BatchNorms are not at their start."""
    config = config_type(
        backbone=BackboneConfig(name=name, **backbone), hidden_dim=16, out_dim=8, queue_length=32
    )
    torch.manual_seed(0)
    method = make_method(config)
    with torch.no_grad():
        for key, value in method.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif key.endswith("running_mean"):
                value.uniform_(-0.1, 0.1)
    payload = {
        "step": 20,
        "epoch": 2.5,
        "config": {"method": config.model_dump(mode="json")},
        "method": method.state_dict(),
    }
    checkpoint.save(folder / "checkpoints", payload, keep=1)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), DenseCLConfig, "resnet18", bn_groups=2)


@pytest.fixture(scope="module")
def exported(run):
    export(str(run), ["all"], run / "export")
    return run / "export"


@pytest.fixture(scope="module")
def cells(run):
    """Our own features of an image that the export's check has not seen."""
    images = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(5))
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return images, load_backbone(str(run)).backbone(images)


def test_all_writes_every_target_and_nothing_else(exported):
    names = {path.name for path in exported.iterdir()}
    files = {
        "backbone_timm.pth",
        "backbone_timm.safetensors",
        "backbone_torchvision.pth",
        "backbone_torchvision.safetensors",
        "backbone_detectron2.pkl",
        "official_densecl.pth",
        "timm-hub",
        "transformers",
        "backbone.onnx",
    }
    assert names == files | {f"{name}.json" for name in files}


def test_plain_timm_loads_strictly_with_equal_outputs(exported, cells):
    images, features = cells
    for state in (
        torch.load(exported / "backbone_timm.pth", weights_only=True),
        load_file(exported / "backbone_timm.safetensors"),
    ):
        plain = timm.create_model("resnet18", pretrained=False, num_classes=0).eval()
        plain.load_state_dict(state, strict=True)
        with torch.no_grad():
            maps = plain.forward_features(images)
        assert torch.equal(maps.flatten(2).transpose(1, 2), features.dense)


def test_plain_torchvision_misses_fc_only_with_equal_outputs(exported, cells):
    images, features = cells
    for state in (
        torch.load(exported / "backbone_torchvision.pth", weights_only=True),
        load_file(exported / "backbone_torchvision.safetensors"),
    ):
        plain = torchvision.models.resnet18(weights=None).eval()
        result = plain.load_state_dict(state, strict=False)
        assert sorted(result.missing_keys) == ["fc.bias", "fc.weight"]
        assert result.unexpected_keys == []
        plain.fc = torch.nn.Identity()
        with torch.no_grad():
            pooled = plain(images)
        torch.testing.assert_close(pooled, features.cls[:, 0], rtol=1e-5, atol=1e-6)


def test_detectron2_reads_its_names_from_a_plain_pickle(run, exported):
    with (exported / "backbone_detectron2.pkl").open("rb") as file:
        content = pickle.load(file, encoding="latin1")
    trunk = load_backbone(str(run)).backbone.trunk.state_dict()
    assert content["matching_heuristics"] is True
    assert (content["model"]["res5.1.conv2.weight"] == trunk["layer4.1.conv2.weight"].numpy()).all()
    assert {name.partition(".")[0] for name in content["model"]} == {
        "stem",
        "res2",
        "res3",
        "res4",
        "res5",
    }


def test_the_official_file_holds_the_whole_training_state(run, exported):
    content = torch.load(exported / "official_densecl.pth", weights_only=True)
    assert content["meta"] == {"epoch": 2, "iter": 20}
    assert content["state_dict"]["encoder_q.1.mlp2.2.weight"].shape == (8, 16, 1, 1)
    name, state = from_official(content)
    own = read_checkpoint(run / "checkpoints" / "last.pt")["method"]
    assert name == "densecl"
    assert weights_sha256(state) == weights_sha256(own)


def test_moco_has_its_own_official_layout(tmp_path):
    run = make_run(tmp_path, MoCoConfig, "resnet18")
    (file,) = export(str(run), ["official"], tmp_path / "out")
    assert file.path.name == "official_moco.pth.tar"
    content = torch.load(file.path, weights_only=True)
    assert (content["epoch"], content["arch"]) == (2, "resnet18")
    assert content["state_dict"]["module.queue"].shape == (8, 32)


def test_every_file_says_where_it_comes_from(run, exported):
    sha = load_backbone(str(run)).sha256
    for path in exported.glob("*.json"):
        record = json.loads(path.read_text())
        written = exported / record["file"]
        if written.is_dir():
            expected = {path.name: checkpoint.file_sha256(path) for path in written.iterdir()}
            assert record["files"] == expected
        else:
            assert record["sha256"] == checkpoint.file_sha256(written)
        assert (record["source"], record["method"], record["step"]) == (str(run), "densecl", 20)
        assert record["network"] == "student"
        assert record["weights_sha256"] == sha
        rounding = 1e-5 * record["largest_feature"] if record["file"].endswith(".onnx") else 0.0
        assert record["max_abs_diff"] <= rounding
        assert record["check"]
    with safe_open(exported / "backbone_timm.safetensors", "pt") as file:
        told = {"arch": "resnet18", "weights_sha256": sha, "format": "pt", "positions": "timm"}
        assert file.metadata() == told


def test_our_own_exports_read_back(run, exported):
    sha = load_backbone(str(run)).sha256
    for name in (
        "backbone_timm.pth",
        "backbone_torchvision.safetensors",
        "backbone_detectron2.pkl",
    ):
        assert load_backbone(str(exported / name)).sha256 == sha


def test_a_dilated_backbone_is_compared_at_its_published_stride(tmp_path):
    run = make_run(tmp_path, MoCoConfig, "resnet18", output_stride=16)
    files = export(str(run), ["torchvision", "timm"], tmp_path / "out")
    assert [file.max_abs_diff for file in files] == [0.0] * 4


def test_a_vit_goes_to_no_layout_of_resnets(tmp_path):
    run = make_run(tmp_path, MoCoConfig, "vit_tiny_patch16_224")
    files = export(str(run), ["timm", "safetensors"], tmp_path / "out")
    assert [file.path.name for file in files] == ["backbone_timm.pth", "backbone_timm.safetensors"]
    for target, words in {
        "torchvision": "no vit_tiny_patch16_224",
        "detectron2": "plain ResNets only",
        "official": "plain ResNets only",
    }.items():
        with pytest.raises(UserError, match=words):
            export(str(run), [target], tmp_path / "out")


def test_an_official_file_is_a_source_too(exported, tmp_path):
    files = export(str(exported / "official_densecl.pth"), ["torchvision"], tmp_path)
    assert [file.path.stem for file in files] == ["backbone_torchvision"] * 2
    with pytest.raises(UserError, match="only checkpoints of this project's"):
        export(str(exported / "official_densecl.pth"), ["official"], tmp_path)


def test_a_file_that_gives_other_outputs_is_not_kept(run, tmp_path, monkeypatch):
    def spoilt(path):
        state = read_checkpoint(path)
        if "layer4.1.bn2.bias" in state:
            state["layer4.1.bn2.bias"] = state["layer4.1.bn2.bias"] + 1e-3
        return state

    monkeypatch.setattr(plain, "read_written", spoilt)
    with pytest.raises(UserError, match=r"not kept, timm .* differ .by 0.001"):
        export(str(run), ["timm"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_line(run, tmp_path, capsys):
    assert main(["--run", str(run), "--to", "safetensors", "--out", str(tmp_path / "a")]) == 0
    assert "outputs equal (timm" in capsys.readouterr().out
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".safetensors", ".json"}
    for arguments, words in {
        ("--run", str(run), "--to", "tensorflow"): "choose from timm, torchvision",
        ("--run", str(tmp_path / "none")): "not a run folder; give --out",
        ("--run", str(tmp_path), "--out", str(tmp_path / "b")): "no checkpoints/last.pt",
        ("--run", str(run), "--out", "/proc/nowhere"): "cannot be written",
    }.items():
        assert main([*arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.fixture(scope="module")
def two_tokens(tmp_path_factory):
    """A run of a ViT with two class tokens that are not where they started, nor alike."""
    run = make_run(
        tmp_path_factory.mktemp("two"), MoCoConfig, "vit_tiny_patch16_224", class_tokens=2
    )
    files = export(str(run), ["timm", "one_token", "second_token", "no_token"], run / "out")
    return run, {file.path.name: file for file in files}


def test_two_class_tokens_load_in_plain_timm_with_equal_outputs(two_tokens):
    run, files = two_tokens
    name = "backbone_timm.safetensors"
    assert files[name].equal
    assert "reg_tokens=1" in files[name].check
    record = json.loads((run / "out" / f"{name}.json").read_text())
    assert record["timm_options"] == {"reg_tokens": 1}
    assert record["equivalent"] is True
    options = record["timm_options"]
    plain = timm.create_model(record["architecture"], num_classes=0, **options).eval()
    plain.load_state_dict(load_file(run / "out" / name), strict=True)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        features = load_backbone(str(run)).backbone(images)
        tokens = plain.forward_features(images)
    assert torch.equal(tokens[:, :2], features.cls)
    assert torch.equal(tokens[:, 2:], features.dense)
    assert (
        load_backbone(f"{run / 'out' / name}?arch={record['architecture']}").config.class_tokens
        == 2
    )


@pytest.mark.parametrize(
    ("target", "kept", "options"),
    [
        ("one_token", 0, {}),
        ("second_token", 1, {}),
        ("no_token", None, {"class_token": False, "global_pool": ""}),
    ],
)
def test_fewer_class_tokens_are_said_to_be_another_network(two_tokens, target, kept, options):
    run, files = two_tokens
    name = f"backbone_timm_{target}.pth"
    assert not files[name].equal
    assert "NOT the same network" in files[name].check
    record = json.loads((run / "out" / f"{name}.json").read_text())
    assert record["equivalent"] is False and record["max_abs_diff"] > 1e-4
    assert record["timm_options"] == options
    state = torch.load(run / "out" / name, weights_only=True)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options).eval()
    plain.load_state_dict(state, strict=True)
    # What is left is what the full network makes of the tokens that are left.
    full = load_backbone(str(run)).backbone
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        tokens = full.place(full.embed(images))
        rest = tokens[:, [*([] if kept is None else [kept]), *range(2, 198)]]
        want = full.run_blocks(rest)[1]
        torch.testing.assert_close(plain.forward_features(images), want, rtol=1e-5, atol=1e-5)


def test_files_with_fewer_tokens_are_written_only_when_named_and_only_of_two(
    two_tokens, run, tmp_path, monkeypatch
):
    source = Source(load_backbone(str(two_tokens[0])), {}, "student")
    monkeypatch.setattr(onnx_file, "PACKAGES", ())
    assert exporting._chosen(["all"], source) == ["timm", "timm-hub", "transformers", "onnx"]
    with pytest.raises(UserError, match="resnet18 has no second class token"):
        export(str(run), ["one_token"], tmp_path / "out")
