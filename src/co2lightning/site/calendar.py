"""Divide the line of steps into days, weeks and held-out stretches.

A day begins at the hour that the least charging goes on across, so that days cut as little of it
as they can. Shapes: P steps, N rows of sessions, D days, W stretches.
"""

from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from co2lightning.errors import UserError
from co2lightning.site.equipment import HeldOut
from co2lightning.site.model import TAIL_H, Floats, Ints
from co2lightning.site.series import Line, wall_clock

_HOUR_S = 3600
_WEEK = 7  # days
_WEEKS_FOR_EVERY_SIXTH = 36  # fewer leave too few to test on
_SHARE_DIGITS = 6  # shares that differ by less are equal, whatever the order of adding up


def span_share(arrival_s: Ints, departure_s: Ints, energy_kwh: Floats, zone: ZoneInfo) -> Floats:
    """Return the share of the energy whose stay spans each full hour of the day, [24].

    A stay that begins or ends at an hour does not span it.

    Args:
        arrival_s: Seconds since 1970 UTC, [N].
        departure_s: Likewise, [N].
        energy_kwh: What each asks for, [N].
        zone: Whose clocks tell the hour.
    """
    first = wall_clock(arrival_s, zone) // _HOUR_S + 1
    last = -(-wall_clock(departure_s, zone) // _HOUR_S) - 1
    hours = np.clip(last - first + 1, 0, 24)
    # What begins to be spanned at an hour and ceases to be at another, on a dial of two rounds.
    change_kwh = np.zeros(49)
    np.add.at(change_kwh, first % 24, energy_kwh)
    np.add.at(change_kwh, first % 24 + hours, -energy_kwh)
    spanned_kwh = np.cumsum(change_kwh)[:48].reshape(2, 24).sum(0)
    # Adding up and taking away leaves a little less than nothing where nothing is spanned.
    return spanned_kwh.clip(min=0.0) / energy_kwh.sum()


def quietest_hour(share: Floats) -> int:
    """Return the hour that the least energy spans, the lowest among equals."""
    return int(np.round(share, _SHARE_DIGITS).argmin())


def days(
    name: str, line: Line, zone: ZoneInfo, day_start_h: int, notes: list[str]
) -> tuple[NDArray[np.datetime64], Ints, tuple[str, ...]]:
    """Return the wall clock at each step [P], where days begin and end [D + 1], and their dates.

    Raises:
        UserError: The series holds no complete day.
    """
    # With the step before the first and the one after the last: a day is cut where its beginning
    # lies beyond them.
    shown = wall_clock(line.begin_s + line.step_s * np.arange(-1, line.n_steps + 1), zone)
    local = shown.astype("datetime64[s]")
    dates = np.arange(local[0].astype("datetime64[D]") - 1, local[-1].astype("datetime64[D]") + 2)
    begins = dates.astype("datetime64[s]") + np.timedelta64(day_start_h, "h")
    # Put back, clocks show an hour twice: the first time counts. Put forward, they skip one: the
    # first step after it is found.
    place = np.searchsorted(np.maximum.accumulate(local), begins, "left") - 1
    within = (place >= 0) & (place <= line.n_steps)
    place, dates = place[within], dates[within]
    real = np.diff(place, append=-1) != 0  # a zone that crosses the date line skips a date
    place, dates = place[real], dates[real]
    clock = f"{day_start_h:02d}:00"
    if len(place) < 2:
        raise UserError(
            f"{name}: holds no complete day; at least one day from {clock} to {clock} in "
            f"{zone.key} is needed, 24 hours"
        )
    cut = [
        f"{steps * line.step_s / _HOUR_S:g} h {where}"
        for steps, where in (
            (int(place[0]), f"before {dates[0]} {clock}"),
            (line.n_steps - int(place[-1]), f"after {dates[-1]} {clock}"),
        )
        if steps
    ]
    if cut:
        notes.append(f"{name}: {' and '.join(cut)} are no whole day and belong to none")
    return local[1:-1], place, tuple(dates[:-1].astype(str).tolist())


def stretches(
    rule: HeldOut | None, dates: tuple[str, ...], series: str
) -> tuple[NDArray[np.bool_], Ints]:
    """Return which days are held out [D], and the stretches that they make [W, 2].

    Days and weeks are counted from 1, weeks from the first complete day; days after the last
    whole week are none.

    Args:
        rule: What site.yaml says; None where it says nothing.
        dates: Of the days, [D].
        series: The name of the file they are from.

    Raises:
        UserError: A date is no complete day, or nothing is left to test or to train on.
    """
    days, weeks = len(dates), len(dates) // _WEEK
    usual = ""
    if rule is None:
        every = 6 if weeks >= _WEEKS_FOR_EVERY_SIXTH else 3
        rule = HeldOut(_WEEK, every, every)
        usual = f"is not there, and every {'sixth' if every == 6 else 'third'} week "
    if rule.dates:
        known = {date: day for day, date in enumerate(dates)}
        for i, date in enumerate(rule.dates):
            if date not in known:
                raise UserError(
                    f"site.yaml: held_out[{i}]: {date} is not a complete day of {series}, which "
                    f"has {dates[0]} to {dates[-1]}"
                )
        first = np.array(sorted({known[date] for date in rule.dates}), dtype=np.int64)
    else:
        first = np.arange(rule.first - 1, days // rule.days, rule.every) * rule.days
    found = np.stack([first, first + rule.days], axis=1)
    held_out = np.zeros(days, dtype=np.bool_)
    for begin, end in found:
        held_out[begin:end] = True
    if not held_out.any() or held_out.all():
        what = f"{days} day{'s' * (days != 1)} in {weeks} whole week{'s' * (weeks != 1)}"
        right = f"name days, such as held_out: [{dates[-1]}] or {{every: 3, first: 3}}"
        right = right if days > 1 else "give a longer one"
        raise UserError(
            f"site.yaml: held_out: {usual}selects {held_out.sum()} of the {days} days; at least "
            f"one day to test on and one to train on are needed. The series has {what}; {right}"
        )
    return held_out, found


def remark_on_tails(
    name: str, found: Ints, bounds: Ints, dates: tuple[str, ...], line: Line
) -> list[str]:
    """Return remarks on stretches without the two days after them that settle their end."""
    left_h = (line.n_steps - bounds[found[:, 1]]) * line.step_s / _HOUR_S
    remarks = []
    for few, words in (
        (left_h == 0, "with the series: what its end state is worth is not counted"),
        (
            (left_h > 0) & (left_h < TAIL_H),
            "less than two days before the series: its end state is settled over what is left",
        ),
    ):
        if count := int(few.sum()):
            begin = dates[found[np.argmax(few), 0]]
            which = f"the held-out stretch from {begin}"
            if count > 1:
                which = f"each of {count} held-out stretches (the first from {begin})"
            remarks.append(f"{name}: {which} ends {words}")
    return remarks
