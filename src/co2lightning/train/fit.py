"""A training session: what `co2lightning fit` and `co2lightning.fit` do.

Everything that can be refused is refused before anything on disk changes. After that one process
holds the run's lock from its first change to its last.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shlex
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy

from co2lightning.agents import agent_class, check_agent
from co2lightning.agents.agent import Agent
from co2lightning.agents.load import SIZES, adam_state, agent_of, restore_agent
from co2lightning.agents.replay import fewest_rows, is_piece, pieces_of_ranks
from co2lightning.errors import TrainingError, UserError, show
from co2lightning.learn.descent import worth_compiling
from co2lightning.learn.ranks import Rank, is_loss
from co2lightning.places import local
from co2lightning.runs.ledger import MAX_EPISODES
from co2lightning.runs.run import ROOM_IN_NAMES, TrainingCheckpoint
from co2lightning.settings.config import (
    Settings,
    as_flag,
    as_recipe,
    check_settings,
    check_stored,
    complete,
    flatten,
    given_trainer_flags,
    instantiate_trainer_settings,
    read_recipe,
    run_settings,
    unknown_settings,
)
from co2lightning.sim.days import SiteDays, make_environment
from co2lightning.sim.interface import Environment
from co2lightning.site import trained_days
from co2lightning.site.load import named_in
from co2lightning.site.model import Site
from co2lightning.terminal import tell
from co2lightning.train.board import LAYOUT, REFERENCES, DispatchFigure
from co2lightning.train.curves import Curves
from co2lightning.train.history import History
from co2lightning.train.progress import ProgressLine
from co2lightning.train.save import (
    EpisodeCheckpoint,
    EpisodeCheckpointIO,
    users_callbacks,
    who_stopped,
)
from co2lightning.train.signals import Interrupted, Signals

_VERSIONS = ("co2lightning", "lightning", "torch", "gymnasium", "numpy")


@dataclass(frozen=True)
class FitResult:
    """What a session left behind."""

    agent: str
    name: str
    first_episode: int
    last_episode: int
    checkpoint: Path | None
    metrics: dict[str, float]


class ReplayPiece(NamedTuple):
    """What an episode added to this rank's replay buffer."""

    content: dict[str, Any]
    fewest_rows: int  # of any rank's


@dataclass(frozen=True)
class _Start:
    """The checkpoint a session starts from."""

    episode: int
    path: Path
    settings: Settings
    target_episode: int
    stopped_by: tuple[str, str] | None  # a callback and, where known, why
    site_sha256: str | None
    world_size: int
    content: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """What a session will do; made by reading only."""

    start: _Start | None
    settings: Settings
    target: int
    learner: Agent
    environment: Environment
    replay: list[ReplayPiece]
    rank: Rank
    notes: list[str]

    @property
    def done(self) -> int:
        return self.start.episode if self.start else 0


