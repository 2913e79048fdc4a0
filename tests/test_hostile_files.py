"""No file, however damaged, makes a reader crash, hang, fill the memory, or touch what is not its own."""

import contextlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataprep import plain_json
from dataprep.manifest import DataError, load_array
from dense_ssl import plain_torch, plain_yaml
from dense_ssl.config import UserError
from dense_ssl.fuzz import __main__ as program
from dense_ssl.fuzz.bounds import Broken, bounded
from dense_ssl.fuzz.mutations import a_number_replaced, mutated
from dense_ssl.fuzz.targets import TARGETS, Range, Target, chosen
from dense_ssl.pictures import open_image
from dense_ssl.weights import plain_pickle

FEW = settings(
    max_examples=8, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
QUIET = pytest.mark.filterwarnings("ignore")  # what decoders and numpy remark on damaged files
NAMES = [target.name for target in TARGETS]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Range(tmp_path_factory.mktemp("range"))


def named(name):
    (target,) = chosen(name)
    return target


@QUIET
@pytest.mark.parametrize("name", NAMES)
def test_sound_files_are_read_and_damaged_ones_refused(ground, name):
    target = named(name)
    sound = ground.sound_files(target)
    assert [ground.attempt(target, data) for data in sound] == [None] * len(sound)

    @FEW
    @given(st.integers(0, 2**32), st.booleans())
    def damaged(seed, number):
        rng = np.random.default_rng(seed)
        data = sound[seed % len(sound)]
        data = a_number_replaced(data[:50_000], rng) if number else mutated(data, sound, rng)
        assert ground.attempt(target, data) is None

    @FEW
    @given(st.binary(max_size=200))
    def anything(data):
        assert ground.attempt(target, data) is None

    damaged()
    anything()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize("name", ["manifest", "coco", "checksum", "log", "results", "memory-note"])
def test_json_of_the_right_keys_and_wrong_values(ground, name):
    target = named(name)
    sound = json.loads(ground.sound_files(target)[0].splitlines()[0] if name == "log" else
                       ground.sound_files(target)[0])  # fmt: skip

    @FEW
    @given(st.data())
    def wrong(data):
        content = json.loads(json.dumps(sound))
        node = content
        while isinstance(node, dict | list) and node:
            key = data.draw(
                st.sampled_from(list(node) if isinstance(node, dict) else range(len(node)))
            )
            if not isinstance(node[key], dict | list) or data.draw(st.booleans()):
                node[key] = data.draw(JSON)
                break
            node = node[key]
        assert ground.attempt(target, json.dumps(content).encode()) is None

    wrong()


def test_what_breaks_a_promise_is_found_out(ground, tmp_path):
    def reader(fault):
        return Target("faulty", "file", fault)

    outside = tmp_path / "outside"
    assert "KeyError" in (ground.attempt(reader(lambda folder: {}["x"]), b"") or "")
    assert "outside of its folder" in (
        ground.attempt(reader(lambda folder: outside.write_text("x")), b"") or ""
    )
    assert not outside.exists()
    assert "os.system" in (ground.attempt(reader(lambda folder: os.system("true")), b"") or "")
    assert ground.attempt(reader(lambda folder: (folder / "own").write_text("x")), b"") is None
    with pytest.raises(Broken, match="MiB"), bounded(tmp_path):
        np.ones(700 << 20, np.uint8)


def test_the_program_keeps_what_it_finds_and_reads_it_again(tmp_path, monkeypatch, capsys):
    found = tmp_path / "found"
    arguments = ["--only", "memory-note", "--minutes", "0.01", "--found", str(found)]
    monkeypatch.setattr(program.logging, "disable", lambda level: None)
    assert program.main(arguments) == 0
    assert "0 broke a promise" in capsys.readouterr().out
    monkeypatch.setattr(program.Range, "attempt", lambda *_: "KeyError: 'x' at file.py:1")
    assert program.main(arguments) == 1
    (kept,) = (found / "memory-note").iterdir()
    assert program.main([*arguments, "--file", str(kept)]) == 1
    assert program.main(["--only", "nothing"]) == 2


# --- made on purpose ------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


EXPLOITS = {
    "os.system": pickle.dumps(Call(os.system, "touch pwned"), 2),
    "posix by protocol 0": b"cposix\nsystem\n(S'touch pwned'\ntR.",
    "eval": pickle.dumps(Call(eval, "open('pwned', 'w')"), 2),
    "exec": pickle.dumps(Call(exec, "open('pwned', 'w')"), 4),
    "getattr": pickle.dumps(Call(getattr, {}, "clear"), 2),
    "subprocess": pickle.dumps(Call(subprocess.Popen, ["touch", "pwned"]), 2),
    "by stack": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch pwned\x85R.",
    "instance": b"(S'touch pwned'\nios\nsystem\n.",
    "by extension": b"\x80\x02\x82\x01.",
    "attribute path": b"\x80\x04\x8c\x05numpy\x8c\x0bos.system\xff\x93.",
    "object array": b"\x80\x02cnumpy\nndarray\n(K\x01\x85X\x01\x00\x00\x00OX\x08\x00\x00\x00AAAAAAAAtR.",
    "byte array of 8 GB": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R.",
    "note far away": b"\x80\x02]r\xff\xff\xff\x3f.",
    "long string": b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00abc.",
    "nested": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    "contains itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
}


@pytest.mark.parametrize("name", EXPLOITS)
def test_pickles_run_no_code_and_take_no_memory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare, packed = tmp_path / "bare.pkl", tmp_path / "packed.pt"
    bare.write_bytes(EXPLOITS[name])
    sound = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, sound)
    with zipfile.ZipFile(sound) as archive, zipfile.ZipFile(packed, "w") as other:
        for member in archive.infolist():
            data = EXPLOITS[name] if member.filename.endswith("data.pkl") else archive.read(member)
            other.writestr(member.filename, data)
    with bounded(tmp_path):
        with contextlib.suppress(
            Exception
        ):  # of any type, by its description; plain data is no sin
            plain_pickle.read(bare)
        # That one is an empty list: only the place for its note is out of proportion.
        if name == "note far away":
            assert plain_torch.load(packed) == []
        else:
            with pytest.raises(plain_torch.NotPlain):
                plain_torch.load(packed)
        with pytest.raises(plain_torch.NotPlain):
            plain_torch.load(bare)
    assert not list(tmp_path.glob("pwned"))


