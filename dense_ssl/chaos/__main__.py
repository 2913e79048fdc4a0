"""The fault matrix: `python -m dense_ssl.chaos [--only FAULT/PLACE] [--loaders ffcv,dali,folder]`.

Stopped and repeated it goes on where it was, as long as the code is the same.

Exit codes: 0 nothing was lost, 1 something was, 2 the arguments are wrong.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue

from dense_ssl.chaos import disks, on_conversion, on_evaluation, on_training, page
from dense_ssl.chaos.faults import CONVERSION, EVALUATION, LOADERS, Case, cases
from dense_ssl.chaos.ground import Ground
from dense_ssl.chaos.ledger import Ledger, hash_of_code
from dense_ssl.chaos.nursery import ROOT, Nursery
from dense_ssl.chaos.processes import end_all_below
from dense_ssl.chaos.verdicts import Kind, Lost, Verdict

PAGE = ROOT / "docs" / "reliability.md"
LEDGER = ROOT / "runs" / "chaos.jsonl"
LIBRARIES = {"ffcv": "ffcv", "dali": "nvidia"}


def main(argv: Sequence[str]) -> int:
    """Try the faults, print a line for each; return the exit code."""
    args = _parsed(argv)
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
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # leaves nothing behind
    ledger = Ledger(args.ledger, hash_of_code(ROOT))
    if args.known:
        return _told(ledger.known(chosen, any_code=True), len(chosen), args.write_results)
    results = {} if args.afresh else ledger.known(chosen)
    if results:
        print(f"{len(results)} of {len(chosen)} cells are known from {args.ledger}")

    def done(case: Case, verdict: Verdict) -> None:
        results[case] = verdict
        ledger.add(case, verdict)
        print(page.line(case, verdict), flush=True)

    left = [case for case in chosen if case not in results]
    left.sort(key=lambda case: case.fault.ranks)  # the quick ones first
    if left:
        _try_all(left, args, done)
    return _told({case: results[case] for case in chosen}, len(chosen), args.write_results)


def _told(results: dict[Case, Verdict], asked: int, write: bool) -> int:
    """Print the counts, and write the table if that is wanted; return the exit code."""
    print(f"\n{page.counts(results, asked)}\n{page.circumstances()}")
    if write:
        page.write(PAGE, page.markdown(results, asked))
    return int(any(verdict.kind is Kind.FAILED for verdict in results.values()))


def _try_all(
    left: Sequence[Case], args: argparse.Namespace, done: Callable[[Case, Verdict], None]
) -> None:
    """Try the cells in `args.lanes` lanes, each with ground of its own."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    waiting: SimpleQueue[Case] = SimpleQueue()
    for case in left:
        waiting.put(case)
    telling = threading.Lock()

    def lane(number: int) -> None:
        ground = Ground(folder / str(number), Nursery(args.limit))
        while True:
            try:
                case = waiting.get_nowait()
            except Empty:
                ground.nursery.close()
                return
            verdict = tried(case, ground)
            with telling:
                done(case, verdict)

    pool = ThreadPoolExecutor(args.lanes)
    try:
        for running in [pool.submit(lane, number) for number in range(args.lanes)]:
            running.result()
    finally:
        end_all_below()  # what was under way when this was stopped
        pool.shutdown(cancel_futures=True)
        if args.keep:
            print(f"kept in {folder}")
        else:
            disks.release_below(folder)
            shutil.rmtree(folder, ignore_errors=True)


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


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.chaos",
        description="Try the faults of a run one by one. Exit codes: 0 nothing was lost, 1 something was.",
    )
    parser.add_argument("--only", default="", help="e.g. nan-loss,sigterm/mid-epoch/dali")
    parser.add_argument("--loaders", default=",".join(LOADERS), help="default: all that are here")
    parser.add_argument("--lanes", type=int, default=1, help="cells tried side by side (1)")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a command (900)")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="of verdicts (%(default)s)")
    parser.add_argument("--known", action="store_true", help="only tell what the ledger knows")
    parser.add_argument("--afresh", action="store_true", help="try again what is known")
    parser.add_argument("--keep", action="store_true", help="leave the runs where they are")
    parser.add_argument("--list", action="store_true", help="only say what would be tried")
    parser.add_argument(
        "--write-results", action="store_true", help=f"into {PAGE.relative_to(ROOT)}"
    )
    return parser.parse_args(argv)


def _is_here(loader: str) -> bool:
    return loader not in LIBRARIES or importlib.util.find_spec(LIBRARIES[loader]) is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
