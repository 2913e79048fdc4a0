"""Sheets show what they say: boxes, views, matches, and the geometry that judges the matches."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dense_ssl import checkpoint
from dense_ssl.augment import MEAN, STD
from dense_ssl.config import UserError
from dense_ssl.loaders.folder import cut_one
from dense_ssl.methods import make_method
from dense_ssl.methods.densecl import DenseCLConfig
from dense_ssl.views import ViewSpec
from dense_ssl.visualise.__main__ import draw, expected_cells, main, mutual_matches
from dense_ssl.visualise.samples import shown
from dense_ssl.visualise.sheets import (
    BACKGROUND,
    RIGHT,
    WRONG,
    agrees,
    cell_colours,
    correspondence_sheet,
    crop_colour,
    crops_sheet,
    stacked,
)

VIEWS = (
    ViewSpec(name="global", count=2, size=64, photometric="moco_v2"),
    ViewSpec(name="local", count=1, size=32, scale=(0.05, 0.3)),
    ViewSpec(name="again", count=1, size=32, twin_of="local", part=0.5),
)


def write_run(folder, views, seed=0):
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(6):
        pixels = rng.integers(0, 255, (6, 8, 3), np.uint8)
        big = Image.fromarray(pixels).resize((120, 90), Image.Resampling.NEAREST)
        big.save(images / f"{number}.png")
    config = DenseCLConfig(
        views=views,
        backbone={"name": "resnet18", "bn_groups": 2},
        hidden_dim=8,
        out_dim=4,
        queue_length=16,
    )
    settings = {
        "method": config.model_dump(mode="json"),
        "data": {"path": str(images), "loader": "ffcv"},
        "train": {"seed": 3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    state = make_method(config).state_dict()
    payload = {"step": 1, "epoch": 0.5, "config": settings, "method": state}
    checkpoint.save(folder / "checkpoints", payload, keep=1)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return write_run(tmp_path_factory.mktemp("run"), VIEWS)


def colours_of(image):
    return {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3)}


# --- crops -----------------------------------------------------------------------------------------


def test_boxes_and_views_stand_on_the_sheet():
    source = np.full((170, 340, 3), 90, np.uint8)
    views = [np.full((64, 64, 3), 10, np.uint8), np.full((32, 32, 3), 200, np.uint8)]
    boxes = np.array([[0.25, 0.2, 0.75, 0.9], [0.8, 0.1, 1.0, 0.4]])
    names = ["global[0]", "local[0]"]
    sheet = np.asarray(crops_sheet(source, boxes, np.array([True, False]), names, views))
    assert (sheet[5, 5] == 90).all()  # the source is drawn 1 : 1 at 340 px
    for box, number in zip(boxes, range(2)):
        x0, y0, x1, y1 = np.round(box * [340, 170, 340, 170]).astype(int)
        colour = crop_colour(number, 2)
        middle = (y0 + y1) // 2
        assert tuple(sheet[middle, x0 + 1]) == colour
        assert tuple(sheet[middle, x1 - 3]) == colour
        assert tuple(sheet[y1 - 3, x1 - 10]) == colour
        assert (sheet[middle, (x0 + x1) // 2] == 90).all()
    right = sheet[:, 340:]
    areas = [(right == value).all(axis=2).sum() for value in (10, 200)]
    assert areas == [144 * 144, 72 * 72]  # sizes in proportion
    for number in range(2):
        assert (right == crop_colour(number, 2)).all(axis=2).sum() > 4 * 72


def test_many_crops_wrap_and_keep_their_own_colours():
    count = 12
    assert len({crop_colour(number, count) for number in range(count)}) == count
    views = [np.zeros((32, 32, 3), np.uint8)] * count
    boxes = np.tile(
        [0.0, 0.0, 0.2, 0.2], (count, 1)
    )  # tags of equal boxes must not cover each other
    names = [f"local[{number}]" for number in range(count)]
    sheet = crops_sheet(
        np.zeros((200, 100, 3), np.uint8), boxes, np.zeros(count, bool), names, views
    )
    assert sheet.height > 2 * 144
    left = sheet.crop((0, 0, 340, sheet.height))
    tags = [crop_colour(number, count) in colours_of(left) for number in range(count)]
    assert all(tags)


def test_views_are_shown_as_before_normalisation():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, :, None]  # [3, 256, 1]
    normalised = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert (shown(normalised) == pixels.movedim(0, -1).numpy()).all()
    assert shown(torch.full((2, 5, 3, 4, 4), 99.0)).shape == (2, 5, 4, 4, 3)


# --- correspondence --------------------------------------------------------------------------------


def test_mutual_matches_against_loops():
    torch.manual_seed(0)
    q, k = torch.randn(12, 5), torch.randn(9, 5)
    pairs, similarity, best = mutual_matches(3 * q, k / 7)
    cosine = torch.nn.functional.cosine_similarity(q[:, None], k[None], dim=2)
    expected = []
    for i in range(12):
        j = max(range(9), key=lambda t: float(cosine[i, t]))
        assert best[i] == j
        if max(range(12), key=lambda s: float(cosine[s, j])) == i:
            expected.append([i, j])
    assert pairs.tolist() == expected
    torch.testing.assert_close(similarity, torch.stack([cosine[i, j] for i, j in expected]))


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_expected_cells_point_at_the_same_source_pixel(flips):
    """Cut both crops from an image that holds its own coordinates; matched places must read alike."""
    y, x = np.mgrid[0:240, 0:240].astype(np.uint8)
    image = Image.fromarray(np.stack([x, y, x], axis=2))
    boxes = np.array([[20, 30, 180, 190], [60, 10, 220, 170]], np.int16)
    view = ViewSpec(name="v", count=1, size=160)
    query, key = (cut_one(image, box, flip, view).numpy() for box, flip in zip(boxes, flips))
    grids = ((5, 5), (8, 8))
    places = expected_cells(boxes / 240, np.array(flips), grids)
    assert 0 < np.isnan(places[:, 0]).sum() < 25
    for cell, (row, column) in enumerate(places):
        at = [round((index + 0.5) * 32 - 0.5) for index in divmod(cell, 5)]
        here = query[:2, at[0], at[1]].astype(int)
        if np.isnan(row):
            x0, y0, x1, y1 = boxes[1]
            assert not (x0 < here[0] < x1 and y0 < here[1] < y1)
        else:
            there = key[:2, min(int(row * 20), 159), min(int(column * 20), 159)].astype(int)
            assert np.abs(here - there).max() <= 2


def test_equal_crops_match_themselves():
    box = np.array([[0.1, 0.2, 0.6, 0.9]] * 2)
    places = expected_cells(box, np.array([False, False]), ((3, 4), (3, 4)))
    assert agrees(np.arange(12), places, 4).all()
    mirrored = expected_cells(box, np.array([False, True]), ((3, 4), (3, 4)))
    own = np.array([row * 4 + 3 - column for row in range(3) for column in range(4)])
    assert agrees(own, mirrored, 4).all()
    assert not agrees(own, places, 4).all()
    assert not agrees(np.arange(12), np.full((12, 2), np.nan), 4).any()


def test_lines_are_green_or_red_by_geometry_and_thick_if_strong():
    views = (np.zeros((64, 64, 3), np.uint8),) * 2
    places = expected_cells(
        np.array([[0, 0, 1, 1]] * 2), np.array([False, False]), ((4, 4), (4, 4))
    )
    best = np.arange(16)

    def drawn(pairs, strong):
        sheet = correspondence_sheet(
            views,
            ((4, 4), (4, 4)),
            best,
            np.array(pairs).reshape(-1, 2),
            np.array(strong, bool),
            places,
        )
        pixels = np.asarray(sheet)
        return {c: int((pixels == c).all(axis=2).sum()) for c in (RIGHT, WRONG)}

    assert drawn([], []) == {RIGHT: 0, WRONG: 0}
    thin, thick = drawn([[0, 0]], [False]), drawn([[0, 0]], [True])
    assert thin[WRONG] == thick[WRONG] == 0
    assert thick[RIGHT] > 2 * thin[RIGHT] > 0
    wrong = drawn([[0, 15]], [True])
    assert wrong[RIGHT] == 0
    assert wrong[WRONG] > 0


def test_cell_colours_tell_places_apart():
    assert len(np.unique(cell_colours(7, 7), axis=0)) == 49
    assert cell_colours(2, 3).shape == (6, 3)


def test_sheets_stack_below_a_title():
    parts = [Image.new("RGB", (50, 20), (1, 2, 3)), Image.new("RGB", (90, 30), (4, 5, 6))]
    sheet = stacked(parts, "title")
    pixels = np.asarray(sheet)
    assert (pixels == (1, 2, 3)).all(axis=2).sum() == 50 * 20
    assert (pixels == (4, 5, 6)).all(axis=2).sum() == 90 * 30
    assert tuple(pixels[0, 0]) == BACKGROUND


# --- a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crops", "correspondence"])
def test_a_run_is_drawn_the_same_every_time(run, tmp_path, kind):
    for name in ("a.png", "b.png"):
        draw(run, kind, tmp_path / name, count=3, epoch=1, size=None)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.width > 500
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw(run, kind, tmp_path / "other.png", count=3, epoch=2, size=None)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_views_can_be_drawn_larger_than_trained(run, tmp_path):
    draw(run, "correspondence", tmp_path / "a.png", count=1, epoch=0, size=128)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_what_is_wrong_is_said_in_one_sentence(run, tmp_path, capsys):
    single = write_run(tmp_path / "single", (ViewSpec(name="one", count=1, size=32),))
    for arguments, words in {
        ("--run", str(run), "--kind", "heads"): "choose from crops, masks, correspondence",
        ("--run", str(tmp_path / "none")): "no usable config.yaml",
        ("--run", str(single), "--kind", "correspondence"): "has one crop",
        ("--run", str(run), "--kind", "crops,pca", "--out", "x.png"): "--out names one picture",
        ("--run", str(run), "--out", "/proc/nowhere/a.png"): "cannot be written",
    }.items():
        assert main([*arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    (single / "config.yaml").write_text("method: {name: x}\ndata: {path: /}\ntrain: {seed: 0}\n")
    with pytest.raises(UserError, match="'x' is none of"):
        draw(single, "crops", tmp_path / "a.png", 1, 0, None)


def test_the_command_line_writes_into_the_run(run, capsys):
    assert main(["--run", str(run), "--images", "2"]) == 0
    assert capsys.readouterr().out == f"{run / 'crops.png'}\n"
    assert (run / "crops.png").is_file()
    kinds = ["masks", "correspondence"]  # there are no masks: one that cannot be is no hindrance
    assert main(["--run", str(run), "--images", "1", "--kind", ",".join(kinds)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{run / 'correspondence.png'}\n" and err.startswith("error: ")
