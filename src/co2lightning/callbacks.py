"""What happens around an episode: the save, the history, the progress, the signals.

The order at an episode's end is the agent's metrics (written and flushed to TensorBoard), then
the checkpoint: a file on disk never knows of an episode its curves do not show.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard.summary import hparams

from co2lightning import event_files, ranks, storage
from co2lightning.agents.agent import Agent, short_metrics, tagged_metrics
from co2lightning.checkpoints import TrainingCheckpoint
from co2lightning.errors import TrainingError, UserError
from co2lightning.replay import fewest_rows
from co2lightning.terminal import acknowledge, take_signals

_WIDTH_FOR_A_BAR = 100  # columns; the figures need nearly 80
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.([0-9]+)\..*?(?:\.([0-9]+))?")


class EpisodeCheckpointIO(CheckpointIO):
    """Lets Lightning save and load through a run directory: atomic, hashed, plain data only."""

    def __init__(
        self,
        run: TrainingCheckpoint,
        rows: Sequence[int] = (),
        capacity: int | None = None,
        start: dict[str, Any] | None = None,
    ) -> None:
        """Remember the run.

        Args:
            run: The run directory.
            rows: Lengths of the pieces of earlier episodes that still fill the replay buffer.
            capacity: Transitions the buffer holds.
            start: What Lightning is to restore, read and checked already.
        """
        self.run = run
        self.start = start
        self.capacity = capacity
        self.rows = list(rows)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if Path(path) != self.run.path(checkpoint["episode"]):
            raise UserError(f"{path}: only whole episodes are saved, and each is saved anyway")
        content = dict(checkpoint)
        replay = content.pop("replay", None)
        if replay is not None:
            self.rows.append(fewest_rows(replay))
        try:
            self.run.save_checkpoint(
                content,
                episode=content.pop("episode"),
                metrics=content.pop("metrics"),
                replay=replay,
                replay_capacity_episodes=self._newest_that_fill(),
            )
        except ValueError as error:
            raise TrainingError(f"{_foreign_part(content)} cannot be saved: {error}") from error

    def _newest_that_fill(self) -> int | None:
        """Return how many of the newest pieces fill the buffer, None if all do not."""
        if self.capacity is None:
            return None
        while sum(self.rows[1:]) >= self.capacity:
            del self.rows[0]
        return len(self.rows) if sum(self.rows) >= self.capacity else None

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        assert self.start is not None
        return self.start

    def remove_checkpoint(self, path: Any) -> None:
        """Do nothing: `TrainingCheckpoint` alone decides what is pruned."""


def _foreign_part(content: dict[str, Any]) -> str:
    """Name what a callback has put into a checkpoint that is not plain data."""
    states = {f"the state of {name}": state for name, state in content["callbacks"].items()}
    for name, part in {**states, **content}.items():
        try:
            storage.seal_checkpoint({"part": part}, {})
        except ValueError:
            return f"--trainer.callbacks: {name}"
    return "an episode"


def users_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks that are none of these here."""
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]
    return [callback for callback in callbacks if type(callback).__module__ != __name__]


def who_stopped(trainer: pl.Trainer) -> tuple[str, str]:
    """Return which callback has ended training, and why where that is known: EarlyStopping's."""
    brought = users_callbacks(trainer)
    for callback in brought:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            reason = callback.stopping_reason_message.removesuffix("Signaling Trainer to stop.")
            return type(callback).__name__, reason.strip(" .")
    return type(brought[0]).__name__ if len(brought) == 1 else "a callback", ""


