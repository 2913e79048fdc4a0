"""The fault matrix: what it holds, how it judges, and a few of its faults for real."""

import contextlib
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dataprep.pool import STOPPING
from dense_ssl import checkpoint
from dense_ssl.chaos import child, disks, on_training, page
from dense_ssl.chaos.faults import FAULTS, LOADERS, PLACES, TRAINING, Case, cases, left_out
from dense_ssl.chaos.ground import Ground, training_result
from dense_ssl.chaos.injection import injected
from dense_ssl.chaos.ledger import Ledger, hash_of_code
from dense_ssl.chaos.verdicts import Kind, Outcome, Verdict, judge
from dense_ssl.methods.moco import MoCo

ROOT = Path(__file__).resolve().parent.parent
RESULT = {"weights": "abc", "log": [{"step": 1}]}
DONE = Outcome(0)


class InThisProcess:
    """Stands in for the process that starts all others: a command is a call."""

    def run(self, fault, place, arguments, folder):
        out, err = io.StringIO(), io.StringIO()
        before = {which: signal.getsignal(which) for which in STOPPING}
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = child.main([fault, place, "--", *arguments])
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)
        return Outcome(code, out.getvalue(), err.getvalue())

    def warm(self, shards):
        pass  # what is compiled here stays


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("chaos"), InThisProcess())


def fault(name):
    return next(fault for fault in FAULTS if fault.name == name)


def test_every_combination_is_tried_or_has_a_reason():
    tried = {(case.fault.name, case.place) for case in cases()}
    apart = {(fault.name, place) for fault, place, why in left_out() if why}
    assert not tried & apart
    assert tried | apart == {(fault.name, place) for fault in FAULTS for place in PLACES}
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
    for case in cases():
        assert (case.loader in LOADERS) == (case.place in TRAINING)


def test_cells_are_chosen_by_the_beginning_of_their_name():
    assert {case.name for case in cases(["dali"], ["sigterm"])} == {
        "sigterm/epoch-boundary/dali", "sigterm/mid-epoch/dali", "sigterm/checkpoint-write/dali",
        "sigterm/conversion", "sigterm/evaluation",
    }  # fmt: skip
    assert [case.name for case in cases(only=["clock/mid-epoch/ffcv"])] == ["clock/mid-epoch/ffcv"]
    assert cases(only=["nothing"]) == []


def test_a_matrix_that_was_stopped_goes_on_where_it_was(tmp_path):
    path = tmp_path / "runs" / "chaos.jsonl"
    first, second, third = cases(["folder"], ["sigterm"])[:3]
    ledger = Ledger(path, "code")
    assert ledger.known([first]) == {}
    ledger.add(first, Verdict(Kind.FAILED, "lost", 1.0))
    ledger.add(second, Verdict(Kind.EQUAL, "", 2.0))
    with path.open("a") as file:
        file.write('{"case": "sigterm/ch')  # killed while it wrote
    assert ledger.known([first, second, third]) == {second: Verdict(Kind.EQUAL, "", 2.0)}
    assert Ledger(path, "other code").known([first, second]) == {}
    everything = Ledger(path, "other code").known([first, second], any_code=True)
    assert [verdict.kind for verdict in everything.values()] == [Kind.FAILED, Kind.EQUAL]
    code = hash_of_code(ROOT)
    assert code == hash_of_code(ROOT) and len(code) == 16


SENTENCE = "error: no room; make some\n"
TRACEBACK = "Traceback (most recent call last):\n  File ...\nKeyError: 'x'\n"


@pytest.mark.parametrize(
    ("first", "again", "got", "kind", "why"),
    [
        (DONE, DONE, RESULT, Kind.EQUAL, ""),
        (Outcome(75), DONE, RESULT, Kind.EQUAL, ""),
        (Outcome(-9), DONE, RESULT, Kind.EQUAL, ""),
        (Outcome(2, err=SENTENCE), DONE, RESULT, Kind.REFUSED, "no room; make some"),
        (Outcome(75, err=SENTENCE), DONE, RESULT, Kind.REFUSED, "no room; make some"),
        (Outcome(2), DONE, RESULT, Kind.FAILED, "0 sentences"),
        (Outcome(75, err=f"[rank 1] {SENTENCE}" + SENTENCE), DONE, RESULT, Kind.REFUSED, "no room"),
        (Outcome(2, err=SENTENCE + "error: x\n"), DONE, RESULT, Kind.FAILED, "2 sentences"),
        (Outcome(1, err=TRACEBACK), DONE, RESULT, Kind.FAILED, "traceback: KeyError: 'x'"),
        (Outcome(-9, hung=True, seconds=9), DONE, RESULT, Kind.FAILED, "not end within 9 s"),
        (Outcome(75), Outcome(2, err=SENTENCE), RESULT, Kind.FAILED, "ended with code 2"),
        (Outcome(75), DONE, RESULT | {"weights": "abx"}, Kind.FAILED, "weights not as in"),
        (Outcome(75), DONE, {}, Kind.FAILED, "weights and log not as in"),
    ],
)  # fmt: skip
def test_verdicts(first, again, got, kind, why):
    verdict = judge(first, again, got, RESULT)
    assert verdict.kind is kind
    assert why in verdict.why


