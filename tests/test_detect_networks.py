"""Detectors' parts against float64 and loops: anchors, boxes, sampling, regions, masks, networks, rates."""

import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.image_list import ImageList

from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.backbones.vit import interpolate_positions
from dense_ssl.config import UserError, validate
from dense_ssl.evaluation.detection.boxes import (
    DEVIATIONS,
    BoxPredictor,
    RegionPooler,
    Sampled,
    Target,
    answer,
    box_losses,
    refined,
    sample_regions,
)
from dense_ssl.evaluation.detection.masks import encoded, mask_loss, pasted
from dense_ssl.evaluation.detection.model import build, inner_trunk, make_optimizer
from dense_ssl.evaluation.detection.protocols import DetectConfig
from dense_ssl.evaluation.detection.rpn import Anchors, Proposals
from dense_ssl.evaluation.trained.settings import learning_rate

# pycocotools 2.0 speaks to numpy 2 in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def settings(**given):
    return validate(DetectConfig, given, "detect")


def backbone(name):
    return make_backbone(BackboneConfig(name=name)).eval()


def boxes_of(count, *, side=60.0, least=4.0):
    corners = torch.rand(count, 2) * side
    return torch.cat([corners, corners + least + torch.rand(count, 2) * side], dim=1)


# --- proposals


def test_anchors_are_areas_and_ratios_at_every_cell():
    maps = [torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 2)]
    images = ImageList(torch.zeros(1, 3, 24, 31), [(24, 31)])
    found = Anchors(((10,), (20, 25)), (8, 16))(images, maps)
    assert len(found) == 1
    expected = []
    for stride, sizes, (rows, columns) in ((8, (10,), (3, 4)), (16, (20, 25), (2, 2))):
        for row in range(rows):
            for column in range(columns):
                for ratio in (0.5, 1, 2):
                    for size in sizes:
                        w, h = size / math.sqrt(ratio), size * math.sqrt(ratio)
                        x, y = column * stride, row * stride
                        expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    torch.testing.assert_close(found[0], torch.tensor(expected))


def test_proposal_losses_equal_a_loop(monkeypatch):
    config = settings(anchors="16", rpn_beta=1 / 9)
    rpn = Proposals(8, (16,), config)
    logits, deltas = torch.randn(1, 6, 1), torch.randn(6, 4)
    labels, wanted = torch.tensor([1.0, 0, -1, 1, 0, 0]), torch.randn(6, 4)
    chosen = torch.tensor([1, 1, 0, 1, 1, 0])
    sampler = lambda _: ([chosen * (labels > 0)], [chosen * (labels == 0)])  # noqa: E731
    monkeypatch.setattr(rpn, "fg_bg_sampler", sampler)
    of_objects, of_boxes = rpn.compute_loss(logits, deltas, [labels], [wanted])
    total = boxes = 0.0
    for at in (0, 1, 3, 4):
        p = 1 / (1 + math.exp(-float(logits[0, at, 0])))
        total -= math.log(p if labels[at] == 1 else 1 - p)
        if labels[at] == 1:
            for d in (deltas[at] - wanted[at]).abs().tolist():
                boxes += 0.5 * d * d * 9 if d < 1 / 9 else d - 0.5 / 9
    assert of_objects.item() == pytest.approx(total / 4, rel=1e-5)
    assert of_boxes.item() == pytest.approx(boxes / 4, rel=1e-5)


# --- boxes


@pytest.mark.parametrize("stage", range(3))
def test_boxes_are_moved_as_published(stage):
    predictor = BoxPredictor(8, 5, stage)
    regions, deltas = boxes_of(7), torch.randn(7, 5, 4)
    found = predictor.boxes(deltas, regions)
    for r in range(7):
        for c in range(5):
            x0, y0, x1, y1 = regions[r].double().tolist()
            w, h = x1 - x0, y1 - y0
            dx, dy, dw, dh = (
                d * s for d, s in zip(deltas[r, c].double().tolist(), DEVIATIONS[stage])
            )
            x, y = x0 + w / 2 + dx * w, y0 + h / 2 + dy * h
            w, h = w * math.exp(dw), h * math.exp(dh)
            expected = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            assert found[r, c].tolist() == pytest.approx(expected, abs=1e-3)
    goals = boxes_of(7)
    back = predictor.boxes(predictor.coder.encode_single(goals, regions)[:, None], regions)[:, 0]
    torch.testing.assert_close(back, goals, rtol=1e-4, atol=1e-3)


