"""`make setup` runs before every command: what is done is done, with FFCV or without."""

import sys

from dense_ssl import install


def test_without_ffcv_it_is_done_once_and_again_when_its_libraries_are_there(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    made, there = [], []
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path)])
    monkeypatch.setattr(install, "_pip", lambda *what, **_: made.append(what[-1]) or 0)
    monkeypatch.setattr(install, "_has_libraries", lambda: bool(there))
    monkeypatch.setattr(install.subprocess, "call", lambda *_, **__: 1)
    for _ in range(2):
        assert install.main() == 0
        assert made == [".[dali,onnx,dev]"]
    there.append("imgproc.hpp")
    assert install.main() == 0
    assert made[1:] == [".[dali,onnx,dev]", "ffcv"]
    assert install.main() == 0
    assert len(made) == 3
