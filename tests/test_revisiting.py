"""Constrained small queries, aligned queues, neighbours: what revisiting contrastive methods adds to MoCo."""

import copy
import logging

import pytest
import torch
from torch.nn import functional as F

from dataprep.synthetic import write_random_images
from dense_ssl import pretrain
from dense_ssl.backbones import BackboneConfig
from dense_ssl.config import UserError, load, validate
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.distributed import World
from dense_ssl.methods import make_method, warn_of_own_keys
from dense_ssl.methods.moco import MoCoConfig
from dense_ssl.methods.parts import KeyQueue
from dense_ssl.methods.revisiting import (
    REVISITING_VIEWS,
    RevisitingConfig,
    image_major,
    nearest,
)
from dense_ssl.pretrain import RunConfig, recipe_path
from dense_ssl.run_config import RunSection
from dense_ssl.schedule import Step
from dense_ssl.views import Near, ViewSpec
from dense_ssl.weights.official import to_official
from dense_ssl.weights.pretrained import start_from
from tests.ranks import train_on_ranks

RESNET = BackboneConfig(name="test_resnet")
VIEWS = (
    ViewSpec(name="global", count=2, size=64),
    ViewSpec(
        name="small", count=3, size=32, scale=(0.05, 0.14),
        near=Near(kind="overlap", of="global[1]", amount=0.1),
    ),
)  # fmt: skip
SMALL = {
    "out_dim": 8,
    "hidden_dim": 16,
    "queue_length": 40,
    "aux_neighbours": 4,
    "backbone": RESNET,
}
STEP = Step(3, steps_per_epoch=2, epochs=4, seed=1)


def fresh(**options):
    torch.manual_seed(0)
    return make_method(RevisitingConfig(**{**SMALL, "views": VIEWS, **options}))


def batch_of(images, views=VIEWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    crops = {}
    for view in views:
        pixels = torch.randn(view.count, images, 3, view.size, view.size, generator=generator)
        boxes = torch.zeros(view.count, images, 4)
        crops[view.name] = Crops(pixels, boxes, torch.zeros(view.count, images, dtype=torch.bool))
    return MultiCropBatch(crops, torch.arange(images), torch.full((images,), -1))


def part_of(batch, rows):
    views = {name: crops.map(lambda x: x[:, rows]) for name, crops in batch.views.items()}
    return MultiCropBatch(views, batch.index[rows], batch.label[rows])


# --- the ladder ----------------------------------------------------------------------------------


def test_its_first_rung_is_moco():
    views = (ViewSpec(name="global", count=2, size=64),)
    shared = {
        "views": views,
        "out_dim": 8,
        "hidden_dim": 16,
        "queue_length": 40,
        "backbone": RESNET,
    }
    ours = make_method(RevisitingConfig(**shared, aux_weight=0))
    moco = make_method(MoCoConfig(**shared))
    moco.load_state_dict(ours.state_dict())  # the same names
    batch = batch_of(4, views)
    a, b = ours(batch, STEP), moco(batch, STEP)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.carry.k, b.carry.k)


def test_the_rungs_differ_in_what_they_are_named_after():
    rungs = [
        load(RunConfig, recipe_path(f"revisiting_ladder_{name}"), ["data.path=x", "run.dir=y"])
        for name in ("moco", "multicrop", "autoaugment", "knn")
    ]
    views = [[(v.name, v.count, v.size, v.near is not None) for v in r.method.views] for r in rungs]
    assert views[0] == [("global", 2, 224, False)]
    assert views[1:] == [[("global", 2, 160, False), ("small", 4, 96, True)]] * 3
    moved = ["autoaugment" in str([v.photometric for v in r.method.views]) for r in rungs]
    assert moved == [False, False, True, True]
    assert [r.method.aux_weight for r in rungs] == [0, 0, 0, 0.4]
    assert [r.method.momentum.start for r in rungs] == [0.999, 0.995, 0.995, 0.995]
    assert rungs[3].method.views == REVISITING_VIEWS
    for rung in rungs:  # nothing else differs
        assert (rung.optim, rung.train) == (rungs[0].optim, rungs[0].train)


# --- queries -------------------------------------------------------------------------------------


