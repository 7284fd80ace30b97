"""The report's figures for papers: PNG and vector PDF, by matplotlib without a display.

Shapes: D held-out days, T = 96 steps a day.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from co2lightning.report.collect import HOURS, SOC_CLASSES, RunResult, SiteResult
from co2lightning.report.page import REFERENCES
from co2lightning.sim.evaluate import TITLES, Summary, summarise
from co2lightning.sim.schedule import evaluation_soc
from co2lightning.site.model import STEP_H, T

# Okabe and Ito's colours, darkened as in report.css; references are greys told apart by dashes.
_COLOURS = ("#0072b2", "#c2500a", "#008060", "#a8327d", "#8a6d00", "#5b4db7")
_GREYS = {"uncontrolled": "#57606a", "rbc_a": "#57606a", "rbc_b": "#1b1f24", "optimum": "#1b1f24"}
_DASHES: dict[str, Any] = {
    "uncontrolled": (0, (1, 2)),
    "rbc_a": (0, (4, 3)),
    "rbc_b": "-",
    "optimum": (0, (7, 2, 2, 2)),
}
_STYLE: Any = {
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


def draw(results: Sequence[SiteResult]) -> dict[str, bytes]:
    """Return the figures by file name, each as PNG and as PDF."""
    files: dict[str, bytes] = {}
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # in a name: drawn as a box
        for result in results:
            place = f"-{result.site.name}-{result.site.sha256[:6]}" if len(results) > 1 else ""
            for name, figure in _figures(result):
                stem = re.sub(r"[^\w.-]", "_", name + place)
                for kind in ("png", "pdf"):
                    buffer = io.BytesIO()
                    figure.savefig(buffer, format=kind, dpi=200)
                    files[f"{stem}.{kind}"] = buffer.getvalue()
                    figure.set_layout_engine("none")  # as the first found it: slow to find again
    return files


def _figures(result: SiteResult) -> Iterator[tuple[str, Figure]]:
    yield "learning_curves", _learning(result)
    yield "held_out", _intervals(result)
    for i, run in enumerate(result.runs):
        yield f"days_{run.name}", _days(result, run, _colour(i))
        yield f"difference_{run.name}", _heat(result, run)
        yield f"day_{run.name}", _day(result, run, _colour(i))


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _hollow(colour: str) -> dict[str, Any]:
    """Return the look of a marker that hides no other beneath it."""
    return {"color": colour, "fillstyle": "none", "mew": 1.5}


def _learning(result: SiteResult) -> Figure:
    figure = Figure(figsize=(6.3, 3.8))
    axes = figure.add_subplot()
    summaries = summarise(result.references)
    uncontrolled_kg = max(summaries["uncontrolled"].co2_kg, 1e-9)
    for i, run in enumerate(result.runs):
        metrics = [m for s in run.row["sessions"] for m in s["metrics"]]
        known = {
            m["episode"]: 100 * m["co2_vs_uncontrolled"]
            for m in metrics
            if m.get("co2_vs_uncontrolled") is not None
        }
        episodes = range(min(known, default=1), max(known, default=0) + 1)
        shares = [known.get(episode, np.nan) for episode in episodes]
        marker = "o" if len(known) < 40 else ""
        look = {"color": _colour(i), "marker": marker, "ms": 3}
        axes.plot(episodes, shares, label=f"{run.title}, training days", **look)
        own = summarise(run.evaluation)["agent"].co2_kg
        axes.plot(run.episode, 100 * own / uncontrolled_kg, "D", ms=6, **_hollow(_colour(i)))
    axes.plot([], [], "D", ms=6, label="the same run, held-out days", **_hollow("#57606a"))
    for name in REFERENCES:
        share = 100 * summaries[name].co2_kg / uncontrolled_kg
        look = {"color": _GREYS[name], "ls": _DASHES[name], "lw": 1.2}
        axes.axhline(share, label=f"{TITLES[name]}, held-out days", **look)
    axes.set(xlabel="episode", ylabel="CO2, % of the same days uncontrolled")
    axes.set_ylim(bottom=0)
    last = max(run.episode for run in result.runs)
    axes.set_xlim(0.5, 1.02 * last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _intervals(result: SiteResult) -> Figure:
    rows: list[tuple[str, str, Summary]] = [
        (run.title, _colour(i), summarise(run.evaluation)["agent"])
        for i, run in enumerate(result.runs)
    ]
    summaries = summarise(result.references)
    rows += [(TITLES[name], _GREYS[name], summaries[name]) for name in REFERENCES]
    figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(rows)))
    mean, paired = figure.subplots(1, 2)
    for y, (_, colour, s) in enumerate(rows):
        error = {"xerr": s.co2_kg_interval, "ecolor": "#1b1f24", "capsize": 2}
        mean.barh(y, s.co2_kg, 0.6, color=colour, alpha=0.6, **error)
    mean.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    mean.set(xlabel="mean CO2 and its 95 % interval, kg a day")
    others = [row for row in rows if row[2] not in (summaries["rbc_b"], summaries["uncontrolled"])]
    for y, (_, colour, s) in enumerate(others):
        paired.errorbar(
            s.vs_rbc_b_kg, y, xerr=s.vs_rbc_b_kg_interval, fmt="o", ms=4, color=colour, capsize=2
        )
    paired.set_yticks(range(len(others)), [title for title, _, _ in others])
    paired.set(xlabel="paired difference to RBC B, kg a day")
    paired.set_ylim(-0.5, len(others) - 0.5)
    paired.axvline(0.0, color="#1b1f24", lw=1)
    for axes in (mean, paired):
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    return figure


def _days(result: SiteResult, run: RunResult, colour: str) -> Figure:
    figure = Figure(figsize=(7.2, 2.8))
    axes = figure.add_subplot()
    own, rule, best = (
        run.evaluation.policies[name].co2_kg for name in ("agent", "rbc_b", "optimum")
    )
    days = result.references.days
    at = np.arange(len(days))
    axes.vlines(at, own, rule, color=colour, alpha=0.55, lw=1.2)
    axes.plot(at, best, "_", color="#1b1f24", label=TITLES["optimum"])
    axes.plot(at, rule, "o", mfc="w", mec="#1b1f24", ms=4, label=TITLES["rbc_b"])
    axes.plot(at, own, "o", color=colour, ms=4, label=run.title)
    shown = at[:: max(1, -(-len(at) // 7))]
    axes.set_xticks(shown, [days[i] for i in shown])
    axes.set(xlabel="held-out day", ylabel="CO2, kg")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _heat(result: SiteResult, run: RunResult) -> Figure:
    figure = Figure(figsize=(7.2, 3.0))
    battery = result.site.battery
    differences = {
        "battery (charging +)": run.heat.battery_kw,
        "EV charging": run.heat.ev_kw,
    }
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, difference_kw) in zip(panels, differences.items(), strict=True):
        # A few cells, such as the last hour's, would leave the others without colour.
        limit = max(1.0, float(np.nanpercentile(np.abs(difference_kw), 95)))
        edges = np.arange(HOURS + 1), 100 * np.arange(SOC_CLASSES + 1) / SOC_CLASSES
        mesh = axes.pcolormesh(*edges, difference_kw.T, cmap="PuOr_r", vmin=-limit, vmax=limit)
        mesh.set_rasterized(True)
        figure.colorbar(mesh, ax=axes, label="run minus RBC B, kW", extend="both")
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="time of day, h", xticks=range(0, HOURS + 1, 6), facecolor="#c4cad1")
        axes.grid(False)
    panels[0].set(ylabel="battery SoC, %", ylim=(100 * battery.soc_min, 100 * battery.soc_max))
    figure.suptitle(f"{run.title} in its own states; grey: it was never there", fontsize=9)
    return figure


def _day(result: SiteResult, run: RunResult, colour: str) -> Figure:
    figure = Figure(figsize=(6.3, 6.6))
    power, soc, carbon, total = figure.subplots(
        4, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1.6, 1, 1.8]}
    )
    site, at = result.site, result.typical_day
    day = site.held_out_days[at]
    plans = run.evaluation.schedules
    own = plans["agent"]
    edges = np.arange(T + 1) * STEP_H
    power.stairs(site.pv_kw[day], edges, fill=True, color="#f3d98a", label="PV available")
    for values, name, look in (
        (site.load_kw[day], "building load", {"color": "#7a828b", "ls": "--"}),
        (own.grid_import_kw[at], "grid import", {"color": "#1b1f24"}),
        (own.battery_kw[at], "battery (charging +)", {"color": "#a8327d"}),
        (own.ev_kw[at], "EV charging", {"color": "#0072b2"}),
    ):
        power.stairs(values, edges, baseline=None, label=name, **look)
    power.set(ylabel="power, kW")
    _outside(power)
    start = float(evaluation_soc(site)[day])
    for name, title, look in (
        ("optimum", TITLES["optimum"], {"color": "#1b1f24", "ls": _DASHES["optimum"]}),
        ("rbc_b", TITLES["rbc_b"], {"color": "#1b1f24"}),
        ("agent", run.title, {"color": colour}),
    ):
        plan = plans[name]
        soc.plot(edges, 100 * np.concatenate([[start], plan.soc[at]]), lw=1.3, label=title, **look)
        sums = np.concatenate([[0.0], plan.co2_kg[at].cumsum()])
        total.plot(edges, sums, lw=1.3, label=title, **look)
    soc.set(ylabel="battery SoC, %", ylim=(0, 100))
    _outside(soc)
    carbon.stairs(site.carbon_kg_per_kwh[day], edges, baseline=None, color="#57606a")
    carbon.set(ylabel="intensity,\nkg/kWh")
    carbon.set_ylim(bottom=0)
    total.set(ylabel="CO2 since\nmidnight, kg", xlabel="time of day, h")
    total.set_title("the last step holds the battery's settlement", fontsize=8, loc="left")
    total.set(xlim=(0, 24), xticks=range(0, 25, 3))
    _outside(total)
    figure.suptitle(f"{run.title} on {result.references.days[at]}, site {site.name}", fontsize=10)
    figure.align_ylabels()
    return figure


def _outside(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
