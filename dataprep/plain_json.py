"""JSON from elsewhere: one kind of error, whatever is in it."""

import json
from pathlib import Path
from typing import Any


def parse(text: str | bytes, *, not_numbers: bool = False) -> Any:
    """Return what a JSON text holds; `not_numbers`: also the losses of a run that has diverged.

    Raises:
        ValueError: it is no JSON, not Unicode, nested deeper than a parser goes, or holds a number that is
            none (`NaN`, `Infinity`, which JSON does not know) and may not.
    """
    try:
        return json.loads(text, parse_constant=float if not_numbers else _no_number)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: as of `parse`.
    """
    return parse(path.read_bytes())


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")
