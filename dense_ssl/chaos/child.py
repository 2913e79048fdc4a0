"""One command under one fault: `python -m dense_ssl.chaos.child FAULT PLACE -- ARGUMENTS`.

The command is the real one: `dense_ssl.pretrain`, or `dataprep` where the place is "conversion", or
`dense_ssl.evaluation`. Functions of this process are replaced before it begins; nothing in the product
knows of it. FAULT "none" leaves all as it is.
"""

import os
import sys
from collections.abc import Callable, Sequence

from dataprep import __main__ as dataprep
from dense_ssl import pretrain
from dense_ssl.chaos import ranks
from dense_ssl.chaos.faults import CONVERSION, EVALUATION
from dense_ssl.chaos.injection import injected
from dense_ssl.evaluation import __main__ as evaluation


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    fault, place, dashes, *arguments = argv
    assert dashes == "--"
    command = command_of(place)
    if ranks.several(arguments) and "RANK" not in os.environ:
        if fault == "restarted":
            return ranks.restarted(fault, place, arguments)
        return ranks.launched(fault, place, command, arguments)
    with injected(fault, place, arguments):
        return command(arguments)


def command_of(place: str) -> Callable[[list[str]], int]:
    """Return the program that a fault at this place strikes."""
    return {CONVERSION: dataprep.main, EVALUATION: evaluation.main}.get(place, pretrain.main)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
