"""What the machine has: cores, memory, GPUs and their driver, limits, free space."""

import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path

import torch

from dense_ssl.doctor.findings import Finding, Severity
from dense_ssl.loaders import share_of_cores

GB = 1e9
FREE_GB = 20  # a run keeps a few checkpoints, which hold optimiser and teacher as well
OPEN_FILES = 4096
SHARED_GB = 1.0  # loaders hand batches over in shared memory


def check_machine(folder: Path) -> list[Finding]:
    """Return what is there; `folder` is where a run would write."""
    return [
        Finding("cpu", f"{_cpu_name()}, {share_of_cores()} cores"),
        _memory(),
        *_gpus(),
        _space("free space", folder, FREE_GB, "free some, or set RUN to another disk"),
        _space(
            "/dev/shm", Path("/dev/shm"), SHARED_GB, "in a container: --shm-size=8g or --ipc=host"
        ),
        _open_files(),
        _threads(),
    ]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    if text.isdigit():
        total = min(total, int(text))
    return Finding("memory", f"{total / GB:.0f} GB")


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return []
    driver = _nvidia_smi("driver_version")
    power = _nvidia_smi("power.limit")
    findings = []
    for device in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        value = (
            f"{about.name}, {total / GB:.0f} GB, sm_{about.major}{about.minor}, "
            f"driver {driver[device] if device < len(driver) else '?'}"
        )
        if device < len(power):
            value += f", limited to {power[device]} W"
        if free < 0.9 * total:
            findings.append(Finding(
                f"gpu {device}", f"{value}, {(total - free) / GB:.1f} GB in use", Severity.WARNING,
                "another process is on this GPU; nvidia-smi names it",
            ))  # fmt: skip
        elif about.major < 8:
            findings.append(Finding(
                f"gpu {device}", value, Severity.WARNING,
                "no bfloat16 in hardware: train.precision=fp16, run.kernels=torch",
            ))  # fmt: skip
        else:
            findings.append(Finding(f"gpu {device}", value))
    return findings


def _nvidia_smi(key: str) -> list[str]:
    """Return a value per GPU, nothing where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={key}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines()]


def _space(name: str, folder: Path, least_gb: float, remedy: str) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free / GB
    value = f"{free:.1f} GB at {there}"
    if free < least_gb:
        return Finding(name, value, Severity.WARNING, f"below {least_gb:g} GB: {remedy}")
    return Finding(name, value)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        remedy = f"`ulimit -n {OPEN_FILES}` before training (at most {hard} here)"
        return Finding("open files", str(soft), Severity.WARNING, remedy)
    return Finding("open files", str(soft))


def _threads() -> Finding:
    load, cores = os.getloadavg()[0], share_of_cores()
    value = f"load {load:.1f} of {cores} cores"
    if load > cores:
        remedy = "other work takes the cores: what is measured below is what it leaves"
    elif load > 0.5 * cores:
        remedy = "other work runs here"
    else:
        return Finding("busy", value)
    if "OMP_NUM_THREADS" not in os.environ:
        remedy += "; on a shared machine OMP_NUM_THREADS=1 is faster than waiting threads"
    return Finding("busy", value, Severity.WARNING, remedy)
