"""Average precision against counting by hand: COCO's rules and VOC2007's, on friendly and hostile answers."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dense_ssl.evaluation.detection.data import Scene, Thing
from dense_ssl.evaluation.detection.masks import encoded
from dense_ssl.evaluation.detection.metrics import (
    Found,
    coco_scores,
    inclusive_overlaps,
    voc_scores,
)

# pycocotools 2.0 speaks to numpy 2 in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
H, W = 120, 160
CLASSES = ("ball", "cube", "cone")


def scene_of(number, things):
    made = []
    for box, label, ignored in things:
        mask = rectangle(box)
        made.append(
            Thing(tuple(box), label, ignored, float(mask.sum()), text(encoded(mask[None])[0]))
        )
    return Scene(f"{number}.jpg", H, W, tuple(made))


def text(run):
    return {"size": run["size"], "counts": run["counts"].decode()}


def rectangle(box):
    mask = np.zeros((H, W), np.uint8)
    x0, y0, x1, y1 = (round(float(side)) for side in box)
    mask[max(y0, 0) : y1, max(x0, 0) : x1] = 1
    return mask


def found_of(answers):
    boxes = np.array([box for box, _, _ in answers], np.float64).reshape(-1, 4)
    masks = encoded(np.stack([rectangle(box) for box in boxes])) if len(boxes) else ()
    return Found(
        boxes,
        np.array([score for _, score, _ in answers], np.float64),
        np.array([label for _, _, label in answers], np.int64),
        masks,
    )


def draw_box(rng, least=2):
    x0, y0 = rng.integers(0, W - 60), rng.integers(0, H - 60)
    return [x0, y0, x0 + rng.integers(least, 60), y0 + rng.integers(least, 60)]


def drawn(seed, images=12):
    """Objects of all sizes, crowds, one-pixel objects, empty images; answers near, far and twice."""
    rng = np.random.default_rng(seed)
    scenes, found = [], []
    for number in range(images):
        things = [
            (draw_box(rng, 1), int(rng.integers(1, 3)), bool(rng.random() < 0.2))  # never a cone
            for _ in range(rng.integers(0, 6))
        ]
        if number == 3:
            things.append(([5, 5, 6, 6], 1, False))
        answers = []
        for box, label, _ in things:
            for _ in range(rng.integers(0, 3)):
                moved = np.array(box) + rng.integers(-4, 5, 4)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 1)
                answers.append((moved, round(rng.random(), 2), label))
        answers += [
            (draw_box(rng), round(rng.random(), 2), int(rng.integers(1, 4))) for _ in range(4)
        ]
        scenes.append(scene_of(number, things))
        found.append(found_of(answers))
    return scenes, found


# --- VOC


def voc_by_hand(scenes, found, label, threshold):
    """The VOC rules told with loops: 11 points, inclusive pixels, difficult objects passed over."""
    truth = [
        [
            ((b[0] + 1, b[1] + 1, b[2], b[3]), t.ignored)
            for t in s.things
            for b in [t.box]
            if t.label == label
        ]
        for s in scenes
    ]
    wanted = sum(not ignored for things in truth for _, ignored in things)
    answers = []
    for image, said in enumerate(found):
        for box, score, of in zip(said.boxes, said.scores, said.labels):
            if of == label:
                x0, y0, x1, y1 = (
                    float(f"{v:.1f}") for v in (box[0] + 1, box[1] + 1, box[2], box[3])
                )
                answers.append((float(f"{score:.3f}"), image, (x0, y0, x1, y1)))
    answers.sort(key=lambda answer: -answer[0])
    used, right, curve = set(), 0, []
    judged = 0
    for _, image, a in answers:
        best, which = -1.0, -1
        for at, (b, _) in enumerate(truth[image]):
            wide = min(a[2], b[2]) - max(a[0], b[0]) + 1
            high = min(a[3], b[3]) - max(a[1], b[1]) + 1
            common = max(wide, 0) * max(high, 0)
            union = (
                (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
                + (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
                - common
            )
            if common / union > best:
                best, which = common / union, at
        if best > threshold and truth[image][which][1]:
            curve.append((right / wanted, right / max(judged, 1e-9) if judged else 0.0))
            continue
        judged += 1
        if best > threshold and (image, which) not in used:
            used.add((image, which))
            right += 1
        curve.append((right / wanted, right / judged))
    total = 0.0
    for point in range(11):
        total += max((p for r, p in curve if r >= np.arange(0, 1.1, 0.1)[point]), default=0.0)
    return total / 11


@pytest.mark.parametrize("seed", range(6))
def test_voc_equals_counting_by_hand(seed):
    scenes, found = drawn(seed)
    values, absent = voc_scores(scenes, found, CLASSES)
    assert absent == ["cone"]
    by_hand = np.array(
        [
            [voc_by_hand(scenes, found, label, t / 100) for t in range(50, 100, 5)]
            for label in (1, 2)
        ]
    ).mean(0)
    assert values["AP"] == pytest.approx(100 * by_hand.mean())
    assert values["AP50"] == pytest.approx(100 * by_hand[0])
    assert values["AP75"] == pytest.approx(100 * by_hand[5])
    assert 5 < values["AP50"] < 95  # the case is no trivial one


def test_voc_of_the_truth_is_100_and_of_nothing_0():
    scenes, _ = drawn(1)
    told = [found_of([(t.box, 0.9, t.label) for t in s.things]) for s in scenes]
    assert voc_scores(scenes, told, CLASSES)[0] == {"AP": 100, "AP50": 100, "AP75": 100}
    nothing = [found_of([])] * len(scenes)
    assert voc_scores(scenes, nothing, CLASSES)[0] == {"AP": 0, "AP50": 0, "AP75": 0}


def test_voc_passes_over_what_is_difficult():
    scene = scene_of(0, [([10, 10, 50, 50], 1, False), ([80, 80, 110, 110], 1, True)])
    easy, hard = ([10, 10, 50, 50], 0.5, 1), ([80, 80, 110, 110], 0.9, 1)
    for answers in ([easy], [easy, hard], [easy, hard, hard]):
        assert voc_scores([scene], [found_of(answers)], ("ball",))[0]["AP"] == 100
    twice = [easy, (easy[0], 0.7, 1), ([0, 60, 20, 90], 0.9, 1)]  # one wrong above, one twice
    values = voc_scores([scene], [found_of(twice)], ("ball",))[0]
    assert values["AP50"] == pytest.approx(50.0)  # precision 1/2 at recall 1


def test_overlaps_count_pixels_inclusively():
    box, other = np.array([1.0, 1, 10, 10]), np.array([[1.0, 1, 10, 5], [11, 11, 12, 12]])
    assert inclusive_overlaps(box, other).tolist() == [0.5, 0.0]
    # Exactly at the threshold is no match.
    scene = scene_of(0, [([0, 0, 10, 10], 1, False)])
    half = voc_scores([scene], [found_of([([0, 0, 10, 5], 0.9, 1)])], ("ball",))[0]
    assert half["AP50"] == 0


# --- COCO


def coco_by_file(scenes, found, by):
    """The same through pycocotools as its own example goes: files' dictionaries, then loadRes."""
    annotations, answers = [], []
    for image, (scene, said) in enumerate(zip(scenes, found), 100):
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            annotations.append(
                {
                    "id": 7 + len(annotations), "image_id": image, "category_id": 10 * thing.label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": int(thing.ignored),
                    "area": thing.area, "segmentation": thing.outline,
                }
            )  # fmt: skip
        for box, score, label, mask in zip(said.boxes, said.scores, said.labels, said.masks):
            entry = {"image_id": image, "category_id": 10 * int(label), "score": float(score)}
            x0, y0, x1, y1 = map(float, box)
            entry |= (
                {"bbox": [x0, y0, x1 - x0, y1 - y0]} if by == "bbox" else {"segmentation": mask}
            )
            answers.append(entry)
    truth = COCO()
    truth.dataset = {
        "info": {}, "annotations": annotations, "categories": [{"id": 10 * n} for n in (1, 2, 3)],
        "images": [{"id": 100 + n, "height": H, "width": W} for n in range(len(scenes))],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(answers), by)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [100 * value for value in judge.stats[:6]]


