"""Where a setting comes from: flags, the run, the recipe, the defaults.

Settings are plain values under dotted keys, such as `model.learning_rate`. Every source is read
into such a dict; merging is then `{**recipe, **run, **flags}`. One jsonargparse parser, built
from the signatures of Lightning's Trainer, the agent and the environment, types and checks them
and writes the help.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import os
import re
import typing
from collections.abc import Container, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from co2lightning.agents import AGENTS, agent_class, check_agent
from co2lightning.agents.ranges import (
    COUNT,
    SEED,
    Choice,
    Range,
    check_range,
    check_types,
    kinds_of,
    words,
)
from co2lightning.errors import UserError, show
from co2lightning.places import local
from co2lightning.runs.ledger import MAX_EPISODES
from co2lightning.sim.days import make_environment
from co2lightning.site.plain_yaml import parse_yaml

Settings = dict[str, Any]

COMMAND_LINE_ONLY = ("ckpt_path", "total_episodes", "print_config")
GROUPS = ("env", "model", "trainer", "checkpoints", "logs")
# What belongs to the run; the rest (devices, directories, episodes) to the session.
_RUN_GROUPS = ("env.", "model.", "seed_everything", "threads")


_BY_EPISODES = "training goes by episodes; use --episodes or --total_episodes"
_NO_VALIDATION = "nothing is validated while training; co2lightning test evaluates a run"
_SHORT = "for a short trial use --episodes 1 --env.num_envs 2"
_ALL_KEPT = "every episode is saved; --checkpoints.keep_last says how many stay"
_CURVES = "curves go to TensorBoard; --logs.dir says where"
_PROCESSES = "days are simulated side by side: --env.num_envs; --trainer.devices makes processes"
# What Lightning's Trainer has and fit has not, and what other tools call it: what to do instead.
_INSTEAD = {
    **dict.fromkeys(("max_epochs", "max_steps", "min_epochs", "min_steps"), _BY_EPISODES),
    **dict.fromkeys(("max_time", "epochs", "num_epochs", "total_timesteps"), _BY_EPISODES),
    **dict.fromkeys(("num_sanity_val_steps", "check_val_every_n_epoch"), _NO_VALIDATION),
    **dict.fromkeys(("val_check_interval", "limit_val_batches"), _NO_VALIDATION),
    **dict.fromkeys(("limit_test_batches", "limit_predict_batches"), _NO_VALIDATION),
    **dict.fromkeys(("inference_mode",), _NO_VALIDATION),
    **dict.fromkeys(("fast_dev_run", "limit_train_batches", "overfit_batches"), _SHORT),
    **dict.fromkeys(("enable_checkpointing", "barebones"), _ALL_KEPT),
    **dict.fromkeys(("save_top_k", "save_last", "save_freq"), _ALL_KEPT),
    **dict.fromkeys(("logger", "tensorboard_log", "log_dir", "logdir"), _CURVES),
    **dict.fromkeys(("model_registry", "enable_autolog_hparams"), _CURVES),
    **dict.fromkeys(("n_envs", "num_workers", "workers"), _PROCESSES),
    **dict.fromkeys(("device", "gpus"), "use --trainer.accelerator and --trainer.devices"),
    **dict.fromkeys(("resume", "resume_from_checkpoint"), "use --ckpt_path last"),
    **dict.fromkeys(("net_arch", "policy_kwargs"), "use --model.hidden"),
    "log_every_n_steps": "figures are logged after every episode",
    "enable_progress_bar": "the live line is for terminals; a pipe or a file gets plain lines",
    "enable_model_summary": "no summary is printed",
    "verbose": "it prints a line for each episode",
    "default_root_dir": "use --checkpoints.dir and --logs.dir",
    "plugins": "those that save and connect are co2lightning's own",
    "accumulate_grad_batches": "the updates are the agent's own, see --model.learning_rate and on",
    "gradient_clip_val": "use --model.max_grad_norm, which A2C and PPO have",
    "gradient_clip_algorithm": "gradients are clipped by their norm: --model.max_grad_norm",
    "sync_batchnorm": "the networks have no batch norm",
    "use_distributed_sampler": "each process draws days of its own",
    "reload_dataloaders_every_n_epochs": "every episode draws its days anew",
    "seed": "use --seed_everything",
    "lr": "use --model.learning_rate",
}


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
    "figures_every": Range(0, MAX_EPISODES),
    "checkpoints.keep_last": COUNT,
    "env.num_envs": Range(1, 1_000_000),
    "trainer.num_nodes": Range(1, 10_000),
    # Under autocast the policy that learns is not quite the one that acted.
    "trainer.precision": Choice(("32-true", "32", 32, None)),
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
def build_parser(agent: str) -> ArgumentParser:
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
        "kWh, the reward in kg CO2. Flags win over the run they resume, that over the recipe, "
        "that over the defaults below.",
        epilog="example: co2lightning fit --config ppo.yaml --ckpt_path last --episodes 5",
        formatter_class=_Help,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
        print_config=None,  # ours shows what a session would train with
    )
    parser.add_argument("--episodes", type=int, default=10, help="so many more episodes")
    parser.add_argument("--total_episodes", type=int | None, help="train until this episode stands")
    parser.add_argument(
        "--ckpt_path", type=str | None, help="last, or an episode file; training goes on after it"
    )
    parser.add_argument(
        "--name", type=str | None, help="the run's name, that of its directory [the agent's]"
    )
    parser.add_argument("--seed_everything", type=int, default=0, help="the run's seed")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--checkpoints.dir", type=str, default="checkpoints", help="where the runs are"
    )
    parser.add_argument(
        "--checkpoints.keep_last",
        type=int | None,
        help="keep the newest so many episode files and the best [all]",
    )
    parser.add_argument(
        "--allow_partial_replay",
        action="store_true",
        help="resume SAC although pieces of its replay buffer are missing",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the settings as a recipe and do no more"
    )
    parser.add_argument("--logs.dir", type=str, default="lightning_logs", help="where curves go")
    parser.add_argument(
        "--figures_every",
        type=int,
        default=10,
        help="draw a held-out day for TensorBoard after every so many episodes; 0 never",
    )
    parser.add_function_arguments(make_environment, "env")
    parser.add_class_arguments(agent_class(agent).settings_class, "model", instantiate=False)
    own: set[str | int] = set(_INSTEAD)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=own)
    titles = {"env": "environment", "model": agent, "trainer": "Lightning's Trainer"}
    for key, group in (parser.groups or {}).items():
        group.title = titles[key]
    types_ = _typehints(parser)
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
        parser = build_parser.__wrapped__(agent)  # for this help alone
        parser.set_defaults(check_settings(settings, agent, recipe))
        parser.description = f"{parser.description} They are those of {recipe}."
    else:
        parser = build_parser(agent)
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
    parser = build_parser(agent)
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.removeprefix("--") in GROUPS and flag.startswith("--"):
            inner = next(key for key in _typehints(parser) if key.startswith(f"{flag[2:]}."))
            raise UserError(f"{flag} is a group of flags, such as --{inner}")
    try:
        given = _flatten(parser.parse_args(arguments, defaults=False))
    except ArgumentError as error:
        raise UserError(_one_line(parser, str(error), "--")) from None
    except OverflowError:  # of a whole number where one with a fraction may stand
        longest = arguments.index(max(arguments, key=len))
        words = show(" ".join(arguments[max(0, longest - 1) : longest + 1]))
        raise UserError(f"{words}: must be a finite number") from None
    return _checked(given, agent, parser, "--")


def check_settings(settings: Settings, agent: str, origin: str) -> Settings:
    """Return settings from elsewhere than the command line, checked; `origin` names the place."""
    prefix = f"{origin}: "
    parser = build_parser(agent)
    for key in unknown_settings(settings, agent):
        raise UserError(f"{prefix}{key} is not a setting of {agent}{_closest(key, parser)}")
    try:
        given = _flatten(parser.parse_object(_nest(settings), defaults=False))
    except ArgumentError as error:
        raise UserError(_one_line(parser, str(error), prefix)) from None
    except OverflowError:
        sizes = {
            k: v.bit_length() if isinstance(v, int) else len(str(v)) for k, v in settings.items()
        }
        key = max(sizes, key=lambda key: sizes[key])
        raise UserError(f"{prefix}{key} {show(settings[key])}: must be a finite number") from None
    return _checked(given, agent, parser, prefix)


def _ranges(agent: str) -> dict[str, Container[Any] | None]:
    """Return the values of each setting that make sense beyond its type."""
    own = kinds_of(agent_class(agent).settings_class)
    return _RANGES | {f"model.{key}": allowed for key, (_, allowed) in own.items()}


def run_settings(settings: Settings) -> Settings:
    """Return those settings that belong to the run."""
    return {key: value for key, value in settings.items() if key.startswith(_RUN_GROUPS)}


def check_stored(settings: Settings, agent: str, origin: str) -> Settings:
    """Return settings that a stranger may have written, those of the run alone, checked.

    Without the parser, which imports the classes that a value names while it checks it.
    """
    types_ = _typehints(build_parser(agent))
    kinds = {key: (wanted, _ranges(agent).get(key)) for key, wanted in types_.items()}
    return check_types(run_settings(settings), kinds, origin)


def unknown_settings(settings: Iterable[str], agent: str) -> list[str]:
    """Return the keys that are no setting of this version's agent."""
    known = _typehints(build_parser(agent))
    return [key for key in settings if key not in known]


