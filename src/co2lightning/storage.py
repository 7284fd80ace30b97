# pyright: strict
"""Files that cannot lie: atomic writes, self-verifying checkpoints and JSON, one lock.

A checkpoint file is the zip that `torch.save` writes, with a zip comment

    co2lightning {"episode": 5, ...} sha256=<64 hex digits>

whose digits are the SHA-256 of every byte before them. `torch.load` ignores the comment, so the
file opens anywhere; a flipped bit or a missing byte shows without any other file; and the small
record in the comment tells what the file holds without importing torch.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pickletools
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from co2lightning import tensor_zip
from co2lightning.errors import UserError, show

COMMENT = b"co2lightning "
SEAL = b" sha256="
SEAL_SIZE = len(SEAL) + 64
MAX_RECORD = 60_000  # a zip comment holds 65,535 bytes
MAX_JSON = 1 << 30
MAX_PARTS = 200_000  # of a checkpoint: numbers, texts, tensors and what holds them
MAX_TUPLE = 10_000  # parts of a tuple, with those of tuples in it
MAX_DEPTH = 64
MAX_INTEGER = 1 << 128  # a float can hold it; states of random generators are as large
JSON_SEAL = re.compile(rb',\n "sha256_above": "([0-9a-f]{64})"\}\n\Z')
TEMPORARY = re.compile(r"\..+\.tmp")
# A link opens as an error, a FIFO at once; Windows has neither.
OPEN_FLAGS = sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "BINARY"))
NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# What a checkpoint of plain data and tensors may name; weights_only's own list is far longer.
HARMLESS = re.compile(
    r"collections OrderedDict|(__builtin__|builtins) set|"
    r"torch\._utils _rebuild_(tensor_v2|parameter)|torch (Size|device|\w+Storage)|"
    r"torch (b?float|complex|u?int)\d+\w*|torch bool|torch\.storage UntypedStorage"
)


class Damaged(UserError):
    """A file fails its check; `reason` says why in a few words."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason})")
        self.path = path
        self.reason = reason


class Locked(UserError):
    """Another process holds the run."""


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
        if error.errno not in NO_SYNC:
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
    descriptor = os.open(path, flags | OPEN_FLAGS)
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


def local(what: str, place: str | Path) -> str:
    """Return a file's or directory's place, a `~` at its beginning expanded.

    Raises:
        UserError: It is on no disk of this machine; `what` names the flag.
    """
    text = str(place)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # Path turns :// into :/
        raise UserError(f"{what} {show(text)}: only local files and directories, not a URL")
    home = os.path.expanduser(text)
    if os.path.normpath(home).startswith("~"):
        raise UserError(
            f"{what} {show(text)}: there is no such user; of a file of that name give the whole "
            "path, from / on"
        )
    return home


def check_output(flag: str, name: str | Path | None) -> Path | None:
    """Return the file that an output shall go to; refuse it before work is spent on it.

    An existing file will be replaced; where the name is a link, the file it points to.

    Raises:
        UserError: `name` is no place for a file, or may not be written.
    """
    if name is None:
        return None
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{flag} {name}: {reason}; give the name of a file") from None
    else:
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise UserError(f"{flag} {name}: is {kind}; give the name of a file")
        if not os.access(path, os.W_OK):
            raise UserError(f"{flag} {name}: is read-only")
    path = path.resolve()
    check_directory(f"{flag} {name}", path.parent)
    return path


def check_directory(what: str, directory: Path) -> None:
    """Raise a UserError about `what` unless a file can be made in `directory`."""
    if not directory.is_dir():
        raise UserError(f"{what}: there is no directory {directory}; make it first")
    try:
        with tempfile.TemporaryFile(dir=directory):  # os.access says yes to root, whatever happens
            pass
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{what}: {directory} cannot be written ({reason})") from None


def sweep(directory: Path) -> None:
    """Delete the temporary files that a killed `write_atomic` left in `directory`."""
    for name in stray(directory):
        discard(directory / name)


def stray(directory: Path) -> list[str]:
    """Return the names of temporary files in `directory`."""
    if not directory.is_dir():
        return []
    return sorted(name for name in os.listdir(directory) if TEMPORARY.fullmatch(name))


