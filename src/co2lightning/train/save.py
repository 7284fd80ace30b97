"""What happens around an episode: the save, the history, the progress, the signals.

The order at an episode's end is the agent's metrics (written and flushed to TensorBoard), then
the checkpoint: a file on disk never knows of an episode its curves do not show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from co2lightning.agents.agent import Agent
from co2lightning.agents.replay import fewest_rows
from co2lightning.errors import TrainingError, UserError
from co2lightning.metrics import short_metrics
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.runs.seal import seal_checkpoint


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
            seal_checkpoint({"part": part}, {})
        except ValueError:
            return f"--trainer.callbacks: {name}"
    return "an episode"


def users_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks that are none of these here."""
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]
    ours = __name__.rpartition(".")[0]
    return [each for each in callbacks if type(each).__module__.rpartition(".")[0] != ours]


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
