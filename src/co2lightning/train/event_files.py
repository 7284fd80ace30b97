"""The event files of a run's curves: which episodes they show, and those that they lack.

What history.json knows of a run is drawn again where its curves are missing, as in a run that was
copied without them. TensorBoard reads the files by name and takes a step that comes after a later
one for a restart, so each gap gets a file of its own in its place.
"""

from __future__ import annotations

import io
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from co2lightning.runs.files import open_file, sweep, write_atomic

# Made when imported, so not to be seen by a type checker.
Event: Any = vars(event_pb2)["Event"]
START = vars(event_pb2)["SessionLog"].START
Summary: Any = vars(summary_pb2)["Summary"]
SHOWN = "rollout/ep_rew_mean"  # an episode that has this point has all
MOST_BYTES = 100_000  # of an event with scalars; a larger one is an image


def complete(
    directory: Path, files: list[Path], figures: Mapping[int, Mapping[str, float]]
) -> None:
    """Write the points that a run's event files lack.

    Args:
        directory: Where they are.
        files: The files, in TensorBoard's order.
        figures: Episode -> tag -> value.
    """
    if not figures:
        return
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory)  # of a start that was killed below
    shown: dict[Path, set[int]] = {}
    for path in files:
        begin, shown[path] = _read(path)
        for before in shown.values():
            if before is not shown[path] and begin is not None:
                before -= {episode for episode in before if episode >= begin}
    known = set[int]().union(*shown.values())
    spans = [(path, min(found), max(found)) for path, found in shown.items() if found]
    gaps: dict[Path | None, list[int]] = {}
    for episode in sorted(set(figures) - known):
        before = [(path, last) for path, first, last in spans if first < episode]
        if all(last < episode for _, last in before):  # within a file nothing can be put in
            gaps.setdefault(before[-1][0] if before else None, []).append(episode)
    for after, episodes in gaps.items():
        if after is None:
            name = "events.out.tfevents.0000000000.history.0"
        else:  # sorts behind that file and before the next one
            number = re.search(r"\.([0-9]+)$", after.name)
            name = f"{after.name}.{int(number[1]) + 1 if number else 0}"
        write_atomic(directory / name, encode({n: figures[n] for n in episodes}))


def encode(figures: Mapping[int, Mapping[str, float]]) -> bytes:
    """Return an event file with the points of each episode: episode -> tag -> value."""
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    now = time.time()
    writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for episode, values in figures.items():
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = Event(wall_time=now, step=episode, summary=Summary(value=points))
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def _read(path: Path) -> tuple[int | None, set[int]]:
    """Return from which episode on a file replaces the files before it, and those it shows."""
    first: int | None = None
    episodes = set[int]()
    for event in _events(path):
        if event.HasField("session_log") and event.session_log.status == START:
            first = event.step
        if any(value.tag == SHOWN for value in event.summary.value):
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
            if size > MOST_BYTES:
                file.seek(min(size, 1 << 40) + 4, os.SEEK_CUR)
                continue
            data = file.read(size + 4)  # the event and its checksum
            try:
                yield Event.FromString(data[:size])
            except DecodeError:
                return
