"""How good a policy is: the held-out days, paired with the rules and the optimum.

Every policy meets the same days with the same battery start, so policies are compared day by day:
days differ by 40-80 kg, policies by far less.

The physics runs in float32, as in training; the optimum is computed in float64. Both see the same
day, so the optimum may lie above a policy by rounding only: `tolerance_kg` says how much that is.

Shapes: D held-out days.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from scipy import stats

from co2lightning import trained_days
from co2lightning.agents import agent_class
from co2lightning.checkpoints import TrainingCheckpoint
from co2lightning.env import SiteDays
from co2lightning.errors import UserError
from co2lightning.history import Parser, Place
from co2lightning.observation import build_observer, observe
from co2lightning.physics import build_model
from co2lightning.rules import RULES, Rule
from co2lightning.schedule import Schedule, optimum_schedule, schedule
from co2lightning.site import STEP_H, Floats, Site, T, load_site, named_in
from co2lightning.terminal import say, show_tables

if TYPE_CHECKING:
    from co2lightning.agents.agent import Agent

TITLES = {
    "uncontrolled": "uncontrolled",
    "rbc_a": "RBC A",
    "rbc_b": "RBC B",
    "optimum": "optimum (LP)",
}


class Figures(NamedTuple):
    """What a policy did on each day; every field is [D]."""

    co2_kg: Floats
    unmet_kwh: Floats  # beyond what charging on arrival would also leave
    grid_import_kwh: Floats
    curtailed_kwh: Floats
    peak_import_kw: Floats


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Policies side by side on the held-out days of a site.

    Attributes:
        site: The site's name.
        days: Local dates (ISO), D of them.
        pv_kwh: What the PV could give, [D].
        unavoidable_kwh: What charging on arrival leaves unserved, [D].
        tolerance_kg: By how much rounding may put a policy below the optimum, [D].
        policies: Per policy its figures: the agent if there is one, the rules, the optimum.
        schedules: Per policy what it did in every step of these days.
    """

    site: str
    days: tuple[str, ...]
    pv_kwh: Floats
    unavoidable_kwh: Floats
    tolerance_kg: Floats
    policies: dict[str, Figures]
    schedules: dict[str, Schedule] = field(default_factory=dict)


class Summary(NamedTuple):
    """A policy over all days. Intervals are half widths; None where one day or no gap is left."""

    co2_kg: float  # mean per day
    co2_kg_interval: float | None  # 95 % interval of the mean: +- so much
    vs_rbc_b_kg: float  # mean of the paired differences
    vs_rbc_b_kg_interval: float | None
    gap_closed: float | None  # share of the way from uncontrolled to the optimum
    unmet_kwh: float  # mean per day
    self_consumption: float | None  # share of all days' PV that found a use
    curtailed_kwh: float  # mean per day
    peak_import_kw: float  # highest of all days


def evaluate(agent: Agent | None, site: Site, references: Evaluation | None = None) -> Evaluation:
    """Run a policy's held-out days and put them beside the rules' and the optimum's.

    Args:
        agent: Acts without exploration; None evaluates the references alone.
        site: The site.
        references: An earlier evaluation of the same site, to spare the rules and the optimum.
    """
    if agent is None:
        return references or _references(site)
    days = site.held_out_days.tolist()
    own = schedule(build_model(site, agent.device), policy_of(agent, site), site, days)
    check_finite(own)
    references = references or _references(site)
    return replace(
        references,
        policies={"agent": _figures(own, references.unavoidable_kwh), **references.policies},
        schedules={"agent": own, **references.schedules},
    )


def check_finite(own: Schedule) -> None:
    """Raise a UserError if an agent's actions were none: finite weights can be too large, too."""
    if not np.isfinite(own.co2_kg).all():
        raise UserError(
            "the policy's actions are no finite numbers, training diverged; give an earlier "
            "episode: --ckpt_path FILE"
        )


def policy_of(agent: Agent, site: Site) -> Rule:
    """Return an agent's deterministic policy in the form of a rule."""
    observer = build_observer(site, agent.device)
    return lambda model, state: agent.act(observe(observer, model, state))


