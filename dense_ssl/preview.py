"""What a method will see of some data, before any training: `make preview METHOD=densecl DATA=shards/coco`.

One page: source images with their crop boxes beside the views as the network gets them, what is hidden from
the student, which cells of two views truly correspond, and figures over thousands of drawn crops: how much
of an image they take, how far they are enlarged, how often two views show the same place.
"""

import argparse
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dense_ssl.checkpoint import write_atomically
from dense_ssl.config import UserError, load
from dense_ssl.loaders import open_source
from dense_ssl.methods.udi import UdiConfig
from dense_ssl.report.page import page, picture, section
from dense_ssl.run_config import RunConfig, recipe_path
from dense_ssl.views import ViewSpec, draw_epoch, positions
from dense_ssl.visualise.__main__ import expected_cells
from dense_ssl.visualise.places import place_rows
from dense_ssl.visualise.samples import Sample, crops_row, mask_rows, sample_of, shown
from dense_ssl.visualise.sheets import NOWHERE, correspondence_sheet, stacked

DRAWN = 5000  # images whose crops the figures are over
ENLARGED = 1.6  # how far the median crop may be enlarged before sharper shards would show
_CROPS = (
    "Left the image with its crop boxes, right the views as the network gets them; <> is mirrored."
)
_PAIRS = (
    "Cells of the first two crops that show the same place: what a dense method can learn from."
)
_PLACES = (
    "Patches sampled in one crop, and the same places in the other; hollow ones are not in it."
)
GRID = 7  # cells on a side where no stride says


def write_preview(recipe: str, overrides: Sequence[str], out: Path, images: int) -> list[str]:
    """Write the page and return its warnings.

    Raises:
        UserError: the recipe or the data cannot be used, or `out` cannot be written.
    """
    config = load(RunConfig, recipe_path(recipe), ("run.dir=preview", *overrides))
    settings = config.model_dump(mode="json")
    sizes = open_source(config.data).sizes
    sample = sample_of(
        {"method": settings["method"], "data": settings["data"], "seed": config.train.seed},
        images,
        0,
        None,
    )
    rows, warnings = figures(config.method.views, sizes, config.train.seed)
    batch, steps = config.train.batch_size, len(sizes) // config.train.batch_size
    if not steps:
        warnings.insert(
            0,
            f"{len(sizes)} images are fewer than the batch of {batch}: a smaller train.batch_size is needed",
        )
    title = f"{recipe} on {config.data.path}"
    count = f"{len(sizes)} images, median {np.median(sizes[:, 1]):.0f} x {np.median(sizes[:, 0]):.0f} px"
    sections = [
        f"<h1>{html.escape(title)}</h1><p>{count}; batch {batch}, "
        f"{steps} {'step' if steps == 1 else 'steps'} an epoch</p>",
        *(f'<p class="warning">{html.escape(warning)}</p>' for warning in warnings),
        section(
            "Crops",
            _png([crops_row(sample, i) for i in range(images)], _CROPS),
        ),
    ]
    if "mask" in type(config.method).model_fields and "global" in sample.batch.views:
        rows_of = mask_rows(sample, 0)[-images:]
        sections.append(
            section("Hidden from the student", _png(rows_of, "global crops, whole and masked"))
        )
    pairs = [row for i in range(images) if (row := true_pairs(sample, i)) is not None]
    if pairs:
        sections.append(section("True correspondences", _png(pairs, _PAIRS)))
    if isinstance(config.method, UdiConfig) and config.method.patches:
        sections.append(
            section("Patches that are compared", _png(place_rows(sample, 0)[:images], _PLACES))
        )
    sections.append(section(f"Over {min(len(sizes), DRAWN)} images", rows))
    try:
        write_atomically(out, page(title, sections).encode())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    return warnings


