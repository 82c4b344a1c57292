"""Write files so that a kill, a full disk or a power cut leaves either the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that is open
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `target`; when the block ends well it is flushed to the disk and renamed to
    `target`, and otherwise removed.

    The temporary file is `.NAME.XXXXXXXX.tmp`, and locked while it is written: what a killed process has left is what
    nobody holds (see `remove_leftovers`). It is flushed before it is renamed, because a file system may keep a rename
    and lose the bytes when the power fails; the folder is not flushed, so that a power cut may bring back the old file.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked_file(target) as temporary:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)


def write_text(target: str | os.PathLike, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_leftover(path: Path) -> bool:
    """Whether a name is one of our temporary files, in use or left by a process that was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files that killed processes have left in a folder. Those that are being written stay."""
    for path in filter(is_leftover, Path(folder).glob(".*.tmp")):
        with contextlib.suppress(OSError), open(path, "rb+") as file:  # held by another process, or gone already
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def _locked_file(target: Path) -> Iterator[Path]:
    """A new temporary file beside `target`, locked where the system can, and gone at the end."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        if fcntl is None:
            os.close(handle)
            break
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # not taken for a leftover before it was locked
            break
        os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        if fcntl is not None:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
