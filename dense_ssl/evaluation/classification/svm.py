"""Linear support vector machines on VOC07 classification, one per class; mean average precision.

Three published ways, which are not comparable with each other:

* `cost-grid` (OpenSelfSup's, used by DenseCL): features pooled to about 9,000 numbers from a stage of a
  ResNet, images squashed to 224 x 224; the cost of each class is chosen among 19 by three-fold
  cross-validation. Images in which a class is only difficult are trained as negatives and not tested.
* `low-shot`: the same features, k positive and 19 k negative images per class, several samplings; the
  cost is chosen on the test split, as published.
* `fixed` (Van Gansbeke et al., arXiv:2106.05967): globally pooled features of centre crops and one cost,
  0.5; difficult counts as absent in training and in testing.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation.choices import Several
from dense_ssl.evaluation.classification.data import Picture, open_picture, read_picture
from dense_ssl.evaluation.classification.stages import StageFeatures
from dense_ssl.evaluation.classification.svm_fit import (
    FIXED_COST,
    FOLDS,
    Problem,
    cross_validated_cost,
    precision,
    unit_rows,
)
from dense_ssl.evaluation.classification.voc_data import DIFFICULT, PRESENT, VocData, open_voc
from dense_ssl.evaluation.features import FeatureCache, content_key, extract
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.voc import svm_cost_grid
from dense_ssl.loaders import share_of_cores

_NEGATIVES = 19  # per positive image in low-shot training
_SIZE = 224  # the specified poolings are for this input


class Config(BaseConfig):
    """Settings of the protocol."""

    variant: Literal["cost-grid", "low-shot", "fixed"] = "cost-grid"
    features: Several[Literal["feat1", "feat2", "feat3", "feat4", "feat5", "pooled"]] = ()
    # of a ResNet; () is feat5 (fixed: pooled). A ViT has `pooled`, its first class token
    year: str = "2007"
    train: str = "trainval"
    test: str = "test"
    shots: Several[Annotated[int, Field(ge=1)]] = (1, 2, 4, 8, 16, 32, 64, 96)
    samplings: Annotated[int, Field(ge=1)] = 5  # of low-shot training sets
    seed: int = 0  # of the solver and of the samplings
    batch_size: Annotated[int, Field(ge=1)] = 64
    workers: Annotated[int, Field(ge=1)] | None = None  # processes that fit; None: all cores


def load(path: Path, config: Config) -> VocData:
    """Return the splits at `path`: protocol `svm-cost-grid/v1`, `svm-low-shot/v1` or `svm-fixed/v1`.

    Raises:
        UserError: it is no VOC folder, or a list in it is malformed.
    """
    return open_voc(path, config.year, config.train, config.test, f"svm-{config.variant}/v1")


def run(
    backbone: Backbone, data: VocData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `mAP@FEATURE` (low-shot: `mAP@FEATURE,k=SHOTS`) in percent, and `chance/mAP`.

    Classes without a positive image on either side are left out of the mean and named. Chance is the
    share of positive test images, which is what a random order reaches. Average precisions of classes
    are among the notes.
    """
    names = config.features or StageFeatures.default(backbone, config.variant == "fixed")
    reader = StageFeatures(backbone, names)
    train, train_labels = _embedded(reader, data, "train", config, cache)
    test, test_labels = _embedded(reader, data, "test", config, cache)
    problems = _problems(data, train_labels, test_labels, config.variant != "fixed")
    values: dict[str, float] = {}
    for name, columns in reader.columns.items():
        rows = (
            unit_rows(part[:, columns].numpy(), single=config.variant == "fixed")
            for part in (train, test)
        )
        found = _SCORES[config.variant](*rows, problems, config, data.omitted)
        values |= {f"{metric.format(name)}": value for metric, value in found.items()}
    shares = [problem.truth.mean() for problem in problems]
    return values | {"chance/mAP": 100 * float(np.mean(shares))}


def _cost_grid(
    train: np.ndarray,
    test: np.ndarray,
    problems: Sequence[Problem],
    config: Config,
    omitted: Omissions,
) -> dict[str, float]:
    few = [p.name for p in problems if min(p.positive.sum(), (~p.positive).sum()) < FOLDS]
    for name in few:
        omitted.add(f"{config.train}: fewer than {FOLDS} images a side, so cost 1 untuned", name)
    tasks = [(train, test, problem, problem.name in few, config.seed) for problem in problems]
    found = list(_parallel(_tuned_precision, tasks, config, "svm"))
    return _mean_and_notes(problems, found)


def _tuned_precision(
    train: np.ndarray, test: np.ndarray, problem: Problem, untuned: bool, seed: int
) -> float:
    cost = 1.0 if untuned else cross_validated_cost(train, problem.positive, seed)
    return precision(train, test, problem, cost, seed)


def _fixed(
    train: np.ndarray,
    test: np.ndarray,
    problems: Sequence[Problem],
    config: Config,
    omitted: Omissions,
) -> dict[str, float]:
    tasks = [(train, test, problem, FIXED_COST, config.seed) for problem in problems]
    return _mean_and_notes(problems, list(_parallel(precision, tasks, config, "svm")))


