"""What stands in a run's queue: images, and the keys in it that their features are most like.

"Revisiting Contrastive Methods" (arXiv:2106.05967) pulls each query to its nearest neighbours in a queue of
pooled backbone features. The queue does not say whose keys it holds, but the order of an epoch does: keys are
written image by image, so a place in it and the number of steps tell the image and the epoch, and the plan
of that epoch tells the crop that was encoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from dense_ssl import checkpoint
from dense_ssl.config import UserError
from dense_ssl.loaders.order import Order
from dense_ssl.loaders.source import ImageSource, decode
from dense_ssl.methods import MethodConfig
from dense_ssl.views import draw_epoch, positions
from dense_ssl.visualise.neighbours import SHOWN, centre_crops, pooled_features
from dense_ssl.visualise.sheets import tiles_sheet
from dense_ssl.weights.pretrained import load_backbone
from kernels.queue_neighbours import queue_neighbours

KEYS, POINTER = "backbone_queue.keys", "backbone_queue.pointer"


@dataclass(frozen=True)
class Pushed:
    """Whose keys are in a queue: of each place the image, its epoch, or -1 where noise has been left."""

    image: np.ndarray  # int64 [K]
    epoch: np.ndarray  # int64 [K]


def pushed(orders: list[Order], steps: int, length: int) -> Pushed:
    """Return whose keys a queue of `length` holds after `steps` steps with these orders, one a rank."""
    batch, per_epoch = orders[0].batch_size, orders[0].steps_per_epoch
    image, at = np.full((2, length), -1, np.int64)
    first = max(steps - -(-length // batch), 0)
    shown: dict[int, list[np.ndarray]] = {}
    for step in range(first, steps):
        epoch, within = divmod(step, per_epoch)
        if epoch not in shown:
            shown[epoch] = [order.epoch(epoch) for order in orders]
        # Each rank's micro-batches one after another, the ranks side by side.
        records = np.concatenate([of_rank[within].reshape(-1) for of_rank in shown[epoch]])
        places = (step * batch + np.arange(batch)) % length
        image[places], at[places] = records, epoch
    return Pushed(image, at)


def queue_rows(
    run: Path,
    method: MethodConfig,
    train: Mapping[str, Any],
    source: ImageSource,
    count: int,
    side: int,
) -> list[Image.Image]:
    """Return one row for each of the next `count` images of a run: it, then the key crops most like it.

    Args:
        run: its folder.
        method: of the run.
        train: what it was trained with.
        source: of its images.
        count: rows.
        side: of the crops, in pixels.

    Raises:
        UserError: the run has no queue of backbone features, or its places cannot be told.
    """
    saved = checkpoint.load_newest(run / "checkpoints")
    if saved is None or KEYS not in saved["method"]:
        raise UserError(
            f"KIND=queue: {run} has no queue of backbone features; revisiting has one, with "
            "method.aux_weight above 0"
        )
    steps, batch = int(saved["step"]), int(train["batch_size"])
    keys, ranks = saved["method"][KEYS].float(), int(saved.get("ranks", 1))
    accumulate = max(batch // (ranks * int(saved.get("micro_batch") or batch // ranks)), 1)
    orders = [
        Order(len(source.sizes), batch, ranks, rank, accumulate, int(train["seed"]))
        for rank in range(ranks)
    ]
    if int(saved["method"][POINTER]) != steps * batch % len(keys):
        raise UserError(
            f"KIND=queue: {run} has refused steps, so the places of its queue cannot be told; take "
            "KIND=neighbours"
        )
    held = pushed(orders, steps, len(keys))
    filled = np.flatnonzero(held.image >= 0)
    coming = orders[0].epoch(steps // orders[0].steps_per_epoch)
    following = coming[steps % orders[0].steps_per_epoch :].reshape(-1)[:count].tolist()
    # One by one, since those that cannot be read are left out.
    seen = [(record, crop) for record in following for crop in centre_crops(source, [record], side)]
    if not seen:
        raise UserError(f"KIND=queue: none of the next {len(following)} images can be read")
    pixels = [crop for _, crop in seen]
    features = pooled_features(load_backbone(str(run)).backbone, pixels)
    best = min(SHOWN, len(filled))
    index, similarity = queue_neighbours(
        features, F.normalize(keys[torch.from_numpy(filled)], dim=1), best
    )
    rows = []
    for query, pixel in enumerate(pixels):
        places = filled[index[query].numpy()]
        names = ["query"] + [
            f"{value:.2f}{', itself' if held.image[place] == seen[query][0] else ''}"
            for value, place in zip(similarity[query].tolist(), places)
        ]
        crops = [
            key_crop(
                source, method, int(train["seed"]), int(held.image[p]), int(held.epoch[p]), side
            )
            for p in places
        ]
        rows.append(tiles_sheet(names, [pixel, *crops]))
    return rows


def key_crop(
    source: ImageSource, method: MethodConfig, seed: int, record: int, epoch: int, side: int
) -> np.ndarray:
    """Return the crop whose key was made of an image in an epoch, without its colours, uint8 [S, S, 3].

    Black where the image cannot be read: training took another one for it.
    """
    plan = draw_epoch(method.views, source.sizes, seed, epoch, np.array([record]))
    view = positions(method.views)[method.views[0].name].start + 1  # the second is the key
    left, top, right, bottom = (int(x) for x in plan.boxes[0, view])
    box = (left, top, right, bottom)
    try:
        image = decode(source.read(record)).resize((side, side), Image.Resampling.BILINEAR, box=box)
    except (OSError, ValueError):
        return np.zeros((side, side, 3), np.uint8)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if plan.flipped[0, view] else pixels
