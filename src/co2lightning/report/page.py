"""The HTML file: text and tables from here, charts drawn by report.js from the data inside.

Whatever comes from a file is escaped where it enters the page, and the page's own policy lets no
other script run than report.js, nor anything be fetched.
"""

from __future__ import annotations

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
from co2lightning.report.collect import HOURS, SOC_CLASSES, RunResult, SiteResult
from co2lightning.report.tables import convergence
from co2lightning.sim.evaluate import TITLES, Summary, mean_interval, summarise
from co2lightning.sim.schedule import Schedule, evaluation_soc
from co2lightning.site.model import Floats, Site

_MINUS = "\N{MINUS SIGN}"
# The references in the order of their CO2, each with the class that gives its look.
REFERENCES = ("uncontrolled", "rbc_a", "rbc_b", "optimum")


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
    script = charts + script
    parts = {
        "style_hash": _sha256(style),
        "script_hash": _sha256(script),
        "style": style,
        "script": script,
        "lead": "".join(_lead(result) for result in results),
        "sites": "\n".join(_site(i, result) for i, result in enumerate(results)),
        "training": _training(results),
        "data": as_json({"sites": [_site_data(result) for result in results]}),
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


def as_json(data: dict[str, Any]) -> str:
    """Return data for a script element: nothing in it can end the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


# --- data for the charts -------------------------------------------------------------------------


def _site_data(result: SiteResult) -> dict[str, Any]:
    site, references = result.site, result.references
    days = site.held_out_days
    summaries = summarise(references)
    return {
        "name": site.name,
        "days": list(references.days),
        "typical_day": result.typical_day,
        "soc_start": _rounded(evaluation_soc(site)[days].double().numpy(), 3),
        "soc_min": site.battery.soc_min,
        "soc_max": site.battery.soc_max,
        "hours": HOURS,
        "soc_classes": SOC_CLASSES,
        "pv_kw": _rounded(site.pv_kw[days], 1),
        "load_kw": _rounded(site.load_kw[days], 1),
        "carbon": _rounded(site.carbon_kg_per_kwh[days], 3),
        "policies": [
            {
                "key": name,
                "title": TITLES[name],
                "schedule": _schedule_data(references.schedules[name]),
                "co2_kg": _rounded(references.policies[name].co2_kg, 2),
                **_means(summaries[name], summaries),
            }
            for name in REFERENCES
        ],
        "runs": [_run_data(run) for run in result.runs],
    }


def _run_data(run: RunResult) -> dict[str, Any]:
    summaries = summarise(run.evaluation)
    metrics = [m for session in run.row["sessions"] for m in session["metrics"]]
    return {
        "key": run.name,
        "title": run.title,
        "episode": run.episode,
        "curve": [
            [m["episode"], _number(m.get("co2_kg"), 2), _number(m.get("co2_vs_uncontrolled"), 4)]
            for m in metrics
            if m.get("co2_kg") is not None
        ],
        "schedule": _schedule_data(run.evaluation.schedules["agent"]),
        "co2_kg": _rounded(run.evaluation.policies["agent"].co2_kg, 2),
        **_means(summaries["agent"], summaries),
        "heat": {
            "battery_kw": _rounded(run.heat.battery_kw, 1),
            "ev_kw": _rounded(run.heat.ev_kw, 1),
            "steps": run.heat.steps.astype(int).tolist(),
        },
        "sessions": [
            {key: session[key] for key in _SESSION_KEYS} for session in run.row["sessions"]
        ],
    }


_SESSION_KEYS = (
    *("session_timestamp", "duration_seconds", "status", "device"),
    *("start_episode", "end_episode"),
)


def _means(summary: Summary, summaries: dict[str, Summary]) -> dict[str, Any]:
    return {
        "mean_kg": _number(summary.co2_kg, 3),
        "mean_interval_kg": _number(summary.co2_kg_interval, 3),
        "vs_rbc_b_kg": _number(summary.vs_rbc_b_kg, 3),
        "vs_rbc_b_interval_kg": _number(summary.vs_rbc_b_kg_interval, 3),
        "share": _number(summary.co2_kg / max(summaries["uncontrolled"].co2_kg, 1e-9), 4),
    }


def _schedule_data(plan: Schedule) -> dict[str, Any]:
    return {
        "ev_kw": _rounded(plan.ev_kw, 1),
        "battery_kw": _rounded(plan.battery_kw, 1),
        "grid_import_kw": _rounded(plan.grid_import_kw, 1),
        "soc": _rounded(plan.soc, 3),
        "co2_kg": _rounded(plan.co2_kg, 3),
    }


def _rounded(values: Floats, digits: int) -> list[Any]:
    """Return an array as lists; NaN becomes None, -0.0 becomes 0.0."""
    rounded = (np.round(values, digits) + 0.0).astype(object)
    rounded[np.isnan(values)] = None
    return rounded.tolist()


def _number(value: float | None, digits: int) -> float | None:
    return None if value is None else round(float(value), digits) + 0.0


# --- text and tables -----------------------------------------------------------------------------


def _lead(result: SiteResult) -> str:
    """Return the sentence that says how the best run of a site stands beside the references."""
    summaries = [(summarise(run.evaluation)["agent"], run) for run in result.runs]
    best, run = min(summaries, key=lambda pair: pair[0].co2_kg)
    references = result.references.policies
    rival = min(REFERENCES[:-1], key=lambda name: references[name].co2_kg.mean())
    difference_kg, interval = mean_interval(
        run.evaluation.policies["agent"].co2_kg - references[rival].co2_kg
    )
    days = len(result.references.days)
    # An interval over days says something only where there are days to speak of.
    verdict = ""
    if interval is not None:
        verdict = ": better" if difference_kg < 0 else ": worse"
        verdict = verdict if abs(difference_kg) > interval else ": no clear difference"
    closed = ""
    if best.gap_closed is not None:
        closed = f" It closes {_percent(best.gap_closed)} of the gap to the optimum."
    return (
        f"<p>On {days} held-out day{'' if days == 1 else 's'} of <b>{escape(result.site.name)}</b>,"
        f" <b>{escape(run.title)}</b> (episode {run.episode}) emits {best.co2_kg:.1f} kg of CO2 a "
        f"day, {_plus_minus(_signed(difference_kg), interval)} kg against the best control without "
        f"learning, {TITLES[rival]}{verdict}.{closed}</p>"
    )


def _site(index: int, result: SiteResult) -> str:
    site = result.site
    count = len(result.references.days)
    files = ", ".join(
        f"{escape(run.name)} {escape(run.file.name)} (sha256 {escape(run.sha256[:12])})"
        for run in result.runs
    )
    held_out = f"held-out days of {escape(site.name)} (sha256 {site.sha256[:12]})"
    tested = " ".join(escape(f"co2lightning test {run.name};") for run in result.runs)[:-1]
    figure = f'<div class="chart" data-site="{index}" data-chart='
    return f"""
<section>
<h2>Site {escape(site.name)}</h2>
<p class="facts">{_facts(site)} {count} held-out days, {result.references.days[0]} to
{result.references.days[-1]}. sha256 {site.sha256[:12]}.</p>
{_foreign(result)}
<h3>Held-out days: how good is each controller?</h3>
{_comparison(result)}
<p class="source">Mean over days ± half its 95 % interval (Student's t). Difference to RBC B: paired
day by day, so its interval is the one that decides. Gap closed: share of the way from uncontrolled
to the optimum (LP, perfect foresight). Unmet: energy not served beyond what charging on arrival
also leaves. Self-consumption: share of the PV that found a use. The same by <code>{tested}</code>;
files: {files}; {held_out}.</p>
<figure>{figure}"intervals"></div>
<figcaption>Mean CO2 and paired difference to RBC B with 95 % intervals, from the table above;
uncontrolled is too far off for the second.</figcaption></figure>

<h3>Learning curves</h3>
<figure>{figure}"learning"></div>
<figcaption>Lines of runs: each episode's <em>training</em> days, with exploration; the days differ
from episode to episode. Diamonds and straight lines: the <em>held-out</em> days, without
exploration. As a share of what the same days emit without control the two can be compared; in kg
only roughly. Source: checkpoints/*/history.json; the table above.</figcaption></figure>

<h3>CO2 of each held-out day</h3>
<figure>{figure}"days"></div>
<figcaption>Every held-out day: the run, the rule RBC B and the optimum met the same weather,
vehicles and battery start. A line joins run and rule. Click a day to open it below. Source: as the
table.</figcaption></figure>

<h3>Day explorer</h3>
<figure>{figure}"explorer"></div>
<figcaption>Battery: charging is positive. CO2: summed from midnight; the last step holds the
battery's settlement. It opens on the day with the median CO2 under RBC B. Source: the schedules
behind the table; PV, load and carbon intensity from the site's series.</figcaption></figure>

<h3>What the run does differently from the rule</h3>
<figure>{figure}"heat"></div>
<figcaption>Mean power of the run minus what RBC B would do in the very same state, by the hour and
the battery's SoC at the step's beginning, over the states the run itself came to on the held-out
days. Blank: the run was never there. What lies beyond the scale has the colour of its end; each
cell's own figure shows under the pointer. Source: the files named under the table, {held_out}.
</figcaption></figure>
</section>"""


def _facts(site: Site) -> str:
    battery = site.battery
    sockets = ", ".join(f"{s.count} {escape(s.name)} sockets" for s in site.sockets)
    return (
        f"{site.pv_kwp:g} kWp of PV, battery {battery.capacity_kwh:g} "
        f"kWh / {battery.power_kw:g} kW, {sockets}; {len(site.days)} days of which"
    )


def _foreign(result: SiteResult) -> str:
    """Say which runs were trained on another site."""
    return "".join(
        f'<p class="warning">{escape(run.name)} was trained on {escape(run.trained_on[0])} '
        f"(sha256 {escape(run.trained_on[1][:12])}), not on this site.</p>"
        for run in result.runs
        if run.trained_on[1] != result.site.sha256
    )


def _comparison(result: SiteResult) -> str:
    reference = summarise(result.references)
    rows = [
        (run.title, str(run.episode), summarise(run.evaluation)["agent"]) for run in result.runs
    ]
    rows += [(TITLES[name], "", reference[name]) for name in REFERENCES]
    headings = (
        *("policy", "episode", "CO2, kg/day", "against RBC B, kg/day", "gap closed"),
        *("unmet, kWh/day", "self-consumption", "curtailed, kWh/day", "peak import, kW"),
    )
    return _table(
        headings,
        [
            [
                title,
                episode,
                _plus_minus(f"{s.co2_kg:.1f}", s.co2_kg_interval),
                "" if s is reference["rbc_b"] else against_rule(s),
                "" if s.gap_closed is None else _percent(s.gap_closed),
                f"{s.unmet_kwh:.3f}",
                "" if s.self_consumption is None else _percent(s.self_consumption),
                f"{s.curtailed_kwh:.0f}",
                f"{s.peak_import_kw:.0f}",
            ]
            for title, episode, s in rows
        ],
    )


def against_rule(summary: Summary) -> str:
    return _plus_minus(_signed(summary.vs_rbc_b_kg), summary.vs_rbc_b_kg_interval)


def _training(results: Sequence[SiteResult]) -> str:
    runs = [run for result in results for run in result.runs]
    means = [
        [
            run.name,
            f"{session['start_episode']}-{session['end_episode']}",
            f"{m.co2_kg:.1f}",
            "" if m.change_kg is None else _signed(m.change_kg),
            "" if m.change is None else _signed(100 * m.change, 0) + " %",
            "" if m.co2_vs_uncontrolled is None else _percent(m.co2_vs_uncontrolled),
            f"{m.unmet_kwh:.1f}",
        ]
        for run in runs
        for session, m in convergence(run.row)
    ]
    sessions = [
        [
            run.name,
            session["session_timestamp"],
            f"{session['start_episode']}-{session['end_episode']}"
            if session["episodes_count"]
            else "",
            str(session["episodes_count"]),
            f"{session['duration_seconds']:.1f}",
            session["device"],
            session["status"],
        ]
        for run in runs
        for session in run.row["sessions"]
    ]
    convergence_table = _table(
        (
            *("run", "episodes", "CO2, kg", "change, kg", "change", "of uncontrolled"),
            "unmet, kWh",
        ),
        means,
    )
    sessions_table = _table(
        ("run", "begun", "episodes", "number", "seconds", "device", "ended"), sessions
    )
    return f"""
<section>
<h2>Training</h2>
<h3>Convergence, session by session</h3>
{convergence_table}
<p class="source">Means over a session's episodes on training days, with exploration; changes are
against the session before. Source: <code>co2lightning history NAME</code>, history.json.</p>
<h3>Sessions</h3>
<figure><div class="chart" data-chart="sessions"></div>
<figcaption>When each session ran and how it ended; short ones are drawn 4 px wide. Source:
history.json.</figcaption></figure>
{sessions_table}
</section>"""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; a column of text has `text` for its class, numbers stand right."""
    text = [
        h in ("policy", "run", "begun", "device", "ended") and ' class="text"' for h in headings
    ]
    head = "".join(
        f'<th scope="col"{t or ""}>{escape(h)}</th>' for t, h in zip(text, headings, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{t or ''}>{escape(c)}</td>" for t, c in zip(text, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", _MINUS)


def _plus_minus(mean: str, interval: float | None) -> str:
    return mean if interval is None else f"{mean} ± {interval:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-", _MINUS)
