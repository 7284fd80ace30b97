"""Read and check a site folder: equipment, series, charging sessions.

A folder holds `site.yaml`, `series.csv.gz` and `sessions.csv.gz` (or plain `.csv`); see
docs/site-format.md. Folders come from strangers: nothing in them is run, sizes are bounded, and
whatever is wrong becomes one line that names file, row, column or key and what would be right.

Shapes: D days, T = 96 steps of 15 min a day, S sockets, N sessions. Steps and days are local; a
time in a file is the beginning of its step. Inside, times are whole seconds since 1970 UTC.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import heapq
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import ArrayLike, NDArray

from co2lightning.errors import UserError, show
from co2lightning.places import local
from co2lightning.site.model import STEP_H, Battery, Floats, Ints, Sessions, Site, SocketType, T
from co2lightning.site.plain_yaml import parse_yaml

_STEP_S = 900
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SHIPPED = Path(__file__).parents[1] / "sites"
_SERIES_COLUMNS = ("time", "pv_kw", "load_kw", "carbon_kg_per_kwh")
_SESSION_COLUMNS = ("session_id", "socket_type", "arrival", "departure", "energy_kwh", "max_kw")
_MAX_YAML_BYTES = 64 * 1024
_MAX_CSV_BYTES = 256 * 1024**2
_MAX_ROWS = 2_000_000
_MAX_STAY_DAYS = 7
_MIN_WINDOW_STEPS = 2
_WINDOW_SHARE = 0.98  # the largest share of what its window allows that a session may ask for
_IMPLAUSIBLE_SHARE = 10.0  # beyond this the unit is wrong, not the stay short
_MISTAKES_TOLD = 3  # of each kind so many rows, and so many kinds; the rest is counted
_SITES_KEPT = 4


def shipped_sites() -> list[str]:
    """List the names of the sites that come with the package."""
    return sorted(p.parent.name for p in _SHIPPED.glob("*/site.yaml"))


@contextlib.contextmanager
def named_in(file: Path | None) -> Iterator[None]:
    """Say of a site that cannot be read which run's file names it, perhaps of another machine."""
    try:
        yield
    except UserError as error:
        if file is None:  # nothing but the user's own words
            raise
        raise UserError(f"{file}: {error}; --env.site gives its place here") from None


def load_site(site: str | Path) -> Site:
    """Read and check a site, once a process as long as its files stay as they are.

    Args:
        site: A site folder, or the name of a shipped site such as `iquitos`. A bare name that is
            both means the shipped site; write `./iquitos` for the folder.

    Returns:
        The site, with the sessions already admitted to sockets; its arrays cannot be written.

    Raises:
        UserError: The folder or a file is missing, or something in it is wrong.
    """
    notes: list[str] = []
    directory = _locate(site, notes)
    files = {
        "site.yaml": _read_bytes(directory / "site.yaml", _MAX_YAML_BYTES),
        **_read_csv_bytes(directory, "series"),
        **_read_csv_bytes(directory, "sessions"),
    }
    hashes = [(name, hashlib.sha256(data).digest()) for name, data in files.items()]
    key = (directory, *notes, *hashes)
    found = _sites.get(key)
    if found is None:
        found = _read_site(directory, files, notes)
        for old in list(_sites)[: 1 - _SITES_KEPT]:
            _sites.pop(old, None)
        _sites[key] = found
    return found


_sites: dict[tuple[object, ...], Site] = {}
"""The sites read last, by their files' content."""