def test_rows_are_image_major():
    large = torch.tensor([[10.0], [20.0]])
    small = torch.tensor([[11.0], [12.0], [21.0], [22.0]])
    assert image_major(large, small).flatten().tolist() == [10, 11, 12, 20, 21, 22]
    assert torch.equal(image_major(large, None), large)
    method, batch = fresh(), batch_of(2)
    queries = method._queries(batch.views["global"].images[0], batch.views["small"])
    assert queries.z.shape == (8, 8)
    crops = batch.views["small"].images.transpose(0, 1).flatten(0, 1)  # image 0's three, image 1's
    small = method._encode(method.student, crops)
    torch.testing.assert_close(queries.z[5:8], small.z[3:])


def test_each_pass_has_its_own_batch_statistics():
    method = fresh()
    method(batch_of(4), STEP)
    counts = [b for n, b in method.student.named_buffers() if n.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {2}  # large, small
    counts = [b for n, b in method.teacher.named_buffers() if n.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {1}


def test_two_groups_are_two_devices():
    one, two = fresh(), fresh(backbone=RESNET.model_copy(update={"bn_groups": 2}))
    two.load_state_dict(one.state_dict())
    batch = batch_of(8)
    whole = two._queries(batch.views["global"].images[0], batch.views["small"])
    halves = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = part_of(batch, rows)
        halves.append(one._queries(part.views["global"].images[0], part.views["small"]).z)
    torch.testing.assert_close(whole.z, torch.cat(halves), rtol=1e-4, atol=1e-5)


def test_the_ladders_losses_have_one_positive_an_image():
    """By hand: every query of an image against the image's key and the queue."""
    method, batch = fresh(aux_weight=0), batch_of(3)
    twin = copy.deepcopy(method)
    output = method(batch, STEP)
    x_q, x_k = batch.views["global"].images
    z = twin._queries(x_q, batch.views["small"]).z.detach()
    k = twin._encode(twin.teacher, x_k).z
    total = 0.0
    for row in range(12):
        logits = torch.cat([(z[row] @ k[row // 4])[None], twin.queue.keys @ z[row]]) / 0.2
        total += torch.logsumexp(logits, 0) - logits[0]
    torch.testing.assert_close(output.loss.detach(), total / 12, rtol=1e-5, atol=1e-6)


# --- queues --------------------------------------------------------------------------------------


def test_both_queues_take_one_key_an_image_at_the_same_place():
    method = fresh(queue_length=10, aux_neighbours=3)
    for index in range(4):  # 4 x 4 keys in queues of 10
        step = Step(index, 2, 4)
        output = method(batch_of(4, seed=index), step)
        method.after_step([output.carry], step)
        at = (4 * index + torch.arange(4)) % 10
        assert torch.equal(method.queue.keys[at], output.carry.k)
        assert torch.equal(method.backbone_queue.keys[at], output.carry.kb)
    assert int(method.queue.pointer) == int(method.backbone_queue.pointer) == 16 % 10
    torch.testing.assert_close(method.backbone_queue.keys.norm(dim=1), torch.ones(10))


def test_an_image_finds_its_own_fresh_key_only_in_the_official_order():
    """With query and key view alike and equal encoders; the queues are at 38 of 40, so places wrap."""
    batch = batch_of(4)
    batch.views["global"].images[1] = batch.views["global"].images[0]
    places = {}
    for order in ("official", "aligned"):
        method = fresh(aux_queue_order=order)
        method.backbone_queue.pointer.fill_(38)
        keys = method.backbone_queue.keys.clone()
        x_q, x_k = batch.views["global"].images
        b = method._encode(method.student, x_q).b
        kb = method._keys(x_k, STEP).kb
        places[order] = nearest(b, kb, method.backbone_queue, 4, order)
        assert torch.equal(method.backbone_queue.keys, keys)  # what was held is gone again
    own = torch.tensor([38, 39, 0, 1])
    assert torch.equal(places["official"][:, 0], own)
    assert places["official"].shape == (4, 4)
    similarity = b @ keys.T
    assert torch.equal(places["aligned"], similarity.topk(4).indices)


def test_a_queue_held_as_after_a_push_is_what_the_push_makes_of_it():
    queue, keys = KeyQueue(7, 3), F.normalize(torch.randn(4, 3), dim=1)
    queue.pointer.fill_(5)
    before = queue.keys.clone()
    with queue.as_after(keys):
        held = queue.keys.clone()
    assert torch.equal(queue.keys, before)
    with pytest.raises(RuntimeError, match="within"), queue.as_after(keys):
        raise RuntimeError("within")
    assert torch.equal(queue.keys, before)
    assert int(queue.pointer) == 5
    queue.push(keys)
    assert torch.equal(queue.keys, held)


def test_warm_up_fills_the_queue_and_leaves_the_pull_out():
    method = fresh(aux_warmup_epochs=2)
    early, late = Step(3, 2, 4), Step(4, 2, 4)  # epochs 1.5 and 2
    before = method(batch_of(4), early)
    assert torch.equal(before.loss.detach(), before.logs["nce"])
    assert before.logs["knn"] == 0
    method.after_step([before.carry], early)
    assert torch.equal(method.backbone_queue.keys[:4], before.carry.kb)
    after = method(batch_of(4), late)
    assert after.logs["knn"] > 0
    torch.testing.assert_close(
        after.loss.detach(), after.logs["nce"] + 0.4 * after.logs["knn"], rtol=1e-6, atol=0
    )


def test_no_gradient_reaches_the_backbone_through_the_neighbours():
    """With z cut off, nothing of the student is left in the loss."""
    method = fresh(temperature=0.2)
    head = method.student["global_head"]
    for parameter in head.parameters():
        parameter.data.zero_()
    head[2].bias.data.fill_(1.0)
    output = method(batch_of(4), STEP)
    output.loss.backward()
    gradients = [p.grad for p in method.student["backbone"].parameters()]
    assert all(torch.all(g == 0) for g in gradients)


def test_a_queue_in_bf16_takes_half_the_memory_and_finds_the_same_neighbours():
    torch.manual_seed(0)
    # Features of 30 kinds of picture, non-negative as after a ReLU
    kinds = torch.rand(30, 64).pow(3)
    features, keys = (
        F.normalize(kinds[torch.arange(n) % 30] + 0.4 * torch.rand(n, 64), dim=1)
        for n in (200, 1000)
    )
    full, half = KeyQueue(1000, 64), KeyQueue(1000, 64, torch.bfloat16)
    for queue in (full, half):
        queue.push(keys)
    assert half.keys.element_size() * 2 == full.keys.element_size()
    a, b = (nearest(features, keys[:1], queue, 20, "aligned") for queue in (full, half))
    shared = (a[:, :, None] == b[:, None, :]).any(2).float().mean()
    assert shared > 0.95
    exact = features @ keys.T
    worst = exact.gather(1, a).amin(1) - exact.gather(1, b).amin(1)
    assert worst.max() < 2 * 2**-8  # whoever else was found is as similar, up to rounding
    method = fresh(queue_backbone_dtype="bf16")
    method.load_state_dict(fresh(queue_backbone_dtype="fp32").state_dict())  # either way
    assert method.backbone_queue.keys.dtype == torch.bfloat16


# --- official files -------------------------------------------------------------------------------


def test_a_run_starts_from_an_official_file(tmp_path, caplog):
    """The whole state of the same method; of another one the backbone."""
    small = {**SMALL, "views": VIEWS, "backbone": BackboneConfig(name="resnet18")}
    torch.manual_seed(1)
    theirs = make_method(RevisitingConfig(**small))
    state = {"state_dict": to_official("revisiting", theirs.state_dict()), "arch": "resnet18"}
    torch.save({"epoch": 3, **state}, tmp_path / "checkpoint.pth.tar")
    torch.manual_seed(2)
    ours = make_method(RevisitingConfig(**small, queue_backbone_dtype="bf16"))
    with caplog.at_level(logging.INFO, logger="dense_ssl"):
        start_from(str(tmp_path / "checkpoint.pth.tar"), ours, "revisiting")
        assert torch.equal(ours.queue.keys, theirs.queue.keys)
        assert torch.equal(ours.backbone_queue.keys, theirs.backbone_queue.keys.bfloat16())
        shared = {"out_dim": 8, "hidden_dim": 16, "queue_length": 40, "backbone": small["backbone"]}
        moco = make_method(MoCoConfig(**shared))
        start_from(str(tmp_path / "checkpoint.pth.tar"), moco, "moco")
    assert "starting from the revisiting state" in caplog.text
    assert "starting from the backbone" in caplog.text
    for key, value in theirs.student["backbone"].state_dict().items():
        assert torch.equal(moco.student["backbone"].state_dict()[key], value)


# --- what is refused, and said --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"views": (VIEWS[1].model_copy(update={"near": None}),)}, "views: `global`, two crops"),
        (
            {"views": (*VIEWS, VIEWS[1].model_copy(update={"name": "x"}))},
            "at most `small` after it",
        ),
        ({"queue_length": 3}, "aux_neighbours: 4 of a queue of 3"),
        ({"aux_queue_order": "random"}, "aux_queue_order"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, sentence):
    values = RevisitingConfig(**SMALL, views=VIEWS).model_dump()
    plain = {k: [v.model_dump() for v in x] if k == "views" else x for k, x in changed.items()}
    with pytest.raises(UserError, match=sentence):
        validate(RevisitingConfig, values | plain, "recipe.yaml")


def test_a_queue_of_a_whole_epoch_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="dense_ssl"):
        warn_of_own_keys(RevisitingConfig(**SMALL), 40)
    assert "method.queue_length=40" in caplog.text


RECIPE = """
method:
  name: revisiting
  views:
    - {{name: global, count: 2, size: 64, photometric: [moco_v2_autoaugment, moco_v2]}}
    - {{name: small, count: 2, size: 32, scale: [0.05, 0.14], photometric: moco_v2_autoaugment,
       near: {{kind: overlap, of: "global[1]", amount: 0.1}}}}
  backbone: {{name: test_resnet, init: fan_out, bn_images: 4}}
  out_dim: 8
  hidden_dim: 16
  queue_length: 32
  aux_neighbours: 4
  aux_queue_order: {order}
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{lr: 0.02}}
train: {{epochs: 4, batch_size: 8, precision: fp32, steps: 3}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 9, log_every_steps: 1, log: []}}
"""


def test_a_run_that_goes_on_with_two_ranks_is_one_with_two_groups(tmp_path, capsys):
    """Batch statistics, shuffled keys, both queues, neighbours among all ranks' keys: up to rounding."""
    write_random_images(tmp_path / "images", 20)
    recipes = {run: tmp_path / f"{run}.yaml" for run in ("one", "moved")}
    for run, path in recipes.items():
        path.write_text(
            RECIPE.format(images=tmp_path / "images", run=tmp_path / run, order="official")
        )
    assert pretrain.main([str(recipes["one"])]) == 0
    assert pretrain.main([str(recipes["moved"]), "train.steps=1"]) == 0
    err = capsys.readouterr().err
    assert err.count("batch 8 in 2 BatchNorm groups, fp32") == 2
    _, said = train_on_ranks(2, [str(recipes["moved"])], tmp_path)
    assert "batch 8 = 2 ranks x 4, fp32" in said
    assert "resuming at step 1 of 3" in said
    one, moved = (
        pretrain.checkpoint.load_newest(tmp_path / run / "checkpoints") for run in recipes
    )
    for name in ("queue.keys", "backbone_queue.keys", "student.global_head.0.weight"):
        torch.testing.assert_close(
            moved["method"][name], one["method"][name], rtol=1e-4, atol=2e-5, msg=name
        )
    assert moved["config"]["method"]["backbone"]["bn_images"] == 4  # the recipe, for any ranks


@pytest.mark.parametrize("name", ["forward_sync_buffers", "broadcast_buffers"])
def test_queues_are_not_sent_between_ranks_at_every_forward(name, monkeypatch):
    """torch has renamed the switch: whichever there is, is off."""
    given = {}

    class Wrapper:
        pass

    def newer(self, module, *, gradient_as_bucket_view, forward_sync_buffers=True):
        given["sent"] = forward_sync_buffers

    def older(self, module, *, gradient_as_bucket_view, broadcast_buffers=True):
        given["sent"] = broadcast_buffers

    Wrapper.__init__ = newer if name == "forward_sync_buffers" else older
    monkeypatch.setattr(pretrain, "DistributedDataParallel", Wrapper)
    world = World(rank=0, size=2, device=torch.device("cpu"), flags=None)
    pretrain._prepare_for_ranks(torch.nn.Linear(1, 1), world, RunSection(dir="x"))
    assert given == {"sent": False}


def test_autoaugment_is_refused_where_boxes_are_used(tmp_path, capsys):
    write_random_images(tmp_path / "images", 8)
    text = RECIPE.format(images=tmp_path / "images", run=tmp_path / "run", order="aligned")
    (tmp_path / "recipe.yaml").write_text(text)
    sere = """method={name: sere, out_dim: 16, hidden_dim: 8, bottleneck_dim: 4,
      views: [{name: global, count: 2, size: 64, photometric: moco_v2_autoaugment}],
      backbone: {name: test_vit, init: dino, positions: dino}}"""
    assert pretrain.main([str(tmp_path / "recipe.yaml"), sere]) == 2
    error = capsys.readouterr().err
    assert "global uses moco_v2_autoaugment, which moves pixels" in error
    assert "sere computes with crop boxes" in error
