"""Where training windows begin: the states that a simple rule comes to when it never stops.

Shapes: D days of the site, C columns of sockets.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from co2lightning.control.outlook import outlook_of
from co2lightning.control.rules import Choice, rbc_c
from co2lightning.control.state import State
from co2lightning.sim.scales import watched
from co2lightning.sim.schedule import through
from co2lightning.site.model import Floats, Site


def starts_of(site: Site) -> tuple[Floats, tuple[NDArray[np.float32], ...]]:
    """Return the states in which the days of a site begin under the cheap rule with greedy battery.

    It is run through the whole series in one go, from `soc_min`. Without vehicles the battery is
    all there is to it.

    Returns:
        State of charge [D], 0-1, 0 without a battery; and what vehicles are owed, arrivals of that
        moment included, [D, C] each, as `Carry` has it: as told, and where drivers announce in
        truth.
    """
    choice = Choice("cheap" if len(site.sessions.arrival) else "arrival", greedy=True)
    day_at = np.full(site.n_steps + 1, -1)
    day_at[site.day_bounds[:-1]] = np.arange(len(site.days))
    columns = max(1, len(site.sessions.used_sockets))
    soc, known = np.zeros(len(site.days)), 1 if site.told is None else 2
    owed_kw = tuple(np.zeros((len(site.days), columns), np.float32) for _ in range(known))

    def watch(state: State) -> None:
        # A piece that is run again shows what it began with anew: the last word counts.
        days = day_at[state.place.numpy()]
        if (rows := np.flatnonzero(days >= 0)).size:
            soc[days[rows]] = state.soc.numpy()[rows]
            for owed, found in zip(owed_kw, state.carry.parts[2:], strict=True):
                owed[days[rows]] = found.numpy()[rows]

    rule = functools.partial(rbc_c, choice, outlook_of(site))
    through(site, watched(rule, watch))
    return soc if site.battery else np.zeros_like(soc), owed_kw
