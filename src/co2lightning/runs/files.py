"""Files and directories of ours: written whole or not at all, opened only if they are files."""

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
from datetime import datetime
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.tmp")
# A link opens as an error, a FIFO at once; Windows has neither.
_OPEN_FLAGS = sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "BINARY"))
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def now() -> str:
    """Return the local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut, where the system has a call for that."""
    if sys.platform == "win32":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems know it for files only
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def instead_of_file(path: Path) -> str | None:
    """Say what stands at `path` if it is something else than a file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "a directory, not a file"
    return "a link, not a file" if stat.S_ISLNK(mode) else "a FIFO or a device, not a file"


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file of ours and return its descriptor.

    An unpacked archive may have put anything in its place: a link would have us read or write
    another file, a FIFO would have us wait for ever. Above it there may be links, to other disks.

    Raises:
        ValueError: It is no file; nothing was opened.
        OSError: There is none, or it may not be opened.
    """
    if problem := instead_of_file(path):
        raise ValueError(problem)
    descriptor = os.open(path, flags | _OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # exchanged in between
        os.close(descriptor)
        raise ValueError("not a file")
    return descriptor


def read_file(path: Path, limit: int | None = None) -> bytes:
    """Return the content of a file of ours.

    Raises:
        ValueError: It is no file, or larger than `limit`; not a byte was read.
        OSError: There is none, or it cannot be read.
    """
    with open(open_file(path), "rb") as file:
        if limit is not None and os.fstat(file.fileno()).st_size > limit:
            raise ValueError("too large")
        return file.read()


def make_directory(path: Path) -> None:
    """Make a directory of ours unless it is there.

    Raises:
        NotADirectoryError: There is a link in its place, behind which others' files may lie.
    """
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "a link, not a directory", str(path))


def discard(path: Path) -> None:
    """Delete whatever stands at `path`; a link goes, what it leads to stays."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `data` as a whole or not at all.

    Args:
        path: File to write; the temporary file stands beside it, so no other disk is involved.
        data: Its bytes.
        durable: Wait until the disk has them. Without it a power cut may lose the file, never a
            killed process.

    Raises:
        OSError: Disk full, no permission; the temporary file is gone, the old file untouched.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    if os.path.lexists(temporary):  # of a killed process of our number, or put there
        discard(temporary)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that fails does not say where
        raise
    if durable:
        sync_directory(path.parent)


def sweep(directory: Path) -> None:
    """Delete the temporary files that a killed `write_atomic` left in `directory`."""
    for name in stray(directory):
        discard(directory / name)


def stray(directory: Path) -> list[str]:
    """Return the names of temporary files in `directory`."""
    if not directory.is_dir():
        return []
    return sorted(name for name in os.listdir(directory) if _TEMPORARY.fullmatch(name))
