"""Region proposals (Ren et al. 2015) as detectron2 and mmdetection make them, on torchvision's network.

Beside torchvision's defaults: anchors are not rounded and lie at the strides of the levels, and everything
behind the two convolutions is in float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from dense_ssl.evaluation.detection.protocols import DetectConfig

_RATIOS = (0.5, 1.0, 2.0)  # height to width
_POSITIVE, _NEGATIVE = 0.7, 0.3  # overlap of an anchor with an object
_SAMPLED, _POSITIVE_SHARE = 256, 0.5
_OVERLAP = 0.7  # above it, the lower of two proposals is suppressed


class Anchors(AnchorGenerator):
    """Boxes around (x, y) of every cell, x = stride * column: as detectron2 and mmdetection have them."""

    def __init__(self, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...]) -> None:
        super().__init__(sizes, (_RATIOS,) * len(sizes))  # pyright: ignore[reportArgumentType]
        self.strides = strides

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (its base's)
    ) -> Tensor:
        """Return boxes [A, 4] around 0, ratio by ratio, with areas of scale^2."""
        side = torch.as_tensor(scales, dtype=dtype, device=device)
        stretch = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        width, height = (side / stretch[:, None]).flatten(), (side * stretch[:, None]).flatten()
        return torch.stack([-width, -height, width, height], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of all levels, float [N, 4], once per image."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        steps = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        levels = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], steps)
        return [torch.cat(levels)] * len(image_list.image_sizes)


class _Head(RPNHead):
    """The two convolutions, their answers in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, boxes = super().forward(x)
        return [a.float() for a in scores], [a.float() for a in boxes]


class Proposals(RegionProposalNetwork):
    """torchvision's, with a protocol's box loss."""

    def __init__(self, channels: int, strides: tuple[int, ...], config: DetectConfig) -> None:
        """Take one anchor size per level, or all of them on a single one."""
        sizes = tuple((size,) for size in config.anchors)
        if len(strides) == 1:
            sizes = (config.anchors,)
        assert len(sizes) == len(strides), (sizes, strides)
        anchors = Anchors(sizes, strides)
        super().__init__(
            anchors,
            _Head(channels, anchors.num_anchors_per_location()[0]),
            _POSITIVE,
            _NEGATIVE,
            _SAMPLED,
            _POSITIVE_SHARE,
            {"training": config.proposals[0], "testing": config.proposals[1]},
            {"training": config.kept[0], "testing": config.kept[1]},
            _OVERLAP,
        )
        self._beta = config.rpn_beta

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and boxes, both means over the sampled anchors."""
        positive, negative = (torch.cat(x).bool() for x in self.fg_bg_sampler(labels))
        sampled = positive | negative
        count = sampled.sum().clamp(min=1)
        said, truth = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        of_objects = F.binary_cross_entropy_with_logits(said, truth, reduction="sum")
        wanted = torch.cat(regression_targets)[positive]
        of_boxes = F.smooth_l1_loss(
            pred_bbox_deltas[positive], wanted, beta=self._beta, reduction="sum"
        )
        return of_objects / count, of_boxes / count
