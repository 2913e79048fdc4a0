"""The page on adding a method, executed: its blocks make a method that keeps the contract."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("configs", "dataprep", "dense_ssl", "kernels", "tests")


def insert(path, after, line):
    """Put a line behind the first that starts with `after`."""
    lines = path.read_text().splitlines()
    at = next(i for i, text in enumerate(lines) if text.startswith(after))
    path.write_text("\n".join([*lines[: at + 1], line, *lines[at + 1 :], ""]))


@pytest.mark.slow
def test_the_example_keeps_the_contract_of_methods(tmp_path):
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)\n```", page, flags=re.DOTALL)
    method, imported, named, listed, recipe, config, resumed, ours = blocks
    assert sum(len(block.splitlines()) for block in blocks) < 100
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    registry, tests = tmp_path / "dense_ssl" / "methods" / "__init__.py", tmp_path / "tests"
    (registry.parent / "pixel_agreement.py").write_text(method + "\n")
    (tmp_path / "configs" / "pixel_agreement.yaml").write_text(recipe + "\n")
    insert(registry, "from dense_ssl.methods.moco import", imported)
    insert(registry, "METHODS: dict", named)
    insert(registry, "    MoCoConfig", listed)
    imports = imported.replace("PixelAgreement, ", "")
    insert(tests / "test_methods.py", "from dense_ssl.methods.moco import", imports)
    insert(tests / "test_methods.py", '    "dino": DinoConfig', config)
    insert(tests / "test_resume.py", "METHODS_BY_NAME = {", resumed)
    insert(tests / "test_published.py", "EXTENSIONS = {", ours)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "pixel_agreement or covered",
    ]
    files = [f"tests/test_{name}.py" for name in ("methods", "resume", "published", "shares")]
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 14
    listing = [
        sys.executable,
        "-m",
        "dense_ssl.pretrain",
        "pixel_agreement",
        "data.path=none",
        "run.dir=x",
    ]
    refused = subprocess.run(listing, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "none: no shard set" in refused.stderr or "none" in refused.stderr
