"""What the terminal shows while training runs."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from co2lightning.agents.agent import Agent
from co2lightning.metrics import short_metrics

_WIDTH_FOR_A_BAR = 100  # columns; the figures need nearly 80


class ProgressLine(pl.Callback):
    """Shows where training stands: a live line on a terminal, a line per episode elsewhere.

    Args:
        total: The last episode of this session.
        echo: Where the plain lines go.
    """

    def __init__(self, total: int, echo: Callable[[str], None]) -> None:
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
        figures = _figures(short_metrics(agent.metrics))
        if self.live:
            self.live.update(self._task, completed=agent.episode, figures=figures)
        else:
            self.echo(f"Episode {agent.episode:>4}/{self.total}: {figures}")

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


def _figures(metrics: dict[str, float]) -> str:
    """Return an episode's figures; energy not served is never left out when there is any."""
    parts: list[str] = []
    if "co2_kg" in metrics:
        change = 100.0 * (metrics["co2_vs_uncontrolled"] - 1.0)
        share = f" ({change:+.0f} %)" if metrics["uncontrolled_kg"] > 1e-6 else ""  # of nothing
        parts.append(f"CO2={metrics['co2_kg']:6.1f} kg{share}")
        if "cost" in metrics:
            parts.append(f"cost={metrics['cost']:7.2f}")
        if metrics["unmet_kwh"] >= 0.05:
            parts.append(f"unmet={metrics['unmet_kwh']:6.1f} kWh")
    parts.append(f"reward={metrics['reward']:7.3f}")
    parts.append(f"{metrics['time_seconds']:.1f} s")
    return " | ".join(parts)
