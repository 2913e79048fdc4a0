"""Backbones: shapes, names, BatchNorm groups, and the two-phase ViT against timm's own forward."""

import pytest
import torch
from torch import nn

from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.backbones.resnet import GroupedBatchNorm2d
from dense_ssl.config import UserError


def backbone(**options):
    return make_backbone(BackboneConfig(**options))


@pytest.mark.parametrize(("stride", "grid"), [(32, (2, 3)), (16, (4, 6)), (8, (8, 12))])
def test_resnet_grid_and_pooled_token(stride, grid):
    net = backbone(name="resnet18", output_stride=stride).eval()
    with torch.no_grad():
        features = net(torch.randn(2, 3, 64, 96))
    assert features.grid == grid
    assert features.dense.shape == (2, grid[0] * grid[1], 512)
    torch.testing.assert_close(features.cls[:, 0], features.dense.mean(1))


def test_resnet_cells_are_the_last_map_row_major():
    net = backbone(name="resnet18").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = net.trunk.forward_features(images.contiguous(memory_format=torch.channels_last))
        dense = net(images).dense
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(dense[0, row * 3 + column], maps[0, :, row, column])


def test_resnet50_has_the_published_size_and_initialisation():
    net = backbone(name="resnet50")
    assert sum(p.numel() for p in net.parameters()) == 23_508_032
    assert len(net.state_dict()) == 318
    conv = net.trunk.layer3[0].conv2.weight  # fan_in: 256 * 9
    assert conv.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    wide = backbone(name="resnet50", init="fan_out").trunk.layer3[0].conv1.weight  # 1024 -> 256
    assert wide.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.all(m.weight == 1) and torch.all(m.bias == 0) for m in norms)


def test_grouped_batch_norm_equals_one_batch_norm_per_group():
    grouped = GroupedBatchNorm2d(5)
    grouped.groups = 3
    x = torch.randn(12, 5, 4, 4, requires_grad=True)
    out = grouped(x)
    plain = [nn.BatchNorm2d(5) for _ in range(3)]
    y = x.detach().clone().requires_grad_()
    want = torch.cat([bn(part) for bn, part in zip(plain, y.chunk(3), strict=True)])
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grouped.running_var, sum(bn.running_var for bn in plain) / 3)
    assert grouped.num_batches_tracked == 1
    (out**3).sum().backward()
    (want**3).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    grouped.eval()
    torch.testing.assert_close(grouped(x), nn.functional.batch_norm(
        x, grouped.running_mean, grouped.running_var, grouped.weight, grouped.bias))  # fmt: skip


def test_bn_groups_keep_every_name_and_refuse_a_batch_they_do_not_divide():
    plain, grouped = backbone(name="resnet18"), backbone(name="resnet18", bn_groups=2)
    grouped.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="bn_groups=2 does not divide a batch of 3"):
        grouped(torch.randn(3, 3, 32, 32))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(name):
    plain, saving = backbone(name=name), backbone(name=name)
    saving.load_state_dict(plain.state_dict())
    saving.checkpoint_gradients()
    images = torch.randn(4, 3, 64, 64)
    for net in (plain, saving):
        net(images).cls.square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=key)
    for (key, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (224, 224)])