def _low_shot(
    train: np.ndarray,
    test: np.ndarray,
    problems: Sequence[Problem],
    config: Config,
    omitted: Omissions,
) -> dict[str, float]:
    most = max(int(problem.positive.sum()) for problem in problems)
    values: dict[str, float] = {}
    for shots in config.shots:
        if shots > most:
            omitted.add("shots: more than any class has", str(shots))
            continue
        for problem in problems:
            if problem.positive.sum() < shots:
                omitted.add(
                    f"{config.train}: fewer than {shots} shots, all are taken", problem.name
                )
        tasks = [
            (train, test, problem, shots, sampling, config.seed)
            for sampling in range(config.samplings)
            for problem in problems
        ]
        rows = list(_parallel(_low_shot_precisions, tasks, config, f"k={shots}"))
        # [samplings, classes, costs] -> a mean per cost; the best one, chosen on the test split
        precisions = np.array(rows).reshape(config.samplings, len(problems), -1)
        values["mAP@{}" + f",k={shots}"] = 100 * float(precisions.mean(axis=(0, 1)).max())
    if not values:
        raise UserError(f"shots={list(config.shots)}: no class has so many images, but {most}")
    return values


def _low_shot_precisions(
    train: np.ndarray, test: np.ndarray, problem: Problem, shots: int, sampling: int, seed: int
) -> list[float]:
    """Average precision at every cost of the grid, on one sampling of a class."""
    # The class enters by its name: dropping one class leaves the samplings of the others.
    generator = np.random.default_rng([seed, shots, sampling, *problem.name.encode()])
    positive, negative = np.flatnonzero(problem.positive), np.flatnonzero(~problem.positive)
    chosen = np.concatenate(
        [
            generator.permutation(positive)[:shots],
            generator.permutation(negative)[: _NEGATIVES * shots],
        ]
    )
    part = Problem(problem.name, problem.positive[chosen], problem.tested, problem.truth)
    return [precision(train[chosen], test, part, cost, seed) for cost in svm_cost_grid()]


_SCORES: dict[str, Callable[..., dict[str, float]]] = {
    "cost-grid": _cost_grid,
    "fixed": _fixed,
    "low-shot": _low_shot,
}


def _mean_and_notes(problems: Sequence[Problem], found: Sequence[float]) -> dict[str, float]:
    notes = {
        "note/AP@{} " + problem.name: 100 * value
        for problem, value in zip(problems, found, strict=True)
    }
    return {"mAP@{}": 100 * float(np.mean(found))} | notes


def _parallel(
    function: Callable[..., Any], tasks: Sequence[tuple], config: Config, label: str
) -> Iterator[Any]:
    """Yield function(*task) in order, from several processes: liblinear's generator is one per process."""
    from joblib import Parallel, delayed

    workers = min(config.workers or share_of_cores(), len(tasks))
    jobs = Parallel(n_jobs=workers, return_as="generator")
    done = jobs(delayed(function)(*task) for task in tasks)
    yield from tqdm(done, total=len(tasks), desc=label, unit="fit", leave=False, disable=None)


def _problems(data: VocData, train: Tensor, test: Tensor, difficult_out: bool) -> list[Problem]:
    """Every class that can be learnt and tested; the others are named.

    Raises:
        UserError: there is none.
    """
    problems = []
    for number, name in enumerate(data.classes):
        positive = (train[:, number] == PRESENT).numpy()
        said = test[:, number].numpy()
        tested = said != DIFFICULT if difficult_out else np.ones(len(said), bool)
        truth = said[tested] == PRESENT
        if not positive.any() or positive.all():
            data.omitted.add("class with no positive or no negative training image", name)
        elif not truth.any():
            data.omitted.add("class with no positive test image", name)
        else:
            problems.append(Problem(name, positive, tested, truth))
    if not problems:
        reasons = "; ".join(data.omitted.lines())
        raise UserError(f"no class has positive images in both splits: {reasons}")
    return problems


def _embedded(
    reader: StageFeatures,
    data: VocData,
    name: Literal["train", "test"],
    config: Config,
    cache: FeatureCache | None,
) -> tuple[Tensor, Tensor]:
    """Features float [n, D] and labels int8 [n, C] of those images that can be read."""
    split = data.train if name == "train" else data.test
    centre = config.variant == "fixed"
    extracted = extract(
        reader,
        split.pictures,
        _centre_crop if centre else _squashed,
        lambda features: features,
        batch_size=config.batch_size,
        key=content_key("svm", centre, name, *reader.columns, data.content),
        cache=cache,
        omitted=data.omitted,
        label=getattr(config, name),
    )
    return extracted.features, split.labels[extracted.kept]


def _centre_crop(picture: Picture) -> Tensor:
    return read_picture(picture, 256, _SIZE)


def _squashed(picture: Picture) -> Tensor:
    """Uint8 [3, 224, 224]: the shorter side resized to 256, then both to 224 whatever the shape."""
    image, _ = open_picture(picture)
    scale = 256 / min(image.size)
    width, height = (round(scale * side) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    image = image.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
