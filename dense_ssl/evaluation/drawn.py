"""The pictures of an evaluation in its run's folder."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dense_ssl.config import UserError

PICTURES = "eval"  # folder below the run's


def draw(run: Path, task: str, sheets: Mapping[str, Image.Image]) -> None:
    """Write the pictures of a task as RUN/eval/TASK-NAME.png, each whole or not at all.

    Raises:
        UserError: one cannot be written.
    """
    for name, sheet in sheets.items():
        path = run / PICTURES / f"{task}-{name}.png"
        aside = path.with_name(f".{path.name}.writing")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(aside, format="PNG")
            aside.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
