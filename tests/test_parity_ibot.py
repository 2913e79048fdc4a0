"""Golden values of DINO and iBOT: numbers their official codes gave on deterministic inputs."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dense_ssl import parity
from dense_ssl.methods import make_method
from dense_ssl.methods.ibot import IBotConfig

RTOL = 1e-5


def fill(shape, s, a=1.0):
    """The specification's deterministic tensor: a sin(s + 0.37 j) in float64, cast to float32."""
    values = a * np.sin(s + 0.37 * np.arange(np.prod(shape)))
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def close(got, want, atol=2e-6):
    """Whether the first values of `got` are those printed with six digits."""
    got = torch.as_tensor(got).flatten()[: len(want)].double()
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=RTOL, atol=atol)


# --- 1, 2: schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "golden"),
    [
        (
            (0.002, 1e-6, 10, 5, 2),
            {0: 0, 1: 2.22222222e-4, 4: 8.88888889e-4, 9: 0.002, 10: 0.002,
             11: 0.00199691888, 30: 0.0010005, 49: 4.08112493e-6},
        ),
        ((0.04, 0.4, 10, 5), {0: 0.04, 1: 0.0403551889, 25: 0.22, 49: 0.399644811}),
        ((0.996, 1, 10, 5), {0: 0.996, 1: 0.996003946543, 25: 0.998, 49: 0.999996053457}),
    ],
)  # fmt: skip
def test_cosine_schedule(arguments, golden):
    values = parity.cosine_schedule(*arguments)
    assert values.shape == (50,)
    for index, value in golden.items():
        assert values[index] == pytest.approx(value, rel=5e-9)


def test_teacher_temps():
    ramp = [0.04, 0.0475, 0.055, 0.0625, 0.07]
    assert parity.teacher_temps(0.04, 0.07, 5, 10) == pytest.approx(ramp + 5 * [0.07])
    late = parity.teacher_temps(0.04, 0.07, 5, 10, start_epoch=3)
    assert late == pytest.approx(3 * [0.04] + ramp + 2 * [0.07])
    assert parity.teacher_temps(0.04, 0.07, 0, 2) == pytest.approx([0.07, 0.07])
    assert parity.teacher_temps(0.04, 0.07, 1, 2) == pytest.approx([0.04, 0.07])


# --- 3, 4: losses and centres ----------------------------------------------------------------------


def test_dino_loss_and_its_centre():
    student, teacher = fill((15, 8), 0.1, 3), fill((6, 8), 0.5, 3)
    temps = parity.teacher_temps(0.04, 0.07, 5, 10)
    center = torch.zeros(1, 8)
    assert parity.dino_loss(student, teacher, center, temps[0]).item() == pytest.approx(
        28.614731, rel=RTOL
    )
    center = parity.update_center(center, teacher)
    assert center.shape == (1, 8)
    close(center, [0.025991, 0.023799, 0.018387, 0.010485])
    assert parity.dino_loss(student, teacher, center, temps[4]).item() == pytest.approx(
        28.580673, rel=RTOL
    )
    close(parity.update_center(center, teacher), [0.049383, 0.045219, 0.034934, 0.019922])


B, Y, X = (axis.reshape(shape) for axis, shape in (
    (np.arange(3), (3, 1, 1)), (np.arange(2), (1, 2, 1)), (np.arange(2), (1, 1, 2))
))  # fmt: skip
MASKS = (
    torch.from_numpy((B + Y + X) % 3 == 0),
    torch.from_numpy((B == 1) & (Y == X)),
)


def ibot(center, center2, epoch, local=None):
    temps = parity.teacher_temps(0.04, 0.07, 5, 10)
    return parity.ibot_loss(
        fill((6, 8), 0.1, 3), fill((6, 4, 8), 0.9, 3), local, fill((6, 8), 0.5, 3),
        fill((6, 4, 8), 1.3, 3), MASKS, center, center2, temps[epoch], temps[epoch], 1.0, 1.0,
    )  # fmt: skip


