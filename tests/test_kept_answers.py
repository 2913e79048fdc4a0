"""What a run's folder knows is answered without torch; what may have changed is computed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataprep.synthetic import write_class_folders
from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.evaluation import catalogue, results, suite
from dense_ssl.evaluation.__main__ import main
from dense_ssl.evaluation.kept import answer_of, question_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def asked(tmp_path) -> list[str]:
    torch.manual_seed(3)
    torch.save(
        make_backbone(BackboneConfig(name="test_vit")).trunk.state_dict(), tmp_path / "net.pth"
    )
    for split in ("train", "val"):
        write_class_folders(tmp_path / "d" / split, 3, 4)
    return [
        "knn", "--checkpoint", f"{tmp_path}/net.pth?arch=test_vit", "--data", str(tmp_path / "d"),
        "--out", str(tmp_path / "run"), "--device", "cpu", "size=32", "k=3",
    ]  # fmt: skip


def test_the_same_question_is_answered_at_once(asked, tmp_path, capsys, monkeypatch):
    assert main(asked) == 0
    first = capsys.readouterr()
    lines = (tmp_path / "run/eval.jsonl").read_text()
    monkeypatch.setattr(suite, "evaluate", None)  # computing would now fail
    assert main(asked) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "knn: as computed 20" in second.err and "--again" in second.err
    assert (tmp_path / "run/eval.jsonl").read_text() == lines
    with pytest.raises(TypeError):
        main([*asked, "--again"])


@pytest.mark.parametrize(
    "change",
    ["setting", "weights", "image", "in place", "torn", "forgotten", "program", "neighbours"],
)
def test_what_may_have_changed_is_computed(change, asked, tmp_path, capsys, monkeypatch):
    assert main(asked) == 0
    kept = tmp_path / "run/eval.jsonl"
    if change == "setting":
        asked = [*asked, "resampling=bicubic"]
    elif change == "weights":
        torch.manual_seed(4)
        other = make_backbone(BackboneConfig(name="test_vit")).trunk.state_dict()
        torch.save(other, tmp_path / "net.pth")
    elif change == "image":
        min((tmp_path / "d/train/class_0").iterdir()).unlink()
    elif change == "in place":  # of the same size and date
        path = min((tmp_path / "d/train/class_0").iterdir())
        before = path.stat()
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "neighbours":  # damaged; another vote must not take them
        for path in (tmp_path / "run/features").glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-8])
        asked = [*asked, "k=2"]
    elif change == "torn":  # half of its rows
        kept.write_text(kept.read_text().splitlines(keepends=True)[0])
    elif change == "forgotten":
        kept.unlink()
        shutil.rmtree(tmp_path / "run/features")
    else:
        monkeypatch.setattr("dense_ssl.evaluation.kept._LIBRARIES", ("numpy",))
    capsys.readouterr()
    before = len(kept.read_text().splitlines()) if kept.exists() else 0
    assert main(asked) == 0
    said = capsys.readouterr().err
    assert "as computed" not in said
    assert ("another vote" in said) == (change == "torn")  # whose neighbours are whole
    assert len(kept.read_text().splitlines()) == before + 2


def test_other_votes_are_taken_of_kept_neighbours(asked, tmp_path, capsys, monkeypatch):
    """As computing gives them, into the same files; two networks of untrained features are kept too."""
    assert main([*asked, "k=3,5"]) == 0
    other = [*asked, "k=4", "temperature=0.5"]
    anew = [word.replace(str(tmp_path / "run"), str(tmp_path / "anew")) for word in other]
    assert main(anew) == 0
    lines = capsys.readouterr().out.splitlines()
    computed = [line for line in lines if line.startswith("knn/")][-2:]
    picture = tmp_path / "run/eval/knn-confusion.png"
    picture.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(suite, "evaluate", None)  # computing would now fail
        assert main(other) == 0
        shown = capsys.readouterr()
        assert [line for line in shown.out.splitlines() if line.startswith("knn/")] == computed
        assert "another vote" in shown.err
        assert picture.read_bytes() == (tmp_path / "anew/eval/knn-confusion.png").read_bytes()
        assert main(other) == 0 and "as computed" in capsys.readouterr().err
    first, second = (
        list(map(json.loads, path.read_text().splitlines()))[-2:]
        for path in (tmp_path / "run/eval.jsonl", tmp_path / "anew/eval.jsonl")
    )
    for one, two in zip(first, second, strict=True):
        differ = {name for name in one if one[name] != two[name]}
        assert differ <= {"time", "seconds", "memory_gb"}


def test_features_belong_to_the_program_that_made_them(asked, tmp_path, monkeypatch):
    assert main(asked) == 0
    features = sorted((tmp_path / "run/features").glob("*.pt"))
    assert len(features) == 4  # two splits, trained and untrained
    monkeypatch.setattr("dense_ssl.evaluation.kept._MEASURING", ("dense_ssl/backbones",))
    assert main([*asked, "--again"]) == 0
    assert len(list((tmp_path / "run/features").glob("*.pt"))) == 8


def test_the_others_of_several_tasks_are_computed(asked, capsys, monkeypatch):
    assert main(asked) == 0
    alone = capsys.readouterr().out.splitlines()
    seen = []

    def evaluate(tasks, *_, **__):
        seen.append(tasks)
        return results.results_of(
            {"top1": 5.0}, {}, task="linear", protocol="linear/v1", checkpoint="", weights="",
            data="", settings={}, omitted=[],
        )  # fmt: skip

    monkeypatch.setattr(suite, "evaluate", evaluate)
    assert main(["linear,knn", *asked[1:]]) == 0
    assert seen == [["linear"]]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    at = [row[0] for row in rows if row].index("linear/v1")
    known = [line.split() for line in alone if line.startswith("knn/v1")]
    assert [row for row in rows if row][at + 1 : at + 3] == known


def test_links_and_unseen_folders(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/up").symlink_to(tmp_path)  # a loop
    (tmp_path / "d/nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "w.pth").touch()
    about = {"checkpoint": str(tmp_path / "w.pth"), "random": True, "device": "cpu"}
    first = question_of("knn", data=tmp_path / "d", settings=["davis.size=3"], **about)
    assert first == question_of("knn", data=tmp_path / "d", settings=[], **about)
    assert first != question_of("knn", data=tmp_path / "d", settings=["size=3"], **about)
    (tmp_path / "list.txt").write_text("a")
    named = [f"subset={tmp_path / 'list.txt'}"]
    listed = question_of("knn", data=tmp_path / "d", settings=named, **about)
    (tmp_path / "list.txt").write_text("a, b")
    assert listed != question_of("knn", data=tmp_path / "d", settings=named, **about)
    assert question_of("knn", data=tmp_path / "none", settings=[], **about) == ""
    assert answer_of(tmp_path, "") == ([], "")


def test_every_task_of_the_catalogue_is_a_protocol():
    for name in catalogue.TASKS:
        protocol = suite.protocol_of(name)
        assert callable(protocol.load) and callable(protocol.run)
        assert getattr(suite.config_of(name), "task", name) == name


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["dense_ssl.evaluation", "--help"], 0, "segment-fcn"),
        (["dense_ssl.evaluation", "fly", "--checkpoint", "x", "--data", "."], 2, "no task 'fly'"),
        (["dense_ssl.evaluation", "knn", "--checkpoint", "x", "--data", "none"], 2, "no such data"),
        (["dense_ssl.evaluation", "knn", "--checkpoint", "x", "--data", "."], 2, "no such checkpoint"),
        (["dense_ssl.start", "--help"], 0, "--eval-data"),
        (["dense_ssl.start", "densecl", "--eval", "fly"], 2, "no task 'fly'"),
    ],
)  # fmt: skip
def test_words_are_answered_without_torch(words, code, says, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert (done.returncode, says in done.stdout + done.stderr) == (code, True), done.stderr


def test_an_answer_that_left_something_out_is_computed_again(tmp_path):
    about = {
        "task": "knn",
        "protocol": "knn/v1",
        "checkpoint": "",
        "weights": "",
        "data": "",
        "settings": {},
    }
    for omitted, known in (([], True), (["val: image not readable: 1"], False)):
        found = results.results_of({"top1": 5.0}, {}, omitted=omitted, **about)
        results.append_results(tmp_path, found, "question")
        assert bool(answer_of(tmp_path, "question")[0]) is known
