"""Several ranks, on one or several machines, by torchrun's own agent, with exit codes a scheduler can use.

torchrun's command exits with 1 whatever its ranks say; here the first rank's code is passed on, so that
75 (stopped by a signal, everything saved) and 2 (wrong input) arrive. `torchrun -m dense_ssl.pretrain ...`
starts the same ranks, without that.
"""

import logging
import os
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dense_ssl.micro_batches import noted
from dense_ssl.run_config import RunConfig

logger = logging.getLogger("dense_ssl")

STOPPED = 75
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_AGENT = "torch.distributed.elastic"
SAVING_S = 240  # what ranks may take to end their step and save; schedulers are asked for 300


def launch_ranks(
    ranks: int, argv: list[str], config: RunConfig, nodes: int = 1, rendezvous: str | None = None
) -> int:
    """Run `python -m dense_ssl.pretrain ARGV` on `ranks` ranks here; return the exit code for all.

    Where memory has run short they are started once more, with as many images at a time as the run has
    noted. With `nodes` > 1 every machine runs this; they find one another at `rendezvous`, HOST:PORT of the
    first. `config` is what ARGV says.
    """
    before = noted(config)
    code = _launched(ranks, argv, nodes, rendezvous)
    while code == STOPPED and noted(config) != before:
        before = noted(config)
        logger.warning("starting again with %d images at a time", before)
        code = _launched(ranks, argv, nodes, rendezvous)
    return code


def code_of(codes: list[int]) -> int:
    """Return one exit code for those of the ranks that failed; below 0: ended by a signal.

    A rank that fails ends the others, which say "try again" or are killed: its own code counts more.
    """
    if 2 in codes:
        return 2
    return 1 if any(code > 0 and code != STOPPED for code in codes) else STOPPED


def _launched(ranks: int, argv: list[str], nodes: int, rendezvous: str | None) -> int:
    # The agent makes folders for what ranks say, which here goes to the console.
    with tempfile.TemporaryDirectory(prefix="dense-ssl-") as folder:
        return _in_agent(ranks, argv, nodes, rendezvous, DefaultLogsSpecs(folder))


def _in_agent(
    ranks: int, argv: list[str], nodes: int, rendezvous: str | None, logs: DefaultLogsSpecs
) -> int:
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = SIGNALS  # what older agents read
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # Ranks say themselves what happens to them. Some loggers of the agent have a level of their own.
    for name in [_AGENT, *logging.root.manager.loggerDict]:
        if name.startswith(_AGENT):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Newer agents are told directly, and would otherwise end their ranks after 30 s.
    told = {"signals_to_handle": SIGNALS, "shutdown_timeout": SAVING_S}
    known = {field.name for field in fields(LaunchConfig)}
    more: dict[str, Any] = {name: value for name, value in told.items() if name in known}
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id="pretrain",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        max_restarts=0,
        logs_specs=logs,
        **more,
    )
    root = Path(__file__).resolve().parent.parent
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-m", "dense_ssl.pretrain", *argv]
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        return code_of([failure.exitcode for failure in error.failures.values()])
    except SignalException:
        # The agent has passed the signal on and waited for the ranks, which save before they exit.
        return STOPPED
    return 0