def _references(site: Site) -> Evaluation:
    model, days = build_model(site), site.held_out_days.tolist()
    schedules = {name: schedule(model, rule, site, days) for name, rule in RULES.items()}
    schedules["optimum"] = optimum_schedule(site, days)
    unavoidable_kwh = schedules["uncontrolled"].unmet_kwh.sum(1)
    policies = {name: _figures(s, unavoidable_kwh) for name, s in schedules.items()}
    # Each of the T steps may round what the battery holds and what the meter has counted.
    stored_kg = site.battery.capacity_kwh * site.carbon_kg_per_kwh[days].max(axis=1)
    rounding = T * float(np.finfo(np.float32).eps) / 2.0
    return Evaluation(
        site=site.name,
        days=tuple(site.days[day] for day in days),
        pv_kwh=site.pv_kw[days].sum(axis=1) * STEP_H,
        unavoidable_kwh=unavoidable_kwh,
        tolerance_kg=1e-6 + rounding * (stored_kg + policies["uncontrolled"].co2_kg),
        policies=policies,
        schedules=schedules,
    )


def _figures(schedule: Schedule, unavoidable_kwh: Floats) -> Figures:
    return Figures(
        co2_kg=schedule.co2_kg.sum(1),
        unmet_kwh=np.maximum(schedule.unmet_kwh.sum(1) - unavoidable_kwh, 0.0),
        grid_import_kwh=schedule.grid_import_kw.sum(1) * STEP_H,
        curtailed_kwh=schedule.curtailed_kwh.sum(1),
        peak_import_kw=schedule.grid_import_kw.max(1),
    )


# --- statistics ----------------------------------------------------------------------------------


def summarise(evaluation: Evaluation) -> dict[str, Summary]:
    """Return every policy's means, intervals and shares."""
    policies = evaluation.policies
    uncontrolled_kg = float(policies["uncontrolled"].co2_kg.mean())
    gap_kg = uncontrolled_kg - float(policies["optimum"].co2_kg.mean())
    pv_kwh = float(evaluation.pv_kwh.sum())
    summaries: dict[str, Summary] = {}
    for name, figures in policies.items():
        co2_kg, interval = mean_interval(figures.co2_kg)
        difference_kg, difference_interval = mean_interval(
            figures.co2_kg - policies["rbc_b"].co2_kg
        )
        summaries[name] = Summary(
            co2_kg=co2_kg,
            co2_kg_interval=interval,
            vs_rbc_b_kg=difference_kg,
            vs_rbc_b_kg_interval=difference_interval,
            gap_closed=(uncontrolled_kg - co2_kg) / gap_kg if gap_kg > 1e-6 else None,
            unmet_kwh=float(figures.unmet_kwh.mean()),
            self_consumption=max(0.0, 1.0 - float(figures.curtailed_kwh.sum()) / pv_kwh)
            if pv_kwh
            else None,
            curtailed_kwh=float(figures.curtailed_kwh.mean()),
            peak_import_kw=float(figures.peak_import_kw.max()),
        )
    return summaries


def mean_interval(values: Floats) -> tuple[float, float | None]:
    """Return the mean and the half width of its 95 % interval, Student's t over the days [D].

    One day has no spread: the half width is None.
    """
    count = len(values)
    if count < 2:
        return float(values.mean()), None
    half_width = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5
    return float(values.mean()), float(half_width)


def violations(evaluation: Evaluation) -> list[str]:
    """Name every day on which a policy is better than the optimum: each is a defect."""
    bound_kg = evaluation.policies["optimum"].co2_kg
    return [
        f"{evaluation.days[i]}: {name} emits {figures.co2_kg[i]:.6f} kg, the optimum "
        f"{bound_kg[i]:.6f} kg"
        for name, figures in evaluation.policies.items()
        for i in np.flatnonzero(figures.co2_kg < bound_kg - evaluation.tolerance_kg)
    ]


# --- the command ---------------------------------------------------------------------------------


class RunParser(Parser):
    """Parses a command that uses one episode of a run; a mistake becomes a `UserError`.

    Args:
        command: Its name.
        description: What it does.
        example: A command line that works.
    """

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"co2lightning {command}",
            description=description,
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        self.command = command
        self.example = example
        self.add_argument("name", metavar="NAME", help="the run, such as PPO")
        self.add_argument(
            "--ckpt_path",
            action=Place,
            metavar="FILE",
            help="an episode file [default: the run's newest]",
        )
        self.add_directory()
        self.add_argument(
            "--env.site",
            dest="site",
            metavar="SITE",
            help="a shipped site or a site folder [default: the run's]",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.command}: {message}; such as: {self.example}")


