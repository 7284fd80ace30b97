"""The check of a file and torch see one archive in it, or it is refused."""

import collections
import io
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import seal

from co2lightning.runs import tensor_zip
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.runs.seal import Damaged


def save(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def squeezed(data: bytes) -> bytes:
    """Compress a zip's entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    return file.getvalue()


class Parts:
    """A zip, cut where a forger cuts it."""

    def __init__(self, data: bytes) -> None:
        self.count, size, start = struct.unpack_from("<H2L", data, len(data) - 12)
        self.entries, self.rows = data[:start], data[start : start + size]

    def shifted(self, by: int) -> bytes:
        """Return the directory for entries that begin so many bytes later."""
        rows, place = bytearray(self.rows), 0
        while place < len(rows):
            (offset,) = struct.unpack_from("<L", rows, place + 42)
            struct.pack_into("<L", rows, place + 42, offset + by)
            place += 46 + sum(struct.unpack_from("<3H", rows, place + 28))
        return bytes(rows)

    def end(self, start: int, size: int | None = None) -> bytes:
        size = len(self.rows) if size is None else size
        return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, self.count, self.count, size, start, 0)


def two_faced(hidden: Parts) -> bytes:
    """Let the end point to one directory, as torch reads it, and have another one before it."""
    shown = Parts(save({"weight": torch.zeros(3)}))
    front = hidden.entries + bytes(len(shown.entries))
    rows = shown.shifted(len(front) - len(shown.entries))
    assert len(hidden.rows) == len(rows)
    return front + hidden.rows + shown.entries + rows + hidden.end(len(front))


COUNTER = Parts(save({"weight": collections.Counter("ab"), "more": torch.zeros(3)}))
SQUEEZED = Parts(squeezed(save({"weight": torch.zeros(1_000_000)})))
GOOD = Parts(save({"weight": torch.arange(6.0), "nothing": torch.zeros(0), "epoch": 3}))
START = len(GOOD.entries)
FORGED: dict[str, tuple[bytes, str]] = {
    "hidden class": (two_faced(COUNTER), "not where the end says"),
    "compressed": (SQUEEZED.entries + SQUEEZED.rows + SQUEEZED.end(len(SQUEEZED.entries)), "compr"),
    "compressed and hidden": (two_faced(SQUEEZED), "not where the end says"),
    "something before": (
        b"PK\3\4" + bytes(60) + GOOD.entries + GOOD.shifted(64) + GOOD.end(START + 64),
        "not those of the directory",
    ),
    "a gap": (GOOD.entries + bytes(9) + GOOD.rows + GOOD.end(START + 9), "up to the directory"),
    "a long directory": (
        GOOD.entries + GOOD.rows + bytes(9) + GOOD.end(START, len(GOOD.rows) + 9),
        "up to the end",
    ),
    "an end behind the end": (
        GOOD.entries + GOOD.rows + GOOD.end(START)[:-2] + b"\x16\0" + GOOD.end(START),
        "not where the end says",
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_archive_is_refused(tmp_path: Path, kind: str) -> None:
    data, says = FORGED[kind]
    path = tmp_path / "episode_0001.pt"
    path.write_bytes(seal(data))
    with pytest.raises(Damaged, match=says):
        TrainingCheckpoint.read(path)


def test_whatever_byte_is_changed_torch_reads_the_entries_that_were_checked() -> None:
    good = seal(save({"weight": torch.arange(6.0), "nothing": torch.zeros(0)}))
    rng = random.Random(0)
    refused = 0
    for number in range(4 * len(good)):
        data = bytearray(good)
        data[number % len(data)] ^= 1 << rng.randrange(8)
        if number % 4 == 3:  # and one more
            data[rng.randrange(len(data))] = rng.choice([0, 1, 8, 255])
        try:
            entries = tensor_zip.entries(bytes(data))
        except (ValueError, struct.error):
            refused += 1
            continue
        try:
            reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        except (RuntimeError, UnicodeDecodeError):  # of its version or byte order
            continue
        seen = {f"archive/{name}".lower().encode() for name in reader.get_all_records()}
        assert seen == set(entries)
        for name, (begin, end) in entries.items():
            record = name.decode().removeprefix("archive/")
            assert reader.get_record(record) == bytes(data[begin:end])
    assert refused > len(good)
