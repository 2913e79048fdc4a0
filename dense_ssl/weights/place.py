"""Where the checkpoint is that a run's folder, one for Hugging Face's hub, or a file's name means."""

from pathlib import Path

from dense_ssl.config import UserError

HUB_WEIGHTS = "model.safetensors"  # as timm and transformers call them in a folder


def checkpoint_file(path: Path) -> Path:
    """Return the checkpoint file of a run or hub folder, or `path` itself where it is a file.

    Raises:
        UserError: there is neither.
    """
    if path.is_dir():
        if (path / "config.json").is_file() and (path / HUB_WEIGHTS).is_file():
            return path / HUB_WEIGHTS
        last = path / "checkpoints" / "last.pt"
        if not last.is_file():
            raise UserError(
                f"{path}: no checkpoints/last.pt in it; is it a run folder, and did it save?"
            )
        return last
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file or run folder")
    return path
