"""Kernels compiled for GPUs that are not there, and what each of them takes from one.

    with compile_only(86) as launches:
        spec.call(**arguments_on_the_meta_device)

runs the ordinary launchers. Triton compiles each launch with the specialisation it would really have
(alignment, divisibility, which decide how wide loads are), but nothing is launched. Works with neither a
GPU nor a driver: the triton wheel brings ptxas and cuobjdump.

Not together with TRITON_INTERPRET=1 in one process.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime import driver as drivers

from kernels import launch
from kernels.language import INTERPRETED

# Largest shared memory of a block, bytes, and largest number of resident warps of a multiprocessor.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
WARPS = {80: 64, 86: 48, 89: 48, 90: 64}
SHARED_PER_SM = {80: 167936, 86: 102400, 89: 102400, 90: 233472}
REGISTERS_PER_SM = 65536
MAX_STACK = 32  # bytes of spills that come and go between versions of the compiler


@dataclass(frozen=True)
class Resources:
    """What one compiled launch takes."""

    kernel: str
    sm: int
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers
    shared: int  # bytes per block
    warps: int  # per block
    tensor_cores: int  # matrix instructions
    wide_loads: int  # 16-byte loads, to registers or to shared memory
    dots: bool  # whether the source multiplies matrices

    @property
    def resident_warps(self) -> int:
        """Warps of this kernel that one multiprocessor holds at a time."""
        per_block = self.warps * 32 * max(-(-self.registers // 8) * 8, 1)
        blocks = min(
            REGISTERS_PER_SM // per_block,
            SHARED_PER_SM[self.sm] // (self.shared + 1024),
            WARPS[self.sm] // self.warps,
        )
        return blocks * self.warps

    def complaints(self, wide: bool) -> list[str]:
        """Return what keeps the launch from running well on its card, nothing if it is fine.

        Args:
            wide: whether 16-byte loads are to be expected.
        """
        said: list[str] = []
        if self.shared > SHARED[self.sm]:
            said.append(f"{self.shared} bytes of shared memory, {SHARED[self.sm]} are there")
        if self.stack > MAX_STACK:
            said.append(f"{self.stack} bytes of registers spilled")
        if self.resident_warps < 8:
            said.append(f"only {self.resident_warps} warps resident on a multiprocessor")
        if self.dots and not self.tensor_cores:
            said.append("no tensor core instruction")
        if wide and not self.wide_loads:
            said.append("no 16-byte load")
        return said


class _Offline:
    """The five methods of a driver that a launch touches, for a card that is not there."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return -self.sm  # the key of the per-device cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Any]:
        raise RuntimeError("kernels are not tuned at run time")


@contextlib.contextmanager
def compile_only(sm: int) -> Generator[list[Resources]]:
    """Compile every launch within the block for compute capability `sm` (86: 8.6), launch none.

    Raises:
        RuntimeError: the interpreter is on.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: compiling needs a process without it")
    launches: list[Resources] = []
    active, run = drivers._active, JITFunction.run

    def offline(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        found = _resources(self, compiled, sm)
        if found not in launches:
            launches.append(found)
        return compiled

    drivers.set_active(_Offline(sm))  # pyright: ignore[reportArgumentType]
    JITFunction.run = offline
    try:
        with launch.chosen("triton"):
            yield launches
    finally:
        JITFunction.run = run
        drivers._active = active


def _resources(kernel: Any, compiled: Any, sm: int) -> Resources:
    usage = _cuobjdump(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    dots = kernel.src.count("dot(") > 0
    return Resources(
        kernel=kernel.fn.__name__,
        sm=sm,
        registers=int(_found(r"REG:(\d+)", usage)),
        stack=int(_found(r"STACK:(\d+)", usage)),
        shared=int(compiled.metadata.shared),
        warps=int(compiled.metadata.num_warps),
        tensor_cores=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)),
        wide_loads=len(
            re.findall(r"\bld\.global\S*\.v(?:4\.b32|2\.b64)|, 0x10, 0x10;|, 0x10, %r\d+;", ptx)
        ),
        dots=dots,
    )


def _cuobjdump(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = knobs.nvidia.cuobjdump.path
        done = subprocess.run(
            [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        )
    return done.stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in the output of cuobjdump: {text}"
    return match[1]
