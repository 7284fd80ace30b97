"""Every table, once: what it shows as plain data, then for the terminal and for the page.

Needs no torch: `history` starts without it.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from rich.table import Table as TerminalTable

from co2lightning.metrics import HELD_OUT, TRAINING, Metric, Settled
from co2lightning.runs.run import TrainingCheckpoint

_Row = dict[str, Any]

_RUN = Metric("name", "run")
_SESSION = (
    Metric("session_timestamp", "begun"),
    Metric("episodes", "episodes", "{}"),
    Metric("episodes_count", "number", "{}"),
    Metric("duration_seconds", "seconds", "{:.1f}"),
    Metric("device", "device"),
)
_OF = "of "  # begins the key of a column whose heading is a policy's title
_FIGURES = [metric for metric in TRAINING.values() if metric.heading]
# Where there are prices; where drivers announce; where it was evaluated.
_SOME_HAVE = "peak_import_kw", "cost", "misled_kwh", "eval_vs_uncontrolled"


def summarize(run: TrainingCheckpoint) -> _Row:
    """Return what there is to tell of a run, as plain data.

    `last` and `best` are the metrics of an episode, empty where there is none; the best episode
    is the one with the lowest share of its own days' uncontrolled CO2.
    """
    history, metadata = run.load_history(), run.load_metadata()
    sessions: list[_Row] = history["trainings"]
    living = run.is_running()
    for session in sessions:
        if session["status"] == "running" and not (living and session is sessions[-1]):
            session["status"] = "killed"
    metrics = [row for session in sessions for row in session["metrics"]]
    kept = [row for row in history["checkpoints"] if not row.get("pruned")]
    return {
        "name": run.name,
        "agent": history["agent"],
        "total_episodes": history["total_episodes"],
        "last": metrics[-1] if metrics else {},
        "best": metadata["best_episode"] or {},
        "checkpoints": len(kept),
        "status": sessions[-1]["status"] if sessions else "empty",
        "sessions": sessions,
    }


# --- what they show ------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table as plain data.

    Attributes:
        columns: From left to right.
        rows: Values by the columns' keys; None where one is not known.
        title: In a terminal, above it.
        caption: In a terminal, below it.
        boxed: In a terminal, whether it has lines; then a cell that is not known is empty.
        whole: In a narrow terminal, columns that keep their width beside those of metrics.
    """

    columns: Sequence[Metric]
    rows: Sequence[_Row]
    title: str | None = None
    caption: str | None = None
    boxed: bool = False
    whole: Sequence[str] = ()


def runs_table(runs: Iterable[_Row]) -> Table:
    """Return the table of runs, each as `summarize` tells it."""
    rows: list[_Row] = []
    for run in runs:
        last, best = run["last"], run["best"]
        shown = {"episode": f"last {last.get('episode', '-')}", "number": len(run["sessions"])}
        rows.append({**run, **shown, **_figures(last)})
        started = best.get("eval_start_vs_uncontrolled")
        if started is not None and started <= best["eval_vs_uncontrolled"]:
            rows.append({"episode": "best start", "eval_vs_uncontrolled": started})
        elif best:
            rows.append({"episode": f"best {best['episode']}", **_figures(best)})
    columns = (
        _RUN,
        Metric("agent", "agent"),
        Metric("total_episodes", "episodes", "{}"),
        Metric("episode", "episode", "{}"),
        *_known(rows),
        Metric("checkpoints", "checkpoints", "{}", "check-\npoints"),
        Metric("number", "sessions", "{}"),
        Metric("status", "status"),
    )
    caption = "of uncontrolled: CO2 as a share of the same days without control"
    if any(row.get("eval_vs_uncontrolled") is not None for row in rows):
        caption += "; without noise: what is made small, settled, so in training weeks in one go"
    return Table(columns, rows, caption=caption, whole=("total_episodes", "episode"))


def sessions_table(run: _Row) -> Table:
    """Return the sessions of one run with the figures of their last episodes."""
    rows = _sessions(run)
    columns = (*_SESSION, Metric("status", "status"), *_known(rows))
    return Table(columns, rows, title="\nsessions")


def all_sessions_table(runs: Iterable[_Row]) -> Table:
    """Return the sessions of several runs."""
    columns = (_RUN, *_SESSION, Metric("status", "ended"))
    return Table(columns, [session for run in runs for session in _sessions(run)])


def convergence_table(runs: Iterable[_Row]) -> Table:
    """Return the mean figures of all sessions, each against the session before it."""
    co2, share, unmet = (TRAINING[key] for key in ("co2_kg", "co2_vs_uncontrolled", "unmet_kwh"))
    rows = [means for run in runs for means in _convergence(run)]
    columns = (
        *(_RUN, Metric("episodes", "episodes", "{}"), co2),
        Metric("change_kg", "change, kg", "{:+.1f}"),
        Metric("change_percent", "change", "{:+.0f}%"),
        share._replace(form="{:.1%}"),
        *(metric for metric in _known(rows) if metric.key == "cost"),
        unmet,
    )
    return Table(columns, rows)


