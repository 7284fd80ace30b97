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
from co2lightning.control.rules import RULES
from co2lightning.metrics import HELD_OUT
from co2lightning.report import looks
from co2lightning.report.collect import (
    HOURS,
    SOC_CLASSES,
    RunResult,
    SiteResult,
    looks_of,
    soc_band,
)
from co2lightning.report.looks import RunLook
from co2lightning.report.tables import (
    all_sessions_table,
    comparison_table,
    convergence_table,
    in_page,
    table_in_page,
)
from co2lightning.sim.evaluate import TITLES, Evaluation, mean_interval, summarise
from co2lightning.sim.schedule import evaluation_soc
from co2lightning.site.model import Floats

_SESSION_KEYS = (
    *("session_timestamp", "duration_seconds", "status", "device"),
    *("start_episode", "end_episode"),
)


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
    run_looks = looks_of(results)
    parts = {
        "style_hash": _sha256(style),
        "script_hash": _sha256(script),
        "style": style,
        "script": script,
        "lead": "".join(_lead(result) for result in results),
        "sites": "\n".join(_site(i, result) for i, result in enumerate(results)),
        "training": _training(results),
        "data": _as_json({"sites": [_site_data(result, run_looks) for result in results]}),
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


def _site_data(result: SiteResult, run_looks: dict[str, RunLook]) -> dict[str, Any]:
    site, references = result.site, result.references
    days = site.held_out_days
    return {
        "name": site.name,
        "days": list(references.days),
        "typical_day": result.typical_day,
        "soc_start": _rounded(evaluation_soc(site)[days].double().numpy(), 3),
        "hours": HOURS,
        "soc_classes": SOC_CLASSES,
        "soc_band": soc_band(site.battery),
        "heat_limit_kw": {what: result.heat_limit_kw(what) for what in ("battery_kw", "ev_kw")},
        "pv_kw": _rounded(site.pv_kw[days], 1),
        "load_kw": _rounded(site.load_kw[days], 1),
        "carbon": _rounded(site.carbon_kg_per_kwh[days], 3),
        "policies": [
            {"key": name, "title": TITLES[name], "look": name, **_policy_data(name, references)}
            for name in references.policies
        ],
        "runs": [_run_data(run, run_looks[run.name]) for run in result.runs],
    }


def _run_data(run: RunResult, look: RunLook) -> dict[str, Any]:
    return {
        "key": run.name,
        "title": run.title,
        "look": look.classes,
        "mark": look.mark,
        "episode": run.episode,
        "curve": [
            [m["episode"], _number(m.get("co2_kg"), 2), _number(m.get("co2_vs_uncontrolled"), 4)]
            for m in run.metrics
            if m.get("co2_kg") is not None
        ],
        **_policy_data("agent", run.evaluation),
        "heat": {
            "battery_kw": _rounded(run.heat.battery_kw, 1),
            "ev_kw": _rounded(run.heat.ev_kw, 1),
            "steps": run.heat.steps.astype(int).tolist(),
        },
        "sessions": [
            {key: session[key] for key in _SESSION_KEYS} for session in run.row["sessions"]
        ],
    }


def _policy_data(name: str, evaluation: Evaluation) -> dict[str, Any]:
    summaries, plan = summarise(evaluation), evaluation.schedules[name]
    summary = summaries[name]
    return {
        "schedule": {
            "ev_kw": _rounded(plan.ev_kw, 1),
            "battery_kw": _rounded(plan.battery_kw, 1),
            "grid_import_kw": _rounded(plan.grid_import_kw, 1),
            "soc": _rounded(plan.soc, 3),
            "co2_kg": _rounded(plan.co2_kg, 3),
        },
        "co2_kg": _rounded(evaluation.policies[name].co2_kg, 2),
        "mean_kg": _number(summary.co2_kg, 3),
        "mean_interval_kg": _number(summary.co2_kg_interval, 3),
        "vs_rbc_b_kg": _number(summary.vs_rbc_b_kg, 3),
        "vs_rbc_b_interval_kg": _number(summary.vs_rbc_b_kg_interval, 3),
        "share": _number(summary.co2_kg / max(summaries["uncontrolled"].co2_kg, 1e-9), 4),
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
    run = min(result.runs, key=lambda run: run.summary.co2_kg)
    best, references = run.summary, result.references.policies
    rival = min(RULES, key=lambda name: references[name].co2_kg.mean())
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
        share = in_page(HELD_OUT["gap_closed"], best._asdict())
        closed = f" It closes {share} of the gap to the optimum."
    paired = {"vs_rbc_b_kg": difference_kg, "vs_rbc_b_kg_interval": interval}
    difference = in_page(HELD_OUT["vs_rbc_b_kg"], paired)
    return (
        f"<p>On {days} held-out day{'' if days == 1 else 's'} of <b>{escape(result.site.name)}</b>,"
        f" <b>{escape(run.title)}</b> (episode {run.episode}) emits {best.co2_kg:.1f} kg of CO2 a "
        f"day, {difference} kg against the best control without learning, {TITLES[rival]}{verdict}."
        f"{closed}</p>"
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
    battery = site.battery
    sockets = ", ".join(f"{s.count} {escape(s.name)} sockets" for s in site.sockets)
    facts = (
        f"{site.pv_kwp:g} kWp of PV, battery {battery.capacity_kwh:g} "
        f"kWh / {battery.power_kw:g} kW, {sockets}; {len(site.days)} days of which"
    )
    foreign = "".join(
        f'<p class="warning">{escape(run.name)} was trained on {escape(run.trained_on[0])} '
        f"(sha256 {escape(run.trained_on[1][:12])}), not on this site.</p>"
        for run in result.runs
        if run.trained_on[1] != site.sha256
    )
    figure = f'<div class="chart" data-site="{index}" data-chart='
    return f"""
<section>
<h2>Site {escape(site.name)}</h2>
<p class="facts">{facts} {count} held-out days, {result.references.days[0]} to
{result.references.days[-1]}. sha256 {site.sha256[:12]}.</p>
{foreign}
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
from episode to episode. Large marks and straight lines: the <em>held-out</em> days, without
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
days. Grey: the run was never there. What lies beyond the scale has the colour of its end; each
cell's own figure shows under the pointer. Source: the files named under the table, {held_out}.
</figcaption></figure>
</section>"""


def _comparison(result: SiteResult) -> str:
    rows = [
        {"policy": run.title, "episode": run.episode, **run.summary._asdict()}
        for run in result.runs
    ]
    rows += [
        {"name": name, "policy": TITLES[name], **summary._asdict()}
        for name, summary in summarise(result.references).items()
    ]
    return table_in_page(comparison_table(rows))


def _training(results: Sequence[SiteResult]) -> str:
    runs = [run.row for result in results for run in result.runs]
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
