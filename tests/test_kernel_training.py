"""A run with the Triton kernels beside the same run with the references."""

import json

import pytest
import torch

from dataprep.synthetic import write_random_images
from dense_ssl import pretrain
from kernels import launch
from kernels.language import INTERPRETED

CUDA = torch.cuda.is_available() and not INTERPRETED
RECIPE = """
method:
  name: moco
  views: [{{name: global, count: 2, size: 32, photometric: none}}]
  backbone: {{name: test_vit}}  # LayerNorm: BatchNorm of tiny batches blows up rounding
  hidden_dim: 16
  out_dim: 8
  queue_length: 40
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{lr: {{start: 0.03, per: step, warmup_epochs: 0.5}}}}
train: {{steps: 6, epochs: 4, batch_size: 8, precision: fp32}}
run: {{dir: {run}, device: {device}, kernels: {kernels}, log_every_steps: 1, log: []}}
"""
DISTILLED = """method={{
  name: {method}, out_dim: 40, hidden_dim: 16, bottleneck_dim: 8,
  views: [{{name: global, count: 2, size: 32}}, {{name: local, count: 1, size: 16}}],
  backbone: {{name: test_vit, init: dino, positions: dino}}}}
"""
ADAMW = ("optim.name=adamw", "optim.lr.start=0.002")
OPTIONS = {
    "moco": (),
    "densecl": ("method.name=densecl",),
    "dino": (DISTILLED.format(method="dino"), *ADAMW),
    "ibot": (DISTILLED.format(method="ibot"), "method.mask.shape=random", *ADAMW),
}


@pytest.mark.skipif(not (INTERPRETED or CUDA), reason="needs CUDA or TRITON_INTERPRET=1")
@pytest.mark.parametrize("method", OPTIONS)
def test_training_curves_lie_on_each_other(method, tmp_path, capsys):
    write_random_images(tmp_path / "images", 24)
    curves = {}
    for kernels in ("torch", "triton"):
        recipe = tmp_path / f"{kernels}.yaml"
        recipe.write_text(
            RECIPE.format(
                images=tmp_path / "images", run=tmp_path / kernels,
                device="cuda" if CUDA else "cpu", kernels=kernels,
            )
        )  # fmt: skip
        with launch.chosen("auto"):
            assert pretrain.main([str(recipe), *OPTIONS[method]]) == 0
        lines = (tmp_path / kernels / "log.jsonl").read_text().splitlines()
        curves[kernels] = torch.tensor([json.loads(line)["loss"] for line in lines])
    capsys.readouterr()
    assert len(curves["torch"]) == 6
    assert curves["torch"].std() > 1e-3  # a curve, not a constant
    assert torch.allclose(curves["torch"], curves["triton"], rtol=1e-4)
    # Equal losses would also come from kernels that never ran: their last bits must differ somewhere
    assert not torch.equal(curves["torch"], curves["triton"])
