"""A recipe: settings in groups, in a file; here under dotted keys, as `model.learning_rate`."""

import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from co2lightning.agents import AGENTS, check_agent
from co2lightning.errors import UserError, show
from co2lightning.places import local
from co2lightning.site.plain_yaml import parse_yaml

Settings = dict[str, Any]
GROUPS = ("env", "model", "trainer", "checkpoints", "logs")
_COMMAND_LINE_ONLY = ("ckpt_path", "total_episodes", "print_config")


def read_recipe(name: str) -> tuple[str, Settings]:
    """Read a recipe: as given, then in `configs/`, then among the packaged ones.

    Returns:
        The agent's name and the settings, flat and unchecked.
    """
    path = _find_recipe(name)
    try:
        content = parse_yaml(path.read_bytes(), name, "ppo.yaml")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: a recipe holds keys such as `agent: PPO`")
    for key in _COMMAND_LINE_ONLY:
        if key in content:
            raise UserError(f"{name}: {key} is for the command line only, --{key} there")
    agent = content.pop("agent", None)
    if agent is None:
        raise UserError(f"{name}: agent is missing; name one of {', '.join(AGENTS)}")
    return check_agent(agent, f"{name}: agent"), flatten(content, f"{name}: ")


def _find_recipe(name: str) -> Path:
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


def as_recipe(settings: Settings, agent: str, defaults: Settings) -> str:
    """Return all settings as a recipe, those of the Trainer only where they are not the default."""
    kept = {
        key: value
        for key, value in settings.items()
        if key not in _COMMAND_LINE_ONLY
        and (value != defaults[key] or not (value is None or key.startswith("trainer.")))
    }
    return yaml.safe_dump({"agent": agent, **nest(kept)}, sort_keys=False)


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


def nest(settings: Settings) -> dict[str, Any]:
    """Put settings into their groups, as a copy: jsonargparse changes what it parses."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        group, dot, name = key.partition(".")
        (nested.setdefault(group, {}) if dot else nested)[name or group] = _plain(value)
    return nested


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
