"""A day drawn: the site's powers, the battery, the grid's carbon and the CO2 of several policies.

Where cost is what is to be made small, the price and the cost instead of carbon and CO2.
What a site has not is not drawn. Importing it imports no matplotlib, which takes a start-up a
second. Shapes: n steps of the day, or of whatever else is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from co2lightning.report.looks import FLOWS
from co2lightning.sim.schedule import Schedule
from co2lightning.site.model import Objective, Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: Any = {
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d8dce1",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a run's name is no formula
}
_TICK_H = (1, 3, 6, 12)


class Drawn(NamedTuple):
    """A policy in a drawing of a day."""

    title: str
    schedule: Schedule  # of these steps, [n]
    soc: float  # at their beginning
    look: dict[str, Any]  # of its lines


class Parts(NamedTuple):
    """Which parts a site has."""

    battery: bool
    ev: bool
    pv: bool
    load: bool


def parts_of(site: Site) -> Parts:
    """Return which parts a site has."""
    pv, load = bool(site.pv_kw.any()), bool(site.load_kw.any())
    return Parts(site.battery is not None, site.n_sockets > 0, pv, load)


def draw_day(figure: Figure, site: Site, begin: int, end: int, policies: Sequence[Drawn]) -> None:
    """Draw a day, or other steps, as policies control it.

    Args:
        figure: Empty, made in this `STYLE`.
        site: The site.
        begin: Place of the first step.
        end: The place after the last one.
        policies: Of the last one the powers are drawn, too.
    """
    parts, steps = parts_of(site), slice(begin, end)
    money = site.objective == Objective(0.0, 1.0)
    unit = site.currency if money else "kg"
    heights = [3.0, *([1.6] if parts.battery else []), 1.0, 1.8]
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    power, carbon, total = panels[0], panels[-2], panels[-1]
    edges = np.arange(end - begin + 1) * site.step_h
    name, own = policies[-1].title, policies[-1].schedule
    if parts.pv:
        pv = {"fill": True, "color": FLOWS["pv"][0], "label": "PV available"}
        power.stairs(site.pv_kw[steps], edges, **pv)
    for there, values, label, flow, dashes in (
        (parts.load, site.load_kw[steps], "building load", "load", "--"),
        (True, own.grid_import_kw, "grid import", "grid", "-"),
        (parts.battery, own.battery_kw, "battery (charging +)", "battery", "-"),
        (parts.ev, own.ev_kw, "EV charging", "ev", "-"),
    ):
        if there:
            look = {"color": FLOWS[flow][0], "ls": dashes}
            power.stairs(values, edges, baseline=None, label=label, **look)
    power.set(ylabel="power, kW")
    for title, plan, start, look in policies:
        if parts.battery:
            panels[1].plot(edges, 100 * np.append(start, plan.soc), lw=1.3, label=title, **look)
        sums = np.append(0.0, (plan.cost if money else plan.co2_kg).cumsum())
        text = f"{sums[-1]:.{2 if money else 1}f} {unit}".strip()
        total.plot(edges, sums, lw=1.3, label=f"{title}, {text}", **look)
    if parts.battery:
        panels[1].set(ylabel="battery SoC, %", ylim=(0, 100))
    signal = (site.import_price if money else site.carbon_kg_per_kwh)[steps]
    carbon.stairs(signal, edges, baseline=None, color=FLOWS["carbon"][0])
    of_kwh = f"price,\n{unit}/kWh" if unit else "price of\na kWh"
    carbon.set(ylabel=of_kwh if money else "intensity,\nkg/kWh")
    if signal.min() >= 0:
        carbon.set_ylim(bottom=0)
    total.set(
        ylabel=f"cost,\n{unit}".removesuffix(",\n") if money else "CO2 of the\nimport, kg",
        xlabel="local time",
        xlim=(0, edges[-1]),
    )
    total.set_title("the meter's, without settlement", fontsize=8, loc="left")
    total.set_xticks(*_clock(site, begin, end))
    for axes in (power, *panels[1:-2], total):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    when = site.when(begin).date().isoformat()
    figure.suptitle(f"{name} on {when}, site {site.name}", fontsize=10)
    figure.align_ylabels()


def _clock(site: Site, begin: int, end: int) -> tuple[list[float], list[str]]:
    """Return where full hours of the local clock lie, in hours from `begin`, and their names."""
    hours = (end - begin) * site.step_h
    every = next((h for h in _TICK_H if hours / h <= 9), 24)
    at: list[float] = []
    names: list[str] = []
    for place in range(begin, end + 1):
        when = site.when(place)
        if when.minute == 0 and when.hour % every == 0:
            at.append((place - begin) * site.step_h)
            names.append(f"{when.hour}:00" if every < 24 else when.date().isoformat())
    return at, names
