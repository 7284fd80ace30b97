"""Files that verify themselves: checkpoints and JSON with a hash of all that stands before it.

A checkpoint file is the zip that `torch.save` writes, with a zip comment

    co2lightning {"episode": 5, ...} sha256=<64 hex digits>

whose digits are the SHA-256 of every byte before them. `torch.load` ignores the comment, so the
file opens anywhere; a flipped bit or a missing byte shows without any other file; and the small
record in the comment tells what the file holds without importing torch.
"""

import errno
import hashlib
import io
import json
import math
import os
import pickletools
import re
from pathlib import Path
from typing import Any, cast

from co2lightning.errors import UserError
from co2lightning.runs import tensor_zip
from co2lightning.runs.files import open_file, read_file

_COMMENT = b"co2lightning "
_SEAL = b" sha256="
_SEAL_SIZE = len(_SEAL) + 64
_MAX_RECORD = 60_000  # a zip comment holds 65,535 bytes
_MAX_JSON = 1 << 30
_MAX_PARTS = 200_000  # of a checkpoint: numbers, texts, tensors and what holds them
_MAX_TUPLE = 10_000  # parts of a tuple, with those of tuples in it
_MAX_DEPTH = 64
_MAX_INTEGER = 1 << 128  # a float can hold it; states of random generators are as large
# What a checkpoint of plain data and tensors may name; weights_only's own list is far longer.
_HARMLESS = re.compile(
    r"collections OrderedDict|(__builtin__|builtins) set|"
    r"torch\._utils _rebuild_(tensor_v2|parameter)|torch (Size|device|\w+Storage)|"
    r"torch (b?float|complex|u?int)\d+\w*|torch bool|torch\.storage UntypedStorage"
)
_JSON_SEAL = re.compile(rb',\n "sha256_above": "([0-9a-f]{64})"\}\n\Z')


class Damaged(UserError):
    """A file fails its check; `reason` says why in a few words."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason})")
        self.path = path
        self.reason = reason


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
    data = buffer.getvalue()
    if problem := _foreign_content(data):
        raise ValueError(f"a checkpoint holds only tensors and plain data: {problem}")
    _plain(content, len(data))
    comment = _COMMENT + json.dumps(record, allow_nan=False).encode("ascii") + _SEAL
    if len(comment) > _MAX_RECORD:
        raise ValueError(f"the record of a checkpoint is too large: {len(comment)} bytes")
    size = (len(comment) + 64).to_bytes(2, "little")  # of the comment, at the zip's end
    data = b"".join((memoryview(data)[:-2], size, comment))
    return data + hashlib.sha256(data).hexdigest().encode("ascii")


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
            file.seek(max(0, size - _SEAL_SIZE))
            tail = file.read(len(_SEAL))
            if not size:
                raise ValueError("empty")
            if head != b"PK\x03\x04":
                raise ValueError("not a checkpoint file")
            if tail != _SEAL:
                raise ValueError("no checksum at its end: torn, or not written by co2lightning")
            file.seek(0)
            data = file.read()  # only now: a few bytes on disk can be a file larger than memory
    except ValueError as error:
        raise Damaged(path, str(error)) from None
    except MemoryError:
        raise OSError(errno.ENOMEM, "larger than the memory", str(path)) from None
    if hashlib.sha256(data[:-64]).hexdigest().encode("ascii") != data[-64:]:
        raise Damaged(path, "checksum differs")
    start = data.rfind(_COMMENT, max(0, len(data) - _MAX_RECORD - 64))
    try:
        record = parse_json(data[start + len(_COMMENT) : -_SEAL_SIZE])
    except ValueError as error:
        raise Damaged(path, f"record unreadable: {error}") from None
    return data, record


def check_content(path: Path, data: bytes) -> None:
    """Raise `Damaged` if a file holds anything but tensors and plain data; needs no torch."""
    problem = _foreign_content(data)
    if problem:
        raise Damaged(path, problem)


def load_content(path: Path, data: bytes) -> dict[str, Any]:
    """Load the bytes of a checkpoint file on the CPU; no code in them runs.

    Raises:
        Damaged: They are not plain tensors and data.
    """
    import torch

    check_content(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile file provokes
        line = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise Damaged(path, f"cannot be loaded: {line}") from None
    try:
        content = _plain(content, len(data))
    except ValueError as error:
        raise Damaged(path, str(error)) from None
    if not isinstance(content, dict):
        raise Damaged(path, "holds no dictionary")
    return cast(dict[str, Any], content)


def _plain(content: object, most_bytes: int) -> Any:
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

    left = _MAX_PARTS

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if left < 0 or depth > _MAX_DEPTH:
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
        if type(value) is int and abs(value) >= _MAX_INTEGER:
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
                if operation.name != "GLOBAL" or not _HARMLESS.fullmatch(name):
                    return f"names {name[:80]!r}, which is neither tensor nor plain data"
        if _has_large_tuple(data[begin:end]):
            return "holds a tuple of too many parts"
    except Exception as error:  # pickletools raises a dozen kinds on hostile bytes
        return f"not a checkpoint: {str(error)[:80] or type(error).__name__}"
    return None


def _has_large_tuple(code: bytes) -> bool:
    """Say whether a pickle makes a tuple of more than `_MAX_TUPLE` parts.

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
            elif parts > _MAX_TUPLE:
                return True
            stack += [parts] * len(operation.stack_after)
    return False


def parse_json(text: bytes) -> dict[str, Any]:
    """Parse an object with finite numbers only.

    Raises:
        ValueError: Anything else, also nesting too deep and numbers too long.
    """
    if len(text) > _MAX_JSON:
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
    for _ in range(_MAX_DEPTH):  # what can be read could still be too deep to be written again
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
    if abs(value) >= _MAX_INTEGER:
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
        data = read_file(path, _MAX_JSON)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    seal = _JSON_SEAL.search(data, max(0, len(data) - 120))
    if seal is None:
        raise ValueError("no checksum at its end" if data else "empty")
    if hashlib.sha256(data[: seal.start()]).hexdigest().encode("ascii") != seal[1]:
        raise ValueError("checksum differs")
    value = parse_json(data)
    del value["sha256_above"]
    return value
