"""A training session: what `co2lightning fit` and `co2lightning.fit` do.

Everything that can be refused is refused before anything on disk changes. After that one process
holds the run's lock from its first change to its last.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger

from co2lightning.agents import agent_class
from co2lightning.agents.agent import Agent
from co2lightning.callbacks import (
    EpisodeCheckpoint,
    EpisodeCheckpointIO,
    History,
    Interrupted,
    ProgressLine,
    Signals,
)
from co2lightning.checkpoints import TrainingCheckpoint
from co2lightning.config import (
    Settings,
    check_agent,
    check_settings,
    complete,
    instantiate_trainer_settings,
    read_recipe,
)
from co2lightning.env import Environment, SiteDays, make_environment
from co2lightning.errors import UserError

_VERSIONS = ("co2lightning", "lightning", "torch", "gymnasium", "numpy")
# What belongs to the run; the rest (devices, directories, episodes) to the session.
_RUN_GROUPS = ("env.", "model.", "seed_everything")


@dataclass(frozen=True)
class FitResult:
    """What a session left behind."""

    agent: str
    name: str
    first_episode: int
    last_episode: int
    checkpoint: Path | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Start:
    """Where a session starts from."""

    episode: int = 0
    path: Path | None = None
    settings: Settings | None = None
    target_episode: int = 0


def run_fit(
    flags: Settings,
    *,
    agent: str | None = None,
    config: str | None = None,
    signals: Signals | None = None,
    echo: Callable[[str], None] = print,
) -> FitResult:
    """Train, from a new start or a checkpoint.

    Args:
        flags: What was asked for, under dotted keys; wins over the run and the recipe.
        agent: A2C, SAC or PPO; by default the recipe's or the checkpoint's.
        config: A recipe; by default the agent's own.
        signals: Installed by the command line; None leaves signals alone.
        echo: Receives the lines for the user.

    Raises:
        UserError: What was asked cannot be; nothing on disk was changed.
        Interrupted: A signal ended it; the last whole episode is on disk.
    """
    wanted_file = _checkpoint_file(flags.get("ckpt_path"))
    if agent is None and config is None and wanted_file is not None:
        agent = str(TrainingCheckpoint.read(wanted_file)["run"].get("agent"))
        check_agent(agent, f"{wanted_file}: agent")
    agent, recipe = _recipe(agent, config)
    settings = complete({**recipe, **flags}, agent)
    name = settings["name"] or agent
    _check_name(name)
    run = TrainingCheckpoint(
        Path(settings["checkpoints.dir"]) / name,
        logs=Path(settings["logs.dir"]) / name,
        keep_last=settings["checkpoints.keep_last"],
    )
    stored = _read_start(wanted_file, agent) if wanted_file else None
    environment = make_environment(**_group(settings, "env."))
    _make_trainer(settings, agent)  # refuses a GPU that is not there before anything changes

    with run.lock():
        for line in run.recover():
            echo(line)
        if flags.get("ckpt_path") == "last":
            stored = _latest(run, agent)
        merged = _merge(recipe, stored, flags, agent, echo)
        if stored:
            before = complete({**recipe, **(stored.settings or {})}, agent)
            changed = _check_changes(before, merged, echo)
            if changed:
                environment = make_environment(**_group(merged, "env."))
            elif _group(merged, "env.") != _group(settings, "env."):
                environment = make_environment(**_group(merged, "env."))
        done = stored.episode if stored else 0
        target = _target(settings, flags, stored)
        if stored and target <= done:
            echo(f"{agent} stands at episode {done}; nothing to do for {target} episodes in total")
            return FitResult(agent, name, done + 1, done, stored.path, {})
        learner = _make_agent(agent, environment, merged)
        if stored and stored.path:
            _check_fit(learner, stored.path)
        path = _prepare_run(run, stored, flags, config, echo)
        return _train(learner, environment, run, path, merged, done, target, signals, echo)


def fit(options: dict[str, Any]) -> dict[str, Any]:
    """Train as `co2lightning fit` does, from Python.

    Args:
        options: The command's flags: `{"config": "ppo.yaml", "episodes": 5}`; groups either
            dotted (`"model.learning_rate": 1e-3`) or nested (`"model": {"learning_rate": 1e-3}`).
            `"model": "SAC"` names an agent.

    Returns:
        `agent`, `name`, `first_episode`, `last_episode`, `checkpoint` (a path) and `metrics` of
        the last episode.

    Raises:
        UserError: What was asked cannot be; nothing on disk was changed.
    """
    given = dict(options)
    config = given.pop("config", None)
    agent = given.pop("agent", None)
    if isinstance(given.get("model"), str):
        agent = given.pop("model")
    if agent is not None:
        check_agent(agent, "model")
    flat: Settings = {}
    for key, value in given.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    named = agent or (read_recipe(config)[0] if config else "PPO")
    result = run_fit(check_settings(flat, named, "fit"), agent=agent, config=config)
    return {**vars(result), "checkpoint": str(result.checkpoint) if result.checkpoint else None}


def _recipe(agent: str | None, config: str | None) -> tuple[str, Settings]:
    """Return the agent and its recipe, checked."""
    if config is None:
        if agent is None:
            raise UserError(
                "fit needs --config, such as --config ppo.yaml, or --model, such as PPO"
            )
        config = f"{agent.lower()}.yaml"
    named, recipe = read_recipe(config)
    if agent is not None and agent != named:
        raise UserError(
            f"--model {agent}: {config} is a recipe of {named}; leave --config out for {agent}'s own"
        )
    return named, check_settings(recipe, named, config)


def _checkpoint_file(ckpt_path: str | None) -> Path | None:
    if ckpt_path in (None, "last"):
        return None
    if "://" in str(ckpt_path):
        raise UserError(f"--ckpt_path {ckpt_path}: only local files; copy it here first")
    path = Path(str(ckpt_path))
    if not path.is_file():
        raise UserError(
            f"--ckpt_path {ckpt_path}: no such file; give last, or a file such as "
            "checkpoints/PPO/episode_0004.pt"
        )
    return path


def _check_name(name: str) -> None:
    if (
        not name
        or name in (".", "..", "archive")
        or name.startswith(".")
        or set(name) & set("/\\:")
    ):
        raise UserError(f"--name {name}: a plain directory name, such as night-tariff")


def _read_start(path: Path, agent: str) -> _Start:
    content = TrainingCheckpoint.read(path)
    run, episode = content.get("run"), content.get("episode")
    if not isinstance(run, dict) or not isinstance(episode, int):
        raise UserError(f"{path}: not an episode of co2lightning; give one such as episode_0004.pt")
    if run.get("agent") != agent:
        raise UserError(
            f"{path}: a checkpoint of {run.get('agent')}, not of {agent}; "
            f"use --config {str(run.get('agent')).lower()}.yaml"
        )
    stored = check_settings(dict(run.get("config", {})), agent, str(path))
    target = run.get("target_episode", 0)
    return _Start(episode, path, stored, target if isinstance(target, int) else 0)


def _latest(run: TrainingCheckpoint, agent: str) -> _Start | None:
    latest = run.get_next_episode() - 1
    return _read_start(run.path(latest), agent) if latest else None


def _merge(
    recipe: Settings,
    stored: _Start | None,
    flags: Settings,
    agent: str,
    echo: Callable[[str], None],
) -> Settings:
    """Flags, then what the run was started with, then the recipe."""
    kept = stored.settings if stored and stored.settings else {}
    for key, value in recipe.items():
        if key in kept and kept[key] != value and key not in flags:
            echo(
                f"The recipe says {key} {value}, the run keeps {kept[key]}; --{key} {value} applies it"
            )
    return complete({**recipe, **kept, **flags}, agent)


def _run_settings(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key.startswith(_RUN_GROUPS)}


def _group(settings: Settings, prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)
    }


def _check_changes(before: Settings, after: Settings, echo: Callable[[str], None]) -> bool:
    """Print what a resume changes; refuse what it cannot. Returns whether the site changes."""
    changes = {
        key: (before[key], value)
        for key, value in _run_settings(after).items()
        if before.get(key) != value
    }
    for key, (old, new) in changes.items():
        if key.removeprefix("model.") in Agent.fixed_settings:
            raise UserError(
                f"--{key} {new}: the checkpoint was trained with {old} and its weights have that "
                "shape; start a new run for another one"
            )
        echo(f"{key.split('.')[-1]}: {old} -> {new}")
    return any(key.startswith("env.") for key in changes)


def _target(settings: Settings, flags: Settings, stored: _Start | None) -> int:
    """Return the last episode of this session."""
    done = stored.episode if stored else 0
    if settings["total_episodes"] is not None:
        if "episodes" in flags:
            raise UserError("--episodes and --total_episodes: give one of them")
        return settings["total_episodes"]
    if "episodes" not in flags and stored and stored.target_episode > done:
        return stored.target_episode
    return done + settings["episodes"]


def _make_agent(agent: str, environment: Environment, settings: Settings) -> Agent:
    return agent_class(agent)(
        environment.observation_dim,
        environment.action_dim,
        seed=settings["seed_everything"],
        **_group(settings, "model."),
    )


def _check_fit(learner: Agent, path: Path) -> None:
    """Refuse a checkpoint whose observation or action has another size."""
    stored = TrainingCheckpoint.read(path)["hyper_parameters"]
    for key, word in (("observation_dim", "observations"), ("action_dim", "actions")):
        if stored.get(key) != learner.hparams[key]:
            raise UserError(
                f"{path}: trained on {stored.get(key)} {word}, the environment has "
                f"{learner.hparams[key]}; a run keeps its environment, start a new one for another"
            )


def _make_trainer(settings: Settings, agent: str, **own: Any) -> pl.Trainer:
    given = instantiate_trainer_settings(settings, agent)
    callbacks = given.pop("callbacks", None) or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    own["callbacks"] = [*callbacks, *own.get("callbacks", [])]
    own.setdefault("logger", False)
    try:
        with _quiet():
            return pl.Trainer(
                **given,
                **own,
                enable_checkpointing=bool(own["logger"]),
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                log_every_n_steps=1,
            )
    except MisconfigurationException as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--trainer.accelerator {settings['trainer.accelerator']} "
            f"--trainer.devices {settings['trainer.devices']}: {reason}"
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"--trainer: {' '.join(str(error).split())}") from None


def _prepare_run(
    run: TrainingCheckpoint,
    stored: _Start | None,
    flags: Settings,
    config: str | None,
    echo: Callable[[str], None],
) -> Path | None:
    """Archive or branch what is in the way; returns the checkpoint to load."""
    if stored is None:
        if flags.get("ckpt_path") == "last":
            echo(f"No checkpoint in {run.directory}: starting at episode 1")
        _archive(run, echo)
        return None
    assert stored.path is not None
    own = run.path(stored.episode)
    if stored.path.resolve() == own.resolve():
        moved = run.branch(stored.episode)
        if moved:
            echo(f"Later episodes of the old branch moved to {moved}")
    else:
        _archive(run, echo)
        run.adopt(stored.path)
        echo(f"Copied episodes 1 to {stored.episode} from {stored.path.parent}")
    return own


def _archive(run: TrainingCheckpoint, echo: Callable[[str], None]) -> None:
    newest = run.get_next_episode() - 1
    archived = run.archive()
    if archived is None:
        return
    line = f"The run in {run.directory} was moved to {archived}"
    if newest:
        file = archived / run.path(newest).name
        line += f"; co2lightning fit --ckpt_path {file} continues it"
    echo(line)


def _train(
    learner: Agent,
    environment: Environment,
    run: TrainingCheckpoint,
    path: Path | None,
    settings: Settings,
    done: int,
    target: int,
    signals: Signals | None,
    echo: Callable[[str], None],
) -> FitResult:
    agent = type(learner).__name__
    own_signals = signals or Signals()
    logger = TensorBoardLogger(
        settings["logs.dir"],
        name=run.name,
        version="",
        default_hp_metric=False,
        # TensorBoard forgets what an earlier session wrote beyond the checkpoint.
        purge_step=done + 1 if done else None,
    )
    progress = ProgressLine(target, echo)
    trainer = _make_trainer(
        settings,
        agent,
        max_epochs=target,
        logger=logger,
        plugins=[EpisodeCheckpointIO(run)],
        callbacks=[
            own_signals,
            progress,
            History(run, _info(agent, environment, settings, target)),
            EpisodeCheckpoint(run, progress.show),
        ],
    )
    torch.set_num_threads(settings["threads"])
    if path:
        echo(f"Resuming {agent} at episode {done + 1} ({_count(done)} done)")
    else:
        echo(f"Training {agent} for {_count(target)} (seed {settings['seed_everything']})")
    learner.train_on(environment)
    with _quiet():
        trainer.fit(learner, ckpt_path=str(path) if path else None)
    logger.finalize("success")
    echo(
        f"{_count(target)} in {run.directory}; curves: tensorboard --logdir {settings['logs.dir']}"
    )
    return FitResult(agent, run.name, done + 1, target, run.path(target), dict(learner.metrics))


def _count(episodes: int) -> str:
    return f"{episodes} episode" if episodes == 1 else f"{episodes} episodes"


def _info(agent: str, environment: Environment, settings: Settings, target: int) -> dict[str, Any]:
    """Return what the checkpoints and metadata.json say about the run."""
    info: dict[str, Any] = {
        "agent": agent,
        "seed": settings["seed_everything"],
        "config": _run_settings(settings),
        "target_episode": target,
        "versions": {name: version(name) for name in _VERSIONS}
        | {"python": platform.python_version()},
    }
    if isinstance(environment, SiteDays):
        info["site"] = site_description(environment)
    return info


def site_description(environment: SiteDays) -> dict[str, Any]:
    """Return the site's full configuration as plain data."""
    site = environment.site
    return {
        "name": site.name,
        "sha256": site.sha256,
        "pv_kwp": site.pv_kwp,
        "grid_kw": site.grid_kw,
        "charger_efficiency": site.charger_efficiency,
        "battery": dict(vars(site.battery)),
        "sockets": [dict(vars(sockets)) for sockets in site.sockets],
        "timezone": site.timezone,
        "days": len(site.days),
        "held_out_days": int(site.held_out.sum()),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advertisements and hints about other people's loops off the screen."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", module="torch.utils.data")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
