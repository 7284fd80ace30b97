"""A training session: what `co2lightning fit` and `co2lightning.fit` do.

Everything that can be refused is refused before anything on disk changes (`plan`). After that one
process holds the run's lock from its first change to its last.
"""

import contextlib
import os
import platform
import shlex
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from co2lightning import __version__
from co2lightning.agents.load import outdated_on_site, rewarded_otherwise
from co2lightning.errors import TrainingError, UserError, counted, show
from co2lightning.learn.ranks import Rank, is_loss
from co2lightning.runs.branches import ROOM_IN_NAMES
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.settings.parser import check_settings, complete, run_settings
from co2lightning.settings.recipe import Settings, as_recipe, flatten, read_recipe
from co2lightning.sim.days import SiteDays
from co2lightning.site import trained_days
from co2lightning.terminal import tell
from co2lightning.train.board import REFERENCES, DispatchFigure, layout
from co2lightning.train.curves import Curves
from co2lightning.train.evaluation import Evaluation, best_in_words
from co2lightning.train.plan import (
    Asked,
    Built,
    begin_at_corner,
    build,
    find_start,
    plan,
    which_agent,
)
from co2lightning.train.progress import ProgressLine
from co2lightning.train.save import EpisodeCheckpoint, EpisodeCheckpointIO
from co2lightning.train.signals import Interrupted, Signals
from co2lightning.train.trainer import make_trainer, processes, quiet, users_callbacks, who_stopped

_VERSIONS = ("lightning", "torch", "gymnasium", "numpy")
_OF_THE_SITE = ("name", "sha256", "pv_kwp", "grid_kw", "timezone", "step_minutes", "day_start_h")
_count = partial(counted, noun="episode")


@dataclass(frozen=True)
class _FitResult:
    """What a session left behind."""

    agent: str
    name: str
    first_episode: int
    last_episode: int
    checkpoint: Path | None
    metrics: dict[str, float]


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


def run_fit(
    flags: Settings,
    *,
    agent: str,
    config: str | None = None,
    signals: Signals | None = None,
    echo: Callable[[str], None] = tell,
) -> _FitResult:
    """Train, from a new start or a checkpoint.

    Args:
        flags: What was asked for, under dotted keys; wins over the run and the recipe.
        agent: A2C, SAC, PPO or APG.
        config: A recipe of that agent; by default its own.
        signals: Installed before anything is written; None leaves signals alone.
        echo: Receives the lines for the user.

    Raises:
        UserError: What was asked cannot be; nothing on disk was changed.
        Interrupted: A signal ended it; the last whole episode is on disk.
        TrainingError: It cannot go on, or a callback raised; the last good episode is on disk.
    """
    config = config or f"{agent.lower()}.yaml"
    named, recipe = read_recipe(config)
    if named != agent:  # a file here, under the name of the agent's own
        raise UserError(f"--model {agent}: {config} is a recipe of {named}; give one by --config")
    asked = Asked(agent, config, check_settings(recipe, agent, config), flags)
    session = asked.session
    name = agent if session["name"] is None else session["name"]
    _check_name(name)
    logs = Path(session["logs.dir"]) / name
    run = TrainingCheckpoint(
        Path(session["checkpoints.dir"]) / name,
        logs=logs,
        keep_last=session["checkpoints.keep_last"],
    )
    trainer = make_trainer(session, agent)
    rank = Rank(trainer.global_rank, trainer.world_size)
    _check_place("--checkpoints.dir", session["checkpoints.dir"], name)
    _check_place("--logs.dir", session["logs.dir"], name)
    _check_text(logs)
    if run.half_archived() and not rank.number:  # a plan is made of what stands after that
        with _held(run, echo):
            pass
    planned = plan(asked, find_start(run, asked))
    built = build(planned, rank)
    if session["print_config"]:
        for line in as_recipe(built.settings, agent, complete({}, agent)).splitlines():
            echo(line)
        return _FitResult(agent, name, planned.done + 1, planned.done, None, {})
    if signals:
        signals.install(speaks=rank.number == 0)
    signals = signals or Signals()
    if rank.number:  # rank 0 prepares the run, writes and speaks; Lightning lets the others wait
        return _train(run, built, trainer, signals, lambda line: None)
    with _held(run, echo):
        held = plan(asked, find_start(run, asked))
        if held != planned:  # another process has changed the run meanwhile
            built = build(held, rank)
        for line in built.notes:
            echo(line)
        return _train(run, built, trainer, signals, echo)


