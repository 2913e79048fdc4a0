"""A trunk with fewer class tokens than it was trained with: another network, and the files say so."""

from functools import partial
from pathlib import Path

import timm

from dense_ssl.export.source import (
    Checked,
    Differs,
    Source,
    features,
    images,
    plain_timm,
    read_written,
)
from dense_ssl.export.target import Draft, Target, file, pickled
from dense_ssl.weights.fewer_tokens import FEWER, fewer_tokens, timm_options
from dense_ssl.weights.fingerprint import weights_sha256


def _obstacle(source: Source) -> str | None:
    if source.class_tokens == 1:
        return f"{source.arch} has no second class token to do without; take timm"
    return None


def _drafts(source: Source, target: str) -> list[Draft]:
    data = pickled(fewer_tokens(source.trunk, target))
    check = partial(_check, target=target)
    options = timm_options(target, source.class_tokens)
    return [file(f"backbone_timm_{target}.pth", data, check, options=options)]


def _check(path: Path, source: Source, target: str) -> Checked:
    """Return by how much its cells differ; only cells can be compared, and they do differ."""
    options = timm_options(target, source.class_tokens)
    plain = plain_timm(source, read_written(path), options)
    weights = weights_sha256(plain.state_dict())
    if weights != weights_sha256(fewer_tokens(source.trunk, target)):
        raise Differs("it does not read back to its own weights")
    cells = source.features[:, source.class_tokens :]
    found = features(plain, images(source.side))[:, -cells.shape[1] :]
    difference = float((found - cells).abs().max())
    description = f"NOT the same network; timm {timm.__version__} {source.arch}, strict"
    return Checked(description, difference, equal=False, remarks={"weights_sha256": weights})


FEWER_TOKENS = {
    target: Target(_obstacle, partial(_drafts, target=target), in_all=False) for target in FEWER
}
