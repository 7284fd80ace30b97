"""Read a CSV file strictly: its columns, and every mistake in it told at once."""

import contextlib
import csv
import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from co2lightning.errors import UserError, show
from co2lightning.site.model import Floats

MAX_BYTES = 256 * 1024**2  # of a file as it lies there, and of what it unpacks to
_MAX_ROWS = 2_000_000
_MAX_LONG_BYTES = 1024**3  # of what a file unpacks to that is read piece by piece
_PIECE_BYTES = 8 * 1024**2
_MISTAKES_TOLD = 3  # of each kind so many rows, and so many kinds; the rest is counted


def _number(cell: str) -> float | str:
    """Return the finite number in a cell, or what is wrong with it."""
    if not cell.strip():
        return "is empty; every cell needs a number"
    if "_" in cell:
        return "is not a number; write it without _"
    try:
        value = float(cell)
    except ValueError:
        hint = "write the decimal point as a point" if "," in cell else "every cell needs one"
        return f"is not a number; {hint}"
    return value if math.isfinite(value) else "is not a finite number; every cell needs one"


def number_or_nothing(cell: str) -> float | str:
    """Return the finite number in a cell, NaN where it is empty, or what is wrong with it."""
    found = _number(cell) if cell.strip() else math.nan
    if isinstance(found, str):
        return found.replace("every cell needs one", "write one, or leave the cell empty")
    return found


class Table:
    """A CSV file as columns of text; collects what is wrong with its cells.

    Attributes:
        columns: The cells of every column that is known and there, by its name.
        remarks: On columns that are there and not known: they are not read.
    """

    def __init__(
        self,
        name: str,
        data: bytes | str,
        needed: tuple[str, ...],
        optional: tuple[str, ...] = (),
        rows_before: int = 0,
    ) -> None:
        self.name = name
        self.remarks: list[str] = []
        self._second_row = rows_before + 2  # of the file: the header is row 1
        if isinstance(data, bytes):
            data = _decode(name, b"".join(_blocks(name, data, MAX_BYTES)))
        text = data.rstrip("\r\n")
        cells: list[str] = []  # row after row: a list for each row would be slow to collect
        header: dict[str, int] = {}
        width, n_rows = 0, -1
        try:
            for n_rows, row in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True)):
                if not n_rows:
                    header = self._check_header(row, needed, optional)
                    width = len(row)
                elif len(row) != width:
                    problem = f"has {len(row)} values; the header has {width}"
                    if not row:
                        problem = "is empty; remove it"
                    raise UserError(f"{name}: row {rows_before + n_rows + 1} {problem}")
                elif n_rows > _MAX_ROWS:
                    raise UserError(f"{name}: has over {_MAX_ROWS} rows, the most that is read")
                cells += row
        except csv.Error as error:
            raise UserError(
                f"{name}: row {rows_before + n_rows + 2} is not valid CSV ({error}); values are "
                "separated by commas"
            ) from error
        if n_rows < 1:
            raise UserError(f"{name}: has no rows; line 1 is the header {','.join(needed)}")
        self.columns = {column: cells[width + i :: width] for column, i in header.items()}
        self.n_rows = n_rows
        self._mistakes: list[tuple[str, str]] = []  # of each kind: in full, and in short

    def _check_header(
        self, header: list[str], needed: tuple[str, ...], optional: tuple[str, ...]
    ) -> dict[str, int]:
        """Return where each known column stands; remark on the others."""
        names = [h.strip() for h in header]
        known = (*needed, *optional)
        expected = f"the header is {','.join(needed)}"
        if optional:
            expected += f", and may have {', '.join(optional)}"
        if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
            raise UserError(f"{self.name}: row 1 is not separated by commas; {expected}")
        for column in needed:
            if column not in names:
                raise UserError(f"{self.name}: column {column} is missing; {expected}")
        for i, column in enumerate(names):
            if column in known and column in names[:i]:
                raise UserError(f"{self.name}: column {column} is there twice; {expected}")
            if column not in known and column.casefold() in known:
                right = column.casefold()
                raise UserError(f"{self.name}: column {show(column)} is unknown; write {right}")
        if extra := [show(column) for column in names if column not in known]:
            more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
            self.remarks.append(
                f"{self.name}: column{'s' * (len(extra) > 1)} {', '.join(extra[:5])}{more} "
                f"{'are' if len(extra) > 1 else 'is'} not read"
            )
        return {column: i for i, column in enumerate(names) if column in known}

    def read(
        self,
        column: str,
        parse: Callable[[str], float | str] = _number,
        *,
        may_be_empty: bool = False,
    ) -> Floats:
        """Read a column as numbers; NaN where a cell holds none, which is noted.

        Args:
            column: Its name.
            parse: Returns what a cell holds, or as text what is wrong with it.
            may_be_empty: Whether an empty cell is NaN and no mistake.
        """
        cells = self.columns[column]
        found = {
            cell: math.nan if may_be_empty and not cell.strip() else parse(cell)
            for cell in dict.fromkeys(cells)
        }
        wrong = {cell: why for cell, why in found.items() if isinstance(why, str)}
        kinds = {cell: why.partition(";")[0] for cell, why in wrong.items()}
        for kind in dict.fromkeys(kinds.values()):
            self.check([kinds.get(c) == kind for c in cells], column, lambda i: wrong[cells[i]])
        numbers = found | dict.fromkeys(wrong, math.nan)
        return np.array([numbers[cell] for cell in cells], dtype=np.float64)

    def check(self, bad: ArrayLike, column: str, problem: str | Callable[[int], str]) -> None:
        """Note the rows where `bad` holds as one kind of mistake; `finish` tells of them.

        Args:
            bad: Of each row; row 0 is line 2 of the file.
            column: Where the mistake is.
            problem: What is wrong and what would be right; or a function of the row that says so.
        """
        rows = np.flatnonzero(bad).tolist()
        if not rows:
            return
        first, count = rows[0], len(rows)
        words = problem if isinstance(problem, str) else problem(first)
        cell = show(self.columns[column][first])
        told = f"row {first + self._second_row}, column {column}: {cell} {words}"
        if count > 1:
            named = ", ".join(str(row + self._second_row) for row in rows[:_MISTAKES_TOLD])
            told += f" ({count} such rows: {named}{', ...' if count > _MISTAKES_TOLD else ''})"
        self._mistakes.append((told, f"{count} x {column} {words.partition(';')[0]}"))

    def finish(self) -> None:
        """Raise for all mistakes that were noted, if there are any."""
        if self._mistakes:
            told = [in_full for in_full, _ in self._mistakes[:_MISTAKES_TOLD]]
            told += [in_short for _, in_short in self._mistakes[_MISTAKES_TOLD:]]
            raise UserError(f"{self.name}: {' | '.join(told)}")


