"""The lock on a run: one writer at a time, and none after its process ends."""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Generator
from pathlib import Path

from co2lightning.errors import UserError
from co2lightning.runs.files import now, open_file
from co2lightning.runs.seal import parse_json

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Locked(UserError):
    """Another process holds the run."""


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        """Lock one byte far beyond the text, since Windows forbids reading locked bytes."""
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True


_held: set[int] = set()


def _drop_inherited() -> None:
    """Close a parent's locks in a forked child, which would otherwise keep them beyond its end."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited)


@contextlib.contextmanager
def hold(run: Path, logs: Path | None) -> Generator[None]:
    """Take the locks of a run's directories at once, or say who has one.

    A lock is `flock` on a file that is never deleted (deleting it would let two processes lock two
    files of one name), and dies with its process, however that ends. On NFS Linux turns it into a
    lock at the server, which works from NFS 4 on and NFS 3 with its lock daemon; on mounts with
    `nolock` or `local_lock`, and on file systems without locks between hosts, it holds on one host
    only.

    Raises:
        Locked: Another process has one.
        UserError: There can be no lock here.
    """
    with contextlib.ExitStack() as held:
        for path in dict.fromkeys(_paths(run) + (_paths(logs) if logs else [])):
            held.callback(_release, _acquire(path, run))
        yield


def is_held(place: Path) -> bool:
    """Say whether a process, this one included, holds a directory; no where locks are unknown."""
    return any(_is_taken(path) for path in _paths(place))


def _paths(place: Path) -> list[Path]:
    """Return the locks of a directory: beside its name, and beside what that is a link to.

    So each of its names leads to one lock of them all, and the first is that of earlier versions.
    Beside a disk that is mounted there may be no place for the second.
    """
    place = Path(os.path.abspath(place))
    named = Path(os.path.realpath(place.parent), f".{place.name}.lock")
    place = Path(os.path.realpath(place))
    own = place.parent / f".{place.name}.lock"
    return [named, own] if own.exists() or os.access(own.parent, os.W_OK) else [named]


def _acquire(path: Path, run: Path) -> int:
    """Return the locked file; `run` is what it protects, for the message."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(path)
    try:
        # `_is_taken` of another process holds the file for some microseconds: try a moment long.
        deadline = time.monotonic() + 0.2
        while not _try_lock(descriptor, shared=False):
            if time.monotonic() > deadline:
                raise Locked(f"{run} is in use by {_holder(descriptor)}; wait or stop it first")
        if os.fstat(descriptor).st_nlink == 1:  # else it has a second name, perhaps not ours
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder).encode("utf-8"))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            raise UserError(
                f"{path}: this file system has no locks ({error.strerror}), and without them two "
                "processes could write one run; give --checkpoints.dir and --logs.dir on another "
                "disk"
            ) from None
        raise
    _held.add(descriptor)
    return descriptor


def _open(path: Path) -> int:
    """Open the file to lock it; make it where there is none, for all who may write here."""
    with contextlib.suppress(FileExistsError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return open_file(path, os.O_RDWR)
    except ValueError as error:
        raise UserError(f"{path}: {error}; a run's lock belongs there, move it") from None
    except PermissionError as error:
        raise UserError(
            f"{path}: the lock of this run is closed to you ({error.strerror}); let its owner "
            f"open it: chmod a+rw {path}"
        ) from None


def _release(descriptor: int) -> None:
    if descriptor in _held:  # else a fork has dropped it
        _held.discard(descriptor)
        os.close(descriptor)


def _is_taken(path: Path) -> bool:
    try:
        descriptor = open_file(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    except (OSError, ValueError):
        return False
    try:
        return not _try_lock(descriptor, shared=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = parse_json(os.read(descriptor, 1000))
    except (OSError, ValueError):
        return "another process"
    pid, host, since = (" ".join(str(holder.get(k)).split()) for k in ("pid", "host", "since"))
    return f"process {pid} on {host} since {since}"