def _read_site(directory: Path, files: dict[str, bytes], notes: list[str]) -> Site:
    """Make a site of the content of its three files."""
    (_, yaml_bytes), (series_name, series_bytes), (sessions_name, sessions_bytes) = files.items()
    config = _read_config(yaml_bytes)
    zone = ZoneInfo(config["timezone"])
    clock = _Clock(zone)
    series = _Table(series_name, series_bytes, _SERIES_COLUMNS)
    times_s, values = _read_series(series, config, clock)
    calendar = _Calendar(times_s, zone)
    kept = calendar.complete_days()
    if not len(kept):
        raise UserError(
            f"{series_name}: holds no complete day; at least one day from 00:00 to 24:00 in "
            f"{config['timezone']} is needed, 96 rows of 15 min"
        )
    days = tuple(calendar.dates[i].isoformat() for i in kept)
    if left_out := len(calendar.dates) - len(kept):
        first = next(d for i, d in enumerate(calendar.dates) if i not in set(kept.tolist()))
        notes.append(
            f"{series_name}: {left_out} of {len(calendar.dates)} days left out because they do "
            f"not have 96 steps (the first: {first})"
        )
    first_rows = (calendar.starts_s[kept] - times_s[0]) // _STEP_S
    rows = first_rows[:, None] + np.arange(T)
    table = _Table(sessions_name, sessions_bytes, _SESSION_COLUMNS)
    sessions, turned_away = _read_sessions(table, config["sockets"], clock, calendar, kept, notes)
    site = Site(
        **{key: value for key, value in config.items() if key != "held_out"},
        directory=directory,
        sha256=hashlib.sha256(b"".join(files.values())).hexdigest(),
        days=days,
        held_out=_held_out(config["held_out"], days, series_name),
        pv_kw=values["pv_kw"][rows],
        load_kw=values["load_kw"][rows],
        carbon_kg_per_kwh=values["carbon_kg_per_kwh"][rows],
        sessions=sessions,
        turned_away=turned_away,
        notes=tuple(notes),
    )
    for part in (*vars(site).values(), *vars(sessions).values()):
        if isinstance(part, np.ndarray):
            part.setflags(write=False)  # everybody who loads the site shares it
    return site


# --- files ---------------------------------------------------------------------------------------


def _locate(site: str | Path, notes: list[str]) -> Path:
    text = str(site)
    shipped = shipped_sites()
    if isinstance(site, str) and site in shipped:
        if Path(site).is_dir():
            notes.append(f"site {site}: read the shipped site; write ./{site} for the folder here")
        return _SHIPPED / site
    directory = Path(local("site", site))
    try:
        found = bool(text.strip()) and directory.is_dir()
    except (OSError, ValueError):  # too long, or a NUL byte
        found = False
    if not found:
        raise UserError(
            f"site {show(text)}: no such folder and no shipped site; give a folder with "
            f"site.yaml, series.csv.gz and sessions.csv.gz, or one of {', '.join(shipped)}"
        )
    directory = directory.resolve()
    if directory.name in shipped and directory.parent != _SHIPPED.resolve():
        notes.append(f"site {show(text)}: read the folder, not the shipped site {directory.name}")
    return directory


