"""What a site folder holds: as plain data, as a table.

Shapes: P steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from co2lightning.control.forecast import forecast, provided, steps_per_lead
from co2lightning.metrics import Metric
from co2lightning.report.comparison import count_text
from co2lightning.report.tables import Table
from co2lightning.site.model import DAY_H, Floats, Ints, Site

_MANY = 12  # stretches; more are not named one by one
_LEADS_H = 0.25, 1.0, 6.0, 24.0
_PROVIDER_LEADS_H = 0.25, 1.0, 2.0, 6.0, 24.0
_FORECAST = {
    "carbon_kg_per_kwh": ("carbon", " kg/kWh"),
    "price_per_kwh": ("price", ""),
    "load_kw": ("load", " kW"),
    "pv_kw": ("PV", " kW"),
}


def describe(site: Site) -> dict[str, Any]:
    """Return what a site's folder holds as plain data; a part it has not is None."""
    hours, battery = np.diff(site.day_bounds) * site.step_h, site.battery
    in_days = DAY_H / (site.n_steps * site.step_h)
    load, pv = site.load_kw, site.pv_kw
    return {
        "site": site.name,
        "step_minutes": site.step_minutes,
        "timezone": site.timezone,
        "begin": site.when(0).isoformat(timespec="minutes"),
        "end": site.when(site.n_steps).isoformat(timespec="minutes"),
        "steps": site.n_steps,
        "days": len(site.days),
        "days_by_hours": {
            f"{length:g}": int((hours == length).sum()) for length in np.unique(hours)
        },
        "day_start": site.day_start_h,
        "weeks": len(site.days) // 7,
        "stretches": [
            {"begin": site.days[first], "days": end - first}
            for first, end in site.stretches.tolist()
        ],
        "battery": battery and {**vars(battery), "reserve_soc": battery.least_soc},
        "sockets": [vars(socket) for socket in site.sockets],
        "grid_kw": site.grid_kw,
        "limited_steps": int((site.import_limit_kw < site.grid_kw).sum()),
        "pv": None
        if not site.pv_kwp
        else {
            "kwp": site.pv_kwp,
            "kwh_per_day": _rounded(pv.sum() * site.step_h * in_days),
            "highest_kw": _rounded(pv.max()),
        },
        "load": None
        if not load.any()
        else {
            "kwh_per_day": _rounded(load.sum() * site.step_h * in_days),
            "lowest_kw": _rounded(load.min()),
            "highest_kw": _rounded(load.max()),
        },
        "carbon": _carbon(site),
        "price": _price(site),
        "sessions": _sessions(site, in_days),
        "known_ahead": dict(site.known_ahead),
        "forecasts": _forecasts(site),
        "provider": {signal: _provider(site, signal) for signal in site.provided},
        "remarks": list(site.notes),
    }


def _carbon(site: Site) -> dict[str, Any]:
    carbon = site.carbon_kg_per_kwh
    return {"mean_kg_per_kwh": _rounded(carbon.mean()), **_by_hour(site, carbon, "kg_per_kwh")}


def _price(site: Site) -> dict[str, Any] | None:
    if (price := site.price_per_kwh) is None:
        return None
    return {
        "currency": site.currency,
        "mean_per_kwh": _rounded(price.mean()),
        "lowest_per_kwh": _rounded(price.min()),
        "highest_per_kwh": _rounded(price.max()),
        "mean_export_per_kwh": _rounded(site.money_per_kwh[1].mean()),
        **_by_hour(site, price, "per_kwh"),
    }


def _by_hour(site: Site, values: Floats, unit: str) -> dict[str, Any]:
    hour_of = site.local.astype("datetime64[h]").astype(np.int64) % 24
    by_hour = np.array([values[hour_of == hour].mean() for hour in range(24)])
    return {
        "lowest_hour": int(by_hour.argmin()),
        "highest_hour": int(by_hour.argmax()),
        f"by_hour_{unit}": [_rounded(value) for value in by_hour],
    }