def complete(settings: Settings, agent: str) -> Settings:
    """Return checked settings with every default filled in."""
    return {**_defaults(agent), **settings}


@functools.cache
def _defaults(agent: str) -> Settings:
    return _flatten(build_parser(agent).get_defaults())


def instantiate_trainer_settings(settings: Settings, agent: str) -> dict[str, Any]:
    """Return the Trainer's keyword arguments, classes among them instantiated."""
    parser = build_parser(agent)
    namespace = parser.parse_object(_nest(settings))
    try:
        return dict(vars(parser.instantiate(namespace).trainer))
    except Exception as error:  # whatever a class of the user's provokes
        reason = _problems(str(error)) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{given_trainer_flags(settings, agent)}: {reason[:200]}") from None


def read_recipe(name: str) -> tuple[str, Settings]:
    """Read a recipe: as given, then in `configs/`, then among the packaged ones.

    Returns:
        The agent's name and the settings, flat and unchecked.
    """
    path = find_recipe(name)
    try:
        content = parse_yaml(path.read_bytes(), name, "ppo.yaml")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: a recipe holds keys such as `agent: PPO`")
    for key in COMMAND_LINE_ONLY:
        if key in content:
            raise UserError(f"{name}: {key} is for the command line only, --{key} there")
    agent = content.pop("agent", None)
    if agent is None:
        raise UserError(f"{name}: agent is missing; name one of {', '.join(AGENTS)}")
    return check_agent(agent, f"{name}: agent"), flatten(content, f"{name}: ")


