"""Hostile files for every reader: `python -m dense_ssl.fuzz [--only coco,zip] [--minutes 10]`.

The damage is drawn at random from a seed. A file that breaks a promise is kept, and read again by `--file`.

Exit codes: 0 every promise was kept, 1 one was not, 2 the arguments are wrong.
"""

import argparse
import hashlib
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dense_ssl.config import UserError
from dense_ssl.fuzz.mutations import a_number_replaced, mutated
from dense_ssl.fuzz.targets import Range, Target, chosen

FOUND = Path("runs") / "fuzz"


def main(argv: Sequence[str]) -> int:
    """Attack the readers in turn; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dense_ssl.fuzz", description=__doc__)
    parser.add_argument("--only", default="", help="some of the targets, comma-separated")
    parser.add_argument("--minutes", type=float, default=10, help="in all (10)")
    parser.add_argument(
        "--engine", choices=("random", "atheris"), default="random",
        help="atheris: damage that reaches new code is kept and damaged further (random)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the damage (0)")
    parser.add_argument("--file", type=Path, help="only this one, for the one target of --only")
    parser.add_argument("--found", type=Path, default=FOUND, help=f"for what is found ({FOUND})")
    args = parser.parse_args(argv)
    try:
        targets = chosen(args.only)
        if args.engine == "atheris" and importlib.util.find_spec("atheris") is None:
            raise UserError(
                "--engine atheris: it is not installed; `.venv/bin/pip install atheris` brings it"
            )
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    logging.disable(logging.CRITICAL)  # what readers say of the files they leave aside
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    seconds = 60 * args.minutes / len(targets)
    try:
        if args.engine == "atheris" and args.file is None:
            lines = [_guided(folder, target, seconds, args.seed, args.found) for target in targets]
        else:
            ground = Range(folder)
            if args.file is not None:
                return _again(ground, targets, args.file)
            lines = [
                _attacked(ground, target, seconds, args.seed, args.found) for target in targets
            ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tried, found = (sum(line[i] for line in lines) for i in range(2))
    print(f"{tried:,} files in {args.minutes:g} minutes; {found} broke a promise")
    return int(found > 0)


def _again(ground: Range, targets: list[Target], file: Path) -> int:
    if len(targets) != 1 or not file.is_file():
        sys.stderr.write(
            f"error: --file {file} needs one target (--only) and a file that is there\n"
        )
        return 2
    broken = ground.attempt(targets[0], file.read_bytes())
    print(broken or "kept its promise")
    return int(broken is not None)


def _attacked(
    ground: Range, target: Target, seconds: float, seed: int, found: Path
) -> tuple[int, int]:
    """Return how many files one reader was given, and how many of its promises they broke."""
    broken: dict[str, str] = {}

    def attempt(data: bytes) -> None:
        reason = ground.attempt(target, data)
        if reason is not None and reason.rpartition(" at ")[2] not in broken:
            broken[reason.rpartition(" at ")[2]] = reason
            kept = found / target.name / hashlib.sha256(data).hexdigest()[:16]
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
            print(f"  {kept}: {reason}", flush=True)

    began = time.monotonic()
    tried = files(ground.sound_files(target), seconds, seed, attempt)
    print(
        f"{target.name:<18} {tried:7,} files  {time.monotonic() - began:5.0f} s  {len(broken)} broken",
        flush=True,
    )
    return tried, len(broken)


def _guided(
    scratch: Path, target: Target, seconds: float, seed: int, found: Path
) -> tuple[int, int]:
    """Let libFuzzer attack one reader in a process of its own; return the same."""
    given = [target.name, str(round(seconds)), str(seed), str(found), str(scratch / target.name)]
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "dense_ssl.fuzz.guided", *given], capture_output=True, text=True
    )
    sys.stdout.write(ended.stdout)
    broken = len(ended.stdout.splitlines())
    if ended.returncode != 0:
        broken += 1
        said = ended.stderr.strip().splitlines()[-5:]
        print(f"  {found / target.name}: the process ended with {ended.returncode}: {said}")
    tried, reached = (
        int(numbers[-1]) if (numbers := re.findall(pattern, ended.stderr)) else 0
        for pattern in (r"number_of_executed_units: (\d+)", r" cov: (\d+) ")
    )
    took = f"{time.monotonic() - began:5.0f} s  {reached:5} branches"
    print(f"{target.name:<18} {tried:7,} files  {took}  {broken} broken", flush=True)
    return tried, broken


def files(
    sound: Sequence[bytes], seconds: float, seed: int, attempt: Callable[[bytes], None]
) -> int:
    """Give `attempt` one damaged file after the other for some seconds; return how many."""
    rng = np.random.default_rng(seed)
    deadline, tried = time.monotonic() + seconds, 0
    for data in sound:
        attempt(data)
    while time.monotonic() < deadline:
        data = sound[int(rng.integers(0, len(sound)))]
        small = len(data) < 100_000 and rng.integers(0, 3) == 0
        attempt(a_number_replaced(data, rng) if small else mutated(data, sound, rng))
        tried += 1
    return tried + len(sound)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