def newest_sessions_table(runs: Iterable[_Row]) -> Table:
    """Return the mean CO2 of each run's newest session against the session before it."""
    columns = (
        _RUN,
        Metric("before_kg", "previous session", "{:.1f}"),
        Metric("co2_kg", "this session", "{:.1f}"),
        Metric("change_kg", "change kg", "{:+.1f}"),
        Metric("change_percent", "change %", "{:+.0f}"),
        Metric("unmet_kwh", "unmet kWh", "{:.1f}"),
    )
    rows = [means[-1] for run in runs if (means := _convergence(run))]
    return Table(columns, rows, title="\nmean CO2 of a session's episodes, kg")


def comparison_table(policies: Iterable[_Row], settled: Settled, title: str | None = None) -> Table:
    """Return policies side by side in held-out stretches.

    Args:
        policies: Each with its title as `policy` and its figures; a rule or the optimum with its
            `name`, a run with its `episode` where that is shown.
        settled: What they are settled by and compared with.
        title: Above it, in a terminal.
    """
    nothing = dict.fromkeys(("vs_best", "vs_best_interval"))
    rows = [
        row | nothing if "name" in row and row["policy"] == settled.best else row
        for row in policies
    ]
    episode = [Metric("episode", "episode", "{}")] if "episode" in rows[0] else []
    known = [m for m in settled.metrics() if any(row.get(m.key) is not None for row in rows)]
    misled = ""
    if any(metric.key == "misled_kwh" for metric in known):
        misled = " Misled: of it, by what drivers announced."
    certain = rows[0].get("co2_kg_interval") is not None
    interval = "± half the 95 % interval over stretches. " if certain else ""
    return Table(
        (Metric("policy", "policy"), *episode, *known),
        rows,
        title,
        caption=f"{interval}Each stretch in one go, settled by what the best operation of the next "
        f"two days would cost. {metered_text(settled)}Gap: from uncontrolled to the optimum. "
        f"Unmet: beyond what charging on arrival leaves.{misled}",
        boxed=True,
    )


def metered_text(settled: Settled) -> str:
    """Return which of CO2 and cost are the meter's alone, "" without prices, else with a space."""
    if settled.currency is None:
        return ""
    others = {"co2_kg": "Cost is", "cost": "CO2 is", "objective": "CO2 and cost are"}
    return f"{others[settled.key]} the meter's alone, not settled. "


def stretches_table(
    stretches: Sequence[_Row],
    policies: Mapping[str, Sequence[_Row]],
    settled: Settled,
    title: str | None = None,
) -> Table:
    """Return each held-out stretch with what policies are settled by.

    Args:
        stretches: Each with `begin`, `hours`, `turned_away_kwh` and `clipped_kwh`.
        policies: Title -> what the policy did in each stretch, `settled` and `unmet_kwh`.
        settled: What that is.
        title: Above it, in a terminal.
    """
    form = HELD_OUT[settled.key].form
    rows: list[_Row] = []
    for w, stretch in enumerate(stretches):
        whole = {_OF + name: figures[w]["settled"] for name, figures in policies.items()}
        whole["unmet_kwh"] = max(figures[w]["unmet_kwh"] for figures in policies.values())
        whole |= {key: stretch[key] for key in ("turned_away_kwh", "clipped_kwh")}
        a_day = {key: value / stretch["hours"] * 24 for key, value in whole.items()}
        rows.append({"begin": stretch["begin"], **a_day})
    soft, hard = "uncon\u00adtr", "uncon-\ntr"  # where page and terminal may break the longest one
    columns = (
        Metric("begin", "from"),
        *(
            Metric(_OF + name, name.replace("uncontr", soft), form, name.replace("uncontr", hard))
            for name in policies
        ),
        Metric("unmet_kwh", "unmet, kWh/day", "{:.3f}"),
        Metric("turned_away_kwh", "turned away, kWh/day", "{:.1f}", "turned\naway"),
        Metric("clipped_kwh", "clipped, kWh/day", "{:.1f}", "clipped"),
    )
    caption = (
        f"Settled {settled.name} of each policy{f' in {settled.unit}' if settled.unit else ''} a "
        "day. Unmet: the most of any of them. Turned away, "
        "clipped: of the site's sessions, in kWh a day."
    )
    return Table(columns, rows, title, caption, boxed=True, whole=("begin",))


