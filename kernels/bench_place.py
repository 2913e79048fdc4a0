"""Where the bench runs: the device, its driver and versions, and what it can do at best."""

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "kornia", "torchvision")
COPY_BYTES = 2**30
MATRIX = 8192


@dataclass(frozen=True)
class Card:
    """What a card can do at best."""

    name: str
    sm: int  # compute capability, 86: 8.6
    gigabytes_per_s: float
    teraflops: float  # bf16 matrix products accumulated in float32

    def milliseconds(self, moved: float, flops: float) -> float:
        """Return the time that neither the memory nor the tensor cores can beat."""
        return max(moved / self.gigabytes_per_s / 1e6, flops / self.teraflops / 1e9)


# As their makers give them.
CARDS = (Card("RTX 3090", 86, 936, 71), Card("H200", 90, 4300, 790))


@dataclass(frozen=True)
class Place:
    """One machine at one time."""

    device: str  # cuda or cpu
    name: str  # of the GPU, or of the processor
    driver: str  # and clocks; of a CPU, how many threads torch uses
    versions: str
    commit: str
    time: str  # UTC
    card: Card | None  # measured on this GPU, this time

    @property
    def heading(self) -> str:
        """Two lines that belong above every table."""
        lines = [
            f"{self.name}, {self.driver}; {self.versions}; commit {self.commit}; {self.time} UTC"
        ]
        if self.card:
            lines.append(
                f"measured ceilings: copies at {self.card.gigabytes_per_s:.0f} GB/s, "
                f"bf16 products of {MATRIX} x {MATRIX} at {self.card.teraflops:.0f} TFLOP/s"
            )
        else:
            lines.append(
                "no CUDA device: no GPU time was measured; below is one thread of the CPU on reduced "
                "shapes, where ours is what stands in for the kernel"
            )
        return "\n".join(lines)

    @property
    def section(self) -> str:
        """The name of this kind of device in RESULTS.md."""
        if self.card is None:
            return "CPU"
        return next((card.name for card in CARDS if card.name.split()[-1] in self.name), self.name)


def here() -> Place:
    """Return this machine, with the ceilings of its GPU if it has one."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        card, driver = _measured_card(name), _driver()
        return Place("cuda", name, driver, _versions(), _commit(), now, card)
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return Place("cpu", _processor(), threads, _versions(), _commit(), now, None)


def _measured_card(name: str) -> Card:
    from triton.testing import do_bench

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = float(do_bench(lambda: target.copy_(source), return_mode="median"))  # pyright: ignore
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matrix_ms = float(do_bench(lambda: a @ b, return_mode="median"))  # pyright: ignore
    major, minor = torch.cuda.get_device_capability()
    return Card(
        name, 10 * major + minor, 2 * COPY_BYTES / copy_ms / 1e6, 2 * MATRIX**3 / matrix_ms / 1e9
    )


def _driver() -> str:
    """Return driver, highest clocks and power limit as nvidia-smi says them."""
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    index = str(torch.cuda.current_device())
    command = ["nvidia-smi", query, "--format=csv,noheader", "-i", index]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "driver unknown (no nvidia-smi)"
    driver, core, memory, power = (x.strip() for x in said.splitlines()[0].split(","))
    return f"driver {driver}, at most {core} / {memory}, {power}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> str:
    found: list[str] = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _commit() -> str:
    """Return the commit, with a + where files of the kernels differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--short", "kernels") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
