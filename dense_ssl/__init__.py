"""Dense self-supervised pre-training. Start reading at `dense_ssl/pretrain.py`."""

import importlib.util
from pathlib import Path

__version__ = "0.1.0"


def _check_siblings() -> None:
    """Stop with one sentence when `kernels` or `dataprep` resolve to somebody else's package."""
    root = Path(__file__).resolve().parent.parent
    for name in ("kernels", "dataprep"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != root:
            raise ImportError(
                f"`{name}` is {found or 'not importable'}, not {root / name}: "
                f"run from the repository root ({root})"
            )


_check_siblings()
