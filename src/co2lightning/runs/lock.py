"""The lock on a run: one writer at a time, and none after its process ends."""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path

from co2lightning.errors import UserError
from co2lightning.runs.files import now, open_file
from co2lightning.runs.seal import parse_json

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


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


class FileLock:
    """A lock that dies with its process, however it ends.

    It is `flock` on a file that is never deleted (deleting it would let two processes lock two
    files of one name). On NFS Linux turns it into a lock at the server, which works from NFS 4
    on and NFS 3 with its lock daemon; on mounts with `nolock` or `local_lock`, and on file
    systems without locks between hosts, it holds on one host only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, run: str) -> None:
        """Take the lock at once, or say who has it.

        Args:
            run: What the lock protects, for the message.

        Raises:
            Locked: Another process has it.
            UserError: There can be no lock here.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = self._open()
        try:
            # `taken` of another process holds the file for some microseconds: try a moment long.
            deadline = time.monotonic() + 0.2
            while not _try_lock(descriptor, shared=False):
                if time.monotonic() > deadline:
                    holder = self._holder(descriptor)
                    raise Locked(f"{run} is in use by {holder}; wait or stop it first")
            if os.fstat(descriptor).st_nlink == 1:  # else it has a second name, perhaps not ours
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(holder).encode("utf-8"))
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in NO_LOCKS:
                raise UserError(
                    f"{self.path}: this file system has no locks ({error.strerror}), and without "
                    "them two processes could write one run; give --checkpoints.dir and --logs.dir "
                    "on another disk"
                ) from None
            raise
        self._descriptor = descriptor
        _held.add(descriptor)

    def _open(self) -> int:
        """Open the file to lock it; make it where there is none, for all who may write here."""
        with contextlib.suppress(FileExistsError):
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            return open_file(self.path, os.O_RDWR)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}; a run's lock belongs there, move it") from None
        except PermissionError as error:
            raise UserError(
                f"{self.path}: the lock of this run is closed to you ({error.strerror}); let its "
                f"owner open it: chmod a+rw {self.path}"
            ) from None

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None and self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def taken(self) -> bool:
        """Say whether a process, this one included, has the lock; no where locks are unknown."""
        try:
            descriptor = open_file(self.path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
        except (OSError, ValueError):
            return False
        try:
            return not _try_lock(descriptor, shared=True)
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def _holder(self, descriptor: int) -> str:
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            holder = parse_json(os.read(descriptor, 1000))
        except (OSError, ValueError):
            return "another process"
        pid, host, since = (" ".join(str(holder.get(k)).split()) for k in ("pid", "host", "since"))
        return f"process {pid} on {host} since {since}"
