"""`make bench-data`: how many images a second every loader makes ready, beside the peers' way.

Each arm runs in a process of its own, a few rounds in random order; the table shows medians. Judge by
processor milliseconds per image, all threads and processes added up: wall clocks change with whatever
else a machine does.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import IO, Any, Literal

from dense_ssl.benches.task import MAX_FILES, RECIPES, Task
from dense_ssl.config import UserError
from dense_ssl.loaders import DataConfig, open_source
from dense_ssl.loaders.source import ImageSource

TIMEOUT_S = 900
PACKAGES = (
    "torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "ffcv", "numba", "numpy",
    "pillow", "simplejpeg",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One row of the table: what runs, by which filter it resizes, and whether it is a peer."""

    title: str
    module: str
    filter: str
    loader: str = ""
    cut: Literal["host", "device"] = "host"
    peer: bool = False


ARMS = (
    Arm("ours, ffcv", "ours", "bilinear", "ffcv"),
    Arm("ours, ffcv", "ours", "bicubic", "ffcv"),
    Arm("ours, ffcv, decode only", "ours", "-", "ffcv", cut="device"),
    Arm("ours, dali", "ours", "bilinear", "dali"),
    Arm("ours, dali", "ours", "bicubic", "dali"),
    Arm("ours, folder", "ours", "bilinear", "folder"),
    Arm("ours, folder", "ours", "bicubic", "folder"),
    Arm("FFCV, one decode per view", "stock_ffcv", "area", peer=True),
    Arm("DALI, one decode", "stock_dali", "bilinear", peer=True),
    Arm("DALI, one decode", "stock_dali", "bicubic", peer=True),
    Arm("Pillow, DataLoader", "pillow_loader", "bilinear", peer=True),
    Arm("Pillow, DataLoader", "pillow_loader", "bicubic", peer=True),
    Arm("torchvision v2, DataLoader", "torchvision_v2", "bilinear", peer=True),
    Arm("torchvision v2, DataLoader", "torchvision_v2", "bicubic", peer=True),
    Arm("decoding alone", "decode_only", "-"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, append every round to a file; return the exit code."""
    args = _arguments(argv)
    try:
        source = open_source(DataConfig(path=str(args.data)))
        with tempfile.TemporaryDirectory() as files:
            facts = _facts(source, Path(files), args)
            _say(_heading(facts))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as out:
                rounds = _measure(args, files, facts, out)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for recipe in args.recipes:
        _say(table(recipe, [r for r in rounds if r["recipe"] == recipe]))
    _say(f"every round is in {args.out}")
    return 0


def table(recipe: str, results: Iterable[dict[str, Any]]) -> str:
    """Return the medians of one recipe as text, cheapest arm first.

    The last column is the processor time of the best peer with the same filter, over the row's own.
    FFCV's area filter, the only one it has, counts as a peer of both others. Rows whose filter is
    "-" only decode: our loader for the device cutter, and the least that any loader takes.
    """
    by_arm: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        by_arm.setdefault((result["title"], result["filter"]), []).append(result)
    rows, absent = [], []
    for (title, kind), rounds in by_arm.items():
        if all("absent" in r for r in rounds):
            absent.append(f"  {title:28} {kind:9} {rounds[0]['absent']}")
        else:
            rows.append(_Row.of([r for r in rounds if "absent" not in r]))
    crops = sum(view.count for view in RECIPES[recipe])
    lines = [
        "",
        f"{recipe}: {crops} crops per image",
        f"  {'':28} {'filter':9} {'CPU ms':>7} {'images/s':>9} {'images/s':>9} {'views/s':>8} "
        f"{'images/s':>11} {'warm-up':>8} {'x best':>7}",
        f"  {'':28} {'':9} {'/image':>7} {'per core':>9} {'wall':>9} {'wall':>8} "
        f"{'min-max':>11} {'s':>8} {'peer':>7}",
    ]
    for row in sorted(rows, key=lambda row: row.cpu_ms):
        peers = [peer.cpu_ms for peer in rows if peer.is_peer_of(row)]
        ratio = f"{min(peers) / row.cpu_ms:7.2f}" if peers else ""
        spread = f"{min(row.wall):.0f}-{max(row.wall):.0f}"
        wall = median(row.wall)
        lines.append(
            f"  {row.title:28} {row.filter:9} {row.cpu_ms:7.2f} {1000 / row.cpu_ms:9.0f} "
            f"{wall:9.0f} {wall * crops:8.0f} {spread:>11} {row.warm_s:8.1f} {ratio}".rstrip()
        )
    return "\n".join(lines + absent)


@dataclass(frozen=True)
class _Row:
    """The rounds of one arm in one recipe."""

    title: str
    filter: str
    peer: bool
    cpu_ms: float  # median, per image
    wall: list[float]  # images per second of each round
    warm_s: float

    @classmethod
    def of(cls, rounds: Sequence[dict[str, Any]]) -> "_Row":
        return cls(
            rounds[0]["title"],
            rounds[0]["filter"],
            rounds[0]["peer"],
            median(1000 * r["cpu_s"] / r["images"] for r in rounds),
            [r["images"] / r["wall_s"] for r in rounds],
            median(r["warm_s"] for r in rounds),
        )

    def is_peer_of(self, row: "_Row") -> bool:
        """Return whether `row` is measured against this one."""
        return self.peer and row.filter != "-" and self.filter in (row.filter, "area")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.bench_data",
        description="How many images a second every loader makes ready, beside the peers.",
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--data", type=Path, required=True, help="shard set or folder of images")
    parser.add_argument(
        "--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="(all)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements of every arm (3)")
    parser.add_argument("--images", type=int, default=1000, help="images of a measurement (1000)")
    parser.add_argument("--batch", type=int, default=32, help="images per batch (32)")
    parser.add_argument(
        "--workers", type=int, default=cores, help=f"threads or processes ({cores})"
    )
    parser.add_argument("--only", default="", help="arms whose title contains this")
    parser.add_argument("--device", default="cpu", help="where DALI decodes: cpu, cuda")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench-data.jsonl"),
        help="results (runs/bench-data.jsonl)",
    )
    return parser.parse_args(argv)


def _measure(
    args: argparse.Namespace, files: str, facts: dict[str, Any], out: IO[str]
) -> list[dict[str, Any]]:
    """Return one result per round, recipe and arm, each written to `out` as soon as it is there."""
    results = []
    arms = [arm for arm in ARMS if args.only in arm.title]
    for number in range(args.rounds):
        jobs = [(recipe, arm) for recipe in args.recipes for arm in arms]
        random.Random(number).shuffle(jobs)
        for done, (recipe, arm) in enumerate(jobs):
            _progress(
                f"round {number + 1} of {args.rounds}, {done + 1} of {len(jobs)}: {arm.title}"
            )
            task = Task(
                arm=arm.module,
                loader=arm.loader,
                data=str(args.data),
                files=files,
                recipe=recipe,
                filter=arm.filter,
                images=args.images,
                batch=args.batch,
                workers=args.workers,
                device=args.device if "dali" in (arm.loader, arm.module[6:]) else "cpu",
                cut=arm.cut,
            )
            told = {"title": arm.title, "peer": arm.peer, "round": number, **asdict(task)}
            results.append({**told, **_run(task)})
            out.write(json.dumps({**facts, **results[-1]}) + "\n")
            out.flush()
    _progress("")
    return results


def _run(task: Task) -> dict[str, Any]:
    """Return what the arm's own process measured, or why it could not."""
    command = [sys.executable, "-m", "dense_ssl.benches", json.dumps(asdict(task))]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, start_new_session=True)
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"absent": f"not done after {TIMEOUT_S} s"}
        finally:
            with suppress(ProcessLookupError):  # its workers too, in the middle of a batch
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result, said = (_lines(file) for file in (out, errors))
    if process.returncode == 0 and result:
        return json.loads(result[-1])
    wrong = [line for line in said if "Error" in line] or said or ["no message"]
    return {"absent": f"failed: {wrong[-1][:200]} (exit code {process.returncode})"}


def _lines(file: IO[str]) -> list[str]:
    file.seek(0)
    return file.read().splitlines()


def _facts(source: ImageSource, files: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write the images as JPEG files for the peers that need such, and return what they are."""
    folder = files / "all"
    folder.mkdir()
    lengths = []
    for index in range(min(len(source.sizes), MAX_FILES)):
        encoded = source.read(index)
        if encoded.startswith(b"\xff\xd8"):
            (folder / f"{index:06d}.jpg").write_bytes(encoded)
            lengths.append(len(encoded))
    if not lengths:
        raise UserError(f"{args.data}: holds no JPEG, and JPEG decoding is what is compared")
    height, width = source.sizes[:MAX_FILES].mean(0).tolist()
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "data_images": len(lengths),
        "mean_width": round(width),
        "mean_height": round(height),
        "mean_kb": round(sum(lengths) / len(lengths) / 1000, 1),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": installed,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _heading(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['date']}, {facts['cpu']}, {facts['cores']} cores, Python {facts['python']}\n"
        f"{versions}\n"
        f"{facts['data_images']} images, mean {facts['mean_width']} x {facts['mean_height']} px, "
        f"{facts['mean_kb']} kB"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
