"""`co2lightning history` and `verify`: what was trained so far, and whether its files are good.

Needs neither torch nor Lightning: what the tables show stands in history.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rich.table import Table

from co2lightning.checkpoints import TrainingCheckpoint
from co2lightning.errors import UserError
from co2lightning.storage import local
from co2lightning.terminal import say, show_tables

Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Show the runs, or one run with its sessions."""
    parser = _parser(
        "history",
        "Show what was trained so far: every run, or one run with its sessions. CO2 in kg a day, "
        "energy in kWh a day, times in seconds.",
        "co2lightning history PPO",
    )
    parser.add_argument("--json", action="store_true", help="the same as data on standard output")
    options = parser.parse_args(argv)
    runs = [summarize(run) for run in find_runs(options.name, options.directory)]
    if options.json:
        say(*json.dumps({"runs": runs}, indent=1).split("\n"))
    elif not runs:
        say(f"No runs in {options.directory}; co2lightning fit --config ppo.yaml starts one")
    else:
        tables = [runs_table(runs), *([_sessions_table(runs[0])] if options.name else [])]
        show_tables(*tables, width=120)
    return 0


def verify_main(argv: Sequence[str]) -> int:
    """Check the files of the runs; one line for each problem, exit code 1 if there is any."""
    parser = _parser(
        "verify",
        "Check run directories: checksums, history against files, replay. Exit code 1 if anything "
        "is wrong.",
        "co2lightning verify PPO",
    )
    options = parser.parse_args(argv)
    runs = find_runs(options.name, options.directory)
    if not runs:
        raise UserError(f"no runs in {options.directory}; --checkpoints.dir says where they are")
    found = False
    for run in runs:
        problems = run.verify()
        found = found or bool(problems)
        for problem in problems:
            say(f"{run.name}: {problem}")
        if not problems:
            files = len(run.episodes())
            say(f"{run.name}: ok, {files} checkpoint{'' if files == 1 else 's'}")
        if left := run.leftovers():
            say(
                f"{run.name}: the last session was cut off ({', '.join(left)}); "
                "the next start puts that in order"
            )
    return 1 if found else 0


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


class Place(argparse.Action):
    """Takes a file or directory of this machine's disks."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, local(str(option_string), values))


class Parser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message}; --help shows what there is")

    def add_directory(self) -> None:
        """Add the flag that says where the runs are, as `directory`."""
        self.add_argument(
            "--checkpoints.dir",
            dest="directory",
            action=Place,
            default="checkpoints",
            metavar="DIR",
            help="where the runs are [default: checkpoints]",
        )


def _parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"co2lightning {command}",
        description=description,
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a run [default: all]")
    parser.add_directory()
    return parser


def find_runs(name: str | None, place: str | Path) -> list[TrainingCheckpoint]:
    """Return the runs in a directory, by name."""
    directory = Path(place)
    names = sorted(p.name for p in directory.iterdir() if p.is_dir()) if directory.is_dir() else []
    runs = [TrainingCheckpoint(directory / n) for n in names if n[0] != "." and n != "archive"]
    runs = [run for run in runs if run.episodes() or run.load_history()["trainings"]]
    if name is None:
        return runs
    chosen = [run for run in runs if run.name == name]
    if not chosen:
        known = ", ".join(run.name for run in runs) or "none"
        raise UserError(f"{name}: no such run in {directory}; there are: {known}")
    return chosen


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


def _sessions_table(run: Row) -> Table:
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