def _read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes."""
    try:
        if not path.is_file():
            what = "is not a regular file" if path.exists() else "is missing"
            raise UserError(
                f"{path.name}: {what} in {show(str(path.parent))}; a site folder holds "
                "site.yaml, series.csv.gz and sessions.csv.gz"
            )
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise UserError(f"{path.name}: is larger than {limit // 1024} KiB, the most that is read")
    return data


def _read_csv_bytes(directory: Path, stem: str) -> dict[str, bytes]:
    """Find `stem.csv.gz` or `stem.csv` and return its name and its bytes as they lie there."""
    packed, plain = directory / f"{stem}.csv.gz", directory / f"{stem}.csv"
    if packed.exists() and plain.exists():
        raise UserError(f"{packed.name}: {plain.name} is there too; keep only one of them")
    path = plain if plain.exists() else packed
    return {path.name: _read_bytes(path, _MAX_CSV_BYTES)}


def _unpack(name: str, data: bytes) -> str:
    if name.endswith(".gz"):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(_MAX_CSV_BYTES + 1)
        except EOFError as error:
            raise UserError(
                f"{name}: is cut off in the middle; copy or compress it again"
            ) from error
        except (OSError, zlib.error) as error:
            raise UserError(
                f"{name}: is not a sound gzip file; compress it again, or give plain {name[:-3]}"
            ) from error
        if len(data) > _MAX_CSV_BYTES:
            raise UserError(
                f"{name}: unpacks to more than {_MAX_CSV_BYTES // 1024**2} MiB, the most that is "
                "read"
            )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}: row {row} is not UTF-8 text; save the file as UTF-8") from error


class _Table:
    """A CSV file as columns of text; collects what is wrong with its cells."""

    def __init__(self, name: str, data: bytes, columns: tuple[str, ...]) -> None:
        self.name = name
        text = _unpack(name, data).rstrip("\r\n")
        cells: list[str] = []  # row after row: a list for each row would be slow to collect
        width, n_rows = 0, -1
        try:
            for n_rows, row in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True)):
                if not n_rows:
                    self._check_header(row, columns)
                    width = len(row)
                elif len(row) != width:
                    problem = f"has {len(row)} values; the header has {width}"
                    if not row:
                        problem = "is empty; remove it"
                    raise UserError(f"{name}: row {n_rows + 1} {problem}")
                elif n_rows > _MAX_ROWS:
                    raise UserError(f"{name}: has over {_MAX_ROWS} rows, the most that is read")
                cells += row
        except csv.Error as error:
            raise UserError(
                f"{name}: row {n_rows + 2} is not valid CSV ({error}); values are separated "
                "by commas"
            ) from error
        if n_rows < 1:
            raise UserError(f"{name}: has no rows; line 1 is the header {','.join(columns)}")
        self.columns = {cells[i].strip(): cells[width + i :: width] for i in range(width)}
        self.n_rows = n_rows
        self._mistakes: list[tuple[str, str]] = []  # of each kind: in full, and in short

    def _check_header(self, header: list[str], columns: tuple[str, ...]) -> None:
        names = [h.strip() for h in header]
        expected = f"the header is {','.join(columns)}"
        if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
            raise UserError(f"{self.name}: row 1 is not separated by commas; {expected}")
        for column in columns:
            if column not in names:
                raise UserError(f"{self.name}: column {column} is missing; {expected}")
        for i, column in enumerate(names):
            if column not in columns:
                raise UserError(f"{self.name}: column {show(column)} is unknown; {expected}")
            if column in names[:i]:
                raise UserError(f"{self.name}: column {column} is there twice; {expected}")

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
        told = f"row {first + 2}, column {column}: {cell} {words}"
        if count > 1:
            named = ", ".join(str(row + 2) for row in rows[:_MISTAKES_TOLD])
            told += f" ({count} such rows: {named}{', ...' if count > _MISTAKES_TOLD else ''})"
        self._mistakes.append((told, f"{count} x {column} {words.partition(';')[0]}"))

    def finish(self) -> None:
        """Raise for all mistakes that were noted, if there are any."""
        if self._mistakes:
            told = [in_full for in_full, _ in self._mistakes[:_MISTAKES_TOLD]]
            told += [in_short for _, in_short in self._mistakes[_MISTAKES_TOLD:]]
            raise UserError(f"{self.name}: {' | '.join(told)}")

    def numbers(self, column: str) -> Floats:
        """Read a column of finite numbers; NaN where a cell is none, which is noted."""
        wrong = self._check_cells(column, _why_no_number)
        cells = self.columns[column]
        return np.array([math.nan if cell in wrong else float(cell) for cell in cells])

    def times(self, column: str, clock: _Clock) -> Floats:
        """Read a column of local times with UTC offset, as seconds since 1970 UTC.

        NaN where a cell is none, which is noted.
        """
        self._check_cells(column, clock.read)
        return np.array([clock.seconds.get(cell, math.nan) for cell in self.columns[column]])

    def _check_cells(self, column: str, read: Callable[[str], str | None]) -> dict[str, str]:
        """Note the cells with which `read` finds something wrong, and return what it says."""
        cells = self.columns[column]
        wrong = {cell: why for cell in dict.fromkeys(cells) if (why := read(cell))}
        kinds = {cell: why.partition(";")[0] for cell, why in wrong.items()}
        for kind in dict.fromkeys(kinds.values()):
            self.check([kinds.get(c) == kind for c in cells], column, lambda i: wrong[cells[i]])
        return wrong


class _Clock:
    """Reads times of one zone; each text once, since most recur from column to column."""

    def __init__(self, zone: ZoneInfo) -> None:
        self.zone = zone
        self.seconds: dict[str, int] = {}

    def read(self, text: str) -> str | None:
        """Put the instant of `text` in `seconds`, or return what is wrong with it."""
        if text in self.seconds:
            return None
        if not text.strip():
            return "is empty; write 2025-01-31T06:15-05:00"
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            return "is not a time; write 2025-01-31T06:15-05:00"
        if not 1990 <= when.year <= 2100:
            return "is not between the years 1990 and 2100"
        if when.tzinfo is None:
            right = when.replace(tzinfo=self.zone).isoformat(timespec="minutes")
            return f"has no UTC offset; write {right}"
        local = when.astimezone(self.zone)
        if when.utcoffset() != local.utcoffset():
            return (
                f"is not local time of {self.zone.key} (timezone in site.yaml); the same instant "
                f"there is {local.isoformat(timespec='minutes')}"
            )
        self.seconds[text] = (when - _EPOCH) // timedelta(seconds=1)
        return None


def _why_no_number(cell: str) -> str | None:
    if not cell.strip():
        return "is empty; write 12.5"
    if "_" in cell:
        return "is not a number; write it without _"
    try:
        finite = math.isfinite(float(cell))
    except ValueError:
        hint = "write the decimal point as a point" if "," in cell else "write 12.5"
        return f"is not a number; {hint}"
    return None if finite else "is not a finite number; every cell needs one"


# --- site.yaml -----------------------------------------------------------------------------------


def _number(
    low: float, high: float, above: bool = False, hint: str = ""
) -> Callable[[str, object], float]:
    """Make a check for a number from `low` (or above it, with `above`) to `high`."""
    right = f"a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"

    def check(key: str, value: object) -> float:
        try:
            # 1e3 without a point is text in YAML 1.1, though anyone reads a number.
            number = float("nan" if isinstance(value, bool) else value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (low < number <= high if above else low <= number <= high):
            raise _config_error(key, value, right + hint)
        return number

    return check


def _integer(low: int, high: int) -> Callable[[str, object], int]:
    def check(key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _config_error(key, value, f"a whole number from {low} to {high}")
        return value

    return check


def _name(key: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w .-]{0,63}", value):
        raise _config_error(
            key, value, "text of at most 64 letters, digits, spaces, . _ - (quote it if need be)"
        )
    return value


def _zone(key: str, value: object) -> str:
    right = "a time zone name such as America/Lima"
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", value):
        raise _config_error(key, value, right)
    try:
        return ZoneInfo(value).key
    except (KeyError, ValueError, OSError) as error:
        raise _config_error(key, value, right) from error


def _config_error(key: str, value: object, right: str) -> UserError:
    return UserError(f"site.yaml: {key}: {show(value)} is not {right}")


_BATTERY = {
    "capacity_kwh": _number(0, 1e6, above=True, hint=" kWh"),
    "power_kw": _number(0, 1e6, above=True, hint=" kW"),
    "charge_efficiency": _number(0.5, 1, hint=" (a share, not per cent)"),
    "discharge_efficiency": _number(0.5, 1, hint=" (a share, not per cent)"),
    "soc_min": _number(0, 1, hint=" (a share, not per cent)"),
    "soc_max": _number(0, 1, hint=" (a share, not per cent)"),
    "start_soc_min": _number(0, 1, hint=" (a share, not per cent)"),
    "start_soc_max": _number(0, 1, hint=" (a share, not per cent)"),
}
_SOCKET = {
    "name": _name,
    "count": _integer(1, 100_000),
    "max_kw": _number(0, 1000, above=True, hint=" kW"),
}


def _battery(key: str, value: object) -> Battery:
    battery = Battery(**_mapping(key, value, _BATTERY))
    for low, high in (
        ("soc_min", "soc_max"),
        ("soc_min", "start_soc_min"),
        ("start_soc_min", "start_soc_max"),
        ("start_soc_max", "soc_max"),
    ):
        a, b = getattr(battery, low), getattr(battery, high)
        if a > b or ((low, high) == ("soc_min", "soc_max") and a == b):
            raise UserError(
                f"site.yaml: {key}.{high}: {b:g} is below {key}.{low} {a:g}; right is soc_min < "
                "soc_max and soc_min <= start_soc_min <= start_soc_max <= soc_max"
            )
    return battery


def _sockets(key: str, value: object) -> tuple[SocketType, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 1000:
        raise _config_error(key, value, "a list such as [{name: moto, count: 112, max_kw: 2.0}]")
    sockets = tuple(
        SocketType(**_mapping(f"{key}[{i}]", item, _SOCKET)) for i, item in enumerate(value)
    )
    for i, socket in enumerate(sockets):
        if socket.name in [s.name for s in sockets[:i]]:
            raise UserError(
                f"site.yaml: {key}[{i}].name: {socket.name} is there twice; names differ"
            )
    if (total := sum(s.count for s in sockets)) > 100_000:
        raise UserError(f"site.yaml: {key}: {total} sockets in all; at most 100000 are read")
    return sockets


def _held_out_rule(key: str, value: object) -> tuple[int, int] | tuple[str, ...]:
    """Check the rule; a pair (every, first) or dates. Days are looked up by `_held_out`."""
    if isinstance(value, dict):
        bounds = {"every": _integer(2, 10_000), "first": _integer(1, 10_000)}
        rule = _mapping(key, value, bounds)
        return rule["every"], rule["first"]
    if not isinstance(value, list) or not value:
        raise _config_error(
            key, value, "{every: 6, first: 6} or a list of dates such as [2025-01-06]"
        )
    dates: list[str] = []
    for i, item in enumerate(value):
        try:
            if isinstance(item, datetime) or not isinstance(item, date | str):
                raise ValueError
            dates.append(date.fromisoformat(str(item)).isoformat())
        except ValueError:
            raise _config_error(f"{key}[{i}]", item, "a date such as 2025-01-06") from None
    return tuple(dates)


_SITE: dict[str, Callable[[str, object], Any]] = {
    "name": _name,
    "latitude": _number(-90, 90, hint=" degrees"),
    "longitude": _number(-180, 180, hint=" degrees"),
    "altitude_m": _number(-500, 9000, hint=" m"),
    "timezone": _zone,
    "pv_kwp": _number(0, 1e6, hint=" kWp"),
    "grid_kw": _number(0, 1e6, above=True, hint=" kW"),
    "charger_efficiency": _number(0.5, 1, hint=" (a share, not per cent)"),
    "seed": _integer(0, 2**32 - 1),
    "battery": _battery,
    "sockets": _sockets,
    "held_out": _held_out_rule,
}

_Check = TypeVar("_Check", bound=Callable[[str, object], Any])


def _mapping(path: str, value: object, checks: dict[str, _Check]) -> dict[str, Any]:
    """Check a mapping key by key; `path` is "" for the whole file."""
    where = f"{path}: " if path else ""
    keys = f"the keys are {', '.join(checks)}"
    if not isinstance(value, dict):
        raise UserError(f"site.yaml: {where}{show(value)} is not a mapping; {keys}")
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in checks:
            raise UserError(f"site.yaml: {prefix}{show(key)} is unknown; {keys}")
    for key in checks:
        if key not in value:
            raise UserError(f"site.yaml: {prefix}{key} is missing; {keys}")
    return {key: check(prefix + key, value[key]) for key, check in checks.items()}


def _read_config(data: bytes) -> dict[str, Any]:
    return _mapping("", parse_yaml(data, "site.yaml", "docs/site-format.md"), _SITE)


def _held_out(
    rule: tuple[int, int] | tuple[str, ...], days: tuple[str, ...], series: str
) -> NDArray[np.bool_]:
    """Mark the held-out days; with a rule, days are counted from 1 among those that are used."""
    chosen = np.zeros(len(days), dtype=np.bool_)
    index = {day: i for i, day in enumerate(days)}
    if isinstance(rule[0], int):
        every, first = int(rule[0]), int(rule[1])
        chosen[first - 1 :: every] = True
    else:
        for i, day in enumerate(rule):
            if day not in index:
                raise UserError(
                    f"site.yaml: held_out[{i}]: {day} is not a complete day of {series}, which "
                    f"has {days[0]} to {days[-1]}"
                )
            chosen[index[str(day)]] = True
    if not chosen.any() or chosen.all():
        raise UserError(
            f"site.yaml: held_out: selects {chosen.sum()} of the {len(days)} days; at least one "
            "day to test on and one to train on are needed"
        )
    return chosen


# --- series --------------------------------------------------------------------------------------


def _read_series(
    table: _Table, config: dict[str, Any], clock: _Clock
) -> tuple[Ints, dict[str, Floats]]:
    """Read and check the series; returns times [rows] in seconds and each column [rows]."""
    times_s = table.times("time", clock)
    if not np.isnan(times_s).any():
        _check_steps(table, times_s)
    values = {column: table.numbers(column) for column in _SERIES_COLUMNS[1:]}
    pv, load, carbon = values.values()
    table.check(pv < 0, "pv_kw", "is negative; PV power is 0 kW or more")
    most_pv = 1.5 * config["pv_kwp"]
    table.check(
        pv > most_pv,
        "pv_kw",
        f"is more than 1.5 x pv_kwp = {most_pv:g} kW; PV power is in kW, not W",
    )
    table.check(load < 0, "load_kw", "is negative; the building load is 0 kW or more")
    supply = config["grid_kw"] + config["pv_kwp"] + config["battery"].power_kw
    table.check(
        load > supply,
        "load_kw",
        f"is more than grid_kw, pv_kwp and the battery give together, {supply:g} kW; the load is "
        "in kW, not W",
    )
    table.check(carbon < 0, "carbon_kg_per_kwh", "is negative; carbon intensity is 0 to 2 kg/kWh")
    table.check(
        carbon > 2,
        "carbon_kg_per_kwh",
        "is more than 2 kg/kWh; divide g/kWh or kg/MWh by 1000, multiply lb/MWh by 0.000454",
    )
    table.finish()
    return times_s.astype(np.int64), values


def _check_steps(table: _Table, times_s: Floats) -> None:
    """Note rows that do not come every 15 min; one that is out of order is enough to know."""
    steps = np.diff(times_s, prepend=times_s[0] - _STEP_S)
    usual_s = float(np.median(steps[1:])) if len(steps) > 1 else _STEP_S
    grid = "hourly" if usual_s == 3600 else f"every {usual_s / 60:g} min"
    off = times_s % _STEP_S != 0
    if off.any():
        finer = f"; the data are {grid}: average them over 15 min" if 0 < usual_s < _STEP_S else ""
        table.check(off, "time", f"is not on the 15-min grid (:00, :15, :30, :45){finer}")
        return
    wrong = np.flatnonzero(steps != _STEP_S)
    if not len(wrong):
        return
    first = int(wrong[0])
    before = table.columns["time"][first - 1]
    if steps[first] > 0:
        problem = (
            f"comes after a gap: {steps[first] / _STEP_S - 1:.0f} rows are missing after {before}"
        )
        if usual_s > _STEP_S:
            problem += f"; the data are {grid}: repeat each row until there is one every 15 min"
        table.check(steps > _STEP_S, "time", problem)
    elif steps[first] == 0:
        table.check(steps == 0, "time", "is there twice; keep one row for each 15 min")
    else:
        table.check(
            steps < 0, "time", f"is earlier than the row before ({before}); sort the rows by time"
        )


class _Calendar:
    """The local days that the series touches, with the instants at which they begin and end."""

    def __init__(self, times_s: Ints, zone: ZoneInfo) -> None:
        self.begin_s, self.end_s = int(times_s[0]), int(times_s[-1]) + _STEP_S
        first = datetime.fromtimestamp(self.begin_s, zone).date()
        last = datetime.fromtimestamp(self.end_s - 1, zone).date()
        self.dates = [first + timedelta(days=i) for i in range((last - first).days + 1)]
        bounds = [
            int(datetime(d.year, d.month, d.day, tzinfo=zone).timestamp())
            for d in [*self.dates, last + timedelta(days=1)]
        ]
        self.starts_s: Ints = np.array(bounds[:-1], dtype=np.int64)
        self.ends_s: Ints = np.array(bounds[1:], dtype=np.int64)

    def complete_days(self) -> Ints:
        """Return the indices of the days with 96 steps that the series covers in full."""
        covered = (self.starts_s >= self.begin_s) & (self.ends_s <= self.end_s)
        return np.flatnonzero(covered & (self.ends_s - self.starts_s == T * _STEP_S))


# --- sessions ------------------------------------------------------------------------------------


def _read_sessions(
    table: _Table,
    sockets: tuple[SocketType, ...],
    clock: _Clock,
    calendar: _Calendar,
    kept: Ints,
    notes: list[str],
) -> tuple[Sessions, Ints]:
    """Read and check the sessions, cut them at midnight and admit them to sockets.

    Returns:
        The admitted sessions, and the number of vehicles turned away on each kept day.
    """
    kind = _check_ids_and_types(table, sockets)
    arrives, departs = table.times("arrival", clock), table.times("departure", clock)
    stay_s = departs - arrives
    table.check(stay_s <= 0, "departure", "is not after the arrival; the vehicle must stay")
    table.check(
        stay_s > _MAX_STAY_DAYS * 86_400,
        "departure",
        f"is more than {_MAX_STAY_DAYS} days after the arrival; one row is one stay",
    )
    energy_kwh, own_kw = table.numbers("energy_kwh"), table.numbers("max_kw")
    table.check(energy_kwh <= 0, "energy_kwh", "is not above 0 kWh; leave out who needs nothing")
    max_kw = np.minimum(own_kw, np.array([s.max_kw for s in sockets])[kind])
    stay_steps = -(-departs // _STEP_S) - arrives // _STEP_S
    stay_kwh = max_kw * STEP_H * np.maximum(stay_steps, _MIN_WINDOW_STEPS)
    table.check(
        (energy_kwh > _IMPLAUSIBLE_SHARE * stay_kwh) & (stay_s > 0) & (max_kw > 0) & (kind >= 0),
        "energy_kwh",
        lambda i: (
            f"cannot be charged in this stay, which allows {stay_kwh[i]:.1f} kWh at "
            f"{max_kw[i]:g} kW; energy is in kWh, not Wh"
        ),
    )
    table.check(own_kw <= 0, "max_kw", "is not above 0 kW")
    table.check(own_kw > 1000, "max_kw", "is more than 1000 kW; charging power is in kW, not W")
    table.finish()
    arrival_s, departure_s = arrives.astype(np.int64), departs.astype(np.int64)

    # Cut at midnight: one piece for each calendar day that a stay touches, energy split by time.
    bounds = np.append(calendar.starts_s, calendar.ends_s[-1])
    first = np.searchsorted(bounds, arrival_s, "right") - 1
    last = np.searchsorted(bounds, departure_s, "left") - 1
    pieces = last - first + 1
    row = np.repeat(np.arange(table.n_rows), pieces)
    day = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    position = np.full(len(calendar.dates) + 2, -1)  # -1: before or after the series, or left out
    position[kept] = np.arange(len(kept))
    inside = position[day] >= 0
    _note_cuts(table, pieces, row, inside, notes)
    row, day = row[inside], day[inside]
    start_s, end_s = calendar.starts_s[day], calendar.ends_s[day]
    piece_from_s = np.maximum(arrival_s[row], start_s)
    piece_to_s = np.minimum(departure_s[row], end_s)
    piece_kwh = energy_kwh[row] * (piece_to_s - piece_from_s) / (departure_s - arrival_s)[row]
    arrival_step = (piece_from_s - start_s) // _STEP_S
    departure_step = -(-(piece_to_s - start_s) // _STEP_S)
    departure_step = np.minimum(np.maximum(departure_step, arrival_step + _MIN_WINDOW_STEPS), T)
    most_kwh = _WINDOW_SHARE * max_kw[row] * STEP_H * (departure_step - arrival_step)
    clipped = piece_kwh > most_kwh
    if clipped.any():
        notes.append(
            f"{table.name}: {len(np.unique(row[clipped]))} of {table.n_rows} sessions ask for more "
            f"than 98 % of what their stay allows and were clipped to that (the first: row "
            f"{int(row[clipped].min()) + 2})"
        )

    order = np.lexsort((row, piece_from_s, position[day]))
    row, day = row[order], position[day][order]
    arrival_step, departure_step = arrival_step[order], departure_step[order]
    socket = _admit(day, kind[row], arrival_step, departure_step, sockets)
    admitted = socket >= 0
    if not admitted.all():
        turned = np.unique(row[~admitted])
        notes.append(
            f"{table.name}: {len(turned)} of {table.n_rows} sessions found no free socket of their "
            f"type and were turned away (the first: row {turned[0] + 2})"
        )
    sessions = Sessions(
        day=day[admitted],
        socket=socket[admitted],
        arrival_step=arrival_step[admitted],
        departure_step=departure_step[admitted],
        energy_kwh=np.minimum(piece_kwh, most_kwh)[order][admitted],
        max_kw=max_kw[row][admitted],
    )
    return sessions, np.bincount(day[~admitted], minlength=len(kept))


def _check_ids_and_types(table: _Table, sockets: tuple[SocketType, ...]) -> Ints:
    """Check session ids and return the socket type index of each row, -1 if there is no such."""
    ids, types = table.columns["session_id"], table.columns["socket_type"]
    empty = [not session_id.strip() for session_id in ids]
    table.check(empty, "session_id", "is empty; every session has its own id")
    first: dict[str, int] = {}
    again = [first.setdefault(session_id, i) != i for i, session_id in enumerate(ids)]
    table.check(
        np.array(again) & ~np.array(empty),
        "session_id",
        lambda i: f"is already in row {first[ids[i]] + 2}; ids differ",
    )
    known = {s.name: k for k, s in enumerate(sockets)}
    kind = np.array([known.get(name, -1) for name in types], dtype=np.int64)
    right = show(", ".join(known))
    table.check(
        kind < 0, "socket_type", f"is not a socket type of site.yaml; right is one of {right}"
    )
    return kind


def _note_cuts(
    table: _Table, pieces: Ints, row: Ints, inside: NDArray[np.bool_], notes: list[str]
) -> None:
    """Note sessions that cross midnight, and those partly or wholly outside the days in use."""
    if (crossing := int((pieces > 1).sum())) > 0:
        notes.append(
            f"{table.name}: {crossing} of {table.n_rows} sessions cross midnight and were cut "
            "there, their energy split by time"
        )
    used = np.zeros(table.n_rows, dtype=np.bool_)
    used[row[inside]] = True
    if not used.any():
        raise UserError(
            f"{table.name}: none of the {table.n_rows} sessions lies on a complete day of the "
            f"series; row 2 arrives {show(table.columns['arrival'][0])}"
        )
    outside = np.zeros(table.n_rows, dtype=np.bool_)
    outside[row[~inside]] = True
    if outside.any():
        notes.append(
            f"{table.name}: {int(outside.sum())} of {table.n_rows} sessions lie wholly or partly "
            "outside the series or on a day left out; that part was dropped (the first: row "
            f"{int(np.argmax(outside)) + 2})"
        )


def _admit(
    day: Ints,
    kind: Ints,
    arrival_step: Ints,
    departure_step: Ints,
    sockets: tuple[SocketType, ...],
) -> Ints:
    """Give each vehicle, in order, the lowest free socket of its type on its day, or -1."""
    offsets = np.cumsum([0] + [s.count for s in sockets]).tolist()
    given = np.full(len(day), -1, dtype=np.int64)
    today = -1
    free: list[list[int]] = []  # per type: returned sockets, a heap
    busy: list[list[tuple[int, int]]] = []  # per type: (departure step, socket), a heap
    fresh: list[int] = []  # per type: the lowest socket not used today
    columns = zip(
        day.tolist(), kind.tolist(), arrival_step.tolist(), departure_step.tolist(), strict=True
    )
    for i, (d, k, arrival, departure) in enumerate(columns):
        if d != today:
            today = d
            free, busy, fresh = [[] for _ in sockets], [[] for _ in sockets], offsets[:-1]
        while busy[k] and busy[k][0][0] <= arrival:
            heapq.heappush(free[k], heapq.heappop(busy[k])[1])
        if free[k]:
            socket = heapq.heappop(free[k])
        elif fresh[k] < offsets[k + 1]:
            socket, fresh[k] = fresh[k], fresh[k] + 1
        else:
            continue
        given[i] = socket
        heapq.heappush(busy[k], (departure, socket))
    return given
