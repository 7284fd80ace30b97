"""Read the series: carbon intensity and, where a site has them, PV, load and import limit.

Shapes: P steps, one line of them from the file's first row to its last. A time in a file is the
beginning of its step. Inside, times are whole seconds since 1970 UTC.
"""

import functools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np

from co2lightning.errors import UserError
from co2lightning.site.model import Floats, Ints
from co2lightning.site.table import Table

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UTC_DAY_S = 86_400
_STEPS_MINUTES = (5, 10, 15, 20, 30, 60)
_NEEDED = ("time", "carbon_kg_per_kwh")
_OPTIONAL = ("pv_kw", "load_kw", "import_limit_kw")
_PRICES = ("price_per_kwh", "export_price_per_kwh")

Clock = Callable[[str], float | str]
"""Returns the instant of a time with UTC offset, or what is wrong with the text."""


class Line(NamedTuple):
    """The line of steps: when it begins, how long a step is, and how many there are."""

    begin_s: int
    step_s: int
    n_steps: int

    @property
    def end_s(self) -> int:
        return self.begin_s + self.n_steps * self.step_s


def clock(zone: ZoneInfo) -> Clock:
    """Make a reader of times; it reads each text once, since most recur from column to column."""

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
        return (when - _EPOCH) // timedelta(seconds=1)

    return read


