"""Where a setting comes from: flags, the run, the recipe, the defaults.

Settings are plain values under dotted keys, such as `model.learning_rate`. Every source is read
into such a dict; merging is then `{**recipe, **run, **flags}`. One jsonargparse parser, built
from the signatures of Lightning's Trainer, the agent and the environment, types and checks them
and writes the help.
"""

import argparse
import functools
import typing
from collections.abc import Callable, Iterable
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from co2lightning.agents import agent_class
from co2lightning.agents.ranges import (
    COUNT,
    SEED,
    Kind,
    Range,
    check_range,
    check_types,
    in_words,
    kinds_of,
)
from co2lightning.errors import UserError, show
from co2lightning.places import local
from co2lightning.runs.ledger import MAX_EPISODES
from co2lightning.settings.recipe import GROUPS, Settings, flatten, nest, read_recipe
from co2lightning.settings.words import INSTEAD, as_flag, closest, one_line, problems_in
from co2lightning.sim.days import make_environment

# What belongs to the run; the rest (devices, directories, episodes) to the session.
_RUN_GROUPS = ("env.", "model.", "seed_everything", "threads", "evaluate_every")
# What Lightning says about its own flags, shorter.
_TRAINER_HELP = {
    "accelerator": "auto, cpu or gpu",
    "devices": "how many, auto for all, or their numbers such as [1]; each is a process",
    "strategy": "auto or ddp: processes with days of their own that average their gradients",
    "num_nodes": "machines, each with so many devices",
    "precision": "32-true",
    "callbacks": "further Lightning callbacks, by class_path",
    "deterministic": "true: deterministic algorithms only; warn: where there are any",
    "benchmark": "true: let cuDNN try its algorithms",
    "profiler": "simple or advanced: say where the time went",
    "detect_anomaly": "true: name the operation that gave a NaN",
}


# What makes sense beyond the type, of the settings that are no agent's; every other number need
# only be finite.
_RANGES = {
    "episodes": Range(1, MAX_EPISODES),
    "total_episodes": Range(1, MAX_EPISODES),
    "seed_everything": SEED,
    "threads": Range(1, 1024),
    "evaluate_every": Range(0, MAX_EPISODES),
    "figures_every": Range(0, MAX_EPISODES),
    "checkpoints.keep_last": COUNT,
    "env.num_envs": Range(1, 1_000_000),
    "env.hours": Range(1, 168),
    "trainer.num_nodes": Range(1, 10_000),
    # Under autocast the policy that learns is not quite the one that acted.
    "trainer.precision": ("32-true", "32", 32, None),
}
_PLACES = ("checkpoints.dir", "logs.dir")


