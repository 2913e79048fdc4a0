"""The contract every method keeps, and what is special to the MoCo family."""

import copy

import pytest
import torch
from torch.nn import functional as F

from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.methods import METHODS, densecl, make_method
from dense_ssl.methods.densecl import DenseCLConfig
from dense_ssl.methods.densecl_dc import DenseCLDCConfig
from dense_ssl.methods.ibot import DinoConfig, IBotConfig
from dense_ssl.methods.ibot_dc import IBotDCConfig
from dense_ssl.methods.masks import MaskConfig
from dense_ssl.methods.moco import MoCoConfig
from dense_ssl.methods.parts import mlp_head
from dense_ssl.methods.revisiting import RevisitingConfig
from dense_ssl.methods.sere import SereConfig
from dense_ssl.methods.udi import UdiConfig
from dense_ssl.optim import OptimConfig, make_optimizer
from dense_ssl.schedule import Step
from dense_ssl.views import Near, ViewSpec, draw_epoch

SIZE, BATCH = 64, 4
RESNET = BackboneConfig(name="test_resnet", bn_groups=2)
VIT = BackboneConfig(name="test_vit", init="timm")
VIEWS = (ViewSpec(name="global", count=2, size=SIZE, photometric="moco_v2"),)
CONTRASTIVE = {"views": VIEWS, "out_dim": 16, "hidden_dim": 32, "queue_length": 24}

CONFIGS = {
    f"{name}-{net.name}": config(**CONTRASTIVE, backbone=net)
    for name, config in (("moco", MoCoConfig), ("densecl", DenseCLConfig))
    for net in (RESNET, VIT)
}
KEY = Near(kind="overlap", of="global[1]", amount=0.1)
SMALL = ViewSpec(name="small", count=3, size=32, scale=(0.05, 0.14), near=KEY)
QUERIES = (
    VIEWS[0],
    SMALL,
)  # colours are not the method's business: the ladder's rungs 2 and 3 are one here
CONFIGS |= {
    f"revisiting-{rung}": RevisitingConfig(
        **CONTRASTIVE | {"views": views}, backbone=net, aux_neighbours=5, **options
    )
    for rung, views, net, options in (
        ("moco", VIEWS, RESNET, {"aux_weight": 0}),
        ("multicrop", QUERIES, RESNET, {"aux_weight": 0}),
        ("knn", QUERIES, RESNET, {"aux_queue_order": "official"}),
        ("aligned", QUERIES, RESNET, {"queue_backbone_dtype": "bf16", "aux_warmup_epochs": 0.1}),
        ("vit", QUERIES, VIT, {}),
    )
}
DINO_VIT = BackboneConfig(name="test_vit", init="dino", positions="dino")
MULTI_CROP = (
    ViewSpec(name="global", count=2, size=SIZE, photometric=("dino_1", "dino_2")),
    ViewSpec(name="local", count=3, size=32, photometric="dino_local"),
)
PROTOTYPES = {"views": MULTI_CROP, "out_dim": 24, "hidden_dim": 32, "bottleneck_dim": 8}
CONFIGS |= {
    "dino": DinoConfig(**PROTOTYPES, backbone=DINO_VIT),
    "dino-test_resnet": DinoConfig(**PROTOTYPES, backbone=BackboneConfig(name="test_resnet")),
    "ibot": IBotConfig(**PROTOTYPES, backbone=DINO_VIT),
    "ibot-apart": IBotConfig(
        **PROTOTYPES, backbone=DINO_VIT, patch_out_dim=20, norm_last_layer=True
    ),
}
# Grids of 4 x 4, and no mask is empty: four images make two extras.
REGIONS = MaskConfig(shape="rcc", ratio=(0.5,), spread=(0.1,))
TWINS = (
    *MULTI_CROP[:1],
    ViewSpec(name="extra", count=2, size=SIZE, twin_of="global", part=0.5, photometric="dino_1"),
)
LARGER = (VIEWS[0].model_copy(update={"size": 128}),)
CONFIGS |= {
    f"densecl_dc-{net.name}": DenseCLDCConfig(
        **CONTRASTIVE | {"views": views}, mask=REGIONS, dc_share=0.5, backbone=net
    )
    for net, views in ((RESNET, LARGER), (VIT, VIEWS))
}
CONFIGS |= {
    f"ibot_dc-{mode}": IBotDCConfig(
        **PROTOTYPES | {"views": TWINS}, mask=REGIONS, dc_photometric=mode, backbone=DINO_VIT
    )
    for mode in ("shared", "independent")
}
RELATED = {"overlap_size": (5, 5), "local_overlap_size": 2}
CONFIGS |= {
    "sere": SereConfig(**PROTOTYPES, **RELATED, backbone=DINO_VIT),
    "sere-global": SereConfig(**PROTOTYPES | {"views": MULTI_CROP[:1]}, backbone=DINO_VIT),
}
SAMPLED = {"global_window": 2, "local_window": 1, "attention_heads": 4}
TWO_TOKENS = DINO_VIT.model_copy(update={"class_tokens": 2})
CONFIGS |= {
    "udi": UdiConfig(**PROTOTYPES, **SAMPLED, backbone=TWO_TOKENS),
    "udi-global": UdiConfig(
        **PROTOTYPES | {"views": MULTI_CROP[:1]}, **SAMPLED, backbone=TWO_TOKENS
    ),
    "udi-one_token": UdiConfig(**PROTOTYPES, **SAMPLED, backbone=DINO_VIT),
}