def tables(
    name: str, data: bytes, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[Table]:
    """Yield the rows of a long file piece by piece, each as a table with the header on top."""
    header, left, rows = "", b"", 0
    for block in _blocks(name, data, _MAX_LONG_BYTES):
        whole, _, rest = (left + block).rpartition(b"\n") if block else (left, b"", b"")
        if block and not rows and b"\n" not in whole:  # not a row below the header yet
            left += block
            continue
        left = rest
        if rows and not whole.strip():
            continue
        text = header + _decode(name, whole, rows + (rows > 0))
        header = header or text.partition("\n")[0] + "\n"
        table = Table(name, text, needed, optional, rows)
        rows += table.n_rows
        yield table


def _blocks(name: str, data: bytes, limit: int) -> Iterator[bytes]:
    """Yield what a file unpacks to, some MiB at a time; at its end nothing."""
    stream, size, block = io.BytesIO(data), 0, b"some"
    file = gzip.GzipFile(fileobj=stream) if name.endswith(".gz") else stream
    while block:
        with _sound(name):
            block = file.read(_PIECE_BYTES)
        size += len(block)
        if size > limit:
            most = f"{limit // 1024**2} MiB, the most that is read"
            raise UserError(f"{name}: unpacks to more than {most}")
        yield block


@contextlib.contextmanager
def _sound(name: str) -> Iterator[None]:
    """Say of a file that cannot be unpacked what is wrong with it."""
    try:
        yield
    except EOFError as error:
        raise UserError(f"{name}: is cut off in the middle; copy or compress it again") from error
    except (OSError, zlib.error) as error:
        raise UserError(
            f"{name}: is not a sound gzip file; compress it again, or give plain {name[:-3]}"
        ) from error


def _decode(name: str, data: bytes, rows_before: int = 0) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = rows_before + data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}: row {row} is not UTF-8 text; save the file as UTF-8") from error