class Trained(NamedTuple):
    """An episode of a run, ready to act on its site."""

    agent: Agent
    episode: int
    site: Site
    path: Path
    run: TrainingCheckpoint
    facts: dict[str, Any]  # what the checkpoint says of the run


def main(argv: list[str]) -> int:
    """Run `co2lightning test` and return its exit code.

    Raises:
        UserError: There is no such run, the file is no episode, the site cannot be read.
    """
    parser = RunParser(
        "test",
        "Evaluate a run's newest episode on the held-out days, beside the rules and the optimum: "
        "CO2 in kg a day, energy in kWh a day, power in kW.",
        "co2lightning test PPO --json",
    )
    parser.add_argument("--json", action="store_true", help="data on standard output")
    parser.add_argument(
        "--logs.dir",
        dest="logs",
        action=Place,
        default="lightning_logs",
        metavar="DIR",
        help="of TensorBoard; the figures go there too [default: lightning_logs]",
    )
    arguments = parser.parse_args(argv)
    own_logs = Path(arguments.logs) / arguments.name
    TrainingCheckpoint(Path(arguments.directory) / arguments.name, logs=own_logs)  # or refuse
    agent, episode, site, path, run, facts = open_run(arguments, "test")
    site = unseen(facts, site)
    evaluation = evaluate(agent, site)
    if arguments.json:
        say(json.dumps(as_data(evaluation, agent, episode), allow_nan=False))
    else:
        _print_table(evaluation, agent, episode)
    logs = Path(arguments.logs)
    if path.parent.resolve() == run.directory.resolve() and (logs / run.name).is_dir():
        try:
            _write_scalars(logs, evaluation, episode, run)
        except OSError as error:  # perhaps others' files, which one may only read
            say(f"{logs}: {error.strerror}; TensorBoard does not get these figures", err=True)
    broken = violations(evaluation)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        say(f"error: the optimum is no bound, a defect: {broken[0]}{more}", err=True)
    return 1 if broken else 0


def open_run(arguments: argparse.Namespace, command: str) -> Trained:
    """Load the episode and the site that a command was asked for.

    Args:
        arguments: What a `RunParser` parsed.
        command: Its name, for the messages.

    Raises:
        UserError: There is no such run, the file is no episode, the site cannot be read.
    """
    run = TrainingCheckpoint(Path(arguments.directory) / arguments.name)
    checkpoint, path = _read(run, arguments.ckpt_path, command)
    agent = load_agent(checkpoint, path)
    described = checkpoint["run"].get("site")
    wanted = arguments.site or checkpoint["run"].get("config", {}).get("env.site")
    if not isinstance(described, dict) or not isinstance(wanted, str):
        raise UserError(f"{path}: was not trained on a site; {command} is for sites only")
    with named_in(None if arguments.site else path):
        site = load_site(wanted)
    say(*site.notes, err=True)
    if site.sha256 != described.get("sha256"):
        say(
            f"Site {wanted} is not the one {arguments.name} was trained on "
            f"({described.get('name')}, sha256 {str(described.get('sha256'))[:12]}): its files "
            f"have sha256 {site.sha256[:12]}",
            err=True,
        )
    return Trained(agent, int(checkpoint["episode"]), site, path, run, checkpoint["run"])


def unseen(facts: dict[str, Any], site: Site) -> Site:
    """Return a site whose held-out days a run was not trained on; say what is left out."""
    left, remark = trained_days.unseen(facts, site)
    if remark:
        say(remark, err=True)
    return left


def load_agent(checkpoint: dict[str, Any], origin: Path) -> Agent:
    """Make the agent that a checkpoint of a run on a site holds, ready to act.

    Raises:
        UserError: It is no such checkpoint; `origin` names its file.
    """
    from co2lightning.agents.agent import agent_of, check_sizes

    made = agent_class(agent_of(checkpoint, origin))
    sizes = {"observation_dim": SiteDays.observation_dim, "action_dim": SiteDays.action_dim}
    check_sizes(checkpoint, origin, sizes, "a site")
    return made.restore(checkpoint, origin, made.stored_settings(checkpoint, origin)).eval()


