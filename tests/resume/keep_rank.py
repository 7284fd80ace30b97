"""A callback for a run's ranks: each leaves what it ended with, to be compared."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch


class KeepRank(pl.Callback):
    """Writes `<run's name>-rank<number>.pt` to the working directory when training ends."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module: Any = pl_module
        assert trainer.logger
        torch.save(
            {
                "weights": module.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict()["state"],
                "replay": module.replay.table if getattr(module, "replay", None) else None,
                "metrics": {k: v for k, v in module.metrics.items() if not k.startswith("time/")},
            },
            f"{trainer.logger.name}-rank{trainer.global_rank}.pt",
        )
