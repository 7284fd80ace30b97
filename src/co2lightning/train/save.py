"""A run through Lightning's eyes: what it saves is an episode's file, what it restores is one.

The order at an episode's end is the agent's metrics (written and flushed to TensorBoard), then
the checkpoint: a file on disk never knows of an episode its curves do not show.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from co2lightning.agents.agent import Agent
from co2lightning.agents.load import adam_state
from co2lightning.agents.replay import fewest_rows
from co2lightning.errors import TrainingError, UserError
from co2lightning.learn import ranks
from co2lightning.metrics import TRAINING, short_metrics
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.runs.seal import seal_checkpoint
from co2lightning.train.signals import Interrupted
from co2lightning.train.trainer import who_stopped


class EpisodeCheckpoint(ModelCheckpoint):
    """Opens the session in a run directory, saves every episode in it, closes the session.

    Lightning lets it come after the agent's metrics and all other callbacks.

    Args:
        run: The run directory.
        info: What metadata.json and every checkpoint say about the run.
        saved: Called on the writing process when an episode is on disk.
        replay: Pieces that earlier episodes added to the agent's replay buffer; emptied once they
            are in it.
    """

    def __init__(
        self,
        run: TrainingCheckpoint,
        info: dict[str, Any],
        saved: Sequence[Callable[[Agent], None]],
        replay: list[dict[str, Any]],
    ) -> None:
        # Not `save_on_exception`, which would save half an episode under a whole one's name.
        super().__init__(run.directory, save_top_k=-1, enable_version_counter=False)
        self.run = run
        self.info = info
        self.saved = saved
        self.replay = replay
        self.begun = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Do nothing; the base warns of a directory that is not empty, as at each resume."""

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
            if pl_module.episode == 1:
                self.run.save_start(_start_of(trainer, pl_module))
            self._show_best()
        self.begun = True
        pl_module.restore_replay(self.replay)
        self.replay.clear()

    def format_checkpoint_name(self, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        """Return the name that the run directory gives; the base's `:04d` fails on a float."""
        return str(self.run.path(int(metrics["episode"])))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the episode; the base skips those in which no optimizer stepped, as SAC's first."""
        assert isinstance(pl_module, Agent)
        path = self.format_checkpoint_name({"episode": pl_module.episode})
        trainer.save_checkpoint(path)
        self.last_model_path = path
        if trainer.is_global_zero:
            if TRAINING["eval_vs_uncontrolled"].tag in pl_module.metrics:
                self._show_best()  # only then: it goes through the whole history
            for call in self.saved:
                call(pl_module)

    def _show_best(self) -> None:
        """Tell Lightning's users which file is the best; none before an episode was evaluated."""
        if best := self.run.best_evaluated():
            self.best_model_score = torch.tensor(best[0])
            self.best_model_path = str(self.run.path(best[1]))

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
        """Do nothing: only a stranger's file has a state here, and the base believes its paths."""

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


def _start_of(trainer: pl.Trainer, learner: Agent) -> dict[str, Any]:
    """Return what a run begins with, in the form of an episode: no step was taken yet."""
    content: dict[str, Any] = {
        "epoch": -1,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": learner.state_dict(),
        "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "lr_schedulers": [],
        "loops": {},
        "callbacks": {},
    }
    Agent.on_save_checkpoint(learner, content)  # without a replay buffer, which is empty
    return content


@dataclass(eq=False)
class EpisodeCheckpointIO(CheckpointIO):
    """Lets Lightning save and load through a run directory: atomic, hashed, plain data only."""

    run: TrainingCheckpoint
    start: dict[str, Any] | None  # what Lightning is to restore, see `restorable`
    rows: list[int]  # of the pieces of earlier episodes that still fill the replay buffer
    capacity: int | None  # transitions that the buffer holds

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


def restorable(content: dict[str, Any], origin: Path, learner: Agent) -> dict[str, Any]:
    """Return an episode's content as Lightning restores it, checked.

    Of the optimizer it is what was gathered; the optimizer's settings and Lightning's loops follow
    from the agent and the episode, whatever the file says.

    Raises:
        UserError: It does not fit the agent; `origin` names its file.
    """
    optimizer = learner.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    try:
        if not isinstance(content.get("callbacks", {}), dict):
            raise TypeError("callbacks holds no states")
        state = adam_state(content, optimizer.param_groups[0]["params"])
    except Exception as error:  # whatever a foreign file provokes
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{origin}: does not fit {type(learner).__name__} ({reason})") from None
    return {
        **content,
        "pytorch-lightning_version": version("lightning"),  # so that it migrates nothing
        "loops": _loops_after(content["episode"]),
        "optimizer_states": [{**optimizer.state_dict(), "state": state}],
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
