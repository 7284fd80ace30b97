"""An agent from a checkpoint: the one place that checks a stranger's content and believes it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from co2lightning.agents import agent_class, check_agent
from co2lightning.agents.ranges import COUNT, COUNT_OR_NONE, SEED, Kind, check_types, kinds_of
from co2lightning.control.moves import ACTIONS
from co2lightning.control.observation import NAMES, as_rule, give
from co2lightning.control.rules import Rule
from co2lightning.errors import UserError
from co2lightning.runs.ledger import MAX_EPISODES, parse_count
from co2lightning.sim.interface import NOMINAL_STEP_MINUTES
from co2lightning.sim.scales import observer_of
from co2lightning.site.model import Site

if TYPE_CHECKING:
    from co2lightning.agents import Agent

SIZES = {
    "observation_dim": "observations",
    "action_dim": "actions",
    "step_minutes": "minutes a step",
}
"""What an environment sets of an agent, and what that counts."""
_UNSAID = dict.fromkeys(SIZES, 0) | {"step_minutes": NOMINAL_STEP_MINUTES}  # in older files
_TIME_GOES_ON = (0, 2)  # the version from which a site's days go on into each other
_NAMED = (0, 3)  # that from which observations have names
_AHEAD = "hindsight_dim"  # how many features critics saw of what was to come, until 0.3.0
_GONE = ("action", _AHEAD)  # "action", a setting before 0.3.0: how the two numbers were read
_SAVED = (0, 4)  # that from which rewards are what is saved against no control


def policy_of(agent: Agent, site: Site) -> Rule:
    """Return an agent's deterministic policy in the form of a rule."""
    who = type(agent).__name__
    observer = give(observer_of(site, agent.device), agent.observation_names, who)
    return as_rule(observer, agent.act)


def agent_of(content: dict[str, Any], origin: str | Path) -> str:
    """Return the name of the agent whose episode a checkpoint's content is.

    Raises:
        UserError: It is not that of an episode of this project, or of one on a site as an older
            version had it; `origin` names its file.
    """
    kinds = dict.fromkeys(("run", "state_dict", "hyper_parameters", "counters", "loops"), dict)
    try:
        parse_count(content, "episode", most=MAX_EPISODES)  # 0: what a run began with
        for key, kind in {**kinds, "optimizer_states": list}.items():
            if not isinstance(content.get(key), kind):
                raise ValueError(f"{key} is no {kind.__name__}")
        run = content["run"]
        if not isinstance(run.get("config"), dict):
            raise ValueError("its run has no config")
    except ValueError as error:
        raise UserError(
            f"{origin}: not an episode of co2lightning ({error}); give one such as episode_0004.pt"
        ) from None
    agent = check_agent(run.get("agent"), f"{origin}: agent")
    if outdated := outdated_on_site(run):
        place = Path(origin).parent
        name = "" if place.parent.name == "archive" else place.name
        flags = {"model": agent, "env.site": run["config"].get("env.site"), "name": name}
        usual = {"env.site": "iquitos", "name": agent}
        given = [
            f"--{key} {shlex.quote(value)}"
            for key, value in flags.items()
            if isinstance(value, str) and value not in ("", usual.get(key))
        ]
        raise UserError(
            f"{origin}: {outdated.trained}; {outdated.now}; train anew: co2lightning fit "
            f"{' '.join(given)}"
        )
    return agent


class Outdated(NamedTuple):
    """Why what an older version trained cannot act on a site any more."""

    trained: str  # by which version on what
    now: str  # what is so instead


def outdated_on_site(run: Mapping[str, Any]) -> Outdated | None:
    """Return why a run on a site as an older version had it cannot be used; None of others.

    Args:
        run: What a checkpoint or metadata.json says of the run.
    """
    if not isinstance(run.get("site"), dict):
        return None  # Gymnasium's environments are what they were
    version, by = _trained_by(run)
    if version < _TIME_GOES_ON:
        return Outdated(
            f"{by} on days that stand alone", "now a site's time goes on from day to day"
        )
    if version < _NAMED:
        return Outdated(
            f"{by} on observations without names", "now a site's forecast is observed by name"
        )
    return None


def rewarded_otherwise(run: Mapping[str, Any]) -> str | None:
    """Return why a run on a site cannot be trained on, though its policy acts; None of others.

    APG learns from no rewards.

    Args:
        run: What a checkpoint or metadata.json says of the run.
    """
    version, by = _trained_by(run)
    if version >= _SAVED or run.get("agent") == "APG" or not isinstance(run.get("site"), dict):
        return None
    return f"{by} on rewards that are others now"


def _trained_by(run: Mapping[str, Any]) -> tuple[tuple[int, int], str]:
    """Return the version that trained a run, (0, 0) where it says none, and say so."""
    versions = run.get("versions")
    said = versions.get("co2lightning") if isinstance(versions, dict) else None
    found = re.match(r"([0-9]{1,6})\.([0-9]{1,6})", said) if isinstance(said, str) else None
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    return version, f"trained by version {found.string[:20] if found else 'unknown'}"


