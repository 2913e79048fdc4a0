"""How the images of a step are shared: among ranks, in passes that fit a card, in groups for BatchNorm.

A recipe says what makes the training, `train.batch_size` and `method.backbone.bn_images`, and what fits,
`train.micro_batch`. What follows from the number of ranks is filled in when a run starts, so one recipe is
the same training on 1, 2, 4 or 8 GPUs.
"""

from dense_ssl.run_config import RunConfig, TrainConfig


def shared(config: RunConfig, ranks: int) -> RunConfig:
    """Return the configuration with `train.accumulate` and `method.backbone.bn_groups` for `ranks`."""
    train = config.train.model_copy(update={"accumulate": passes(config.train, ranks)})
    images = train.batch_size // (ranks * train.accumulate)
    method, backbone = config.method, config.method.backbone
    if backbone.bn_images is not None:
        groups = {"bn_groups": groups_of(images, backbone.bn_images), "bn_images": None}
        method = method.model_copy(update={"backbone": backbone.model_copy(update=groups)})
    return config.model_copy(update={"train": train, "method": method})


def passes(train: TrainConfig, ranks: int) -> int:
    """Return how many micro-batches each rank makes of its share: the fewest that fit and divide it."""
    if train.micro_batch is None or train.batch_size % ranks:
        return train.accumulate
    share = train.batch_size // ranks
    fewest = max(train.accumulate, -(-share // train.micro_batch))
    return next(n for n in range(fewest, max(fewest, share) + 1) if n >= share or share % n == 0)


def groups_of(images: int, wanted: int) -> int:
    """Return how many equal groups of at least `wanted` images there are in `images`; 1 if fewer."""
    return next(n for n in range(max(images // wanted, 1), 0, -1) if images % n == 0)