def as_recipe(settings: Settings, agent: str) -> str:
    """Return all settings as a recipe, those of the Trainer only where they are not the default."""
    defaults = _defaults(agent)
    kept = {
        key: value
        for key, value in settings.items()
        if key not in COMMAND_LINE_ONLY
        and (value != defaults[key] or not (value is None or key.startswith("trainer.")))
    }
    return yaml.safe_dump({"agent": agent, **_nest(kept)}, sort_keys=False)


def find_recipe(name: str) -> Path:
    """Return the path of a recipe."""
    packaged = Path(str(resources.files("co2lightning"))) / "configs"
    if not packaged.is_dir():  # an editable install
        packaged = Path(__file__).parents[3] / "configs"
    for path in (Path(local("--config", name)), Path("configs") / name, packaged / name):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(p.name for p in packaged.glob("*.yaml")))
    raise UserError(
        f"--config {name}: no such file, here, in configs/ or among the packaged ones ({shipped})"
    )


def given_trainer_flags(settings: Settings, agent: str) -> str:
    """Return the Trainer flags that are not the default, as one types them."""
    flags = [
        as_flag(key, value)
        for key, value in settings.items()
        if key.startswith("trainer.") and value != _defaults(agent)[key]
    ]
    return " ".join(flags) or "--trainer"


def _typehints(parser: ArgumentParser) -> dict[str, Any]:
    """Return the type of every setting."""
    return {
        action.dest: wanted
        for action in parser._actions
        if (wanted := _typehint(action)) and not action.dest.endswith(".help")
    }


