"""The fault matrix: `python -m dense_ssl.chaos [--only FAULT/PLACE] [--loaders ffcv,dali,folder]`.

Exit codes: 0 nothing was lost, 1 something was, 2 the arguments are wrong.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dense_ssl.chaos import disks, on_conversion, on_evaluation, on_training, page
from dense_ssl.chaos.faults import CONVERSION, EVALUATION, LOADERS, Case, cases
from dense_ssl.chaos.ground import Ground
from dense_ssl.chaos.nursery import ROOT, Nursery
from dense_ssl.chaos.verdicts import Kind, Lost, Verdict

PAGE = ROOT / "docs" / "reliability.md"
LIBRARIES = {"ffcv": "ffcv", "dali": "nvidia"}


def main(argv: Sequence[str]) -> int:
    """Try the faults, print a line for each; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.chaos",
        description="Try the faults of a run one by one. Exit codes: 0 nothing was lost, 1 something was.",
    )
    parser.add_argument("--only", default="", help="e.g. nan-loss,sigterm/mid-epoch/dali")
    parser.add_argument("--loaders", default=",".join(LOADERS), help="default: all that are here")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a command (300)")
    parser.add_argument("--keep", action="store_true", help="leave the runs where they are")
    parser.add_argument("--list", action="store_true", help="only say what would be tried")
    parser.add_argument(
        "--write-results", action="store_true", help=f"into {PAGE.relative_to(ROOT)}"
    )
    args = parser.parse_args(argv)
    loaders = [name for name in args.loaders.split(",") if name in LOADERS and _is_here(name)]
    chosen = cases(loaders, [word for word in args.only.split(",") if word])
    if not disks.can_be_read_only():
        print("read-only run folder: left out, root may not mount here and cannot be held back")
        chosen = [case for case in chosen if case.fault.name != "read-only"]
    if not chosen:
        print("error: no fault of that name; --list shows all", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(case.name for case in chosen))
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"  # what is equal here is equal to the bit
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    nursery = Nursery(args.limit)
    results: dict[Case, Verdict] = {}
    try:
        ground = Ground(folder, nursery)
        for case in chosen:
            results[case] = tried(case, ground)
            print(page.line(case, results[case]), flush=True)
    finally:
        nursery.close()
        if args.keep:
            print(f"kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{page.counts(results)}\n{page.circumstances()}")
    if args.write_results:
        page.write(PAGE, page.markdown(results))
    return int(any(verdict.kind is Kind.FAILED for verdict in results.values()))


def tried(case: Case, ground: Ground) -> Verdict:
    """Return the verdict on one cell, with the seconds it took."""
    began = time.monotonic()
    struck = {CONVERSION: on_conversion.struck, EVALUATION: on_evaluation.struck}.get(
        case.place, on_training.struck
    )
    try:
        verdict = struck(case, ground)
    except Lost as lost:
        verdict = Verdict(Kind.FAILED, str(lost))
    return Verdict(verdict.kind, verdict.why, time.monotonic() - began)


def _is_here(loader: str) -> bool:
    return loader not in LIBRARIES or importlib.util.find_spec(LIBRARIES[loader]) is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
