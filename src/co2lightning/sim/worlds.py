"""Other worlds of a site: where more is known, and where held-out days go otherwise than they did.

Each is a site whose `fitted_on` is the one it was made of: what policies, rules and forecasts were
fitted on, and what observations are measured in, stays as it is. So a share of the gap that differs
is due to what is known or to what happens, and to nothing else.

Shapes: P steps of the site, N sessions.
"""

from dataclasses import replace

import numpy as np

from co2lightning.site.model import Ints, Sessions, Site, Told

KNOWLEDGE = {
    "forecast": "a perfect forecast",
    "announcements": "true departures and energies",
    "all": "both",
}
"""What controllers may know beyond what they do -> in words."""

PERTURBATIONS = {
    "departures": "departures told 1 h off",
    "fewer_arrivals": "20 % fewer vehicles",
    "more_arrivals": "20 % more vehicles",
    "less_pv": "PV 20 % lower",
    "more_pv": "PV 20 % higher",
    "usual_price": "{price} expected as usual",
}
"""What may go otherwise on held-out days -> in words; `price` is what import is settled by."""

_SERIES = "carbon_kg_per_kwh", "price_per_kwh", "export_price_per_kwh", "load_kw", "pv_kw"
_PART = 0.2
_OFF_H = 1.0
_LEAST_H = 0.5  # as long as any stay
_WINDOW_SHARE = 0.98  # the largest share of what its stay allows that a driver may ask for


def knowing(site: Site) -> dict[str, Site]:
    """Return the worlds of `KNOWLEDGE` that differ from the site; what happens is the same."""
    known = dict.fromkeys(_SERIES, "always")
    own = site.fitted_on or site
    worlds = {"forecast": replace(site, known_ahead=known, provided={}, fitted_on=own)}
    if site.told:
        worlds["announcements"] = replace(site, told=None, fitted_on=own)
        worlds["all"] = replace(worlds["forecast"], told=None)
    return worlds


def perturbed(site: Site) -> dict[str, Site]:
    """Return the worlds of `PERTURBATIONS` that make a difference to the site.

    Nothing is changed outside held-out days, and nothing that arrives there. What is drawn follows
    from the site's seed.
    """
    held_out, rng = ~site.training_steps, np.random.default_rng(site.seed)
    comes = np.flatnonzero(held_out[site.sessions.arrival])
    worlds: dict[str, Site] = {}
    if len(comes):
        # In this order, whatever else a site has: what is drawn is the same.
        worlds["departures"] = replace(site, told=_mistaken(site, comes, rng))
        some = rng.permutation(comes)[: round(_PART * len(comes))]
        stays = np.delete(np.arange(len(site.sessions.arrival)), some)
        worlds["fewer_arrivals"] = _with_sessions(site, stays)
        again = np.concatenate([np.arange(len(site.sessions.arrival)), np.sort(some)])
        worlds["more_arrivals"] = _with_sessions(site, again, len(site.sessions.arrival))
    if site.pv_kw[held_out].any():
        for name, factor in (("less_pv", 1.0 - _PART), ("more_pv", 1.0 + _PART)):
            worlds[name] = replace(site, pv_kw=np.where(held_out, factor, 1.0) * site.pv_kw)
    forecast = [column for column in _settled(site) if column not in site.known_ahead]
    if forecast and _varies(site):
        known = {**site.known_ahead, **dict.fromkeys(forecast, "usual")}
        provided = {name: one for name, one in site.provided.items() if name not in forecast}
        worlds["usual_price"] = replace(site, known_ahead=known, provided=provided)
    own = site.fitted_on or site
    return {name: replace(world, fitted_on=own) for name, world in worlds.items()}


def _settled(site: Site) -> list[str]:
    """Return the series that the price of import is made of."""
    weights = zip(_SERIES[:2], site.objective, strict=True)
    return [column for column, weight in weights if weight]


def _varies(site: Site) -> bool:
    return float(np.ptp(site.import_price)) > 0.0


def _mistaken(site: Site, comes: Ints, rng: np.random.Generator) -> Told:
    """Return what is said where some are an hour off: of each of these one hour more or less."""
    sessions, told = site.sessions, site.sessions_told
    departure = told.departure.copy()
    off = rng.choice([-1, 1], len(comes)) * site.steps(_OFF_H)
    least = sessions.arrival[comes] + -(-int(_LEAST_H * 60) // site.step_minutes)
    departure[comes] = np.clip(sessions.departure[comes] + off, least, site.n_steps)
    energy_kwh, stay_h = told.energy_kwh.copy(), site.step_h * (departure - sessions.arrival)[comes]
    most_kwh = _WINDOW_SHARE * sessions.max_kw[comes] * stay_h
    energy_kwh[comes] = np.minimum(energy_kwh[comes], most_kwh)
    return Told(departure, energy_kwh)


def _with_sessions(site: Site, rows: Ints, known: int | None = None) -> Site:
    """Return a site with these of its sessions; those after the first `known` find a free socket.

    Who finds none is left out.
    """
    socket = site.sessions.socket[rows]
    if known is not None:
        rows, socket = _seated(site, rows, known)
    order = np.argsort(site.sessions.arrival[rows], kind="stable")
    rows, socket = rows[order], socket[order]
    of, told = site.sessions, site.told
    sessions = Sessions(
        socket=socket,
        arrival=of.arrival[rows],
        departure=of.departure[rows],
        energy_kwh=of.energy_kwh[rows],
        max_kw=of.max_kw[rows],
        min_kw=of.min_kw[rows],
    )
    told = told and Told(told.departure[rows], told.energy_kwh[rows])
    return replace(site, sessions=sessions, told=told)


def _seated(site: Site, rows: Ints, known: int) -> tuple[Ints, Ints]:
    """Give those after the first `known` the lowest free socket of their type, or none."""
    ends = np.cumsum([kind.count for kind in site.sockets])
    of = site.sessions
    longest = int((of.departure - of.arrival).max())
    given: list[tuple[int, int]] = []
    taken: dict[int, list[int]] = {}  # socket -> rows seated there already
    for row in rows[known:].tolist():
        begin, end = int(of.arrival[row]), int(of.departure[row])
        kind = int(np.searchsorted(ends, of.socket[row], side="right"))
        near = slice(*np.searchsorted(of.arrival, [begin - longest, end]))
        busy = set(of.socket[near][of.departure[near] > begin].tolist())
        free = (
            place
            for place in range(int(ends[kind]) - site.sockets[kind].count, int(ends[kind]))
            if place not in busy
            and all(
                of.departure[one] <= begin or of.arrival[one] >= end for one in taken.get(place, ())
            )
        )
        if (place := next(free, None)) is not None:
            taken.setdefault(place, []).append(row)
            given.append((row, place))
    more = np.array(given, dtype=np.int64).reshape(-1, 2)
    return (
        np.concatenate([rows[:known], more[:, 0]]),
        np.concatenate([of.socket[rows[:known]], more[:, 1]]),
    )