def _forecasts(site: Site) -> dict[str, Any]:
    """Return how far the site's own forecast lies off on held-out steps, beside persistence.

    Persistence expects of any step to come what there is now.
    """
    held_out, found = ~site.training_steps, dict[str, Any]()
    for signal in _FORECAST:
        values = getattr(site, signal)
        if values is None or np.ptp(values) == 0.0:
            continue
        expected, rows = forecast(site, signal), list[dict[str, float]]()
        for lead in _leads(site, _LEADS_H):
            tables = {"own": _at(site, expected, lead), "persistence": values}
            if held_out[lead:].any():
                errors = _errors(tables, values, lead, held_out[lead:])
                rows.append({"lead_h": _rounded(lead * site.step_h), **errors})
        found[signal] = rows
    return found


def _provider(site: Site, signal: str) -> list[dict[str, float]]:
    """Return how far forecasts lie off on the held-out steps of which the provider says something.

    The provider's at its word, the site's own without it, and what comes of both, which is what
    all go by; known values and steps beyond the provider's reach do not count here.
    """
    values, held_out = getattr(site, signal), ~site.training_steps
    told = replace(site, known_ahead={})
    both, own = forecast(told, signal), forecast(replace(told, provided={}), signal)
    rows = list[dict[str, float]]()
    for lead in _leads(site, _PROVIDER_LEADS_H):
        said, _ = provided(site, signal, lead)
        target = held_out[lead:] & ~np.isnan(said[:-lead])
        tables = {"persistence": values, "provider": said}
        tables |= {"own": _at(site, own, lead), "both": _at(site, both, lead)}
        if target.any():
            row = {"lead_h": lead * site.step_h, "share": target.sum() / held_out[lead:].sum()}
            row = {key: _rounded(value) for key, value in row.items()}
            rows.append(row | _errors(tables, values, lead, target))
    return rows


def _errors(
    tables: Mapping[str, Floats], values: Floats, lead: int, target: NDArray[np.bool_]
) -> dict[str, float]:
    """Return how far tables [P] of what is expected lie off on target steps [P - lead]."""
    return {
        name: _rounded(np.abs(table[:-lead] - values[lead:])[target].mean())
        for name, table in tables.items()
    }