def some_regions():
    predictor = BoxPredictor(8, 3, 0)
    labels = torch.tensor([2, 0, 1, 3, 0])
    regions, goals = boxes_of(5), boxes_of(5)
    sampled = [
        Sampled(regions[:2], labels[:2], labels[:2] * 0, goals[:2], labels[:2] < 0),
        Sampled(regions[2:], labels[2:], labels[2:] * 0, goals[2:], labels[2:] < 0),
    ]
    return predictor, sampled, regions, goals, labels


@pytest.mark.parametrize("how", ["l1", "giou"])
def test_box_losses_equal_a_loop(how):
    predictor, sampled, regions, goals, labels = some_regions()
    scores, deltas = torch.randn(5, 4), torch.randn(5, 3, 4)
    of_classes, of_boxes = box_losses(scores, deltas, sampled, predictor, how)
    classes = boxes = 0.0
    moved = predictor.boxes(deltas, regions).double()
    for r, label in enumerate(labels.tolist()):
        classes -= math.log(torch.softmax(scores[r].double(), 0)[label])
        if not label:
            continue
        if how == "l1":
            wanted = predictor.coder.encode_single(goals[r : r + 1], regions[r : r + 1])[0]
            boxes += (deltas[r, label - 1] - wanted).abs().sum().item()
        else:
            a, b = moved[r, label - 1].tolist(), goals[r].double().tolist()
            wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            common = max(wide, 0) * max(high, 0)
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
            hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
            boxes += 10 * (1 - common / union + (hull - union) / hull)
    assert of_classes.item() == pytest.approx(classes / 5, rel=1e-5)
    assert of_boxes.item() == pytest.approx(boxes / 5, rel=1e-4)


def test_regions_are_sampled_a_quarter_positive():
    objects = torch.tensor([[10.0, 10, 40, 40], [60, 60, 90, 80]])
    target = Target(objects, torch.tensor([3, 1]), None)
    near = objects.repeat_interleave(30, 0) + torch.rand(60, 4) * 4
    proposals = [torch.cat([near, boxes_of(100, side=20) + 100]), boxes_of(20)]
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None)
    first, empty = sample_regions(proposals, [target, nothing], 0.5, 64)
    positive = first.labels > 0
    assert len(first.labels) == 64 and positive.sum() == 16
    overlap = torchvision.ops.box_iou(first.boxes, objects)
    assert (overlap.max(1).values[positive] >= 0.5).all()
    assert (overlap.max(1).values[~positive] < 0.5).all()
    assert torch.equal(first.labels[positive], target.labels[first.objects[positive]])
    assert torch.equal(first.goals[positive], objects[first.objects[positive]])
    for box in first.boxes[first.given]:
        assert (box == objects).all(1).any()
    assert len(empty.labels) == 20 and not empty.labels.any() and not empty.given.any()


def test_regions_of_the_next_stage_follow_their_class():
    predictor = BoxPredictor(8, 3, 0)
    regions, deltas, scores = boxes_of(2), torch.randn(2, 3, 4), torch.tensor([[9.0, 0, 1, 0]] * 2)
    moved = refined(scores, deltas, regions, torch.tensor([3, 0]), predictor)
    every = predictor.boxes(deltas, regions)
    assert torch.equal(moved, torch.stack([every[0, 2], every[1, 1]]))  # else the likeliest object


