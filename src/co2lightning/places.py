# pyright: strict
"""Files that cannot lie: atomic writes, self-verifying checkpoints and JSON, one lock.

A checkpoint file is the zip that `torch.save` writes, with a zip comment

    co2lightning {"episode": 5, ...} sha256=<64 hex digits>

whose digits are the SHA-256 of every byte before them. `torch.load` ignores the comment, so the
file opens anywhere; a flipped bit or a missing byte shows without any other file; and the small
record in the comment tells what the file holds without importing torch.
"""

import os
import re
from pathlib import Path

from co2lightning.errors import UserError, show


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