def test_torch_files_hold_no_more_than_they_have_bytes(tmp_path):
    path = tmp_path / "bomb.pt"
    for tensor in (
        torch.zeros(1).expand(1 << 40),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ):
        torch.save({"x": tensor}, path)
        with bounded(tmp_path), pytest.raises(plain_torch.NotPlain):
            plain_torch.load(path)
    torch.save({"x": torch.zeros(1 << 20)}, path)
    packed = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for member in archive.infolist():
            other.writestr(member.filename, archive.read(member))
    with pytest.raises(plain_torch.NotPlain, match="packed"):
        plain_torch.load(packed)
    assert plain_torch.load(path)["x"].shape == (1 << 20,)
    shared = torch.zeros(4, 4)
    torch.save(
        {"rows": [shared[0], shared[1].t(), shared[:, 0]]}, path
    )  # views of one storage are sound
    assert len(plain_torch.load(path)["rows"]) == 3


NESTED = [*zip("abcdefgh", "bcdefghi")]
BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{now}: &{now} [{', '.join(['*' + old] * 9)}]\n" for old, now in NESTED),
    "merges": "a: &a {x: 1}\n"
    + "".join(f"{now}: &{now} {{<<: [{', '.join(['*' + old] * 9)}]}}\n" for old, now in NESTED),
    "itself": "&a [*a, *a]",
    "nested": "[" * 20_000,
    "long": "- x\n" * 400_000,
    "number": f"a: {'9' * 6000}",
    "date": "a: 2020-99-99",
    "code": "!!python/object/apply:os.system ['true']",
    "keys": "? {a: 1}\n: 2",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_stays_small(name, tmp_path):
    began = time.process_time()
    with bounded(tmp_path):
        with pytest.raises(plain_yaml.NotPlain, match="merge keys" if name == "merges" else "."):
            plain_yaml.parse(BOMBS[name])
    assert time.process_time() - began < 5
    assert plain_yaml.parse("a: &a [1]\nb: *a") == {"a": [1], "b": [1]}