def stored_settings(content: dict[str, Any], origin: str | Path) -> dict[str, Any]:
    """Return what the agent of an episode's content was made of, checked.

    Raises:
        UserError: It is nothing that an agent can be made of; `origin` names the file.
    """
    kinds: dict[str, Kind] = dict.fromkeys(SIZES, (int, COUNT_OR_NONE))
    kinds |= {"step_minutes": (int, COUNT), "observation_names": (tuple[str, ...], None)}
    settings_class = agent_class(agent_of(content, origin)).Settings
    kinds |= {"seed": (int, SEED), **kinds_of(settings_class)}
    stored = {key: value for key, value in content["hyper_parameters"].items() if key not in _GONE}
    return check_types(stored, kinds, str(origin))


def restore_agent(
    content: dict[str, Any],
    origin: str | Path,
    settings: Mapping[str, Any] | None = None,
) -> Agent:
    """Make an agent with the weights and counters that an episode's content holds.

    Args:
        content: That of an episode.
        origin: Its file, for messages.
        settings: What the agent is made of, checked already, the sizes of the environment that it
            is to act in among them; by default what is stored.

    Raises:
        UserError: It is no such content, or was trained on other sizes; the weights are not those
            of such an agent, then none were made, or not finite.
    """
    made = agent_class(agent_of(content, origin))
    if settings is None:
        settings = stored_settings(content, origin)
    for key, counted in SIZES.items():
        trained = content["hyper_parameters"].get(key, _UNSAID[key])
        if type(trained) is int and trained != (size := settings.get(key, trained)):
            raise UserError(
                f"{origin}: trained on {trained} {counted}, the environment has {size}; a run "
                "keeps its environment, start a new one for another"
            )
    state = dict(content["state_dict"])
    try:
        if ahead := content["hyper_parameters"].get(_AHEAD):
            seen = content["hyper_parameters"]["observation_dim"]
            for name in {"critic.weights.0", "target.weights.0"} & state.keys():
                own, _, action = state[name].tensor_split((seen, seen + ahead), dim=1)
                state[name] = torch.cat([own, action], dim=1)
        with torch.device("meta"):  # weights without numbers, however many would be asked for
            wanted = made(**settings).state_dict()
        for name in {**wanted, **state}:
            if _kind(state.get(name)) != _kind(wanted.get(name)):
                raise ValueError(f"{name} is not as its settings say")
        learner = made(**settings)
        learner.load_state_dict(state)
        learner.on_load_checkpoint(content)
    except Exception as error:  # whatever a foreign file provokes
        reason = " ".join(str(error).split())[:120]
        message = f"{origin}: not of this version's {made.__name__} ({reason})"
        raise UserError(message) from None
    if name := not_finite(state):
        raise UserError(
            f"{origin}: its weights {name} are no finite numbers, training diverged; an "
            "earlier episode may be good"
        )
    return learner


def load_agent(content: dict[str, Any], origin: str | Path) -> Agent:
    """Make the agent that an episode of a run on a site holds, ready to act.

    Raises:
        UserError: As `restore_agent`.
    """
    learner = restore_agent(content, origin).eval()
    known, given = learner.observation_dim, len(learner.observation_names or NAMES)
    if known != given:
        raise UserError(f"{origin}: trained on {known} observations, those of its site are {given}")
    if learner.action_dim not in ACTIONS.values():
        raise UserError(f"{origin}: trained on {learner.action_dim} actions, a site has 2 or 10")
    return learner


def adam_state(content: dict[str, Any], weights: Iterable[Tensor]) -> dict[int, Any]:
    """Return the state of Adam that an episode's content holds for the weights, checked.

    Raises:
        ValueError: It is not Adam's or not finite. Of other content, whatever that provokes.
    """
    (stored,) = content["optimizer_states"]
    of = dict(enumerate(weights))
    for number, held in stored["state"].items():
        moment = _kind(of[number])
        kinds = {"step": (torch.Size(), torch.float32), "exp_avg": moment, "exp_avg_sq": moment}
        known = {key: _kind(value) for key, value in held.items()}
        if known != kinds or not 0 <= held["step"] < math.inf:
            raise ValueError(f"the optimizer's state of weights {number} is not Adam's")
        if name := not_finite(held):
            raise ValueError(f"the optimizer's {name} of weights {number} is not finite")
    return stored["state"]


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds a number which is not finite."""
    return next((name for name, each in tensors.items() if not each.isfinite().all()), None)


def _kind(value: object) -> tuple[torch.Size, torch.dtype] | None:
    """Return a tensor's shape and its type of numbers, None of anything else."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None
