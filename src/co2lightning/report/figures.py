"""The report's figures for papers: PNG and vector PDF, by matplotlib without a display.

Shapes: W held-out stretches.
"""

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from co2lightning.metrics import TRAINING
from co2lightning.report.collect import (
    HOURS,
    SOC_CLASSES,
    RuleResult,
    RunResult,
    SiteResult,
    soc_band,
)
from co2lightning.report.day import STYLE, Drawn, draw_day
from co2lightning.report.looks import HEAT, LOOKS, RuleLook, RunLook
from co2lightning.sim.evaluate import TITLES, Summary, summarise
from co2lightning.sim.schedule import start_soc

_Shown = RunResult | RuleResult
_Look = RunLook | RuleLook
_Looks = dict[str, _Look]


def draw(results: Sequence[SiteResult]) -> dict[str, bytes]:
    """Return the figures by file name, each as PNG and as PDF."""
    several = len(results) > 1
    places = [f"-{r.site.name}-{r.site.sha256[:6]}" if several else "" for r in results]
    for i, result in enumerate(results):  # the same site, settled by something else
        same = [r for r in results if r.site.sha256 == result.site.sha256]
        if len({r.site.objective for r in same}) > 1:
            places[i] += f"-{result.settled.name}"
        if result.site.told is None and any(r.site.told for r in same):
            places[i] += "-truth"
    return as_files(
        (name + place, figure)
        for result, place in zip(results, places, strict=True)
        for name, figure in _figures(result)
    )


def as_files(figures: Iterable[tuple[str, Figure]]) -> dict[str, bytes]:
    """Return figures by file name, each as PNG and as PDF.

    Args:
        figures: Each with its name; those of a generator are made in `STYLE`.
    """
    files: dict[str, bytes] = {}
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # in a name: drawn as a box
        for name, figure in figures:
            stem = re.sub(r"[^\w.-]", "_", name)
            for kind in ("png", "pdf"):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=200)
                files[f"{stem}.{kind}"] = buffer.getvalue()
                figure.set_layout_engine("none")  # as the first found it: slow to find again
    return files


def _figures(result: SiteResult) -> Iterator[tuple[str, Figure]]:
    looks = result.looks
    if result.runs:
        yield "learning_curves", _learning(result, looks)
    yield "held_out", _intervals(result, looks)
    for one in result.shown:
        yield f"stretches_{one.name}", _stretches(result, one, looks[one.name])
        yield f"difference_{one.name}", _heat(result, one)
        yield f"day_{one.name}", _day(result, one, looks[one.name])


def _hollow(colour: str) -> dict[str, Any]:
    """Return the look of a marker that hides no other beneath it."""
    return {"color": colour, "fillstyle": "none", "mew": 1.5, "ms": 7, "ls": ""}


def _learning(result: SiteResult, looks: _Looks) -> Figure:
    figure = Figure(figsize=(6.3, 3.8))
    axes = figure.add_subplot()
    training, shares = TRAINING[result.share_key], result.shares
    for run in result.runs:
        look = looks[run.name]
        known = {
            m["episode"]: 100 * m[training.key]
            for m in run.metrics
            if m.get(training.key) is not None
        }
        episodes = range(min(known, default=1), max(known, default=0) + 1)
        curve = [known.get(episode, np.nan) for episode in episodes]
        marks = {"marker": look.marker if len(known) < 40 else "", "ms": 3}
        axes.plot(episodes, curve, label=f"{run.title}, training days", **look.line, **marks)
        axes.plot(run.episode, 100 * shares[run.title], marker=look.marker, **_hollow(look.colour))
    hollow = _hollow(LOOKS["rbc_a"]["color"])
    axes.plot([], [], "o", label="the same run, held out", **hollow)
    for name in result.references.policies:
        axes.axhline(100 * shares[name], lw=1.2, label=f"{TITLES[name]}, held out", **LOOKS[name])
    axes.set(xlabel="episode", ylabel=training.axis.format(settled=result.settled.name))
    if axes.get_ylim()[0] > 0 or result.settled.key == "co2_kg":  # money may be earned
        axes.set_ylim(bottom=0)
    last = max(run.episode for run in result.runs)
    axes.set_xlim(0.5, 1.02 * last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, handlelength=3.2)
    return figure


