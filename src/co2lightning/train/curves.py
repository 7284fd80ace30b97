"""TensorBoard's curves of a run: one directory, one curve per tag, however often it is resumed.

TensorBoard reads a directory's event files by name, which begins with the second of their making,
and takes a step that comes after a later one for a restart. So files of earlier sessions are given
names that keep their order, and what they lack of the run's history gets files in its place.
"""

import io
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams

from co2lightning.metrics import tagged_metrics
from co2lightning.runs.files import open_file, sweep, write_atomic

# The second of its making, and its number within its process.
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.([0-9]+)\..*?(?:\.([0-9]+))?")
_BEFORE_ALL = "events.out.tfevents.0000000000.history.0"
_SHOWN = "rollout/ep_rew_mean"  # an episode that has this point has all
_MOST_BYTES = 100_000  # of an event with scalars; a larger one is an image
# Made when imported, so not to be seen by a type checker.
_Event: Any = vars(event_pb2)["Event"]
_START = vars(event_pb2)["SessionLog"].START
_Summary: Any = vars(summary_pb2)["Summary"]


class Curves(TensorBoardLogger):
    """The logger of a run.

    Args:
        directory: Of all runs' logs.
        name: The run's name.
        done: Episodes on disk; TensorBoard forgets what an earlier session wrote beyond them.
        layout: Charts of several runs: category -> chart -> tags.
        history: The figures of the episodes done; those that the curves lack are drawn again, as
            in a run that was copied without them.
    """

    def __init__(
        self,
        directory: str,
        name: str,
        done: int,
        layout: dict[str, Any] | None = None,
        history: Sequence[Mapping[str, float | None]] = (),
    ) -> None:
        self._begun = _prepare(Path(directory) / name, history)
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


def encode(figures: Mapping[int, Mapping[str, float]]) -> bytes:
    """Return an event file with the points of each episode: episode -> tag -> value."""
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    now = time.time()
    writer.write(_Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for episode, values in figures.items():
        points = [_Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = _Event(wall_time=now, step=episode, summary=_Summary(value=points))
        writer.write(event.SerializeToString())
    return buffer.getvalue()


@rank_zero_only
def _prepare(directory: Path, history: Sequence[Mapping[str, float | None]]) -> bool:
    """Order a run's event files and add what they lack; returns whether there was any."""
    found = directory.iterdir() if directory.is_dir() else ()
    files = _order([path for path in found if _EVENT_FILE.fullmatch(path.name)])
    if history:
        directory.mkdir(parents=True, exist_ok=True)
        sweep(directory)  # of a start that was killed below
        figures = {int(row["episode"] or 0): tagged_metrics(row) for row in history}
        for name, episodes in _gaps(files, sorted(figures)).items():
            write_atomic(directory / name, encode({n: figures[n] for n in episodes}))
    return bool(files)


def _order(files: list[Path]) -> list[Path]:
    """Give event files names that sort as they were made, all before the next one's.

    Two sessions within one second, or a clock that was set back, would have their order reversed.
    Names only move to earlier seconds and the oldest file's first, so a kill in between leaves the
    order.
    """
    moves: list[tuple[Path, Path]] = []
    second = int(time.time())
    for path in sorted(files, key=_made, reverse=True):
        second = min(_made(path)[0], second - 1)
        rest = path.name.split(".", 4)[4]
        moves.insert(0, (path, path.with_name(f"events.out.tfevents.{second:010d}.{rest}")))
    for path, target in moves:
        if path != target:
            path.rename(target)
    return [target for _, target in moves]


def _made(path: Path) -> tuple[int, int]:
    """Return when an event file was made and its number within its process, -1 without one."""
    match = _EVENT_FILE.fullmatch(path.name)
    assert match
    return int(match[1]), int(match[2] or -1)


def _gaps(files: list[Path], wanted: list[int]) -> dict[str, list[int]]:
    """Return which episodes no event file shows, under the name of a file for them.

    Args:
        files: The event files, in TensorBoard's order.
        wanted: The run's episodes, ascending.
    """
    shown: dict[Path, set[int]] = {}
    for path in files:
        begin, episodes = _read(path)
        if begin is not None:
            shown = {p: {n for n in found if n < begin} for p, found in shown.items()}
        shown[path] = episodes
    known = set[int]().union(*shown.values())
    spans = [(path, min(found), max(found)) for path, found in shown.items() if found]
    gaps: dict[str, list[int]] = {}
    for episode in wanted:
        before = [(path, last) for path, first, last in spans if first < episode]
        # Within a file nothing can be put in.
        if episode not in known and all(last < episode for _, last in before):
            name = _BEFORE_ALL
            if before:  # sorts behind that file and before the next one
                after = before[-1][0]
                name = f"{after.name}.{_made(after)[1] + 1}"
            gaps.setdefault(name, []).append(episode)
    return gaps


def _read(path: Path) -> tuple[int | None, set[int]]:
    """Return from which episode on a file replaces the files before it, and those it shows."""
    first: int | None = None
    episodes = set[int]()
    for event in _events(path):
        if event.HasField("session_log") and event.session_log.status == _START:
            first = event.step
        if any(value.tag == _SHOWN for value in event.summary.value):
            episodes.add(event.step)
    return first, episodes


def _events(path: Path) -> Iterator[Any]:
    """Yield the events of a file up to where it is torn, without those that hold images."""
    try:
        descriptor = open_file(path)
    except (OSError, ValueError):
        return
    with open(descriptor, "rb") as file:
        while len(head := file.read(12)) == 12:  # the length and its checksum
            (size,) = struct.unpack("<Q", head[:8])
            if size > _MOST_BYTES:
                file.seek(min(size, 1 << 40) + 4, os.SEEK_CUR)
                continue
            data = file.read(size + 4)  # the event and its checksum
            try:
                yield _Event.FromString(data[:size])
            except DecodeError:
                return
