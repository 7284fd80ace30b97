"""Read what a provider forecast: rows of when it was said, of which step, and what was expected.

A year of steps with a forecast of two days each hour has millions of rows: they are read piece by
piece and kept as a few bytes each. Shapes: R rows of the file.
"""

from collections.abc import Collection

import numpy as np

from co2lightning.errors import UserError
from co2lightning.site.model import REACH_H, Ints, Provided
from co2lightning.site.series import Clock, Line
from co2lightning.site.table import number_or_nothing, tables

_NEEDED = ("issued", "time")
_SIGNALS = ("carbon_kg_per_kwh", "pv_kw", "load_kw", "price_per_kwh")
_HIGHEST = 1e9


def read_forecasts(
    name: str,
    data: bytes,
    there: Collection[str],
    clock: Clock,
    line: Line,
    notes: list[str],
) -> dict[str, Provided]:
    """Read and check the forecasts.

    Args:
        name: Of the file.
        data: Its content.
        there: Which series the site has; forecasts of others are left out with a remark.
        clock: Reads a time.
        line: The line of steps.
        notes: Remarks are added here.

    Returns:
        What was forecast of each series of which the file says something.

    Raises:
        UserError: Something in it is wrong.
    """
    keys: list[Ints] = []
    values = {signal: list[np.ndarray]() for signal in _SIGNALS}
    remarks: list[str] = []
    found: list[str] = []
    step_min = line.step_s // 60
    for table in tables(name, data, _NEEDED, _SIGNALS):
        remarks, found = table.remarks, [s for s in _SIGNALS if s in table.columns]
        if not found:
            raise UserError(
                f"{name}: has none of the columns {', '.join(_SIGNALS)}; add what was forecast"
            )
        issued_s, time_s = table.read("issued", clock), table.read("time", clock)
        table.check(
            issued_s > time_s, "issued", "is after the time it is about; a forecast comes before"
        )
        off_s = (time_s - line.begin_s) % line.step_s
        begin = np.datetime64(line.begin_s, "s").astype("datetime64[m]")
        table.check(
            off_s > 0,
            "time",
            f"is no step of the series, which begin every {step_min} min from {begin}Z on",
        )
        said = {signal: table.read(signal, number_or_nothing) for signal in found}
        for signal, value in said.items():
            table.check(np.abs(value) > _HIGHEST, signal, "is beyond all reason")
        table.finish()
        for signal, value in said.items():
            values[signal].append(value.astype(np.float32))
        place = (time_s.astype(np.int64) - line.begin_s) // line.step_s
        keys.append(place << 32 | issued_s.astype(np.int64))
    notes += remarks
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    key = key[order]
    _refuse_twice(name, key, order)
    place = key >> 32
    last = line.n_steps + round(REACH_H * 3600 / line.step_s)
    outside = (place < 0) | (place >= line.n_steps)
    if outside.any():
        notes.append(
            f"{name}: {outside.sum()} of {len(key)} rows are about times before the series begins "
            f"or after it ends (the first: row {order[outside].min() + 2}); those up to "
            f"{REACH_H:g} h after its end are read"
        )
    inside = (place >= 0) & (place < last)
    provided: dict[str, Provided] = {}
    for signal in found:
        value = np.concatenate(values.pop(signal))[order]
        known = inside & ~np.isnan(value)
        if signal not in there:
            notes.append(f"{name}: column {signal} is not read: the site has none")
        elif known.any():
            provided[signal] = Provided(key[known], value[known])
    return provided


def _refuse_twice(name: str, key: Ints, row: Ints) -> None:
    """Raise for rows of one issue and time, given in order of both."""
    twice = np.flatnonzero(key[1:] == key[:-1])
    if len(twice):
        second = row[twice + 1]
        at = int(second.argmin())
        raise UserError(
            f"{name}: row {second[at] + 2}, column time: is there twice from one issue, first in "
            f"row {row[twice[at]] + 2} ({len(twice)} such rows); keep one row of each issued and "
            "time"
        )
