"""Evaluate a backbone: `python -m dense_ssl.evaluation TASK[,TASK] --checkpoint SPEC --data DATA`.

On several GPUs, for the tasks that can share their work: `torchrun --nproc-per-node 8 -m
dense_ssl.evaluation linear ...`. Exit codes: 0 done, 2 the user's input is wrong.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from dense_ssl.config import UserError
from dense_ssl.evaluation.catalogue import TASKS, configs_of, data_paths, task_names
from dense_ssl.evaluation.kept import Question, answer_of, asked, voted_again, weights_of
from dense_ssl.evaluation.results import RESULTS, Result, table

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
    parser.add_argument(
        "--again", action="store_true", help="compute what the run's folder has an answer to, too"
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
    logging.getLogger("dense_ssl.evaluation.suite").setLevel(logging.INFO)  # what is under way
    # Pillow warns of large images and odd tags: what it cannot read is counted and named all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        found = _answers(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") != "0":
        return 0
    print(f"{args.checkpoint} (weights {found[0].weights[:12]}), percent\n")
    print(table(found))
    if any(result.protocol.endswith("*") for result in found):
        print(
            "\n* other settings or data than the protocol's: not comparable with published numbers"
        )
    folder = _folder(args)
    if folder is not None:
        print(f"\nkept in {folder / RESULTS}")
    return 0


def _folder(args: argparse.Namespace) -> Path | None:
    """Where results are kept, if anywhere."""
    run = Path(args.checkpoint)
    return args.out or (run if (run / "checkpoints").is_dir() else None)


def _answers(args: argparse.Namespace) -> list[Result]:
    """Return the results of all tasks in the order asked, those that are known already from the folder.

    Raises:
        UserError: an argument is wrong, or the data is not usable.
    """
    tasks = task_names(args.tasks)
    paths = data_paths(tasks, args.data)
    weights_of(args.checkpoint)
    folder = _folder(args)
    if folder is None:
        return _computed(tasks, args, None, {})
    about = {"random": args.random, "device": args.device, "checkpoint": args.checkpoint}
    # Votes on what is kept need no torch, and settings of several tasks are told apart by all of them.
    light = all(TASKS[task].again for task in tasks)
    configs = configs_of(tasks, args.settings) if light else {}
    questions = {
        task: asked(
            task, data=paths[task], settings=args.settings, config=configs.get(task), **about
        )
        for task in tasks
    }
    known: dict[str, list[Result]] = {}
    # Several ranks must go the same way, and a folder may not be the same on all machines.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for task in tasks if alone and not args.again else ():
        results, when = answer_of(folder, questions[task].whole)
        if results:
            print(f"{task}: as computed {when} (--again computes it once more)", file=sys.stderr)
        elif task in configs:
            where = {"checkpoint": args.checkpoint, "data": paths[task]}
            results = voted_again(folder, task, questions[task], configs[task], **where)
            if results:
                print(
                    f"{task}: another vote of the neighbours in {folder}/features", file=sys.stderr
                )
        if results:
            known[task] = results
    left = [task for task in tasks if task not in known]
    found = _computed(left, args, folder, questions) if left else []
    return [
        result
        for task in tasks
        for result in known.get(task) or [each for each in found if each.task == task]
    ]


def _computed(
    tasks: list[str], args: argparse.Namespace, folder: Path | None, questions: dict[str, Question]
) -> list[Result]:
    # torch takes 2 s to import: help, a wrong word and what is known already shall not wait for it.
    from dense_ssl.evaluation.suite import evaluate

    return evaluate(
        tasks,
        args.checkpoint,
        args.data,
        args.settings,
        out=folder,
        random=args.random,
        device=args.device,
        questions=questions,
    )


if __name__ == "__main__":
    sys.exit(main())
