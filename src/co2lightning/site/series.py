"""Read the series: power, load and carbon intensity every 15 min, as complete local days.

Shapes: D days, T = 96 steps of 15 min a day. Steps and days are local; a time in a file is the
beginning of its step. Inside, times are whole seconds since 1970 UTC.
"""

import functools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from co2lightning.errors import UserError
from co2lightning.site.model import STEP_H, Floats, Ints, T
from co2lightning.site.table import Table

STEP_S = round(STEP_H * 3600)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS = ("time", "pv_kw", "load_kw", "carbon_kg_per_kwh")

Clock = Callable[[str], float | str]
"""Returns the instant of a local time with UTC offset, or what is wrong with the text."""


def local_clock(zone: ZoneInfo) -> Clock:
    """Make a zone's clock; it reads each text once, since most recur from column to column."""

    @functools.cache
    def read(text: str) -> float | str:
        if not text.strip():
            return "is empty; write 2025-01-31T06:15-05:00"
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            return "is not a time; write 2025-01-31T06:15-05:00"
        if not 1990 <= when.year <= 2100:
            return "is not between the years 1990 and 2100"
        if when.tzinfo is None:
            right = when.replace(tzinfo=zone).isoformat(timespec="minutes")
            return f"has no UTC offset; write {right}"
        local = when.astimezone(zone)
        if when.utcoffset() != local.utcoffset():
            return (
                f"is not local time of {zone.key} (timezone in site.yaml); the same instant "
                f"there is {local.isoformat(timespec='minutes')}"
            )
        return (when - _EPOCH) // timedelta(seconds=1)

    return read


class Calendar:
    """The local days that the series touches.

    Attributes:
        dates: Of these days.
        midnights_s: When they begin, and when the last one ends.
        complete: Indices of the days in use, those with 96 steps, all in the series, [D].
    """

    def __init__(self, times_s: Ints, zone: ZoneInfo) -> None:
        begin_s, end_s = int(times_s[0]), int(times_s[-1]) + STEP_S
        first = datetime.fromtimestamp(begin_s, zone).date()
        last = datetime.fromtimestamp(end_s - 1, zone).date()
        dates = [first + timedelta(days=i) for i in range((last - first).days + 2)]
        bounds = [int(datetime(d.year, d.month, d.day, tzinfo=zone).timestamp()) for d in dates]
        self.dates = dates[:-1]
        self.midnights_s: Ints = np.array(bounds, dtype=np.int64)
        covered = (self.midnights_s[:-1] >= begin_s) & (self.midnights_s[1:] <= end_s)
        self.complete: Ints = np.flatnonzero(covered & (np.diff(self.midnights_s) == T * STEP_S))


def read_series(
    name: str, data: bytes, equipment: dict[str, Any], clock: Clock, notes: list[str]
) -> tuple[Calendar, dict[str, Floats]]:
    """Read and check the series; returns its days and each column [D, T]."""
    table = Table(name, data, _COLUMNS)
    times_s, values = _read_columns(table, equipment, clock)
    calendar = Calendar(times_s, ZoneInfo(equipment["timezone"]))
    dates, complete = calendar.dates, calendar.complete
    if not len(complete):
        raise UserError(
            f"{name}: holds no complete day; at least one day from 00:00 to 24:00 in "
            f"{equipment['timezone']} is needed, 96 rows of 15 min"
        )
    if left_out := sorted({*range(len(dates))} - {*complete.tolist()}):
        notes.append(
            f"{name}: {len(left_out)} of {len(dates)} days left out because they do not have 96 "
            f"steps (the first: {dates[left_out[0]]})"
        )
    first_rows = (calendar.midnights_s[complete] - times_s[0]) // STEP_S
    rows = first_rows[:, None] + np.arange(T)
    return calendar, {column: numbers[rows] for column, numbers in values.items()}


def _read_columns(
    table: Table, equipment: dict[str, Any], clock: Clock
) -> tuple[Ints, dict[str, Floats]]:
    """Return times [rows] in seconds and every other column [rows]."""
    times_s = table.read("time", clock)
    if not np.isnan(times_s).any():
        _check_steps(table, times_s)
    values = {column: table.read(column) for column in _COLUMNS[1:]}
    pv, load, carbon = values.values()
    table.check(pv < 0, "pv_kw", "is negative; PV power is 0 kW or more")
    most_pv = 1.5 * equipment["pv_kwp"]
    table.check(
        pv > most_pv,
        "pv_kw",
        f"is more than 1.5 x pv_kwp = {most_pv:g} kW; PV power is in kW, not W",
    )
    table.check(load < 0, "load_kw", "is negative; the building load is 0 kW or more")
    supply = equipment["grid_kw"] + equipment["pv_kwp"] + equipment["battery"].power_kw
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


def _check_steps(table: Table, times_s: Floats) -> None:
    """Note rows that do not come every 15 min; one that is out of order is enough to know."""
    steps = np.diff(times_s, prepend=times_s[0] - STEP_S)
    usual_s = float(np.median(steps[1:])) if len(steps) > 1 else STEP_S
    grid = "hourly" if usual_s == 3600 else f"every {usual_s / 60:g} min"
    off = times_s % STEP_S != 0
    if off.any():
        finer = f"; the data are {grid}: average them over 15 min" if 0 < usual_s < STEP_S else ""
        table.check(off, "time", f"is not on the 15-min grid (:00, :15, :30, :45){finer}")
    elif (steps != STEP_S).any():
        first = int(np.argmax(steps != STEP_S))
        before = table.columns["time"][first - 1]
        if (step := steps[first]) > 0:
            bad, missing = steps > STEP_S, step / STEP_S - 1
            problem = f"comes after a gap: {missing:.0f} rows are missing after {before}"
            if usual_s > STEP_S:
                problem += f"; the data are {grid}: repeat each row until there is one every 15 min"
        elif step == 0:
            bad, problem = steps == 0, "is there twice; keep one row for each 15 min"
        else:
            bad = steps < 0
            problem = f"is earlier than the row before ({before}); sort the rows by time"
        table.check(bad, "time", problem)
