"""Golden values of "Revisiting Contrastive Methods", and its published sequence of operations."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dense_ssl import parity
from dense_ssl.methods.revisiting import REVISITING_VIEWS
from dense_ssl.views import draw_epoch

RTOL = 1e-5
T, NEIGHBOURS, PTR = 0.2, 3, 12


def S(shape, a, b):
    """The specifications' deterministic tensor: sin(a * i + b) in float64, cast to float32."""
    values = np.sin(a * np.arange(np.prod(shape)) + b)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def colnorm(x):
    return F.normalize(x, dim=0)


P, BK = S((20, 4), 0.7, 0.3), S((20, 8), 0.37, 0.1)
KK, KB = S((4, 4), 0.9, 0.4), S((4, 8), 0.41, 0.2)
QUEUE, QUEUE_BACKBONE = colnorm(S((4, 16), 1.7, 0.9)), colnorm(S((8, 16), 1.9, 1.0))
GOLDEN = {  # order, small crops: L_nce, L_aux, total
    ("official", False): (3.7801008, 3.3037286, 5.1015921),
    ("official", True): (3.5376194, 3.1459823, 4.7960124),
    ("aligned", False): (3.7801008, 3.2978256, 5.0992312),
    ("aligned", True): (3.5376194, 3.0063212, 4.7401476),
}


def losses(p, bk, order, small):
    return parity.van_gansbeke_losses(
        p[:4], p[4:] if small else None, bk[:4], bk[4:] if small else None,
        KK, KB, QUEUE, QUEUE_BACKBONE, PTR, T, NEIGHBOURS, order,
    )  # fmt: skip


@pytest.mark.parametrize(("case", "values"), GOLDEN.items())
def test_golden_losses(case, values):
    before = QUEUE.clone(), QUEUE_BACKBONE.clone()
    nce, aux, ptr = losses(P, BK, *case)
    assert (nce.item(), aux.item(), (nce + 0.4 * aux).item()) == pytest.approx(values, rel=RTOL)
    assert ptr == 0
    assert torch.equal(QUEUE, before[0])
    assert torch.equal(QUEUE_BACKBONE, before[1])


def test_golden_logits_of_moco_with_small_crops():
    """Rows are image-major: of each image its large query, then its small ones."""
    z = torch.cat([P[:4, None], P[4:].view(4, 4, 4)], dim=1)
    for given in (z, F.normalize(z, dim=2)):
        logits = parity.multicrop_logits(given, KK, QUEUE, T)
        assert logits.shape == (20, 17)
        zeros = torch.zeros(20, dtype=torch.int64)
        assert F.cross_entropy(logits, zeros).item() == pytest.approx(3.5376194, rel=RTOL)
    second = parity.moco_logits(z[1], KK[[1] * 5], QUEUE, T)[0]
    torch.testing.assert_close(parity.multicrop_logits(z, KK, QUEUE, T)[5:10], second)
    large = parity.multicrop_logits(P[:4, None], KK, QUEUE, T)
    assert F.cross_entropy(large, zeros[:4]).item() == pytest.approx(3.7801008, rel=RTOL)


@pytest.mark.parametrize(
    ("order", "norm"), [(None, 0.6158622), ("official", 0.7098096), ("aligned", 0.7175509)]
)
def test_golden_gradient_norms(order, norm):
    p, bk = P.clone().requires_grad_(), BK.clone().requires_grad_()
    nce, aux, _ = losses(p, bk, order or "aligned", True)
    (nce if order is None else nce + 0.4 * aux).backward()
    assert p.grad.norm().item() == pytest.approx(norm, rel=RTOL)
    assert bk.grad is None


# --- the published sequence of operations --------------------------------------------------------


def published(p, bk, kk, kb, queue, queue_backbone, ptr, k, order):
    """Normalise, all logits, enqueue before or after the neighbours, top-k, log softmax, gather."""
    images, per_image = len(kk), len(p) // len(kk)
    large, small = p[:images], p[images:].view(images, per_image - 1, -1)
    q = F.normalize(torch.cat([large[:, None], small], 1).flatten(0, 1), dim=1)
    large, small = bk[:images], bk[images:].view(images, per_image - 1, -1)
    qb = F.normalize(torch.cat([large[:, None], small], 1).flatten(0, 1), dim=1)
    kk, kb = F.normalize(kk, dim=1), F.normalize(kb, dim=1)
    own = torch.einsum("nc,nc->n", q, kk.repeat_interleave(per_image, 0)).unsqueeze(-1)
    negatives = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([own, negatives], dim=1) / T
    nce = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))
    features = queue_backbone.clone()
    if order == "official":
        features[:, ptr : ptr + images] = kb.T
    with torch.no_grad():
        _, places = torch.topk(torch.matmul(qb, features), k, dim=1)
    log_softmax = F.log_softmax(negatives / T, dim=1)
    aux = -torch.gather(log_softmax, 1, places).mean(1).mean()
    return nce, aux


@pytest.mark.parametrize("order", ["official", "aligned"])
def test_losses_and_gradients_are_those_of_the_published_sequence(order):
    images, crops, length, k = 3, 4, 60, 7
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    p, bk = normal(images * 5, 6), normal(images * 5, 9).abs()
    rest = (normal(images, 6), normal(images, 9).abs(), colnorm(normal(6, length)),
            colnorm(normal(9, length).abs()))  # fmt: skip
    want_p, got_p = p.clone().requires_grad_(), p.float().requires_grad_()
    want = published(want_p, bk, *rest, 30, k, order)
    (want[0] + 0.4 * want[1]).backward()
    single = [x.float() for x in rest]
    b = bk.float()
    got = parity.van_gansbeke_losses(
        got_p[:images], got_p[images:], b[:images], b[images:], *single, 30, T, k, order
    )
    (got.nce + 0.4 * got.aux).backward()
    assert crops == 5 - 1
    assert got.nce.item() == pytest.approx(want[0].item(), rel=1e-6)
    assert got.aux.item() == pytest.approx(want[1].item(), rel=1e-6)
    torch.testing.assert_close(got_p.grad.double(), want_p.grad, rtol=1e-5, atol=1e-7)