def _read(
    run: TrainingCheckpoint, ckpt_path: str | None, command: str
) -> tuple[dict[str, Any], Path]:
    """Return the checkpoint that was asked for and its path."""
    if ckpt_path not in (None, "last"):
        return TrainingCheckpoint.read(ckpt_path), Path(ckpt_path)
    checkpoint = run.load_latest_checkpoint()
    if checkpoint is None:
        place = run.directory.parent
        runs = sorted({p.parent.name for p in place.glob("*/episode_*.pt")})
        known = f"runs there: {', '.join(runs)}" if runs else "co2lightning fit trains one"
        raise UserError(f"{command} {run.name}: no episode in {run.directory}; {known}")
    newest, episode = run.path(run.episodes()[-1]), checkpoint["episode"]
    if run.path(episode) != newest:
        say(f"{newest} is damaged: this is episode {episode}", err=True)
    return checkpoint, run.path(episode)


def as_data(evaluation: Evaluation, agent: Agent, episode: int) -> dict[str, Any]:
    """Return what `test --json` prints: plain data, numbers to 1e-6."""
    return {
        "site": evaluation.site,
        "agent": type(agent).__name__,
        "action": _action(agent),
        "episode": episode,
        "days": list(evaluation.days),
        "policies": {
            name: {key: np.round(column, 6).tolist() for key, column in figures._asdict().items()}
            for name, figures in evaluation.policies.items()
        },
        "summary": {
            name: {key: None if v is None else round(v, 6) for key, v in s._asdict().items()}
            for name, s in summarise(evaluation).items()
        },
    }


def _action(agent: Agent) -> str:
    """Say how an agent's output is read: as the action, or as a correction of RBC B's."""
    return str(agent.hparams.get("action", "direct"))


def _print_table(evaluation: Evaluation, agent: Agent, episode: int) -> None:
    from rich.table import Table

    correction = " as a correction of RBC B" if _action(agent) == "correction" else ""
    titles = {"agent": type(agent).__name__ + correction.replace(" as a", ",", 1), **TITLES}
    days = evaluation.days
    table = Table(
        title=f"{type(agent).__name__}{correction}, episode {episode}, on {len(days)} held-out "
        f"days of {evaluation.site} ({days[0]} to {days[-1]})",
        caption="± half the 95 % interval over days. Gap: from uncontrolled to the optimum. "
        "Unmet: beyond what charging on arrival leaves.",
    )
    table.add_column("policy")
    for heading in (
        *("CO2\nkg/day", "against RBC B\nkg/day", "gap\nclosed", "unmet\nkWh/day"),
        *("self-con-\nsumption", "curtailed\nkWh/day", "peak\nkW"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, s in summarise(evaluation).items():
        table.add_row(
            titles[name],
            _plus_minus(f"{s.co2_kg:.1f}", s.co2_kg_interval),
            "" if name == "rbc_b" else _plus_minus(f"{s.vs_rbc_b_kg:+.1f}", s.vs_rbc_b_kg_interval),
            "" if s.gap_closed is None else f"{s.gap_closed:.1%}",
            f"{s.unmet_kwh:.3f}",
            "" if s.self_consumption is None else f"{s.self_consumption:.1%}",
            f"{s.curtailed_kwh:.0f}",
            f"{s.peak_import_kw:.0f}",
        )
    show_tables(table, width=110)  # squeezed into 80 columns it loses its numbers


def _plus_minus(mean: str, interval: float | None) -> str:
    return mean if interval is None else f"{mean} ± {interval:.1f}"


def _write_scalars(
    logs: Path, evaluation: Evaluation, episode: int, run: TrainingCheckpoint
) -> None:
    """Write `test/*` of an episode for TensorBoard, and the rules' and the optimum's lines.

    In a directory of its own below the run's: there TensorBoard reads the newest file and never
    returns to an older one, so a second file beside that of a running training would freeze its
    curve; and the purge that a resume orders would take these points too.
    """
    from co2lightning.board import replace_scalars, write_references

    summaries = {name: summary._asdict() for name, summary in summarise(evaluation).items()}
    own = {f"test/{name}": value for name, value in summaries.pop("agent").items()}
    replace_scalars(logs / run.name / "test", own, [episode], f"{episode:04d}")
    write_references(logs, evaluation.site, summaries, run.get_next_episode() - 1)
