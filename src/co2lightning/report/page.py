"""The HTML file: text and tables from here, charts drawn by report.js from the data inside.

Whatever comes from a file is escaped where it enters the page, and the page's own policy lets no
other script run than report.js, nor anything be fetched.
"""

import base64
import hashlib
import json
import platform
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from importlib.metadata import version
from typing import Any

import numpy as np

from co2lightning import __version__
from co2lightning.metrics import HELD_OUT, Settled
from co2lightning.report import looks
from co2lightning.report.collect import HOURS, SOC_CLASSES, RunResult, Shown, SiteResult, soc_band
from co2lightning.report.comparison import (
    count_text,
    evaluation_data,
    knowledge_lines,
    remarks,
    verdict,
)
from co2lightning.report.day import parts_of
from co2lightning.report.tables import (
    all_sessions_table,
    comparison_table,
    convergence_table,
    in_page,
    metered_text,
    stretches_table,
    table_in_page,
)
from co2lightning.sim.evaluate import TITLES, Evaluation, summarise
from co2lightning.sim.schedule import start_soc
from co2lightning.site.model import DAY_H, Floats, Site

_SESSION_KEYS = "session_timestamp", "duration_seconds", "status", "device"


def render(results: Sequence[SiteResult], command: str, made: str) -> bytes:
    """Return the report.

    Args:
        results: What to show.
        command: The command line that makes it.
        made: Local time of its making.
    """
    files = resources.files(__package__ or "co2lightning.report")
    style, charts, script, template = (
        files.joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "charts.js", "report.js", "template.html")
    )
    style = looks.style() + style
    script = charts + script
    parts = {
        "style_hash": _sha256(style),
        "script_hash": _sha256(script),
        "style": style,
        "script": script,
        "lead": "".join(_lead(result) for result in results),
        "sites": "\n".join(_site(i, result) for i, result in enumerate(results)),
        "training": _training(results),
        "data": _as_json({"sites": [_site_data(result) for result in results]}),
        "command": escape(command),
        "made": escape(made),
        "version": escape(__version__),
        "versions": escape(
            f"Python {platform.python_version()}, torch {version('torch')}, "
            f"numpy {version('numpy')}, scipy {version('scipy')}"
        ),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    return page.encode("utf-8", "replace")  # a directory's name may be no text


def _as_json(data: dict[str, Any]) -> str:
    """Return data for a script element: nothing in it can end the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


# --- data for the charts -------------------------------------------------------------------------


def _site_data(result: SiteResult) -> dict[str, Any]:
    site, references = result.site, result.references
    stretches = [slice(begin, end) for begin, end in site.stretch_bounds.tolist()]
    days = [[d for d in result.held_out_days if d.stretch == w] for w in range(len(stretches))]
    typical, of_money = result.typical_day, result.settled.key == "cost"
    return {
        "name": site.name,
        "step_h": site.step_h,
        "parts": parts_of(site)._asdict(),
        "stretches": [
            {
                "from": of_stretch[0].date,
                "to": of_stretch[-1].date,
                "clock": _minutes(site, steps),
                "days": [[day.date, day.begin, day.end] for day in of_stretch],
                "pv_kw": _rounded(site.pv_kw[steps], 2),
                "load_kw": _rounded(site.load_kw[steps], 2),
                "carbon": _rounded(site.carbon_kg_per_kwh[steps], 3),
                **({"price": _rounded(site.import_price[steps], 4)} if of_money else {}),
            }
            for steps, of_stretch in zip(stretches, days, strict=True)
        ],
        "typical_day": [typical.stretch, days[typical.stretch].index(typical)],
        "soc_start": start_soc(site),
        "hours": HOURS,
        "soc_classes": SOC_CLASSES,
        "soc_band": soc_band(site.battery),
        "heat_limit_kw": {what: result.heat_limit_kw(what) for what in result.compared},
        "paired": result.paired,
        "settled": {
            "key": result.settled.key,
            "name": result.settled.name,
            "a_day": result.settled.a_day,
            "unit": result.settled.unit,
            "digits": 1 if result.settled.key == "co2_kg" else 2,
            "best": result.references.best,
            "best_title": result.settled.best,
        },
        "policies": [
            {"key": name, "title": TITLES[name], "look": name}
            | _policy_data(name, result, references, name)
            for name in references.policies
        ],
        "runs": [_run_data(result, run) for run in result.runs],
        "rules": [_shown_data(result, rule) for rule in result.rules],
    }


def _minutes(site: Site, steps: slice) -> list[int]:
    """Return the local clock, in minutes of the day, at each step's beginning and the end."""
    clocks = [site.when(place) for place in range(steps.start, steps.stop + 1)]
    return [60 * clock.hour + clock.minute for clock in clocks]


def _shown_data(result: SiteResult, one: Shown) -> dict[str, Any]:
    look = result.looks[one.name]
    return {
        "key": one.name,
        "title": one.title,
        "look": look.classes,
        "mark": look.mark,
        **_policy_data(one.policy, result, one.evaluation, one.title),
        "heat": {
            **{what: _rounded(getattr(one.heat, what), 2) for what in result.compared},
            "steps": one.heat.steps.astype(int).tolist(),
        },
    }


def _run_data(result: SiteResult, run: RunResult) -> dict[str, Any]:
    return {
        **_shown_data(result, run),
        "episode": run.episode,
        "curve": [
            [m["episode"], _settled(m, result), _number(m.get(result.share_key), 4)]
            for m in run.metrics
            if m.get("co2_kg") is not None
        ],
        "sessions": [
            {key: session[key] for key in _SESSION_KEYS} for session in run.row["sessions"]
        ],
    }


def _policy_data(
    name: str, result: SiteResult, evaluation: Evaluation, title: str
) -> dict[str, Any]:
    key, parts = result.settled.key, parts_of(result.site)
    summary, plans = summarise(evaluation)[name], evaluation.schedules[name]
    fields = {
        **({"ev_kw": 2} if parts.ev else {}),
        **({"battery_kw": 2, "soc": 3} if parts.battery else {}),
        "grid_import_kw": 2,
        **({"cost": 4} if key == "cost" else {"co2_kg": 4}),
    }
    return {
        "schedule": [
            {key: _rounded(getattr(plan, key), digits) for key, digits in fields.items()}
            for plan in plans
        ],
        "a_day": _rounded(result.a_day(evaluation.policies[name].settled), 3),
        "unmet_kwh": _rounded(result.a_day(evaluation.policies[name].unmet_kwh), 3),
        "mean": _number(getattr(summary, key), 3),
        "mean_interval": _number(getattr(summary, f"{key}_interval"), 3),
        "vs_best": _number(summary.vs_best, 3),
        "vs_best_interval": _number(summary.vs_best_interval, 3),
        "share": _number(result.shares[name if name in result.shares else title], 4),
    }


def _settled(metrics: dict[str, Any], result: SiteResult) -> float | None:
    """Return what an episode's training days came to of what is settled."""
    co2_kg, cost = metrics.get("co2_kg"), metrics.get("cost")
    if result.settled.key == "co2_kg":
        return _number(co2_kg, 2)
    if co2_kg is None or cost is None:
        return None
    return _number(result.site.objective.of(co2_kg, cost), 2)


def _rounded(values: Floats, digits: int) -> list[Any]:
    """Return an array as lists; NaN becomes None, -0.0 becomes 0.0."""
    rounded = (np.round(values, digits) + 0.0).astype(object)
    rounded[np.isnan(values)] = None
    return rounded.tolist()


def _number(value: float | None, digits: int) -> float | None:
    return None if value is None else round(float(value), digits) + 0.0


# --- text and tables -----------------------------------------------------------------------------


def _lead(result: SiteResult) -> str:
    """Return the sentences that say how the best run of a site, or rule, stands beside others."""
    shown = min(result.runs or result.rules, key=lambda one: one.summary.vs_best)
    best, settled = shown.summary, result.settled
    closed = ""
    if best.gap_closed is not None:
        share = in_page(HELD_OUT["gap_closed"], best._asdict())
        closed = f" It closes {share} of the gap to the optimum."
    unmet = ""
    if result.site.n_sockets:
        misled = "" if best.misled_kwh is None else f", of it {best.misled_kwh:.3f} misled"
        unmet = f" Unmet: {best.unmet_kwh:.3f} kWh a day{misled}. {_not_asked(result.references)}"
    mean = settled.written(getattr(best, settled.key)).replace("-", "\N{MINUS SIGN}")
    unit = escape(f" {settled.unit}" if settled.unit else "")
    told = {"co2_kg": f"emits {mean} kg of CO2", "cost": f"costs {mean}{unit}"}
    told = told.get(settled.key, f"has an objective of {mean}")
    episode = f" (episode {shown.episode})" if isinstance(shown, RunResult) else ""
    advice = escape(verdict(evaluation_data(shown.evaluation), shown.policy, shown.title))
    return (
        f"<p><b>{advice}</b> In {count_text(result.data['stretches'])} of "
        f"<b>{escape(result.site.name)}</b>, <b>{escape(shown.title)}</b>{episode} {told} a day."
        f"{closed}{unmet}</p>"
    )


def _not_asked(references: Evaluation) -> str:
    """Return what vehicles wanted and no policy is asked for, so that CO2 does not stand alone."""
    days = references.hours.sum() / DAY_H
    return (
        f"Of the site's data: turned away {references.turned_away_kwh.sum() / days:.1f} and "
        f"clipped {references.clipped_kwh.sum() / days:.1f} kWh a day."
    )


def _equipment(site: Site) -> str:
    battery, parts = site.battery, parts_of(site)
    pv = f"{site.pv_kwp:g} kWp of PV" if site.pv_kwp else "PV" if parts.pv else "no PV"
    stored = (
        f"battery {battery.capacity_kwh:g} kWh / {battery.power_kw:g} kW"
        if battery
        else "no battery"
    )
    sockets = ", ".join(f"{s.count} {escape(s.name)} sockets" for s in site.sockets)
    load = [] if parts.load else ["no building load"]
    return ", ".join([pv, stored, sockets or "no sockets", *load])


def _site(index: int, result: SiteResult) -> str:
    site, settled = result.site, result.settled
    files = ", ".join(
        f"{escape(run.name)} {escape(run.file.name)} (sha256 {escape(run.sha256[:12])})"
        for run in result.runs
    )
    data, days = result.data, result.held_out_days
    stretches = count_text(data["stretches"])
    held_out = f"{stretches} of {escape(site.name)} (sha256 {site.sha256[:12]})"
    titles = TITLES | {run.title: run.title for run in result.runs}
    lines = knowledge_lines(data, titles)
    lines += remarks(data["stretches"], data["policies"], titles)
    below = escape(" ".join(f"{line}." for line in lines))
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in site.notes)
    foreign = "".join(
        f'<p class="warning">{escape(run.name)} was trained on {escape(run.trained_on[0])} '
        f"(sha256 {escape(run.trained_on[1][:12])}), not on this site.</p>"
        for run in result.runs
        if run.trained_on[1] != site.sha256
    )
    interval = (
        " ± half its 95 % interval (Student's t) over stretches: that of the difference to "
        f"{settled.best}, paired stretch by stretch, is the one that decides; "
        if result.shown[0].summary.co2_kg_interval is not None
        else ", without an interval, for which eight stretches are needed, so each is shown below; "
    )
    figure = f'<div class="chart" data-site="{index}" data-chart='
    misled = "; misled: of it what is due to what drivers announced" if site.told else ""
    what = settled.name[0].upper() + settled.name[1:]
    by = "" if settled.currency is None else f" Settled by {escape(_by(settled, site))}."
    if (read := site.sessions_read) and read.announcements:
        known = "what drivers announce" if site.told else "the truth, not what drivers announce,"
        by += f" Of vehicles {known} is known."
    meter = "cost" if settled.key == "cost" else "CO2"
    verb = "emit" if settled.key == "co2_kg" else "come to"
    unit = escape(settled.unit or "absolute figures")
    in_unit = escape(f"in {settled.a_day}" if settled.unit else "a day")
    tested = [run.name for run in result.runs]
    tested += [f"{rule.name} --env.site {site.name}" for rule in result.rules]
    tested = "; ".join(escape(f"co2lightning test {name}") for name in tested)
    sources = f"files: {files}; {held_out}" if files else held_out
    curves = f"""
<h3>Learning curves</h3>
<figure><div class="chart" data-site="{index}" data-chart="learning"></div>
<figcaption>Lines of runs: each episode's <em>training</em> days, with exploration; the days differ
from episode to episode. Large marks and straight lines: the <em>held-out</em> stretches, without
exploration. As a share of what the same days {verb} without control the two can be compared; in
{unit} only roughly. Source: checkpoints/*/history.json; the table above.</figcaption></figure>
"""
    return f"""
<section>
<h2>Site {escape(site.name)}</h2>
<p class="facts">{_equipment(site)}; steps of {site.step_minutes} minutes; {len(site.days)} days
from {site.day_start_h}:00 to {site.day_start_h}:00, of which {stretches}, {days[0].date} to
{days[-1].date}. sha256 {site.sha256[:12]}.{by}</p>
{notes}
{foreign}
<h3>Held out: how good is each controller?</h3>
{_comparison(result)}
<p class="source">Mean a day{interval}each stretch in one go, settled by what the best operation of
the next two days would cost from the state that is left. {metered_text(settled)}Gap
closed: share of the way from uncontrolled to the optimum (LP, perfect foresight). Unmet: energy
not served beyond what charging on arrival also leaves{misled}.
Self-consumption: share of the PV that found a use. {below} The same by
<code>{tested}</code>; {sources}.</p>
{_each_stretch(result)}
<figure>{figure}"intervals"></div>
<figcaption>Mean {settled.name} and paired difference to {settled.best}, with 95 % intervals
where there are eight stretches, from the table above. Uncontrolled is left out of the second where
it is too far off.
</figcaption></figure>
{curves if result.runs else ""}
<h3>{what} of each held-out stretch</h3>
<figure>{figure}"stretches"></div>
<figcaption>Every held-out stretch, settled, {in_unit}: each controller, the best reference,
{settled.best}, and the optimum met the same weather, vehicles and battery start. A line joins the
first two. Click a stretch to open
it below. Source: as the table.</figcaption></figure>

<h3>Day explorer</h3>
<figure>{figure}"explorer"></div>
<figcaption>A held-out stretch day by day. The {meter} of a day is the meter's alone: a stretch is
settled as a whole, its days are not.{" Battery: charging is positive." if site.battery else ""} It
opens on the day with the median CO2 under RBC B. Source: the schedules behind the table; the site's
series.</figcaption></figure>

<h3>What each does differently from RBC B</h3>
<figure>{figure}"heat"></div>
<figcaption>Mean power of a controller minus what RBC B would do in the very same state, by the hour
of the local clock{" and the battery's SoC" if site.battery else ""} at the step's beginning, over
the states it came to itself in the held-out stretches. Grey: it was never there. What lies
beyond the scale has the colour of its end; each cell's own figure shows under the pointer.
Source: as the table.</figcaption></figure>
</section>"""


