"""`make pretrain`'s choices: which recipe, which loader, what it says, and passing signals and codes on."""

import os
import signal
import threading
import time

import pytest
import torch

from dense_ssl import start


def test_a_cpu_takes_the_demo_recipe_and_says_how_to_take_the_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start.choose_recipe("densecl") == "demo/densecl"
    assert "METHOD=densecl DATA=" in start.other_recipe("densecl", "demo/densecl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert start.choose_recipe("densecl") == "densecl"
    assert "METHOD=demo/densecl" in start.other_recipe("densecl", "densecl")


def test_an_unknown_method_is_refused_before_anything_is_rendered(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start.main(["densecll"]) == 2
    assert "no such recipe" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_with_data_it_is_the_trainer(monkeypatch):
    seen = []
    monkeypatch.setattr(start.pretrain, "main", lambda argv: seen.append(argv) or 0)
    assert start.main(["demo/moco", "--data", "shards/x", "--gpus", "2", "optim.lr=1"]) == 0
    assert seen == [
        ["demo/moco", "data.path=shards/x", "run.dir=runs/demo-moco", "optim.lr=1", "--gpus", "2"]
    ]


def test_a_failing_stage_ends_the_way_with_its_code(monkeypatch):
    codes = iter([0, 2])
    stages = []
    monkeypatch.setattr(start, "run_stage", lambda module, _: stages.append(module) or next(codes))
    assert start.demo("demo/densecl", None, 1, []) == 2
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

    threading.Thread(target=terminate).start()
    assert start.run_stage("patient", [str(ready)]) == 75
