"""What the user reads: everything that is printed goes through here.

Names, settings and timestamps come from files that a stranger may have written, so what could
steer a terminal is escaped. And nothing that is printed ends the work that it tells of.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import stat
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def clean(text: str) -> str:
    """Return a text as one line that cannot steer a terminal.

    Control characters, marks that turn the direction of writing and what is no character are
    escaped: `\\x1b`, `\\n`, `\\u202e`.
    """
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def prepare() -> None:
    """Let the streams escape what their encoding cannot show, such as `é` in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(*lines: str, err: bool = False) -> None:
    """Print lines on standard output, or on standard error.

    Raises:
        OSError: A disk beneath standard output is full or fails. A reader that has gone, or a
            terminal, is no error.
    """
    _write("".join(f"{clean(line)}\n" for line in lines), err)


def tell(line: str) -> None:
    """Print a line of work that goes on whatever becomes of its lines."""
    try:
        say(line)
    except OSError as error:
        say(f"{error.filename}: {error.strerror}; goes on, its further lines are lost", err=True)


def show_tables(*tables: Table, width: int) -> None:
    """Print tables; `width` is for a pipe, which has none of its own."""
    _write(_drawn(tables, None if os.isatty(1) else width))


def as_text(*tables: Table, below: list[str], width: int) -> str:
    """Return tables and the lines below them as they are printed, without colours."""
    return _drawn(tables, width, plain=True) + "\n".join(map(clean, below))


def _drawn(tables: tuple[Table, ...], width: int | None, plain: bool = False) -> str:
    from rich.console import Console

    console = Console(
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        force_terminal=False if plain else None,
        force_jupyter=False if plain else None,
    )
    with console.capture() as captured:
        for table in tables:
            for column in table.columns:
                column._cells = [clean(str(cell)) for cell in column._cells]
            console.print(table)
    return captured.get()


def acknowledge(line: str) -> None:
    """Print a line from a signal's handler, which may have come in the middle of another one."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = sys.stdout.fileno()
        begin = "\n" if os.isatty(descriptor) else ""  # there a live line or ^C stands
        os.write(descriptor, f"{begin}{line}\n".encode("ascii"))


_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
"""What ends a program; Windows has no SIGHUP."""


def take_signals(action: Any) -> dict[int, Any]:
    """Let `action` be what happens at SIGINT, SIGTERM, SIGHUP; return what happened before.

    One that we were started to ignore, as by nohup or by & in a script, stays ignored.
    """
    return {
        signum: signal.signal(signum, action)
        for signum in _SIGNALS
        if signal.getsignal(signum) is not signal.SIG_IGN
    }


def _write(text: str, err: bool = False) -> None:
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # closed by whoever started us
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        descriptor = stream.fileno()
        on_disk = stat.S_ISREG(os.fstat(descriptor).st_mode)
        os.dup2(null := os.open(os.devnull, os.O_WRONLY), descriptor)  # further lines go nowhere
        os.close(null)
        # A terminal that was closed answers EIO; Windows answers EINVAL for a pipe.
        gone = error.errno in (errno.EPIPE, errno.EINVAL) or (
            error.errno == errno.EIO and not on_disk
        )
        if not (err or gone):
            raise OSError(error.errno, error.strerror, "standard output") from None