def _typehint(action: argparse.Action) -> Any:
    """Return the type of a setting, None if it is none; a switch is true or false."""
    switch = bool if isinstance(action, argparse._StoreTrueAction) else None
    return getattr(action, "_typehint", switch)


def _closest(key: str, parser: ArgumentParser, prefix: str = "") -> str:
    """Say what to use in place of a key that is none."""
    if instead := _INSTEAD.get(key.split(".")[-1]):
        return f": {instead}"
    known = [*_typehints(parser), "config", "model"]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:  # the group forgotten: learning_rate
        close = [name for name in known if name.split(".")[-1] == key][:1]
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _checked(settings: Settings, agent: str, parser: ArgumentParser, prefix: str) -> Settings:
    """Refuse values of the right type that make no sense; return them with `~` expanded."""
    types_, ranges = _typehints(parser), _ranges(agent)
    for key, value in settings.items():
        if value is None and type(None) not in typing.get_args(types_[key]):
            raise UserError(f"{prefix}{key} null: must be {words(types_[key])}")
        check_range(f"{prefix}{key}", value, ranges.get(key))
    places = {key: local(prefix + key, settings[key]) for key in _PLACES if key in settings}
    return {**settings, **places}


def _one_line(parser: ArgumentParser, message: str, prefix: str) -> str:
    """Turn jsonargparse's pages into one line that names the flag and what would be right."""
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown:
        flag = unknown[1].partition("=")[0]
        if not flag.startswith("--"):
            return f"{flag} is not a flag of fit; flags begin with --, such as --episodes 5"
        return f"{flag} is not a flag of fit{_closest(flag[2:], parser, '--')}"
    text = " ".join(line.strip(" -\t") for line in message.splitlines())
    key = re.search(r'key "([^"]+)"|[Aa]rgument "?(?:--)?([\w.]+)', text)
    name = key and (key[1] or key[2])
    value = re.search(r"Given value: (.*)", text) or re.search(r"Got value: (.*)", text)
    wanted = _typehints(parser).get(name) if name else None
    if wanted is not None and (problems := _problems(message)):
        return f"{prefix}{name}: {problems[:200]}"
    if wanted is not None and value:
        return f"{prefix}{name} {value[1][:80]}: must be {words(wanted)}"
    if wanted is not None and "expected one argument" in text:
        return f"{prefix}{name} needs a value: {words(wanted)}"
    return f"{prefix}{name}: {text[:200]}" if name else text[:200]


def _problems(message: str) -> str:
    """Return what is wrong with a class that was given, without the types it might be instead."""
    found = re.findall(r"^( *)- (.*(?:\n\1 +\S.*)*)", message, re.M)
    others = ("Expected a ", "Not a valid subclass of ")
    return "; ".join(" ".join(text.split()) for _, text in found if not text.startswith(others))


def as_flag(key: str, value: Any) -> str:
    """Return the flag that sets a value, as one types it."""
    text = (
        value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
    )
    return f"--{key} {text}"


def _flatten(namespace: Namespace) -> Settings:
    return flatten(namespace.as_dict(), "")


def flatten(content: dict[Any, Any], origin: str) -> Settings:
    """Put groups under dotted keys; what lies deeper, such as a class's arguments, stays whole.

    Raises:
        UserError: A key is there twice, as `model.gamma` and within `model`, or a group is no
            group; `origin` begins the message.
    """
    flat: Settings = {}
    for key, value in content.items():
        if key in GROUPS:
            value = {} if value is None else value  # a group whose keys are all commented out
            if not isinstance(value, dict):
                hint = "; agent: PPO names the agent" if key == "model" else ""
                raise UserError(f"{origin}{key} {show(value)}: must be a group of settings{hint}")
            found = {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            found = {str(key): value}
        for name, inner in found.items():
            if name in flat:
                raise UserError(f"{origin}{show(name)}: is there twice; keep one")
            flat[name] = _plain(inner)
    return flat


def _plain(value: Any) -> Any:
    """Return a value as plain data, which is all that a checkpoint holds."""
    if isinstance(value, Namespace):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, float) else value


def _nest(settings: Settings) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, last = key.split(".")
        level = nested
        for group in groups:
            level = level.setdefault(group, {})
        level[last] = _plain(value)  # a copy, for jsonargparse changes what it parses
    return nested
