"""Average precision of boxes and masks, by COCO's rules and by VOC2007's.

COCO: pycocotools itself. VOC: the class-mean 11-point average precision of VOC2007 at ten overlaps, .50 to
.95, as detectron2 reports it: `AP` is their mean. Its files have 1-based inclusive pixels, boxes with one
decimal and scores with three; a match overlaps by more than the threshold; objects called difficult are
neither found nor missed.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dense_ssl.evaluation.coco import Rle
from dense_ssl.evaluation.detection.data import Scene
from dense_ssl.evaluation.voc import voc_ap_11point

_THRESHOLDS = np.arange(50, 100, 5) / 100
_FIRST = np.array([1.0, 1.0, 0.0, 0.0])  # from continuous pixels to 1-based inclusive ones


@dataclass(frozen=True, slots=True)
class Found:
    """What a detector says of one image, in the pixels of the file."""

    boxes: np.ndarray  # float [n, 4] of x0, y0, x1, y1
    scores: np.ndarray  # float [n]
    labels: np.ndarray  # int [n], from 1
    masks: tuple[Rle, ...] | None = None  # COCO's compressed run lengths


def coco_scores(
    scenes: Sequence[Scene], found: Sequence[Found], *, by: Literal["bbox", "segm"]
) -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm and APl in percent, as pycocotools says.

    One that no object counts for (there is no small one, say) is left out.
    """
    judge: Any = COCO()
    judge.dataset = _dataset(scenes)
    answers: list[dict[str, Any]] = []
    for number, said in enumerate(found, 1):
        for index, (box, score, label) in enumerate(zip(said.boxes, said.scores, said.labels)):
            x0, y0, x1, y1 = (float(side) for side in box)
            answer = {"image_id": number, "category_id": int(label), "score": float(score)}
            if by == "segm":
                assert said.masks is not None
                answer["segmentation"] = said.masks[index]
            else:
                answer["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            answers.append(answer)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports as it goes
        judge.createIndex()
        # Without an answer loadRes has no type to read off it.
        loaded = judge.loadRes(answers) if answers else _without_answers(judge)
        evaluation = COCOeval(judge, loaded, by)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    values = dict(zip(names, evaluation.stats[:6].tolist()))
    return {name: 100 * value for name, value in values.items() if value >= 0}


def voc_scores(
    scenes: Sequence[Scene], found: Sequence[Found], classes: Sequence[str]
) -> tuple[dict[str, float], list[str]]:
    """Return AP, AP50 and AP75 in percent, and the classes that no object of the split counts for.

    Those are in no mean.
    """
    rows = []  # of classes, a precision at every threshold
    absent = []
    for label, name in enumerate(classes, 1):
        precisions = _class_precisions(scenes, found, label)
        if precisions is None:
            absent.append(name)
        else:
            rows.append(precisions)
    means = 100 * np.mean(rows, axis=0)
    at = dict(zip(_THRESHOLDS.tolist(), means.tolist()))
    return {"AP": float(means.mean()), "AP50": at[0.5], "AP75": at[0.75]}, absent


def inclusive_overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union of a box [4] with others [n, 4], 1-based inclusive pixels."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.maximum(high - low + 1, 0).prod(1)
    return common / ((box[2:] - box[:2] + 1).prod() + _areas(others) - common)


def _class_precisions(
    scenes: Sequence[Scene], found: Sequence[Found], label: int
) -> np.ndarray | None:
    """Average precision at every threshold; None where no object counts."""
    truths, difficult = [], []
    for scene in scenes:
        things = [thing for thing in scene.things if thing.label == label]
        boxes = np.array([thing.box for thing in things], np.float64).reshape(-1, 4)
        truths.append(boxes + _FIRST)
        difficult.append(np.array([thing.ignored for thing in things], bool))
    objects = sum(int((~skipped).sum()) for skipped in difficult)
    if not objects:
        return None
    of_image, scores, boxes = [], [], []
    for number, said in enumerate(found):
        chosen = said.labels == label
        boxes.append(np.round(said.boxes[chosen].astype(np.float64) + _FIRST, 1))
        scores.append(np.round(said.scores[chosen].astype(np.float64), 3))
        of_image += [number] * int(chosen.sum())
    answers, confidence = np.concatenate(boxes), np.concatenate(scores)
    order = np.argsort(-confidence, kind="stable")
    best = np.full(len(answers), -1, np.int64)  # the object of most overlap
    overlap = np.full(len(answers), -np.inf)
    for index in range(len(answers)):
        others = truths[of_image[index]]
        if len(others):
            overlaps = inclusive_overlaps(answers[index], others)
            best[index] = overlaps.argmax()
            overlap[index] = overlaps[best[index]]
    return np.array(
        [
            _precision(order, np.array(of_image), best, overlap > t, difficult, objects)
            for t in _THRESHOLDS
        ]
    )


def _precision(
    order: np.ndarray,
    of_image: np.ndarray,
    best: np.ndarray,
    near: np.ndarray,
    difficult: Sequence[np.ndarray],
    objects: int,
) -> float:
    """11-point average precision where `near` [n] says which answers overlap enough with their best."""
    right, wrong = np.zeros(len(order)), np.zeros(len(order))
    taken: set[tuple[int, int]] = set()
    for place, index in enumerate(order.tolist()):
        thing = (int(of_image[index]), int(best[index]))
        if near[index] and difficult[thing[0]][thing[1]]:
            continue
        if near[index] and thing not in taken:
            taken.add(thing)
            right[place] = 1
        else:
            wrong[place] = 1
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    precision = hits / np.maximum(hits + misses, np.finfo(np.float64).eps)
    return voc_ap_11point(hits / objects, precision)


def _dataset(scenes: Sequence[Scene]) -> dict[str, Any]:
    """The scenes as COCO's own structure, all numbers from 1: 0 is no object to it."""
    images, annotations, labels = [], [], set()
    for number, scene in enumerate(scenes, 1):
        images.append({"id": number, "height": scene.height, "width": scene.width})
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            labels.add(thing.label)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": thing.label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": thing.area,
                    "iscrowd": int(thing.ignored),
                    "segmentation": thing.outline,
                }
            )
    categories = [{"id": label} for label in sorted(labels)]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {}}


def _without_answers(judge: Any) -> COCO:
    empty: Any = COCO()
    empty.dataset = judge.dataset | {"annotations": []}
    empty.createIndex()
    return empty


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
