"""k-NN once more from neighbours that a run's folder has: another k or temperature, without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dense_ssl.evaluation.classification.accuracy import confusion_sheet
from dense_ssl.evaluation.classification.knn_settings import VOTING, Config
from dense_ssl.evaluation.classification.votes import Neighbours, kept, said, voted
from dense_ssl.evaluation.protocol_settings import marked

__all__ = ["VOTING", "confusion", "drawn", "scored"]


def scored(file: Path, config: Config) -> dict[str, float] | None:
    """Return what `knn.run` returns, None where the file is gone or holds too few neighbours."""
    near = kept(file)
    if near is None or not near.answers(max(config.k)):
        return None
    return voted(near, config.k, config.temperature)


def drawn(file: Path, config: Config, about: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Return what `knn.pictures` returns."""
    near = kept(file)
    return confusion(near, config, about["classes"], about["protocol"]) if near else {}


def confusion(
    near: Neighbours, config: Config, classes: Sequence[str], protocol: str
) -> dict[str, Image.Image]:
    """Return the confusion matrix of the middle k."""
    ks = sorted({min(k, int(near.counts.sum())) for k in config.k})
    k = ks[(len(ks) - 1) // 2]
    answers = said(near, k, config.temperature)
    top1 = 100 * float((answers == near.truth).mean())
    named = marked(protocol, "knn", config)
    title = f"{named}: k = {k}, top-1 {top1:.1f} %"
    return {"confusion": confusion_sheet(near.truth, answers, classes, title)}
