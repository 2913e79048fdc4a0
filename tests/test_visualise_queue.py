"""The images named as neighbours in a queue are those whose keys stand there."""

import numpy as np
import pytest
import torch

from dataprep.synthetic import write_random_images
from dense_ssl import checkpoint, pretrain
from dense_ssl.config import UserError
from dense_ssl.loaders.order import Order
from dense_ssl.methods.revisiting import Revisiting
from dense_ssl.visualise import queue
from dense_ssl.visualise.__main__ import draw

IMAGES, BATCH, LENGTH = 18, 4, 14  # 4 steps an epoch; the queue wraps within a step
RECIPE = """
method:
  name: revisiting
  views: [{{name: global, count: 2, size: 32, photometric: moco_v2}}]
  backbone: {{name: test_resnet, init: fan_out}}
  out_dim: 8
  hidden_dim: 16
  queue_length: {length}
  aux_neighbours: 3
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{lr: 0.02}}
train: {{epochs: 3, batch_size: {batch}, accumulate: 2, precision: fp32, steps: 6}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 9, log_every_steps: 9, log: []}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and what each of its micro-batches held: the images and the boxes of their key crops."""
    folder = tmp_path_factory.mktemp("queue")
    write_random_images(folder / "images", IMAGES)
    path = folder / "recipe.yaml"
    path.write_text(
        RECIPE.format(images=folder / "images", run=folder / "run", batch=BATCH, length=LENGTH)
    )
    seen, forward = [], Revisiting.forward

    def recorded(self, batch, step):
        seen.append((batch.index.clone(), batch.views["global"].boxes[1].clone(), step.index // 4))
        return forward(self, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Revisiting, "forward", recorded)
        assert pretrain.main([str(path)]) == 0
    return folder / "run", seen


def test_every_place_holds_the_key_of_the_image_it_is_said_to(trained):
    _, seen = trained
    want = np.full((2, LENGTH), -1)
    pushes = [(int(i), epoch) for index, _, epoch in seen for i in index]
    for number, (image, epoch) in enumerate(pushes):
        want[:, number % LENGTH] = image, epoch
    held = queue.pushed([Order(IMAGES, BATCH, accumulate=2)], 6, LENGTH)
    assert len(pushes) == 24
    assert np.array_equal(held.image, want[0])
    assert np.array_equal(held.epoch, want[1])


def test_ranks_stand_side_by_side_and_places_without_a_key_are_none():
    orders = [Order(40, 8, 2, rank, accumulate=2) for rank in range(2)]
    held = queue.pushed(orders, 1, 12)
    of_ranks = [order.epoch(0)[0].reshape(-1) for order in orders]
    assert held.image.tolist() == [*of_ranks[0], *of_ranks[1], -1, -1, -1, -1]
    assert held.epoch.tolist() == [0] * 8 + [-1] * 4


def test_the_crop_shown_is_the_one_that_was_encoded(trained, monkeypatch):
    run, seen = trained
    asked = []

    class Picture:
        def resize(self, size, _, box):
            asked.append(box)
            return np.zeros((*size, 3), np.uint8)

    monkeypatch.setattr(queue, "decode", lambda _: Picture())
    source, method, train = parts_of(run)
    index, boxes, epoch = seen[-1]
    for record, box in zip(index.tolist(), boxes):
        queue.key_crop(source, method, train["seed"], record, epoch, 8)
        height, width = source.sizes[record]
        shown = torch.tensor(asked[-1]) / torch.tensor([width, height, width, height])
        torch.testing.assert_close(shown, box)


def parts_of(run):
    from dense_ssl.config import validate
    from dense_ssl.loaders import DataConfig, open_source
    from dense_ssl.visualise.samples import config_of, method_config

    config = config_of(run)
    source = open_source(validate(DataConfig, config["data"], "config.yaml"))
    return source, method_config(config["method"]), config["train"]


def test_a_sheet_is_drawn_and_runs_without_such_a_queue_are_refused(trained, tmp_path):
    run, _ = trained
    draw(run, "queue", tmp_path / "queue.png", 2, 0, None)
    assert (tmp_path / "queue.png").stat().st_size > 1000
    saved = checkpoint.load_newest(run / "checkpoints")
    assert saved is not None
    assert saved["ranks"] == 1
    source, method, train = parts_of(run)
    for change, words in (
        ({"backbone_queue.pointer": torch.tensor(3)}, "refused steps"),
        ({"backbone_queue.keys": None}, "no queue of backbone features"),
    ):
        state = {k: v for k, v in (saved["method"] | change).items() if v is not None}
        checkpoint.save(tmp_path / words[:2] / "checkpoints", saved | {"method": state}, keep=1)
        with pytest.raises(UserError, match=words):
            queue.queue_rows(tmp_path / words[:2], method, train, source, 1, 32)
