"""Small disks, full disks, read-only folders, and files that go away: what the file system can do to a run.

As root a small tmpfs and a read-only bind mount are used: the kernel's own errors, for any user of the
folder. Otherwise a limit on the size of files (`RLIMIT_FSIZE`) and `chmod` stand in.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

BALLAST = "ballast"
SMALL_MIB = 96
GONE = ".gone"  # suffix of a file that is away


def small_disk(folder: Path) -> bool:
    """Make `folder` a small disk of its own where that is allowed; return whether it is one."""
    folder.mkdir(parents=True, exist_ok=True)
    return _mount("-t", "tmpfs", "-o", f"size={SMALL_MIB}m", "tmpfs", str(folder))


def release(folder: Path) -> None:
    """Undo every mount on `folder` or one folder below it, and remove it with all it holds."""
    for place in (*sorted(folder.glob("*")), folder):
        writable(place)
        while _mounted(place) and _ran("umount", "--lazy", str(place)):
            pass
    shutil.rmtree(folder, ignore_errors=True)


def release_below(folder: Path) -> None:
    """Undo every mount below `folder`, the deepest first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(line.split()[4]) for line in lines]
    for point in sorted((p for p in points if p.is_relative_to(folder.resolve())), reverse=True):
        _ran("umount", "--lazy", str(point))


def fill(disk: Path) -> None:
    """Leave no room on a small disk; or, where it is none, let this process write no file any further."""
    if not _mounted(disk):
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (256, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        return
    with contextlib.suppress(OSError), (disk / BALLAST).open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def free(disk: Path) -> None:
    """Make room again."""
    (disk / BALLAST).unlink(missing_ok=True)


def read_only(folder: Path) -> None:
    """Let nothing new be written below `folder`; files that are open stay open."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _mount("--bind", "-o", "ro", str(folder), str(folder)):
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            place.chmod(0o555)


def writable(folder: Path) -> None:
    """Undo `read_only`."""
    if _mounted(folder) and not os.access(folder, os.W_OK):
        _ran("umount", "--lazy", str(folder))
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        with contextlib.suppress(OSError):
            place.chmod(0o755)


def means() -> str:
    """Return by which means disks are full and folders read-only here."""
    if can_mount():
        return f"a tmpfs of {SMALL_MIB} MiB, filled; a read-only bind mount"
    return "RLIMIT_FSIZE; chmod"


def can_be_read_only() -> bool:
    """Return whether a folder can be made read-only for this user: `chmod` does not hold root back."""
    return can_mount() or os.geteuid() != 0


@cache
def can_mount() -> bool:
    """Return whether this user may mount: root, outside of most containers."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = _mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
        return mounted and _ran("umount", folder)


def vanish(*files: Path) -> None:
    """Take files away; their open handles stay good."""
    for file in files:
        file.rename(file.with_name(file.name + GONE))


def come_back(folder: Path) -> None:
    """Bring back every file below `folder` that was taken away."""
    for file in folder.rglob(f"*{GONE}"):
        file.rename(file.with_name(file.name.removesuffix(GONE)))


def truncate(file: Path) -> None:
    """Cut a file to two thirds."""
    os.truncate(file, file.stat().st_size * 2 // 3)


def flip_bit(file: Path, at: int) -> None:
    """Flip one bit of the byte at position `at`."""
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 0x10]))


def _mounted(folder: Path) -> bool:
    """Return whether something is mounted on a folder; `Path.is_mount` sees no bind mounts."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return str(folder.resolve()) in points


def _mount(*arguments: str) -> bool:
    return os.geteuid() == 0 and _ran("mount", *arguments)


def _ran(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