def perturbed_table(
    worlds: Mapping[str, Mapping[str, _Row]], policies: Mapping[str, str], settled: Settled
) -> Table:
    """Return what policies come to where held-out days go otherwise than they did.

    Args:
        worlds: What is otherwise -> per policy what is settled, the share of the gap, how much of
            that without perturbation is left, what is unmet; the days as they are first.
        policies: Name -> title of those to show.
        settled: What they are settled by.
    """
    rows, first = list[_Row](), next(iter(policies))
    for world, told in worlds.items():
        bounds = {name: told[name][settled.key] for name in ("uncontrolled", "optimum")}
        shares = {f"gap_{name}": told[name]["gap_closed"] for name in policies}
        left = {f"left_{name}": told[name].get("gain_left", "") for name in policies}
        unmet_kwh = told[first]["unmet_kwh"]
        rows.append({"world": world, **bounds, **shares, **left, "unmet_kwh": unmet_kwh})
    form = HELD_OUT[settled.key].form
    each = [
        metric
        for name, title in policies.items()
        for metric in (
            Metric(f"gap_{name}", f"{title}, gap closed", "{:.1%}", f"{title}\ngap"),
            Metric(f"left_{name}", "left", "{:.0%}"),
        )
    ]
    columns = (
        Metric("world", "held-out days with"),
        Metric("uncontrolled", "uncontrolled", form, "uncon-\ntrolled"),
        Metric("optimum", "optimum", form),
        *each,
        Metric("unmet_kwh", "unmet, kWh/day", "{:.3f}"),
    )
    caption = (
        f"Settled {settled.name} without control and at best"
        f"{f' in {settled.unit}' if settled.unit else ''} a day, and share of the way between. "
        "Left: of that share on the days as they are. What is fitted and chosen is by the training "
        f"days. Unmet: of {policies[first]}; shares count it as served at the mean price."
    )
    return Table(columns, rows, "perturbed", caption, boxed=True, whole=("world",))


def _figures(metrics: _Row) -> _Row:
    """Return what is shown of an episode; where nothing is emitted there is no share of it."""
    shown = {metric.key: metrics.get(metric.key) for metric in _FIGURES}
    uncontrolled_kg = metrics.get("uncontrolled_kg")
    if uncontrolled_kg is not None and uncontrolled_kg <= 1e-6:
        shown["co2_vs_uncontrolled"] = None
    return shown


def _known(rows: Sequence[_Row]) -> list[Metric]:
    """Return the figures to show: some only where an episode has them."""
    lacking = {key for key in _SOME_HAVE if all(row.get(key) is None for row in rows)}
    return [metric for metric in _FIGURES if metric.key not in lacking]


def _sessions(run: _Row) -> list[_Row]:
    return [
        {
            **session,
            "name": run["name"],
            "episodes": _episodes(session),
            **_figures(session["metrics"][-1] if session["metrics"] else {}),
        }
        for session in run["sessions"]
    ]


def _episodes(session: _Row) -> str | None:
    first, last = session["start_episode"], session["end_episode"]
    return f"{first}-{last}" if last >= first else None


def _convergence(run: _Row) -> list[_Row]:
    """Return the means over each session's episodes, of the sessions that know a CO2."""
    found: list[_Row] = []
    for session in run["sessions"]:
        means = {key: _mean(session["metrics"], key) for key in TRAINING}
        if means["co2_kg"] is None:
            continue
        before_kg = found[-1]["co2_kg"] if found else None
        row = {**means, "name": run["name"], "episodes": _episodes(session), "before_kg": before_kg}
        row["unmet_kwh"] = means["unmet_kwh"] or 0.0
        row["change_kg"] = means["co2_kg"] - before_kg if before_kg else None
        row["change_percent"] = 100 * (means["co2_kg"] / before_kg - 1.0) if before_kg else None
        found.append(row)
    return found


def _mean(metrics: list[_Row], key: str) -> float | None:
    values = [row[key] for row in metrics if row.get(key) is not None]
    return sum(values) / len(values) if values else None


# --- how they look -------------------------------------------------------------------------------


def in_terminal(table: Table) -> TerminalTable:
    """Return a table as `show_tables` prints it."""
    bare: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0)}
    bare |= {"title_justify": "left", "caption_justify": "left"}
    shown = TerminalTable(title=table.title, caption=table.caption, **({} if table.boxed else bare))
    for column in table.columns:
        heading = column.narrow or column.heading.replace(", ", "\n")
        justify = "right" if column.form else "left"
        whole = bool(column.tag) or column.key in table.whole
        shown.add_column(heading, justify=justify, no_wrap=whole)
    for row in table.rows:
        shown.add_row(*(_text(c, row, "" if table.boxed else "-") for c in table.columns))
    return shown


def table_in_page(table: Table) -> str:
    """Return a table as HTML; a column of text has `text` for its class, numbers stand right."""
    kinds = ["" if column.form else ' class="text"' for column in table.columns]
    named = [' class="name"' if c.key.startswith(_OF) else "" for c in table.columns]
    head = "".join(
        f'<th scope="col"{kind}>{escape(column.heading)}</th>'
        for kind, column in zip(map(str.__add__, kinds, named), table.columns, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td{kind} data-label="{escape(column.heading)}">{escape(in_page(column, row))}</td>'
            for kind, column in zip(kinds, table.columns, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def in_page(column: Metric, row: _Row) -> str:
    """Return a row's value as the page writes it: a true minus, a space before the %."""
    text = _text(column, row, "")
    if isinstance(row.get(column.key), str):
        return text
    return text.replace("-", "\N{MINUS SIGN}").replace("%", " %")


def _text(column: Metric, row: _Row, unknown: str) -> str:
    value, interval = row.get(column.key, ""), row.get(f"{column.key}_interval")
    if value is None or value == "":
        return unknown if value is None else ""
    text = (column.form or "{}").format(value)
    half = "" if interval is None else column.form.replace("+", "").format(interval)
    return f"{text} ± {half}" if half else text
