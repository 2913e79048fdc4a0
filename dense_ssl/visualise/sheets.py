"""Pictures of crops and correspondences, drawn with Pillow from plain arrays.

Boxes are fractions of the source image (x0, y0, x1, y1); views are uint8 RGB [S, S, 3] as the network
sees them; cells are row-major.
"""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, SOFT = (255, 255, 255), (28, 31, 36), (120, 128, 138)
RIGHT, WRONG = (18, 184, 134), (240, 62, 62)  # of a match: where geometry puts it, or elsewhere
_COLD, _WARM, _HOT = (38, 32, 96), (196, 54, 110), (255, 226, 92)  # of heat maps
_GAP = 14
_SOURCE_PX = 340  # longer side of a source image on a sheet
_LARGEST_VIEW_PX = 144  # side of the largest view on a sheet; smaller views keep their proportion
_SMALLEST_VIEW_PX = 64
NOWHERE = -1  # the match of a cell that has none
_UNTINTED = (120, 120, 120)
_PAIR_PX = 288  # side of a view on a correspondence sheet


def crops_sheet(
    source: np.ndarray,
    boxes: np.ndarray,
    flipped: np.ndarray,
    names: Sequence[str],
    views: Sequence[np.ndarray],
) -> Image.Image:
    """Return a source image with its V crop boxes, beside the V views cut from them.

    Args:
        source: uint8 [H, W, 3].
        boxes: float [V, 4].
        flipped: bool [V].
        names: of each crop, such as `global[0]`.
        views: V arrays uint8 [S, S, 3]; sides may differ.
    """
    colours = [crop_colour(number, len(names)) for number in range(len(names))]
    left = _with_boxes(source, boxes, names, colours)
    scale = _LARGEST_VIEW_PX / max(view.shape[0] for view in views)
    tiles = [
        _tile(view, max(round(scale * view.shape[0]), _SMALLEST_VIEW_PX), name, mirrored, colour)
        for view, name, mirrored, colour in zip(views, names, flipped, colours, strict=True)
    ]
    right = _flow(tiles, width=5 * (_LARGEST_VIEW_PX + _GAP))
    return beside([left, right])


def correspondence_sheet(
    views: tuple[np.ndarray, np.ndarray],
    grids: tuple[tuple[int, int], tuple[int, int]],
    best: np.ndarray,
    pairs: np.ndarray,
    strong: np.ndarray,
    expected: np.ndarray,
    captions: tuple[str, str] | None = None,
) -> Image.Image:
    """Return two views with lines between matched cells, and the map of every cell's best match.

    Args:
        views: query and key view, uint8 [S, S, 3] each.
        grids: rows and columns of their cells.
        best: int [N], the key cell most similar to each query cell, or NOWHERE; its colour fills the
            query cell.
        pairs: int [M, 2], the matches to join by lines (query cell, key cell).
        strong: bool [M], those drawn thick.
        expected: float [N, 2], row and column in the key grid where each query cell's centre lies
            according to the crop boxes, in cells; NaN where the key view does not show it.
        captions: of the lines and of the map; None: what of the matches is right.
    """
    query, key = (_resized(view, _PAIR_PX) for view in views)
    lines = _joined(query, key, grids, pairs, strong, expected)
    colours = cell_colours(*grids[1])
    tints = np.where(best[:, None] == NOWHERE, np.array(_UNTINTED, np.uint8), colours[best])
    painted = beside([_painted(query, grids[0], tints), _painted(key, grids[1], colours)])
    seen = ~np.isnan(expected).any(axis=1)
    right = agrees(best, expected, grids[1][1])
    caption = f"{len(pairs)} mutual matches, {int(strong.sum())} strong (thick); green where the boxes agree"
    count = f"{int(right.sum())} of the {int(seen.sum())} cells that both views show"
    second = f"colour = where the best match lies; right for {count}"
    under = captions or (caption, second)
    return beside([_captioned(lines, under[0]), _captioned(painted, under[1])])


def tiles_sheet(names: Sequence[str], tiles: Sequence[np.ndarray], side: int = 0) -> Image.Image:
    """Return named pictures uint8 [H, W, 3] in rows of six, each with its longer side `side` pixels."""
    side = side or _LARGEST_VIEW_PX
    framed = []
    for name, tile in zip(names, tiles, strict=True):
        scale = side / max(tile.shape[:2])
        size = (max(round(scale * tile.shape[1]), 1), max(round(scale * tile.shape[0]), 1))
        enlarging = scale > 1.5  # cells stay cells
        how = Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS
        framed.append(_captioned(Image.fromarray(tile).resize(size, how), name))
    return _flow(framed, width=6 * (side + _GAP))


