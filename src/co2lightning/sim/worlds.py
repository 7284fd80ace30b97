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
        every = np.arange(len(site.sessions.arrival))
        stays, again = np.delete(every, some), np.concatenate([every, np.sort(some)])
        worlds["fewer_arrivals"] = _with_sessions(site, stays, len(stays))
        worlds["more_arrivals"] = _with_sessions(site, again, len(every))
    if site.pv_kw[held_out].any():
        for name, factor in (("less_pv", 1.0 - _PART), ("more_pv", 1.0 + _PART)):
            worlds[name] = replace(site, pv_kw=np.where(held_out, factor, 1.0) * site.pv_kw)
    # The price of import is made of the first two series, as far as they have a weight.
    weights = zip(_SERIES[:2], site.objective, strict=True)
    forecast = [name for name, weight in weights if weight and name not in site.known_ahead]
    if forecast and np.ptp(site.import_price) > 0.0:
        known = {**site.known_ahead, **dict.fromkeys(forecast, "usual")}
        provided = {name: one for name, one in site.provided.items() if name not in forecast}
        worlds["usual_price"] = replace(site, known_ahead=known, provided=provided)
    own = site.fitted_on or site
    return {name: replace(world, fitted_on=own) for name, world in worlds.items()}


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


def _with_sessions(site: Site, rows: Ints, known: int) -> Site:
    """Return a site with these of its sessions, those after the first `known` where there is room.

    They get the lowest free socket of their type; who finds none is left out.
    """
    of, told, ends = site.sessions, site.told, np.cumsum([kind.count for kind in site.sockets])
    socket, arrival, departure = of.socket[rows], of.arrival[rows], of.departure[rows]
    seated = np.arange(len(rows)) < known
    for i in range(known, len(rows)):
        kind = int(np.searchsorted(ends, socket[i], side="right"))
        meanwhile = seated & (arrival < departure[i]) & (departure > arrival[i])
        own = np.arange(-site.sockets[kind].count, 0) + ends[kind]
        if (free := np.setdiff1d(own, socket[meanwhile])).size:
            socket[i], seated[i] = free[0], True
    order = np.flatnonzero(seated)
    order = order[np.argsort(arrival[order], kind="stable")]
    rows = rows[order]
    sessions = Sessions(
        socket=socket[order],
        arrival=arrival[order],
        departure=departure[order],
        energy_kwh=of.energy_kwh[rows],
        max_kw=of.max_kw[rows],
        min_kw=of.min_kw[rows],
    )
    told = told and Told(told.departure[rows], told.energy_kwh[rows])
    return replace(site, sessions=sessions, told=told)
