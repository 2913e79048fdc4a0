"""The evaluation command: arguments, results on disk, the untrained network beside, one-line errors."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataprep.scenes import render
from dataprep.synthetic import write_class_folders
from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.config import UserError
from dense_ssl.evaluation import results, suite
from dense_ssl.evaluation.__main__ import main
from dense_ssl.evaluation.catalogue import TASKS, data_paths, task_names
from dense_ssl.evaluation.classification import knn_again, linear
from dense_ssl.evaluation.classification.accuracy import confusion_sheet
from dense_ssl.evaluation.protocol_settings import OWN, departs
from dense_ssl.evaluation.suite import config_of, configs_of, evaluate
from dense_ssl.weights.fingerprint import weights_sha256


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "s"
    render(out, count=24, seed=1, workers=1, val_share=0.25)
    return out


def test_arguments():
    assert task_names("knn,segment,knn") == ["knn", "segment"]
    with pytest.raises(UserError, match="no task 'fly'; there are: knn, .*segment"):
        task_names("knn,fly")
    configs = configs_of(["knn", "segment"], ["segment.size=64,96", "size=128", "k=5"])
    assert configs["knn"].size == 128 and configs["knn"].k == (5,)
    assert configs["segment"].size == (64, 96)
    with pytest.raises(UserError, match=r"batchsize: unknown key; did you mean batch_size\?"):
        configs_of(["knn"], ["batchsize=3"])
    with pytest.raises(UserError, match=r"steps: .*greater than or equal to 1"):
        configs_of(["segment"], ["segment.steps=0"])


@pytest.mark.parametrize(
    ("task", "settings", "marked"),
    [
        ("knn", [], False),
        ("knn", ["k=5", "resampling=bicubic", "pool=both", "batch_size=3"], False),
        ("knn", ["size=96"], True),
        ("knn", ["max_train=100"], True),
        ("linear", ["lr=30", "schedule=step", "batch_size=256", "resampling=bilinear"], False),
        ("linear", ["lr=30"], True),
        ("linear", ["variant=cached"], False),
        ("finetune", ["recipe=udi", "precision=fp32"], False),
        ("finetune", ["recipe=udi", "epochs=3"], True),
        ("finetune", ["recipe=semi", "subset=1%"], False),
        ("finetune", ["recipe=transfer", "lr=7.5e-5"], False),
        ("finetune", ["recipe=transfer", "lr=1e-3"], True),
        ("attention", ["batch_size=4"], False),
        ("attention", ["mass=0.5"], True),
        ("copydays", ["size=320"], False),
        ("linear", ["weight_decay=0,1e-6", "optimizer=sgd,lars"], False),
        ("linear", ["weight_decay=1e-6"], True),
        ("landmarks", ["multi_scale=false"], True),
        ("object-knn", ["margin=0"], True),
        ("davis", ["settings=revisiting"], False),
        ("davis", ["size=240"], True),
        ("svm", ["variant=low-shot", "features=feat4,feat5"], False),
        ("svm", ["train=train"], True),
        ("segment", ["steps=5"], True),
        ("hummingbird", ["memory_size=1000"], False),
        ("attention", ["size=240"], True),
        ("copydays", ["size=320"], False),
    ],
)
def test_what_differs_from_a_protocol_is_marked(task, settings, marked):
    assert departs(task, configs_of([task], settings)[task]) is marked


def test_every_task_knows_its_own_settings():
    for task in TASKS:
        trained = hasattr(config_of(task), "published")
        assert trained != (task in OWN), task


def test_data_arguments(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b=c").mkdir()
    a, odd = str(tmp_path / "a"), str(tmp_path / "b=c")
    assert data_paths(["knn", "segment"], a) == {"knn": Path(a), "segment": Path(a)}
    assert data_paths(["knn", "segment"], f"knn={a},segment={odd}")["segment"] == Path(odd)
    assert data_paths(["knn"], odd)["knn"] == Path(odd)
    with pytest.raises(UserError, match="segment: no data given"):
        data_paths(["knn", "segment"], f"knn={a}")
    with pytest.raises(UserError, match="no data given"):
        data_paths(["knn"], "")
    with pytest.raises(UserError, match="no such data folder"):
        data_paths(["knn"], f"{a}/missing")
    with pytest.raises(UserError, match="no task 'davsi'"):
        data_paths(["knn"], f"knn={a},davsi={a}")


def test_command_end_to_end(tmp_path, scenes, capsys):
    folders = tmp_path / "folders"
    write_class_folders(folders / "train", classes=3, per_class=6, size=(40, 48))
    write_class_folders(folders / "val", classes=3, per_class=4, seed=1, size=(40, 48))
    arguments = [
        "knn,segment", "--checkpoint", "random:resnet18", "--out", str(tmp_path / "run"),
        "--data", f"knn={folders},segment={scenes}", "size=32", "k=3", "segment.steps=5",
        "max_train=18", "--device", "cpu",
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "knn/v1*" in shown and "segment-linear/v1*" in shown and "mIoU" in shown
    assert shown.count("\n* other settings") == 1
    lines = [json.loads(line) for line in (tmp_path / "run/eval.jsonl").read_text().splitlines()]
    assert [(line["task"], line["metric"]) for line in lines] == [
        ("knn", "top1@3"), ("knn", "top5@3"),
        ("segment", "mIoU"), ("segment", "aAcc"), ("segment", "mAcc"),
    ]  # fmt: skip
    for line in lines:
        assert 0 <= line["value"] <= 100 and len(line["weights"]) == 64
        assert line["settings"]["size"] in (32, [32, 32]) and line["chance"] is not None
    assert main([*arguments, "--again"]) == 0
    again = [json.loads(line) for line in (tmp_path / "run/eval.jsonl").read_text().splitlines()]
    assert [line["value"] for line in again[5:]] == [line["value"] for line in lines]


def test_trained_network_stands_beside_its_random_self(tmp_path):
    """The same architecture untrained is computed once per settings and kept."""
    torch.manual_seed(5)
    trunk = make_backbone(BackboneConfig(name="resnet18")).trunk
    torch.save(trunk.state_dict(), tmp_path / "net.pth")
    write_class_folders(tmp_path / "d/train", 4, 4)
    write_class_folders(tmp_path / "d/val", 4, 4, seed=1)
    run = ["knn"], str(tmp_path / "net.pth"), str(tmp_path / "d"), ["size=32", "k=3"]
    first = evaluate(*run, out=tmp_path / "run", device="cpu")
    assert all(result.random_init is not None for result in first)
    baselines = tmp_path / "run" / results.BASELINES
    record = json.loads(baselines.read_text())
    record["values"] = dict.fromkeys(record["values"], 12.5)
    baselines.write_text(json.dumps(record) + "\n")
    second = evaluate(*run, out=tmp_path / "run", device="cpu")
    assert {result.random_init for result in second} == {12.5}  # from the file
    assert [r.value for r in second] == [r.value for r in first]
    evaluate(*run[:3], ["size=32", "k=2"], out=tmp_path / "run", device="cpu")
    assert len(baselines.read_text().splitlines()) == 2  # other settings
    without = evaluate(*run, random=False, device="cpu")
    assert all(result.random_init is None for result in without)


def test_equal_weights_read_in_two_ways_share_no_features(tmp_path):
    """Positions resampled as timm does and as DINO does: two networks of the same tensors."""
    torch.manual_seed(6)
    trunk = make_backbone(BackboneConfig(name="test_vit")).trunk.state_dict()
    trunk["pos_embed"] *= 50  # so that it matters
    torch.save(trunk, tmp_path / "plain.pth")
    teacher = {f"backbone.{name}": value for name, value in trunk.items()}
    torch.save({"student": teacher, "teacher": teacher}, tmp_path / "dino.pth")
    write_class_folders(tmp_path / "d/train", 2, 3)
    write_class_folders(tmp_path / "d/val", 2, 3, seed=1)
    given = str(tmp_path / "d"), ["size=48", "k=1"]
    for name in ("plain", "dino"):
        spec = f"{tmp_path / name}.pth?arch=test_vit"
        (found, _) = evaluate(
            ["knn"], spec, *given, out=tmp_path / "run", random=False, device="cpu"
        )
    assert len(list((tmp_path / "run/features").glob("*.pt"))) == 4  # two splits of each
    assert found.weights == weights_sha256(trunk)


def test_pictures_notes_and_costs_are_kept(tmp_path, monkeypatch):
    titles = []
    for task in (knn_again, linear):
        monkeypatch.setattr(
            task,
            "confusion_sheet",
            lambda *given: titles.append(given[3]) or confusion_sheet(*given),
        )
    write_class_folders(tmp_path / "d/train", classes=3, per_class=8, size=(40, 48))
    write_class_folders(tmp_path / "d/val", classes=3, per_class=4, seed=1, size=(40, 48))
    settings = ["size=32", "k=3", "linear.variant=cached", "linear.epochs=3", "lr=0.1,1"]
    given = ["knn,linear", "--checkpoint", "random:test_resnet", "--data", str(tmp_path / "d")]
    assert main([*given, "--out", str(tmp_path / "run"), "--device", "cpu", *settings]) == 0
    assert sorted(path.name for path in (tmp_path / "run/eval").iterdir()) == [
        "knn-confusion.png", "linear-confusion.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "run/eval/linear-confusion.png") as sheet:
        assert min(sheet.size) > 80
    # A title names the protocol as the table does: with a star, as size is not 224 here.
    assert [title.partition(":")[0] for title in titles] == ["knn/v1*", "linear-cached/v1*"]
    lines = [json.loads(line) for line in (tmp_path / "run/eval.jsonl").read_text().splitlines()]
    of_linear = [line for line in lines if line["task"] == "linear"]
    assert {line["metric"] for line in of_linear} == {"top1", "top5"}
    for line in of_linear:
        assert line["protocol"] == "linear-cached/v1*" and line["settings"]["seed"] == 0
        assert line["notes"]["lr"] in (0.1, 1) and line["seconds"] > 0 and line["memory_gb"] > 0.1


def test_what_needs_more_than_is_here_is_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    given = ["--checkpoint", "random:resnet18", "--data", str(tmp_path)]
    assert main(["svm", *given]) == 2
    assert "svm: needs sklearn, not installed; run `make setup`" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["knn,svm", *given]) == 2
    assert "svm: runs in one process; start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["knn", "linear", "semi-supervised", "finetune", "svm"])
def test_an_empty_folder_is_one_sentence(task, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    given = [task, "--checkpoint", "random:test_resnet", "--data", str(tmp_path)]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {tmp_path}") and captured.err.count("\n") == 1
    assert "nothing usable" in captured.err or "no VOC2007" in captured.err


def test_command_reports_mistakes_in_one_line(tmp_path, capsys):
    for arguments, message in (
        (["fly", "--checkpoint", "random:resnet18", "--data", str(tmp_path)], "no task 'fly'"),
        (
            ["knn", "--checkpoint", str(tmp_path / "x"), "--data", str(tmp_path)],
            "no such checkpoint",
        ),
        (["knn", "--checkpoint", "random:resnet18", "--data", str(tmp_path)], "no folder train/"),
        (["knn", "--checkpoint", "random:resnet18", "--data", str(tmp_path), "a=1"], "unknown key"),
        (
            ["knn", "--checkpoint", "random:resnet18", "--data", str(tmp_path), "--device", "tpu9"],
            "no such device",
        ),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_broken_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"task": "kn')
    results.append(path, [{"task": "knn"}])
    assert path.read_text().splitlines() == ['{"task": "kn', '{"task": "knn"}']
    results.append(path, [{"task": "b"}])
    assert len(path.read_text().splitlines()) == 3


def test_table_lines_up():
    found = results.results_of(
        {"top1@20": 51.25, "chance/top1": 10.0}, {"top1@20": 30.0}, task="knn", protocol="knn/v1",
        checkpoint="c", weights="w", data="d", settings={}, omitted=[],
    )  # fmt: skip
    head, _, row = results.table(found).splitlines()
    assert row.split() == ["knn/v1", "top1@20", "51.25", "30.00", "+21.25", "10.00"]
    assert len(head) == len(row)


def test_short_memory_is_one_sentence(monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has")

    monkeypatch.setattr("dense_ssl.evaluation.suite._evaluate", full)
    assert main(["knn", "--checkpoint", "random:test_resnet", "--data", "."]) == 2
    assert capsys.readouterr().err == (
        "error: CUDA out of memory: take a smaller batch_size or size\n"
    )
