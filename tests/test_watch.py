"""Watching a run: measures against float64 references, looks that leave no trace, signs of collapse."""

import json
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch

from dataprep.synthetic import write_random_images
from dense_ssl import checkpoint, pretrain
from dense_ssl.config import UserError
from dense_ssl.loaders.source import open_path
from dense_ssl.methods.parts import KeyQueue
from dense_ssl.watch.held import labelled_in, own_labels, pairs_of
from dense_ssl.watch.measures import alignment, rankme, similarity, spread, uniformity, usage
from dense_ssl.watch.own_state import queue_measures
from dense_ssl.watch.probes import probe
from dense_ssl.watch.signs import console_line, signs
from dense_ssl.watch.watcher import at_rest
from tests.ranks import train_on_ranks


def vectors(n, d, seed=0, rank=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x if rank is None else rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d))


def tensor(x):
    return torch.from_numpy(np.asarray(x, np.float32))


# --- measures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "rank"), [(50, 20, None), (20, 50, None), (60, 30, 4)])
def test_rankme_is_the_entropy_of_the_singular_values(n, d, rank):
    x = vectors(n, d, rank=rank)
    sigma = np.linalg.svd(x.astype(np.float32).astype(np.float64), compute_uv=False)
    want = math.exp(scipy.stats.entropy(sigma))
    # The paper's epsilon of 1e-7 in every term adds a little: less than min(n, d) * 1e-7 * log.
    assert rankme(tensor(x)) == pytest.approx(want, rel=1e-3)
    if rank:
        assert rankme(tensor(x)) <= rank * 1.01
    assert 1 <= rankme(tensor(x)) <= min(n, d) * 1.001


def test_uniformity_alignment_and_spread_are_those_of_the_papers():
    x, y = vectors(40, 12), vectors(40, 12, seed=1)
    ux, uy = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    squared = scipy.spatial.distance.pdist(ux, "sqeuclidean")
    assert uniformity(tensor(x)) == pytest.approx(math.log(np.exp(-2 * squared).mean()), rel=1e-5)
    assert alignment(tensor(x), tensor(y)) == pytest.approx(
        (np.linalg.norm(ux - uy, axis=1) ** 2).mean(), rel=1e-5
    )
    assert spread(tensor(x)) == pytest.approx(ux.std(0).mean() * math.sqrt(12), rel=1e-5)
    cosines = ux @ ux.T
    assert similarity(tensor(ux)) == pytest.approx(
        cosines[~np.eye(40, dtype=bool)].mean(), abs=1e-6
    )


def test_healthy_and_collapsed_features_differ_in_every_measure():
    healthy = vectors(200, 32)
    collapsed = np.ones((200, 32)) + 1e-4 * vectors(200, 32)
    assert rankme(tensor(healthy)) > 25
    assert rankme(tensor(collapsed)) < 1.1
    assert spread(tensor(healthy)) > 0.95
    assert spread(tensor(collapsed)) < 1e-3
    assert uniformity(tensor(healthy)) < -3
    assert uniformity(tensor(collapsed)) > -1e-3
    assert rankme(torch.zeros(8, 4)) == 1


def test_usage_tells_both_collapses_of_self_distillation_from_health():
    each_its_own = torch.eye(16).repeat(4, 1)
    one_for_all = torch.eye(16)[:1].repeat(64, 1)
    undecided = torch.full((64, 16), 1 / 16)
    assert usage(each_its_own) == (pytest.approx(16), pytest.approx(1))
    assert usage(one_for_all) == (pytest.approx(1), pytest.approx(1))
    assert usage(undecided) == (pytest.approx(16), pytest.approx(16))
    p = torch.rand(10, 5).softmax(1)
    used, each = usage(p)
    assert used == pytest.approx(math.exp(scipy.stats.entropy(p.double().mean(0))))
    assert each == pytest.approx(np.exp(scipy.stats.entropy(p.double(), axis=1).mean()))


def test_queue_measures_see_keys_that_are_all_alike():
    torch.manual_seed(0)
    method = torch.nn.Module()
    method.queue = KeyQueue(64, 16)
    noise = queue_measures(method)
    assert abs(noise["queue_similarity"]) < 0.05
    method.queue.push(torch.nn.functional.normalize(torch.ones(64, 16), dim=1))
    alike = queue_measures(method)
    assert alike["queue_similarity"] == pytest.approx(1, abs=1e-5)
    assert alike["queue_rankme"] < 1.01 < 10 < noise["queue_rankme"]


