"""The callback that writes TensorBoard's curves, and the order in which it reads their files."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from co2lightning.metrics import tagged_metrics
from co2lightning.train import event_files

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.([0-9]+)\..*?(?:\.([0-9]+))?")


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
