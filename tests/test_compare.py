"""Runs in one page: what differs, whether a loss stays near a reference, and refusals."""

import json

import numpy as np
import pytest
import yaml

from dataprep.synthetic import write_random_images
from dense_ssl import pretrain
from dense_ssl.compare import main, read_run, verdict, write_comparison
from dense_ssl.config import UserError
from dense_ssl.config import load as load_config
from dense_ssl.reference import FOLDER, comparable, differing, load, stretches
from dense_ssl.reference import main as make_reference
from dense_ssl.report.page import read_jsonl
from dense_ssl.run_config import RunConfig, recipe_path


@pytest.fixture
def make_run(tmp_path):
    def make(name, losses, lr=0.1, method="moco", results=()):
        folder = tmp_path / name
        folder.mkdir()
        views = [{"name": "global", "size": 224}]
        config = {
            "method": {"name": method, "out_dim": 128, "views": views},
            "optim": {"lr": {"start": lr}},
            "run": {"dir": str(folder)},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [{"step": 10 * i, "loss": loss, "lr": lr} for i, loss in enumerate(losses, 1)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
        return folder

    return make


def test_the_page_has_what_differs_and_every_curve(make_run, tmp_path):
    result = {"task": "knn", "protocol": "knn/v1", "metric": "top1", "value": 41.5}
    a = make_run("a", [4.0, 3.0, 2.0], results=[result])
    b = make_run("b<i>", [4.0, 3.1, 2.05], lr=0.2, results=[{**result, "value": 43.25}])
    out = tmp_path / "page.html"
    *_, line = write_comparison([a, b], out)
    text = out.read_text()
    assert "optim.lr.start" in text
    assert "run.dir" not in text
    assert "41.50" in text
    assert "43.25" in text
    assert text.count("<polyline") == 4  # two runs, losses and learning rates
    assert "<i>" not in text.replace('<i class="key', "")  # names are text, not markup
    assert "as the reference; farthest at step 20" in line.sentence
    assert not any(said.wrong for said in write_comparison([a, b], out))


@pytest.mark.parametrize(
    ("losses", "says"),
    [([4.0, 3.05, 2.1], ": as the reference"), ([4.0, 3.5, 2.0], "NOT as the reference")],
)
def test_near_is_a_tenth_of_the_reference_s_range(make_run, losses, says):
    reference = read_run(make_run("right", [4.0, 3.0, 2.0]))
    assert says in verdict(read_run(make_run("other", losses)), reference)


def test_a_loss_that_is_not_a_number_is_not_near(make_run):
    reference = read_run(make_run("right", [4.0, 3.0, 2.0]))
    other = read_run(make_run("other", [4.0, float("nan"), 2.0]))
    assert "NOT as the reference; farthest at step 20" in verdict(other, reference)


def test_other_methods_and_scales_are_not_judged(make_run):
    a, b = read_run(make_run("a", [4.0, 3.0])), read_run(make_run("b", [9.0, 8.0], method="dino"))
    assert "not comparable" in verdict(b, a)
    assert "fewer than two steps" in verdict(read_run(make_run("c", [1.0])), a)


def test_what_cannot_be_compared_is_refused(make_run, tmp_path, capsys):
    a = make_run("a", [4.0, 3.0])
    with pytest.raises(UserError, match="0 runs given: name one to 5"):
        write_comparison([], tmp_path / "page.html")
    assert main([f"{a},{tmp_path / 'none'}", "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.endswith("is it a run folder?\n")
    assert not (tmp_path / "page.html").exists()


# --- references ------------------------------------------------------------------------------------


@pytest.fixture
def seeded(tmp_path):
    """Runs of one recipe: a falling loss with a little noise, an epoch of ten steps, and looks."""

    def make(name, seed, offset=0.0, lr=0.06, rank=20.0, spread=0.3, out_dim=128, steps=12):
        rng = np.random.default_rng(seed)
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "method": {"name": "moco", "out_dim": out_dim},
            "optim": {"lr": {"start": lr}},
            "train": {"seed": seed, "batch_size": 32},
            "run": {"dir": str(folder)},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        log = [
            {"step": 5 * i, "epoch": i / 2, "images_per_s": 50.0 * seed,
             "loss": 4 - i / 10 + offset + 0.05 * rng.normal()}
            for i in range(1, steps + 1)
        ]  # fmt: skip
        looks = [
            {"step": s, "rankme": rank + seed, "most_rank": 64.0, "spread": spread, "seconds": 1.0}
            for s in (0, 20, 40, 60)
        ]
        for file, records in (("log.jsonl", log), ("watch.jsonl", looks)):
            (folder / file).write_text("".join(json.dumps(r) + "\n" for r in records))
        return folder

    return make


@pytest.fixture
def reference(seeded, tmp_path, capsys):
    runs = [seeded(f"seed{seed}", seed) for seed in (1, 2, 3)]
    out = tmp_path / "demo-moco.jsonl"
    assert make_reference([*map(str, runs), "--out", str(out)]) == 0
    capsys.readouterr()
    return out


def test_a_run_like_the_reference_looks_right_and_others_do_not(
    seeded, reference, tmp_path, capsys
):
    def said(run):
        out = tmp_path / "page.html"
        code = main([str(run), "--reference", str(reference), "--out", str(out)])
        return code, capsys.readouterr().out

    code, text = said(seeded("good", 9))
    assert code == 0
    assert "looks right up to step 60 of demo-moco (3 seeds)" in text
    assert 'class="band"' in (tmp_path / "page.html").read_text()
    code, text = said(seeded("fast", 9, offset=1.0, lr=6.0))
    assert code == 1
    assert "does NOT look right" in text
    assert "settings that differ: optim.lr.start 6.0 (there 0.06)" in text
    code, text = said(seeded("flat", 9, rank=-4.0))
    assert code == 1
    assert "effective rank of its features is 5.0 at step 60, there at least 21.0" in text
    code, text = said(seeded("point", 9, spread=0.0001))
    assert code == 1
    assert "features collapse" in text
    code, text = said(seeded("broken", 9, offset=float("nan")))
    assert code == 1
    code, text = said(seeded("other", 9, out_dim=64))
    assert code == 0
    assert "another scale than demo-moco's: method.out_dim differ" in text
    code, text = said(seeded("short", 9, steps=1))
    assert "too few steps" in text


def test_the_band_is_a_prediction_interval(seeded, reference):
    """Of many more seeds of the same process, all but a few in a thousand steps lie in it."""
    band = load(reference).band(range(0, 65, 5))
    outside = 0
    for seed in range(100, 200):
        log = read_jsonl(seeded(f"more{seed}", seed) / "log.jsonl")
        losses = stretches(log, range(0, 65, 5))
        outside += sum(not low <= x <= high for x, (low, _, high) in zip(losses, band))
    assert outside < 0.02 * 1200
    assert max(high - low for low, _, high in band) < 1  # of a loss that falls by 1.2


def test_losses_logged_at_other_steps_are_compared_over_the_same_stretches():
    every_five = [{"step": 5 * i, "loss": float(i)} for i in range(1, 7)]
    every_ten = [{"step": 10 * i, "loss": 2 * i - 0.5} for i in range(1, 4)]
    assert stretches(every_five, [0, 10, 20, 30]) == stretches(every_ten, [0, 10, 20, 30])
    assert stretches(every_five, [0, 40])[0] != stretches(every_five, [0, 40])[0]  # not known


def test_what_makes_no_reference_is_refused(seeded, tmp_path, capsys):
    out = str(tmp_path / "x.jsonl")
    a, b = seeded("a", 1), seeded("b", 2, lr=1.0)
    assert make_reference([str(a), "--out", out]) == 2
    assert "two runs or more" in capsys.readouterr().err
    assert make_reference([str(a), str(b), "--out", out]) == 2
    assert (
        "differ in more than their seed: optim.lr.start 1.0 (there 0.06)" in capsys.readouterr().err
    )
    assert main([str(a), "--reference", str(a / "log.jsonl"), "--out", out]) == 2
    assert "no reference" in capsys.readouterr().err


REAL = """
method: {{name: moco, views: [{{name: global, count: 2, size: 32, photometric: moco_v2}}], out_dim: 16,
  hidden_dim: 16, queue_length: 32, backbone: {{name: test_resnet, init: fan_in, bn_groups: 2}}}}
data: {{path: {images}, loader: folder, workers: 0}}
optim: {{name: sgd, momentum: 0.9, lr: {{start: 0.03, shape: constant}}}}
train: {{epochs: 10, steps: 24, batch_size: 8, precision: fp32}}
watch: {{images: 16, every_steps: 12}}
run: {{dir: {run}, device: cpu, log_every_steps: 2, log: []}}
"""


def test_real_runs_another_seed_looks_right_and_a_learning_rate_100_times_too_high_wrong(
    tmp_path, capsys
):
    write_random_images(tmp_path / "images", 24)

    def trained(name, *more):
        path = tmp_path / f"{name}.yaml"
        path.write_text(REAL.format(images=tmp_path / "images", run=tmp_path / name))
        assert pretrain.main([str(path), *more]) == 0
        return str(tmp_path / name)

    seeds = [trained(f"seed{seed}", f"train.seed={seed}") for seed in (0, 1, 2)]
    out = str(tmp_path / "tiny.jsonl")
    assert make_reference([*seeds, "--out", out]) == 0
    page = ["--reference", out, "--out", str(tmp_path / "page.html")]
    capsys.readouterr()
    assert main([trained("good", "train.seed=7"), *page]) == 0
    assert "looks right up to step 24 of tiny (3 seeds)" in capsys.readouterr().out
    assert main([trained("fast", "train.seed=7", "optim.lr=3.0"), *page]) == 1
    said = capsys.readouterr().out
    assert "does NOT look right" in said
    assert "settings that differ: optim.lr.start 3.0 (there 0.03)" in said


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jsonl")), ids=lambda path: path.stem)
def test_shipped_references_are_of_today_s_recipes(path):
    """A recipe that is changed needs a new reference, or its runs would be said to look wrong."""
    reference = load(path)
    given = ["data.path=x", "run.dir=x"]
    config = load_config(RunConfig, recipe_path(path.stem.replace("-", "/", 1)), given)
    assert differing(comparable(config.model_dump(mode="json")), reference.settings) == []
    assert len(reference.logs) >= 3
    assert reference.last_step() >= 40