def batch_for(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = {}
    for spec in config.views:
        images = torch.randn(spec.count, BATCH, 3, spec.size, spec.size, generator=generator)
        boxes = torch.tensor([0.1, 0.1, 0.9, 0.9]).expand(spec.count, BATCH, 4)
        views[spec.name] = Crops(images, boxes, torch.zeros(spec.count, BATCH, dtype=torch.bool))
    return MultiCropBatch(views, torch.arange(BATCH), torch.full((BATCH,), -1))


def take_step(method, optimizer, config, index):
    step = Step(index, steps_per_epoch=10, epochs=2, seed=3)
    output = method(batch_for(config, seed=index), step)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    method.after_step([output.carry], step)
    return output.loss.detach()


def fresh(config):
    torch.manual_seed(0)
    method = make_method(config)
    optimizer = make_optimizer(method.param_groups(), OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    return method, optimizer


@pytest.fixture(params=CONFIGS, scope="module")
def config(request):
    return CONFIGS[request.param]


def test_every_method_is_covered():
    assert {config.name for config in CONFIGS.values()} == set(METHODS)


def test_its_views_can_be_drawn(config):
    sizes = torch.tensor([[80, 100], [60, 64]], dtype=torch.int32).numpy()
    plan = draw_epoch(config.views, sizes, seed=0, epoch=0)
    assert plan.boxes.shape == (2, sum(v.count for v in config.views), 4)


def test_loss_is_a_finite_scalar_with_gradients_for_the_student_only(config):
    method, _ = fresh(config)
    output = method(batch_for(config), Step(0, 10, 2))
    assert output.loss.shape == ()
    assert torch.isfinite(output.loss)
    assert all(not value.requires_grad for value in output.logs.values())
    output.loss.backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_every_trained_parameter_is_in_exactly_one_group(config):
    method, _ = fresh(config)
    grouped = [id(p) for group in method.param_groups() for p in group.params]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in method.parameters() if p.requires_grad}


def test_forward_changes_no_state_but_batch_norm_statistics(config):
    method, _ = fresh(config)
    before = copy.deepcopy(method.state_dict())
    method(batch_for(config), Step(0, 10, 2))
    changed = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert all("running_" in k or "num_batches" in k for k in changed)


def test_after_step_moves_the_teacher_by_exactly_the_ema_formula(config):
    method, optimizer = fresh(config)
    take_step(method, optimizer, config, 0)
    teacher = {n: p.clone() for n, p in method.teacher.named_parameters()}
    take_step(method, optimizer, config, 1)
    m = config.momentum.at(Step(1, 10, 2))
    for name, new in method.student.named_parameters():
        want = m * teacher[name].double() + (1 - m) * new.detach().double()
        got = method.teacher.get_parameter(name).double()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_state_dict_round_trip_continues_to_the_bit(config):
    method, optimizer = fresh(config)
    take_step(method, optimizer, config, 0)
    other, other_optimizer = fresh(config)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for index in (1, 2):
        loss = take_step(method, optimizer, config, index)
        assert torch.equal(loss, take_step(other, other_optimizer, config, index))
    for key, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_accumulation_of_halves_is_the_mean_of_their_losses_and_both_are_carried(config):
    method, _ = fresh(config)
    step = Step(0, 10, 2)
    outputs = [method(batch_for(config, seed), step.at_micro(seed)) for seed in (0, 1)]
    sum(output.loss / 2 for output in outputs).backward()
    gradient = next(method.student.parameters()).grad.clone()
    method.zero_grad()
    parts = []
    for seed in (0, 1):
        method(batch_for(config, seed), step.at_micro(seed)).loss.backward()
        parts.append(next(method.student.parameters()).grad.clone())
        method.zero_grad()
    torch.testing.assert_close(gradient, (parts[0] + parts[1]) / 2, rtol=1e-3, atol=1e-5)
    method.after_step([output.carry for output in outputs], step)
    if hasattr(method, "queue"):
        assert method.queue.pointer == 2 * BATCH
    elif hasattr(method, "objective"):
        moved = [0.1 * (a + b) / 2 for a, b in zip(*(o.carry for o in outputs)) if a is not None]
        for center, want in zip(method.objective.buffers(), moved, strict=True):
            torch.testing.assert_close(center, want)


def test_queue_holds_the_newest_keys_and_wraps():
    config = CONFIGS["moco-test_resnet"]
    method, optimizer = fresh(config)
    for index in range(7):  # 7 x 4 keys in a queue of 24
        take_step(method, optimizer, config, index)
    assert method.queue.pointer == 28 % 24
    norms = method.queue.keys.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(24))