class _Help(DefaultHelpFormatter):
    """Help in one line or two: what it is, and the default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=80)

    def _get_help_string(self, action: argparse.Action) -> str:
        if "." not in action.dest and action.dest == "help":
            return "show this help and exit"
        text = _TRAINER_HELP.get(action.dest.removeprefix("trainer."), action.help or "")
        return text if action.default is None else f"{text} (default: %(default)s)"


@functools.cache
def _build_parser(agent: str) -> ArgumentParser:
    """Return the parser of `fit` for one agent."""
    from lightning.pytorch import Trainer

    parser = ArgumentParser(
        prog="co2lightning fit",
        usage=(
            "co2lightning fit --config RECIPE [options]    such as --config ppo.yaml\n"
            "       co2lightning fit --model AGENT [options]      the agent's own recipe\n"
            "       co2lightning fit --ckpt_path FILE [options]   go on from an episode"
        ),
        description=f"Train {agent}. An episode is one day of the site; CO2 is in kg, energy in "
        "kWh, a reward of 1 is the CO2 of the site's uncontrolled day. Flags win over the run they "
        "resume, that over the recipe, that over the defaults below.",
        epilog="example: co2lightning fit --config ppo.yaml --ckpt_path last --episodes 5",
        formatter_class=_Help,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
        print_config=None,  # ours shows what a session would train with
    )
    add = parser.add_argument
    add("--episodes", type=int, default=10, help="so many more episodes")
    add("--total_episodes", type=int | None, help="train until this episode stands")
    add("--ckpt_path", type=str | None, help="last, best, or an episode file to go on after")
    add("--name", type=str | None, help="the run's name, that of its directory [the agent's]")
    add("--seed_everything", type=int, default=0, help="the run's seed")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--checkpoints.dir", type=str, default="checkpoints", help="where the runs are")
    kept = "keep the newest so many episode files and the best [all]"
    add("--checkpoints.keep_last", type=int | None, help=kept)
    partial = "resume SAC although pieces of its replay buffer are missing"
    add("--allow_partial_replay", action="store_true", help=partial)
    shown = "print the settings as a recipe and do no more"
    add("--print_config", action="store_true", help=shown)
    add("--logs.dir", type=str, default="lightning_logs", help="where curves go")
    drawn = "draw a held-out day for TensorBoard after every so many episodes; 0 never"
    add("--figures_every", type=int, default=10, help=drawn)
    judged = "run the policy without noise after every so many episodes, to know the best; 0 never"
    add("--evaluate_every", type=int, default=10, help=judged)
    parser.add_function_arguments(make_environment, "env")
    parser.add_class_arguments(agent_class(agent).Settings, "model", instantiate=False)
    own: set[str | int] = set(INSTEAD)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=own)
    titles = {"env": "environment", "model": agent, "trainer": "Lightning's Trainer"}
    for key, group in (parser.groups or {}).items():
        group.title = titles[key]
    types_ = _types(parser)
    for action in parser._actions:
        if action.dest not in types_ and action.dest != "help":
            action.help = argparse.SUPPRESS  # configuration by file or class: recipes do that
        elif types_.get(action.dest) in (int, int | None):
            action.metavar = "N"
        elif types_.get(action.dest) in (float, float | None):
            action.metavar = "X"
    return parser


def print_help(agent: str, recipe: str | None) -> None:
    """Print the help of `fit`; its defaults are those of a recipe, if one is named."""
    if recipe:
        agent, settings = read_recipe(recipe)
        parser = _build_parser.__wrapped__(agent)  # for this help alone
        parser.set_defaults(check_settings(settings, agent, recipe))
        parser.description = f"{parser.description} They are those of {recipe}."
    else:
        parser = _build_parser(agent)
    parser.print_help()


def split_arguments(arguments: list[str]) -> tuple[Settings, list[str]]:
    """Take `--config`, `--model` and `--ckpt_path` out; they decide how the rest is parsed."""
    taken: Settings = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, equals, value = argument.partition("=")
        if name not in _EXAMPLE:
            rest.append(argument)
            continue
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{name} needs a value, such as {_EXAMPLE[name]}")
            value = queue.pop(0)
        key = "agent" if name == "--model" else name.removeprefix("--")
        if key in taken:
            raise UserError(f"{name}: given twice, {taken[key]} and {value}; give one")
        taken[key] = value
    return taken, rest


_EXAMPLE = {"--config": "ppo.yaml", "--model": "PPO", "--ckpt_path": "last"}


def parse_flags(arguments: list[str], agent: str) -> Settings:
    """Return the flags that were given, checked, under dotted keys."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.removeprefix("--") in GROUPS and flag.startswith("--"):
            inner = next(key for key in _kinds(agent) if key.startswith(f"{flag[2:]}."))
            raise UserError(f"{flag} is a group of flags, such as --{inner}")
    parser = _build_parser(agent)
    try:
        return _checked(lambda: parser.parse_args(arguments, defaults=False), agent, "--")
    except OverflowError:  # of a whole number where one with a fraction may stand
        longest = arguments.index(max(arguments, key=len))
        given = show(" ".join(arguments[max(0, longest - 1) : longest + 1]))
        raise UserError(f"{given}: must be a finite number") from None


