"""`co2lightning site`: what a site folder holds and what it is worth, without any training."""

from __future__ import annotations

import json
from collections.abc import Sequence

from co2lightning.commands.run import Parser, check_bound
from co2lightning.places import check_output_directory
from co2lightning.runs.files import write_atomic
from co2lightning.terminal import say, show_tables

_WHAT_IF = {
    "battery.capacity_kwh": "KWH",
    "battery.power_kw": "KW",
    "pv_kwp": "KWP",
    "grid_kw": "KW",
}
"""What `load_site` changes -> its unit."""


def main(argv: Sequence[str]) -> int:
    """Run a command about sites and return its exit code.

    Raises:
        UserError: There is no such command, or it cannot do what was asked.
    """
    example = "co2lightning site check iquitos"
    parser = Parser("site", "Look at sites; each command has a --help of its own.", example)
    words = "check: what a site folder holds, and what it is worth without training"
    parser.add_argument("command", metavar="COMMAND", choices=("check",), help=words)
    parser.parse_args(list(argv[:1]))
    return _check(argv[1:])


def _check(argv: Sequence[str]) -> int:
    """Run `co2lightning site check` and return its exit code.

    Raises:
        UserError: The folder or a file is missing or wrong, or an output cannot be written.
    """
    example = "co2lightning site check iquitos --battery.capacity_kwh 200"
    parser = Parser(
        "site check",
        "Tell what a site folder holds, what was done to it, and what uncontrolled charging, the "
        "rules and the optimum emit in its held-out stretches: CO2 in kg a day, energy in kWh a "
        "day, power in kW. Trains nothing and writes nothing into the folder.",
        example,
    )
    parser.hint = f"such as: {example}"
    parser.add_argument("site", metavar="DIR", help="a site folder or a shipped site")
    parser.add_argument("--json", action="store_true", help="data on standard output")
    parser.add_place(
        "--figures", metavar="DIR", help="also draw what it tells there, as PNG and as PDF"
    )
    for key, unit in _WHAT_IF.items():
        words = "what if it were so much" + ("; scales the series" if key == "pv_kwp" else "")
        parser.add_argument(f"--{key}", type=float, metavar=unit, help=words)
    parser.add_argument(
        "--env.objective",
        dest="objective",
        default="co2",
        metavar="WHAT",
        help="what is settled: co2, cost, or weights such as '{co2: 1, cost: 0.2}' [default: co2]",
    )
    parser.add_announced("true")
    options = parser.parse_args(list(argv))
    figures = check_output_directory("--figures", options.figures)
    changes = {k: value for k in _WHAT_IF if (value := getattr(options, k)) is not None}
    # Only now: torch takes seconds, a mistyped flag should not.
    from co2lightning.site.load import load_site

    site = load_site(options.site, changes, options.objective, options.announced is not False)
    from co2lightning.report.comparison import comparison_tables, evaluation_data
    from co2lightning.report.site import describe, site_table
    from co2lightning.report.tables import in_terminal
    from co2lightning.sim.evaluate import evaluate, violations

    facts = describe(site)
    if not options.json:  # at once: the optimum of a large site takes minutes
        show_tables(in_terminal(site_table(facts)), width=110)
        say("", *(f"- {note}" for note in site.notes), *([""] if site.notes else []))
    evaluation = evaluate(None, site, foresight=True)
    data = evaluation_data(evaluation)
    if options.json:
        say(json.dumps({**facts, "what_if": changes, **data}, allow_nan=False))
    else:
        tables, below = comparison_tables(data, site.name, "Without training")
        show_tables(*map(in_terminal, tables), width=110)
        say(*below)
    if figures:
        from co2lightning.report.figures import draw_site

        files = draw_site(site, evaluation)
        figures.mkdir(exist_ok=True)
        for name, content in files.items():
            write_atomic(figures / name, content, durable=False)
        say(*(str(figures / name) for name in files), err=options.json)
    return check_bound(violations(evaluation))