def seal_checkpoint(content: dict[str, Any], record: dict[str, Any]) -> bytes:
    """Return the bytes of a checkpoint file.

    Args:
        content: What `torch.load` gives back: tensors and plain data.
        record: Small plain data for the comment.

    Raises:
        ValueError: `content` holds something that a safe load would refuse.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    problem = _foreign_content(buffer.getvalue())
    if problem:
        raise ValueError(f"a checkpoint holds only tensors and plain data: {problem}")
    plain(content, buffer.getbuffer().nbytes)
    comment = COMMENT + json.dumps(record, allow_nan=False).encode("ascii") + SEAL
    if len(comment) > MAX_RECORD:
        raise ValueError(f"the record of a checkpoint is too large: {len(comment)} bytes")
    data = bytearray(buffer.getbuffer())
    data[-2:] = (len(comment) + 64).to_bytes(2, "little")  # the comment's length ends the zip
    data += comment
    data += hashlib.sha256(data).hexdigest().encode("ascii")
    return bytes(data)


def read_sealed(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read a checkpoint file and check its seal, without torch.

    Returns:
        Its bytes and the record from its comment.

    Raises:
        Damaged: Torn, changed, or not written by this project.
        FileNotFoundError: There is no such file.
    """
    try:
        with open(open_file(path), "rb") as file:
            head, size = file.read(4), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - SEAL_SIZE))
            tail = file.read(len(SEAL))
            if not size:
                raise ValueError("empty")
            if head != b"PK\x03\x04":
                raise ValueError("not a checkpoint file")
            if tail != SEAL:
                raise ValueError("no checksum at its end: torn, or not written by co2lightning")
            file.seek(0)
            data = file.read()  # only now: a few bytes on disk can be a file larger than memory
    except ValueError as error:
        raise Damaged(path, str(error)) from None
    except MemoryError:
        raise OSError(errno.ENOMEM, "larger than the memory", str(path)) from None
    if hashlib.sha256(data[:-64]).hexdigest().encode("ascii") != data[-64:]:
        raise Damaged(path, "checksum differs")
    start = data.rfind(COMMENT, max(0, len(data) - MAX_RECORD - 64))
    try:
        record = parse_json(data[start + len(COMMENT) : -SEAL_SIZE])
    except ValueError as error:
        raise Damaged(path, f"record unreadable: {error}") from None
    return data, record


def check_content(path: Path, data: bytes) -> None:
    """Raise `Damaged` if a file holds anything but tensors and plain data; needs no torch."""
    problem = _foreign_content(data)
    if problem:
        raise Damaged(path, problem)


