"""ResNets of timm as dense backbones: the last stage's map, cell by cell.

timm's names equal torchvision's (`conv1.weight`, `layer1.0.bn1.running_var`, ...), so official MoCo and
DenseCL weights fit without renaming.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dense_ssl.backbones.features import (
    Backbone,
    BackboneConfig,
    Features,
    create_trunk,
    initialise_convolutions,
    pooled,
    tokens_from_map,
)
from dense_ssl.config import UserError


class ResNetBackbone(Backbone):
    """A ResNet whose cells are the positions of its last map (stride 32: 7 x 7 at 224 px)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = create_trunk(config.name, output_stride=config.output_stride)
        self.dim = int(self.trunk.num_features)  # pyright: ignore[reportArgumentType]
        self.stride = config.output_stride
        self._checkpointed = False
        if config.init == "dino":
            raise UserError("method.backbone.init: dino is how ViTs start; a ResNet takes fan_in")
        if config.class_tokens > 1:
            raise UserError(
                "method.backbone.class_tokens: a ResNet has no class tokens; take a ViT"
            )
        if config.init != "timm":
            initialise_convolutions(self.trunk, config.init)
        if config.bn_groups > 1:
            _group_batch_norms(self.trunk, config.bn_groups)

    def forward(self, images: Tensor) -> Features:
        """Return the features of normalised float images [B, 3, H, W]."""
        x = images.contiguous(memory_format=torch.channels_last)
        if self._checkpointed and torch.is_grad_enabled():
            x = self._forward_stages(x)
        else:
            x = self.trunk.forward_features(x)  # pyright: ignore[reportCallIssue]
        dense = tokens_from_map(x)  # [B, N, D]
        return Features(cls=pooled(dense), dense=dense, grid=(x.shape[-2], x.shape[-1]))

    def compile_encoder(self) -> None:
        """Compile the trunk's `forward_features`."""
        self.trunk.forward_features = torch.compile(self.trunk.forward_features)  # pyright: ignore

    def checkpoint_gradients(self) -> None:
        """Keep one map per stage and recompute the rest; BatchNorm statistics are updated once."""
        self._checkpointed = True

    def _forward_stages(self, x: Tensor) -> Tensor:
        trunk = self.trunk
        x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x))))  # pyright: ignore
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            x = checkpoint(_once(stage), x, use_reentrant=False)  # pyright: ignore
        return x


def _once(stage: nn.Module):  # noqa: ANN202
    """Return `stage` as a function whose second run (the recomputation) leaves BatchNorm buffers alone.

    Without this a checkpointed BatchNorm would move its running statistics twice per step.
    """
    norms = [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)]
    runs = 0

    def run(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == 1 or not stage.training:
            return stage(x)
        momenta = [m.momentum for m in norms]
        counts = [m.num_batches_tracked.clone() for m in norms if m.num_batches_tracked is not None]
        for norm in norms:
            norm.momentum = 0.0
        try:
            return stage(x)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for norm, count in zip(norms, counts, strict=False):
                norm.num_batches_tracked.copy_(count)  # pyright: ignore

    return run


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose batch statistics are taken over groups of consecutive samples.

    One device with G groups of B samples then trains like G devices with B samples each (MoCo, sec. 3.3):
    without it a single-device run has nothing to shuffle, and batch statistics betray the positive.
    Running statistics move by the mean over groups.
    """

    groups: int = 1

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised map [B, C, H, W]; B must be a multiple of `groups` when training."""
        if not self.training or self.groups == 1:
            return super().forward(input)
        if input.shape[0] % self.groups:
            raise ValueError(f"bn_groups={self.groups} does not divide a batch of {input.shape[0]}")
        means, variances, outputs = [], [], []
        # A group of samples is one block of memory in either layout: slicing copies nothing.
        for x in input.chunk(self.groups):
            mean, var = self.running_mean.clone(), self.running_var.clone()  # pyright: ignore
            outputs.append(
                F.batch_norm(
                    x, mean, var, self.weight, self.bias, True, self.momentum or 0.0, self.eps
                )
            )
            means.append(mean)
            variances.append(var)
        with torch.no_grad():
            self.running_mean.copy_(torch.stack(means).mean(0))  # pyright: ignore
            self.running_var.copy_(torch.stack(variances).mean(0))  # pyright: ignore
            self.num_batches_tracked.add_(1)  # pyright: ignore[reportOptionalMemberAccess]
        return torch.cat(outputs)


def regroup(module: nn.Module, groups: int) -> None:
    """Take statistics over so many groups from now on, where they are taken over groups."""
    for layer in module.modules():
        if isinstance(layer, GroupedBatchNorm2d):
            layer.groups = groups


def _group_batch_norms(module: nn.Module, groups: int) -> None:
    """Replace every BatchNorm below `module`; names, weights and buffers stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if type(child) is not nn.BatchNorm2d:
                activation = (getattr(child, "drop", None), getattr(child, "act", None))
                assert all(a is None or isinstance(a, nn.Identity) for a in activation), child
            grouped = GroupedBatchNorm2d(child.num_features, child.eps, child.momentum or 0.1)
            grouped.load_state_dict(child.state_dict())
            grouped.groups = groups
            setattr(module, name, grouped)
        else:
            _group_batch_norms(child, groups)
