"""The command `co2lightning report`: what it takes, what it refuses, what it writes."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from co2lightning.commands.run import (
    Parser,
    check_bound,
    find_runs,
    is_rule,
    refuse_objective,
    site_of_rules,
)
from co2lightning.errors import UserError
from co2lightning.places import check_output, check_output_directory
from co2lightning.runs.files import now, write_atomic
from co2lightning.terminal import say


def main(argv: Sequence[str]) -> int:
    """Write the report and return the exit code.

    Raises:
        UserError: No run to show, a damaged run, a site that cannot be read, an output that
            cannot be written; all found before the long part begins.
    """
    began = time.monotonic()
    parser = Parser(
        "report",
        "Write one HTML file that shows runs and rules: learning curves, the comparison on what is "
        "held out, sessions, every held-out day to look at. It needs no network.",
        "co2lightning report PPO SAC rbc_c --output report.html --figures figures",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="runs [default: all]; rules such as rbc_c, beside runs or on --env.site",
    )
    parser.add_argument(
        "--ckpt_path",
        dest="best",
        choices=("last", "best"),
        default="last",
        help="of each run the newest episode, or the best evaluated one [default: last]",
    )
    parser.add_place("--output", default="report.html", help="the report [default: report.html]")
    parser.add_place(
        "--figures",
        metavar="DIR",
        help="also write the figures there, as PNG and as PDF for papers",
    )
    parser.add_directory()
    parser.add_site("evaluate on this site [default: the one each run was trained on]")
    parser.add_objective()
    options = parser.parse_args(list(argv))
    output = check_output("--output", options.output)
    assert output is not None
    figures = check_output_directory("--figures", options.figures)
    names = list(dict.fromkeys(options.names))
    rules = [name for name in names if is_rule(name, options)]
    wanted = [name for name in names if name not in rules] or ([] if rules else [None])
    runs = [run for name in wanted for run in find_runs(name, options.directory)]
    if runs:
        refuse_objective(options, runs[0].name)
    elif not rules:
        raise UserError(
            f"no runs in {options.directory}; co2lightning fit --config ppo.yaml starts one, "
            "--checkpoints.dir says where they are"
        )
    # Only now: torch takes seconds, a mistyped flag should not.
    from co2lightning.report.collect import collect
    from co2lightning.report.page import render
    from co2lightning.sim.evaluate import violations

    keep = Path(options.directory) / "references"
    site = options.site if runs else site_of_rules(rules, options)
    results = collect(runs, rules, site, options.announced, keep, options.best == "best")
    command = shlex.join(["co2lightning", "report", *argv])
    page = render(results, command, now())
    files = {output: page}
    if figures:
        from co2lightning.report.figures import draw

        files |= {figures / file: data for file, data in draw(results).items()}
    try:
        for path, content in files.items():
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, content, durable=False)
    except OSError as error:
        # Not by the command line's own words, which are about a training that was cut.
        say(f"error: {error.filename}: {error.strerror}; nothing half written", err=True)
        return 1
    if figures:
        say(f"{figures}: {len(files) // 2} figures, each as PNG and as PDF")
    shown = [one for result in results for one in result.shown]
    counts = ("run", sum(len(result.runs) for result in results)), ("rule", len(rules))
    told = ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in counts if n)
    say(
        f"{options.output}: {told}, "
        f"{len(page) / 1e6:.1f} MB, {time.monotonic() - began:.0f} s; open it in a browser"
    )
    broken = [(one.name, line) for one in shown for line in violations(one.evaluation)]
    return check_bound([f"{name}, {line}" for name, line in broken])
