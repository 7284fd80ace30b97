"""Every table of the terminal, and the figures in it as plain data; needs no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.table import Table

from co2lightning.runs.run import TrainingCheckpoint

Row = dict[str, Any]


def summarize(run: TrainingCheckpoint) -> Row:
    """Return what there is to tell of a run, as plain data.

    `last` and `best` are the metrics of an episode, empty where there is none; the best episode
    is the one with the lowest share of its own days' uncontrolled CO2.
    """
    history, metadata = run.load_history(), run.load_metadata()
    sessions: list[Row] = history["trainings"]
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


class SessionMeans(NamedTuple):
    """Means over a session's episodes; the changes are against the session before it."""

    co2_kg: float
    change_kg: float | None
    change: float | None  # share
    co2_vs_uncontrolled: float | None
    unmet_kwh: float


def convergence(run: Row) -> list[tuple[Row, SessionMeans]]:
    """Return the sessions of a run, as `summarize` tells it, that know a CO2, with their means."""
    found: list[tuple[Row, SessionMeans]] = []
    for session in run["sessions"]:
        now = _mean(session["metrics"], "co2_kg")
        if now is None:
            continue
        before = found[-1][1].co2_kg if found else None
        means = SessionMeans(
            co2_kg=now,
            change_kg=now - before if before else None,
            change=now / before - 1.0 if before else None,
            co2_vs_uncontrolled=_mean(session["metrics"], "co2_vs_uncontrolled"),
            unmet_kwh=_mean(session["metrics"], "unmet_kwh") or 0.0,
        )
        found.append((session, means))
    return found


def _mean(metrics: list[Row], key: str) -> float | None:
    values = [row[key] for row in metrics if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def runs_table(runs: list[Row]) -> Table:
    """Return the table of runs, each as `summarize` tells it."""
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        caption="of uncontrolled: CO2 as a share of the same days without control",
        caption_justify="left",
    )
    for heading in ("run", "agent"):
        table.add_column(heading)
    for heading in ("episodes", "episode", "CO2 kg", "of uncon-\ntrolled", "unmet\nkWh"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("check-\npoints", "sessions"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    for run in runs:
        last, best = run["last"], run["best"]
        table.add_row(
            run["name"],
            run["agent"],
            str(run["total_episodes"]),
            *(f"last {last.get('episode', '-')}", *_figures(last)),
            str(run["checkpoints"]),
            str(len(run["sessions"])),
            run["status"],
        )
        if best:
            table.add_row("", "", "", f"best {best['episode']}", *_figures(best))
    return table


def sessions_table(run: Row) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="\nsessions", title_justify="left")
    table.add_column("begun")
    for heading in ("episodes", "number", "seconds"):
        table.add_column(heading, justify="right")
    for heading in ("device", "status"):
        table.add_column(heading)
    for heading in ("CO2 kg", "of uncon-\ntrolled", "unmet\nkWh"):
        table.add_column(heading, justify="right", no_wrap=True)
    for session in run["sessions"]:
        first, last = session["start_episode"], session["end_episode"]
        table.add_row(
            session["session_timestamp"],
            f"{first}-{last}" if last >= first else "-",
            str(session["episodes_count"]),
            f"{session['duration_seconds']:.1f}",
            *(session["device"], session["status"]),
            *_figures(session["metrics"][-1] if session["metrics"] else {}),
        )
    return table


def _figures(metrics: Row) -> list[str]:
    """Return CO2, its share of the uncontrolled and the energy not served; "-" where unknown."""
    return [
        "-" if value is None else form.format(value)
        for key, form in (
            ("co2_kg", "{:.1f}"),
            ("co2_vs_uncontrolled", "{:.0%}"),
            ("unmet_kwh", "{:.1f}"),
        )
        for value in [metrics.get(key)]
    ]
