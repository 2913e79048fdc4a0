"""What `make pretrain` sets going: a run on the user's data, or all stages on rendered scenes.

With no data it renders scenes, writes shards, trains the demo recipe (the full one where a CUDA GPU is),
evaluates it beside the same network at random initialisation, and leaves a report. Every stage is a command
of its own, shown as it is run.
"""

import argparse
import importlib.util
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import torch

from dense_ssl import checkpoint, pretrain
from dense_ssl.evaluation.catalogue import data_paths, task_names
from dense_ssl.evaluation.suite import configs_of
from dense_ssl.log import duration
from dense_ssl.weights.fingerprint import weights_sha256

SCENES = 2000
PICTURES = "crops,correspondence"
SOURCE, SHARDS = Path("data/scenes"), Path("shards/scenes")
# Enough objects and images for a clear figure, few enough for two cores (about a minute).
SMALL_EVALUATION = (
    "knn.size=96", "knn.max_train=1500", "knn.max_val=500", "knn.k=[20]",
    "segment.size=256", "segment.max_train=300", "segment.max_val=100",
)  # fmt: skip


def go(args: argparse.Namespace) -> int:
    """Do what the words of start.py ask for; return the exit code of the first stage that does not succeed.

    Raises:
        UserError: one of them is wrong.
    """
    ranks = args.gpus or max(torch.cuda.device_count(), 1)
    pretrain.recipe_path(args.method)
    if args.data is None:
        tasks = args.eval or "segment,knn"
        evaluation = [tasks, args.eval_data or "", *shlex.split(args.eval_args)]
        return demo(args.method, args.run, ranks, args.overrides, evaluation, args.scenes or SCENES)
    run = args.run or Path("runs") / args.method.replace("/", "-")
    settings = shlex.split(args.eval_args)
    where = args.eval_data or args.data
    if args.eval:
        check_evaluation(args.eval, where, settings)
    given = [f"data.path={args.data}", f"run.dir={run}"]
    code = pretrain.main([args.method, *given, *args.overrides, "--gpus", str(ranks)])
    if code != pretrain.DONE:
        return code
    if args.eval:
        chosen = [args.eval, "--checkpoint", str(run), "--data", where, *settings]
        code = run_stage("dense_ssl.evaluation", chosen)
    if (run / "config.yaml").is_file():
        illustrate(run)
    return code


def illustrate(run: Path) -> None:
    """Add pictures to a run and to its page; without them the run is still done."""
    run_stage("dense_ssl.visualise", ["--run", str(run), "--kind", PICTURES])
    if run_stage("dense_ssl.report", [str(run)]) == 0:
        say_weights(run)


def check_evaluation(tasks: str, data: str, settings: list[str]) -> None:
    """Refuse a wrong task, folder or setting before days of training, not after.

    Raises:
        UserError: one of them is wrong.
    """
    names = task_names(tasks)
    data_paths(names, data)
    configs_of(names, settings)


def demo(
    method: str,
    run: Path | None,
    ranks: int,
    overrides: list[str],
    evaluation: list[str],
    scenes: int = SCENES,
) -> int:
    """Go the whole way from rendered scenes to a report.

    `evaluation` is its tasks, its data ("" for the scenes), and its settings.
    """
    started = time.monotonic()
    tasks, data, *settings = evaluation
    names = task_names(tasks)
    if data:
        data_paths(names, data)
    # What is given comes after what suits two cores, so that it wins.
    small = [text for text in SMALL_EVALUATION if text.partition(".")[0] in names]
    settings = [*small, *settings]
    configs_of(names, settings)
    recipe = choose_recipe(method)
    run = run or Path("runs") / recipe.replace("/", "-")
    loader = available_loader()
    say(
        f"no DATA given: {scenes} rendered scenes, recipe configs/{recipe}.yaml, loader {loader}.\n"
        f"{other_recipe(method, recipe)}"
    )
    trained = ["--checkpoint", str(run), "--data", data or str(SOURCE)]
    stages = [
        ("dataprep", "scenes", "--src", str(SOURCE), "--out", str(SHARDS), "--split", "train2017",
         "--format", "both", "--count", str(scenes)),
        ("dense_ssl.pretrain", recipe, f"data.path={SHARDS}", f"data.loader={loader}", f"run.dir={run}",
         *overrides, "--gpus", str(ranks)),
        ("dense_ssl.evaluation", tasks, *trained, "--out", str(run), *settings),
        ("dense_ssl.visualise", "--run", str(run), "--kind", PICTURES),
        ("dense_ssl.report", str(run)),
    ]  # fmt: skip
    for module, *arguments in stages:
        code = run_stage(module, arguments)
        if code != 0:
            return code
    say(f"{run}/report.html shows what happened ({duration(time.monotonic() - started)} in all)")
    say_weights(run)
    return pretrain.DONE


def say_weights(run: Path) -> None:
    """Print the run's own last line once more, so that it is the last here too."""
    saved = checkpoint.load_newest(run / "checkpoints")
    assert saved is not None, f"{run} ended without a checkpoint"
    say(f"weights sha256: {weights_sha256(saved['method'])}")


def choose_recipe(method: str) -> str:
    """Return the demo recipe of a method on a CPU, its full recipe where a CUDA GPU is."""
    if torch.cuda.is_available() or method.startswith("demo/"):
        return method
    pretrain.recipe_path(f"demo/{method}")
    return f"demo/{method}"


def other_recipe(method: str, recipe: str) -> str:
    """Return one line that says how to take the recipe that was not taken."""
    full = method.removeprefix("demo/")
    if recipe.startswith("demo/"):
        return (
            f"The full recipe: make pretrain METHOD={full} DATA=shards/coco RUN=runs/{full} GPUS=8"
        )
    return f"The small recipe for two CPU cores: make pretrain METHOD=demo/{full}"


def available_loader() -> str:
    """Return the first of ffcv, dali and folder whose library is installed."""
    for name, module in (("ffcv", "ffcv"), ("dali", "nvidia.dali")):
        try:
            if importlib.util.find_spec(module) is not None:
                return name
        except ModuleNotFoundError:  # a parent package is missing
            continue
    return "folder"


def run_stage(module: str, arguments: list[str]) -> int:
    """Run `python -m MODULE ARGUMENTS`, passing signals on; return its exit code."""
    say(f"\n$ python -m {module} {' '.join(arguments)}")
    child = subprocess.Popen([sys.executable, "-m", module, *arguments])

    def forward(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    # Ctrl-C reaches the child from the terminal itself; a second copy would end it without saving.
    handlers = {signal.SIGTERM: forward, signal.SIGUSR1: forward, signal.SIGINT: signal.SIG_IGN}
    before = {which: signal.signal(which, handler) for which, handler in handlers.items()}
    try:
        code = child.wait()
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    return code if code >= 0 else 128 - code


def say(text: str) -> None:
    """Print for the person who waits, before any child's output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
