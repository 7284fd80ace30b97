"""`co2lightning test`: a run or a rule on held-out stretches, beside the rules and the optimum."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

from co2lightning.agents.load import policy_of
from co2lightning.commands.run import (
    check_bound,
    is_rule,
    open_run,
    run_parser,
    site_of_rules,
    unseen,
)
from co2lightning.control.moves import kind_of
from co2lightning.places import check_output
from co2lightning.report.comparison import (
    comparison_tables,
    evaluation_data,
    knowledge_data,
    perturbed_data,
    verdict,
)
from co2lightning.report.steps import steps_of
from co2lightning.report.tables import in_terminal
from co2lightning.runs.files import write_atomic
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.evaluate import (
    MPC_TITLE,
    TITLES,
    Evaluation,
    beside,
    elsewhere,
    evaluate,
    summarise,
    violations,
)
from co2lightning.sim.worlds import knowing, perturbed
from co2lightning.site.model import Site
from co2lightning.terminal import say, show_tables


def main(argv: list[str]) -> int:
    """Run `co2lightning test` and return its exit code.

    Raises:
        UserError: There is no such run or rule, the file is no episode, the site cannot be read.
    """
    parser = run_parser(
        "test",
        "Evaluate a run's newest episode, or a rule, on the held-out weeks, beside the rules and "
        "the optimum: CO2 in kg a day, energy in kWh a day, power in kW.",
        "co2lightning test PPO --json",
    )
    parser.add_argument("--json", action="store_true", help="data on standard output")
    parser.add_argument(
        "--mpc",
        action="store_true",
        help="beside them model predictive control: a plan of the next day in every step; a second "
        "or more for each day, once",
    )
    parser.add_argument(
        "--perturb",
        action="store_true",
        help="below them what of the gain is left where held-out days go otherwise: departures an "
        "hour off, vehicles and PV 20 %% more and less, the price expected as usual",
    )
    parser.add_place(
        "--steps",
        help="every step of every policy there, as CSV: what predict writes, with the policy",
    )
    parser.add_place(
        "--logs.dir",
        dest="logs",
        default="lightning_logs",
        metavar="DIR",
        help="of TensorBoard; the figures go there too [default: lightning_logs]",
    )
    arguments = parser.parse_args(argv)
    steps = check_output("--steps", arguments.steps)
    name, keep = arguments.name, Path(arguments.directory) / "references"
    if is_rule(name, arguments):
        trained, site, agent = None, site_of_rules([name], arguments), None
        evaluation = _first(evaluate(None, site, keep=keep), name)
        who, title, told = "", TITLES[name], {"rule": name}
    else:
        TrainingCheckpoint(Path(arguments.directory) / name, logs=Path(arguments.logs) / name)
        trained = open_run(arguments)
        agent, site = trained.agent, unseen(trained.facts, trained.site)
        evaluation = evaluate(policy_of(agent, site), site, device=agent.device, keep=keep)
        who = type(agent).__name__
        title = f"{who}, episode {trained.episode}"
        action = kind_of(agent.action_dim)
        told = {"agent": who, "action": action, "episode": trained.episode}
    if arguments.mpc:
        evaluation = _with_mpc(evaluation, site, keep)
    if steps:
        write_atomic(steps, steps_of(site, evaluation, who).encode())
    data = evaluation_data(evaluation)

    def in_worlds(worlds: dict[str, Site]) -> dict[str, Evaluation]:
        """Return rules and agent in other worlds of the site."""
        found: dict[str, Evaluation] = {}
        for key, world in worlds.items():
            found[key] = elsewhere(evaluation, world, keep)
            if agent:
                found[key] = evaluate(policy_of(agent, world), world, found[key], agent.device)
        return found

    data["knowledge"] = knowledge_data(data, in_worlds(knowing(site)))
    if arguments.perturb:
        data["perturbed"] = perturbed_data(data, in_worlds(perturbed(site)))
    if arguments.json:
        say(json.dumps({"site": site.name, **told, **data}, allow_nan=False))
    else:
        tables, below = comparison_tables(data, site.name, title, who)
        show_tables(*map(in_terminal, tables), width=110)  # squeezed it loses its numbers
        say(*below, verdict(data, "agent" if trained else name, who or TITLES[name]))
    logs = Path(arguments.logs)
    if trained and trained.path.parent.resolve() == trained.run.directory.resolve():
        try:
            if (logs / name).is_dir():
                _write_scalars(logs, evaluation, trained.episode, trained.run)
        except OSError as error:  # perhaps others' files, which one may only read
            say(f"{logs}: {error.strerror}; TensorBoard does not get these figures", err=True)
    return check_bound(violations(evaluation))


def _first(evaluation: Evaluation, name: str) -> Evaluation:
    """Put one of an evaluation's policies before the others."""
    policies = {name: evaluation.policies[name], **evaluation.policies}
    schedules = {name: evaluation.schedules[name], **evaluation.schedules}
    return replace(evaluation, policies=policies, schedules=schedules)


def _with_mpc(evaluation: Evaluation, site: Site, keep: Path) -> Evaluation:
    """Put model predictive control beside the others; show on standard error how far it is."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from co2lightning.sim.mpc_stretches import play_mpc

    count = len(site.stretches)
    live = Progress(console=Console(stderr=True), transient=True)
    if not live.console.is_terminal or "NO_COLOR" in os.environ:
        live = None

    def done(so_far: int) -> None:
        if live:
            live.update(task, completed=so_far)
        else:
            say(f"{MPC_TITLE}: {so_far} of {count} stretches", err=True)

    with live or contextlib.nullcontext():
        task = live.add_task(MPC_TITLE, total=count) if live else TaskID(0)
        return beside(evaluation, site, "mpc", play_mpc(site, keep, done))


def _write_scalars(logs: Path, found: Evaluation, episode: int, run: TrainingCheckpoint) -> None:
    """Write `test/*` of an episode for TensorBoard, and the rules' and the optimum's lines.

    In a directory of its own below the run's: there TensorBoard reads the newest file and never
    returns to an older one, so a second file beside that of a running training would freeze its
    curve; and the purge that a resume orders would take these points too.
    """
    from co2lightning.train.board import replace_scalars, write_references

    summaries = {name: summary._asdict() for name, summary in summarise(found).items()}
    own = {f"test/{name}": value for name, value in summaries.pop("agent").items()}
    replace_scalars(logs / run.name / "test", own, [episode], f"{episode:04d}")
    write_references(logs, found.site, summaries, run.get_next_episode() - 1)
