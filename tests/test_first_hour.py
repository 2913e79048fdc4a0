"""docs/first-hour.md, run from top to bottom: every block in order, with the small settings it names."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataprep.synthetic import write_random_images
from dense_ssl import install

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "first-hour.md"
CODE = ("dataprep", "dense_ssl", "kernels", "configs")
FILES = ("Makefile", "README.md", "pyproject.toml", "constraints.txt")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project whose environment is this one, so that `make setup` finds its work done."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("no virtual environment")
    folder = tmp_path_factory.mktemp("clone")
    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "setup.stamp":
            (folder / ".venv" / entry.name).symlink_to(entry)
    (folder / ".venv" / "setup.stamp").write_text(f"{install._fingerprint(minimal=False)} test\n")
    write_random_images(folder / "photographs", 44)
    return folder


def blocks_of(first, last):
    """Return the page's blocks from heading `first.` to heading `last.` as one script."""
    text = PAGE.read_text()
    start, end = text.index(f"\n## {first}."), text.find(f"\n## {last + 1}.")
    part = text[start : end if end >= 0 else text.index("\n## What next")]
    script = ["set -euo pipefail"]
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", part, re.MULTILINE | re.DOTALL):
        assert language in ("bash", "python"), language
        run = body if language == "bash" else f".venv/bin/python - <<'END'\n{body}END\n"
        script.append(run)
    assert len(script) > 2
    return "\n".join(script)


def follow(project, first, last):
    environment = os.environ | {
        "SCENES": "48",
        "STEPS": "2",
        "IMAGES": "photographs",
        "PYTHON": sys.executable,
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", blocks_of(first, last)], cwd=project, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_the_page_says_how_it_is_tested_and_every_block_is_run():
    text = PAGE.read_text()
    assert "`SCENES=48`, `STEPS=2`" in text
    languages = re.findall(r"^```(\w*)$", text, re.MULTILINE)
    assert len(languages) % 2 == 0 and set(languages) == {"bash", "python", ""}
    all_blocks = blocks_of(1, 2).count("make ") + blocks_of(3, 7).count("make ")
    assert all_blocks == sum(
        block.count("make ") for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    )


@pytest.mark.slow
def test_set_up_and_the_whole_way_without_data(project):
    output = follow(project, 1, 2)
    assert "make pretrain" in output  # from the list of targets
    run = project / "runs" / "demo"
    for name in ("report.html", "config.yaml", "log.jsonl", "eval.jsonl", "checkpoints/last.pt"):
        assert (run / name).is_file(), name
    assert "weights sha256: " in output


@pytest.mark.slow
def test_own_photographs_from_shards_to_timm(project):
    output = follow(project, 3, 7)
    assert "resuming at step 2" in output
    assert "torch.Size([1, 512, 7, 7])" in output
    run = project / "runs" / "mine"
    assert (run / "correspondence.png").is_file()
    assert (run / "export" / "transformers" / "model.safetensors").is_file()
    assert (project / "preview.html").is_file() and (project / "compare.html").is_file()