def heated(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return an image uint8 [H, W, 3] in grey under heat [h, w] in 0..1: blue, nothing, to yellow, all."""
    grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB"), np.float64)
    size = (image.shape[1], image.shape[0])
    soft = Image.fromarray((255 * heat).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    share = np.asarray(soft, np.float64)[..., None] / 255
    low, middle, high = np.array(_COLD), np.array(_WARM), np.array(_HOT)
    colour = np.where(
        share < 0.5, low + 2 * share * (middle - low), middle + (2 * share - 1) * (high - middle)
    )
    return (0.45 * grey + 0.55 * colour).round().astype(np.uint8)


def agrees(best: np.ndarray, expected: np.ndarray, columns: int) -> np.ndarray:
    """Return which cells are matched within one cell (on each axis) of where geometry puts them.

    bool [N]; best int [N] are key cells, expected float [N, 2] their true row and column, or NaN.
    """
    found = np.stack([best // columns, best % columns], axis=1) + 0.5
    with np.errstate(invalid="ignore"):
        return np.all(np.abs(found - expected) <= 1, axis=1)


def crop_colour(number: int, count: int) -> tuple[int, int, int]:
    """Return one of `count` colours that can be told apart, the same whatever the image."""
    # Two rings of hues: neighbours in the list differ in brightness as well.
    hue = (0.58 + number / max(count, 1)) % 1
    value = 0.95 if number % 2 == 0 else 0.72
    return _rgb(hue, 0.85, value)


def cell_colours(rows: int, columns: int) -> np.ndarray:
    """Return a colour for every cell of a grid that tells its place: uint8 [rows * columns, 3].

    Hue turns around the grid's centre, and the middle is pale.
    """
    y, x = np.mgrid[0:rows, 0:columns]
    dy, dx = (y + 0.5) / rows - 0.5, (x + 0.5) / columns - 0.5
    hues = (np.arctan2(dy, dx) / (2 * np.pi)) % 1
    strengths = np.clip(np.hypot(dx, dy) / 0.5, 0.12, 1)
    both = zip(hues.ravel(), strengths.ravel(), strict=True)
    return np.array([_rgb(float(hue), float(strength), 0.95) for hue, strength in both], np.uint8)


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """Return images in a row, aligned at the top."""
    width = sum(image.width for image in images) + _GAP * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), BACKGROUND)
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width + _GAP
    return sheet


def below(images: Sequence[Image.Image]) -> Image.Image:
    """Return images below one another, aligned at the left."""
    height = sum(image.height for image in images) + _GAP * (len(images) - 1)
    sheet = Image.new("RGB", (max(image.width for image in images), height), BACKGROUND)
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + _GAP
    return sheet


def stacked(images: Sequence[Image.Image], title: str) -> Image.Image:
    """Return images below one another under a title, where there is one, with a margin around."""
    width = max(image.width for image in images) + 2 * _GAP
    heading = 30 if title else 0
    height = heading + sum(image.height + 2 * _GAP for image in images)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 8), title, INK, font=_font(16))
    y = heading + _GAP
    for number, image in enumerate(images):
        if number:
            draw.line((_GAP, y - _GAP, width - _GAP, y - _GAP), (225, 228, 232))
        sheet.paste(image, (_GAP, y))
        y += image.height + 2 * _GAP
    return sheet


def _with_boxes(
    source: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
) -> Image.Image:
    scale = _SOURCE_PX / max(source.shape[:2])
    size = (round(source.shape[1] * scale), round(source.shape[0] * scale))
    image = Image.fromarray(source).resize(size, Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (_SOURCE_PX, max(size[1], 1)), BACKGROUND)
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    corners = []
    for box, colour in zip(boxes, colours, strict=True):
        x0, y0, x1, y1 = (round(float(v) * size[i % 2]) for i, v in enumerate(box))
        x1, y1 = max(x1 - 1, x0 + 4), max(y1 - 1, y0 + 4)
        draw.rectangle((x0, y0, x1, y1), outline=BACKGROUND, width=4)
        draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=colour, width=2)
        corners.append((x0 + 3, y0 + 3))
    taken: list[tuple[int, int, int, int]] = []
    for corner, name, colour in zip(corners, names, colours, strict=True):
        _tag(draw, corner, name, colour, taken, size)
    return sheet


def _tag(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    colour: tuple[int, int, int],
    taken: list[tuple[int, int, int, int]],
    size: tuple[int, int],
) -> None:
    """Write a name on its colour at `at`, moved down past the tags that are there already."""
    font = _font(11)
    width, height = round(font.getlength(text)) + 6, 15
    x, y = min(at[0], size[0] - width), at[1]
    while any(x < r and l < x + width and y < b and t < y + height for l, t, r, b in taken):  # noqa: E741
        y += height + 1
    taken.append((x, y, x + width, y + height))
    draw.rectangle(taken[-1], fill=colour)
    bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140
    draw.text((x + 3, y + 1), text, INK if bright else BACKGROUND, font=font)


def _tile(
    view: np.ndarray, side: int, name: str, flipped: bool, colour: tuple[int, int, int]
) -> Image.Image:
    """Return a view with a frame in its colour, and its name below."""
    tile = Image.new("RGB", (side + 6, side + 24), BACKGROUND)
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, side + 5, side + 5), fill=colour)
    tile.paste(_resized(view, side), (3, 3))
    # "<>" for mirrored: the default font has no arrow.
    draw.text((1, side + 8), f"{name} <>" if flipped else name, INK, font=_font(11))
    return tile


def _flow(tiles: Sequence[Image.Image], width: int) -> Image.Image:
    """Return tiles in rows of at most `width`, broken as lines of text are."""
    x = y = row = right = 0
    places = []
    for tile in tiles:
        if x and x + tile.width > width:
            x, y, row = 0, y + row + 4, 0
        places.append((x, y))
        x, row = x + tile.width + 8, max(row, tile.height)
        right = max(right, x)
    sheet = Image.new("RGB", (right, y + row), BACKGROUND)
    for tile, place in zip(tiles, places, strict=True):
        sheet.paste(tile, place)
    return sheet


def _joined(
    query: Image.Image,
    key: Image.Image,
    grids: tuple[tuple[int, int], tuple[int, int]],
    pairs: np.ndarray,
    strong: np.ndarray,
    expected: np.ndarray,
) -> Image.Image:
    """Return both views in a row, with grids and a line from each matched cell to its match."""
    sheet = beside([_gridded(query, grids[0]), _gridded(key, grids[1])])
    draw = ImageDraw.Draw(sheet)
    for number in np.argsort(strong, kind="stable"):  # strong ones last, on top
        cell, match = pairs[number]
        right = agrees(np.array([match]), expected[cell : cell + 1], grids[1][1])[0]
        colour = RIGHT if right else WRONG
        start, (x, y) = _centre(cell, grids[0]), _centre(match, grids[1])
        end = (x + _PAIR_PX + _GAP, y)
        radius = 5 if strong[number] else 3
        if strong[number]:
            draw.line((*start, *end), BACKGROUND, width=5)
        draw.line((*start, *end), colour, width=3 if strong[number] else 1)
        for px, py in (start, end):
            place = (px - radius, py - radius, px + radius, py + radius)
            draw.ellipse(place, fill=colour, outline=BACKGROUND)
    return sheet


def _gridded(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    out = image.copy()
    draw = ImageDraw.Draw(out, "RGBA")
    for row in range(1, grid[0]):
        y = row * _PAIR_PX / grid[0]
        draw.line((0, y, _PAIR_PX, y), (255, 255, 255, 70))
    for column in range(1, grid[1]):
        x = column * _PAIR_PX / grid[1]
        draw.line((x, 0, x, _PAIR_PX), (255, 255, 255, 70))
    return out


def _painted(image: Image.Image, grid: tuple[int, int], colours: np.ndarray) -> Image.Image:
    """Return the image in grey with each cell tinted."""
    cells = Image.fromarray(colours.reshape(*grid, 3)).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), cells, 0.55)


def _centre(cell: int, grid: tuple[int, int]) -> tuple[float, float]:
    row, column = divmod(int(cell), grid[1])
    return (column + 0.5) * _PAIR_PX / grid[1], (row + 0.5) * _PAIR_PX / grid[0]


def _captioned(image: Image.Image, text: str) -> Image.Image:
    font = _font(12)
    width = max(image.width, round(font.getlength(text)) + 1)
    sheet = Image.new("RGB", (width, image.height + 22), BACKGROUND)
    sheet.paste(image)
    ImageDraw.Draw(sheet).text((0, image.height + 5), text, SOFT, font=font)
    return sheet


def _resized(view: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(view).resize((side, side), Image.Resampling.BICUBIC)


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
