"""DenseCL with de-coupling: our own extension, from the recipe of "Mind Your Augmentation" (ICLR 2024).

The paper adds de-coupling to several dense methods; only that of iBOT was published as code, and DenseCL's
numbers are not known. What is here carries the published parts over one by one (DenseCL: arXiv:2011.09157):

* Queries are cut by region masks (`rcc`) at the stride of the backbone, so that no cell straddles a seam; cut
  pixels are 0 after normalising. Keys see whole views.
* Extras (`decoupling`) are the last images of the key view, regions of each replaced by pixels of the first
  images of the query view. The positive of a cell they kept is the same cell of the image's own key;
  negatives are the dense queue's.
* Extras have neither a global loss nor a place in the queues, and a forward pass of their own: BatchNorm
  takes their statistics apart, and its running ones, which evaluation uses, do not see them.

    L = (1 - lambda) L_global + lambda (L_dense + w L_dc)

L_dc is the mean over all kept cells, as DenseCL's own dense loss is over all cells. Images that come again
have the colours of their key: other ones would need a twin of the view, as in `ibot_dc`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dense_ssl.backbones.features import grid_of
from dense_ssl.config import UserError
from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods.decoupling import (
    LARGEST_SHARE,
    SHARE,
    check_regions,
    foreign_regions,
    region_masks,
)
from dense_ssl.methods.densecl import (
    DenseContrastConfig,
    Encoded,
    Keys,
    dense_encoders,
    densecl_losses,
    encode,
    encode_keys,
    enqueue,
    lambda_at,
)
from dense_ssl.methods.masks import MaskConfig, draw_masks, on_device
from dense_ssl.methods.method import Method, MethodConfig, Output, ParamGroup, Step, ema_, one_group
from dense_ssl.methods.moco import info_nce
from dense_ssl.methods.parts import KeyQueue


class DenseCLDCConfig(DenseContrastConfig):
    """DenseCL's numbers, and those of de-coupling as published for iBOT."""

    name: Literal["densecl_dc"] = "densecl_dc"
    mask: MaskConfig = region_masks()
    dc_share: Annotated[float, Field(gt=0, le=LARGEST_SHARE)] = SHARE  # of the batch: extras
    dc_weight: Annotated[float, Field(ge=0)] = 0.3  # w

    @model_validator(mode="after")
    def _check_decoupling(self) -> "DenseCLDCConfig":
        check_regions(self.mask)
        return self


class DenseCLDC(Method):
    """DenseCL with de-coupling, on a ResNet's last map or a ViT's patch tokens."""

    Config: ClassVar[type[MethodConfig]] = DenseCLDCConfig
    exports: ClassVar[Literal["student", "teacher"]] = "student"

    def __init__(self, config: DenseCLDCConfig) -> None:
        super().__init__()
        self.config = config
        self.student, self.teacher = dense_encoders(config)
        self.queue = KeyQueue(config.queue_length, config.out_dim)
        self.dense_queue = KeyQueue(config.queue_length, config.out_dim)
        backbone: Any = self.student["backbone"]
        for view in config.views:
            if view.size % backbone.stride:
                raise UserError(
                    f"method.views: {view.name} is {view.size} px, no multiple of the {backbone.stride} px "
                    "of a cell, by which de-coupling cuts"
                )

    def forward(self, batch: MultiCropBatch, step: Step) -> Output:
        """Return DenseCL's loss, view 0 cut as queries and view 1 keys, and that of the extras."""
        cfg = self.config
        groups = cfg.backbone.bn_groups
        x_q, x_k = batch.views["global"].images  # each [B, 3, S, S]
        backbone: Any = self.student["backbone"]
        masks = draw_masks(cfg.mask, step, batch.index, 1, grid_of(x_q, backbone.stride))
        foreign = foreign_regions(masks, cfg.dc_share, multiple=groups)[0]  # [E, h, w]

        q = encode(self.student, with_cells_from(x_q, on_device(masks[0], x_q.device), 0.0))
        k = encode_keys(self.teacher, x_k, step, groups)
        losses = densecl_losses(q, k, self.queue.keys, self.dense_queue.keys, cfg.temperature)
        losses["dc"] = self._dc_loss(x_q, x_k, k, foreign) if len(foreign) else x_q.new_zeros(())
        weight = lambda_at(step.index, cfg.dense_weight, cfg.dense_start_step)
        dense = losses["dense"] + cfg.dc_weight * losses["dc"]
        loss = (1 - weight) * losses["global"] + weight * dense
        logs = {name: value.detach() for name, value in losses.items()}
        return Output(loss, logs, carry=Keys(k.g, k.p))

    def after_step(self, carries: Sequence[Keys], step: Step) -> None:
        """Move the key encoder and enqueue one global and one pooled dense key per image."""
        ema_(self.teacher, self.student, self.config.momentum.at(step))
        enqueue(self.queue, self.dense_queue, carries)

    def param_groups(self) -> list[ParamGroup]:
        """Return one group, as DenseCL does."""
        return one_group(self)

    def _dc_loss(self, x_q: Tensor, x_k: Tensor, k: Encoded, foreign: np.ndarray) -> Tensor:
        """Return the mean over kept cells of E extras, each against its own key; foreign [E, h, w]."""
        extras = len(foreign)
        others = x_q[:extras].flip(0)
        mixed = with_cells_from(x_k[-extras:], on_device(foreign, x_k.device), others)
        with kept_running_statistics(self.student):
            d = encode(self.student, mixed).d  # [E, N, D]
        kept = on_device(np.flatnonzero(~foreign), x_k.device)
        mine, keys = (x.flatten(0, 1).index_select(0, kept) for x in (d, k.d[-extras:]))
        return info_nce(mine, keys, self.dense_queue.keys, self.config.temperature)


def with_cells_from(images: Tensor, cells: Tensor, other: Tensor | float) -> Tensor:
    """Return images [B, 3, S, S] with the pixels of `cells`, bool [B, h, w], from `other`."""
    rows, columns = (size // count for size, count in zip(images.shape[2:], cells.shape[1:]))
    pixels = cells.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)
    return torch.where(pixels[:, None], other, images)


@contextmanager
def kept_running_statistics(network: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the statistics of the batch, without moving its running ones."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
