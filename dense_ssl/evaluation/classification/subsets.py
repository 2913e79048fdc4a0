"""Few labels: a share of every class, some images of every class, or the images a list names.

| text          | training images                                                                       |
|---------------|---------------------------------------------------------------------------------------|
| `1%`, `12.8%` | that share of every class, at least one image, drawn by the seed                      |
| `8/class`     | that many of every class (all of a smaller one), drawn by the seed                    |
| `FILE.txt`    | a name per line, `n01440764_10026.JPEG` or `n01440764/n01440764_10026.JPEG` (SimCLR's) |
"""

import re
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.evaluation.classification.data import LabelledPictures
from dense_ssl.evaluation.omissions import Omissions

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_SHOTS = re.compile(r"(\d+)\s*/\s*class")


def is_list(subset: str) -> bool:
    """Return whether `subset` names a file: then nothing is drawn.

    Raises:
        UserError: it is none of the three forms.
    """
    share, shots = _SHARE.fullmatch(subset), _SHOTS.fullmatch(subset)
    if share and not 0 < float(share[1]) <= 100:
        raise UserError(f"subset={subset}: a share lies above 0 % and at most at 100 %")
    if shots and int(shots[1]) < 1:
        raise UserError(f"subset={subset}: take at least 1/class")
    if not share and not shots and not Path(subset).is_file():
        raise UserError(f"subset={subset}: write 1%, 8/class, or the name of a list file")
    return not share and not shots


def draw_subset(
    train: LabelledPictures, subset: str, seed: int, omitted: Omissions
) -> LabelledPictures:
    """Return the pictures of a subset, in the order of the training split.

    Raises:
        UserError: `subset` is not understood, or a list names no picture there is.
    """
    if is_list(subset):
        return train.subset(_listed(train, Path(subset), omitted))
    share, shots = _SHARE.fullmatch(subset), _SHOTS.fullmatch(subset)
    chosen = torch.zeros(len(train.labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in train.labels.unique():
        members = (train.labels == label).nonzero()[:, 0]
        if shots:
            count = int(shots[1])
            if len(members) < count:
                omitted.add(f"train: fewer than {count} images, all are taken", f"class {label}")
        else:
            assert share is not None
            count = max(1, round(float(share[1]) / 100 * len(members)))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return train.subset(chosen)


def _listed(train: LabelledPictures, path: Path, omitted: Omissions) -> Tensor:
    """Which pictures a list names, bool [n]; names that are not there are counted."""
    names = [PurePosixPath(line.strip()).name for line in path.read_text().splitlines()]
    wanted = {name for name in names if name}
    there = [picture.path.name for picture in train.pictures]
    for name in sorted(wanted - set(there)):
        omitted.add(f"{path.name}: image not in train", name)
    chosen = torch.tensor([name in wanted for name in there])
    if not chosen.any():
        raise UserError(f"{path}: names no image of the training split")
    return chosen
