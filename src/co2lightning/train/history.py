"""The callback that saves each episode and keeps history and metadata."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from co2lightning.agents.agent import Agent
from co2lightning.errors import UserError
from co2lightning.learn import ranks
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.train.signals import Interrupted


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
