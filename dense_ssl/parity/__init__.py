"""The published functions under their agreed names and in their axis order, for checks from outside.

Each is a thin view of the function that training or evaluation really uses; `docs/methods.md` lists
them. Axis order and layouts are the official codes'.
"""

from dense_ssl.distributed import shuffle_indices, unshuffle_indices
from dense_ssl.evaluation.knn import knn_classify
from dense_ssl.evaluation.voc import (
    average_precision,
    specified_pool,
    svm_cost_grid,
    voc_ap_11point,
)
from dense_ssl.layouts import extract_backbone, to_detectron2, to_detectron2_name
from dense_ssl.methods.densecl import lambda_at
from dense_ssl.methods.masks import block_mask, draw_ratio, random_mask
from dense_ssl.methods.rcc import rcc_boxes
from dense_ssl.parity.contrastive import (
    dense_info_nce,
    dense_match,
    densecl_losses,
    densecl_neck,
    enqueue,
    global_info_nce,
    moco_logits,
)
from dense_ssl.parity.decoupling import (
    build_dc,
    dc_loss,
    mix_tokens,
    photometric_dc,
    rcc_mask,
    sample_masks,
)
from dense_ssl.parity.distillation import (
    dino_loss,
    ibot_head,
    ibot_loss,
    interpolate_pos,
    update_center,
    vit_forward,
)
from dense_ssl.parity.propagation import label_propagate, propagate_labels
from dense_ssl.parity.revisiting import autoaugment_subpolicy
from dense_ssl.parity.sere import (
    align_overlap,
    align_relation,
    channel_head_forward,
    channel_self_relation,
    overlap_grid,
    relation_features,
    relation_head,
    relation_loss,
    sere_channel_loss,
    sere_param_groups,
    sere_spatial_loss,
    sere_total,
    spatial_head_forward,
    spatial_self_relation,
)
from dense_ssl.parity.training import (
    cancel_last_layer,
    clip_per_tensor,
    cosine_schedule,
    ema_update,
    param_groups,
    teacher_temps,
)
from dense_ssl.parity.udi import (
    create_map,
    crop_coord,
    crop_params,
    crop_params_ref,
    flip_coord,
    masked_ce,
    reference_box,
    srs,
    srs_mask,
    srs_module,
    udi_loss,
    udi_target,
    update_centre,
)
from dense_ssl.schedule import cosine_lr

__all__ = [
    "align_overlap",
    "align_relation",
    "autoaugment_subpolicy",
    "average_precision",
    "block_mask",
    "build_dc",
    "cancel_last_layer",
    "channel_head_forward",
    "channel_self_relation",
    "clip_per_tensor",
    "cosine_lr",
    "cosine_schedule",
    "create_map",
    "crop_coord",
    "crop_params",
    "crop_params_ref",
    "dc_loss",
    "dense_info_nce",
    "dense_match",
    "densecl_losses",
    "densecl_neck",
    "dino_loss",
    "draw_ratio",
    "ema_update",
    "enqueue",
    "extract_backbone",
    "flip_coord",
    "global_info_nce",
    "ibot_head",
    "ibot_loss",
    "interpolate_pos",
    "knn_classify",
    "label_propagate",
    "lambda_at",
    "masked_ce",
    "mix_tokens",
    "moco_logits",
    "overlap_grid",
    "param_groups",
    "photometric_dc",
    "propagate_labels",
    "random_mask",
    "rcc_boxes",
    "rcc_mask",
    "reference_box",
    "relation_features",
    "relation_head",
    "relation_loss",
    "sample_masks",
    "sere_channel_loss",
    "sere_param_groups",
    "sere_spatial_loss",
    "sere_total",
    "shuffle_indices",
    "spatial_head_forward",
    "spatial_self_relation",
    "specified_pool",
    "srs",
    "srs_mask",
    "srs_module",
    "svm_cost_grid",
    "teacher_temps",
    "to_detectron2",
    "to_detectron2_name",
    "udi_loss",
    "udi_target",
    "unshuffle_indices",
    "update_center",
    "update_centre",
    "vit_forward",
    "voc_ap_11point",
]
