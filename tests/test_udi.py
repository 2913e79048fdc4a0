"""UDI against the published sequence of operations, its samples against pixels, and two ranks against one."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError, validate
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.distributed import World
from dense_ssl.methods import make_method
from dense_ssl.methods.udi import UdiConfig, udi_views
from dense_ssl.methods.udi_attention import PointAttention, PointSampler
from dense_ssl.photometry.policies import POLICIES
from dense_ssl.published.udi import maps_of, udi_losses
from dense_ssl.schedule import Step
from dense_ssl.views import ViewSpec
from tests.ranks import on_ranks

ALONE = World(rank=0, size=1, device=torch.device("cpu"), flags=None)
BATCH, LOCALS = 3, 2
VIEWS = (
    ViewSpec(name="global", count=2, size=64),
    ViewSpec(name="local", count=LOCALS, size=48),
)
ONE_TOKEN = BackboneConfig(name="test_vit", init="dino", positions="dino")
TWO_TOKENS = ONE_TOKEN.model_copy(update={"class_tokens": 2})
SMALL = {"out_dim": 24, "hidden_dim": 32, "bottleneck_dim": 8, "attention_heads": 4}
WINDOWS = {"global_window": 1, "local_window": 1}
CONFIGS = {
    "udi": UdiConfig(**SMALL, **WINDOWS, views=VIEWS, backbone=TWO_TOKENS, blend=0.3),
    "without local crops": UdiConfig(
        **SMALL, **WINDOWS, views=VIEWS[:1], backbone=TWO_TOKENS
    ),
    "one class token": UdiConfig(**SMALL, global_window=3, views=VIEWS, backbone=ONE_TOKEN),
    "no patches": UdiConfig(**SMALL, views=VIEWS, backbone=ONE_TOKEN, patches=False),
}  # fmt: skip


def batch_of(images=BATCH, views=VIEWS, seed=0):
    """A batch with boxes that overlap and ones that do not, mirrored or not."""
    torch.manual_seed(seed)
    crops = {}
    for spec in views:
        shape, least = (spec.count, images), 0.6 if spec.name == "global" else 0.2
        low = torch.rand(*shape, 2) * 0.3
        boxes = torch.cat([low, low + least + torch.rand(*shape, 2) * 0.1], dim=-1)
        pixels = torch.randn(*shape, 3, spec.size, spec.size)
        crops[spec.name] = Crops(pixels, boxes, torch.rand(shape) < 0.5)
    if "local" in crops:  # one that no global crop shows
        crops["local"].boxes[0, 0] = torch.tensor([0.9, 0.9, 1.0, 1.0])
        crops["global"].boxes[:, 0, 2:].clamp_(max=0.9)
    return MultiCropBatch(crops, torch.arange(images), torch.full((images,), -1))


def method_of(config, seed=1):
    """A method whose teacher is another network than its student, with centres."""
    torch.manual_seed(seed)
    method = make_method(config)
    with torch.no_grad():
        for p in (*method.teacher.parameters(), *method.student.parameters()):
            p.add_(0.05 * torch.randn_like(p))
        for center in method.objective.buffers():
            center.normal_(std=0.1)
    return method


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("index", [0, 300])  # another epoch: other samples, another temperature
def test_losses_gradients_and_centres_are_those_of_the_published_sequence(name, index):
    config = CONFIGS[name]
    method, step = method_of(config), Step(index, 10, 100, seed=5)
    batch = batch_of(views=config.views)
    levels = udi_losses(method, batch, step)
    total = levels.pop("loss")
    centers = {name: levels.pop(name) for name in list(levels) if "center" in name}
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    want = torch.autograd.grad(total, list(trained.values()))
    output = method(batch, step)
    output.loss.backward()
    torch.testing.assert_close(output.loss, total, rtol=1e-5, atol=1e-5)
    assert set(output.logs) == set(levels)
    for part, value in levels.items():
        torch.testing.assert_close(output.logs[part], value.detach(), rtol=1e-5, atol=1e-5)
    for (key, p), gradient in zip(trained.items(), want, strict=True):
        scale = gradient.abs().max().item()
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=key)
    method.after_step([output.carry], step)
    assert len(centers) == len(list(method.objective.buffers()))
    for key, center in centers.items():
        got = method.objective.get_buffer(key)
        torch.testing.assert_close(got, center, rtol=1e-5, atol=1e-6, msg=key)


def test_some_samples_count_and_some_do_not_in_what_is_compared():
    config = CONFIGS["udi"]
    src, _ = maps_of(method_of(config), batch_of(), Step(0, 10, 100, seed=5))
    of_global, of_local = (torch.stack([x.sum(-1) for x in part]) for part in (src[:2], src[2:]))
    assert 0.2 < of_global.mean() < 0.9
    assert 0.2 < of_local.mean() < 0.9
    assert torch.any(of_local.sum(-1) == 0)  # a local crop that shares nothing with a global one


# --- the attention module --------------------------------------------------------------------------


def test_modules_have_the_published_sizes_and_start_at_any_width():
    sizes = {dim: sum(p.numel() for p in PointAttention(dim, 6).parameters()) for dim in (384, 768)}
    assert sizes == {dim: 4 * dim**2 + 6 * dim for dim in sizes}  # 0.59 M of ViT-S
    module = PointSampler(384, 6)
    assert set(module.state_dict()) == {
        f"{name}.{kind}"
        for name in ("norm1", "attn.qkv", "attn.proj", "attn.norm")
        for kind in ("weight", "bias")
    }
    assert {m.eps for m in (module.norm1, module.attn.norm)} == {1e-6}
    assert module.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.all(module.attn.qkv.bias == 0)


@pytest.mark.parametrize("name", ["small", "base"])
def test_the_published_networks_have_the_published_sizes_and_vit_b_can_be_built(name):
    backbone = UdiConfig().backbone.model_copy(update={"name": f"vit_{name}_patch16_224"})
    with torch.device("meta"):
        method = make_method(UdiConfig(backbone=backbone))
    student = method.student
    counts = {key: sum(p.numel() for p in module.parameters()) for key, module in student.items()}
    dim = student["backbone"].dim
    assert counts["sampler"] == 4 * dim**2 + 8 * dim
    if name == "small":
        assert counts["backbone"] == 21_665_664 + 2 * 384  # a token and its position more
        assert round(counts["head"] / 1e6, 2) == 22.35
    trunk = student["backbone"].trunk
    assert trunk.pos_embed.shape == (1, 198, dim) and trunk.reg_token.shape == (1, 1, dim)


def test_a_point_of_nothing_attends_to_all_alike_and_a_patch_is_its_own_query():
    module = PointAttention(8, 2).double()
    tokens = torch.randn(1, 5, 8, dtype=torch.float64)
    maps = torch.zeros(1, 2, 5, dtype=torch.float64)
    maps[0, 1, 3] = 1
    with torch.no_grad():
        out = module(tokens, maps)
        q, k, v = module.qkv(tokens).chunk(3, 2)
        uniform = v.mean(1)
        torch.testing.assert_close(out[:, 0], module.norm(module.proj(uniform)))
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            weights = torch.softmax(q[0, 3, part] @ k[0, :, part].T / 2, 0)
            heads.append(weights @ v[0, :, part])
        want = module.norm(module.proj(torch.cat(heads)) + tokens[0, 3])
    torch.testing.assert_close(out[0, 1], want)


# --- the method ------------------------------------------------------------------------------------


def test_first_losses_are_near_those_of_chance():
    """Logits start as cosines in 256 dimensions, and both networks as one and the same."""
    config = UdiConfig(views=VIEWS, backbone=TWO_TOKENS, attention_heads=4, out_dim=8192, **WINDOWS)
    logs = make_method(config)(batch_of(), Step(0, 10, 100)).logs
    chance = math.log(8192)
    assert chance - 1 < logs["cls"].item() < chance
    # Unit vectors that know nothing of each other, as patches of noise do, cost 0.2 more than chance.
    for name in ("cls_plus", "patch"):
        assert chance - 1 < logs[name].item() < chance + 0.2


def test_crops_that_share_nothing_leave_the_patch_level_at_zero_with_gradients_of_zero():
    method, batch = method_of(CONFIGS["udi"]), batch_of()
    batch.views["global"].boxes[0] = torch.tensor([0, 0, 0.4, 1])
    batch.views["global"].boxes[1] = torch.tensor([0.4, 0, 1, 1])
    output = method(batch, Step(0, 10, 2))
    assert output.logs["patch"] == 0
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.student.parameters())
    assert all(torch.all(p.grad == 0) for p in method.student["sampler"].parameters())


def test_one_image_is_a_batch():
    for name in ("udi", "without local crops"):
        config = CONFIGS[name]
        output = method_of(config)(batch_of(1, config.views), Step(0, 10, 2))
        assert torch.isfinite(output.loss)


def test_logits_are_made_of_class_tokens_alone_outside_of_the_loss_in_chunks():
    config, rows = CONFIGS["udi"].model_copy(update={"out_dim": 999}), []
    method = make_method(config)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shape = getattr(out, "shape", ())
            if len(shape) > 1 and shape[-1] == 999:
                rows.append(math.prod(shape[:-1]))
            return out

    with Watch():
        method(batch_of(), Step(0, 10, 2))
    assert max(rows) == (2 + LOCALS) * BATCH  # 96 samples of global crops, 108 places of local ones


def test_under_autocast_it_stays_near_float32():
    method, batch, step = make_method(CONFIGS["udi"]), batch_of(), Step(0, 10, 2)
    exact = method(batch, step).logs
    with torch.autocast("cpu", torch.bfloat16):
        output = method(batch, step)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(mean.dtype == torch.float32 for mean in output.carry)
    for name, value in output.logs.items():
        torch.testing.assert_close(value, exact[name], rtol=0.02, atol=0.02)


def test_colours_are_the_published_ones():
    (jitter, grey, either), moves = POLICIES["udi"].ops, POLICIES["udi"].moves_pixels
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, jitter.p)
    assert strengths == (0.4, 0.4, 0.2, 0.1, 0.8)
    assert grey.p == 0.2 and not moves
    (blur,), (rare_blur, solarize) = either.branches
    assert (blur.p + rare_blur.p) / 2 == pytest.approx(0.425)
    assert solarize.p / 2 == pytest.approx(0.1)
    assert {view.flip for view in udi_views(10)} == {0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"views": (ViewSpec(name="global", count=3, size=64),)},
            "method.views: .*; 3 global given",
        ),
        (
            {"views": (VIEWS[0], ViewSpec(name="small", count=2, size=32))},
            "method.views: .*; 2 global, 2 small given",
        ),
        ({"global_window": 5}, "method.global_window: 5 x 5 patches do not fit into the 4 x 4"),
        ({"local_window": 4}, "method.local_window: 4 x 4 .* the 3 x 3 of a local crop"),
        ({"attention_heads": 6}, "method.attention_heads: 6 heads cannot share .* 64 channels"),
        (
            {"backbone": BackboneConfig(name="test_resnet", class_tokens=2)},
            "method.backbone.class_tokens: a ResNet has no class tokens",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    options = {**SMALL, **WINDOWS, "views": VIEWS, "backbone": TWO_TOKENS, **options}
    with pytest.raises(UserError, match=message):
        make_method(UdiConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches": False}, "patches: a second class token learns from patches"),
        ({"backbone": {"name": "test_vit", "class_tokens": 3}}, "udi trains one or two"),
    ],
)
def test_variants_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        validate(UdiConfig, options, "x")


# --- ranks -----------------------------------------------------------------------------------------


def _step(world):
    torch.manual_seed(2)
    method = make_method(CONFIGS["udi"])
    half, other = batch_of(2, seed=3), batch_of(2, seed=4)
    # The same images by other pixels: as many samples count on each rank as on the other.
    pixels = {k: torch.cat([half.views[k].images, other.views[k].images], 1) for k in half.views}
    batch = MultiCropBatch(
        {
            k: Crops(pixels[k], v.boxes.repeat(1, 2, 1), v.flipped.repeat(1, 2))
            for k, v in half.views.items()
        },
        half.index.repeat(2),
        half.label.repeat(2),
    )
    if world.size > 1:
        mine = slice(2 * world.rank, 2 * world.rank + 2)
        views = {k: v.map(lambda x: x[:, mine]) for k, v in batch.views.items()}
        batch = MultiCropBatch(views, batch.index[mine], batch.label[mine])
    output = method(batch, Step(0, 10, 2))
    output.loss.backward()
    method.after_step([output.carry], Step(0, 10, 2))
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "grads": grads, "buffers": dict(method.named_buffers())}


@pytest.mark.slow
def test_two_ranks_are_one_rank_with_the_batch_doubled(tmp_path):
    first, second = on_ranks(2, _step, tmp_path)
    alone = _step(ALONE)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, alone["loss"])
    for name, want in alone["grads"].items():
        got = (first["grads"][name] + second["grads"][name]) / 2
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5, msg=name)
    assert set(alone["buffers"]) == {
        f"objective.{n}" for n in ("center", "plus_center", "patch_center")
    }
    for name, want in alone["buffers"].items():
        assert want.abs().max() > 0
        torch.testing.assert_close(first["buffers"][name], want, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(second["buffers"][name], first["buffers"][name])


def test_centres_are_means_of_the_means_of_micro_batches():
    method, step = method_of(CONFIGS["udi"]), Step(0, 10, 2)
    before = [center.clone() for center in method.objective.buffers()]
    carries = [method(batch_of(images, seed=images), step).carry for images in (1, 3)]
    method.after_step(carries, step)
    for center, old, means in zip(method.objective.buffers(), before, zip(*carries), strict=True):
        torch.testing.assert_close(center, 0.9 * old + 0.1 * (means[0] + means[1]) / 2)
