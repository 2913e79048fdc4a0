"""Where the checkpoint is that a run's folder or a file's name means."""

from pathlib import Path

from dense_ssl.config import UserError


def checkpoint_file(path: Path) -> Path:
    """Return the checkpoint file of a run folder, or `path` itself where it is a file.

    Raises:
        UserError: there is neither.
    """
    if path.is_dir():
        last = path / "checkpoints" / "last.pt"
        if not last.is_file():
            raise UserError(
                f"{path}: no checkpoints/last.pt in it; is it a run folder, and did it save?"
            )
        return last
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file or run folder")
    return path
