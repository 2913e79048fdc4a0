"""All kernels: what the tests check, the bench measures and the ahead-of-time compilation covers."""

from kernels import queue_info_nce
from kernels.spec import KernelSpec

ALL: dict[str, KernelSpec] = {spec.name: spec for spec in (queue_info_nce.SPEC,)}