def _intervals(result: SiteResult, looks: _Looks) -> Figure:
    rows: list[tuple[str, str, Summary]] = [
        (run.title, looks[run.name].colour, run.summary) for run in result.runs
    ]
    summaries = summarise(result.references)
    rows += [(TITLES[name], LOOKS[name]["color"], s) for name, s in summaries.items()]
    figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(rows)))
    mean, paired = figure.subplots(1, 2)
    settled = result.settled
    for y, (_, colour, s) in enumerate(rows):
        value, interval = getattr(s, settled.key), getattr(s, f"{settled.key}_interval")
        error: dict[str, Any] = {"ecolor": "#1b1f24", "capsize": 2, "xerr": interval}
        mean.barh(y, value, 0.6, color=colour, alpha=0.6, **error)
    mean.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    certain = any(getattr(s, f"{settled.key}_interval") is not None for _, _, s in rows)
    its = " and its 95 % interval" if certain else ""
    mean.set_xlabel(f"mean {settled.name}{its}, {settled.a_day}", loc="right")
    paired_titles = [TITLES[name] for name in TITLES if name in result.paired]
    others = [row for i, row in enumerate(rows) if i < len(result.runs) or row[0] in paired_titles]
    for y, (_, colour, s) in enumerate(others):
        paired.errorbar(
            s.vs_best, y, xerr=s.vs_best_interval, fmt="o", ms=4, color=colour, capsize=2
        )
    paired.set_yticks(range(len(others)), [title for title, _, _ in others])
    paired.set_xlabel(f"paired difference to {settled.best}, {settled.a_day}", loc="right")
    paired.set_ylim(-0.5, len(others) - 0.5)
    paired.axvline(0.0, color="#1b1f24", lw=1)
    for axes in (mean, paired):
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    return figure


def _stretches(result: SiteResult, one: _Shown, look: _Look) -> Figure:
    figure = Figure(figsize=(7.2, 2.8))
    axes = figure.add_subplot()
    settled, rival = result.settled, result.references.best
    own, rule, best = (
        result.a_day(one.evaluation.policies[name].settled)
        for name in (one.policy, rival, "optimum")
    )
    days = result.references.days
    at = np.arange(len(days))
    axes.vlines(at, own, rule, color=look.colour, alpha=0.55, lw=1.2)
    if one.policy != rival:
        axes.plot(at, rule, "o", mfc="w", mec="#1b1f24", ms=4, label=settled.best)
    axes.plot(at, own, look.marker, color=look.colour, ms=4, label=one.title)
    axes.plot(at, best, "_", color="#1b1f24", ms=8, label=TITLES["optimum"])
    shown = at[:: max(1, -(-len(at) // 7))]
    axes.set_xticks(shown, [days[i] for i in shown])
    axes.set(xlabel="first day of the held-out stretch", ylabel=f"{settled.name}, {settled.a_day}")
    if min(own.min(), rule.min(), best.min()) > 0:
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax)  # room for whole marks
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _heat(result: SiteResult, one: _Shown) -> Figure:
    battery, titles = (
        result.site.battery,
        {"battery_kw": "battery (charging +)", "ev_kw": "EV charging"},
    )
    count = len(result.compared)
    figure = Figure(figsize=(3.6 * count, 3.2 if battery else 2.0))
    first, end = soc_band(battery)
    colours = LinearSegmentedColormap.from_list("", [HEAT[n] for n in ("minus", "same", "plus")])
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, what in zip(panels, result.compared, strict=True):
        limit = result.heat_limit_kw(what)
        edges = np.arange(HOURS + 1), 100 * np.arange(first, end + 1) / SOC_CLASSES
        difference_kw = getattr(one.heat, what)[:, first:end].T
        mesh = axes.pcolormesh(*edges, difference_kw, cmap=colours, vmin=-limit, vmax=limit)
        mesh.set_rasterized(True)
        figure.colorbar(mesh, ax=axes, label="minus RBC B, kW", extend="both")
        axes.set_title(titles[what], fontsize=9)
        hours = range(0, HOURS + 1, 6)
        axes.set_xticks(hours, [f"{hour}:00" for hour in hours])
        axes.set(xlabel="local time", facecolor=HEAT["never"])
        axes.grid(False)
    panels[0].set(ylabel="battery SoC, %") if battery else panels[0].set(yticks=[])
    figure.suptitle(f"{one.title} in its own states;\ngrey: it was never there", fontsize=9)
    return figure


def _day(result: SiteResult, one: _Shown, look: _Look) -> Figure:
    figure = Figure(figsize=(6.3, 6.6))
    day, plans, site = result.typical_day, one.evaluation.schedules, result.site
    begin = int(site.stretch_bounds[day.stretch, 0])
    policies: list[Drawn] = []
    for title, name, line in (
        *(
            (TITLES[name], name, LOOKS[name])
            for name in ("optimum", result.references.best)
            if name != one.policy
        ),
        (one.title, one.policy, look.line),
    ):
        plan = plans[name][day.stretch]
        soc = float(plan.soc[day.begin - 1]) if day.begin else start_soc(site)
        policies.append(Drawn(title, day.of(plan), soc, line))
    draw_day(figure, site, begin + day.begin, begin + day.end, policies)
    return figure
