"""Checkpoints: whole or absent, verified, rotated, and never executed."""

import pickle

import pytest
import torch

from dense_ssl import checkpoint
from dense_ssl.config import UserError


def payload(step):
    return {
        "step": step,
        "method": {"w": torch.full((100,), float(step))},
        "config": {"a": [1, "b"]},
    }


def test_round_trip_and_last(tmp_path):
    path = checkpoint.save(tmp_path, payload(5), keep=2)
    assert checkpoint.check(path) is None
    newest = checkpoint.load_newest(tmp_path)
    assert newest["step"] == 5
    assert torch.equal(newest["method"]["w"], torch.full((100,), 5.0))
    assert (tmp_path / "last.pt").resolve() == path.resolve()


def test_rotation_keeps_the_newest_and_the_marked(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, payload(step), keep=2, keep_every=3)
    kept = sorted(int(p.stem.removeprefix("step-")) for p in tmp_path.glob("step-*.pt"))
    assert kept == [3, 6, 7]
    assert {p.stem for p in tmp_path.glob("step-*.json")} == {
        p.stem for p in tmp_path.glob("step-*.pt")
    }


def test_a_damaged_newer_one_takes_no_place_in_the_rotation(tmp_path):
    for step in (10, 19):
        checkpoint.save(tmp_path, payload(step), keep=1, keep_every=10)
    (tmp_path / "step-00000019.pt").write_bytes(b"x")
    for step in (11, 12):  # from 10 on
        checkpoint.save(tmp_path, payload(step), keep=1, keep_every=10)
    assert (tmp_path / "last.pt").is_file()
    assert checkpoint.load_newest(tmp_path)["step"] == 12


@pytest.mark.parametrize("damage", ["flip", "cut", "no_record", "empty"])
def test_a_damaged_newest_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
    checkpoint.save(tmp_path, payload(1), keep=3)
    path = checkpoint.save(tmp_path, payload(2), keep=3)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.with_suffix(".json").unlink()
    assert checkpoint.load_newest(tmp_path)["step"] == 1
    (tmp_path / "step-00000001.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="none of 2 checkpoints is intact"):
        checkpoint.load_newest(tmp_path)


def test_none_without_a_checkpoint(tmp_path):
    assert checkpoint.load_newest(tmp_path / "absent") is None
    assert checkpoint.load_newest(tmp_path) is None


def test_a_killed_write_leaves_the_older_one_and_is_cleaned_up(tmp_path):
    checkpoint.save(tmp_path, payload(1), keep=2)
    (tmp_path / ".step-00000002.pt.writing").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path)["step"] == 1
    checkpoint.save(tmp_path, payload(3), keep=2)
    assert not list(tmp_path.glob(".*.writing"))


def test_code_in_a_checkpoint_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "x.pt"
    torch.save({"format": checkpoint.FORMAT, "step": 1, "bomb": Bomb()}, path)
    with pytest.raises(UserError, match="not readable as a checkpoint"):
        checkpoint.read(path)
    path.write_bytes(pickle.dumps({"format": checkpoint.FORMAT}, protocol=2))
    with pytest.raises(UserError, match="not readable as a checkpoint"):
        checkpoint.read(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoint.read(path)


def test_a_full_disk_is_one_sentence_and_leaves_the_older_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, payload(1), keep=2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(tmp_path, payload(2), keep=2)
    assert checkpoint.load_newest(tmp_path)["step"] == 1
    assert not list(tmp_path.glob(".*.writing"))
