"""The zip that `torch.save` writes, read so that no other reader can see another one in it.

A zip says what it holds in its end record, in its directory and before each entry, and readers
differ in which of them they believe. A forged file can show a check one content and torch another.
So here all of them must agree, and every byte must belong to one: the entries, not compressed, one
behind the other; the directory; the end. Numbers beyond 32 bits stand in fields of their own.
"""

import re
import struct
from typing import NamedTuple

_MAX_ENTRIES = 100_000
_END = struct.Struct("<4s4H2LH")
_WIDE_END = struct.Struct("<4sQ2H2L4Q")
_WIDE_END_PLACE = struct.Struct("<4sLQL")
_ROW = struct.Struct("<4s4x2H4x3L4H2x2L")
_HEAD = struct.Struct("<4s2x2H8x2L2H")
_TAIL = struct.Struct("<4s3L")
_WIDE_TAIL = struct.Struct("<4sL2Q")
_NAME = re.compile(rb"archive/[!-~]*[!-.0-~]")  # a slash at its end is a directory
_HAS_TAIL, _UTF8 = 1 << 3, 1 << 11  # flags of an entry
_SHORT, _LONG = 0xFFFF, 0xFFFFFFFF  # in place of a number that stands in a wider field


class _Row(NamedTuple):
    """An entry as the directory has it."""

    name: bytes
    flags: int
    size: int
    offset: int
    tail: bytes  # stands behind the content where a flag says so


def entries(data: bytes) -> dict[bytes, tuple[int, int]]:
    """Return for each entry, by its name in small letters, where its content begins and ends.

    Raises:
        ValueError: It is no such zip.
        struct.error: It is shorter than it says.
    """
    start, rows = _directory(data)
    found: dict[bytes, tuple[int, int]] = {}
    place = 0
    for row in rows:
        *head, extra_size = _HEAD.unpack_from(data, place)
        name_at = place + _HEAD.size
        begin = name_at + len(row.name) + extra_size
        end = begin + row.size
        sizes = (0, 0) if row.flags & _HAS_TAIL else (row.size, row.size)
        tail = row.tail if row.flags & _HAS_TAIL else b""
        if (
            row.offset != place
            or head != [b"PK\3\4", row.flags, 0, *sizes, len(row.name)]
            or not data.startswith(row.name, name_at)
            or not data.startswith(tail, end)
        ):
            raise ValueError("its zip's entries are not those of the directory")
        found[row.name.lower()] = begin, end
        place = end + len(tail)
    if place != start:
        raise ValueError("its zip's entries do not reach up to the directory")
    if len(found) < len(rows):
        raise ValueError("two entries of one name")
    return found


def _directory(data: bytes) -> tuple[int, list[_Row]]:
    """Return where the directory begins, and its rows."""
    end = data.rfind(b"PK\5\6")
    *_, count, size, start, comment = _END.unpack_from(data, end)
    expected = b""
    if data.startswith(b"PK\6\7", end - _WIDE_END_PLACE.size):
        end -= _WIDE_END_PLACE.size + _WIDE_END.size
        _, _, made_by, needs, *_, count, size, start = _WIDE_END.unpack_from(data, end)
        expected = _WIDE_END.pack(b"PK\6\6", 44, made_by, needs, 0, 0, count, count, size, start)
        expected += _WIDE_END_PLACE.pack(b"PK\6\7", 0, end, 1)
    counts = [min(count, _SHORT)] * 2
    expected += _END.pack(b"PK\5\6", 0, 0, *counts, min(size, _LONG), min(start, _LONG), comment)
    if start + size != end or data[end : len(data) - comment] != expected:
        raise ValueError("its zip's directory is not where the end says")
    if count > _MAX_ENTRIES:
        raise ValueError(f"{count} entries")
    rows: list[_Row] = []
    place = start
    for _ in range(count):
        row, place = _row(data, place)
        rows.append(row)
    if place != end:
        raise ValueError("its zip's directory does not reach up to the end")
    return start, rows


def _row(data: bytes, place: int) -> tuple[_Row, int]:
    """Return the row of the directory that begins at `place`, and where the next one does."""
    signature, flags, method, crc, packed, size, name_size, extra_size, *rest, offset = (
        _ROW.unpack_from(data, place)
    )
    extra_at = place + _ROW.size + name_size
    name, extra = data[place + _ROW.size : extra_at], data[extra_at : extra_at + extra_size]
    tail = _TAIL
    if _LONG in (size, packed, offset):
        tail = _WIDE_TAIL
        count = (size, packed, offset).count(_LONG)
        *kind, wide = struct.unpack(f"<2H{8 * count}s", extra)
        numbers = iter(struct.unpack(f"<{count}Q", wide))
        size, packed, offset = (
            next(numbers) if number == _LONG else number for number in (size, packed, offset)
        )
        extra = b"" if kind == [1, 8 * count] else extra
    if method or packed != size:
        raise ValueError("compressed")
    # Torch returns whatever its memory held for an entry whose attributes call it a directory.
    if signature != b"PK\1\2" or extra or any(rest) or flags & ~(_HAS_TAIL | _UTF8):
        raise ValueError("its zip's directory is not one of torch")
    if not _NAME.fullmatch(name):
        raise ValueError(f"entry {name!r:.60}")
    row = _Row(name, flags, size, offset, tail.pack(b"PK\7\10", crc, size, size))
    return row, extra_at + extra_size