def test_the_probe_separates_what_can_be_separated():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    centres = 4 * rng.normal(size=(3, 16))
    x = tensor(centres[labels] + rng.normal(size=(200, 16)))
    y = torch.from_numpy(labels)
    found = probe(x[:150], y[:150], x[150:], y[150:], 3)
    assert found["knn"] > 95
    assert found["linear"] > 95
    shuffled = y[torch.from_numpy(rng.permutation(200))]
    nothing = probe(x[:150], shuffled[:150], x[150:], shuffled[150:], 3)
    assert nothing["linear"] < 65
    assert 30 < found["class_chance"] < 50


# --- what is looked at -----------------------------------------------------------------------------


def write_classes(root, names=("a", "b"), count=8):
    for split in ("train", "val"):
        for name in names:
            write_random_images(root / split / name, count)
    return root


def test_pairs_are_the_same_every_time_and_leave_out_what_cannot_be_read(tmp_path):
    write_random_images(tmp_path, 6)
    source = open_path(tmp_path)
    first, again = (pairs_of(source, 4, 32, 0) for _ in range(2))
    assert first.images.shape == (2, 4, 3, 32, 32)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.boxes, again.boxes)
    broken = source.paths[0]
    broken.write_bytes(broken.read_bytes()[:200])
    assert pairs_of(source, 6, 32, 0).images.shape[1] == 5
    for path in source.paths:
        path.write_bytes(b"")
    assert pairs_of(source, 6, 32, 0) is None


def test_labelled_images_come_from_a_folder_or_from_the_training_data(tmp_path):
    root = write_classes(tmp_path / "labelled")
    held = labelled_in(root, 10, 32)
    assert (len(held.bank), len(held.asked), held.classes) == (8, 2, 2)
    own = own_labels(open_path(root / "train"), 10, 32)
    assert (len(own.bank), len(own.asked), own.classes) == (8, 2, 2)
    write_random_images(tmp_path / "plain", 3)
    assert own_labels(open_path(tmp_path / "plain"), 10, 32) is None
    with pytest.raises(UserError, match="watch.data"):
        labelled_in(tmp_path / "plain", 10, 32)


# --- no trace in training --------------------------------------------------------------------------

