"""What SIGINT, SIGTERM and SIGHUP do to a training: the last whole episode stands.

    before anything is written  the system's own action: nothing needs to be closed
    the first                   a line; at the next segment of the episode `Interrupted` on all
                                ranks: the running episode is dropped, the session closed as
                                "interrupted", the exit code 128 + the signal
    the second                  the process ends at once, as by a kill: no file is half written
    one that we were to ignore  is ignored still, as under nohup or by & in a script

Nothing is raised inside a save: the handler only sets a flag. Ranks tell each other, so that a
signal to one of them ends all at the same segment.
"""

import os
import signal
from functools import partial
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from co2lightning.agents.agent import Agent
from co2lightning.learn import ranks
from co2lightning.terminal import acknowledge, take_signals


class Interrupted(Exception):
    """A signal asked for the end."""

    def __init__(self, signum: int, rank: int = 0) -> None:
        super().__init__(signal.Signals(signum).name)
        # Lightning kills rank 0, which is still closing the session, when another ends in error.
        self.exit_code = 128 + signum if rank == 0 else 0


class Signals(pl.Callback):
    """Ends training after the first signal; one not installed leaves them to the caller."""

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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep Lightning's own handlers out: they would end with exit code 0."""
        trainer._signal_connector.register_signal_handlers = lambda: None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._agree(trainer)
        assert isinstance(pl_module, Agent)
        pl_module.between_segments = partial(self._agree, trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._agree(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a signal during the last save end the session as interrupted too."""
        self._agree(trainer)
