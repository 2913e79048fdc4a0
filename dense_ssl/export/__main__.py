"""The command line: `python -m dense_ssl.export --run RUN --to TARGET,TARGET`."""

import argparse
import sys
from pathlib import Path

from dense_ssl.config import UserError
from dense_ssl.export.exporting import GROUPS, TARGETS, Exported, export


def main(argv: list[str]) -> int:
    """Parse the command line and export; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.export", description="Write a run's backbone for other libraries."
    )
    parser.add_argument("--run", required=True, help="a run folder or a checkpoint file")
    parser.add_argument(
        "--to",
        default="timm",
        metavar="TARGET[,TARGET]",
        help=f"of: {', '.join((*TARGETS, *GROUPS))}, all (default timm)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/export")
    args = parser.parse_args(argv)
    try:
        if args.out is None and not Path(args.run).is_dir():
            raise UserError(f"{args.run}: not a run folder; give --out (OUT=) as well")
        out = args.out or Path(args.run) / "export"
        for exported in export(args.run, args.to.split(","), out):
            print(f"{exported.path}  {exported.size / 1e6:.1f} MB  {_verdict(exported)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _verdict(exported: Exported) -> str:
    if not exported.equal:
        outputs = f"cells differ by {exported.max_abs_diff:.2g}"
    elif exported.max_abs_diff == 0.0:
        outputs = "outputs equal"
    else:
        outputs = f"outputs equal but for rounding, {exported.max_abs_diff:.2g}"
    return f"{outputs} ({exported.check})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