def run_fit(
    flags: Settings,
    *,
    agent: str | None = None,
    config: str | None = None,
    signals: Signals | None = None,
    echo: Callable[[str], None] = tell,
) -> FitResult:
    """Train, from a new start or a checkpoint.

    Args:
        flags: What was asked for, under dotted keys; wins over the run and the recipe.
        agent: A2C, SAC or PPO; by default the recipe's or the checkpoint's.
        config: A recipe; by default the agent's own.
        signals: Installed before anything is written; None leaves signals alone.
        echo: Receives the lines for the user.

    Raises:
        UserError: What was asked cannot be; nothing on disk was changed.
        Interrupted: A signal ended it; the last whole episode is on disk.
        TrainingError: It cannot go on, or a callback raised; the last good episode is on disk.
    """
    agent = which_agent(agent, config, flags.get("ckpt_path"))
    config = config or f"{agent.lower()}.yaml"
    recipe = _recipe(agent, config)
    session = complete({**recipe, **flags}, agent)
    name = agent if session["name"] is None else session["name"]
    _check_name(name)
    run = TrainingCheckpoint(
        Path(session["checkpoints.dir"]) / name,
        logs=Path(session["logs.dir"]) / name,
        keep_last=session["checkpoints.keep_last"],
    )
    rank = _check_trainer(session, agent)
    _check_place("--checkpoints.dir", session["checkpoints.dir"], name)
    _check_place("--logs.dir", session["logs.dir"], name)
    _check_text("--logs.dir", Path(session["logs.dir"]) / name)
    if run.half_archived() and not rank.number:  # a plan is made of what stands after that
        with _held(run, echo):
            pass
    # Once before the lock, so that a refusal changes nothing; once more in case files changed.
    plan = _plan(run, agent, config, recipe, flags, rank)
    if session["print_config"]:
        for line in as_recipe(plan.settings, agent).splitlines():
            echo(line)
        return FitResult(agent, name, plan.done + 1, plan.done, None, {})
    if signals:
        signals.install(speaks=rank.number == 0)
    signals = signals or Signals()
    if rank.number:  # rank 0 prepares the run, writes and speaks; Lightning lets the others wait
        if plan.start and plan.target <= plan.done:
            return _nothing_to_do(run, plan, lambda line: None)
        path = run.path(plan.done) if plan.start else None
        return _train(run, plan, path, signals, lambda line: None)
    with _held(run, echo):
        plan = _plan(run, agent, config, recipe, flags, rank, plan)
        for line in plan.notes:
            echo(line)
        if plan.start and plan.target <= plan.done:
            return _nothing_to_do(run, plan, echo)
        path = _prepare_run(run, plan, flags, echo)
        return _train(run, plan, path, signals, echo)


@contextlib.contextmanager
def _held(run: TrainingCheckpoint, echo: Callable[[str], None]) -> Iterator[None]:
    """Hold the run, put in order."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(run.lock())
        except OSError as error:
            raise UserError(
                f"{run.directory}: cannot be written ({error.strerror}); give another "
                "--checkpoints.dir or --logs.dir"
            ) from None
        for line in run.recover():
            echo(line)
        yield


def _nothing_to_do(run: TrainingCheckpoint, plan: _Plan, echo: Callable[[str], None]) -> FitResult:
    assert plan.start
    agent = type(plan.learner).__name__
    if plan.start.stopped_by and plan.target == plan.done:
        by = _who(plan.start.stopped_by)
        echo(f"{agent} was ended at episode {plan.done} by {by}; --episodes N trains on")
    else:
        echo(f"{agent} stands at episode {plan.done}; {_count(plan.target)} in total are done")
    return FitResult(agent, run.name, plan.done + 1, plan.done, plan.start.path, {})


def which_agent(agent: str | None, config: str | None, ckpt_path: str | None) -> str:
    """Return the agent: the one named, else the recipe's, else the checkpoint's."""
    if agent is not None:
        check_agent(agent, "--model")
    if config is not None:
        named = read_recipe(config)[0]
        if agent not in (None, named):
            raise UserError(
                f"--model {agent}: {config} is a recipe of {named}; leave --config out for the "
                f"recipe of {agent}"
            )
        return named
    if agent is not None:
        return agent
    path = _checkpoint_file(ckpt_path)
    if path is None:
        raise UserError("fit needs --config, such as --config ppo.yaml, or --model, such as PPO")
    return agent_of(TrainingCheckpoint.read(path), path)


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
        TrainingError: It cannot go on, or a callback raised; the last good episode is on disk.
    """
    if not isinstance(options, Mapping):
        raise UserError('fit takes its settings as a dict, such as {"config": "ppo.yaml"}')
    given = dict(options)
    if isinstance(given.get("model"), str) and "agent" not in given:
        given["agent"] = given.pop("model")
    flat = flatten(given, "fit: ")
    config = flat.pop("config", None)
    if not isinstance(config, str | None):
        raise UserError(
            f"fit: config {show(config)}: must be the name of a recipe, such as ppo.yaml; "
            'give settings beside it: {"agent": "PPO", "episodes": 5}'
        )
    agent = which_agent(flat.pop("agent", None), config, flat.get("ckpt_path"))
    result = run_fit(check_settings(flat, agent, "fit"), agent=agent, config=config)
    return {**vars(result), "checkpoint": str(result.checkpoint) if result.checkpoint else None}