def test_ibot_loss_and_its_centres_over_three_calls():
    golden = {
        0: (28.530628, 0.733172, 29.263800, [0.025991, 0.023799, 0.018387, 0.010485],
            [0.007262, 0.009412, 0.010288, 0.009772]),
        4: (28.467007, 0.904303, 29.371309, [0.049383],
            [0.013798, 0.017883, 0.019547, 0.018566]),
        9: (28.450546, 0.905467, 29.356012, [0.070436, 0.064496, 0.049827, 0.028415],
            [0.019680, 0.025506, 0.027881, 0.026481]),
    }  # fmt: skip
    center, center2 = torch.zeros(1, 8), torch.zeros(1, 1, 8)
    for epoch, (cls, patch, total, c, c2) in golden.items():
        losses = ibot(center, center2, epoch)
        assert losses["cls"].item() == pytest.approx(cls, rel=RTOL)
        assert losses["patch"].item() == pytest.approx(patch, rel=RTOL)
        assert losses["loss"].item() == pytest.approx(total, rel=RTOL)
        center, center2 = losses["center"], losses["center2"]
        assert center2.shape == (1, 1, 8)
        close(center, c)
        close(center2, c2)


def test_ibot_loss_with_local_crops():
    losses = ibot(torch.zeros(1, 8), torch.zeros(1, 1, 8), 0, local=fill((9, 8), 2.1, 3))
    got = [losses[name].item() for name in ("cls", "patch", "loss")]
    assert got == pytest.approx([22.800343, 0.733172, 23.533514], rel=RTOL)


# --- 5: masks --------------------------------------------------------------------------------------


def drawn(mask):
    return "/".join("".join(".#"[int(cell)] for cell in row) for row in mask)


def two_crops(sampler, ratios, spreads, rng, masks_rng=None):
    """Masks of two 224 px crops of one image, in the official order of draws."""
    return [
        sampler(14, 14, parity.draw_ratio(ratios, spreads, rng), masks_rng or rng) for _ in range(2)
    ]


def test_block_masks_are_the_published_ones_bit_for_bit():
    first, second = two_crops(parity.block_mask, (0.3,), (0,), random.Random(0))
    assert first.sum() == second.sum() == 58
    assert drawn(first) == (
        "............../............../............../#####........./#####........./#####........./"
        "#####........./#####...##..../#####...##..../#####...##..../#####...##..../#####........./"
        "#####........./.............."
    )
    assert drawn(second) == (
        "............../.....#######../.....#######../.....#######../.....#######../............../"
        "............../............../.........#####/.........#####/.........#####/.........#####/"
        ".........#####/.........#####"
    )


def test_block_masks_with_two_ratios():
    first, second = two_crops(parity.block_mask, (0, 0.3), (0, 0.2), random.Random(3))
    assert first.sum() == 0
    assert second.sum() == 46
    want = ["...##########."] * 4 + ["....##........"] * 3 + ["." * 14] * 7
    assert drawn(second) == "/".join(want)


def test_random_masks_are_the_published_ones_bit_for_bit():
    rngs = random.Random(0), np.random.RandomState(0)
    first, second = two_crops(parity.random_mask, (0.3,), (0,), *rngs)
    assert first.sum() == second.sum() == 58
    assert drawn(first).startswith("....#.#......#/##...#.#.....#/#..#....#.#.##")


