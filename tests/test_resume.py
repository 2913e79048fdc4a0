"""Every method's run, broken off within an epoch and at its end, goes on to the same weights to the bit."""

import pytest

from dataprep.synthetic import write_random_images
from dense_ssl import pretrain
from dense_ssl.methods import METHODS

RECIPE = """
method: {{name: {name}, {views}, out_dim: 24, hidden_dim: 32, backbone: {backbone}, {more}}}
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{name: adamw, lr: 0.001, clip: {{kind: per_tensor, norm: 0.3}}}}
train: {{epochs: 4, batch_size: 8, precision: fp32}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 3, log_every_steps: 2, log: []}}
"""

PAIR = "views: [{name: global, count: 2, size: 64, photometric: moco_v2}]"
CELLS = "views: [{name: global, count: 2, size: 128, photometric: moco_v2}]"
MULTI_CROP = """views: [
    {name: global, count: 2, size: 64, photometric: [dino_1, dino_2]},
    {name: local, count: 2, size: 32, scale: [0.05, 0.4], photometric: dino_local}]"""
TWINS = """views: [
    {name: global, count: 2, size: 64, photometric: [dc_1, dc_2]},
    {name: extra, count: 2, size: 64, photometric: [dc_1, dc_2], twin_of: global, part: 0.5}]"""
PULLED = """views: [
    {name: global, count: 2, size: 64, photometric: udi,
     near: {kind: pull, of: "global[0]", amount: 0.5}},
    {name: local, count: 2, size: 32, scale: [0.05, 0.4], photometric: udi,
     near: {kind: pull, of: shared(global), amount: 0.5}}]"""
QUERIES = """views: [
    {name: global, count: 2, size: 64, photometric: [moco_v2_autoaugment, moco_v2]},
    {name: small, count: 2, size: 32, scale: [0.05, 0.14], photometric: moco_v2_autoaugment,
     near: {kind: overlap, of: "global[1]", amount: 0.1}}]"""
REGIONS = "mask: {shape: rcc, ratio: [0.5], spread: [0.1]}"
RESNET = "{name: test_resnet, init: fan_in, bn_groups: 2}"
VIT = "{name: test_vit, init: dino, positions: dino, drop_path: 0.1}"
TWO_TOKENS = VIT.replace("}", ", class_tokens: 2}")
PROTOTYPES = "bottleneck_dim: 8"

# method: views, backbone, further settings. Whatever draws random numbers or keeps state is on.
METHODS_BY_NAME = {
    "moco": (PAIR, RESNET, "queue_length: 24"),
    "revisiting": (QUERIES, RESNET, "queue_length: 24, aux_neighbours: 5, aux_warmup_epochs: 1"),
    "densecl": (PAIR, RESNET, "queue_length: 24"),
    "densecl_dc": (CELLS, RESNET, f"queue_length: 24, {REGIONS}, dc_share: 0.5"),
    "dino": (MULTI_CROP, VIT, PROTOTYPES),
    "ibot": (MULTI_CROP, VIT, PROTOTYPES),
    "ibot_dc": (TWINS, VIT, f"{PROTOTYPES}, {REGIONS}, dc_photometric: independent"),
    "sere": (MULTI_CROP, VIT, PROTOTYPES),
    "udi": (PULLED, TWO_TOKENS, f"{PROTOTYPES}, local_window: 1, attention_heads: 4"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_random_images(folder, 20)  # 2 steps of 8 an epoch, 4 images dropped
    return folder


def test_every_method_is_covered():
    assert set(METHODS_BY_NAME) == set(METHODS)


@pytest.mark.parametrize("name", METHODS_BY_NAME)
def test_a_resumed_run_ends_with_the_same_weights(name, images, tmp_path, capsys):
    views, backbone, more = METHODS_BY_NAME[name]

    def run(folder, steps):
        path = tmp_path / f"{folder}.yaml"
        path.write_text(
            RECIPE.format(
                name=name, views=views, backbone=backbone, more=more,
                images=images, run=tmp_path / folder,
            )
        )  # fmt: skip
        assert pretrain.main([str(path), f"train.steps={steps}"]) == 0
        return capsys.readouterr().out.strip().splitlines()[-1]

    whole = run("whole", 6)
    assert whole.startswith("weights sha256: ")
    for stop in (3, 4):  # within an epoch, and at its end
        run(f"at{stop}", stop)
        assert run(f"at{stop}", 6) == whole
