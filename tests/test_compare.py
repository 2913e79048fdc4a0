"""Runs in one page: what differs, whether a loss stays near a reference, and refusals."""

import json

import pytest
import yaml

from dense_ssl.compare import main, read_run, verdict, write_comparison
from dense_ssl.config import UserError


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
    (line,) = write_comparison([a, b], out)
    text = out.read_text()
    assert "optim.lr.start" in text
    assert "run.dir" not in text
    assert "41.50" in text
    assert "43.25" in text
    assert text.count("<polyline") == 4  # two runs, losses and learning rates
    assert "<i>" not in text.replace('<i class="key', "")  # names are text, not markup
    assert "as the reference; farthest at step 20" in line


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
    with pytest.raises(UserError, match="1 runs given: name two to 5"):
        write_comparison([a], tmp_path / "page.html")
    assert main([f"{a},{tmp_path / 'none'}", "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.endswith("is it a run folder?\n")
    assert not (tmp_path / "page.html").exists()
