"""Places that a user names: files and directories of this machine, checked before work is spent."""

import os
import re
import stat
import tempfile
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
    _check_directory(f"{flag} {name}", path.parent)
    return path


def check_output_directory(flag: str, name: str | Path | None) -> Path | None:
    """Return the directory that files shall go to; refuse it before work is spent on them.

    It need not be there; what it shall lie in must.

    Raises:
        UserError: `name` is no place for a directory, or may not be written.
    """
    if name is None:
        return None
    directory = Path(name)
    if os.path.lexists(directory) and not directory.is_dir():
        raise UserError(f"{flag} {name}: is not a directory")
    _check_directory(
        f"{flag} {name}", directory if directory.is_dir() else directory.resolve().parent
    )
    return directory


def _check_directory(what: str, directory: Path) -> None:
    """Raise a UserError about `what` unless a file can be made in `directory`."""
    if not directory.is_dir():
        raise UserError(f"{what}: there is no directory {directory}; make it first")
    try:
        with tempfile.TemporaryFile(dir=directory):  # os.access says yes to root, whatever happens
            pass
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{what}: {directory} cannot be written ({reason})") from None
