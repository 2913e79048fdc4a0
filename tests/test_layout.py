"""The shape of the project: folders, import names, file sizes, and what may not be in it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tracked():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_root_holds_what_was_laid_down_and_nothing_else():
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    visible = {name for name in top if not name.startswith(".")}
    laid_down = {"dataprep", "dense_ssl", "kernels", "configs", "tests", "Makefile", "README.md"}
    assert laid_down <= visible
    beside = {"pyproject.toml", "constraints.txt", "LICENSE", "CHANGELOG.md", "docs"}
    assert visible - laid_down <= beside


def test_no_source_file_passes_400_lines():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked()
        if path.suffix == ".py" and "tests" not in path.parts
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


def test_no_images_shards_or_weights_are_tracked():
    heavy = {
        ".jpg",
        ".jpeg",
        ".png",
        ".beton",
        ".tar",
        ".npz",
        ".npy",
        ".pth",
        ".pt",
        ".safetensors",
    }
    assert [p for p in tracked() if p.suffix.lower() in heavy] == []
    assert [p for p in tracked() if p.stat().st_size > 500_000] == []


def test_kernels_and_dataprep_are_ours_light_and_pretend_to_be_old():
    code = (
        "import sys, kernels, dataprep; "
        "assert kernels.__version__ == dataprep.__version__ == '0'; "
        "print([m for m in ('torch', 'triton', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_foreign_kernels_package_is_named(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import dense_ssl"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "run from the repository root" in done.stderr


def test_dataprep_and_views_import_no_torch():
    code = (
        "import sys, dataprep.convert, dataprep.scenes, dense_ssl.views; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_make_lists_every_target_and_the_help_names_its_variables():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    targets = ("setup", "shards", "verify", "pretrain", "eval", "export", "bench-data", "test")
    for target in targets:
        assert f"make {target} " in done.stdout
    for variable in ("DATASET=", "METHOD=", "DATA=", "RUN=", "GPUS=", "ARGS=", "TASKS=", "TO="):
        assert variable in done.stdout