@pytest.mark.parametrize("by", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_coco_equals_pycocotools(seed, by):
    scenes, found = drawn(seed)
    values = coco_scores(scenes, found, by=by)
    expected = coco_by_file(scenes, found, by)
    for name, value in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), expected):
        assert values.get(name, -100) == pytest.approx(value)
    assert 5 < values["AP50"] < 95 and "APl" not in values  # no object of 96 x 96 px there


def coco_by_hand(scenes, found, label, threshold):
    """COCO's rules told with loops: 101 points, greedy by score, crowds matched last and not counted."""
    wanted = sum(not t.ignored for s in scenes for t in s.things if t.label == label)
    judged = []
    for image, (scene, said) in enumerate(zip(scenes, found)):
        things = [t for t in scene.things if t.label == label]
        used = set()
        order = [i for i in np.argsort(-said.scores, kind="stable") if said.labels[i] == label]
        for i in order:
            a, best, which = said.boxes[i], threshold, None
            for ignored in (False, True):
                if which is not None:
                    break
                for at, thing in enumerate(things):
                    if thing.ignored != ignored or (at in used and not ignored):
                        continue
                    b = thing.box
                    common = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(
                        min(a[3], b[3]) - max(a[1], b[1]), 0
                    )
                    area = (a[2] - a[0]) * (a[3] - a[1])
                    union = area + (b[2] - b[0]) * (b[3] - b[1]) - common
                    overlap = common / (area if ignored else union)
                    if overlap >= best:
                        best, which = overlap, at
            if which is None:
                judged.append((said.scores[i], image, False))
            elif not things[which].ignored:
                used.add(which)
                judged.append((said.scores[i], image, True))
    judged.sort(key=lambda entry: -entry[0])
    right, curve = 0, []
    for count, (_, _, hit) in enumerate(judged, 1):
        right += hit
        curve.append((right / wanted, right / count))
    points = np.linspace(0, 1, 101)
    return sum(max((p for r, p in curve if r >= t), default=0.0) for t in points) / 101