# --- 6, 7: the network -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_params():
    shapes = {
        "cls_token": (1, 1, 12), "pos_embed": (1, 17, 12), "masked_embed": (1, 12),
        "patch_embed.proj.weight": (12, 3, 8, 8), "patch_embed.proj.bias": (12,),
    }  # fmt: skip
    for i in range(2):
        shapes |= {
            f"blocks.{i}.norm1.weight": (12,), f"blocks.{i}.norm1.bias": (12,),
            f"blocks.{i}.attn.qkv.weight": (36, 12), f"blocks.{i}.attn.qkv.bias": (36,),
            f"blocks.{i}.attn.proj.weight": (12, 12), f"blocks.{i}.attn.proj.bias": (12,),
            f"blocks.{i}.norm2.weight": (12,), f"blocks.{i}.norm2.bias": (12,),
            f"blocks.{i}.mlp.fc1.weight": (48, 12), f"blocks.{i}.mlp.fc1.bias": (48,),
            f"blocks.{i}.mlp.fc2.weight": (12, 48), f"blocks.{i}.mlp.fc2.bias": (12,),
        }  # fmt: skip
    shapes |= {"norm.weight": (12,), "norm.bias": (12,)}
    return {
        name: fill(shape, 0.05 * i, 0.1) if "norm" not in name
        else torch.full(shape, float(name.endswith("weight")))
        for i, (name, shape) in enumerate(shapes.items())
    }  # fmt: skip


def test_vit_forward_masks_embeddings_before_their_positions(vit_params):
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[0, 3, 3] = True
    with torch.no_grad():
        tokens = parity.vit_forward(vit_params, fill((1, 3, 32, 32), 0.3), mask)
    assert tokens.shape == (1, 17, 12)
    close(tokens[0, 0], [0.873273, 1.140605, 1.042276, 0.243324], atol=1e-5)
    close(tokens[0, 7], [0.846732, 1.117326, 1.021459, 0.213252], atol=1e-5)


def test_vit_forward_on_another_grid(vit_params):
    with torch.no_grad():
        tokens = parity.vit_forward(vit_params, fill((1, 3, 48, 16), 0.3), None)
    assert tokens.shape == (1, 13, 12)
    close(tokens[0, 0], [0.872165, 1.132923, 1.047713, 0.248573], atol=1e-5)
    close(tokens[0, 12], [1.104665, 1.722125, 0.687522, -0.215148], atol=1e-5)


def test_positions_are_resampled_by_scale_factor():
    y, x = np.mgrid[:14, :14]
    table = torch.from_numpy(np.sin(0.1 * y + 0.2 * x)).float()
    golden = {
        (6, 6): {(0, 0): 0.165665, (2, 3): 0.897339, (5, 5): -0.488350},
        (30, 30): {(0, 0): -0.032165, (2, 3): 0.286808, (29, 29): -0.711168},
        (50, 63): {(0, 0): -0.032713, (2, 3): 0.057613, (49, 62): -0.713480},
    }
    for grid, values in golden.items():
        got = parity.interpolate_pos(table, *grid)
        assert got.shape == grid
        for place, value in values.items():
            assert got[place].item() == pytest.approx(value, abs=2e-6)
    assert torch.equal(parity.interpolate_pos(table, 14, 14), table)


def test_positions_as_the_parameter_of_a_vit():
    table = torch.randn(1, 197, 5)
    got = parity.interpolate_pos(table, 6, 9)
    assert got.shape == (1, 55, 5)
    assert torch.equal(got[:, 0], table[:, 0])
    for d in range(5):
        want = parity.interpolate_pos(table[0, 1:, d].reshape(14, 14), 6, 9)
        torch.testing.assert_close(got[0, 1:, d], want.flatten())


# --- 8: the head -----------------------------------------------------------------------------------

HEAD = {
    "mlp.0.weight": (8, 6), "mlp.0.bias": (8,), "mlp.2.weight": (8, 8), "mlp.2.bias": (8,),
    "mlp.4.weight": (4, 8), "mlp.4.bias": (4,), "last_layer.weight_v": (5, 4),
}  # fmt: skip


def test_ibot_head():
    params = {name: fill(shape, 0.1 + 0.3 * k, 0.2) for k, (name, shape) in enumerate(HEAD.items())}
    tokens = fill((2, 3, 6), 0.4)
    with torch.no_grad():
        cls, patch = parity.ibot_head(params, tokens)
    assert (cls.shape, patch.shape) == ((2, 5), (2, 2, 5))
    close(cls[0], [0.857808, -0.503709, -0.843028, 0.394437, 0.820310])
    close(patch[1, 1], [0.886834, -0.544171, -0.875601, 0.433807, 0.855304])
    apart = params | {"last_layer2.weight_v": -params["last_layer.weight_v"]}
    with torch.no_grad():
        same_cls, other = parity.ibot_head(apart, tokens)
    torch.testing.assert_close(same_cls, cls)
    torch.testing.assert_close(other, -patch)


