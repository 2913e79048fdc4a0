"""The heads of the segmentation protocols: from maps of a backbone, finest first, to class scores.

Each takes the maps [B, C_i, h_i, w_i] and returns scores [B, classes, h, w] at the size of one of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DROPOUT = 0.1  # of whole channels before the classifier


class RevisitingFcn(nn.Sequential):
    """Two dilated 3 x 3 convolutions and a classifier without bias (Van Gansbeke et al. 2021).

    Reads the last map. Starts as torch makes it.
    """

    def __init__(self, channels: int, classes: int, dilation: int) -> None:
        super().__init__(
            *_convolution(channels, 256, 3, dilation),
            *_convolution(256, 256, 3, dilation),
            nn.Conv2d(256, classes, 1, bias=False),
        )

    def forward(self, input: Sequence[Tensor]) -> Tensor:
        """Return the scores at the size of the last map."""
        return super().forward(input[-1])


class FcnHead(nn.Module):
    """3 x 3 convolutions on one map, maybe the map itself beside them, and a classifier (FCN)."""

    def __init__(
        self, channels: int, classes: int, *, level: int, width: int, depth: int, concat: bool
    ) -> None:
        """Read the map `level` by `depth` convolutions of `width` channels.

        concat: the map stands beside what they make of it, and one more convolution reads both.
        """
        super().__init__()
        self.level = level
        before = [channels] + [width] * (depth - 1)
        self.convolutions = nn.Sequential(
            *(layer for c in before for layer in _convolution(c, width, 3))
        )
        self.joined = nn.Sequential(*_convolution(channels + width, width, 3)) if concat else None
        self.classifier = _classifier(width, classes)
        _initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the scores at the size of the map that is read."""
        x = self.convolutions(maps[self.level])
        if self.joined is not None:
            x = self.joined(torch.cat([maps[self.level], x], dim=1))
        return self.classifier(x)


class UperHead(nn.Module):
    """UperNet (Xiao et al. 2018, arXiv:1807.10221): pooled context on the last map, then an FPN."""

    def __init__(self, channels: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), *_convolution(channels[-1], width, 1))
            for side in (1, 2, 3, 6)
        )
        self.context = nn.Sequential(*_convolution(channels[-1] + 4 * width, width, 3))
        self.lateral = nn.ModuleList(
            nn.Sequential(*_convolution(c, width, 1)) for c in channels[:-1]
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(*_convolution(width, width, 3)) for _ in channels[:-1]
        )
        self.joined = nn.Sequential(*_convolution(len(channels) * width, width, 3))
        self.classifier = _classifier(width, classes)
        _initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the scores at the size of the first map."""
        last = maps[-1]
        pooled = [_resized(pool(last), last.shape[2:]) for pool in self.pools]
        x = self.context(torch.cat([last, *pooled], dim=1))
        merged = [x]  # coarsest first
        for lateral, finer in zip(reversed(self.lateral), reversed(maps[:-1])):
            x = lateral(finer) + _resized(x, finer.shape[2:])
            merged.append(x)
        size = maps[0].shape[2:]
        smoothed = [layer(x) for layer, x in zip(self.smooth, reversed(merged[1:]))]
        parts = [_resized(part, size) for part in (*smoothed, merged[0])]
        return self.classifier(self.joined(torch.cat(parts, dim=1)))


class FpnHead(nn.Module):
    """Semantic FPN (Kirillov et al. 2019, arXiv:1901.02446): every level to the first one's size, summed."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], classes: int) -> None:
        """256 channels in the pyramid, 128 after it; a level takes a convolution per halving."""
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, 256, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(256, 256, 3, padding=1) for _ in channels)
        self.towers = nn.ModuleList(_tower(stride // strides[0]) for stride in strides)
        self.classifier = _classifier(128, classes)
        _initialise(self)
        for layer in (*self.lateral, *self.smooth):
            assert isinstance(layer, nn.Conv2d)
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the scores at the size of the first map."""
        merged = [self.lateral[-1](maps[-1])]
        for lateral, finer in zip(reversed(self.lateral[:-1]), reversed(maps[:-1])):
            above = F.interpolate(merged[0], size=finer.shape[2:], mode="nearest")
            merged.insert(0, lateral(finer) + above)
        parts = [
            _resized(tower(smooth(x)), maps[0].shape[2:])
            for tower, smooth, x in zip(self.towers, self.smooth, merged, strict=True)
        ]
        return self.classifier(torch.stack(parts).sum(0))


class LinearHead(nn.Module):
    """One linear layer on the maps beside each other, which have one size."""

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(sum(channels), classes, 1)
        _initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the scores at the size of the maps."""
        return self.classifier(torch.cat(list(maps), dim=1))


class CellHead(nn.Module):
    """LayerNorm and one linear layer on the cells (SERE)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.classifier = nn.Conv2d(channels, classes, 1)
        nn.init.trunc_normal_(self.classifier.weight, std=2e-5)
        bias = self.classifier.bias
        assert bias is not None
        nn.init.zeros_(bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the scores at the size of the last map."""
        x = self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classifier(x)


def _convolution(
    channels: int, width: int, kernel: int, dilation: int = 1
) -> tuple[nn.Module, ...]:
    """Convolution that keeps the size, BatchNorm, ReLU."""
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(channels, width, kernel, padding=padding, dilation=dilation, bias=False)
    return convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)


def _classifier(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(_DROPOUT), nn.Conv2d(width, classes, 1))


def _tower(times: int) -> nn.Sequential:
    """From a map so many times coarser to the first one's size, doubling after every convolution."""
    doublings = times.bit_length() - 1
    layers: list[nn.Module] = []
    for number in range(max(doublings, 1)):
        layers += _convolution(256 if number == 0 else 128, 128, 3)
        if doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners not aligned."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _initialise(head: nn.Module) -> None:
    """Kaiming normal (fan out) before a ReLU; classifiers normal with deviation 0.01."""
    for layer in head.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if layer.bias is None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
