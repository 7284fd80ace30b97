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

from co2lightning.report.collect import HOURS, SOC_CLASSES, Shown, SiteResult, soc_band
from co2lightning.report.comparison import evaluation_data, settled_in
from co2lightning.report.day import STYLE, Drawn, draw_day
from co2lightning.report.looks import FLOWS, HEAT, LOOKS
from co2lightning.report.site import present
from co2lightning.sim.evaluate import TITLES, Evaluation, summarise
from co2lightning.sim.schedule import start_soc
from co2lightning.site.model import DAY_H, Site


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
    return _as_files(
        (name + place, figure)
        for result, place in zip(results, places, strict=True)
        for name, figure in _figures(result)
    )


def draw_site(site: Site, evaluation: Evaluation) -> dict[str, bytes]:
    """Return the figures of a site alone, as `draw`; what a site has not is not drawn."""
    return _as_files(_site_figures(site, evaluation))


def _as_files(figures: Iterable[tuple[str, Figure]]) -> dict[str, bytes]:
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
    if result.runs:
        yield "learning_curves", _learning(result)
    yield "held_out", _intervals(result)
    for one in result.shown:
        yield f"stretches_{one.name}", _stretches(result, one)
        yield f"difference_{one.name}", _heat(result, one)
        yield f"day_{one.name}", _day(result, one)


def _site_figures(site: Site, evaluation: Evaluation) -> Iterator[tuple[str, Figure]]:
    yield "site_day", _usual_day(site)
    yield "site_references", _references(evaluation)


def _hollow(colour: str) -> dict[str, Any]:
    """Return the look of a marker that hides no other beneath it."""
    return {"color": colour, "fillstyle": "none", "mew": 1.5, "ms": 7, "ls": ""}


def _learning(result: SiteResult) -> Figure:
    figure = Figure(figsize=(6.3, 3.8))
    axes = figure.add_subplot()
    key, shares = result.share_key, result.shares
    for run in result.runs:
        look = result.looks[run.name]
        known = {m["episode"]: 100 * m[key] for m in run.metrics if m.get(key) is not None}
        episodes = range(min(known, default=1), max(known, default=0) + 1)
        curve = [known.get(episode, np.nan) for episode in episodes]
        marks = {"marker": look.marker if len(known) < 40 else "", "ms": 3}
        axes.plot(episodes, curve, label=f"{run.title}, training days", **look.line, **marks)
        axes.plot(run.episode, 100 * shares[run.title], marker=look.marker, **_hollow(look.colour))
    hollow = _hollow(LOOKS["rbc_a"]["color"])
    axes.plot([], [], "o", label="the same run, held out", **hollow)
    for name in result.references.policies:
        axes.axhline(100 * shares[name], lw=1.2, label=f"{TITLES[name]}, held out", **LOOKS[name])
    ylabel = f"{result.settled.name}, % of the same days uncontrolled"
    axes.set(xlabel="episode", ylabel=ylabel)
    if axes.get_ylim()[0] > 0 or result.settled.key == "co2_kg":  # money may be earned
        axes.set_ylim(bottom=0)
    last = max(run.episode for run in result.runs)
    axes.set_xlim(0.5, 1.02 * last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, handlelength=3.2)
    return figure


def _intervals(result: SiteResult) -> Figure:
    looks, settled = result.looks, result.settled
    rows = [(run.title, looks[run.name].colour, run.summary) for run in result.runs]
    summaries = summarise(result.references)
    rows += [(TITLES[name], LOOKS[name]["color"], s) for name, s in summaries.items()]
    figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(rows)))
    mean, paired = figure.subplots(1, 2)
    for y, (_, colour, s) in enumerate(rows):
        value, interval = getattr(s, settled.key), getattr(s, f"{settled.key}_interval")
        error: dict[str, Any] = {"ecolor": "#1b1f24", "capsize": 2, "xerr": interval}
        mean.barh(y, value, 0.6, color=colour, alpha=0.6, **error)
    mean.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    certain = any(getattr(s, f"{settled.key}_interval") is not None for _, _, s in rows)
    its = " and its 95 % interval" if certain else ""
    mean.set_xlabel(f"mean {settled.name}{its}, {settled.a_day}", loc="right")
    left_out = {TITLES[name] for name in summaries if name not in result.paired}
    others = rows[: len(result.runs)]
    others += [row for row in rows[len(result.runs) :] if row[0] not in left_out]
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


