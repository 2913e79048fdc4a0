"""Networks and numbers of the trained segmentation protocols, against what is published of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.config import UserError, validate
from dense_ssl.evaluation.segmentation.heads import FcnHead, FpnHead, RevisitingFcn, UperHead
from dense_ssl.evaluation.segmentation.model import build, parameter_groups, segmentation_loss
from dense_ssl.evaluation.segmentation.protocols import (
    CONFIGS,
    FcnConfig,
    FinetuneConfig,
    FpnConfig,
    FrozenConfig,
    UperNetConfig,
)
from dense_ssl.evaluation.segmentation.trunks import ResNetStages, ViTLevels, tap_blocks
from dense_ssl.evaluation.trained.settings import learning_rate


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def backbone(name: str, **options):
    return make_backbone(BackboneConfig(name=name, **options)).eval()


# --- networks


def test_revisiting_has_the_published_number_of_parameters():
    with torch.device("meta"):
        head = RevisitingFcn(2048, 21, 6)
    assert count(head) == 5_314_816  # Van Gansbeke et al. 2021
    trunk = backbone("resnet50")
    assert count(trunk) + count(head) == 28_822_848
    stages = ResNetStages(trunk, (2, 1), (1, 2), contracted=False)
    assert stages.channels == (256, 512, 1024, 2048) and stages.strides == (4, 8, 16, 16)
    with torch.no_grad():
        shapes = [tuple(x.shape[2:]) for x in stages(torch.zeros(1, 3, 64, 64))]
    assert shapes == [(16, 16), (8, 8), (4, 4), (4, 4)]
    dilations = [block.conv2.dilation[0] for block in stages.backbone.trunk.layer4]
    assert dilations == [2, 2, 2]  # the first block too
    assert [block.conv2.dilation[0] for block in trunk.trunk.layer4] == [1, 1, 1]  # left as it was


def test_contracted_dilation_reads_no_wider_than_published():
    """The receptive field of a stage, by the gradient of one cell, with all weights positive."""
    small = backbone("resnet18")

    def reach(stages, number):
        trunk = stages.eval().backbone.trunk
        layer = (trunk.layer3, trunk.layer4)[number]
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 0.01)
        channels = layer[0].conv1.in_channels
        x = torch.ones(1, channels, 37, 37, requires_grad=True)
        layer(x)[0, 0, 18, 18].backward()
        assert x.grad is not None
        seen = x.grad.sum((0, 1)).nonzero()
        return int(seen[:, 0].max() - seen[:, 0].min()) + 1

    contracted = ResNetStages(small, (1, 1), (2, 4), contracted=True)
    whole = ResNetStages(small, (1, 1), (2, 4), contracted=False)
    # Two blocks of two 3 x 3 convolutions: 1 + 2 * sum of dilations.
    assert reach(contracted, 0) == 1 + 2 * (1 + 1 + 2 + 2)
    assert reach(contracted, 1) == 1 + 2 * (2 + 2 + 4 + 4)
    assert reach(whole, 1) == 1 + 2 * (4 + 4 + 4 + 4)


def test_stride_8_equals_timms_own_dilation():
    """Contracted dilation is what timm does: an independent statement of the same network."""
    plain, fine = backbone("resnet26"), backbone("resnet26", output_stride=8)
    fine.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        expected = fine.trunk.forward_features(images)
        for given in (plain, fine):  # whatever stride it was trained with
            found = ResNetStages(given, (1, 1), (2, 4), contracted=True).eval()(images)[-1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_fcn_d8_reads_stages_three_and_four():
    with torch.device("meta"):
        head = FcnHead(2048, 21, level=3, width=512, depth=2, concat=True)
        auxiliary = FcnHead(1024, 21, level=2, width=256, depth=1, concat=False)
    norm = 2 * 512
    expected = 9 * 512 * (2048 + 512 + 2048 + 512) + 3 * norm + 512 * 21 + 21
    assert count(head) == expected
    assert count(auxiliary) == 9 * 1024 * 256 + 2 * 256 + 256 * 21 + 21
    model = build(backbone("resnet18"), 5, FcnConfig(size=32))
    scores, aux = model.train()(torch.zeros(2, 3, 32, 32))
    assert scores.shape == (2, 5, 4, 4) == aux.shape
    assert model.eval()(torch.zeros(2, 3, 32, 32))[1] is None


def test_levels_of_a_vit_are_its_blocks():
    vit = backbone("test_vit")  # 6 blocks
    images = torch.randn(2, 3, 64, 96)
    trunk = vit.trunk
    levels = ViTLevels(
        vit, (64, 96), evenly=True, normed=True, class_tokens=True, drop_path=0.0
    ).eval()
    assert tap_blocks(12, evenly=False) == (3, 5, 7, 11) and levels.blocks == (1, 2, 3, 5)
    assert tap_blocks(12, evenly=True) == (2, 5, 8, 11)
    assert tap_blocks(24, evenly=False) == (7, 11, 15, 23)
    own = levels.backbone.trunk
    seen = []
    for block in own.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        maps = levels(images)
        expected = [trunk.norm(seen[i])[:, levels.backbone.prefix :] for i in levels.blocks]
    for found, cells in zip(maps, expected):
        assert found.shape == (2, 64, 4, 6)
        assert torch.equal(found.flatten(2).transpose(1, 2), cells)
    assert own.pos_embed.shape[1] == trunk.num_prefix_tokens + 24  # resampled once
    with pytest.raises(UserError, match="3 blocks; four levels"):
        tap_blocks(3, evenly=True)


def test_a_vit_without_class_tokens_does_not_see_them():
    vit = backbone("test_vit")
    options = {"evenly": True, "normed": False, "drop_path": 0.0}
    with torch.no_grad():
        with_token = ViTLevels(vit, (64, 64), class_tokens=True, **options).eval()
        without = ViTLevels(vit, (64, 64), class_tokens=False, **options).eval()
        images = torch.randn(1, 3, 64, 64)
        before = without(images)[-1], with_token(images)[-1]
        for levels in (without, with_token):
            levels.backbone.trunk.cls_token.normal_(generator=torch.Generator().manual_seed(1))
        assert torch.equal(without(images)[-1], before[0])
        assert not torch.allclose(with_token(images)[-1], before[1])


@pytest.mark.parametrize(
    ("config", "name", "size"),
    [
        (UperNetConfig(size=64), "test_vit", (16, 16)),
        (UperNetConfig(size=64), "test_resnet", (16, 16)),
        (FpnConfig(size=64), "test_vit", (4, 4)),
        (FpnConfig(size=64, settings="ade20k-pyramid"), "test_vit", (16, 16)),
        (FrozenConfig(size=64), "test_vit", (4, 4)),
        (FinetuneConfig(size=64), "test_vit", (4, 4)),
    ],
)
def test_every_trained_weight_of_a_network_has_a_gradient(config, name, size):
    """A weight without one would stop DistributedDataParallel; a frozen trunk has none at all."""
    model = build(backbone(name), 7, config).train()
    before = {name: x.clone() for name, x in model.trunk.state_dict().items()}
    scores = model(torch.randn(2, 3, 64, 64))
    assert scores[0].shape == (2, 7, *size)
    segmentation_loss(scores, torch.randint(-1, 7, (2, 64, 64)), config).backward()
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    assert [name for name in trained if model.get_parameter(name).grad is None] == []
    grouped = sum(len(group["params"]) for group in parameter_groups(model, config))
    assert grouped == len(trained)
    frozen = not any(name.startswith("trunk.") for name in trained)
    assert frozen == isinstance(config, FrozenConfig)
    if frozen:
        assert all(torch.equal(x, before[name]) for name, x in model.trunk.state_dict().items())


def test_heads_use_every_level():
    channels, strides = (8, 8, 8, 8), (4, 8, 16, 32)
    maps = [torch.randn(2, 8, 64 // s, 64 // s, requires_grad=True) for s in strides]
    for head in (UperHead(channels, 3, 8), FpnHead(channels, strides, 3)):
        scores = head(maps)
        assert scores.shape == (2, 3, 16, 16)
        gradients = torch.autograd.grad(scores.square().sum(), maps)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert [len(tower) for tower in FpnHead(channels, strides, 3).towers] == [3, 4, 8, 12]


def test_protocols_refuse_other_backbones():
    with pytest.raises(UserError, match="test_vit is no ResNet"):
        build(backbone("test_vit"), 3, FcnConfig(size=64))
    with pytest.raises(UserError, match="pools between its stages"):
        build(backbone("test_resnet"), 3, FcnConfig(size=64))
    with pytest.raises(UserError, match="resnet18: no ViT"):
        build(backbone("resnet18"), 3, FrozenConfig(size=64))
    with pytest.raises(UserError, match="size: 72 is not a multiple of the stride 16"):
        build(backbone("test_vit"), 3, UperNetConfig(size=72))


# --- the loss


@pytest.mark.parametrize("over", ["labelled", "all"])
def test_loss_equals_a_loop_over_pixels(over):
    config = FcnConfig(loss_over=over, aux_weight=0.4)
    scores, aux = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)
    labels = torch.randint(-1, 3, (2, 8, 8))
    total = 0.0
    for maps, weight in ((scores, 1.0), (aux, 0.4)):
        full = F.interpolate(maps.double(), size=(8, 8), mode="bilinear").log_softmax(1)
        for b, y, x in (labels != -1).nonzero().tolist():
            total -= weight * full[b, labels[b, y, x], y, x].item()
    divisor = (labels != -1).sum().item() if over == "labelled" else labels.numel()
    found = segmentation_loss((scores, aux), labels, config).item()
    assert found == pytest.approx(total / divisor, rel=1e-5)
    void = segmentation_loss((scores, None), torch.full_like(labels, -1), config)
    assert void.item() == 0


def test_loss_of_imagenet_s_is_taken_at_an_eighth():
    config = FinetuneConfig(size=32)
    scores, labels = torch.randn(2, 5, 2, 2), torch.randint(-1, 5, (2, 32, 32))
    full = F.interpolate(scores, scale_factor=2, mode="bilinear")  # 14 to 28 at the full size
    expected = F.cross_entropy(full, labels[:, ::8, ::8], ignore_index=-1)
    assert segmentation_loss((scores, None), labels, config).item() == pytest.approx(
        expected.item()
    )


# --- the numbers


def test_learning_rates_are_the_published_ones():
    revisiting = FcnConfig(settings="voc-revisiting")
    rates = [learning_rate(revisiting, epoch * 7 + 3, 7) for epoch in range(45)]
    assert rates == pytest.approx([3e-3] * 31 + [3e-4] * 10 + [3e-5] * 4)
    cityscapes = FcnConfig(settings="cityscapes-revisiting")
    for epoch in (0, 1, 75, 149):
        expected = 1e-4 * (1 - epoch / 150) ** 0.9
        assert learning_rate(cityscapes, epoch * 5 + 4, 5) == pytest.approx(expected)
    densecl = FcnConfig()
    for step in (0, 5, 10_000, 19_999):
        expected = (0.01 - 1e-4) * (1 - step / 20_000) ** 0.9 + 1e-4
        assert learning_rate(densecl, step, 661) == pytest.approx(expected)
    upernet = UperNetConfig()
    for step in (0, 750, 1499, 1500, 80_000):
        warm = 1 - (1 - step / 1500) * (1 - 1e-6) if step < 1500 else 1.0
        assert learning_rate(upernet, step, 1) == pytest.approx(3e-5 * (1 - step / 160_000) * warm)
    finetune = FinetuneConfig(batch_size=512)
    assert learning_rate(finetune, 25, 10) == pytest.approx(
        5e-4
    )  # half of 50 steps, twice the rate
    assert learning_rate(finetune, 525, 10) == pytest.approx((1e-3 + 1e-6) / 2)


def test_shorter_runs_have_the_same_shape():
    long, short = UperNetConfig(), UperNetConfig(steps=1600)
    for step in (0, 7, 20, 1000, 1599):
        assert learning_rate(short, step, 9) == pytest.approx(learning_rate(long, 100 * step, 9))


def test_names_say_whether_numbers_are_the_published_ones():
    for config in CONFIGS:
        for name, published in config.published.items():
            found = config(settings=name)
            assert found.protocol(published.layout) == f"{config.task}/{name}/v1"
            assert found.protocol("camvid").endswith("/v1*")
    free = FcnConfig(settings="voc-revisiting", seed=3, precision="bf16", fill="background")
    assert free.protocol("voc") == "segment-fcn/voc-revisiting/v1"
    for changed in ({"steps": 20}, {"lr": 0.1}, {"size": 256}, {"batch_size": 8}, {"max_val": 3}):
        assert FcnConfig(**changed).protocol("voc") == "segment-fcn/voc-densecl/v1*"


def test_the_augmented_test_has_a_name():
    named = {
        "ade20k-small": {}, "ade20k-small/v1+ms+flip": {"test_scales": "ms", "test_flip": True},
        "v1+flip": {"test_flip": "true"}, "v1*": {"test_scales": "0.5,1"},
    }  # fmt: skip
    for text, settings in named.items():
        assert text in UperNetConfig(**settings).protocol("ade20k")
    assert UperNetConfig(test_scales=(1.0,)).protocol("ade20k") == "segment-upernet/ade20k-small/v1"
    with pytest.raises(ValueError, match="greater than 0"):
        UperNetConfig(test_scales=(0.0, 1.0))


def test_sizes_move_together():
    config = FcnConfig(settings="cityscapes-densecl", size="192,256")
    factor = 192 / 769
    assert config.size == (192, 256) and config.window_stride == round(513 * factor)
    assert config.scale == (round(2049 * factor), round(1025 * factor))
    assert FcnConfig(size=256, scale=(640, 360)).scale == (640, 360)  # what is given stays


def test_layer_decay_and_what_is_not_decayed():
    config = UperNetConfig(size=64, layer_decay=0.5)
    model = build(backbone("test_vit"), 3, config)
    groups = parameter_groups(model, config)
    where = {id(p): group for group in groups for p in group["params"]}

    def of(name):
        group = where[id(model.get_parameter(name))]
        return group["lr_scale"], group["weight_decay"]

    trunk = "trunk.levels.backbone.trunk."
    # Published: what is not decayed is named without the backbone's prefix, so positions and tokens are.
    assert of(trunk + "pos_embed") == (0.5**7, 0.05) and of(trunk + "cls_token") == (0.5**7, 0.05)
    assert of(trunk + "patch_embed.proj.weight") == (0.5**7, 0.05)
    assert of(trunk + "blocks.0.attn.qkv.weight") == (0.5**6, 0.05)
    assert of(trunk + "blocks.5.mlp.fc2.bias") == (0.5, 0.0)
    assert of(trunk + "norm.weight") == (1.0, 0.0)
    assert of("trunk.finer.weight") == of("head.classifier.1.weight") == (1.0, 0.05)
    norms = FpnConfig(size=64)
    model = build(backbone("test_vit"), 3, norms)
    where = {id(p): group for group in parameter_groups(model, norms) for p in group["params"]}
    assert of("trunk.backbone.trunk.blocks.0.norm1.bias") == (1.0, 0.0)
    assert of("trunk.backbone.trunk.blocks.0.mlp.fc1.bias") == (1.0, 0.01)


def test_mistakes_are_named():
    for given, message in (
        ({"settings": "voc"}, "settings: there are voc-densecl, cityscapes-densecl"),
        ({"steps": 5, "epochs": 1}, "give steps or epochs"),
        ({"batch_size": 3, "accumulate": 2}, "multiple of accumulate"),
        ({"batchsize": 3}, r"batchsize: unknown key; did you mean batch_size\?"),
        ({"size": "a"}, "size"),
        ({"test": "slide"}, "window_stride: test=slide needs it"),
    ):
        with pytest.raises(UserError, match=message):
            validate(FcnConfig, given, "segment-fcn")
