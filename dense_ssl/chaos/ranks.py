"""Several ranks of a training, each a child of the fault matrix.

Those that a fault strikes are programs of their own, as always. Those of an undisturbed run fork from
torchrun's agent, which has forked from the nursery, and need not import anything.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

from dense_ssl.chaos.faults import NO_FAULT

RESTARTS = 1  # that torchrun is allowed


def several(arguments: list[str]) -> bool:
    """Return whether a training is asked for on several ranks."""
    return "--gpus" in arguments


def launched(fault: str, place: str, command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a training on several ranks, each of which the fault may strike; return the exit code."""
    launch = importlib.import_module("dense_ssl.launch")
    original = launch.elastic_launch

    def start(config: Any, program: str) -> Callable[..., Any]:
        if fault == NO_FAULT:
            agent = original(replace(config, start_method="fork"), _be_a_rank)
            return lambda *arguments: agent(place, *arguments[2:])
        agent = original(config, program)
        child = ("-m", "dense_ssl.chaos.child", fault, place, "--")
        return lambda *arguments: agent(*child, *arguments[2:])

    with mock.patch.object(launch, "elastic_launch", start):
        return command(argv)


def restarted(fault: str, place: str, argv: list[str]) -> int:
    """Run a training under torchrun, which starts its ranks again when one is gone; return the exit code."""
    torchrun = importlib.import_module("torch.distributed.run")
    at = argv.index("--gpus")
    ranks, rest = argv[at + 1], [*argv[:at], *argv[at + 2 :]]
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={RESTARTS}"]
    torchrun.main([*options, "-m", "dense_ssl.chaos.child", fault, place, "--", *rest])
    return 0


def _be_a_rank(place: str, *arguments: str) -> None:
    """Run one rank's share; a code other than 0 is left by exiting, as a program does."""
    child = importlib.import_module("dense_ssl.chaos.child")
    code = child.main([NO_FAULT, place, "--", *arguments])
    if code != 0:
        sys.stdout.flush()
        sys.exit(code)