def test_json_has_one_kind_of_error():
    for text in ("[" * 100_000, '{"a":' * 100_000, "NaN", "[Infinity]", b"\xff", "9" * 6000, ""):
        with pytest.raises(ValueError, match="."):
            plain_json.parse(text)


def test_an_array_that_claims_a_terabyte_is_refused(tmp_path):
    path = tmp_path / "sizes.npy"
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (137438953472, 2), }"
    path.write_bytes(
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + bytes(64)
    )
    with bounded(tmp_path), pytest.raises(DataError, match="not readable"):
        load_array(path, np.dtype(np.int32), (1 << 37, 2))


def test_archives_write_nothing_and_expand_no_bombs(ground, tmp_path):
    zipped, rolled = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../escaped.jpg", b"\xff\xd8\xff" + bytes(1000))
        archive.writestr("/tmp/escaped.jpg", b"\xff\xd8\xff")
        archive.writestr("a/bomb.jpg", bytes(200 << 20))
        link = zipfile.ZipInfo("a/link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with tarfile.open(fileobj=rolled, mode="w") as archive:
        for name, kind, target in (
            ("../../escaped.jpg", tarfile.REGTYPE, ""), ("a/link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("a/hard.jpg", tarfile.LNKTYPE, "../../etc/passwd"), ("a/pipe.jpg", tarfile.FIFOTYPE, ""),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = (
                kind,
                target,
                3 if kind == tarfile.REGTYPE else 0,
            )
            archive.addfile(member, io.BytesIO(b"\xff\xd8\xff"))
    assert ground.attempt(named("zip"), zipped.getvalue()) is None
    assert ground.attempt(named("tar"), rolled.getvalue()) is None


def test_pictures_are_bounded_in_pixels_and_scans(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (20_000, 8_000)).save(path)
    with pytest.raises(ValueError, match="160,?000,?000|pixels"), open_image(path):
        pass
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    at = data.rindex(b"\xff\xda")
    with (
        pytest.raises(ValueError, match="scans"),
        open_image(data[:at] + data[at:-2] * 300 + data[-2:]),
    ):
        pass
    with open_image(data) as image:
        assert image.size == (64, 64)
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(OSError), open_image(tmp_path / "script.jpg"):  # would start Ghostscript
        pass


def test_unknown_errors_of_a_decoder_become_one_kind():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    for error in (
        SyntaxError("broken"),
        KeyError("x"),
        struct.error("short"),
        Image.DecompressionBombError("big"),
    ):
        with pytest.raises(ValueError, match="not decodable"), open_image(file.getvalue()):
            raise error


def test_a_target_that_is_none_is_named():
    with pytest.raises(UserError, match="no target cocoa; there are config"):
        chosen("cocoa")
    assert sys.getrecursionlimit() < 100_000  # so that nesting is refused before the stack ends


def test_no_image_is_opened_without_a_list_of_formats_and_no_yaml_around_the_plain_reader():
    root = Path(__file__).resolve().parent.parent
    for path in [*root.glob("dense_ssl/**/*.py"), *root.glob("dataprep/**/*.py")]:
        text = path.read_text()
        assert "yaml.safe_load" not in text, path
        for line in text.splitlines():
            assert "Image.open(" not in line or "formats=" in line, f"{path}: {line.strip()}"


def test_the_engine_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    assert program.main(["--engine", "atheris", "--only", "coco"]) == 2
    assert "--engine atheris: it is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_damage_that_reaches_new_code_is_kept(tmp_path, capsys):
    pytest.importorskip("atheris")
    given = ["--engine", "atheris", "--only", "override", "--minutes", "0.05"]
    assert program.main([*given, "--found", str(tmp_path)]) == 0
    tried, branches = re.search(r"override +([0-9,]+) files .* (\d+) branches  0 broken",
                                capsys.readouterr().out).groups()  # fmt: skip
    assert int(tried.replace(",", "")) > 10 and int(branches) > 100
    assert len(list((tmp_path / "corpus/override").iterdir())) > 4  # more than it began with
