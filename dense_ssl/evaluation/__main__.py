"""Evaluate a backbone: `python -m dense_ssl.evaluation TASK[,TASK] --checkpoint SPEC --data DATA`.

On several GPUs, for the tasks that can share their work: `torchrun --nproc-per-node 8 -m
dense_ssl.evaluation linear ...`. Exit codes: 0 done, 2 the user's input is wrong.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dense_ssl.config import UserError
from dense_ssl.evaluation.results import RESULTS, table
from dense_ssl.evaluation.suite import TASKS, evaluate, task_names

_SPECS = """SPEC: a run folder, a checkpoint or official file, timm:NAME (published weights), random:NAME"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.evaluation",
        description="Evaluate the frozen features of a backbone.",
        epilog=_SPECS,
    )
    parser.add_argument("tasks", metavar="TASK[,TASK]", help=f"of: {', '.join(TASKS)}")
    parser.add_argument("--checkpoint", required=True, metavar="SPEC", help="see below")
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="a folder, or knn=FOLDER,segment=FOLDER"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="keep results and features here [a run's folder]"
    )
    parser.add_argument(
        "--random",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also evaluate the same network at random initialisation",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="of the protocols: size=96 segment.steps=200",
    )
    args = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        found = evaluate(
            task_names(args.tasks),
            args.checkpoint,
            args.data,
            args.settings,
            out=args.out,
            random=args.random,
            device=args.device,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        first = (str(error).splitlines() or [""])[0].split(". ")[0]
        print(f"error: {first}: take a smaller batch_size or size", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") != "0":
        return 0
    print(f"{args.checkpoint} (weights {found[0].weights[:12]}), percent\n")
    print(table(found))
    folder = args.out or Path(args.checkpoint)
    if (folder / RESULTS).is_file():
        print(f"\nappended to {folder / RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