def figures(views: Sequence[ViewSpec], sizes: np.ndarray, seed: int) -> tuple[str, list[str]]:
    """Return a table of what crops of each view are like, and what seems wrong with them."""
    index = np.linspace(0, len(sizes) - 1, min(len(sizes), DRAWN)).astype(np.int64)
    plan = draw_epoch(views, sizes, seed, 0, index)
    boxes = plan.fractions(sizes[index])  # [n, V, 4]
    share = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    pixels = (plan.boxes[..., 2:] - plan.boxes[..., :2]).astype(np.float64)
    warnings, rows = [], []
    first = boxes[:, 0]
    for view in views:
        at = positions(views)[view.name]
        enlarged = view.size / np.sqrt(pixels[:, at].prod(-1))
        shared = overlap_share(boxes[:, at], first[:, None])
        others = shared[:, 1:] if at.start == 0 else shared
        rows.append(
            (
                f"{view.name}: {view.count} x {view.size} px"
                + (f", of {view.part:.0%} of a batch" if view.part < 1 else ""),
                _spread(100 * share[:, at], "{:.0f} %"),
                _spread(enlarged, "{:.2f}"),
                f"{100 * plan.flipped[:, at].mean():.0f} %",
                _spread(100 * others, "{:.0f} %") if others.size else "-",
                f"{100 * (others == 0).mean():.1f} %" if others.size else "-",
            )
        )
        if np.median(enlarged) > ENLARGED:
            warnings.append(
                f"the median crop of {view.name} is enlarged {np.median(enlarged):.1f} times: larger images "
                "(SIZE= when converting) or a smaller view would show more"
            )
    head = (
        "view",
        "share of the image",
        "enlarged by",
        "mirrored",
        "shared with the first crop",
        "sharing nothing",
    )
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    note = '<p class="soft">Medians, and in brackets the tenth and ninetieth percentile.</p>'
    table = f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    return table + note, warnings


def overlap_share(boxes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the share of each box [..., 4] that lies in another."""
    low = np.maximum(boxes[..., :2], other[..., :2])
    high = np.minimum(boxes[..., 2:], other[..., 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    return both / (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def true_pairs(sample: Sample, row: int) -> Image.Image | None:
    """Draw the first two crops of an image with lines between cells that show the same place."""
    crops = next(iter(sample.batch.views.values()))
    if len(crops.images) < 2 or row >= crops.images.shape[1]:
        return None
    grid = (GRID, GRID)
    expected = expected_cells(
        crops.boxes[:2, row].numpy(), crops.flipped[:2, row].numpy(), (grid, grid)
    )
    inside = np.flatnonzero(~np.isnan(expected[:, 0]))
    places = np.nan_to_num(expected).clip(0, GRID - 1e-3).astype(np.int64)
    best = np.where(np.isnan(expected[:, 0]), NOWHERE, places[:, 0] * GRID + places[:, 1])
    apart = inside[
        (inside // GRID + 2 * (inside % GRID)) % 5 == 0
    ]  # lines that do not cover each other
    pairs = np.stack([apart, best[apart]], axis=1)
    both = (shown(crops.images[0, row]), shown(crops.images[1, row]))
    return correspondence_sheet(
        both, (grid, grid), best, pairs, np.ones(len(pairs), bool), expected,
        (f"{len(apart)} of {len(inside)} cells that both crops show, where the other shows them",
         "the same colour is the same place; what is grey is not in the other crop"),
    )  # fmt: skip


def _spread(values: np.ndarray, form: str) -> str:
    low, middle, high = np.percentile(values, (10, 50, 90))
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


def _png(rows: Sequence[Image.Image], caption: str) -> str:
    file = io.BytesIO()
    stacked(list(rows), "").save(file, format="PNG", optimize=True)
    return picture(file.getvalue(), caption)


def main(argv: Sequence[str]) -> int:
    """Parse the command line and write the page; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.preview", description="Show what a method will see of some data."
    )
    parser.add_argument("recipe", help="a recipe in configs/: densecl, demo/ibot, ...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=0.1")
    parser.add_argument("--data", required=True, help="a shard set or a folder of images")
    parser.add_argument("--images", type=int, default=4, help="how many (default 4)")
    parser.add_argument(
        "--out", type=Path, default=Path("preview.html"), help="the page (preview.html)"
    )
    args = parser.parse_intermixed_args(argv)
    try:
        overrides = (f"data.path={args.data}", *args.overrides)
        for warning in write_preview(args.recipe, overrides, args.out, max(args.images, 1)):
            sys.stdout.write(f"note: {warning}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
