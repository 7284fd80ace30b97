"""Read `site.yaml`: place, battery, sockets, and which days are kept for testing."""

import math
import re
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from co2lightning.errors import UserError, show
from co2lightning.site.model import Battery, SocketType
from co2lightning.site.plain_yaml import parse_yaml


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
        right = "text of at most 64 letters, digits, spaces, . _ - (quote it if need be)"
        raise _config_error(key, value, right)
    return value


def _zone(key: str, value: object) -> str:
    try:
        if re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", str(value)):
            return ZoneInfo(str(value)).key
    except (KeyError, ValueError, OSError):
        pass
    raise _config_error(key, value, "a time zone name such as America/Lima")


def _config_error(key: str, value: object, right: str) -> UserError:
    return UserError(f"site.yaml: {key}: {show(value)} is not {right}")


_EFFICIENCY = _number(0.5, 1, hint=" (a share, not per cent)")
_POWER_KW = _number(0, 1e6, above=True, hint=" kW")
_BATTERY = {
    "capacity_kwh": _number(0, 1e6, above=True, hint=" kWh"),
    "power_kw": _POWER_KW,
    **dict.fromkeys(("charge_efficiency", "discharge_efficiency"), _EFFICIENCY),
    **dict.fromkeys(
        ("soc_min", "soc_max", "start_soc_min", "start_soc_max"),
        _number(0, 1, hint=" (a share, not per cent)"),
    ),
}
_SOCKET = {
    "name": _name,
    "count": _integer(1, 100_000),
    "max_kw": _number(0, 1000, above=True, hint=" kW"),
}
_EVERY = {"every": _integer(2, 10_000), "first": _integer(1, 10_000)}


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
    """Check the rule; a pair (every, first) or dates. Days are looked up by `held_out_days`."""
    if isinstance(value, dict):
        rule = _mapping(key, value, _EVERY)
        return rule["every"], rule["first"]
    if not isinstance(value, list) or not value:
        raise _config_error(
            key, value, "{every: 6, first: 6} or a list of dates such as [2025-01-06]"
        )
    return tuple(_date(f"{key}[{i}]", item) for i, item in enumerate(value))


def _date(key: str, value: object) -> str:
    try:
        if isinstance(value, date | str):
            return date.fromisoformat(str(value)).isoformat()
    except ValueError:  # also for a date with a time of day
        pass
    raise _config_error(key, value, "a date such as 2025-01-06")


_SITE = {
    "name": _name,
    "latitude": _number(-90, 90, hint=" degrees"),
    "longitude": _number(-180, 180, hint=" degrees"),
    "altitude_m": _number(-500, 9000, hint=" m"),
    "timezone": _zone,
    "pv_kwp": _number(0, 1e6, hint=" kWp"),
    "grid_kw": _POWER_KW,
    "charger_efficiency": _EFFICIENCY,
    "seed": _integer(0, 2**32 - 1),
    "battery": _battery,
    "sockets": _sockets,
    "held_out": _held_out_rule,
}


def _mapping(
    path: str, value: object, checks: Mapping[str, Callable[[str, object], Any]]
) -> dict[str, Any]:
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


def read_equipment(data: bytes) -> dict[str, Any]:
    """Return what the file holds, checked, by the names of its keys."""
    return _mapping("", parse_yaml(data, "site.yaml", "docs/site-format.md"), _SITE)


def held_out_days(
    rule: tuple[int, int] | tuple[str, ...], days: tuple[str, ...], series: str
) -> NDArray[np.bool_]:
    """Mark the held-out days; with a rule, days are counted from 1 among those that are used."""
    chosen, known = np.zeros(len(days), dtype=np.bool_), set(days)
    if isinstance(rule[0], int):
        every, first = int(rule[0]), int(rule[1])
        chosen[first - 1 :: every] = True
    else:
        chosen = np.isin(days, rule)
        for i, day in enumerate(rule):
            if day not in known:
                raise UserError(
                    f"site.yaml: held_out[{i}]: {day} is not a complete day of {series}, which "
                    f"has {days[0]} to {days[-1]}"
                )
    if not chosen.any() or chosen.all():
        raise UserError(
            f"site.yaml: held_out: selects {chosen.sum()} of the {len(days)} days; at least one "
            "day to test on and one to train on are needed"
        )
    return chosen