def _check_name(name: str) -> None:
    if name in ("", "archive", REFERENCES) or name.startswith(".") or set(name) & set("/\\:"):
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


def _check_text(logs: Path) -> None:
    """Refuse a name that TensorBoard cannot write, which takes UTF-8 only."""
    if str(logs).encode("utf-8", "replace").decode("utf-8") != str(logs):
        raise UserError(
            f"--logs.dir {logs}: is no UTF-8 text, as TensorBoard needs; give another name, or a "
            "UTF-8 locale, such as LC_ALL=C.UTF-8"
        )


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


def _prepare_run(run: TrainingCheckpoint, built: Built, echo: Callable[[str], None]) -> None:
    """Archive or branch what is in the way, so that the run ends where training starts."""
    start, settings = built.plan.start, built.settings
    if start is None and built.plan.asked.flags.get("ckpt_path") == "last":
        # Nothing to archive: sessions that died before their first episode stay in the history.
        echo(f"No checkpoint in {run.directory}: starting at episode 1")
        return
    newest = run.get_next_episode() - 1
    known = run.load_metadata()
    goes_on_from = newest and not (outdated_on_site(known) or rewarded_otherwise(known))
    done = built.plan.done
    if goes_on := done and start and start.path.resolve() == run.path(done).resolve():
        moved, what = run.branch(done), "Later episodes of the old branch moved"
    else:
        moved, what = run.archive(), f"The run in {run.directory} was moved"
    if moved:
        file = moved / run.path(newest).name
        how = f"; {_how_to_continue(file, settings)}" if goes_on_from else ""
        echo(f"{what} to {moved}{how}")
    if start and done and not goes_on:
        source, logs = start.path.parent, Path(settings["logs.dir"])
        if source.parent.name == "archive":
            logs /= "archive"
        run.adopt(start.path, logs / source.name)
        echo(f"Copied what came before episode {start.episode + 1} from {source}")


def _how_to_continue(file: Path, settings: Settings) -> str:
    given = {"ckpt_path": str(file)}
    defaults = {"name": None, "checkpoints.dir": "checkpoints", "logs.dir": "lightning_logs"}
    given |= {key: settings[key] for key, value in defaults.items() if settings[key] != value}
    flags = " ".join(f"--{key} {shlex.quote(value)}" for key, value in given.items())
    return f"co2lightning fit {flags} continues it"


