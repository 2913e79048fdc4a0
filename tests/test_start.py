"""`make pretrain`'s choices: which recipe, which loader, what it says, and passing signals and codes on."""

import os
import signal
import threading
import time

import pytest
import torch

from dense_ssl import start, whole_way


def test_a_cpu_takes_the_demo_recipe_and_says_how_to_take_the_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert whole_way.choose_recipe("densecl") == "demo/densecl"
    assert "METHOD=densecl DATA=" in whole_way.other_recipe("densecl", "demo/densecl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert whole_way.choose_recipe("densecl") == "densecl"
    assert "METHOD=demo/densecl" in whole_way.other_recipe("densecl", "densecl")


def test_an_unknown_method_is_refused_before_anything_is_rendered(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start.main(["densecll"]) == 2
    assert "no such recipe" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_with_data_it_is_the_trainer(monkeypatch):
    seen = []
    monkeypatch.setattr(whole_way.pretrain, "main", lambda argv: seen.append(argv) or 0)
    assert start.main(["demo/moco", "--data", "shards/x", "--gpus", "2", "optim.lr=1"]) == 0
    assert seen == [
        ["demo/moco", "data.path=shards/x", "run.dir=runs/demo-moco", "optim.lr=1", "--gpus", "2"]
    ]


def test_an_evaluation_follows_the_training_and_is_checked_before(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(whole_way.pretrain, "main", lambda argv: seen.append("training") or code)
    monkeypatch.setattr(whole_way, "run_stage", lambda *stage: seen.append(stage) or 0)
    given = ["moco", "--data", str(tmp_path), "--run", "runs/a", "--eval", "knn,linear"]
    code = 0
    assert start.main([*given, "--eval-args", "linear.epochs=3 size=96"]) == 0
    assert seen[1] == (
        "dense_ssl.evaluation",
        ["knn,linear", "--checkpoint", "runs/a", "--data", str(tmp_path), "linear.epochs=3", "size=96"],
    )  # fmt: skip
    code = 75
    seen.clear()
    assert start.main(given) == 75 and seen == ["training"]
    seen.clear()
    for wrong, sentence in (
        (["--eval", "knnn"], "no task 'knnn'"),
        (["--eval-data", str(tmp_path / "none")], "no such data folder"),
        (["--eval-args", "k=0"], "greater than or equal to 1"),
    ):
        assert start.main([*given, *wrong]) == 2 and not seen
        assert sentence in capsys.readouterr().err


def test_the_demo_evaluates_what_is_asked_for(monkeypatch, tmp_path):
    stages = []
    monkeypatch.setattr(
        whole_way, "run_stage", lambda module, given: stages.append([module, *given]) or 0
    )
    monkeypatch.setattr(whole_way.checkpoint, "load_newest", lambda _: {"method": {}})
    asked = ["--eval", "knn", "--eval-data", str(tmp_path), "--eval-args", "knn.size=64"]
    assert start.main(["demo/densecl", "--run", "runs/x", *asked]) == 0
    (evaluation,) = [stage for stage in stages if stage[0] == "dense_ssl.evaluation"]
    assert evaluation[1:5] == ["knn", "--checkpoint", "runs/x", "--data"]
    assert evaluation[5] == str(tmp_path) and evaluation[-1] == "knn.size=64"
    assert not any("segment" in text for text in evaluation)


def test_a_failing_stage_ends_the_way_with_its_code(monkeypatch):
    codes = iter([0, 2])
    stages = []
    monkeypatch.setattr(
        whole_way, "run_stage", lambda module, _: stages.append(module) or next(codes)
    )
    assert whole_way.demo("demo/densecl", None, 1, [], ["knn", ""]) == 2
    assert stages == ["dataprep", "dense_ssl.pretrain"]


@pytest.mark.slow
def test_sigterm_reaches_the_stage_and_its_code_comes_back(tmp_path, monkeypatch):
    (tmp_path / "patient.py").write_text(
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ready = tmp_path / "ready"

    def terminate():
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    assert whole_way.run_stage("patient", [str(ready)]) == 75
