"""The page about this machine: what a finding looks like, that checks really call, what a forecast says."""

import shutil
from types import SimpleNamespace as Usage

import pytest
import torch

from dense_ssl.config import load
from dense_ssl.doctor import machine, software
from dense_ssl.doctor.__main__ import main
from dense_ssl.doctor.findings import Finding, Severity, attempt, page, summary, worst
from dense_ssl.doctor.forecast import Cost, _memory, forecast, measure_step
from dense_ssl.doctor.machine import check_machine
from dense_ssl.loaders.source import decode
from dense_ssl.run_config import RunConfig, recipe_path

SMALL = [
    "method.backbone.name=test_resnet", "method.backbone.bn_groups=1", "method.views.0.size=32",
    "method.queue_length=64", "data.loader=folder", "data.workers=0", "train.precision=fp32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet_logger():
    import logging

    logger = logging.getLogger("dense_ssl")
    before = logger.level
    yield
    logger.setLevel(before)


def test_a_failing_check_is_a_finding_with_its_reason_and_remedy():
    def check():
        raise ImportError("no module named ffcv\nand more")

    finding = attempt("ffcv", check, Severity.WARNING, "run `make setup`")
    assert finding == Finding(
        "ffcv", "ImportError: no module named ffcv", Severity.WARNING, "run `make setup`"
    )
    assert attempt("torch", lambda: "2", Severity.BROKEN, "x") == Finding("torch", "2")


def test_the_page_marks_severity_and_the_worst_is_the_exit_code():
    sections = [
        ("A", [Finding("one", "1"), Finding("longer", "2", Severity.WARNING, "do this")]),
        ("nothing", []),
    ]
    assert page(sections).splitlines() == [
        "A",
        "  ok    one     1",
        "  warn  longer  2",
        "                -> do this",
    ]
    assert worst(sections) == 1
    assert summary(sections) == "It works; longer could be better."
    assert summary([("A", [Finding("gpu", "x", Severity.BROKEN)])]).startswith(
        "This cannot run here"
    )
    assert summary([]) == "All is well."
    assert worst([]) == 0


def test_a_library_that_does_nothing_is_found_out(monkeypatch):
    ffcv = pytest.importorskip("ffcv.libffcv")
    monkeypatch.setattr(ffcv, "imdecode", lambda *_: None)
    found = {finding.name: finding for finding in software.check_software()}
    assert found["ffcv"].severity is Severity.WARNING
    assert "decoded to nothing" in found["ffcv"].value
    assert found["torch"].value.startswith(torch.__version__)
    assert found["timm"].severity is Severity.GOOD


def test_the_test_image_is_one_that_decodes():
    assert decode(software.encoded_image()).size == (500, 375)


def test_the_machine_is_described_even_where_the_folder_is_not_there_yet(tmp_path):
    found = {finding.name: finding for finding in check_machine(tmp_path / "not" / "there")}
    assert str(tmp_path) in found["free space"].value
    assert found["cpu"].value.endswith("cores")


def test_memory_grows_with_images_and_the_remedy_keeps_the_global_batch(monkeypatch):
    config = load(RunConfig, recipe_path("demo/moco"), ["data.path=x", "run.dir=x", *SMALL])
    cost = measure_step(config, 0)
    assert cost.bytes_per_image > 0
    weights = sum(p.numel() * 4 for p in torch.nn.Linear(1, 1).parameters())
    assert cost.fixed_bytes > weights
    assert cost.memory(64) - cost.memory(32) == pytest.approx(32 * cost.bytes_per_image)

    class Card:
        total_memory = 24e9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    large = Cost(seconds=1.0, fixed_bytes=2e9, bytes_per_image=0.5e9)
    assert _memory(large, 32).severity is Severity.GOOD
    refused = _memory(large, 128)  # 66 GB; 40 images fit
    assert refused.severity is Severity.BROKEN
    assert "train.micro_batch=40 " in refused.remedy
    assert "not one image" in _memory(Cost(1.0, 23e9, 1e9), 8).remedy


def test_the_forecast_names_the_limit_and_the_hours(tmp_path, monkeypatch):
    from dataprep.synthetic import write_random_images

    write_random_images(tmp_path, 64)
    given = [f"data.path={tmp_path}", "run.dir=x", *SMALL, "train.epochs=100"]
    config = load(RunConfig, recipe_path("demo/moco"), given)
    found = {finding.name: finding for finding in forecast(config, 1, with_data=True)}
    assert set(found) == {"step", "memory", "checkpoints", "loader", "whole run", "limit"}
    assert "100 epochs of 64 images" in found["whole run"].value
    assert found["limit"].value in ("the network, on a CPU", "the loader (folder)")
    assert found["limit"].remedy
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=1000))
    full = {finding.name: finding for finding in forecast(config, 1, with_data=False)}
    assert full["checkpoints"].severity is Severity.BROKEN


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "METHOD=nothing: no such recipe"),
        (["demo/moco", *SMALL, "train.batch_size=9", "--gpus", "2"], "train.batch_size: 9"),
        (["demo/moco", *SMALL, "--data", "not-there"], "data.path=not-there: no such file"),
    ],
)
def test_wrong_input_is_one_sentence_and_code_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error


@pytest.mark.parametrize(("load", "cores", "severity"), [(9.0, 8, 1), (5.0, 8, 1), (1.0, 8, 0)])
def test_other_work_is_said_because_rates_depend_on_it(monkeypatch, load, cores, severity):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr("dense_ssl.doctor.machine.share_of_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    finding = machine._threads()
    assert finding.severity == severity
    assert ("what it leaves" in finding.remedy) == (load > cores)
