"""Look at this machine: `python -m dense_ssl.doctor [RECIPE] [--data DATA] [--gpus N] [key=value ...]`.

Exit codes: 0 all well, 1 it works but something could be better, 2 something that is needed does not work.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dense_ssl.config import UserError, load
from dense_ssl.doctor.findings import Finding, page, summary, worst
from dense_ssl.doctor.forecast import forecast
from dense_ssl.doctor.machine import check_machine
from dense_ssl.doctor.rates import check_rates
from dense_ssl.doctor.software import check_software
from dense_ssl.run_config import RunConfig, recipe_path


def main(argv: Sequence[str]) -> int:
    """Print the page; return the worst severity."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.doctor",
        description="What this machine has, whether it works, and what a run would need of it.",
    )
    parser.add_argument("recipe", nargs="?", help="also forecast a run of this recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=0.1")
    parser.add_argument("--data", help="a shard set: its loader is timed as well")
    parser.add_argument(
        "--run", type=Path, default=Path("runs"), help="where runs go (default runs)"
    )
    ranks = max(torch.cuda.device_count(), 1)
    parser.add_argument("--gpus", type=int, default=ranks, help="ranks (all CUDA GPUs, else one)")
    args = parser.parse_intermixed_args(argv)
    logging.getLogger("dense_ssl").setLevel(
        logging.ERROR
    )  # warnings about a run, which this is not
    sections: list[tuple[str, Sequence[Finding]]] = []
    try:
        config = None
        if args.recipe:
            given = (f"data.path={args.data}", f"run.dir={args.run}", *args.overrides)
            config = load(RunConfig, recipe_path(args.recipe), given)
        sections.append(("This machine", check_machine(args.run)))
        sections.append(("Software", check_software()))
        sections.append(("Rates", check_rates(args.run)))
        if config is not None:
            title = f"{args.recipe}, {config.method.backbone.name}, batch {config.train.batch_size}"
            sections.append((title, forecast(config, args.gpus, args.data is not None)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(time.strftime("%Y-%m-%d %H:%M") + "\n")
    print(page(sections))
    print(f"\n{summary(sections)}")
    if not args.recipe:
        print("\nMETHOD=densecl [DATA=shards/coco] adds what that run would need.")
    return int(worst(sections))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
