"""Checkpoint files with a valid seal whatever they hold, as an attacker would make them."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from co2lightning.runs.seal import load_content, read_sealed


def unseal(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a good file and its record."""
    data, record = read_sealed(path)
    return load_content(path, data), record


def seal_zip(data: bytes, record: dict[str, Any]) -> bytes:
    """Give a zip the comment that makes it a checkpoint file."""
    comment = b"co2lightning " + json.dumps(record).encode() + b" sha256="
    data = data[:-2] + (len(comment) + 64).to_bytes(2, "little") + comment
    return data + hashlib.sha256(data).hexdigest().encode()


def seal_content(content: Any, record: dict[str, Any]) -> bytes:
    """Save whatever content, plain or not."""
    file = io.BytesIO()
    torch.save(content, file)
    return seal_zip(file.getvalue(), record)
