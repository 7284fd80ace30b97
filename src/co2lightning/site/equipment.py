"""Read `site.yaml`: place, battery, sockets, and which days are kept for testing."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from co2lightning.errors import UserError, show
from co2lightning.site.model import Battery, SocketType
from co2lightning.site.plain_yaml import parse_yaml


class HeldOut(NamedTuple):
    """Which days are kept for testing: every so many stretches of so many days, or these dates."""

    days: int
    every: int = 0
    first: int = 0
    dates: tuple[str, ...] = ()


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


def _boolean(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _config_error(key, value, "true or false")
    return value


def _name(key: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w .-]{0,63}", value):
        right = "text of at most 64 letters, digits, spaces, . _ - (quote it if need be)"
        raise _config_error(key, value, right)
    return value


def _currency(key: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[^\W\d_]{1,12}|[^\w\s]", value):
        raise _config_error(key, value, "three letters such as EUR, or a name of at most 12")
    return value


def _known_ahead(key: str, value: object) -> dict[str, str]:
    known = _mapping(key, value, dict.fromkeys(_KNOWABLE, _since), dict.fromkeys(_KNOWABLE))
    return {column: since for column, since in known.items() if since is not None}


def _since(key: str, value: object) -> str:
    if value == "always" or re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", str(value)):
        return str(value)
    right = 'a local time in quotes such as "13:00", or always'  # 13:00 is 780 to YAML
    raise _config_error(key, value, right)


def _zone(key: str, value: object) -> str:
    try:
        if re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", str(value)):
            return ZoneInfo(str(value)).key
    except (KeyError, ValueError, OSError):
        pass
    raise _config_error(key, value, "a time zone name such as America/Lima")


def _config_error(key: str, value: object, right: str) -> UserError:
    return UserError(f"site.yaml: {key}: {_shown(value)} not {right}")


def _shown(value: object) -> str:
    """Return what stands in the file, before "not": nothing at all is None to YAML."""
    if value is None:
        return "is empty,"
    return f"{value if isinstance(value, date) else show(value)} is"


_KNOWABLE = "carbon_kg_per_kwh", "pv_kw", "load_kw", "price_per_kwh", "export_price_per_kwh"

_EFFICIENCY = _number(0.5, 1, hint=" (a share, not per cent)")
_SHARE = _number(0, 1, hint=" (a share, not per cent)")
_POWER_KW = _number(0, 1e6, above=True, hint=" kW")
_BATTERY = {
    "capacity_kwh": _number(0, 1e6, above=True, hint=" kWh"),
    "power_kw": _POWER_KW,
    **dict.fromkeys(("charge_efficiency", "discharge_efficiency"), _EFFICIENCY),
    **dict.fromkeys(("soc_min", "soc_max", "start_soc_min", "start_soc_max"), _SHARE),
    "may_charge_from_grid": _boolean,
    "reserve_soc": _SHARE,
}
_BATTERY_OPTIONAL = {"may_charge_from_grid": True, "reserve_soc": None}
_SOCKET = {
    "name": _name,
    "count": _integer(1, 100_000),
    "max_kw": _number(0, 1000, above=True, hint=" kW"),
    "min_kw": _number(0, 1000, hint=" kW"),
}
_SOCKET_OPTIONAL = {"min_kw": 0.0}
_RULES = {
    unit: {unit: _integer(2, 10_000), "first": _integer(1, 10_000)}
    for unit in ("every_weeks", "every")
}


def _battery(key: str, value: object) -> Battery:
    battery = Battery(**_mapping(key, value, _BATTERY, _BATTERY_OPTIONAL))
    if battery.reserve_soc is None:
        battery = replace(battery, reserve_soc=battery.soc_min)
    for low, high in (
        ("soc_min", "soc_max"),
        ("soc_min", "start_soc_min"),
        ("start_soc_min", "start_soc_max"),
        ("start_soc_max", "soc_max"),
        ("soc_min", "reserve_soc"),
        ("reserve_soc", "soc_max"),
    ):
        a, b = getattr(battery, low), getattr(battery, high)
        if a > b or ((low, high) == ("soc_min", "soc_max") and a == b):
            raise UserError(
                f"site.yaml: {key}.{high}: {b:g} is below {key}.{low} {a:g}; right is soc_min < "
                "soc_max and between them start_soc_min <= start_soc_max, and reserve_soc"
            )
    return battery


def _sockets(key: str, value: object) -> tuple[SocketType, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 1000:
        raise _config_error(key, value, "a list such as [{name: moto, count: 112, max_kw: 2.0}]")
    sockets = tuple(
        SocketType(**_mapping(f"{key}[{i}]", item, _SOCKET, _SOCKET_OPTIONAL))
        for i, item in enumerate(value)
    )
    for i, socket in enumerate(sockets):
        if socket.min_kw > socket.max_kw:
            raise UserError(
                f"site.yaml: {key}[{i}].min_kw: {socket.min_kw:g} is above max_kw "
                f"{socket.max_kw:g}; it is the least power at which a vehicle charges"
            )
        if socket.name in [s.name for s in sockets[:i]]:
            raise UserError(
                f"site.yaml: {key}[{i}].name: {socket.name} is there twice; names differ"
            )
    if (total := sum(s.count for s in sockets)) > 100_000:
        raise UserError(f"site.yaml: {key}: {total} sockets in all; at most 100000 are read")
    return sockets


def _held_out(key: str, value: object) -> HeldOut:
    """Check the rule; `calendar.stretches` looks the days up."""
    if isinstance(value, dict):
        unit = "every" if "every" in value else "every_weeks"
        rule = _mapping(key, value, _RULES[unit])
        return HeldOut(7 if unit == "every_weeks" else 1, rule[unit], rule["first"])
    if not isinstance(value, list) or not value:
        raise _config_error(
            key,
            value,
            "{every_weeks: 6, first: 6}, {every: 6, first: 6} or a list of dates such as "
            "[2025-01-06]",
        )
    return HeldOut(1, dates=tuple(_date(f"{key}[{i}]", item) for i, item in enumerate(value)))


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
    "held_out": _held_out,
    "day_start": _integer(0, 23),
    "currency": _currency,
    "known_ahead": _known_ahead,
}
_SITE_OPTIONAL: dict[str, Any] = {
    "pv_kwp": 0.0,
    "charger_efficiency": None,
    "battery": None,
    "sockets": (),
    "held_out": None,
    "day_start": None,
    "currency": "",
    "known_ahead": {},
}
_WHAT_IF = {
    "battery.capacity_kwh": _BATTERY["capacity_kwh"],
    "battery.power_kw": _BATTERY["power_kw"],
    "pv_kwp": _SITE["pv_kwp"],
    "grid_kw": _SITE["grid_kw"],
}


def _mapping(
    path: str,
    value: object,
    checks: Mapping[str, Callable[[str, object], Any]],
    optional: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check a mapping key by key.

    Args:
        path: Where it stands; "" for the whole file.
        value: What stands there.
        checks: By key; each returns the value.
        optional: What counts for keys that may be missing.
    """
    where = f"{path}: " if path else ""
    keys = f"the keys are {', '.join(checks)}"
    if not isinstance(value, dict):
        raise UserError(f"site.yaml: {where}{_shown(value)} not a mapping; {keys}")
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in checks:
            raise UserError(f"site.yaml: {prefix}{show(key)} is unknown; {keys}")
    found = dict(optional or {})
    for key in checks:
        if key not in value and key not in found:
            raise UserError(f"site.yaml: {prefix}{key} is missing; {keys}")
    for key, check in checks.items():
        if key in value:
            found[key] = check(prefix + key, value[key])
    return found