@pytest.mark.parametrize("seed", range(3))
def test_coco_boxes_equal_counting_by_hand(seed):
    scenes, found = drawn(seed)
    values = coco_scores(scenes, found, by="bbox")
    at50 = np.mean([coco_by_hand(scenes, found, label, 0.5) for label in (1, 2)])
    at75 = np.mean([coco_by_hand(scenes, found, label, 0.75) for label in (1, 2)])
    assert values["AP50"] == pytest.approx(100 * at50, abs=1e-6)
    assert values["AP75"] == pytest.approx(100 * at75, abs=1e-6)


def test_coco_of_the_truth_is_100_and_of_nothing_0():
    scenes, _ = drawn(1)
    told = [found_of([(t.box, 0.9, t.label) for t in s.things if not t.ignored]) for s in scenes]
    nothing = [found_of([])] * len(scenes)
    for by in ("bbox", "segm"):
        assert coco_scores(scenes, told, by=by)["AP"] == pytest.approx(100)
        assert set(coco_scores(scenes, nothing, by=by).values()) == {0.0}


def test_crowds_are_neither_found_nor_missed():
    scene = scene_of(0, [([10, 10, 50, 50], 1, False), ([60, 60, 110, 110], 1, True)])
    inside = [([62 + n, 62, 80 + n, 90], 0.9, 1) for n in range(3)]
    for answers in ([([10, 10, 50, 50], 0.5, 1)], [([10, 10, 50, 50], 0.5, 1), *inside]):
        for by in ("bbox", "segm"):
            assert coco_scores([scene], [found_of(answers)], by=by)["AP"] == pytest.approx(100)