def _stretches(result: SiteResult, one: Shown) -> Figure:
    figure = Figure(figsize=(7.2, 2.8))
    axes = figure.add_subplot()
    settled, rival, look = result.settled, result.references.best, result.looks[one.name]
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


def _heat(result: SiteResult, one: Shown) -> Figure:
    battery, count = result.site.battery, len(result.compared)
    titles = {"battery_kw": "battery (charging +)", "ev_kw": "EV charging"}
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


def _day(result: SiteResult, one: Shown) -> Figure:
    figure = Figure(figsize=(6.3, 6.6))
    day, plans, site = result.typical_day, one.evaluation.schedules, result.site
    begin = int(site.stretch_bounds[day.stretch, 0])
    policies: list[Drawn] = []
    others = [name for name in ("optimum", result.references.best) if name != one.policy]
    for title, name, line in (
        *((TITLES[name], name, LOOKS[name]) for name in others),
        (one.title, one.policy, result.looks[one.name].line),
    ):
        plan = plans[name][day.stretch]
        soc = float(plan.soc[day.begin - 1]) if day.begin else start_soc(site)
        policies.append(Drawn(title, day.of(plan), soc, line))
    draw_day(figure, site, begin + day.begin, begin + day.end, policies)
    return figure


def _usual_day(site: Site) -> Figure:
    """Draw what there is at each time of the day: the mean, and what 80 % of the days lie in."""
    load, pv, ev, carbon = (FLOWS[name][0] for name in ("load", "pv", "ev", "carbon"))
    shown = [
        (site.load_kw, "load, kW", load, load),
        (site.pv_kw, "PV, kW", pv, FLOWS["pv"][1]),
        (present(site), "vehicles present", ev, ev),
        (
            site.money_per_kwh[0],
            f"price, {site.currency}/kWh".replace(", /", " of a "),
            carbon,
            carbon,
        ),
        (site.carbon_kg_per_kwh, "carbon, kg/kWh", carbon, carbon),
    ]
    shown = [one for i, one in enumerate(shown, 1) if one[0].any() or i == len(shown)]
    minute = site.local.astype("datetime64[m]").astype(np.int64) % 1440
    times, which = np.unique(minute, return_inverse=True)
    order = np.argsort(which, kind="stable")
    begins = np.flatnonzero(np.diff(which[order], prepend=-1))
    edges = np.append(times, times[0] + 1440) / 60
    figure = Figure(figsize=(6.3, 0.9 + 1.5 * len(shown)))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (values, label, band, line) in zip(panels, shown, strict=True):
        each = np.split(values[order], begins[1:])
        low, high = np.array([np.percentile(some, (10, 90)) for some in each]).T
        axes.stairs(high, edges, baseline=low, fill=True, color=band, alpha=0.4)
        axes.stairs([some.mean() for some in each], edges, baseline=None, color=line, lw=1.5)
        axes.set(ylabel=label, xlim=(0, 24), xticks=range(0, 25, 3))
        if low.min() >= 0:
            axes.set_ylim(bottom=0)
    panels[-1].set(xlabel="time of day, h")
    figure.suptitle(
        f"{site.name}: mean of all days, and from the 10 % to the 90 % point", fontsize=9
    )
    figure.align_ylabels()
    return figure


def _references(evaluation: Evaluation) -> Figure:
    figure = Figure(figsize=(7.2, 3.2))
    axes = figure.add_subplot()
    begins, days = evaluation.days, evaluation.hours / DAY_H
    at = np.arange(len(begins))
    for mark, (name, figures) in zip("os^vDPXd*", evaluation.policies.items(), strict=False):
        look = {"marker": mark, "ms": 4, "mfc": "w", "lw": 1.2, **LOOKS[name]}
        axes.plot(at, figures.settled / days, label=TITLES[name], **look)
    shown = at[:: max(1, -(-len(at) // 7))]
    axes.set_xticks(shown, [begins[i] for i in shown])
    settled = settled_in(evaluation_data(evaluation))
    axes.set(xlabel="held-out stretch from", ylabel=f"{settled.name}, {settled.a_day}")
    if axes.get_ylim()[0] > 0:
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax)  # room for whole marks
    figure.legend(loc="outside upper center", ncols=4)
    return figure