def read_equipment(data: bytes) -> dict[str, Any]:
    """Return what the file holds, checked, by the names of its keys.

    `battery`, `held_out` and `day_start` are None where the file has none.
    """
    config = parse_yaml(data, "site.yaml", "docs/site-format.md")
    return _mapping("", config, _SITE, _SITE_OPTIONAL)


def what_if(
    equipment: Mapping[str, Any], changes: Mapping[str, float]
) -> tuple[dict[str, Any], list[str]]:
    """Return equipment in which some figures are others, and a remark on each.

    A battery that a site has not needs both its figures; it then gets a usual efficiency and all
    of its capacity.

    Args:
        equipment: What `read_equipment` returned.
        changes: Any of battery.capacity_kwh, battery.power_kw, pv_kwp and grid_kw.

    Raises:
        UserError: A figure is out of range, or of a part that the site has not.
    """
    changed, remarks = dict(equipment), []
    battery, new = equipment["battery"], {}
    for key, value in changes.items():
        if key not in _WHAT_IF:
            raise UserError(f"--{key}: is not a figure to change; {', '.join(_WHAT_IF)} are")
        try:
            number = _WHAT_IF[key](key, value)
        except UserError as error:
            raise UserError(str(error).replace("site.yaml: ", "--", 1)) from None
        part, _, name = key.rpartition(".")
        before = getattr(battery, name, None) if part else equipment[key]
        if key == "pv_kwp" and not before:
            raise UserError(
                "--pv_kwp: the site has no PV whose power could be scaled; give site.yaml pv_kwp "
                "and the series pv_kw"
            )
        (new if part else changed)[name] = number
        remarks.append(
            f"as if {key} were {number:g}{'' if before is None else f', not {before:g}'}"
        )
    if new and battery is None:
        if missing := [name for name in ("capacity_kwh", "power_kw") if name not in new]:
            raise UserError(
                f"--battery.{next(iter(new))}: the site has no battery; give "
                f"--battery.{missing[0]} as well"
            )
        battery = Battery(new["capacity_kwh"], new["power_kw"], 0.95, 0.95, 0.0, 1.0, 0.0, 1.0)
    elif new:
        battery = replace(battery, **new)
    return changed | {"battery": battery}, remarks
