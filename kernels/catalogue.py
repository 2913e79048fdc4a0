"""All kernels: what the tests check, the bench measures and the ahead-of-time compilation covers."""

from kernels import (
    dense_contrastive,
    dense_match,
    gaussian_blur,
    multicrop,
    multicrop_cross_entropy,
    neighbour_pull,
    photometric,
    prototype_cross_entropy,
    queue_info_nce,
    queue_neighbours,
    relation_cross_entropy,
    sinkhorn_bias,
    soft_cross_entropy,
)
from kernels.spec import KernelSpec

_MODULES = (
    queue_info_nce,
    dense_match,
    dense_contrastive,
    queue_neighbours,
    neighbour_pull,
    soft_cross_entropy,
    prototype_cross_entropy,
    multicrop_cross_entropy,
    sinkhorn_bias,
    relation_cross_entropy,
    photometric,
    gaussian_blur,
    multicrop,
)
ALL: dict[str, KernelSpec] = {module.SPEC.name: module.SPEC for module in _MODULES}
