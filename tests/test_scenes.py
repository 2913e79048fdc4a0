"""Rendered scenes: determinism, truth of the polygons, COCO's format, behaviour when interrupted."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep.manifest import DataError
from dataprep.outlines import mask_to_polygons
from dataprep.scene_painting import MIN_VISIBLE_PX, paint_scene
from dataprep.scene_shapes import CLASSES
from dataprep.scenes import render
from dataprep.synthetic import (
    coordinate_image,
    random_image,
    write_class_folders,
    write_random_images,
)
from tests.test_pretrain import is_alive, ranks_below

# pycocotools 2.0 speaks to numpy 2 in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COCO_IMAGE_KEYS = {
    "license", "file_name", "coco_url", "height", "width", "date_captured", "flickr_url", "id"
}  # fmt: skip
COCO_ANNOTATION_KEYS = {
    "segmentation", "area", "iscrowd", "image_id", "bbox", "category_id", "id"
}  # fmt: skip


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "a"
    render(out, count=12, seed=3, workers=1, val_share=0.25)
    return out


def rasterised(polygons: list[list[float]], shape: tuple[int, ...]) -> np.ndarray:
    coco_mask = pytest.importorskip("pycocotools.mask")
    pieces = coco_mask.frPyObjects(polygons, shape[0], shape[1])
    return coco_mask.decode(coco_mask.merge(pieces)).astype(bool)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


# --- synthetic images


def test_coordinate_image_reads_its_own_position():
    image = coordinate_image(50, 200)
    assert image.shape == (50, 200, 3) and image.dtype == np.uint8
    for y, x in [(0, 0), (49, 199), (17, 101)]:
        assert abs(image[y, x, 0] / 255 - (x + 0.5) / 200) <= 0.5 / 255
        assert abs(image[y, x, 1] / 255 - (y + 0.5) / 50) <= 0.5 / 255
    assert len(np.unique(image[..., 2])) == 1


def test_random_images_are_reproducible_and_differ(tmp_path):
    first = write_random_images(tmp_path / "a", 4, seed=1, sizes=[(40, 60), (60, 40)])
    second = write_random_images(tmp_path / "b", 2, seed=1, sizes=[(40, 60), (60, 40)])
    assert [p.read_bytes() for p in first[:2]] == [p.read_bytes() for p in second]
    assert len({p.read_bytes() for p in first}) == 4
    assert size_of(first[1]) == (40, 60)
    assert random_image(64, 64, 0).std() > 20


def test_class_folders(tmp_path):
    paths = write_class_folders(tmp_path, classes=3, per_class=2, size=(32, 48))
    assert [p.parent.name for p in paths] == [f"class_{k}" for k in (0, 0, 1, 1, 2, 2)]
    assert size_of(paths[0]) == (48, 32)


# --- polygons


def test_polygons_of_simple_masks():
    mask = np.zeros((8, 10), bool)
    mask[2:5, 3:9] = True
    (polygon,) = mask_to_polygons(mask)
    corners = {(x, y) for x, y in zip(polygon[::2], polygon[1::2])}
    assert corners == {(3, 2), (9, 2), (9, 5), (3, 5)}
    assert mask_to_polygons(np.zeros((5, 5), bool)) == []


def test_polygons_of_holes_pieces_and_corners():
    y, x = np.mgrid[:90, :120]
    ring = np.abs(np.hypot(x - 40, y - 44) - 25) < 8
    two_holes = (np.abs(x - 95) < 20) & (np.abs(y - 40) < 30)
    two_holes &= (np.hypot(x - 95, y - 25) > 8) & (np.hypot(x - 95, y - 55) > 8)
    diagonal = np.zeros_like(ring)
    diagonal[2:8, 2:8] = diagonal[8:14, 8:14] = True  # touch in one corner
    for mask in (ring, two_holes, ring | two_holes, diagonal):
        assert iou(rasterised(mask_to_polygons(mask), mask.shape), mask) > 0.95


def test_polygons_of_random_blobs():
    for seed in range(20):
        field = random_image(70, 90, seed)[..., 0]
        mask = field > np.median(field)
        got = rasterised(mask_to_polygons(mask, tolerance=0.5), mask.shape)
        # specks below MIN_PIECE_PX are dropped on purpose
        assert iou(got, mask) > 0.9


# --- scenes


def test_scene_is_a_pure_function_of_seed_and_index():
    first, again = paint_scene(5, 2), paint_scene(5, 2)
    assert (first.image == again.image).all() and (first.owner == again.owner).all()
    assert paint_scene(5, 3).image.tobytes() != first.image.tobytes()
    assert paint_scene(6, 2).image.tobytes() != first.image.tobytes()


def test_scenes_are_varied():
    scenes = [paint_scene(0, index) for index in range(40)]
    counts = [len(scene.categories) for scene in scenes]
    assert min(counts) >= 2 and max(counts) <= 10 and np.mean(counts) > 4
    assert {c for scene in scenes for c in scene.categories} == set(range(len(CLASSES)))
    covered = np.mean([(scene.owner > 0).mean() for scene in scenes])
    assert 0.08 < covered < 0.5
    areas = [
        (scene.owner == k).sum() for scene in scenes for k in range(1, len(scene.categories) + 1)
    ]
    assert min(areas) >= MIN_VISIBLE_PX
    assert max(areas) > 20 * min(areas)  # near and far
    assert all(scene.image.std() > 8 for scene in scenes)


def test_brightness_does_not_give_objects_away():
    inside, outside = [], []
    for index in range(40):
        scene = paint_scene(1, index)
        grey = scene.image.mean(2)
        inside.append(grey[scene.owner > 0].mean())
        outside.append(grey[scene.owner == 0].mean())
    brighter = np.mean(np.array(inside) > np.array(outside))
    assert 0.2 < brighter < 0.8


def test_written_set_is_coco(rendered):
    for split, images in (("train2017", 9), ("val2017", 3)):
        data = json.loads((rendered / f"annotations/instances_{split}.json").read_text())
        assert set(data) == {"info", "licenses", "images", "annotations", "categories"}
        assert len(data["images"]) == images
        assert len(data["categories"]) == len(CLASSES) >= 8
        assert len({entry["id"] for entry in data["annotations"]}) == len(data["annotations"])
        assert all(set(entry) == COCO_IMAGE_KEYS for entry in data["images"])
        assert all(set(entry) == COCO_ANNOTATION_KEYS for entry in data["annotations"])
        for entry in data["images"]:
            with Image.open(rendered / split / entry["file_name"]) as image:
                assert image.size == (entry["width"], entry["height"])
                assert min(image.size) >= 256 and max(image.size) <= 320


def test_polygons_match_what_is_visible(rendered):
    data = json.loads((rendered / "annotations/instances_train2017.json").read_text())
    by_image: dict[int, list] = {}
    for entry in data["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry)
    for image_id, entries in by_image.items():
        scene = paint_scene(3, image_id - 1)
        assert len(entries) == len(scene.categories)
        for number, entry in enumerate(entries, start=1):
            visible = scene.owner == number
            assert entry["category_id"] == scene.categories[number - 1] + 1
            assert entry["area"] == visible.sum()
            assert iou(rasterised(entry["segmentation"], visible.shape), visible) > 0.95
            x, y, w, h = (int(value) for value in entry["bbox"])
            assert visible[y : y + h, x : x + w].sum() == visible.sum()
            assert visible[y].any() and visible[y + h - 1].any()
            assert visible[:, x].any() and visible[:, x + w - 1].any()


def test_pycocotools_reads_it(rendered, capsys):
    coco = pytest.importorskip("pycocotools.coco")
    truth = coco.COCO(str(rendered / "annotations/instances_val2017.json"))
    assert len(truth.getImgIds()) == 3
    assert all(truth.annToMask(entry).any() for entry in truth.loadAnns(truth.getAnnIds()))


def test_workers_do_not_change_a_byte(rendered, tmp_path):
    render(tmp_path / "b", count=12, seed=3, workers=3, val_share=0.25)
    assert files(tmp_path / "b") == files(rendered)


def test_complete_set_is_left_alone(rendered):
    before = {path: path.stat().st_mtime_ns for path in rendered.rglob("*")}
    seen = []
    render(rendered, 12, 3, workers=1, val_share=0.25, progress=lambda *done: seen.append(done))
    assert {path: path.stat().st_mtime_ns for path in rendered.rglob("*")} == before
    assert seen == [(12, 12)]


def test_other_options_and_other_folders_are_refused(rendered, tmp_path):
    with pytest.raises(DataError, match="other options"):
        render(rendered, count=12, seed=4, workers=1, val_share=0.25)
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="not a set of rendered scenes"):
        render(tmp_path, count=2, workers=1)
    with pytest.raises(DataError, match="cannot be written"):
        render(tmp_path / "holiday.jpg" / "below", count=2, workers=1)
    for bad in ({"count": 0}, {"seed": -1}, {"val_share": 1.0}, {"workers": 0}):
        with pytest.raises(DataError, match=next(iter(bad))):
            render(tmp_path / "c", **bad)


def test_killed_and_repeated_ends_with_the_same_bytes(rendered, tmp_path):
    """SIGKILL while two workers render: no annotation file, no worker left, and a clean repeat."""
    out = tmp_path / "k"
    code = (
        "from pathlib import Path; from dataprep.scenes import render\n"
        f"if __name__ == '__main__': render(Path({str(out)!r}), 2000, 3, workers=2)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, str(script)], env={"PYTHONPATH": str(root)})
    deadline = time.monotonic() + 120
    while not list(out.glob("train2017/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = ranks_below(process.pid)
    process.kill()
    process.wait()
    assert not list(out.glob("annotations/*"))
    while alive := [pid for pid in workers if is_alive(pid)]:  # the orphans notice and end
        assert time.monotonic() < deadline, f"{alive} of {workers} outlive the command"
        time.sleep(0.1)
    assert 0 < len(list(out.glob("train2017/*.jpg"))) < 1800
    with pytest.raises(DataError, match="other options"):
        render(out, count=12, seed=3, workers=1, val_share=0.25)
    (out / "scenes.json").write_bytes((rendered / "scenes.json").read_bytes())
    for path in out.glob("*2017/*"):
        if int(path.name.strip(".").partition(".")[0]) > 9:
            path.unlink()
    render(out, count=12, seed=3, workers=1, val_share=0.25)
    for path in list(out.rglob(".*.part")):
        path.unlink()
    assert files(out) == files(rendered)