def check_settings(settings: Settings, agent: str, origin: str) -> Settings:
    """Return settings from elsewhere than the command line, checked; `origin` names the place."""
    for key in unknown_settings(settings, agent):
        hint = closest(key, _kinds(agent))
        raise UserError(f"{origin}: {key} is not a setting of {agent}{hint}")
    parser = _build_parser(agent)
    try:
        return _checked(
            lambda: parser.parse_object(nest(settings), defaults=False), agent, f"{origin}: "
        )
    except OverflowError:
        sizes = {
            k: v.bit_length() if isinstance(v, int) else len(str(v)) for k, v in settings.items()
        }
        key = max(sizes, key=lambda key: sizes[key])
        raise UserError(f"{origin}: {key} {show(settings[key])}: must be a finite number") from None


def _checked(parse: Callable[[], Namespace], agent: str, prefix: str) -> Settings:
    """Return what the parser takes and makes sense, with `~` expanded; `prefix` begins messages."""
    kinds = _kinds(agent)
    try:
        given = flatten(parse().as_dict(), "")
    except ArgumentError as error:
        raise UserError(one_line(str(error), kinds, prefix)) from None
    for key, value in given.items():
        wanted, allowed = kinds[key]
        if value is None and type(None) not in typing.get_args(wanted):
            raise UserError(f"{prefix}{key} null: must be {in_words(wanted)}")
        check_range(f"{prefix}{key}", value, allowed)
    return {k: local(prefix + k, v) if k in _PLACES else v for k, v in given.items()}


@functools.cache
def _kinds(agent: str) -> dict[str, Kind]:
    """Return the type and the range of every setting of `fit`."""
    own = kinds_of(agent_class(agent).Settings)
    ranges = _RANGES | {f"model.{key}": allowed for key, (_, allowed) in own.items()}
    return {key: (wanted, ranges.get(key)) for key, wanted in _types(_build_parser(agent)).items()}


def _types(parser: ArgumentParser) -> dict[str, Any]:
    """Return the type of every setting; a switch is true or false."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        switch = bool if isinstance(action, argparse._StoreTrueAction) else None
        wanted = getattr(action, "_typehint", switch)
        if wanted and not action.dest.endswith(".help"):
            found[action.dest] = wanted
    return found


def run_settings(settings: Settings) -> Settings:
    """Return those settings that belong to the run."""
    return {key: value for key, value in settings.items() if key.startswith(_RUN_GROUPS)}


def check_stored(settings: Settings, agent: str, origin: str) -> Settings:
    """Return settings that a stranger may have written, those of the run alone, checked.

    Without the parser, which imports the classes that a value names while it checks it.
    """
    return check_types(run_settings(settings), _kinds(agent), origin)


def unknown_settings(settings: Iterable[str], agent: str) -> list[str]:
    """Return the keys that are no setting of this version's agent."""
    return [key for key in settings if key not in _kinds(agent)]


def complete(settings: Settings, agent: str) -> Settings:
    """Return checked settings with every default filled in."""
    return {**_defaults(agent), **settings}


@functools.cache
def _defaults(agent: str) -> Settings:
    return flatten(_build_parser(agent).get_defaults().as_dict(), "")


def instantiate_trainer_settings(settings: Settings, agent: str) -> dict[str, Any]:
    """Return the Trainer's keyword arguments, classes among them instantiated."""
    parser = _build_parser(agent)
    namespace = parser.parse_object(nest(settings))
    try:
        return dict(vars(parser.instantiate(namespace).trainer))
    except Exception as error:  # whatever a class of the user's provokes
        said = " ".join(str(error).split())
        reason = problems_in(str(error)) or f"{type(error).__name__}: {said}"
        raise UserError(f"{given_trainer_flags(settings, agent)}: {reason[:200]}") from None


def given_trainer_flags(settings: Settings, agent: str) -> str:
    """Return the Trainer flags that are not the default, as one types them."""
    flags = [
        as_flag(key, value)
        for key, value in settings.items()
        if key.startswith("trainer.") and value != _defaults(agent)[key]
    ]
    return " ".join(flags) or "--trainer"