def _leads(site: Site, hours: tuple[float, ...]) -> list[int]:
    """Return how many steps later these leads are, each once."""
    each = steps_per_lead(site)
    leads = dict.fromkeys(-(-site.steps(lead) // each) * each for lead in hours)
    return [lead for lead in leads if lead < site.n_steps]


def _at(site: Site, expected: Floats, lead: int) -> Floats:
    """Return what is expected [P] of so many steps later."""
    return expected[:, lead // steps_per_lead(site) - 1]


def _sessions(site: Site, in_days: float) -> dict[str, Any] | None:
    read, admitted = site.sessions_read, site.sessions
    if read is None:
        return None
    if told := read.announcements and read.announcements._asdict():
        told = {key: value and _rounded(value) for key, value in told.items()}
    return {
        "rows": read.rows,
        "kwh": _rounded(read.energy_kwh),
        "dropped": read.dropped,
        "dropped_kwh": _rounded(read.dropped_kwh),
        "clipped": read.clipped,
        "clipped_kwh": _rounded(site.clipped_kwh.sum()),
        "turned_away": read.turned_away,
        "turned_away_kwh": _rounded(site.turned_away_kwh.sum()),
        "admitted": len(admitted.socket),
        "admitted_kwh": _rounded(admitted.energy_kwh.sum()),
        "admitted_per_day": _rounded(len(admitted.socket) * in_days),
        "most_at_once": int(present(site).max()),
        "announcements": told and {"known": site.told is not None, **told},
        "share_across_midnight": _rounded(read.span_share[0]),
        "share_across_day_start": _rounded(read.span_share[site.day_start_h]),
    }


def present(site: Site) -> Ints:
    """Return how many vehicles stand at a socket in each step, [P]."""
    comes, goes = (
        np.bincount(places, minlength=site.n_steps + 1)
        for places in (site.sessions.arrival, site.sessions.departure)
    )
    return np.cumsum(comes - goes)[:-1]


def _rounded(value: float) -> float:
    return round(float(value), 6)


# --- as a table ----------------------------------------------------------------------------------


def site_table(facts: Mapping[str, Any]) -> Table:
    """Return what `describe` tells of a site as a table of two columns."""
    told = [
        ("period", f"{_clock(facts['begin'])} to {_clock(facts['end'])}, {facts['timezone']}"),
        ("steps", f"{facts['steps']} of {facts['step_minutes']} min"),
        ("days", _days(facts)),
        ("held out", _held_out(facts)),
        ("battery", _battery(facts["battery"])),
        ("sockets", "; ".join(map(_socket, facts["sockets"])) or "none"),
        ("PV", _pv(facts["pv"])),
        ("load", _load(facts["load"])),
        ("grid", _grid(facts)),
        ("carbon", _carbon_text(facts["carbon"])),
        *([("price", _price_text(facts["price"]))] if facts["price"] else []),
        *_sessions_rows(facts["sessions"], facts["day_start"]),
        *_known_rows(facts["known_ahead"]),
        *_error_rows(
            "forecasts",
            "mean error on held-out steps after so many hours (of persistence)",
            facts["forecasts"],
            ("own",),
        ),
        *_error_rows(
            "provider",
            "mean error there at its word / of the site's own forecast without it / of both "
            "together, which is used (of persistence)",
            facts["provider"],
            ("provider", "own", "both"),
        ),
    ]
    rows = [{"what": what, "told": text} for what, text in told]
    return Table((Metric("what"), Metric("told")), rows, title=f"site {facts['site']}")


def _error_rows(
    what: str, words: str, signals: Mapping[str, Any], keys: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Tell mean absolute errors of each signal by these keys, and that of persistence."""
    if signals:
        yield what, words
    for signal, rows in signals.items():
        name, unit = _FORECAST[signal]
        told = ", ".join(
            f"{row['lead_h']:g} h: {' / '.join(_short(row[key]) for key in keys)} "
            f"({_short(row['persistence'])}){unit}"
            for row in rows
        )
        yield f"  {name}", told or "nothing of held-out steps"


def _known_rows(known_ahead: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    told = [
        f"{column} {'always' if since == 'always' else f'of tomorrow from {since} on'}"
        for column, since in known_ahead.items()
    ]
    if told:
        yield "known ahead", ", ".join(told)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def _held_out(facts: Mapping[str, Any]) -> str:
    begins = [stretch["begin"] for stretch in facts["stretches"]]
    each = begins if len(begins) <= _MANY else [*begins[: _MANY - 1], "...", begins[-1]]
    return f"{count_text(facts['stretches'])} from {', '.join(each)}"


def _clock(stamp: str) -> str:
    return stamp[:16].replace("T", " ")


def _days(facts: Mapping[str, Any]) -> str:
    clock = f"{facts['day_start']:02d}:00"
    odd = [f"{n} of {hours} h" for hours, n in facts["days_by_hours"].items() if hours != "24"]
    of_them = f", of them {' and '.join(odd)}" if odd else ""
    weeks = f"{facts['weeks']} whole week{'' if facts['weeks'] == 1 else 's'}"
    return f"{facts['days']} from {clock} to {clock}{of_them}; {weeks}"


def _battery(battery: Mapping[str, Any] | None) -> str:
    if battery is None:
        return "none"
    text = (
        f"{battery['capacity_kwh']:g} kWh, {battery['power_kw']:g} kW, SoC {battery['soc_min']:g} "
        f"to {battery['soc_max']:g}, efficiency {battery['charge_efficiency']:.3g} in, "
        f"{battery['discharge_efficiency']:.3g} out"
    )
    if battery["reserve_soc"] > battery["soc_min"]:
        text += f", {battery['reserve_soc']:g} kept for outages"
    return text if battery["may_charge_from_grid"] else f"{text}, never charged from the grid"


def _socket(socket: Mapping[str, Any]) -> str:
    least = f"{socket['min_kw']:g} to " if socket["min_kw"] else ""
    return f"{socket['count']} {socket['name']} of {least}{socket['max_kw']:g} kW"


def _pv(pv: Mapping[str, Any] | None) -> str:
    if pv is None:
        return "none"
    return (
        f"{pv['kwp']:g} kWp, {pv['kwh_per_day']:.1f} kWh a day, at most {pv['highest_kw']:.1f} kW"
    )


def _load(load: Mapping[str, Any] | None) -> str:
    if load is None:
        return "none"
    return (
        f"{load['kwh_per_day']:.1f} kWh a day, {load['lowest_kw']:.1f} to "
        f"{load['highest_kw']:.1f} kW"
    )


def _grid(facts: Mapping[str, Any]) -> str:
    less = facts["limited_steps"] / facts["steps"]
    return f"{facts['grid_kw']:g} kW" + (
        f", less in {100 * less:.1f} % of the steps" if less else ""
    )


def _carbon_text(carbon: Mapping[str, Any]) -> str:
    hours = _extremes(carbon, "kg_per_kwh", ".3f")
    when = f"in the mean{hours}" if hours else "at every hour"
    return f"{carbon['mean_kg_per_kwh']:.3f} kg/kWh {when}"


def _price_text(price: Mapping[str, Any]) -> str:
    text = f"{price['mean_per_kwh']:.4g} {price['currency']}/kWh".replace(" /", " a ")
    if price["lowest_per_kwh"] == price["highest_per_kwh"]:
        text += " at every hour"
    else:
        text += f" in the mean, {price['lowest_per_kwh']:.4g} to {price['highest_per_kwh']:.4g}"
    text += _extremes(price, "per_kwh", ".4g")
    earned = price["mean_export_per_kwh"]
    return f"{text}; export earns {earned:.4g}" if earned else text


def _extremes(signal: Mapping[str, Any], unit: str, form: str) -> str:
    """Tell the lowest and the highest hour, with a semicolon before; "" where all are the same."""
    lowest, highest = signal["lowest_hour"], signal["highest_hour"]
    least, most = (signal[f"by_hour_{unit}"][hour] for hour in (lowest, highest))
    if least == most:
        return ""
    return (
        f"; least from {lowest:02d}:00, {least:{form}}, most from {highest:02d}:00, {most:{form}}"
    )


def _sessions_rows(sessions: Mapping[str, Any] | None, day_start: int) -> list[tuple[str, str]]:
    if sessions is None:
        return [("sessions", "none")]
    rows = [("sessions", f"{sessions['rows']} rows, {sessions['kwh']:.1f} kWh")]
    for key, words in (
        ("dropped", "not within the series"),
        ("clipped", "beyond 98 % of what the stay allows"),
        ("turned_away", "found no free socket"),
    ):
        count = sessions[key]
        kwh = f", {sessions[f'{key}_kwh']:.1f} kWh {words}" if count else ""
        rows.append((f"  {key.replace('_', ' ')}", f"{count}{kwh}"))
    rows.append(
        (
            "  admitted",
            f"{sessions['admitted']}, {sessions['admitted_kwh']:.1f} kWh; "
            f"{sessions['admitted_per_day']:.1f} a day, at most {sessions['most_at_once']} at once",
        )
    )
    if said := sessions["announcements"]:
        rows.append(("  announced", _announced(said, sessions["rows"])))
    midnight, boundary = (
        100 * sessions[f"share_across_{hour}"] for hour in ("midnight", "day_start")
    )
    across = f"{midnight:.1f} % of the energy is of stays that go on across midnight"
    if day_start:
        across += f", {boundary:.1f} % across {day_start:02d}:00"
    return [*rows, ("  across", across)]


def _announced(said: Mapping[str, Any], rows: int) -> str:
    parts = [f"{said['departures']:.0f} departures, {said['energies']:.0f} energies of {rows} rows"]
    if said["departures"]:
        parts.append(
            f"departures {said['departure_off_h']:.2g} h off in the median, "
            f"{100 * said['departure_late_share']:.0f} % later than the truth"
        )
    if said["energies"]:
        parts.append(f"in the median {said['energy_ratio']:.2g} times what is taken")
    return "; ".join(parts) + ("" if said["known"] else "; the truth is known here")
