"""Where a setting comes from: flags, the run, the recipe, the defaults.

Settings are plain values under dotted keys, such as `model.learning_rate`. Every source is read
into such a dict; merging is then `{**recipe, **run, **flags}`. One jsonargparse parser, built
from the signatures of Lightning's Trainer, the agent and the environment, types and checks them
and writes the help.
"""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from co2lightning.agents import AGENTS, agent_class
from co2lightning.env import make_environment
from co2lightning.errors import UserError

Settings = dict[str, Any]

REFUSED = {
    "trainer.max_epochs": "--episodes or --total_episodes",
    "trainer.max_steps": "--episodes or --total_episodes",
    "trainer.min_epochs": "--episodes or --total_episodes",
    "trainer.min_steps": "--episodes or --total_episodes",
    "trainer.max_time": "--episodes or --total_episodes",
}
# What co2lightning itself hands to the Trainer, or what has no meaning without a validation set.
_OWN_TRAINER_SETTINGS = {
    *(key.removeprefix("trainer.") for key in REFUSED),
    *("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
    *("num_sanity_val_steps", "check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("overfit_batches", "fast_dev_run", "default_root_dir", "plugins", "barebones"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("use_distributed_sampler", "reload_dataloaders_every_n_epochs", "inference_mode"),
    *("model_registry", "enable_autolog_hparams", "sync_batchnorm"),
}


def build_parser(agent: str) -> ArgumentParser:
    """Return the parser of `fit` for one agent."""
    from lightning.pytorch import Trainer

    parser = ArgumentParser(
        prog="co2lightning fit",
        description=f"Train {agent}. Example: co2lightning fit --config ppo.yaml --episodes 5",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--episodes", type=PositiveInt, default=10, help="so many more episodes")
    parser.add_argument(
        "--total_episodes", type=PositiveInt | None, help="train until this episode stands"
    )
    parser.add_argument("--ckpt_path", type=str | None, help="last, or an episode file")
    parser.add_argument("--name", type=str | None, help="the run's name [default: the agent's]")
    parser.add_argument("--seed_everything", type=NonNegativeInt, default=0, help="the run's seed")
    parser.add_argument("--threads", type=PositiveInt, default=1, help="torch threads")
    parser.add_argument("--checkpoints.dir", type=str, default="checkpoints", help="of all runs")
    parser.add_argument(
        "--checkpoints.keep_last",
        type=PositiveInt | None,
        help="keep the newest so many episode files and the best; null keeps all",
    )
    parser.add_argument("--logs.dir", type=str, default="lightning_logs", help="TensorBoard files")
    parser.add_function_arguments(make_environment, "env")
    parser.add_class_arguments(
        agent_class(agent),
        "model",
        instantiate=False,
        skip={"observation_dim", "action_dim", "seed"},
    )
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=_OWN_TRAINER_SETTINGS)
    return parser


def split_arguments(arguments: list[str]) -> tuple[Settings, list[str]]:
    """Take `--config X` and `--model X` out of the arguments; the rest is for the parser."""
    taken: Settings = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, equals, value = argument.partition("=")
        if name not in ("--config", "--model"):
            rest.append(argument)
            continue
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{name} needs a value, such as {_EXAMPLE[name]}")
            value = queue.pop(0)
        taken["config" if name == "--config" else "agent"] = value
    return taken, rest


_EXAMPLE = {"--config": "ppo.yaml", "--model": "PPO"}


def parse_flags(arguments: list[str], agent: str) -> Settings:
    """Return the flags that were given, checked, under dotted keys."""
    for argument in arguments:
        _refuse(argument.partition("=")[0].removeprefix("--"), "--")
    parser = build_parser(agent)
    try:
        given = parser.parse_args(arguments, defaults=False)
    except ArgumentError as error:
        raise UserError(_one_line(parser, str(error))) from None
    return _flatten(given)


def check_settings(settings: Settings, agent: str, origin: str) -> Settings:
    """Return settings from elsewhere than the command line, checked; `origin` names the place."""
    for key in settings:
        _refuse(key, f"{origin}: ")
    parser = build_parser(agent)
    known = _known_keys(parser)
    for key in settings:
        if key not in known:
            raise UserError(f"{origin}: {key} is not a setting of {agent}{_closest(key, known)}")
    try:
        return _flatten(parser.parse_object(_nest(settings), defaults=False))
    except ArgumentError as error:
        raise UserError(f"{origin}: {_one_line(parser, str(error))}") from None


def complete(settings: Settings, agent: str) -> Settings:
    """Return the settings with every default filled in."""
    parser = build_parser(agent)
    return _flatten(parser.parse_object(_nest(settings)))


def instantiate_trainer_settings(settings: Settings, agent: str) -> dict[str, Any]:
    """Return the Trainer's keyword arguments, classes among them instantiated."""
    parser = build_parser(agent)
    namespace = parser.parse_object(_nest(settings))
    return dict(vars(parser.instantiate(namespace).trainer))


def read_recipe(name: str) -> tuple[str, Settings]:
    """Read a recipe: as given, then in `configs/`, then among the packaged ones.

    Returns:
        The agent's name and the settings, flat and unchecked.
    """
    path = find_recipe(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{name}: not a YAML file ({_first_line(error)})") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: a recipe holds keys such as `agent: PPO`")
    agent = content.pop("agent", None)
    if agent is None:
        raise UserError(f"{name}: agent is missing; name one of {', '.join(AGENTS)}")
    return check_agent(agent, f"{name}: agent"), _flatten_dict(content)


def find_recipe(name: str) -> Path:
    """Return the path of a recipe."""
    packaged = Path(str(resources.files("co2lightning"))) / "configs"
    if not packaged.is_dir():  # an editable install
        packaged = Path(__file__).parents[2] / "configs"
    for path in (Path(name), Path("configs") / name, packaged / name):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(p.name for p in packaged.glob("*.yaml")))
    raise UserError(
        f"--config {name}: no such file, here, in configs/ or among the packaged ones ({shipped})"
    )


def check_agent(name: object, where: str) -> str:
    """Return the agent's name if there is such an agent."""
    if name not in AGENTS:
        raise UserError(f"{where} {name}: no such agent; choose one of {', '.join(AGENTS)}")
    return str(name)


def _refuse(key: str, prefix: str) -> None:
    if key in REFUSED:
        raise UserError(
            f"{prefix}{key} is not for you to set: training goes by episodes; use {REFUSED[key]}"
        )


def _known_keys(parser: ArgumentParser) -> list[str]:
    return [
        action.dest for action in parser._actions if "." in action.dest or action.dest != "help"
    ]


def _closest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(parser: ArgumentParser, message: str) -> str:
    """Turn jsonargparse's pages into one line that names the flag and what would be right."""
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown:
        flag = unknown[1].partition("=")[0]
        close = _closest(flag.removeprefix("--"), _known_keys(parser))
        return f"{flag} is not a flag of fit{close.replace('mean ', 'mean --')}"
    lines = [line.strip(" -\t") for line in message.splitlines() if line.strip(" -\t")]
    text = " ".join(lines).replace("Parser key", "key")
    key = re.search(r'key "([^"]+)"|argument "?(?:--)?([\w.]+)', text)
    detail = re.sub(r'^.*?(key "[^"]+": ?|argument "?[-\w.]+"?: ?)', "", text)
    if key:
        return f"--{key[1] or key[2]}: {detail}"
    return text


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _flatten(namespace: Namespace) -> Settings:
    return _flatten_dict(namespace.as_dict())


def _flatten_dict(content: dict[Any, Any], prefix: str = "") -> Settings:
    """Flatten the groups; what lies deeper, such as a strategy's own arguments, stays whole."""
    flat: Settings = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name in ("env", "model", "trainer", "checkpoints", "logs"):
            flat |= _flatten_dict(value, f"{name}.")
        else:
            flat[name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    """Undo jsonargparse's own number types: a checkpoint holds plain data."""
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
        level[last] = value
    return nested
