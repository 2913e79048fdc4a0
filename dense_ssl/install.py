"""`make setup`: the whole environment, once. Standard library only, run by the system's Python.

    python3 dense_ssl/install.py [--minimal] [--venv .venv]

Creates the virtual environment and installs the pinned packages. DALI comes as a wheel; FFCV is built from
source against OpenCV and libjpeg-turbo, whose development packages apt brings where it may (10 MB);
elsewhere the one command to run is printed and everything but FFCV is installed. Run again, it does
nothing unless the pins have changed, or the libraries that FFCV lacked are there.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LACKING = "its libraries are missing"
APT = ["libopencv-core-dev", "libopencv-imgproc-dev", "libturbojpeg0-dev", "pkg-config"]


def main() -> int:
    """Install what is missing; return 0, or 2 with one sentence on what the user must do."""
    parser = argparse.ArgumentParser(description="Install the pinned environment.")
    parser.add_argument("--minimal", action="store_true", help="leave DALI, FFCV and ONNX out")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  (any Python may be the system's)
        return _refuse(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: "
                       "make setup PYTHON=python3.11")  # fmt: skip
    stamp = args.venv / "setup.stamp"
    wanted = _fingerprint(args.minimal)
    before = stamp.read_text() if stamp.exists() else ""
    if before.startswith(wanted) and not (LACKING in before and _has_libraries()):
        return 0
    start = time.monotonic()
    python = args.venv / "bin" / "python"
    if not python.exists():
        _say(f"creating {args.venv}")
        if subprocess.call([sys.executable, "-m", "venv", str(args.venv)]) != 0:
            return _refuse(
                "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
            )
    extras = ".[dev]" if args.minimal else ".[dali,onnx,dev]"
    _say(
        "installing torch, timm, kornia, triton, numba"
        + ("" if args.minimal else ", DALI, ONNX")
        + " ..."
    )
    if _pip(python, "-e", extras) != 0:
        return _refuse("pip could not install the pinned packages (its message is above); "
                       "check the network and free disk space (8 GB), then run make setup again")  # fmt: skip
    note = "minimal: no DALI, no FFCV, no ONNX"
    if not args.minimal:
        problem = _install_ffcv(python, args.venv)
        note = f"no FFCV: {problem}" if problem else "complete"
        if problem:
            _say(f"FFCV is left out: {problem}")
            _say("everything else works; data.loader=dali or folder read the same shards")
    stamp.write_text(f"{wanted} {note}\n")
    _say(f"done in {time.monotonic() - start:.0f} s ({note})")
    return 0


def _install_ffcv(python: Path, venv: Path) -> str | None:
    """Build FFCV; return None, or one sentence on why it could not be."""
    if subprocess.call([str(python), "-c", "import ffcv"], stderr=subprocess.DEVNULL) == 0:
        return None
    command = f"apt-get install -y --no-install-recommends {' '.join(APT)}"
    if not _has_libraries():
        prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
        usable = shutil.which("apt-get") and (not prefix or shutil.which("sudo"))
        if usable:
            _say(f"installing the libraries FFCV is built against: {command}")
            quiet = {
                "stdout": subprocess.DEVNULL,
                "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            }
            subprocess.call([*prefix, "apt-get", "update", "-qq"], **quiet)
            subprocess.call([*prefix, *command.split(), "-qq"], **quiet)
        if not _has_libraries():
            return f"{LACKING}; run `sudo {command}` and then `make setup`"
    _say("building FFCV ...")
    folder = _opencv_shim(venv)
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PKG_CONFIG_PATH")]))
    if _pip(python, "ffcv", env={**os.environ, "PKG_CONFIG_PATH": paths}) != 0:
        return (
            "its build failed (pip's message is above); it needs g++ and Python's headers; then delete "
            f"{venv / 'setup.stamp'} and run `make setup`"
        )
    return None


def _has_libraries() -> bool:
    """Whether the compiler's headers FFCV includes are there."""
    headers = ("opencv4/opencv2/imgproc.hpp", "opencv4/opencv2/core.hpp", "turbojpeg.h")
    return bool(shutil.which("pkg-config")) and all(
        (Path("/usr/include") / header).exists() for header in headers
    )


def _opencv_shim(venv: Path) -> Path:
    """Write the two small files by which FFCV's build finds OpenCV's core and imgproc alone.

    The umbrella header and `opencv4.pc` belong to the 690 MB of the full development package.
    """
    folder = venv.resolve() / "share" / "ffcv-opencv"
    (folder / "opencv2").mkdir(parents=True, exist_ok=True)
    (folder / "opencv2" / "opencv.hpp").write_text(
        "#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n"
    )
    (folder / "opencv4.pc").write_text(
        "Name: opencv4\nDescription: the two OpenCV modules FFCV links\nVersion: 4\n"
        f"Libs: -lopencv_imgproc -lopencv_core\nCflags: -I{folder} -I/usr/include/opencv4\n"
    )
    return folder


def _pip(python: Path, *what: str, env: dict[str, str] | None = None) -> int:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return subprocess.call([*command, "-c", "constraints.txt", *what], cwd=ROOT, env=env)


def _fingerprint(minimal: bool) -> str:
    digest = hashlib.sha256(str(minimal).encode())
    for name in ("constraints.txt", "pyproject.toml", "dense_ssl/install.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def _say(text: str) -> None:
    sys.stdout.write(f"setup: {text}\n")
    sys.stdout.flush()


def _refuse(text: str) -> int:
    sys.stderr.write(f"setup: {text}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