def test_the_page_is_replaced_between_its_marks_only(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nearlier\n{page.END}\nafter\n")
    results = {
        Case(fault("sigterm"), "mid-epoch", "dali"): Verdict(Kind.EQUAL, seconds=3.2),
        Case(fault("sigterm"), "conversion", "-"): Verdict(Kind.FAILED, "gone", 1),
    }
    page.write(path, page.markdown(results, 3))
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "earlier" not in text
    assert "| SIGTERM | mid-epoch |  | equal, 3 s |  |" in text
    assert "2 of 3 faults tried: 1 equal" in text and "1 lost, hung or unexplained" in text
    (tmp_path / "other.md").write_text("no marks")
    with pytest.raises(ValueError, match="no lines"):
        page.write(tmp_path / "other.md", "table")


def test_damage_to_files(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(90)))
    disks.flip_bit(file, 40)
    changed = [i for i, byte in enumerate(file.read_bytes()) if byte != i]
    assert changed == [40]
    disks.flip_bit(file, 40)
    assert file.read_bytes() == bytes(range(90))
    disks.vanish(file)
    assert not file.exists()
    disks.come_back(tmp_path)
    disks.truncate(file)
    assert file.read_bytes() == bytes(range(60))


def test_disks_fill_up_and_folders_turn_read_only(tmp_path):
    if not disks.can_mount():
        pytest.skip("mounting is not allowed here")
    disk = tmp_path / "disk"
    try:
        assert disks.small_disk(disk)
        disks.fill(disk)
        with pytest.raises(OSError, match="No space"):
            (disk / "file").write_bytes(bytes(1 << 20))
        disks.free(disk)
        (disk / "file").write_bytes(bytes(1 << 20))
        disks.read_only(disk / "run")
        with pytest.raises(OSError, match="Read-only"):
            (disk / "run/file").write_text("x")
        disks.writable(disk / "run")
        (disk / "run/file").write_text("x")
        disks.read_only(disk / "run")  # `release` undoes what is left
    finally:
        disks.release(disk)
    assert not disk.exists()


def test_what_is_replaced_comes_back():
    before = MoCo.forward, torch.save, time.time
    for name in ("nan-loss", "sigterm", "clock"):
        for place in TRAINING:
            with injected(name, place, []):
                assert (MoCo.forward, torch.save, time.time) != before or place == "epoch boundary"
            assert (MoCo.forward, torch.save, time.time) == before


@pytest.mark.parametrize(
    ("name", "place", "kind"),
    [
        ("sigterm", "checkpoint write", Kind.EQUAL),
        ("truncated", "mid-epoch", Kind.EQUAL),
        ("corrupt", "epoch boundary", Kind.REFUSED),
        ("nan-gradient", "epoch boundary", Kind.WITHOUT),
        ("memory", "mid-epoch", Kind.HALVED),
        ("clock", "mid-epoch", Kind.EQUAL),
    ],
)
def test_faults_for_real(ground, name, place, kind):
    verdict = on_training.struck(Case(fault(name), place, "folder"), ground)
    assert verdict.kind is kind, verdict.why


def test_a_run_that_loses_something_is_found_out(ground, monkeypatch):
    def forgetful(folder):
        saved = load_newest(folder)
        return saved and {**saved, "optimizer": {**saved["optimizer"], "state": {}}}  # no momentum

    load_newest = checkpoint.load_newest
    monkeypatch.setattr(checkpoint, "load_newest", forgetful)
    verdict = on_training.struck(Case(fault("sigterm"), "mid-epoch", "folder"), ground)
    assert verdict.kind is Kind.FAILED
    assert verdict.why == "weights and log not as in the undisturbed run"


@pytest.mark.slow
def test_a_process_killed_within_a_checkpoint(ground, tmp_path):
    arguments = ground.training(tmp_path / "run", "folder")
    command = [sys.executable, "-m", "dense_ssl.chaos.child", "kill-all", "checkpoint write", "--"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "run/checkpoints").glob(".step-00000004.pt.writing"))
    again = ground.run("none", "mid-epoch", arguments, "again")
    assert training_result(again, tmp_path / "run") == ground.trained("folder")
