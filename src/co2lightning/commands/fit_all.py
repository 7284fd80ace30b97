"""`co2lightning fit-all`: every agent in a process of its own, then the tables."""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from co2lightning.agents import AGENTS
from co2lightning.commands.run import Parser
from co2lightning.errors import UserError
from co2lightning.report.tables import in_terminal, newest_sessions_table, runs_table, summarize
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.terminal import say, show_tables, take_signals, tell


def main(argv: Sequence[str]) -> int:
    """Train the agents side by side and show where they stand; 1 if one of them failed."""
    options, passed_on = parse(argv)
    fleet = _Fleet(options.jobs)
    codes = fleet.run({agent: ["--model", agent, *passed_on] for agent in options.agents})
    if fleet.signum:
        tell("Stopped; fit-all --ckpt_path last continues")
        return 128 + fleet.signum
    runs = [TrainingCheckpoint(Path(options.directory) / agent) for agent in options.agents]
    rows = [summarize(run) for run in runs if run.episodes()]
    tables = runs_table(rows), newest_sessions_table(rows)
    show_tables(*map(in_terminal, tables), width=120)
    failed = {agent: code for agent, code in codes.items() if code}
    if failed:
        named = ", ".join(f"{agent} (exit code {code})" for agent, code in failed.items())
        say(f"error: failed: {named}; the others are done", err=True)
        # One line each was already printed; 2 only where nothing at all could be done.
        return 2 if set(failed.values()) == {2} and len(failed) == len(codes) else 1
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of `fit-all`, and the words that go on to each `fit`."""
    parser = Parser(
        "fit-all",
        "Train all agents, each in a process of its own; flags of fit are passed on.",
        "co2lightning fit-all --episodes 5 --ckpt_path last",
    )
    parser.add_argument(
        "--agents",
        type=lambda text: text.split(","),
        default=list(AGENTS),
        metavar="A,B",
        help=f"which agents [default: {','.join(AGENTS)}]",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="how many at once [default: one for each core]",
    )
    parser.add_directory()
    options, passed_on = parser.parse_known_args(list(argv))
    for agent in options.agents:
        if agent not in AGENTS:
            raise UserError(f"--agents {agent}: no such agent; choose from {','.join(AGENTS)}")
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: must be at least 1")
    for argument in passed_on:
        if argument.partition("=")[0] in ("--name", "--config", "--model", "--print_config"):
            raise UserError(
                f"{argument.partition('=')[0]}: fit-all trains each agent by its own recipe under "
                "its own name; use fit for this"
            )
    words = [word for argument in passed_on for word in argument.split("=", 1)]
    ckpt_path = [b for a, b in itertools.pairwise(words) if a == "--ckpt_path"]
    if any(path != "last" for path in ckpt_path):
        raise UserError(f"--ckpt_path {ckpt_path[0]}: fit-all takes last only; use fit for a file")
    return options, [*passed_on, "--checkpoints.dir", options.directory]


class _Fleet:
    """Runs `co2lightning fit` in several processes and passes signals on to them."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.signum = 0
        self._living: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def run(self, commands: dict[str, list[str]]) -> dict[str, int]:
        """Run every command and return its exit code; a signal stops what has not begun."""
        previous = take_signals(self._pass_on)
        width = max(len(name) for name in commands)
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                futures = {
                    name: pool.submit(self._one, name.ljust(width), arguments)
                    for name, arguments in commands.items()
                }
                return {name: future.result() for name, future in futures.items()}
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _one(self, label: str, arguments: list[str]) -> int:
        with self._lock:
            if self.signum:
                return 128 + self.signum
            process = subprocess.Popen(
                [sys.executable, "-m", "co2lightning", "fit", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="backslashreplace",
                env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            )
            self._living.add(process)
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                tell(label + "  " + line.rstrip("\n"))
        code = process.wait()
        self._living.discard(process)
        return code

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for process in list(self._living):
            # A terminal's Ctrl-C reaches the children by itself; a second signal would kill them.
            if signum != signal.SIGINT or not os.isatty(0):
                process.send_signal(signum)