def test_answers_equal_greedy_suppression():
    scores, boxes = 2 * torch.randn(40, 4), boxes_of(120).view(40, 3, 4)
    found = answer(scores, boxes, (70, 80), 10)
    candidates = []
    for r in range(40):
        chances = torch.softmax(scores[r], 0)
        for c in range(3):
            box = boxes[r, c].clone()
            box[0::2].clamp_(0, 80)
            box[1::2].clamp_(0, 70)
            if chances[c + 1] > 0.05 and (box[2:] > box[:2]).all():
                candidates.append((chances[c + 1].item(), c + 1, box))
    candidates.sort(key=lambda entry: -entry[0])
    kept = []
    for score, label, box in candidates:
        others = [other for _, same, other in kept if same == label]
        if all(torchvision.ops.box_iou(box[None], other[None]) <= 0.5 for other in others):
            kept.append((score, label, box))
    assert found.scores.tolist() == pytest.approx([score for score, _, _ in kept[:10]])
    assert found.labels.tolist() == [label for _, label, _ in kept[:10]]
    torch.testing.assert_close(found.boxes, torch.stack([box for _, _, box in kept[:10]]))


# --- maps of regions


def aligned(values, box, size, stride):
    """RoIAlign of one map [h, w] by its definition, in float64."""
    values = values.double().numpy()
    h, w = values.shape

    def at(y, x):
        if y < -1 or y > h or x < -1 or x > w:
            return 0.0
        y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
        a, b = int(y), int(x)
        c, d = min(a + 1, h - 1), min(b + 1, w - 1)
        y, x = y - a, x - b
        top = values[a, b] * (1 - x) + values[a, d] * x
        return (1 - y) * top + y * (values[c, b] * (1 - x) + values[c, d] * x)

    x0, y0, x1, y1 = (side / stride - 0.5 for side in box)
    out = np.zeros((size, size))
    dy, dx = (y1 - y0) / size, (x1 - x0) / size
    ny, nx = max(math.ceil(dy), 1), max(math.ceil(dx), 1)
    for i in range(size):
        for j in range(size):
            points = [
                at(y0 + dy * (i + (k + 0.5) / ny), x0 + dx * (j + (m + 0.5) / nx))
                for k in range(ny)
                for m in range(nx)
            ]
            out[i, j] = np.mean(points)
    return torch.from_numpy(out)