def load_sealed(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Read and check a checkpoint file, then load it on the CPU; no code of the file runs.

    Returns:
        What was saved, the record from the comment, the bytes of the file.

    Raises:
        Damaged: The seal is broken, or the content is not plain tensors and data.
        FileNotFoundError: There is no such file.
    """
    import torch

    data, record = read_sealed(path)
    check_content(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile file provokes
        line = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise Damaged(path, f"cannot be loaded: {line}") from None
    try:
        content = plain(content, len(data))
    except ValueError as error:
        raise Damaged(path, str(error)) from None
    if not isinstance(content, dict):
        raise Damaged(path, "holds no dictionary")
    return cast(dict[str, Any], content), record, data


def plain(content: object, most_bytes: int) -> Any:
    """Return a copy of a checkpoint's content: tensors and data, and nothing that hides in them.

    What is shared is copied each time. So the copy is a tree; content that has cycles, or that
    unfolds from a few bytes into more than any checkpoint holds, is refused.

    Args:
        content: What `torch.load` gave or `torch.save` took.
        most_bytes: The size of its file; no tensor in it is larger.

    Raises:
        ValueError: It is refused; the message says why in a few words.
    """
    import torch

    left = MAX_PARTS

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if left < 0 or depth > MAX_DEPTH:
            raise ValueError("holds too many parts" if left < 0 else "nested too deeply")
        if isinstance(value, torch.Tensor):
            if value.nbytes > most_bytes:
                raise ValueError("holds a tensor larger than its file")
            return value.detach()  # neither its hooks nor its graph
        if isinstance(value, dict):
            # Not through its own methods: an OrderedDict of a file can bring others.
            pairs = list(dict[Any, Any].items(cast(dict[Any, Any], value)))
            if not all(type(key) in (str, int) for key, _ in pairs):
                raise ValueError("has keys that are neither texts nor whole numbers")
            return {copy(key, depth): copy(held, depth + 1) for key, held in pairs}
        if type(value) in (list, tuple, set):
            return type(value)(copy(held, depth + 1) for held in value)
        if type(value) is int and abs(value) >= MAX_INTEGER:
            raise ValueError("holds a number too large")
        if not isinstance(
            value, bool | int | float | str | None | torch.Size | torch.dtype | torch.device
        ):
            raise ValueError(f"holds a {type(value).__name__}")
        return value

    return copy(content, 0)


def _foreign_content(data: bytes) -> str | None:
    """Say what in a zip is not a plain `torch.save` of tensors and data, None if all is."""
    try:
        begin, end = tensor_zip.entries(data)[b"archive/data.pkl"]
        for operation, argument, _ in pickletools.genops(data[begin:end]):
            if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                name = str(argument)
                if operation.name != "GLOBAL" or not HARMLESS.fullmatch(name):
                    return f"names {name[:80]!r}, which is neither tensor nor plain data"
        if _has_large_tuple(data[begin:end]):
            return "holds a tuple of too many parts"
    except Exception as error:  # pickletools raises a dozen kinds on hostile bytes
        return f"not a checkpoint: {str(error)[:80] or type(error).__name__}"
    return None


def _has_large_tuple(code: bytes) -> bool:
    """Say whether a pickle makes a tuple of more than `MAX_TUPLE` parts.

    A key of a dictionary is hashed while it is loaded, and a tuple's hash visits every part of
    every tuple in it: forty pairs, each of the one before it twice, take for ever.
    """
    stack: list[int] = []  # the parts of a tuple, 0 of a mark, 1 of all else
    memo: dict[object, int] = {}
    for operation, argument, _ in pickletools.genops(code):
        name = operation.name
        if "PUT" in name:
            memo[argument] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        else:
            parts = 1
            for kind in reversed(operation.stack_before):
                while kind is pickletools.stackslice and stack[-1]:
                    parts += stack.pop()
                if kind is not pickletools.stackslice:
                    parts += stack.pop()
            if "TUPLE" not in name:
                parts = int(name != "MARK")
            elif parts > MAX_TUPLE:
                return True
            stack += [parts] * len(operation.stack_after)
    return False


def parse_json(text: bytes) -> dict[str, Any]:
    """Parse an object with finite numbers only.

    Raises:
        ValueError: Anything else, also nesting too deep and numbers too long.
    """
    if len(text) > MAX_JSON:
        raise ValueError(f"{len(text)} bytes")
    try:
        value: object = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, parse_int=_integer
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):  # what can be read could still be too deep to be written again
        parts: list[Any] = []
        for group in level:
            parts += group if type(group) is list else group.values()
        level = [part for part in parts if type(part) in (dict, list)]
    if level:
        raise ValueError("nested too deeply")
    return cast(dict[str, Any], value)


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text[:20])


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) >= MAX_INTEGER:
        raise ValueError(f"{text[:20]}... is too large")
    return value


def seal_json(text: str) -> bytes:
    """Return the bytes of a JSON file that ends with the SHA-256 of what stands above it.

    Args:
        text: A JSON object, from its opening to its closing brace.
    """
    above = text[:-1].rstrip().encode("utf-8")
    digest = hashlib.sha256(above).hexdigest()
    return above + f',\n "sha256_above": "{digest}"}}\n'.encode("ascii")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of `seal_json`.

    Raises:
        ValueError: Torn, changed or malformed; the message says how in a few words.
        FileNotFoundError: There is no such file.
    """
    try:
        data = read_file(path, MAX_JSON)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    seal = JSON_SEAL.search(data, max(0, len(data) - 120))
    if seal is None:
        raise ValueError("no checksum at its end" if data else "empty")
    if hashlib.sha256(data[: seal.start()]).hexdigest().encode("ascii") != seal[1]:
        raise ValueError("checksum differs")
    value = parse_json(data)
    del value["sha256_above"]
    return value


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