def wall_clock(times_s: Ints, zone: ZoneInfo) -> Ints:
    """Return what the clocks of a zone show at these instants, in seconds since 1970 as they say.

    Args:
        times_s: Seconds since 1970 UTC, [N].
        zone: The zone.
    """

    def offset_s(second: int) -> int:
        shown = datetime.fromtimestamp(second, zone).utcoffset()
        return round(shown.total_seconds()) if shown else 0

    # Clocks change twice a year: on all other days one look at each end of the day is enough.
    days, which = np.unique(times_s // _UTC_DAY_S, return_inverse=True)
    at_begin = np.array([offset_s(day * _UTC_DAY_S) for day in days.tolist()], dtype=np.int64)
    at_end = np.array([offset_s((day + 1) * _UTC_DAY_S) for day in days.tolist()], dtype=np.int64)
    shift_s = at_begin[which]
    for i in np.flatnonzero((at_begin != at_end)[which]):
        shift_s[i] = offset_s(int(times_s[i]))
    return times_s + shift_s


def read_series(
    name: str, data: bytes, equipment: dict[str, Any], clock: Clock, notes: list[str]
) -> tuple[Line, dict[str, Floats], dict[str, Floats]]:
    """Read and check the series.

    Args:
        name: Of the file.
        data: Its content.
        equipment: What site.yaml says.
        clock: Reads a time.
        notes: Remarks are added here.

    Returns:
        The line of steps, of every column but `time` its values [P]: 0 kW where there is no
        PV or load, infinity where there is no import limit; and of the prices those that are there.

    Raises:
        UserError: The steps are of no length that is read or not all of one length, or something
            else in the file is wrong.
    """
    table = Table(name, data, _NEEDED, (*_OPTIONAL, *_PRICES))
    notes += table.remarks
    for column in equipment["known_ahead"]:
        if column not in table.columns:
            raise UserError(
                f"site.yaml: known_ahead.{column}: {name} has no such column; add it, or remove "
                "the key"
            )
    times_s = table.read("time", clock)
    step_s = 0
    if not np.isnan(times_s).any():
        step_s = _check_steps(table, times_s, ZoneInfo(equipment["timezone"]))
    values = {
        column: table.read(column)
        if column in table.columns
        else np.full(table.n_rows, np.inf if column == "import_limit_kw" else 0.0)
        for column in (*_NEEDED[1:], *_OPTIONAL)
    }
    prices = {column: table.read(column) for column in _PRICES if column in table.columns}
    _check_values(table, values, equipment)
    _check_prices(table, prices)
    table.finish()
    return Line(int(times_s[0]), step_s, table.n_rows), values, prices


def _check_values(table: Table, values: dict[str, Floats], equipment: dict[str, Any]) -> None:
    """Note what cannot be, be it a wrong sign or a wrong unit."""
    grid_kw, pv_kwp, battery = (equipment[key] for key in ("grid_kw", "pv_kwp", "battery"))
    pv_kw, load_kw, carbon = (values[c] for c in ("pv_kw", "load_kw", "carbon_kg_per_kwh"))
    if pv_kwp and "pv_kw" not in table.columns:
        raise UserError(
            f"{table.name}: column pv_kw is missing, and site.yaml has pv_kwp: {pv_kwp:g}; add "
            "the column, or remove pv_kwp from a site without PV"
        )
    table.check(pv_kw < 0, "pv_kw", "is negative; PV power is 0 kW or more")
    most_pv = 1.5 * pv_kwp
    table.check(
        pv_kw > most_pv,
        "pv_kw",
        f"is more than 1.5 x pv_kwp = {most_pv:g} kW; PV power is in kW, not W"
        if pv_kwp
        else "is PV power, and site.yaml has no pv_kwp; write there how much PV there is, in kWp",
    )
    if pv_kwp:
        table.check(
            load_kw < 0,
            "load_kw",
            "is negative; the building load is 0 kW or more (below it only in a site without "
            "pv_kw, whose meter counts both)",
        )
    supply = grid_kw + pv_kwp + (battery.power_kw if battery else 0.0)
    giving = ["grid_kw"] + ["pv_kwp"] * bool(pv_kwp) + ["the battery"] * (battery is not None)
    together = " and ".join(filter(None, (", ".join(giving[:-1]), giving[-1])))
    gives = f"{together} {'give together' if giving[1:] else 'gives'}, {supply:g} kW"
    table.check(load_kw > supply, "load_kw", f"is more than {gives}; the load is in kW, not W")
    if not pv_kwp:
        table.check(
            load_kw < -10 * supply,
            "load_kw",
            f"exports more than ten times what {gives}; the load is in kW, not W",
        )
    table.check(carbon < 0, "carbon_kg_per_kwh", "is negative; carbon intensity is 0 to 2 kg/kWh")
    table.check(
        carbon > 2,
        "carbon_kg_per_kwh",
        "is more than 2 kg/kWh; divide g/kWh or kg/MWh by 1000, multiply lb/MWh by 0.000454",
    )
    table.check(
        values["import_limit_kw"] < 0,
        "import_limit_kw",
        "is negative; what may be imported is 0 kW or more",
    )


def _check_prices(table: Table, prices: dict[str, Floats]) -> None:
    """Note prices that cannot be: with a credit above the price, import and export pay for both."""
    if "export_price_per_kwh" not in prices:
        return
    if "price_per_kwh" not in prices:
        raise UserError(
            f"{table.name}: column price_per_kwh is missing, and there is export_price_per_kwh; "
            "add what import costs, or remove what export earns"
        )
    price, credit = prices["price_per_kwh"], prices["export_price_per_kwh"]
    table.check(
        credit > np.maximum(price, 0.0),
        "export_price_per_kwh",
        lambda i: (
            f"is above price_per_kwh {price[i]:g}; a kWh given earns no more than one taken "
            "costs, and nothing where that is negative"
        ),
    )


def _check_steps(table: Table, times_s: Floats, zone: ZoneInfo) -> int:
    """Return the length of a step in seconds; note rows that do not follow by just that.

    One kind of row that is out of order is enough to know.

    Raises:
        UserError: The rows come at another step than those that are read.
    """
    read = f"{', '.join(map(str, _STEPS_MINUTES[:-1]))} or {_STEPS_MINUTES[-1]} min"
    if len(times_s) < 2:
        raise UserError(f"{table.name}: has one row; the step is the time from row to row, {read}")
    steps = np.diff(times_s)
    # Of the file as a whole, so that a row amiss is told, be it the second one.
    usual_s = float(np.quantile(steps[steps > 0], 0.5, method="lower")) if max(steps) > 0 else 900.0
    step_s = round(usual_s)
    if step_s not in [60 * minutes for minutes in _STEPS_MINUTES]:
        if step_s > 3600:
            right = "repeat each row until there is one for each hour or less"
        elif finer := [m for m in _STEPS_MINUTES if 60 * m > step_s and 60 * m % step_s == 0]:
            right = f"average them over {finer[0]} min"
        else:
            right = "average or repeat them"
        raise UserError(
            f"{table.name}: column time: the rows come every {usual_s / 60:g} min; {read} are "
            f"read: {right}"
        )
    grid = f"{step_s // 60}-min"
    marks = ", ".join(f":{minute:02d}" for minute in range(0, 60, step_s // 60)[:4])
    marks += ", ..." if step_s < 900 else ""
    # A grid of the local clock or, as India's hourly files in UTC have it, of UTC.
    phases, counts = np.unique(times_s % step_s, return_counts=True)
    phase = int(phases[counts.argmax()])
    begin_s = np.array([int(times_s[0])], dtype=np.int64)
    local_shift_s = int((wall_clock(begin_s, zone) - begin_s)[0])
    off = times_s % step_s != (phase if phase in (0, -local_shift_s % step_s) else 0)
    if off.any():
        table.check(off, "time", f"is not on the {grid} grid ({marks}; by local time or UTC)")
    elif (steps != step_s).any():
        steps = np.concatenate([[step_s], steps])
        first = int(np.argmax(steps != step_s))
        before = table.columns["time"][first - 1]
        if (step := steps[first]) > 0:
            bad, missing = steps > step_s, f"{step / step_s - 1:.0f}"
            rows = "row is" if missing == "1" else "rows are"
            problem = f"comes after a gap: {missing} {rows} missing after {before}"
        elif step == 0:
            bad, problem = steps == 0, f"is there twice; keep one row for each {step_s // 60} min"
        else:
            bad = steps < 0
            problem = f"is earlier than the row before ({before}); sort the rows by time"
        table.check(bad, "time", problem)
    return step_s