def test_regions_are_read_of_their_level_at_exact_places():
    strides = (4, 8, 16, 32)
    maps = [torch.randn(2, 1, 512 // s, 512 // s) for s in strides]
    regions = [
        torch.tensor([[3.0, 7, 90, 60], [10, 20, 240, 240]]),
        torch.tensor([[0.0, 0, 500, 500], [100, 100, 110, 109], [-8, -4, 200, 260]]),
    ]
    pool = RegionPooler(strides, 3)
    levels = pool.levels(torch.cat(regions)).tolist()
    sides = [math.sqrt(87 * 53), math.sqrt(230 * 220), 500, math.sqrt(90), math.sqrt(208 * 264)]
    assert levels == [min(max(math.floor(math.log2(side / 56)), 0), 3) for side in sides]
    assert levels == [0, 2, 3, 0, 2]
    found = pool(maps, regions)
    for number, (box, level) in enumerate(zip(torch.cat(regions).tolist(), levels)):
        values = maps[level][0 if number < 2 else 1, 0]
        expected = aligned(values, box, 3, strides[level])
        torch.testing.assert_close(found[number, 0].double(), expected, rtol=1e-4, atol=1e-4)


# --- masks


def test_mask_loss_equals_a_loop():
    mask = torch.zeros(2, 40, 50, dtype=torch.uint8)
    mask[0, 5:20, 8:30] = 1
    mask[1, 10:40, 20:25] = 1
    regions, labels = torch.tensor([[4.0, 4, 34, 24], [18, 8, 30, 38]]), torch.tensor([2, 1])
    logits = torch.randn(2, 3, 6, 6)
    found = mask_loss(logits, regions, labels, [mask[:1], mask[1:]])
    total = 0.0
    for row in range(2):
        wanted = aligned(mask[row].float(), regions[row].tolist(), 6, 1) >= 0.5
        p = torch.sigmoid(logits[row, labels[row] - 1].double())
        total -= torch.where(wanted, p.log(), (1 - p).log()).sum().item()
    assert found.item() == pytest.approx(total / 72, rel=1e-5)


def test_masks_are_put_back_at_pixel_centres():
    masks = torch.rand(3, 5, 5)
    boxes = torch.tensor([[3.3, 2.1, 17.9, 12.4], [-4.0, -2, 9, 30], [18.0, 8, 26, 13]])
    found = pasted(masks, boxes, (16, 20))
    for mask, box, painted in zip(masks.double().numpy(), boxes.double().tolist(), found):
        x0, y0, x1, y1 = box
        padded = np.pad(mask, 1)
        for y in range(16):
            for x in range(20):
                v = (y + 0.5 - y0) / (
                    y1 - y0
                ) * 5 + 0.5  # in cells of the padded mask, centres at whole
                u = (x + 0.5 - x0) / (x1 - x0) * 5 + 0.5
                value = 0.0
                if 0 <= v <= 6 and 0 <= u <= 6:
                    a, b = min(int(v), 5), min(int(u), 5)
                    v, u = v - a, u - b
                    cell = padded[a : a + 2, b : b + 2]
                    value = np.array([1 - v, v]) @ cell @ np.array([1 - u, u])
                assert abs(value - 0.5) < 1e-5 or bool(painted[y, x]) == (value >= 0.5)
    full = pasted(torch.ones(1, 28, 28), torch.tensor([[4.0, 2, 9, 7]]), (16, 20))[0]
    inside = torch.zeros(16, 20, dtype=torch.bool)
    inside[2:7, 4:9] = True
    assert torch.equal(full, inside)
    assert pasted(torch.ones(0, 2, 2), torch.zeros(0, 4), (4, 5)).shape == (0, 4, 5)
    assert encoded(np.zeros((0, 4, 5), bool)) == ()


# --- networks


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_mask_rcnn_has_the_parameters_of_torchvisions():
    """The same network but for the box and the mask of the background."""
    config = settings(settings="coco-fpn-1x", normed=(), box_head="layers")
    ours = build(backbone("resnet50"), 90, config)
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=91
    )
    extra = count(nn.Linear(1024, 4)) + count(nn.Conv2d(256, 1, 1))
    assert count(ours) == count(theirs) - extra


def test_c4_has_the_fourth_stage_in_its_heads_and_one_norm_more():
    whole = backbone("resnet50")
    model = build(whole, 20, settings())
    names = [name for name, _ in model.named_parameters()]
    assert not any("trunk.layer4" in name for name in names)
    assert count(model.trunk) + count(model.shared.stage) == count(whole)
    assert count(model.shared.norm) == 2 * 2048
    state = whole.trunk.layer4.state_dict()
    assert all(torch.equal(x, state[n]) for n, x in model.shared.stage.state_dict().items())
    assert model.predictors[0].scores.weight.shape == (21, 2048)
    assert model.rpn.head.cls_logits.weight.shape == (15, 1024, 1, 1)


def test_every_protocol_has_its_heads():
    def parts(name, net):
        return build(backbone(net), 4, settings(settings=name, width=16, hidden=32))

    for name in ("coco-cascade-small-1x", "coco-cascade-base-1x"):
        cascade = parts(name, "test_vit")
        assert len(cascade.predictors) == len(cascade.box_heads) == len(cascade.mask_heads) == 3
        weights = [tuple(round(1 / w, 3) for w in p.coder.weights) for p in cascade.predictors]
        assert weights == [tuple(round(d, 3) for d in stage) for stage in DEVIATIONS]
        norms = [n for n, m in cascade.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(n.startswith(("trunk.maps.finest", "box_heads")) for n in norms)
        assert sum(n.startswith("box_heads") for n in norms) == 12
        assert cascade.trunk.strides == (4, 8, 16, 32, 64) and cascade.multiple == 32
    fpn = parts("coco-fpn-1x", "test_resnet")
    norms = [n for n, m in fpn.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert {n.split(".")[0] for n in norms} == {"trunk", "box_heads", "mask_heads"}
    assert any("fpn" in n for n in norms)
    token_free = parts("coco-mask-1x", "test_vit")
    frozen = [n for n, p in token_free.named_parameters() if not p.requires_grad]
    assert [n.rpartition(".")[2] for n in frozen] == ["cls_token"]
    with pytest.raises(UserError, match=r"is no ResNet; for ViTs there are coco-cascade-small-1x"):
        parts("voc-c4", "test_vit")
    with pytest.raises(UserError, match=r"is no ViT; for ResNets there are voc-c4"):
        parts("coco-simple-1x", "test_resnet")


def test_rates_fall_towards_the_pixels():
    model = build(backbone("test_vit"), 3, settings(settings="coco-cascade-small-1x", width=16))
    depth = len(inner_trunk(model).blocks)
    groups = make_optimizer(model, settings(settings="coco-cascade-small-1x")).param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(of) == len(trained)
    for name, parameter in trained.items():
        number = depth + 1
        if any(part in name for part in ("cls_token", "pos_embed", "patch_embed")):
            number = 0
        elif ".blocks." in name:
            number = int(name.split(".blocks.")[1].split(".")[0]) + 1
        group = of[id(parameter)]
        assert group["lr_scale"] == pytest.approx(0.8 ** (depth + 1 - number)), name
        # iBOT's code compares names without their prefix, so that positions are decayed.
        assert group["weight_decay"] == (0 if parameter.ndim == 1 else 0.05), name


def test_rates_of_a_run_are_the_published_ones():
    voc = settings()
    assert learning_rate(voc, 0, 1) == pytest.approx(0.02 * 1e-3)
    assert learning_rate(voc, 50, 1) == pytest.approx(0.02 * (0.001 + 0.999 * 0.5))
    for step, factor in ((100, 1), (17_999, 1), (18_000, 0.1), (21_999, 0.1), (22_000, 0.01)):
        assert learning_rate(voc, step, 1) == pytest.approx(0.02 * factor)
    cascade = settings(settings="coco-cascade-small-1x")
    epoch = 117_266 // 32
    assert cascade.total_steps(epoch) == 12 * epoch
    for step, factor in (
        (500, 1), (8 * epoch - 1, 1), (8 * epoch, 0.1), (11 * epoch, 0.01)
    ):  # fmt: skip
        assert learning_rate(cascade, step, epoch) == pytest.approx(1e-4 * factor)


def test_images_of_a_batch_do_not_see_one_another():
    """Also not the padding that the larger one brings: boxes lie where they lie alone, at float32."""
    config = settings(
        settings="coco-fpn-1x", short=64, width=16, hidden=32, proposals="60,40", kept="20,20"
    )
    model = build(backbone("test_resnet"), 3, config).eval()
    images = [torch.randint(0, 255, size, dtype=torch.uint8) for size in ((3, 64, 96), (3, 64, 96))]
    with torch.inference_mode():
        together, alone = model(images), [model([image])[0] for image in images]
    for (a, masks), (b, others) in zip(together, alone):
        torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(masks, others, rtol=1e-3, atol=1e-3)
        assert (a.boxes[:, 0::2] <= 96).all() and (a.boxes[:, 1::2] <= 64).all()


def test_positions_of_any_grid_are_resampled_by_dinos_rule():
    """Bicubic (a = -0.75) at (i + 1/2) / s - 1/2 with s = (g + 0.1) / side, in float64."""
    table = torch.randn(1, 4 * 6, 2)
    found = interpolate_positions(table, (4, 6), (7, 9))

    def weights(old, new):
        rows = np.zeros((new, old))
        for i in range(new):
            x = (i + 0.5) * old / (new + 0.1) - 0.5
            for k in range(math.floor(x) - 1, math.floor(x) + 3):
                d = abs(x - k)
                a = -0.75
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else (
                    a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                )  # fmt: skip
                rows[i, min(max(k, 0), old - 1)] += w
        return rows

    maps = table[0].double().numpy().reshape(4, 6, 2)
    expected = np.einsum("ia,jb,abc->ijc", weights(4, 7), weights(6, 9), maps)
    assert np.abs(found[0].reshape(7, 9, 2).double().numpy() - expected).max() < 1e-5
    assert interpolate_positions(table, (4, 6), (4, 6)) is table
