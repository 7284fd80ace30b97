"""A day drawn: the site's powers, the battery, the grid's carbon and the CO2 of several policies.

Importing it imports no matplotlib, which takes a start-up a second. Shapes: T = 96 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from co2lightning.report.looks import FLOWS
from co2lightning.sim.schedule import Schedule, evaluation_soc
from co2lightning.site.model import STEP_H, Site, T

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


def draw_day(
    figure: Figure, site: Site, day: int, policies: Sequence[tuple[str, Schedule, dict[str, Any]]]
) -> None:
    """Draw a day as policies control it.

    Args:
        figure: Empty, made in this `STYLE`.
        site: The site.
        day: Index into its days.
        policies: Name, what it did on this day, in fields [1, T], and the look of its lines. Of
            the last one the powers are drawn, too.
    """
    power, soc, carbon, total = figure.subplots(4, 1, sharex=True, height_ratios=[3, 1.6, 1, 1.8])
    edges = np.arange(T + 1) * STEP_H
    name, own, _ = policies[-1]
    power.stairs(site.pv_kw[day], edges, fill=True, color=FLOWS["pv"][0], label="PV available")
    for values, label, flow, dashes in (
        (site.load_kw[day], "building load", "load", "--"),
        (own.grid_import_kw[0], "grid import", "grid", "-"),
        (own.battery_kw[0], "battery (charging +)", "battery", "-"),
        (own.ev_kw[0], "EV charging", "ev", "-"),
    ):
        power.stairs(values, edges, baseline=None, label=label, color=FLOWS[flow][0], ls=dashes)
    power.set(ylabel="power, kW")
    start = float(evaluation_soc(site)[day])
    for title, plan, look in policies:
        soc_percent = 100 * np.concatenate([[start], plan.soc[0]])
        soc.plot(edges, soc_percent, lw=1.3, label=title, **look)
        total_kg = np.concatenate([[0.0], plan.co2_kg[0].cumsum()])
        total.plot(edges, total_kg, lw=1.3, label=f"{title}, {total_kg[-1]:.0f} kg", **look)
    soc.set(ylabel="battery SoC, %", ylim=(0, 100))
    carbon.stairs(site.carbon_kg_per_kwh[day], edges, baseline=None, color=FLOWS["carbon"][0])
    carbon.set(ylabel="intensity,\nkg/kWh")
    carbon.set_ylim(bottom=0)
    total.set(ylabel="CO2 since\nmidnight, kg", xlabel="time of day, h")
    total.set_title("the last step holds the battery's settlement", fontsize=8, loc="left")
    total.set(xlim=(0, 24), xticks=range(0, 25, 3))
    for axes in (power, soc, total):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    figure.suptitle(f"{name} on {site.days[day]}, site {site.name}", fontsize=10)
    figure.align_ylabels()
