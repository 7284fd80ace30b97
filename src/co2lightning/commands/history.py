"""`co2lightning history` and `verify`: what was trained so far, and whether its files are good.

Needs neither torch nor Lightning: what the tables show stands in history.json.
"""

import json
from collections.abc import Sequence

from co2lightning.commands.run import Parser, find_runs
from co2lightning.errors import UserError
from co2lightning.report.tables import in_terminal, runs_table, sessions_table, summarize
from co2lightning.terminal import say, show_tables


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
        tables = [runs_table(runs), *([sessions_table(runs[0])] if options.name else [])]
        show_tables(*map(in_terminal, tables), width=120)
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


def _parser(command: str, description: str, example: str) -> Parser:
    parser = Parser(command, description, example)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a run [default: all]")
    parser.add_directory()
    return parser
