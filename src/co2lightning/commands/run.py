"""What the commands share that take a run: its name, its place, its agent and its site."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from co2lightning.errors import UserError, show
from co2lightning.places import local
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.terminal import say

if TYPE_CHECKING:
    from co2lightning.agents.agent import Agent
    from co2lightning.site.model import Site


class Parser(argparse.ArgumentParser):
    """Parses a command; a mistake becomes a `UserError`.

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
        self.set_defaults(command=command)
        self.command = command
        self.hint = "--help shows what there is"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.command}: {message}; {self.hint}")

    def add_place(self, flag: str, **options: Any) -> None:
        """Add a flag that takes a file or directory of this machine's disks."""
        self.add_argument(flag, **{"action": _Place, "metavar": "FILE", **options})

    def add_directory(self) -> None:
        """Add the flag that says where the runs are, as `directory`."""
        self.add_place(
            "--checkpoints.dir",
            dest="directory",
            default="checkpoints",
            metavar="DIR",
            help="where the runs are [default: checkpoints]",
        )

    def add_objective(self) -> None:
        """Add the flag that says what a rule is settled by, as `objective`."""
        self.add_argument(
            "--env.objective",
            dest="objective",
            metavar="WHAT",
            help="what a rule settles: co2, cost, or weights [default: co2]; a run has its own",
        )

    def add_site(self, help: str) -> None:
        """Add the flags that take another site than a run's own, as `site`, `announced`."""
        self.add_argument("--env.site", dest="site", metavar="SITE", help=help)
        self.add_announced("the run's, or true")

    def add_announced(self, default: str) -> None:
        """Add the flag that says what is known of vehicles, as `announced`, None if not given."""
        self.add_argument(
            "--env.announced",
            dest="announced",
            type=_truth,
            metavar="true|false",
            help="of vehicles what drivers announce is known, where the sessions tell it; false: "
            f"the truth [default: {default}]",
        )


def _truth(word: str) -> bool:
    if word not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{show(word)}: must be true or false")
    return word == "true"


class _Place(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, local(str(option_string), values))


def run_parser(command: str, description: str, example: str) -> Parser:
    """Return the parser of a command that uses one episode of a run, for `open_run`, or a rule."""
    from co2lightning.sim.evaluate import RULE_NAMES  # only now: `history` starts without torch

    parser = Parser(command, description, example)
    parser.hint = f"such as: {example}"
    name = f"the run, such as PPO; or a rule on --env.site: {', '.join(RULE_NAMES)}"
    parser.add_argument("name", metavar="NAME", help=name)
    parser.add_place("--ckpt_path", help="last, best, or an episode file [default: last]")
    parser.add_directory()
    parser.add_site("a shipped site or a site folder [default: the run's]")
    parser.add_objective()
    return parser


def is_rule(name: str, arguments: argparse.Namespace) -> bool:
    """Return whether a name that a command was given is that of a rule; a run's comes first."""
    if getattr(arguments, "ckpt_path", None) or (Path(arguments.directory) / name).is_dir():
        return False
    from co2lightning.sim.evaluate import RULE_NAMES

    return name in RULE_NAMES


def site_of_rules(names: Sequence[str], arguments: argparse.Namespace) -> Site:
    """Load the site that a command was asked for, where rules act without a run.

    Raises:
        UserError: No site was named, it cannot be read, or a rule has nothing to do there.
    """
    from co2lightning.site.load import load_site

    said = f"{arguments.command} {' '.join(names)}"
    if arguments.site is None:
        raise UserError(f"{said}: a rule needs a site, such as --env.site iquitos")
    site = load_site(
        arguments.site,
        objective=arguments.objective or "co2",
        announced=arguments.announced is not False,
    )
    if "cheap" in names and not len(site.sessions.arrival):
        raise UserError(f"{said}: no vehicle comes to {site.name} for cheap to charge")
    say(*site.notes, err=True)
    return site


class _Trained(NamedTuple):
    """An episode of a run, ready to act on its site."""

    agent: Agent
    episode: int
    site: Site
    path: Path
    run: TrainingCheckpoint
    facts: dict[str, Any]  # what the checkpoint says of the run


def open_run(arguments: argparse.Namespace) -> _Trained:
    """Load the episode and the site that a command was asked for by what a `run_parser` takes.

    Raises:
        UserError: There is no such run, the file is no episode, the site cannot be read.
    """
    from co2lightning.agents.load import load_agent
    from co2lightning.site.load import load_site, named_in

    run = TrainingCheckpoint(Path(arguments.directory) / arguments.name)
    checkpoint, path = _read(run, arguments)
    agent = load_agent(checkpoint, path)
    described = checkpoint["run"].get("site")
    config = checkpoint["run"]["config"]
    refuse_objective(arguments, arguments.name)
    wanted, objective = arguments.site or config.get("env.site"), config.get("env.objective", "co2")
    announced = arguments.announced
    if announced is None:
        announced = config.get("env.announced") is not False
    if not isinstance(described, dict) or not isinstance(wanted, str):
        raise UserError(f"{path}: was not trained on a site; {arguments.command} is for sites only")
    with named_in(None if arguments.site else path):
        site = load_site(wanted, objective=objective, announced=announced)
    say(*site.notes, err=True)
    if site.sha256 != described.get("sha256"):
        say(
            f"Site {wanted} is not the one {arguments.name} was trained on "
            f"({described.get('name')}, sha256 {str(described.get('sha256'))[:12]}): its files "
            f"have sha256 {site.sha256[:12]}",
            err=True,
        )
    return _Trained(agent, int(checkpoint["episode"]), site, path, run, checkpoint["run"])


def refuse_objective(arguments: argparse.Namespace, name: str) -> None:
    """Raise a UserError if a run shall be settled by something: it has what it was trained for."""
    if arguments.objective is not None:
        raise UserError(f"--env.objective: {name} is settled by what it was trained for")


def unseen(facts: dict[str, Any], site: Site) -> Site:
    """Return a site whose held-out days a run was not trained on; say what is left out."""
    from co2lightning.site import trained_days  # `history` starts without it

    left, remark = trained_days.unseen(facts, site)
    if remark:
        say(remark, err=True)
    return left


def _read(run: TrainingCheckpoint, arguments: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Return the checkpoint that was asked for and its path."""
    given = arguments.ckpt_path
    if given == "best" and run.episodes():
        checkpoint, path, remarks = run.load_best_checkpoint()
        say(*remarks, err=True)
        return checkpoint, path
    if given not in (None, "last", "best"):
        return TrainingCheckpoint.read(given), Path(given)
    checkpoint = run.load_latest_checkpoint()
    if checkpoint is None:
        from co2lightning.sim.evaluate import RULE_NAMES

        place = run.directory.parent
        runs = sorted({p.parent.name for p in place.glob("*/episode_*.pt")})
        known = f"runs there: {', '.join(runs)}" if runs else "co2lightning fit trains one"
        known += f"; rules: {', '.join(RULE_NAMES)}"
        raise UserError(f"{arguments.command} {run.name}: no episode in {run.directory}; {known}")
    newest, episode = run.path(run.episodes()[-1]), checkpoint["episode"]
    if run.path(episode) != newest:
        say(f"{newest} is damaged: this is episode {episode}", err=True)
    return checkpoint, run.path(episode)


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


def check_bound(broken: list[str]) -> int:
    """Return 1, and say why, if a policy is better than the optimum: `broken` names its days."""
    if not broken:
        return 0
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    say(f"error: the optimum is no bound, a defect: {broken[0]}{more}", err=True)
    return 1