@pytest.mark.parametrize("init", ["torch", "kaiming"])
def test_heads_start_as_in_either_code(init):
    head = mlp_head(400, 300, 100, init)
    for layer, width in ((head[0], 400), (head[2], 300)):
        torch_own = width**-0.5  # uniform between -it and it, biases too
        std = (2 / width) ** 0.5 if init == "kaiming" else torch_own / 3**0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
        assert (layer.bias.abs().max() > 0) == (init == "torch")


def test_a_queue_shorter_than_a_step_is_refused():
    config = MoCoConfig(**{**CONTRASTIVE, "queue_length": 3}, backbone=RESNET)
    method, optimizer = fresh(config)
    with pytest.raises(UserError, match="method.queue_length: 3 is shorter than the 4 keys"):
        take_step(method, optimizer, config, 0)


def test_densecl_keys_are_pooled_before_normalising():
    config = CONFIGS["densecl-test_resnet"]
    method, _ = fresh(config)
    images = batch_for(config).views["global"].images[1]
    with torch.no_grad():
        encoded = densecl.encode(method.teacher, images)
        method.teacher.train()
        cells = method.teacher["backbone"](images).dense
        raw = method.teacher["dense_head"](cells)
    torch.testing.assert_close(encoded.p, F.normalize(raw.mean(1), dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded.d, F.normalize(raw, dim=2), rtol=1e-4, atol=1e-5)


def test_densecl_without_its_dense_loss_is_moco_on_the_global_head():
    dense_off = DenseCLConfig(**CONTRASTIVE, backbone=RESNET, dense_weight=0.5, dense_start_step=5)
    method, _ = fresh(dense_off)
    output = method(batch_for(dense_off), Step(0, 10, 2))
    assert torch.equal(output.loss.detach(), output.logs["global"])
    output.loss.backward()
    assert all(torch.all(p.grad == 0) for p in method.student["dense_head"].parameters())
    later = method(batch_for(dense_off), Step(5, 10, 2))
    want = 0.5 * later.logs["global"] + 0.5 * later.logs["dense"]
    torch.testing.assert_close(later.loss.detach(), want)
