"""What an exported file says of itself: the network's name in timm and how its positions are resampled.

A safetensors file carries it in its header, another has it in the .json beside it. Both are read as data
from a stranger: whatever is odd about them is as good as absent.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_MOST_BYTES = 1 << 20  # a description is a kilobyte


def told_beside(path: Path) -> dict[str, str]:
    """Return `arch` and `positions` of an exported file, as far as they are told."""
    about: Mapping[str, Any] = {}
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
        except (OSError, SafetensorError):
            return {}
    else:
        beside = path.with_name(path.name + ".json")
        try:
            if beside.is_file() and beside.stat().st_size <= _MOST_BYTES:
                read = json.loads(beside.read_text())
                about = read if isinstance(read, dict) else {}
        except (OSError, ValueError, RecursionError):
            return {}
        if about.get("file") != path.name:
            return {}
    arch = about.get("arch", about.get("architecture"))
    found = {"arch": arch, "positions": about.get("positions")}
    return {name: value for name, value in found.items() if isinstance(value, str) and value}