def _recipe(agent: str, config: str) -> Settings:
    named, recipe = read_recipe(config)
    assert named == agent
    return check_settings(recipe, agent, config)


def _checkpoint_file(ckpt_path: str | None) -> Path | None:
    if ckpt_path in (None, "last"):
        return None
    path = Path(local("--ckpt_path", str(ckpt_path)))
    if not path.is_file() and not path.is_dir():
        raise UserError(
            f"--ckpt_path {ckpt_path}: no such file; give last, or a file such as "
            "checkpoints/PPO/episode_0004.pt"
        )
    return path.resolve() if path.is_symlink() else path  # beside the file lies its run


def _check_name(name: str) -> None:
    if (
        not name
        or name in (".", "..", "archive", REFERENCES)
        or name.startswith(".")
        or set(name) & set("/\\:")
    ):
        raise UserError(f"--name {name}: a plain directory name, such as night-tariff")


def _check_place(flag: str, directory: str, name: str) -> None:
    """Refuse a directory that cannot be made or written, before anything is."""
    for place in (path := Path(directory) / name, *path.absolute().parents):
        if not os.path.lexists(place):
            continue
        if not place.is_dir():
            raise UserError(f"{flag} {directory}: {place} is not a directory; give another place")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {directory}: {place} cannot be written; give another place")
        longest = os.pathconf(place, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        if (size := len(os.fsencode(name))) > longest - ROOM_IN_NAMES:
            raise UserError(
                f"--name {name}: {size} bytes; at most {longest - ROOM_IN_NAMES} leave room for "
                "the names of its archives"
            )
        return


def _check_text(flag: str, path: Path) -> None:
    """Refuse a name that TensorBoard cannot write, which takes UTF-8 only."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{flag} {path}: is no UTF-8 text, as TensorBoard needs; give another name, or a UTF-8 "
            "locale, such as LC_ALL=C.UTF-8"
        ) from None


def _plan(
    run: TrainingCheckpoint,
    agent: str,
    config: str,
    recipe: Settings,
    flags: Settings,
    rank: Rank,
    earlier: _Plan | None = None,
) -> _Plan:
    """Work out what a session will do, reading only.

    Args:
        run: The run directory.
        agent: Its agent.
        config: The recipe's name, for the notes.
        recipe: Its settings.
        flags: The settings that win.
        rank: Which process of how many this is.
        earlier: A plan whose environment and replay are taken over where they still fit.

    Raises:
        UserError: It cannot be.
    """
    notes: list[str] = []
    start = _find_start(run, agent, flags.get("ckpt_path"), notes)
    kept = start.settings if start else {}
    merged = complete({**recipe, **kept, **flags}, agent)
    for key, value in recipe.items():
        if key in kept and kept[key] != value and key not in flags and value != "auto":
            flag = as_flag(key, value)
            notes.append(
                f"{config} has {key} {value}, the run keeps {kept[key]}; {flag} applies it"
            )
    if start:
        if merged["model.compile"] == "auto":
            merged["model.compile"] = kept["model.compile"]
        notes += _changes(kept, merged, agent)
    environment_id = str(kept.get("env.id"))
    if ":" in environment_id and environment_id not in (flags.get("env.id"), recipe.get("env.id")):
        assert start
        raise UserError(
            f"{start.path}: its env.id names a module to import; if you trust it, give it "
            f"yourself: --env.id {environment_id[:80]}"
        )
    target = _target({**recipe, **flags}, "episodes" in flags, agent, start)
    if earlier and _group(earlier.settings, "env.") == _group(merged, "env."):
        environment = earlier.environment
    else:
        kept_site = merged["env.id"] is None and "env.site" not in flags
        with named_in(start.path if start and kept_site else None):
            environment = make_environment(**_group(merged, "env."))
    sizes = {key: getattr(environment, key) for key in SIZES}
    options = {**sizes, "seed": merged["seed_everything"], **_group(merged, "model.")}
    learner: Agent
    if start:
        place = ("the environment", sizes)
        learner = restore_agent(start.content, start.path, options, place)
    else:
        learner = agent_class(agent)(**options)
    if merged["model.compile"] == "auto":  # by the recipe, not by what a session was asked for
        episodes = complete(recipe, agent)["episodes"]
        worth = worth_compiling(episodes * learner.updates_per_episode(environment))
        merged["model.compile"] = learner.settings.compile = worth
    learner.train_on(environment)
    replay: list[ReplayPiece] = []
    if start:
        if start.world_size != rank.world_size:
            raise UserError(
                f"{start.path}: trained on {_processes(start.world_size)}, not on "
                f"{rank.world_size}; each has days and a replay buffer of its own, so a run keeps "
                f"their number: give --trainer.devices {start.world_size}, or start a new run"
            )
        start.content.update(_restorable(learner, start))
        site = environment.site if isinstance(environment, SiteDays) else None
        if site and start.site_sha256 not in (None, site.sha256):
            notes.append(
                f"The data of site {site.name} are others than at episode {start.episode}; "
                "training goes on with these"
            )
            trained = trained_days.seen(start.content["run"], site)
            if trained is not None and (both := int((trained & site.held_out).sum())):
                notes.append(
                    f"{both} of the {len(site.held_out_days)} held-out days of {site.name} were "
                    f"trained on up to episode {start.episode}; test and report leave them out"
                )
        if earlier and earlier.start and earlier.start.path == start.path:
            replay = earlier.replay
        elif target > start.episode:
            replay = _load_replay(learner, start, merged["allow_partial_replay"], rank)
    return _Plan(start, merged, target, learner, environment, replay, rank, notes)


def _find_start(
    run: TrainingCheckpoint, agent: str, ckpt_path: str | None, notes: list[str]
) -> _Start | None:
    path = _checkpoint_file(ckpt_path)
    if path is None:
        newest = run.get_next_episode() - 1 if ckpt_path == "last" else 0
        return _read_start(run.path(newest), agent, notes) if newest else None
    start = _read_start(path, agent, notes)
    own = run.path(start.episode)
    if path.resolve() != own.resolve() and path.resolve().parent == run.directory.resolve():
        raise UserError(f"--ckpt_path {path}: a copy within the run; give {own}, or move the copy")
    return start


def _read_start(path: Path, agent: str, notes: list[str]) -> _Start:
    """Read a checkpoint, perhaps of another version, perhaps not ours at all."""
    content = TrainingCheckpoint.read(path)
    trained = agent_of(content, path)
    if trained != agent:
        raise UserError(
            f"{path}: a checkpoint of {trained}, not of {agent}; "
            f"use --config {trained.lower()}.yaml"
        )
    run, episode, epoch = content["run"], content["episode"], content.get("epoch")
    if type(epoch) is not int or epoch != episode - 1:
        raise UserError(f"{path}: not an episode of co2lightning; its epoch is another one")
    stored = run_settings({str(key): value for key, value in run["config"].items()})
    for key in unknown_settings(stored, agent):
        notes.append(
            f"{path}: this version has no {key}; its {str(stored.pop(key))[:60]} is ignored"
        )
    # What the checkpoint does not know yet had the default's effect; nothing was ever compiled.
    known = {"model.compile": False, **check_stored(stored, agent, str(path))}
    settings = run_settings(complete(known, agent))
    target = run.get("target_episode")
    site, world_size = run.get("site"), run.get("world_size")
    match content.get("stopped_by"):
        case (str() as callback, str() as reason):
            stopped_by = callback, reason
        case _:
            stopped_by = None
    return _Start(
        episode,
        path,
        settings,
        target if type(target) is int and target <= MAX_EPISODES else 0,
        stopped_by,
        site.get("sha256") if isinstance(site, dict) else None,
        world_size if type(world_size) is int else 1,
        content,
    )


def _group(settings: Settings, prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)
    }


def _changes(before: Settings, after: Settings, agent: str) -> list[str]:
    """Return a line for each setting that a resume changes; refuse what it cannot change."""
    lines: list[str] = []
    for key, old in before.items():
        new = after[key]
        if new == old:
            continue
        if key.removeprefix("model.") in agent_class(agent).fixed_settings:
            raise UserError(
                f"{as_flag(key, new)}: the checkpoint was trained with {old} and its weights have "
                "that shape; leave the flag out, or start a new run"
            )
        lines.append(f"{key.split('.')[-1]}: {old} -> {new}")
    return lines


def _target(asked: Settings, by_flag: bool, agent: str, start: _Start | None) -> int:
    """Return the last episode of this session; `by_flag` says that --episodes was given."""
    done = start.episode if start else 0
    total = asked.get("total_episodes")
    if total is not None and by_flag:
        raise UserError("--episodes and --total_episodes: give one of them")
    if start and start.stopped_by and not by_flag:
        # Ended on purpose: to go on would train one episode more at each start. Where a callback
        # did not say why, it may only have been out of time, so a total goes on.
        _, reason = start.stopped_by
        if total is None or (reason and total <= start.target_episode):
            return done
    if total is not None:
        return total
    if not by_flag and start and start.target_episode > done:
        return start.target_episode
    target = done + complete(asked, agent)["episodes"]
    if target > MAX_EPISODES:
        raise UserError(f"--episodes: a run has at most {MAX_EPISODES:,} episodes")
    return target


def _restorable(learner: Agent, start: _Start) -> dict[str, Any]:
    """Return what Lightning restores of a checkpoint beside the weights, checked.

    Of the optimizer it is what was gathered; the optimizer's settings and Lightning's loops follow
    from the agent and the episode, whatever the file says.

    Raises:
        UserError: It does not fit the agent.
    """
    optimizer = learner.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    own = optimizer.state_dict()
    try:
        if not isinstance(start.content.get("callbacks", {}), dict):
            raise TypeError("callbacks holds no states")
        state = adam_state(start.content, optimizer.param_groups[0]["params"])
    except Exception as error:  # whatever a foreign file provokes
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{start.path}: does not fit {type(learner).__name__} ({reason})") from None
    return {
        "pytorch-lightning_version": version("lightning"),  # so that it migrates nothing
        "loops": _loops_after(start.episode),
        "optimizer_states": [{**own, "state": state}],
        "lr_schedulers": [],
    }


def _loops_after(episode: int) -> dict[str, Any]:
    """Return the state of Lightning's loops when it saves an episode: an epoch of one batch."""

    def count(number: int) -> dict[str, int]:
        return dict.fromkeys(("ready", "started", "processed", "completed"), number)

    epochs = {**count(episode), "completed": episode - 1}
    batches = {"total": count(episode), "current": count(1), "is_last_batch": True}
    return {
        "fit_loop": {
            "epoch_progress": {"total": epochs, "current": epochs},
            "epoch_loop.batch_progress": batches,
            "epoch_loop.state_dict": {"_batches_that_stepped": episode},
        }
    }


def _load_replay(
    learner: Agent, start: _Start, allow_partial: bool, rank: Rank
) -> list[ReplayPiece]:
    """Return the newest replay pieces that fill the agent's buffer, oldest first."""
    capacity = learner.replay_capacity
    if capacity is None:
        return []
    source = TrainingCheckpoint(start.path.parent)
    sizes = (learner.observation_dim + learner.hindsight_dim, learner.action_dim)
    found: list[ReplayPiece] = []
    for episode, content in source.load_replay(range(start.episode, 0, -1), allow_partial):
        pieces = pieces_of_ranks(content)
        if len(pieces) != rank.world_size or not all(is_piece(piece, *sizes) for piece in pieces):
            if allow_partial:
                continue
            raise UserError(
                f"{source.replay_path(episode)}: not a replay piece of this run; "
                "--allow_partial_replay goes on without it"
            )
        found.append(ReplayPiece(pieces[rank.number], fewest_rows(content)))
        if sum(piece.fewest_rows for piece in found) >= capacity:
            break
    return found[::-1]


def _check_trainer(settings: Settings, agent: str) -> Rank:
    """Refuse Trainer settings that cannot be, such as a GPU that is not there."""
    trainer = _make_trainer(settings, agent)
    strategy = trainer.strategy
    if trainer.world_size > 1 and not (
        isinstance(strategy, DDPStrategy) and strategy._start_method == "popen"
    ):
        raise UserError(
            f"{given_trainer_flags(settings, agent)}: several processes train by ddp; give "
            "--trainer.strategy ddp, or one device: --trainer.devices 1"
        )
    if trainer.global_rank >= trainer.world_size:
        raise UserError(
            f"{given_trainer_flags(settings, agent)}: is for {_processes(trainer.world_size)}, but "
            f"LOCAL_RANK and NODE_RANK make this number {trainer.global_rank}; unset them"
        )
    return Rank(trainer.global_rank, trainer.world_size)


def _make_trainer(settings: Settings, agent: str, **own: Any) -> pl.Trainer:
    given = instantiate_trainer_settings(settings, agent)
    callbacks = given.pop("callbacks", None) or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    for callback in callbacks:
        if isinstance(callback, Checkpoint):
            raise UserError(
                f"--trainer.callbacks: {type(callback).__name__} cannot work here: every episode "
                "is saved anyway, as a whole"
            )
    own["callbacks"] = [*callbacks, *own.get("callbacks", [])]
    own.setdefault("logger", False)
    try:
        with _quiet():
            own["plugins"] = [*own.get("plugins", []), *_cluster(given)]
            trainer = pl.Trainer(
                **given,
                **own,
                enable_checkpointing=bool(own["logger"]),
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                log_every_n_steps=1,
            )
    except (
        MisconfigurationException,
        ImportError,
        TypeError,
        ValueError,
        RuntimeError,
        KeyError,
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{given_trainer_flags(settings, agent)}: {reason}") from None
    # Until here what a variable said when it was imported.
    rank_zero_only.rank = trainer.global_rank  # pyright: ignore[reportFunctionMemberAccess]
    # Signals are those of `Signals` or the caller's; Lightning would end with exit code 0.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def _cluster(given: dict[str, Any]) -> list[ClusterEnvironment]:
    """Return what tells the processes of a run apart; nothing where Lightning finds it.

    Devices and nodes alone say how many processes there are. A launcher counts where it has
    started just as many: its variables reach tasks that share a job, and stay behind in shells.

    Args:
        given: The Trainer's arguments; one process needs no strategy for several.

    Raises:
        ValueError: A launcher has started another number.
    """
    probe = pl.Trainer(
        **{key: given[key] for key in ("accelerator", "devices", "num_nodes")},
        plugins=LightningEnvironment(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    devices, nodes = probe.num_devices, probe.num_nodes
    if devices * nodes == 1:
        if given["strategy"] == "ddp":
            given["strategy"] = "auto"
        return [LightningEnvironment()]
    if TorchElasticEnvironment.detect():
        cluster = TorchElasticEnvironment()
    elif SLURMEnvironment.detect():
        if nodes == 1 and os.environ["SLURM_NTASKS"] == "1":
            return [LightningEnvironment()]  # one task, which starts the others itself
        # Requeuing would save in the middle of an episode; --ckpt_path last needs no such file.
        cluster = SLURMEnvironment(auto_requeue=False)
    elif "LOCAL_RANK" in os.environ and "MASTER_PORT" not in os.environ:
        raise ValueError("LOCAL_RANK is set, as by a launcher, and MASTER_PORT is not; unset it")
    else:
        return []
    cluster.validate_settings(devices, nodes)
    if cluster.world_size() != devices * nodes:
        asked, started = _processes(devices * nodes), cluster.world_size()
        raise ValueError(f"is for {asked}, but the launcher has started {started}")
    return [cluster]


def _prepare_run(
    run: TrainingCheckpoint, plan: _Plan, flags: Settings, echo: Callable[[str], None]
) -> Path | None:
    """Archive or branch what is in the way; returns the checkpoint to load."""
    start = plan.start
    if start is None:
        if flags.get("ckpt_path") == "last":
            # Nothing to archive: sessions that died before their first episode stay in the history.
            echo(f"No checkpoint in {run.directory}: starting at episode 1")
        else:
            _archive(run, plan.settings, echo)
        return None
    own = run.path(start.episode)
    if start.path.resolve() == own.resolve():
        newest = run.get_next_episode() - 1
        moved = run.branch(start.episode)
        if moved:
            how = _how_to_continue(moved / run.path(newest).name, plan.settings)
            echo(f"Later episodes of the old branch moved to {moved}; {how}")
    else:
        _archive(run, plan.settings, echo)
        run.adopt(start.path, _logs_of(start.path.parent, run))
        echo(f"Copied what came before episode {start.episode + 1} from {start.path.parent}")
    return own


def _archive(run: TrainingCheckpoint, settings: Settings, echo: Callable[[str], None]) -> None:
    newest = run.get_next_episode() - 1
    archived = run.archive()
    if archived is None:
        return
    line = f"The run in {run.directory} was moved to {archived}"
    if newest:
        line += f"; {_how_to_continue(archived / run.path(newest).name, settings)}"
    echo(line)


def _how_to_continue(file: Path, settings: Settings) -> str:
    flags = [f"--ckpt_path {shlex.quote(str(file))}"]
    for key, default in (
        ("name", None),
        ("checkpoints.dir", "checkpoints"),
        ("logs.dir", "lightning_logs"),
    ):
        if settings[key] != default:
            flags.append(f"--{key} {shlex.quote(settings[key])}")
    return f"co2lightning fit {' '.join(flags)} continues it"


def _logs_of(directory: Path, run: TrainingCheckpoint) -> Path | None:
    """Return where the curves of another run directory are, beside our own."""
    if run.logs is None:
        return None
    archived = directory.parent.name == "archive"
    return (run.logs.parent / "archive" if archived else run.logs.parent) / directory.name


def _train(
    run: TrainingCheckpoint,
    plan: _Plan,
    path: Path | None,
    signals: Signals,
    echo: Callable[[str], None],
) -> FitResult:
    learner, settings, done, target = plan.learner, plan.settings, plan.done, plan.target
    agent = type(learner).__name__
    site_days = plan.environment if isinstance(plan.environment, SiteDays) else None
    sessions = run.load_history()["trainings"] if done else []
    figures = [row for session in sessions for row in session["metrics"]]
    layout = LAYOUT if site_days else None
    logger = Curves(settings["logs.dir"], run.name, done, layout, figures)
    progress = ProgressLine(target, echo)
    history = History(run, _info(agent, plan))
    every = settings["figures_every"]
    figure = DispatchFigure(site_days, every, logger) if site_days and every else None

    def saved(learner: Agent) -> None:
        progress.show(learner)
        if figure:
            figure.show(learner)

    pieces = [piece.content for piece in plan.replay]
    rows = [piece.fewest_rows for piece in plan.replay]
    plan.replay.clear()  # the callback forgets the pieces, too, once they are in the buffer
    trainer = _make_trainer(
        settings,
        agent,
        max_epochs=target,
        logger=logger,
        plugins=[
            EpisodeCheckpointIO(
                run, rows, learner.replay_capacity, plan.start and plan.start.content
            )
        ],
        callbacks=[
            signals,
            progress,
            history,
            EpisodeCheckpoint(run, saved, pieces),
        ],
    )
    for note in site_days.site.notes if site_days else ():
        echo(note)
    brought = users_callbacks(trainer)
    several = f" on {_processes(plan.rank.world_size)}" if plan.rank.world_size > 1 else ""
    if path:
        echo(f"Resuming {agent} at episode {done + 1} ({_count(done)} done){several}")
        assert plan.start
        given = {callback.state_key for callback in brought}
        for key in {**plan.start.content.get("callbacks", {})}.keys() - given:
            echo(f"Without the callback {key} it had before; --trainer.callbacks gives it again")
    else:
        seed = settings["seed_everything"]
        echo(f"Training {agent} for {_count(target)} (seed {seed}){several}")
    learner.train_on(plan.environment)
    learner.say = echo
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _threads(settings["threads"]), _quiet():
            try:
                trainer.fit(learner, ckpt_path=str(path) if path else None, weights_only=True)
            finally:
                logger.finalize("success")
    except BaseException as error:
        if not isinstance(error, Interrupted) and (launcher := trainer.strategy.launcher):
            launcher.kill(signal.SIGTERM)  # the ranks it has started wait for this one
        for callback in (progress, history):  # a callback before them may have raised again
            callback.on_exception(trainer, learner, error)
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, on_interrupt)  # which Lightning ignores from then on
            raise error.__context__ from None
        if isinstance(error, Exception) and (callback := _raised_by(error, brought)):
            what = f"--trainer.callbacks: {type(callback).__name__}"
            if not history.begun:
                raise UserError(f"{what} cannot work here: {error}") from error
            stands = f"{_count(run.get_next_episode() - 1)} saved, --ckpt_path last continues"
            kind = type(error).__name__
            raise TrainingError(f"{what} raised {kind}: {error}; {stands}") from error
        if isinstance(error, UserError | TrainingError | OSError | Interrupted) or not isinstance(
            error, Exception
        ):
            raise
        if is_loss(error):
            raise ConnectionError("another process of this run ended") from None
        if path is None or history.begun:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot be restored ({reason})") from error
    signals.check()
    if trainer.should_stop:
        echo(
            f"Ended at episode {trainer.current_epoch} of {target} by {_who(who_stopped(trainer))}"
        )
    target = trainer.current_epoch
    echo(
        f"{_count(target)} in {run.directory}; curves: tensorboard --logdir {settings['logs.dir']}"
    )
    return FitResult(agent, run.name, done + 1, target, run.path(target), dict(learner.metrics))


def _raised_by(error: Exception, callbacks: list[pl.Callback]) -> pl.Callback | None:
    """Return the callback that an error came from, if it is one of these."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            for callback in callbacks:
                if value is callback:
                    return callback
    return None


def _who(stopped_by: tuple[str, str]) -> str:
    callback, reason = stopped_by
    return f"{callback[:80]} ({reason[:200]})" if reason else callback[:80]


def _count(episodes: int) -> str:
    return f"{episodes} episode" if episodes == 1 else f"{episodes} episodes"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _info(agent: str, plan: _Plan) -> dict[str, Any]:
    """Return what the checkpoints and metadata.json say about the run."""
    info: dict[str, Any] = {
        "agent": agent,
        "seed": plan.settings["seed_everything"],
        "config": run_settings(plan.settings),
        "target_episode": plan.target,
        "world_size": plan.rank.world_size,
        "versions": {name: version(name) for name in _VERSIONS}
        | {"python": platform.python_version()},
    }
    if isinstance(plan.environment, SiteDays):
        site = plan.environment.site
        before = plan.start.content["run"] if plan.start else {}
        info["site"] = site_description(site)
        info["trained_days"] = trained_days.with_this_session(before, site)
    return info


def site_description(site: Site) -> dict[str, Any]:
    """Return the site's full configuration as plain data."""
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
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advertisements and its own deprecations off the screen.

    Nor does the thread that writes TensorBoard's files print a traceback on a full disk: its
    error is raised where the next figures are written, too.
    """
    hook = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 with torch 2.13, harmless.
            warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
            # Said in a line of ours.
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
            yield
    finally:
        threading.excepthook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
