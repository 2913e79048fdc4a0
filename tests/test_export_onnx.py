"""An ONNX file computes what the run does, for any batch and size, and is evaluated by the same words."""

import json

import pytest
import torch

from dense_ssl.backbones.vit import interpolate_positions
from dense_ssl.config import UserError
from dense_ssl.export import export, onnx_file
from dense_ssl.export.onnx_file import dino_positions
from dense_ssl.methods.moco import MoCoConfig
from dense_ssl.weights.pretrained import load_backbone
from tests.test_export import make_run

needed = pytest.mark.skipif(
    onnx_file.missing_packages() is not None, reason="onnx, onnxruntime, onnxscript"
)


@pytest.mark.parametrize("rows, columns", [(14, 14), (6, 6), (14, 28), (7, 28), (10, 3), (32, 20)])
def test_positions_by_products_are_those_by_interpolation(rows, columns):
    table = torch.randn(1, 196, 5, generator=torch.Generator().manual_seed(0))
    found = dino_positions(table, 14, rows, columns)
    expected = interpolate_positions(table, 14, (rows, columns))
    if (rows, columns) == (14, 14):
        assert torch.equal(found, table)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # of values of about 1


@pytest.fixture(scope="module", params=["two-tokens", "resnet"])
def exported(request, tmp_path_factory):
    """A run, its ONNX file, and sizes of images to try: (batch, height, width)."""
    folder = tmp_path_factory.mktemp("onnx")
    if request.param == "resnet":
        run = make_run(folder, MoCoConfig, "test_resnet", output_stride=16)
        sizes = [(1, 64, 64), (3, 100, 70)]
    else:
        run = make_run(
            folder, MoCoConfig, "test_vit", class_tokens=2, init="dino", positions="dino"
        )
        sizes = [(1, 160, 160), (3, 64, 400), (2, 320, 96)]
    (file,) = export(str(run), ["onnx"], run / "out")
    return run, file, sizes


@needed
def test_onnxruntime_gives_our_features_for_any_batch_and_size(exported):
    import onnxruntime

    run, file, sizes = exported
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["cells", "class_tokens"]
    config = load_backbone(str(run)).config.model_copy(update={"output_stride": 32})
    again = load_backbone(str(file.path)).backbone
    assert again.config.name == config.name
    backbone = load_backbone(str(run)).backbone
    if config.name == "test_resnet":  # compared at its published stride
        from dense_ssl.export.source import Source

        backbone = Source(load_backbone(str(run)), {}, "student").standard
    for shape in sizes:
        images = torch.rand(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(1))
        cells, tokens = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = backbone(images)
            found = again(images)
        largest = float(expected.dense.abs().max())
        torch.testing.assert_close(
            torch.from_numpy(cells), expected.dense, rtol=0, atol=1e-5 * largest
        )
        torch.testing.assert_close(
            torch.from_numpy(tokens), expected.cls, rtol=0, atol=1e-5 * largest
        )
        assert torch.equal(found.dense, torch.from_numpy(cells))
        assert found.grid == expected.grid


@needed
def test_the_description_says_what_was_compared(exported):
    run, file, _ = exported
    record = json.loads((run / "out" / "backbone.onnx.json").read_text())
    assert record["check"].startswith("onnxruntime ")
    assert 0 <= record["max_abs_diff"] <= 1e-5 * record["largest_feature"]
    assert record["max_abs_diff_at_other_size"] <= 1e-5 * record["largest_feature"]
    assert sorted(path.name for path in (run / "out").iterdir()) == [
        "backbone.onnx",
        "backbone.onnx.json",
    ]
    assert file.equal


@needed
def test_what_needs_layers_is_refused_in_one_sentence(exported):
    _, file, _ = exported
    backbone = load_backbone(str(file.path)).backbone
    with pytest.raises(
        UserError, match=r"backbone.onnx: an ONNX file gives cells and class tokens"
    ):
        _ = backbone.trunk.blocks
    with pytest.raises(UserError, match="no gradients"):
        backbone.checkpoint_gradients()
    data = file.path.read_bytes()
    broken = file.path.with_name("broken.onnx")
    broken.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="broken.onnx: damaged, or no ONNX file"):
        load_backbone(str(broken))
    broken.unlink()


@needed
def test_a_graph_with_other_results_is_not_kept(tmp_path, monkeypatch):
    run = make_run(tmp_path, MoCoConfig, "test_resnet")
    forward = onnx_file._Exported.forward

    def other(self, x):
        cells, tokens = forward(self, x)
        return cells * 1.001, tokens

    monkeypatch.setattr(onnx_file._Exported, "forward", other)
    with pytest.raises(UserError, match=r"backbone.onnx: not kept, onnxruntime .* differ by"):
        export(str(run), ["onnx"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_its_packages_the_remedy_is_named(tmp_path, monkeypatch):
    run = make_run(tmp_path, MoCoConfig, "test_resnet")
    monkeypatch.setattr(onnx_file, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"TO=onnx: needs no_such_package, not installed; run "):
        export(str(run), ["onnx"], tmp_path / "out")
    names = [file.path.name for file in export(str(run), ["all"], tmp_path / "out")]
    assert "backbone_timm.pth" in names and "backbone.onnx" not in names