def test_vit_two_phases_equal_timm(size):
    net = backbone(name="vit_tiny_patch16_224").eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = net(images)
        want = net.trunk.forward_features(images)
    torch.testing.assert_close(torch.cat([features.cls, features.dense], 1), want)
    assert features.grid == (size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("positions", ["timm", "dino"])
def test_positions_are_resampled_by_a_product_where_all_must_be_deterministic(positions):
    """On CUDA the backward pass of an interpolation refuses to be; that of a product is."""
    vit = backbone(name="test_vit", init="dino", positions=positions, class_tokens=2)
    patches = torch.rand(2, 4, 4, vit.dim)

    def placed():
        vit.zero_grad()
        tokens = vit.place(patches)
        names, waiting = set(), [tokens.grad_fn]
        while waiting:
            node = waiting.pop()
            names.add(node.name())
            waiting += [parent for parent, _ in node.next_functions if parent is not None]
        tokens.square().sum().backward()
        return tokens.detach(), vit.trunk.pos_embed.grad.clone(), names

    wanted, gradient, names = placed()
    assert any("Upsample" in name for name in names)
    torch.use_deterministic_algorithms(True)
    try:
        got, own_gradient, own_names = placed()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any("Upsample" in name for name in own_names)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(own_gradient, gradient)


def test_vit_positions_as_dino_resamples_them():
    timm_, dino = (backbone(name="vit_tiny_patch16_224", positions=p) for p in ("timm", "dino"))
    dino.load_state_dict(timm_.state_dict())
    with torch.no_grad():
        native = torch.randn(1, 3, 224, 224)
        assert torch.equal(timm_(native).dense, dino(native).dense)
        patches = torch.zeros(1, 6, 9, 192)
        placed = dino.place(patches)
        assert not torch.allclose(placed, timm_.place(patches), atol=1e-3)
        square = dino.trunk.pos_embed[0, 1:].reshape(14, 14, 192).permute(2, 0, 1)[None]
        want = nn.functional.interpolate(square, scale_factor=(6.1 / 14, 9.1 / 14), mode="bicubic")
    torch.testing.assert_close(placed[0, 1:], want[0].flatten(1).T)
    torch.testing.assert_close(placed[:, :1], dino.trunk.cls_token + dino.trunk.pos_embed[:, :1])


def test_vit_phases_and_cells_before_the_norm():
    net = backbone(name="test_vit").eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        patches = net.embed(images)
        assert patches.shape == (2, 4, 6, 64)
        features = net.encode(patches)
        whole = net(images)
        assert torch.equal(features.dense, whole.dense)
        torch.testing.assert_close(net.trunk.norm(features.hidden), features.dense)
        other = net.encode(patches + 1)
    assert not torch.allclose(other.dense, whole.dense)


def test_vit_initialised_as_dino():
    torch.manual_seed(0)
    net = backbone(name="vit_tiny_patch16_224", init="dino")
    trunk = net.trunk
    for weight in (trunk.cls_token, trunk.pos_embed, *(b.mlp.fc1.weight for b in trunk.blocks)):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert all(torch.all(b.attn.qkv.bias == 0) for b in trunk.blocks)
    assert {m.eps for m in trunk.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_an_unknown_backbone_is_refused_with_names_that_exist():
    with pytest.raises(UserError, match="did you mean one of resnet50"):
        backbone(name="resnet50x")
    with pytest.raises(UserError, match="not supported; take a timm ResNet"):
        backbone(name="swin_tiny_patch4_window7_224")
    with pytest.raises(UserError, match="is a .*, not a plain ViT"):
        backbone(name="vit_small_patch16_dinov3")
    with pytest.raises(UserError, match="has no position table of class token and patches"):
        backbone(name="vit_medium_patch16_reg1_gap_256", positions="dino")
    with pytest.raises(UserError, match="dino is how ViTs start"):
        backbone(name="resnet18", init="dino")


@pytest.mark.parametrize("positions", ["timm", "dino"])
def test_two_class_tokens_have_positions_of_their_own_on_every_grid(positions):
    net = backbone(
        name="vit_tiny_patch16_224", init="dino", positions=positions, class_tokens=2
    ).eval()  # fmt: skip
    trunk = net.trunk
    assert trunk.pos_embed.shape == (1, 198, 192)
    assert trunk.reg_token.std().item() == pytest.approx(0.02, rel=0.2)
    with torch.no_grad():
        native = torch.randn(2, 3, 224, 224)
        features = net(native)
        want = trunk.forward_features(native)
        torch.testing.assert_close(torch.cat([features.cls, features.dense], 1), want)
        both = torch.cat([trunk.cls_token, trunk.reg_token], 1) + trunk.pos_embed[:, :2]
        torch.testing.assert_close(net.place(torch.zeros(1, 6, 6, 192))[:, :2], both)
        small = net(torch.randn(2, 3, 96, 64))
    assert small.cls.shape == (2, 2, 192) and small.dense.shape == (2, 24, 192)
    assert net.last_attention(torch.randn(1, 3, 64, 64)).shape == (1, 3, 2, 16)
