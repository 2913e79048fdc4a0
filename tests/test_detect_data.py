"""Detection data as distributed, with every defect counted, and what augmentation makes of it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dataprep.synthetic_objects import HEIGHT, WIDTH, voc_annotation, write_rectangles
from dense_ssl.config import UserError, validate
from dense_ssl.evaluation.coco import decode_mask
from dense_ssl.evaluation.detection import train as detect
from dense_ssl.evaluation.detection.augment import (
    TrainingExamples,
    at_test_size,
    drawn_geometry,
    read_image,
)
from dense_ssl.evaluation.detection.data import open_detection, trainable
from dense_ssl.evaluation.detection.protocols import DetectConfig
from dense_ssl.evaluation.trained.draws import Draws

# pycocotools 2.0 speaks to numpy 2 in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
YEARS = ("2007", "2012")


def settings(**given):
    return validate(DetectConfig, given, "detect")


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory):
    return write_rectangles(tmp_path_factory.mktemp("rectangles"), train=4, val=2)


# --- layouts


def test_both_layouts_tell_the_same(rectangles):
    coco = open_detection(rectangles / "coco", None, None, YEARS)
    voc = open_detection(rectangles / "VOCdevkit", None, None, ("2007",))
    assert (coco.layout, voc.layout) == ("coco", "voc")
    assert coco.classes == ("car", "dog", "sofa") and len(voc.classes) == 20
    for a, b in zip(coco.train + coco.val, voc.train + voc.val, strict=True):
        assert (a.height, a.width) == (b.height, b.width) == (HEIGHT, WIDTH)
        told = [(thing.box, coco.classes[thing.label - 1], thing.area) for thing in a.things]
        assert told == [(t.box, voc.classes[t.label - 1], t.area) for t in b.things]
    for root in (rectangles, rectangles / "VOCdevkit/VOC2007"):
        assert open_detection(root, None, None, ("2007",)).content == voc.content
    limited = open_detection(rectangles / "coco", 2, 1, YEARS)
    assert (len(limited.train), len(limited.val)) == (2, 1) and limited.content != coco.content


def test_real_coco(real_images):
    data = open_detection(real_images / "coco-mini", None, None, YEARS)
    assert (len(data.train), len(data.val)) == (294, 128) and len(data.classes) == 80
    assert data.classes[79] == "toothbrush"  # id 90
    assert sum(len(scene.things) for scene in data.train) == 2519
    assert sum(thing.ignored for scene in data.val for thing in scene.things) == 15
    learnt = trainable(data.train, difficult=False)
    assert len(learnt) <= 292 and not any(t.ignored for scene in learnt for t in scene.things)
    assert data.omitted.lines() == []


def test_real_voc(real_images):
    data = open_detection(real_images / "voc-mini", None, None, YEARS)
    assert (len(data.train), len(data.val)) == (42 + 20 + 34 + 16, 40)
    assert data.omitted.lines() == []
    difficult = sum(thing.ignored for scene in data.val for thing in scene.things)
    assert difficult > 0 and len(trainable(data.train, difficult=True)) == len(data.train)


def test_defects_of_coco_are_counted(real_images, tmp_path):
    nasty = real_images / "nasty/coco"
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        shutil.copytree(nasty / "val2017", tmp_path / split)
        name = f"annotations/instances_{split}.json"
        shutil.copyfile(nasty / "annotations/instances_val2017.json", tmp_path / name)
    data = open_detection(tmp_path, None, None, YEARS)
    lines = [line for line in data.omitted.lines() if line.startswith("val2017")]
    counted = {line.split(": ")[1]: int(line.split(": ")[2].split(" ")[0]) for line in lines}
    assert counted == {
        "image of another size than the annotations say": 1,
        "image file missing": 1,
        "image listed twice": 1,
        "annotation with a polygon of fewer than three points": 1,
        "annotation with a box of no size": 2,
        "annotation without a segmentation": 1,
        "annotation of an unknown category": 1,
        "annotation of an unknown image": 1,
        "annotation with run lengths of another size": 1,
        "annotation id used twice": 1,
    }
    outside = [thing for scene in data.val for thing in scene.things if min(thing.box) < 0]
    assert len(outside) == 1  # kept as it is: COCO's own tools do
    config = settings(settings="coco-fpn-1x", short=64)
    examples = TrainingExamples(config)
    for number, scene in enumerate(trainable(data.val, difficult=False)):
        example = examples(scene, Draws(np.uint64(number)))
        assert (example.boxes >= 0).all() and len(example.labels) == len(example.masks)
    shutil.copyfile(
        nasty / "annotations/instances_truncated.json",
        tmp_path / "annotations/instances_train2017.json",
    )
    with pytest.raises(UserError, match="no valid JSON"):
        open_detection(tmp_path, None, None, YEARS)


def test_defects_of_voc_are_counted(rectangles, tmp_path):
    root = tmp_path / "VOCdevkit"
    shutil.copytree(rectangles / "VOCdevkit", root)
    notes = root / "VOC2007/Annotations"
    (notes / "000000.xml").write_text("<annotation><size>")
    (notes / "000001.xml").unlink()
    (root / "VOC2007/JPEGImages/000002.jpg").unlink()
    things = [
        ("car", 1, 1, 10, 10), ("unicorn", 1, 1, 9, 9), ("dog", 5, 5, 0, 4), ("sofa", 500, 5, 9, 9)
    ]  # fmt: skip
    (notes / "000003.xml").write_text(voc_annotation(things))
    (notes / "000100.xml").write_text(voc_annotation(things[:1], height=HEIGHT + 1))
    data = open_detection(root, None, None, ("2007",))
    assert [len(scene.things) for scene in data.train] == [1]
    assert data.omitted.lines() == [
        "VOC2007 trainval: annotation file not readable: 1 (000000.xml)",
        "VOC2007 trainval: annotation file missing: 1 (000001.xml)",
        "VOC2007 trainval: image file missing: 1 (000002.jpg)",
        "VOC2007 trainval: object of an unknown class 'unicorn': 1 (000003, object 1)",
        "VOC2007 trainval: object with a box of no size: 1 (000003, object 2)",
        "VOC2007 trainval: object outside its image: 1 (000003, object 3)",
        "VOC2007 test: image of another size than its annotation says: 1 (000100.jpg)",
    ]
    with pytest.raises(UserError, match=r"train_years=2007 trains on the one alone"):
        open_detection(root, None, None, YEARS)
    for name in ("000100", "000101"):
        (notes / f"{name}.xml").write_text(voc_annotation([("car", 1, 1, 9, 9)], difficult=1))
    refused = "VOC2007 test.*: no object to find: each of its 2 objects is difficult.*000000.xml"
    with pytest.raises(UserError, match=refused):
        open_detection(root, None, None, ("2007",))


def test_what_counts_for_nothing_is_said(rectangles, tmp_path):
    """VOC's training learns difficult objects; COCO's takes neither crowds nor images without an object."""
    root = tmp_path / "VOCdevkit"
    shutil.copytree(rectangles / "VOCdevkit", root)
    for number in range(4):
        path = root / f"VOC2007/Annotations/{number:06}.xml"
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    data = open_detection(root, None, None, ("2007",))
    assert all(thing.ignored for scene in data.train for thing in scene.things)
    assert trainable(data.train, difficult=True) == data.train
    coco = tmp_path / "coco"
    shutil.copytree(rectangles / "coco", coco)
    file = coco / "annotations/instances_train2017.json"
    told = json.loads(file.read_text())
    count = len(told["annotations"])
    told["annotations"] = [each for each in told["annotations"] if each["image_id"] > 1]
    file.write_text(json.dumps(told))
    data = detect.load(coco, settings(settings="coco-fpn-1x"))
    (line,) = data.omitted.lines()
    assert line == "train: image without an object to learn: 2 (000000.jpg, 000001.jpg)"
    assert count > len(told["annotations"])
    for each in told["annotations"]:
        each["iscrowd"] = 1
    file.write_text(json.dumps(told))
    with pytest.raises(
        UserError, match=r"train2017\): no object to find: each of its \d objects is a crowd"
    ):
        open_detection(coco, None, None, YEARS)
    told["annotations"] = []
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match="no object to find: nothing is annotated"):
        open_detection(coco, None, None, YEARS)


def test_what_does_not_go_together_is_refused(rectangles, tmp_path):
    with pytest.raises(UserError, match=r"neither COCO .* nor VOC"):
        open_detection(tmp_path, None, None, YEARS)
    with pytest.raises(UserError, match="the data are COCO's; take settings=coco-fpn-1x"):
        detect.load(rectangles / "coco", settings())
    with pytest.raises(UserError, match="needs masks, VOC has boxes; take settings=voc-c4"):
        detect.load(rectangles, settings(settings="coco-fpn-1x", train_years="2007"))
    data = detect.load(rectangles, settings(settings="coco-fpn-1x", train_years=2007, masks=False))
    assert data.protocol == "detect/coco-fpn-1x/v1*"
    path = tmp_path / "coco"
    shutil.copytree(rectangles / "coco", path)
    file = path / "annotations/instances_val2017.json"
    told = json.loads(file.read_text())
    told["categories"][0]["name"] = "bus"
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match="different categories"):
        open_detection(path, None, None, YEARS)


# --- settings


def test_protocols_are_called_by_their_names():
    for name, published in DetectConfig.published.items():
        assert settings(settings=name).protocol(published.layout) == f"detect/{name}/v1"
        assert settings(settings=name, short=96).protocol(published.layout).endswith("*")
    assert settings(seed=3, precision="bf16", workers=1).protocol("voc") == "detect/voc-c4/v1"
    assert settings(max_val=8).protocol("voc") == "detect/voc-c4/v1*"
    small = settings(settings="coco-cascade-small-1x", short="80,100")
    assert (small.longest, small.test_short, small.crop) == (167, 100, (48, 75))
    assert small.short == (80, 100) and small.position_size == (100, 126)
    with pytest.raises(UserError, match="there are voc-c4, coco-c4-1x"):
        settings(settings="coco")
    with pytest.raises(UserError, match="one, or three of a cascade"):
        settings(overlaps="0.5,0.6")
    with pytest.raises(UserError, match="anchors: one size per level of the pyramid, 5 of them"):
        settings(settings="coco-fpn-1x", anchors="32,64")


# --- images with their boxes and masks


def test_masks_and_boxes_stay_with_their_pixels(rectangles):
    """Objects are of one colour: after any change, what is in a box and a mask still is."""
    data = open_detection(rectangles / "coco", None, None, YEARS)
    colours = np.array([(210, 60, 60), (60, 190, 70), (70, 80, 220)])
    for name in ("coco-fpn-1x", "coco-cascade-small-1x"):
        config = settings(settings=name, short="64,90,120")
        examples = TrainingExamples(config)
        seen = 0
        for key in range(24):
            example = examples(data.train[key % len(data.train)], Draws(np.uint64(key)))
            for box, label, mask in zip(example.boxes, example.labels, example.masks):
                inner = mask.astype(bool)
                if inner.sum() < 200:  # what a cut left
                    continue
                colour = np.median(example.image[inner], axis=0)
                assert np.abs(colour - colours[label - 1]).max() < 16
                rows, columns = np.nonzero(inner)
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert np.abs(box - edges).max() <= 1.01
                seen += 1
            assert example.image.shape[:2] == example.masks.shape[1:]
        assert seen > 12


def test_published_sizes_are_drawn():
    config = settings()
    sides = {
        min(drawn_geometry((375, 500), config, Draws(np.uint64(key))).final) for key in range(200)
    }
    assert sides == set(range(480, 801, 32))
    long = drawn_geometry((300, 1500), config, Draws(np.uint64(0)))
    assert max(long.final) == 1333
    config = settings(settings="coco-cascade-small-1x")
    drawn = [drawn_geometry((480, 640), config, Draws(np.uint64(key))) for key in range(300)]
    cut = [geometry for geometry in drawn if geometry.scaled != (480, 640)]
    assert 110 < len(cut) < 190 and 110 < sum(geometry.mirrored for geometry in drawn) < 190
    assert {min(geometry.scaled) for geometry in cut} == {400, 500, 600}
    for geometry in cut:
        top, left, rows, columns = geometry.window
        assert min(rows, columns) >= 384 and max(rows, columns) <= 600
        assert top + rows <= geometry.scaled[0] and left + columns <= geometry.scaled[1]
    assert at_test_size(np.zeros((375, 500, 3), np.uint8), config).shape == (800, 1067, 3)


def test_run_lengths_and_polygons_of_an_object_agree(real_images):
    """Masks of real objects at another size, beside those of the file resized."""
    data = open_detection(real_images / "coco-mini", None, 30, YEARS)
    config = settings(settings="coco-fpn-1x", short=400)
    agreed = []
    for scene in trainable(data.val, difficult=False):
        geometry = drawn_geometry((scene.height, scene.width), config, Draws(np.uint64(1)))
        for thing in scene.things[:3]:
            if thing.area < 2000:
                continue
            mask = geometry.mask(thing).astype(bool)
            whole = decode_mask(thing.outline, scene.height, scene.width)
            picture = Image.fromarray(whole).resize(geometry.final[::-1], Image.Resampling.NEAREST)
            other = np.asarray(picture)
            other = other[:, ::-1] if geometry.mirrored else other
            agreed.append((mask & other).sum() / (mask | other).sum())
    assert len(agreed) > 20 and np.median(agreed) > 0.97


def test_an_image_of_another_size_than_annotated_is_refused(rectangles, tmp_path):
    data = open_detection(rectangles / "coco", None, None, YEARS)
    scene = data.val[0]
    Image.new("RGB", (10, 10)).save(tmp_path / scene.path.name)
    other = type(scene)(tmp_path / scene.path.name, scene.height, scene.width, scene.things)
    with pytest.raises(ValueError, match="annotated as"):
        read_image(other)