# --- 9: weights ------------------------------------------------------------------------------------


def test_ema_update_moves_what_both_have():
    teacher = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    student = {"a": torch.randn(3), "b": torch.randn(2, 2), "masked_embed": torch.randn(1, 4)}
    want = {n: 0.996 * t.double() + 0.004 * student[n].double() for n, t in teacher.items()}
    parity.ema_update(teacher, student, 0.996)
    for name, value in want.items():
        torch.testing.assert_close(teacher[name].double(), value, rtol=2e-7, atol=2e-7)


def test_clip_per_tensor_leaves_small_gradients():
    grads = [torch.full((4,), 3.0), torch.tensor([0.5]), torch.zeros(2)]
    want = [torch.full((4,), 3.0) * 2 / (6 + 1e-6), torch.tensor([0.5]), torch.zeros(2)]
    parity.clip_per_tensor(grads, 2.0)
    for got, value in zip(grads, want, strict=True):
        torch.testing.assert_close(got, value)


def test_parameter_groups_of_the_published_vit_small():
    with torch.device("meta"):
        method = make_method(IBotConfig())
        student = nn.ModuleList([method.student, method.masking])
    decay, no_decay = parity.param_groups(student)
    assert (len(decay.params), len(no_decay.params)) == (57, 102)
    assert sum(p.numel() for p in decay.params) == 29_215_360
    assert sum(p.numel() for p in no_decay.params) == 65_408
    groups = {group.name: group for group in method.param_groups()}
    together = groups["decay"].params + groups["last_layer"].params
    assert {id(p) for p in together} == {id(p) for p in decay.params}
    assert groups["decay"].decay == groups["last_layer"].decay == 1
    assert groups["last_layer"].frozen_epochs == 1
    assert sum(p.numel() for p in groups["last_layer"].params) == 8192 * 257


def test_the_published_backbones_have_the_published_sizes():
    sizes = {"small": (21_666_048, 7_614_720), "base": (85_799_424, 8_401_152)}
    for name, (backbone, head) in sizes.items():
        config = IBotConfig()
        named = config.backbone.model_copy(update={"name": f"vit_{name}_patch16_224"})
        with torch.device("meta"):
            method = make_method(config.model_copy(update={"backbone": named}))
        trunk = sum(p.numel() for p in method.student["backbone"].parameters())
        assert trunk + method.masking.token.numel() == backbone
        assert sum(p.numel() for p in method.student["head"].parameters()) == head


def test_last_layers_rest_in_the_first_epochs():
    assert [parity.cancel_last_layer(epoch, 3) for epoch in range(5)] == 3 * [True] + 2 * [False]
    assert not parity.cancel_last_layer(0, 0)


def test_head_equals_torchs_own_weight_norm():
    torch.manual_seed(3)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5, bias=False), dim=0)
    g, v = (p.detach() for p in reference.parametrizations.weight.parameters())
    params = {name: fill(shape, 0.2 * k, 0.2) for k, (name, shape) in enumerate(HEAD.items())}
    tokens = fill((2, 3, 6), 0.4)
    with torch.no_grad():
        cls, _ = parity.ibot_head(
            params | {"last_layer.weight_g": g, "last_layer.weight_v": v}, tokens
        )
        x = F.gelu(F.linear(tokens, params["mlp.0.weight"], params["mlp.0.bias"]))
        x = F.gelu(F.linear(x, params["mlp.2.weight"], params["mlp.2.bias"]))
        x = F.linear(x, params["mlp.4.weight"], params["mlp.4.bias"])
        want = reference(F.normalize(x, dim=-1))[:, 0]
    torch.testing.assert_close(cls, want)
