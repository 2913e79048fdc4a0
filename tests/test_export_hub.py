"""Folders for Hugging Face's hub: timm reads them, and what transformers would compute from them is ours."""

import importlib.util
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from dense_ssl.config import UserError
from dense_ssl.export import export, exporting, transformers_folder
from dense_ssl.methods.moco import MoCoConfig
from dense_ssl.weights.pretrained import load_backbone
from dense_ssl.weights.transformers_names import from_transformers, to_transformers
from tests.test_export import make_run

IMAGES = torch.rand(2, 3, 192, 256, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A run of a small ViT with two class tokens, and its two folders."""
    folder = tmp_path_factory.mktemp("vit")
    run = make_run(folder, MoCoConfig, "test_vit", class_tokens=2, init="dino", positions="dino")
    export(str(run), ["huggingface"], run / "export")
    return run


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("resnet"), MoCoConfig, "resnet18")
    export(str(run), ["huggingface"], run / "export")
    return run


@torch.no_grad()
def ours(spec, images):
    return load_backbone(str(spec)).backbone(images)


def test_timm_reads_a_folder_with_the_normalisation_of_training(vit, resnet):
    model = timm.create_model(f"local-dir:{vit}/export/timm-hub", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(config["input_size"]) == (3, 160, 160)
    found = ours(vit, IMAGES[..., :160, :160])
    with torch.no_grad():
        tokens = model.forward_features(IMAGES[..., :160, :160])
        assert torch.equal(tokens, torch.cat((found.cls, found.dense), dim=1))
        assert model.forward_features(IMAGES).shape == (2, 2 + 12 * 16, 64)  # other sizes, too
    model = timm.create_model(f"local-dir:{resnet}/export/timm-hub", pretrained=True).eval()
    with torch.no_grad():
        maps = model.forward_features(IMAGES.contiguous(memory_format=torch.channels_last))
    assert torch.equal(maps.flatten(2).transpose(1, 2), ours(resnet, IMAGES).dense)


def dinov2(folder, x):
    """DINOv2 with registers from its paper and transformers' file format, independent of our code."""
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    name = "embeddings.patch_embeddings.projection"
    size = config["patch_size"]
    x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=size)
    x = x.flatten(2).transpose(1, 2)
    cls = state["embeddings.cls_token"].expand(len(x), -1, -1)
    x = torch.cat((cls, x), dim=1) + state["embeddings.position_embeddings"]
    registers = state["embeddings.register_tokens"].expand(len(x), -1, -1)
    x = torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)
    for block in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{block}"
        y = norm(x, f"{at}.norm1")
        q, k, v = (
            linear(y, f"{at}.attention.attention.{part}").unflatten(2, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = linear(y, f"{at}.attention.output.dense")
        x = x + y * state[f"{at}.layer_scale1.lambda1"]
        y = linear(F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        x = x + y * state[f"{at}.layer_scale2.lambda1"]
    assert state["embeddings.register_tokens"].shape[1] == config["num_register_tokens"] == 1
    return norm(x, "layernorm")


def resnet_of_transformers(folder, x):
    """A basic ResNet from transformers' file format, independent of our code."""
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    assert (config["layer_type"], config["hidden_sizes"]) == ("basic", [64, 128, 256, 512])

    def conv(x, name, stride=1):
        weight = state[f"{name}.convolution.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.normalization.{key}"] for key in keys))

    x = F.max_pool2d(conv(x, "embedder.embedder", 2).relu(), 3, 2, 1)
    for stage, depth in enumerate(config["depths"]):
        for block in range(depth):
            at = f"encoder.stages.{stage}.layers.{block}"
            stride = 2 if stage and not block else 1
            y = conv(conv(x, f"{at}.layer.0", stride).relu(), f"{at}.layer.1")
            x = (y + (conv(x, f"{at}.shortcut", stride) if stride == 2 else x)).relu()
    return x.flatten(2).transpose(1, 2)


def test_the_written_tensors_make_the_same_network_by_transformers_own_rules(vit, resnet):
    with torch.no_grad():
        images = IMAGES[..., :160, :160]
        found = ours(vit, images)
        expected = torch.cat((found.cls, found.dense), dim=1)
        tokens = dinov2(vit / "export" / "transformers", images)
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
        cells = resnet_of_transformers(resnet / "export" / "transformers", IMAGES)
        expected = ours(resnet, IMAGES).dense
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(cells, expected, rtol=0, atol=atol)


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_transformers_itself_gives_the_same_features(vit, resnet):
    for run in (vit, resnet):
        record = json.loads((run / "export" / "transformers.json").read_text())
        assert record["check"].startswith("transformers ")
        assert record["max_abs_diff"] <= 1e-5 * record["largest_feature"]


def test_names_go_there_and_back(vit, resnet):
    for run in (vit, resnet):
        trunk = load_backbone(str(run)).backbone.trunk.state_dict()
        there = to_transformers(trunk)
        again = to_transformers(from_transformers(there))
        assert again.keys() == there.keys()
        assert all(torch.equal(value, there[name]) for name, value in again.items())


def test_folders_are_evaluated_by_the_words_that_evaluate_a_run(vit, resnet):
    for run in (vit, resnet):
        found = ours(run, IMAGES)
        for name in ("timm-hub", "transformers"):
            again = ours(run / "export" / name, IMAGES)  # of another size: its positions are told
            assert torch.equal(again.dense, found.dense)
            assert torch.equal(again.cls, found.cls)
    assert load_backbone(f"random:{vit}/export/transformers").config.class_tokens == 2


def test_the_card_shows_what_these_weights_reached(vit, tmp_path):
    sha = load_backbone(str(vit)).sha256
    rows = [("knn/v1", sha, 41.25), ("linear/v1", "other", 99.0)]
    with (vit / "eval.jsonl").open("w") as file:
        for protocol, weights, value in rows:
            record = {"protocol": protocol, "metric": "top1", "value": value, "random_init": 30.0}
            file.write(json.dumps(record | {"weights": weights}) + "\n")
        file.write('{"broken')
    for _ in range(2):  # a folder that is there is replaced
        export(str(vit), ["transformers"], tmp_path)
    card = (tmp_path / "transformers" / "README.md").read_text()
    assert "| knn/v1 | top1 | 41.2 | 30.0 |" in card
    assert "99.0" not in card
    assert "after 20 steps (2.5 epochs)" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["transformers", "transformers.json"]


def test_a_network_that_transformers_lacks_is_refused(tmp_path):
    run = make_run(tmp_path, MoCoConfig, "test_resnet")
    with pytest.raises(UserError, match="transformers has no layout for test_resnet; take timm"):
        export(str(run), ["huggingface"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_reads_back_otherwise_is_not_kept(vit, tmp_path, monkeypatch):
    read = transformers_folder.read_written

    def spoilt(path):
        state = read(path)
        state["encoder.layer.3.norm2.bias"] = state["encoder.layer.3.norm2.bias"] + 1e-3
        return state

    monkeypatch.setattr(transformers_folder, "read_written", spoilt)
    with pytest.raises(UserError, match="transformers: not kept, it does not read back"):
        export(str(vit), ["transformers"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_target_says_why_it_does_not_fit(vit):
    assert set(exporting.GROUPS["huggingface"]) <= set(exporting.TARGETS)
    with pytest.raises(UserError, match="choose from timm, .*huggingface, all"):
        export(str(vit), ["hugging"], vit / "x")
