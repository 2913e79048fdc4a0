"""`make pretrain`: training on the user's data, or, with no data at all, the whole way on rendered scenes.

    python -m dense_ssl.start densecl --data shards/coco --run runs/a --gpus 8 optim.lr=0.3
    python -m dense_ssl.start densecl --data shards/coco --eval knn,linear --eval-data /data/imagenet
    python -m dense_ssl.start densecl

This file is its words; what they set going is whole_way.py.
"""

import argparse
import sys
from pathlib import Path

from dense_ssl.config import UserError
from dense_ssl.evaluation.catalogue import task_names


def main(argv: list[str]) -> int:
    """Parse the command line and run; return the exit code of the first stage that does not succeed."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.start",
        description="Pre-train on your data, or on rendered scenes.",
    )
    parser.add_argument("method", help="a recipe in configs/: densecl, moco, demo/densecl, ...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=0.1")
    parser.add_argument("--data", help="a shard set, or a folder of images with data.loader=folder")
    parser.add_argument("--run", type=Path, help="the run's folder (default runs/METHOD)")
    parser.add_argument("--gpus", type=int, help="ranks (default: all CUDA GPUs, else one)")
    parser.add_argument("--scenes", type=int, help="without --data: how many to render (2000)")
    parser.add_argument("--eval", metavar="TASK[,TASK]", help="evaluate the run when it is done")
    parser.add_argument(
        "--eval-data", help="of the evaluation: a folder, or knn=FOLDER,... (--data)"
    )
    parser.add_argument("--eval-args", default="", help="of the evaluation: 'knn.size=96 ...'")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.eval:
            task_names(args.eval)
        # torch takes 2 s to import: help and a wrong word shall not wait for it.
        from dense_ssl import whole_way

        return whole_way.go(args)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