def _train(
    run: TrainingCheckpoint,
    built: Built,
    trainer: pl.Trainer,
    signals: Signals,
    echo: Callable[[str], None],
) -> _FitResult:
    """Carry a plan out."""
    start, target, done = built.plan.start, built.plan.target, built.plan.done
    learner, settings = built.learner, built.settings
    agent = type(learner).__name__
    if start and target <= done:
        if start.stopped_by and target == done:
            by = _who(start.stopped_by)
            echo(f"{agent} was ended at episode {done} by {by}; --episodes N trains on")
        else:
            echo(f"{agent} stands at episode {done}; {_count(target)} in total are done")
        return _FitResult(agent, run.name, done + 1, done, start.path, {})
    if built.rank.number == 0:
        _prepare_run(run, built, echo)
    site_days = built.environment if isinstance(built.environment, SiteDays) else None
    sessions = run.load_history()["trainings"] if done else []
    figures = [row for session in sessions for row in session["metrics"]]
    charts = layout(site_days.site.price_per_kwh is not None) if site_days else None
    logger = Curves(settings["logs.dir"], run.name, done, charts, figures)
    progress = ProgressLine(target, echo)
    shows = [progress.show]
    if site_days and (every := settings["evaluate_every"]):
        learner.evaluated = partial(Evaluation(every, site_days, run.path(0)).of, learner)
    if site_days and (every := settings["figures_every"]):
        shows.append(DispatchFigure(site_days, every, logger).show)
    episodes = EpisodeCheckpoint(run, _info(agent, built), shows, built.replay)
    capacity = learner.replay_capacity
    trainer.fit_loop.max_epochs = target
    trainer.logger = logger
    trainer.strategy.checkpoint_io = EpisodeCheckpointIO(run, built.restored, built.rows, capacity)
    vars(trainer)["callbacks"] += [signals, progress, episodes]
    for note in site_days.site.notes if site_days else ():
        echo(note)
    brought = users_callbacks(trainer)
    count = built.rank.world_size
    several = f" on {processes(count)}" if count > 1 else ""
    if start and done:
        echo(f"Resuming {agent} at episode {done + 1} ({_count(done)} done){several}")
        given = {callback.state_key for callback in brought}
        for key in {**start.content.get("callbacks", {})}.keys() - given:
            echo(f"Without the callback {key} it had before; --trainer.callbacks gives it again")
    else:
        seed, begun = settings["seed_everything"], f" from {start.path}" if start else ""
        echo(f"Training {agent} for {_count(target)} (seed {seed}){begun}{several}")
        if corner := begin_at_corner(built):
            echo(f"Starting from the corner: {corner}")
    learner.say = echo
    path = str(run.path(done)) if done else None
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with quiet(), contextlib.ExitStack() as after:
            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(settings["threads"])
            after.callback(logger.finalize, "success")
            trainer.fit(learner, ckpt_path=path, weights_only=True)
    except BaseException as error:
        if not isinstance(error, Interrupted) and (launcher := trainer.strategy.launcher):
            launcher.kill(signal.SIGTERM)  # the ranks it has started wait for this one
        for callback in (progress, episodes):  # a callback before them may have raised again
            callback.on_exception(trainer, learner, error)
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, on_interrupt)  # which Lightning ignores from then on
            raise error.__context__ from None
        if isinstance(error, Exception):
            _say_what_failed(error, trainer, episodes, path)
        raise
    signals.check()
    last, curves = trainer.current_epoch, f"curves: tensorboard --logdir {settings['logs.dir']}"
    if trainer.should_stop:
        echo(f"Ended at episode {last} of {target} by {_who(who_stopped(trainer))}")
    if settings["evaluate_every"] and not built.rank.number and (best := best_in_words(run)):
        echo(best)
    echo(f"{_count(last)} in {run.directory}; {curves}")
    return _FitResult(agent, run.name, done + 1, last, run.path(last), dict(learner.metrics))


def _say_what_failed(
    error: Exception, trainer: pl.Trainer, episodes: EpisodeCheckpoint, path: str | None
) -> None:
    """Raise what tells the user whose an error of `Trainer.fit` is, unless it says so itself."""
    if callback := _raised_by(error, users_callbacks(trainer)):
        what = f"--trainer.callbacks: {type(callback).__name__}"
        if not episodes.begun:
            raise UserError(f"{what} cannot work here: {error}") from error
        stands = f"{_count(episodes.run.get_next_episode() - 1)} saved, --ckpt_path last continues"
        raise TrainingError(f"{what} raised {type(error).__name__}: {error}; {stands}") from error
    if isinstance(error, UserError | TrainingError | OSError | Interrupted):
        return
    if is_loss(error):
        raise ConnectionError("another process of this run ended") from None
    if path and not episodes.begun:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot be restored ({reason})") from error


def _raised_by(error: Exception, callbacks: list[pl.Callback]) -> pl.Callback | None:
    """Return the callback that an error came from, if it is one of these."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    values = [value for frame in frames for value in frame.f_locals.values()]
    return next((each for value in values for each in callbacks if each is value), None)


def _who(stopped_by: tuple[str, str]) -> str:
    callback, reason = stopped_by
    return f"{callback[:80]} ({reason[:200]})" if reason else callback[:80]


def _info(agent: str, built: Built) -> dict[str, Any]:
    """Return what the checkpoints and metadata.json say about the run."""
    start = built.plan.start
    info: dict[str, Any] = {
        "agent": agent,
        "seed": built.settings["seed_everything"],
        "config": run_settings(built.settings),
        "target_episode": built.plan.target,
        "world_size": built.rank.world_size,
        "versions": {
            "co2lightning": __version__,
            **{name: version(name) for name in _VERSIONS},
            "python": platform.python_version(),
        },
    }
    if isinstance(built.environment, SiteDays):
        site = built.environment.site
        info["site"] = {
            **{key: getattr(site, key) for key in _OF_THE_SITE},
            "battery": dict(vars(site.battery)) if site.battery else None,
            "sockets": [dict(vars(sockets)) for sockets in site.sockets],
            "days": len(site.days),
            "held_out_days": int(site.held_out.sum()),
            "held_out_stretches": len(site.stretches),
        }
        before = start.content["run"] if start else {}
        info["trained_days"] = trained_days.with_this_session(before, site)
    return info