def test_the_pull_is_that_of_training():
    q, queue = F.normalize(P, dim=1), QUEUE
    rows = torch.cat([q[:4, None], q[4:].view(4, 4, 4)], 1).flatten(0, 1)
    b = F.normalize(BK, dim=1)
    b = torch.cat([b[:4, None], b[4:].view(4, 4, 8)], 1).flatten(0, 1)
    got = parity.knn_pull_loss(b @ QUEUE_BACKBONE, rows @ queue, T, NEIGHBOURS)
    assert got.item() == pytest.approx(3.0063212, rel=RTOL)


# --- crops ---------------------------------------------------------------------------------------

BOXES = {  # seed, (width, height): large 0, large 1, four small ones near large 1
    (0, (640, 480)): [(32, 248, 435, 379), (38, 122, 370, 435), (111, 258, 142, 178),
                      (48, 256, 154, 125), (75, 158, 205, 208), (169, 483, 152, 119)],
    (1, (640, 480)): [(195, 32, 278, 340), (115, 241, 353, 352), (48, 249, 168, 199),
                      (221, 311, 115, 140), (228, 136, 220, 165), (52, 461, 203, 174)],
    (2, (427, 640)): [(86, 188, 292, 230), (18, 74, 360, 305), (326, 100, 151, 201),
                      (260, 95, 165, 203), (137, 18, 167, 162), (163, 232, 195, 180)],
}  # fmt: skip


@pytest.mark.parametrize(("case", "boxes"), BOXES.items())
def test_golden_boxes(case, boxes):
    seed, (width, height) = case
    random.seed(seed)
    large = [parity.free_box(width, height, (0.2, 1.0)) for _ in range(2)]
    small = [parity.constrained_box(width, height, (0.05, 0.14), large[1]) for _ in range(4)]
    assert large + small == boxes


def test_intersection_counts_shared_pixels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (tuple(int(v) for v in rng.integers((0, 0, 1, 1), 12)) for _ in range(2))
        shown = np.zeros((24, 24), int)
        for top, left, height, width in (a, b):
            shown[top : top + height, left : left + width] += 1
        assert parity.intersection(a, b) == (shown == 2).sum()
    assert parity.intersection((0, 0, 2, 2), (2, 0, 2, 2)) == 0


def test_after_ten_attempts_a_box_is_free():
    """An anchor met once in p boxes is met once in 1 - (1 - p)^11: ten attempts and a free box."""
    rng, anchor = random.Random(0), (0, 0, 100, 20)

    def share_that_meets(draw, count):
        boxes = [draw() for _ in range(count)]
        areas = np.array([parity.intersection(box, anchor) / (box[2] * box[3]) for box in boxes])
        return (areas >= 0.1).mean()

    p = share_that_meets(lambda: parity.free_box(400, 100, (0.05, 0.06), rng=rng), 6000)
    got = share_that_meets(
        lambda: parity.constrained_box(400, 100, (0.05, 0.06), anchor, rng=rng), 1500
    )
    assert 0.02 < p < 0.1
    assert got == pytest.approx(1 - (1 - p) ** 11, abs=0.06)


def test_the_plan_has_the_published_overlaps():
    """20,000 images of 640 x 480: shares without and with the constraint, as the specification has them."""
    n = 20_000
    sizes = np.tile(np.array([[480, 640]], np.int32), (n, 1))
    free = REVISITING_VIEWS[1].model_copy(update={"near": None})
    shares = {}
    for name, small in (("free", free), ("near", REVISITING_VIEWS[1])):
        boxes = draw_epoch((REVISITING_VIEWS[0], small), sizes, seed=0, epoch=0).boxes.astype(int)
        anchor, crop = boxes[:, 1], boxes[:, 2]
        low, high = np.maximum(anchor[:, :2], crop[:, :2]), np.minimum(anchor[:, 2:], crop[:, 2:])
        shared = (high - low).clip(0).prod(1)
        shares[name] = shared / (crop[:, 2:] - crop[:, :2]).prod(1)
    assert (shares["near"] < 0.0995).mean() == 0  # of the rounded area: a hair less than a tenth
    assert (shares["free"] < 0.1).mean() == pytest.approx(0.128, abs=0.01)
    inside = {name: (share == 1).mean() for name, share in shares.items()}
    assert inside == pytest.approx({"near": 0.378, "free": 0.339}, abs=0.014)
    mean = {name: share.mean() for name, share in shares.items()}
    assert mean == pytest.approx({"near": 0.757, "free": 0.668}, abs=0.01)


# --- evaluation's learning rates ------------------------------------------------------------------


def test_learning_rates_of_the_segmentation_protocols():
    steps = [parity.lr_step(e) for e in (0, 30, 31, 40, 41, 44)]
    assert steps == pytest.approx([0.003, 0.003, 3e-4, 3e-4, 3e-5, 3e-5])
    assert parity.lr_poly(0) == 1e-4
    assert parity.lr_poly(75) == pytest.approx(1e-4 * 0.5**0.9)
    assert parity.lr_poly(149) == pytest.approx(1e-4 * (1 / 150) ** 0.9)
