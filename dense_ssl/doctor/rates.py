"""How fast this machine is, measured: decoding, the disk, copies to the GPU, all-reduce between GPUs."""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dense_ssl.doctor.findings import Finding, Severity, attempt
from dense_ssl.doctor.software import encoded_image
from dense_ssl.loaders import share_of_cores
from dense_ssl.loaders.source import decode

DISK_BYTES = 256 * 2**20
SLOW_DISK = 100e6  # bytes a second; 1,000 images of 100 kB
COPY_BYTES = 256 * 2**20
SLOW_PCIE = 6e9  # bytes a second: less than 8 lanes of the third generation


def check_rates(folder: Path) -> list[Finding]:
    """Return a finding per rate; `folder` is where a run would write."""
    return [
        _decode(),
        attempt("disk", lambda: _disk(folder), Severity.WARNING, "the folder must be writable"),
        *_pcie(),
        *_all_reduce(),
    ]


def _decode(seconds: float = 0.5) -> Finding:
    """JPEGs of 500 x 375 px by Pillow, which lets threads run side by side."""
    image, cores = encoded_image(), share_of_cores()

    def work(_: int) -> int:
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            decode(image)
            done += 1
        return done

    with ThreadPoolExecutor(cores) as pool:
        rate = sum(pool.map(work, range(cores))) / seconds
    return Finding(
        "decoding", f"{rate:.0f} images/s of 500 x 375 px ({rate / cores:.0f} a core, Pillow)"
    )


def _disk(folder: Path) -> str:
    """Sequential reading of what was written and pushed out of memory."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=there) as file:
        start = time.perf_counter()
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = DISK_BYTES / (time.perf_counter() - start)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(block)):
            pass
        read = DISK_BYTES / (time.perf_counter() - start)
    return f"reads {read / 1e6:.0f} MB/s, writes {written / 1e6:.0f} MB/s at {there}"


def _pcie() -> list[Finding]:
    findings = []
    for device in range(torch.cuda.device_count()):
        host = torch.empty(COPY_BYTES, dtype=torch.uint8).pin_memory()
        target = torch.empty_like(host, device=f"cuda:{device}")
        rate = COPY_BYTES / _seconds(lambda h=host, t=target: t.copy_(h, non_blocking=True), device)
        value = f"{rate / 1e9:.1f} GB/s from pinned memory"
        if rate < SLOW_PCIE:
            remedy = "fewer lanes than usual: check the slot, risers and `nvidia-smi -q` (PCIe link width)"
            findings.append(Finding(f"pcie to gpu {device}", value, Severity.WARNING, remedy))
        else:
            findings.append(Finding(f"pcie to gpu {device}", value))
    return findings


def _seconds(copy: Callable[[], object], device: int, repeats: int = 5) -> float:
    """Return the seconds of the fastest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        copy()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _all_reduce() -> list[Finding]:
    count = torch.cuda.device_count()
    if count < 2:
        return []

    def measure() -> str:
        context = torch.multiprocessing.get_context("spawn")
        rates = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                _reduce_on, (count, f"file://{folder}/meet", rates), nprocs=count
            )
        return f"{rates.get() / 1e9:.1f} GB/s over {count} GPUs (algorithm bandwidth, 128 MiB)"

    remedy = "NCCL does not work here; try NCCL_P2P_DISABLE=1, and NCCL_DEBUG=INFO to see why"
    return [attempt("all-reduce", measure, Severity.BROKEN, remedy)]


def _reduce_on(rank: int, size: int, meet: str, rates: torch.multiprocessing.SimpleQueue) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=meet, rank=rank, world_size=size)
    x = torch.ones(32 * 2**20, device="cuda")
    seconds = _seconds(lambda: torch.distributed.all_reduce(x), rank)
    if rank == 0:
        rates.put(x.nbytes / seconds)
    torch.distributed.destroy_process_group()