RECIPE = """
method: {{name: {name}, {views}, out_dim: 16, hidden_dim: 16, backbone: {backbone}, {more}}}
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{name: adamw, lr: 0.001}}
train: {{epochs: 4, batch_size: 8, precision: fp32}}
watch: {{images: 8}}
run: {{dir: {run}, device: cpu, checkpoint_every_steps: 3, log_every_steps: 2, log: []}}
"""
MOCO = {
    "name": "moco",
    "views": "views: [{name: global, count: 2, size: 32, photometric: moco_v2}]",
    "backbone": "{name: test_resnet, init: fan_in, bn_groups: 2}",
    "more": "queue_length: 24",
}
IBOT = {
    "name": "ibot",
    "views": """views: [
        {name: global, count: 2, size: 64, photometric: [dino_1, dino_2]},
        {name: local, count: 2, size: 32, photometric: dino_local}]""",
    "backbone": "{name: test_vit, init: dino, positions: dino, drop_path: 0.2}",
    "more": "bottleneck_dim: 8",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"), ("a", "b", "c"), 7) / "train"


@pytest.fixture
def train(images, tmp_path, capsys):
    def run(folder, method, *more):
        path = tmp_path / f"{folder}.yaml"
        path.write_text(RECIPE.format(**method, images=images, run=tmp_path / folder))
        assert pretrain.main([str(path), *more]) == 0
        return tmp_path / folder, capsys.readouterr()

    return run


def looks_of(run):
    lines = [json.loads(line) for line in (run / "watch.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def state_of(run):
    saved = checkpoint.load_newest(run / "checkpoints")
    return saved["method"], saved["optimizer"]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("method", [MOCO, IBOT], ids=lambda m: m["name"])
def test_training_is_the_same_to_the_bit_whether_it_is_watched_or_not(method, train):
    often, _ = train("often", method, "train.steps=5", "watch.every_steps=1")
    never, said = train("never", method, "train.steps=5", "watch.on=false")
    assert equal(state_of(often), state_of(never))
    assert [line["step"] for line in looks_of(often)] == [0, 1, 2, 3, 4, 5]
    assert looks_of(never) == []
    assert "watch" not in said.err


def test_a_resumed_run_looks_again_and_sees_the_same(train):
    whole, _ = train("whole", IBOT, "train.steps=6", "watch.every_steps=2")
    train("broken", IBOT, "train.steps=4", "watch.every_steps=2")
    path = whole.parent / "broken" / "watch.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "rankme": 0}\n{"ste')  # of a killed process
    broken, _ = train("broken", IBOT, "train.steps=6", "watch.every_steps=2")
    assert looks_of(broken) == looks_of(whole)
    more, _ = train("broken", IBOT, "train.steps=6", "watch.every_steps=1")  # may be changed
    assert equal(state_of(more), state_of(whole))


def test_a_look_says_what_the_method_keeps_and_what_labels_say(train):
    run, said = train("looks", MOCO, "train.steps=2")
    first, last = looks_of(run)
    assert {"knn", "linear", "match_one_cell", "rankme", "queue_similarity"} <= first.keys()
    assert (first["step"], last["step"]) == (0, 2)
    assert last["most_rank"] == 8
    assert "watch 2  matches" in said.err
    run, _ = train("prototypes", IBOT, "train.steps=1")
    assert 1 <= looks_of(run)[0]["patch_prototypes_used"] <= 16


def test_two_ranks_train_the_same_whether_the_first_one_looks_or_not(images, tmp_path):
    weights = []
    for name, more in (("often", "watch.every_steps=1"), ("never", "watch.on=false")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(**MOCO, images=images, run=tmp_path / name))
        said, _ = train_on_ranks(2, [str(path), more, "train.steps=3"], tmp_path)
        weights.append(said)
    assert weights[0] == weights[1] != ""
    assert [line["step"] for line in looks_of(tmp_path / "often")] == [0, 1, 2, 3]


def test_the_modes_of_all_parts_come_back(train):
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    net[1].eval()
    before = torch.random.get_rng_state()
    with at_rest(net):
        assert not net[0].training
        net(torch.randn(8, 4))
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert net[0].num_batches_tracked == 0


# --- signs -----------------------------------------------------------------------------------------


def test_console_line_and_signs():
    record = {
        "step": 40, "match_one_cell": 41.2, "match_chance": 25.0, "knn": 30.0, "class_chance": 10.0,
        "rankme": 38.4, "most_rank": 64.0, "spread": 0.42, "seconds": 0.31,
    }  # fmt: skip
    line = console_line(record)
    assert line == (
        "watch 40  matches 41 % (by place 25)  k-NN 30.0 % (chance 10)  rank 38 of 64  spread 0.42  (0.3 s)"
    )
    assert signs(record) == {}
    for changed, kind in (
        ({"spread": 1e-3, "rankme": 1.0}, "point"),
        ({"spread": 0.05, "rankme": 1.6}, "line"),
        ({"prototypes_used": 1.0, "prototypes_each": 1.0}, "prototype"),
        ({"patch_prototypes_used": 60.0, "patch_prototypes_each": 59.9}, "patch_prototype"),
        ({"finite": 0.0}, "finite"),
    ):
        assert list(signs({**record, **changed})) == [kind]
    assert signs({**record, "prototypes_used": 60.0, "prototypes_each": 30.0}) == {}
    assert signs({**record, "rankme": 1.6, "most_rank": 8.0}) == {}  # too few images to say


def test_a_failing_run_is_warned_of_once_and_a_healthy_one_is_not(train):
    """DINO without its centring, which is what keeps it from one answer to everything (section 5.3)."""
    dino = {**IBOT, "name": "dino"}
    more = ("train.steps=16", "train.epochs=8", "watch.every_steps=8", "method.out_dim=64")
    warm = ("method.teacher_temperature.start=0.1", "method.teacher_temperature.end=0.1")
    sharp = ("method.center_momentum=1", "method.momentum=0.5", "optim.lr=0.01",
             "method.teacher_temperature.start=0.01", "method.teacher_temperature.end=0.01")  # fmt: skip
    run, said = train("healthy", dino, *more, *warm, "optim.lr=0.00001")
    assert "collapse" not in said.err
    run, said = train("collapsed", dino, *more, *sharp)
    assert said.err.count("the teacher's answers collapse") == 1
    assert looks_of(run)[-1]["prototypes_used"] < 1.5