class EpisodeCheckpoint(ModelCheckpoint):
    """Saves every episode as `episode_0001.pt`, `episode_0002.pt`, ... of a run directory.

    Args:
        run: The run directory.
        saved: Called on the writing process when an episode is on disk.
        replay: Pieces that earlier episodes added to the agent's replay buffer.
    """

    FILE_EXTENSION = ".pt"

    def __init__(
        self,
        run: TrainingCheckpoint,
        saved: Callable[[Agent], None],
        replay: list[dict[str, Any]],
    ) -> None:
        super().__init__(
            dirpath=run.directory,
            filename="episode_{episode:04d}",
            save_top_k=-1,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self.run = run
        self.saved = saved
        self.replay = replay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the directory alone; `TrainingCheckpoint` makes it when the first file comes."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Agent)
        if self.replay:
            pl_module.restore_replay(self.replay)
        self.replay = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing in the middle of an episode."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not left to the base class: it skips a save when no optimizer stepped, and every episode
        # counts here, also one in which SAC only fills its replay.
        assert isinstance(pl_module, Agent)
        trainer.save_checkpoint(self.run.path(pl_module.episode))
        if trainer.is_global_zero:
            self.saved(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save nothing that is not a whole episode."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, Agent)
        checkpoint["episode"] = pl_module.episode
        checkpoint["metrics"] = short_metrics(pl_module.metrics)
        if trainer.should_stop:
            checkpoint["stopped_by"] = who_stopped(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a checkpoint says where it belongs, not on which disk it lay."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class History(pl.Callback):
    """Opens and closes the session in history.json and metadata.json.

    Args:
        run: The run directory.
        info: What metadata.json and every checkpoint say about the run.
    """

    def __init__(self, run: TrainingCheckpoint, info: dict[str, Any]) -> None:
        self.run = run
        self.info = info
        self.begun = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Agent)
        if trainer.world_size > 1 and not ranks.agree(pl_module.episode, pl_module.device):
            raise UserError(
                f"{self.run.directory}: the processes see different episodes in it; all of them "
                "need the same directory, on several machines on a shared disk"
            )
        if trainer.is_global_zero:
            self.run.begin_session(
                start_episode=pl_module.episode,
                device=pl_module.device.type,
                info=self.info,
            )
        self.begun = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.run.end_session("completed")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.is_global_zero:
            # A signal's, or what a caller's own handler raised.
            interrupted = isinstance(exception, Interrupted) or not isinstance(exception, Exception)
            self.run.end_session("interrupted" if interrupted else "failed")


class Curves(TensorBoardLogger):
    """One directory and one curve per tag for a run, however often it is resumed.

    Args:
        directory: Of all runs' logs.
        name: The run's name.
        done: Episodes on disk; TensorBoard forgets what an earlier session wrote beyond them.
        layout: Charts of several runs: category -> chart -> tags.
        history: The figures of the episodes done; those that the curves lack are drawn again.
    """

    def __init__(
        self,
        directory: str,
        name: str,
        done: int,
        layout: dict[str, Any] | None = None,
        history: Sequence[Mapping[str, float | None]] = (),
    ) -> None:
        self._begun = _order_event_files(Path(directory) / name, history)
        super().__init__(
            directory, name=name, version="", default_hp_metric=False, purge_step=done + 1
        )
        self._done = done
        self._layout = layout

    @rank_zero_only
    def log_hyperparams(
        self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Fill the hparams tab, its columns the run's own curves, and the layout; once per run."""
        if self._done and self._begun:
            return
        plain = {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in dict(params).items()
        }
        columns = {"rollout/ep_rew_mean": 0.0, "site/co2_kg": 0.0, "site/unmet_kwh": 0.0}
        for summary in hparams(plain, metrics or columns):
            self.experiment._get_file_writer().add_summary(summary)
        if self._layout:
            self.experiment.add_custom_scalars(self._layout)

    @rank_zero_only
    def save(self) -> None:
        """Flush; the parameters' file stands in the run directory as metadata.json."""
        self.experiment.flush()


@rank_zero_only
def _order_event_files(directory: Path, history: Sequence[Mapping[str, float | None]]) -> bool:
    """Give a run's event files names that sort before the next one's, and add what they lack.

    TensorBoard reads them by name, which begins with the second of their making: two sessions
    within one second, or a clock that was set back, would have their order reversed. Names only
    move to earlier seconds and the oldest file's first, so a kill in between leaves the order.

    Returns:
        Whether there was any.
    """
    found = directory.iterdir() if directory.is_dir() else ()
    files = [path for path in found if _EVENT_FILE.fullmatch(path.name)]
    moves: list[tuple[Path, Path]] = []
    second = int(time.time())
    for path in sorted(files, key=_made, reverse=True):
        second = min(_made(path)[0], second - 1)
        rest = path.name.split(".", 4)[4]
        moves.insert(0, (path, directory / f"events.out.tfevents.{second:010d}.{rest}"))
    for path, target in moves:
        if path != target:
            path.rename(target)
    figures = {int(row["episode"] or 0): tagged_metrics(row) for row in history}
    event_files.complete(directory, [target for _, target in moves], figures)
    return bool(files)


def _made(path: Path) -> tuple[int, int]:
    """Return when an event file was made and its number within its process."""
    match = _EVENT_FILE.fullmatch(path.name)
    assert match
    return int(match[1]), int(match[2] or 0)


class Interrupted(Exception):
    """A signal asked for the end."""

    def __init__(self, signum: int, rank: int = 0) -> None:
        super().__init__(signal.Signals(signum).name)
        # Lightning kills rank 0, which is still closing the session, when another ends in error.
        self.exit_code = 128 + signum if rank == 0 else 0


class Signals(pl.Callback):
    """Ends training at the next segment after SIGINT, SIGTERM or SIGHUP; at once on a second one.

    Nothing is raised inside a save: the handler only sets a flag. Ranks tell each other, so that
    a signal to one of them ends all at the same segment.
    """

    def __init__(self) -> None:
        self.received = 0
        self.speaks = False
        self._previous: dict[int, Any] = {}

    def install(self, speaks: bool = True) -> None:
        """Take the signals over; `speaks` says whether the first one is acknowledged by a line."""
        self.speaks = speaks
        self._previous = take_signals(self._handle)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        if self.speaks:
            acknowledge("Stopping after this segment; once more ends at once")

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.received:
            raise Interrupted(self.received)

    def _agree(self, trainer: pl.Trainer) -> None:
        received = self.received  # a copy: a signal during the message belongs to the next one
        if trainer.world_size > 1:
            received = ranks.highest(received, trainer.strategy.root_device)
        if received:
            raise Interrupted(received, trainer.global_rank)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._agree(trainer)
        assert isinstance(pl_module, Agent)
        pl_module.between_segments = partial(self._agree, trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._agree(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a signal during the last save end the session as interrupted too."""
        self._agree(trainer)


class ProgressLine(pl.Callback):
    """Shows where training stands: a live line on a terminal, a line per episode elsewhere.

    Args:
        total: The last episode of this session.
        echo: Where the plain lines go.
    """

    def __init__(self, total: int, echo: Callable[[str], None] = print) -> None:
        self.total = total
        self.echo = echo
        self.live: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        console = Console()
        if not trainer.is_global_zero or not console.is_terminal or "NO_COLOR" in os.environ:
            return
        wide = console.width >= _WIDTH_FOR_A_BAR
        self.live = Progress(
            TextColumn("Episode {task.completed:.0f}/{task.total:.0f}"),
            *([BarColumn(bar_width=None)] if wide else []),
            TextColumn("{task.fields[figures]}"),
            *([TextColumn("left")] if wide else []),
            TimeRemainingColumn(),
            console=console,
        )
        assert isinstance(pl_module, Agent)
        self._task = self.live.add_task(
            "fit", total=self.total, completed=pl_module.episode - 1, figures=""
        )
        with contextlib.suppress(OSError):  # a terminal that was closed ends no training
            self.live.start()

    def show(self, agent: Agent) -> None:
        """Show the episode an agent has just finished."""
        line = episode_line(agent.episode, self.total, short_metrics(agent.metrics))
        if self.live:
            self.live.update(self._task, completed=agent.episode, figures=line.split(": ", 1)[1])
        else:
            self.echo(line)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Show what a profiler found, which forgets it after this."""
        profiler: Profiler = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]
        for line in (profiler.summary() or "").splitlines():
            self.echo(line.expandtabs())

    def _stop(self) -> None:
        if self.live:
            with contextlib.suppress(OSError):
                self.live.stop()
            self.live = None


def episode_line(episode: int, total: int, metrics: dict[str, float]) -> str:
    """Return one line about an episode; energy not served is never left out when there is any."""
    parts: list[str] = []
    if "co2_kg" in metrics:
        change = 100.0 * (metrics["co2_vs_uncontrolled"] - 1.0)
        parts.append(f"CO2={metrics['co2_kg']:6.1f} kg ({change:+.0f} %)")
        if metrics["unmet_kwh"] >= 0.05:
            parts.append(f"unmet={metrics['unmet_kwh']:6.1f} kWh")
    parts.append(f"reward={metrics['reward']:7.1f}")
    parts.append(f"{metrics['time_seconds']:.1f} s")
    return f"Episode {episode:>4}/{total}: " + " | ".join(parts)
