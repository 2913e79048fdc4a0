"""Watching a run: are its features getting better, or collapsing? Looked at while it trains.

Every so often a fixed set of images goes through the backbone that will be exported. What comes out is
written to `watch.jsonl` in the run's folder, to TensorBoard and as one line to the console; a sentence warns
when features collapse. Nothing of it touches training: no weight, no buffer, no random number, no batch.
"""

from typing import Annotated

from pydantic import Field

from dense_ssl.config import Config

RECORDS = "watch.jsonl"


class WatchConfig(Config):
    """What is looked at while training, and how often. Changes no result."""

    on: bool = True
    # Steps between looks. None: once an epoch, or as seldom as it takes to stay below SHARE.
    every_steps: Annotated[int, Field(ge=1)] | None = None
    images: Annotated[int, Field(ge=8)] = 256  # whose two crops are matched and measured
    # Labelled images for k-NN and a linear probe: train/CLASS and val/CLASS, or COCO's objects. None: the
    # training data's own labels, where it has any.
    data: str | None = None
    labelled: Annotated[int, Field(ge=10)] = 1000  # at most so many of them; a fifth is asked