def _each_stretch(result: SiteResult) -> str:
    """Return a table of the stretches where they are too few for an interval."""
    if result.shown[0].summary.co2_kg_interval is not None:
        return ""
    data = result.data
    names = {run.title: run.title for run in result.runs}
    names |= {TITLES[name]: name for name in result.references.policies}
    policies = {title: data["policies"][name]["stretches"] for title, name in names.items()}
    table = stretches_table(data["stretches"], policies, result.settled)
    return f'{table_in_page(table)}\n<p class="source">{escape(table.caption or "")}</p>'


def _comparison(result: SiteResult) -> str:
    rows = [
        {"policy": run.title, "episode": run.episode, **run.summary._asdict()}
        for run in result.runs
    ]
    rows += [
        {"name": name, "policy": TITLES[name], **summary._asdict()}
        for name, summary in summarise(result.references).items()
    ]
    return table_in_page(comparison_table(rows, result.settled))


def _by(settled: Settled, site: Site) -> str:
    """Return what policies are settled by where a site has prices."""
    if settled.key != "objective":
        return f"{settled.name}, {settled.a_day}"
    weights = site.objective
    return f"an objective, {weights.co2:g} of a kg of CO2 and {weights.cost:g} of what it costs"


def _training(results: Sequence[SiteResult]) -> str:
    runs = [run.row for result in results for run in result.runs]
    if not runs:
        return ""
    return f"""
<section>
<h2>Training</h2>
<h3>Convergence, session by session</h3>
{table_in_page(convergence_table(runs))}
<p class="source">Means over a session's episodes on training days, with exploration; changes are
against the session before. Source: <code>co2lightning history NAME</code>, history.json.</p>
<h3>Sessions</h3>
<figure><div class="chart" data-chart="sessions"></div>
<figcaption>When each session ran and how it ended; short ones are drawn 4 px wide. Source:
history.json.</figcaption></figure>
{table_in_page(all_sessions_table(runs))}
</section>"""
