"""What history.json says: the sessions and the episodes of a run, and how it follows from files.

    {"schema_version": 1, "agent": "PPO", "total_episodes": 10,
     "trainings": [{"session_timestamp": ..., "start_episode": 1, ..., "metrics": [...]}],
     "checkpoints": [{"file": "episode_0001.pt", "sha256": ..., "bytes": ...}]}

No disk here: reading.py brings what the files say, writer.py writes them. Whatever comes from a
file is checked: history.json itself, and the record in the comment of each checkpoint (seal.py).
"""

import itertools
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

from co2lightning.runs.seal import Damaged

EPISODE_PATTERN = re.compile(r"episode_(\d{4,6})\.pt", re.ASCII)
START_FILE = "start.pt"
MAX_EPISODES = 999_999  # the digits of a file name
STATUSES = ("running", "completed", "interrupted", "failed", "killed")
# Share of what its own days are without control: of the objective where that is not CO2 alone.
_BEST_METRICS = "objective_vs_uncontrolled", "co2_vs_uncontrolled"
# The same in the training weeks, without noise: of the policy then, and of what the run began with.
_EVALUATED, _START = "eval_vs_uncontrolled", "eval_start_vs_uncontrolled"

Row = dict[str, Any]
_Metrics = dict[str, float | None]


def episode_file(episode: int) -> str:
    """Return the name of an episode's file, which `EPISODE_PATTERN` reads; 0 is the start."""
    return f"episode_{episode:04d}.pt" if episode else START_FILE


@dataclass(eq=False)
class Session:
    """One entry of `trainings`."""

    timestamp: str
    start: int
    device: str
    duration: float = 0.0
    status: str = "running"

    @property
    def end(self) -> str:
        """When it last did something."""
        try:
            start = datetime.fromisoformat(self.timestamp)
            return (start + timedelta(seconds=self.duration)).isoformat(timespec="seconds")
        except (ValueError, OverflowError):
            return self.timestamp


@dataclass
class Episode:
    """One row of `checkpoints` and, unless history was lost after pruning, one of `metrics`."""

    session: Session
    metrics: _Metrics | None
    file: Row
    text: tuple[str, str] = "", ""  # both rows encoded: a long run encodes each once

    @property
    def pruned(self) -> bool:
        """Whether its file is gone, by `keep_last` or by hand."""
        return bool(self.file.get("pruned"))

    @property
    def deleted(self) -> bool:
        """Whether its file was deleted by hand; such an episode is marked as pruned, too."""
        return bool(self.file.get("deleted"))

    def mark_pruned(self, *, by_hand: bool = False) -> None:
        self.file |= {"pruned": True, "deleted": True} if by_hand else {"pruned": True}
        self.text = "", ""


@dataclass
class Ledger:
    """What history.json says; `episodes` ascends."""

    agent: str
    sessions: list[Session] = field(default_factory=list[Session])
    episodes: dict[int, Episode] = field(default_factory=dict[int, Episode])
    replay_pruned_to: int = 0

    @property
    def last(self) -> int:
        return next(reversed(self.episodes), 0)

    def best(self, *, kept: bool = False) -> int | None:
        """Return the best episode, see `score`; where `kept`, of those that have a file."""
        some = self.kept() if kept else self.episodes
        scored = [(score(e.metrics), number) for number, e in some.items() if e.metrics]
        return min(scored)[1] if scored else None

    def evaluated(self) -> list[tuple[float, int]]:
        """Return the share of uncontrolled and the number of evaluated episodes, the best first.

        Those that have a file; among them 0, what the run began with, as the best was measured
        with it. Of equals the earlier comes first. Empty where no episode was evaluated.
        """
        found: list[tuple[float, int]] = []
        for number, entry in self.kept().items():
            if (share := (entry.metrics or {}).get(_EVALUATED)) is not None:
                found.append((share, number))
        if found:
            start = (self.episodes[min(found)[1]].metrics or {}).get(_START)
            found += [] if start is None else [(start, 0)]
        return sorted(found)

    def kept(self) -> dict[int, Episode]:
        return {number: e for number, e in self.episodes.items() if not e.pruned}

    def session_of(self, number: int) -> Session:
        """Return the session an episode without record fell into, by their first episodes."""
        for session in reversed(self.sessions):
            if session.start <= number:
                return session
        unknown = Session("", 1, "unknown", status="killed")
        self.sessions.insert(0, unknown)
        return unknown

    def add(self, record: Row, file: Row) -> None:
        """Add what the record of a good episode file says; `file` is its row of `checkpoints`."""
        found = _parse_session(record["session"], "running")
        session = found
        for known in reversed(self.sessions):
            if known.start < found.start:
                break
            if (known.timestamp, known.start) == (found.timestamp, found.start):
                session = known
        if session is found:
            self.sessions.append(session)
        session.duration = max(session.duration, found.duration)
        self.episodes[record["episode"]] = Episode(session, record["metrics"], file)

    def mark_missing(self, last: int, pruned_to: int, gone: Collection[int] = ()) -> None:
        """Mark the episodes up to `last` that were trained but have no file.

        Those are the known ones that are `gone` and all unknown ones, which are added. `keep_last`
        deleted the files up to `pruned_to`, somebody by hand those beyond it.
        """
        for number in range(1, last + 1):
            if number not in self.episodes:
                row = {"file": episode_file(number), "sha256": None, "bytes": None}
                self.episodes[number] = Episode(self.session_of(number), None, row)
            elif number not in gone:
                continue
            self.episodes[number].mark_pruned(by_hand=number > pruned_to)
        self.episodes = dict(sorted(self.episodes.items()))

    def trim(self, last: int) -> None:
        """Forget what came after episode `last`."""
        self.episodes = {n: e for n, e in self.episodes.items() if n <= last}
        used = {id(entry.session) for entry in self.episodes.values()}
        self.sessions = [s for s in self.sessions if s.start <= last + 1 or id(s) in used]
        self.replay_pruned_to = min(self.replay_pruned_to, last)

    def close_dead(self) -> None:
        """Mark sessions that nobody closed as killed."""
        for session in self.sessions:
            if session.status == "running":
                session.status = "killed"

    def trainings(self) -> list[tuple[Row, list[Episode]]]:
        """Return the rows of `trainings`, without metrics, each with its episodes."""
        members: dict[int, list[Episode]] = {id(session): [] for session in self.sessions}
        ends = {id(session): session.start - 1 for session in self.sessions}
        for number, episode in self.episodes.items():
            members[id(episode.session)].append(episode)
            ends[id(episode.session)] = number
        return [
            (
                {
                    "session_timestamp": s.timestamp,
                    "start_episode": s.start,
                    "end_episode": ends[id(s)],
                    "episodes_count": len(members[id(s)]),
                    "device": s.device,
                    "duration_seconds": s.duration,
                    "status": s.status,
                },
                members[id(s)],
            )
            for s in self.sessions
        ]

    def view(self) -> Row:
        """Return the content of history.json."""
        return json.loads(self.text())

    def text(self) -> str:
        """Return the same as JSON, one row a line, encoding only rows not encoded before."""
        head: Row = {"schema_version": 1, "agent": self.agent, "total_episodes": len(self.episodes)}
        if self.replay_pruned_to:
            head["replay_pruned_to"] = self.replay_pruned_to
        for episode in self.episodes.values():
            if not episode.text[1]:
                metrics = json.dumps(episode.metrics, allow_nan=False) if episode.metrics else ""
                episode.text = metrics, json.dumps(episode.file, allow_nan=False)
        trainings = ",\n  ".join(
            json.dumps(row)[:-1]
            + ', "metrics": [\n   '
            + ",\n   ".join(filter(None, (e.text[0] for e in members)))
            + "]}"
            for row, members in self.trainings()
        )
        files = ",\n  ".join(e.text[1] for e in self.episodes.values())
        above = json.dumps(head)[:-1]
        return f'{above},\n "trainings": [\n  {trainings}],\n "checkpoints": [\n  {files}]}}'


def rebuild(
    ledger: Ledger,
    files: Collection[int],
    records: Mapping[int, Row],
    rows: Mapping[int, Row],
    metadata: Row,
    running: bool,
) -> Ledger:
    """Return what history should say, given what it says and what the files do.

    The status of a session that only files tell of is taken from the next one's files, that of the
    last session from metadata.json or else from the lock: "running" while held, "killed" otherwise.

    Args:
        ledger: What history.json says; goes into the result.
        files: The episodes with a file, good or not.
        records: Those of the good files that history does not know; that of the newest file, too,
            where others are missing.
        rows: The rows of `checkpoints` for the files that history does not know.
        metadata: What metadata.json says.
        running: Whether a process holds the run.
    """
    known = {id(session) for session in ledger.sessions}
    for number, row in rows.items():
        ledger.add(records[number], row)
    kept = set(ledger.kept())
    newest = max(kept.intersection(files), default=0)
    ledger.trim(newest)
    if newest in records:
        record = records[newest]
        # Where `keep_last` is at work, a later file that is lost may have pruned this one.
        pruned_to = newest - 1 if record.get("keep_last") else record.get("pruned_to", 0)
        ledger.mark_missing(newest, pruned_to, kept.difference(files))
        replay_to = max(ledger.replay_pruned_to, record.get("replay_pruned_to", 0))
        ledger.replay_pruned_to = min(replay_to, newest)
    ledger.sessions.sort(key=lambda session: session.start)
    before = {id(s): p for p, s in itertools.pairwise(ledger.sessions) if id(p) not in known}
    for number in rows:
        previous = before.get(id(ledger.episodes[number].session))
        status = records[number]["session"].get("previous_status")
        if previous and previous.status == "running":
            previous.status = status if status in STATUSES[1:] else "killed"
    if ledger.sessions and id(session := ledger.sessions[-1]) not in known:
        if metadata.get("session_timestamp") == session.timestamp:
            session.status = metadata.get("status", "killed")
        if session.status == "running" and not running:
            session.status = "killed"
    return ledger


def score(metrics: _Metrics | None) -> tuple[int, float]:
    """Rank an episode, lower is better.

    Evaluated ones come first, by their share of uncontrolled in the training weeks; then by that in
    the episode's own days; the reward decides only where neither is known.
    """
    known = metrics or {}
    for rank, key in enumerate((_EVALUATED, *_BEST_METRICS)):
        if (share := known.get(key)) is not None:
            return min(rank, 1), share
    reward = known.get("reward")
    return (2, -reward) if reward is not None else (3, 0.0)


def parse_history(data: Row) -> Ledger:
    """Turn the content of history.json into a ledger.

    Raises:
        ValueError: Any field is not what the schema says, or sums disagree.
    """
    if data.get("schema_version") != 1:
        raise ValueError("unknown schema_version")
    ledger = Ledger(_parse_text(data, "agent"))
    ledger.replay_pruned_to = parse_count(data, "replay_pruned_to", 0, most=MAX_EPISODES)
    metrics: dict[int, tuple[Session, _Metrics]] = {}
    counts: list[tuple[int, int]] = []
    for row in _rows(data, "trainings"):
        session = _parse_session(row, _parse_text(row, "status"))
        ledger.sessions.append(session)
        counts.append((parse_count(row, "end_episode"), parse_count(row, "episodes_count")))
        for entry in _rows(row, "metrics"):
            metrics[parse_count(entry, "episode")] = session, _parse_metrics(entry)
    for row in _rows(data, "checkpoints"):
        match = EPISODE_PATTERN.fullmatch(_parse_text(row, "file"))
        if not match or int(match[1]) <= ledger.last:
            raise ValueError(f"unexpected file name {row['file']!r:.60}")
        number = int(match[1])
        if not (row.get("pruned") is True and row.get("sha256") is None):
            _parse_hash(row)
        if row.get("replay") is not None:
            _parse_hash(row["replay"])
        session, values = metrics.pop(number, (ledger.session_of(number), None))
        ledger.episodes[number] = Episode(session, values, row)
    trainings = [(r["end_episode"], r["episodes_count"]) for r, _ in ledger.trainings()]
    if metrics or trainings != counts:
        raise ValueError("sessions and checkpoints disagree")
    if parse_count(data, "total_episodes") != len(ledger.episodes):
        raise ValueError("total_episodes differs from the number of checkpoints")
    return ledger


def parse_metadata(data: Row) -> Row:
    """Check the content of metadata.json, as far as it is used here.

    Raises:
        ValueError: A field is not what it should be.
    """
    _parse_text(data, "agent")
    parse_count(data, "last_episode", most=MAX_EPISODES)
    if data.get("status") not in (*STATUSES, None):
        raise ValueError("unknown status")
    return data


def parse_record(path: Path, record: Row, kind: str) -> int:
    """Check the record of a file and return its episode.

    Raises:
        Damaged: It is malformed or of another kind.
    """
    try:
        if record.get("kind") != kind:
            raise ValueError(f"no {kind} file")
        of_start = kind == "start"
        least, most = (0, 0) if of_start else (1, MAX_EPISODES)
        number = parse_count(record, "episode", least=least, most=most)
        _parse_text(record, "agent")
        if kind == "episode":
            if not isinstance(record.get("session"), dict):
                raise ValueError("no session")
            _parse_session(record["session"], "running")
            parse_count(record["session"], "start_episode", most=number)
            if not isinstance(record.get("metrics"), dict):
                raise ValueError("no metrics")
            parse_count(_parse_metrics(record["metrics"]), "episode", least=number, most=number)
            for key in ("pruned_to", "replay_pruned_to"):
                parse_count(record, key, most=number - 1)
            if record.get("replay") is not None:
                _parse_hash(record["replay"])
    except ValueError as error:
        raise Damaged(path, f"its record is wrong: {error}") from None
    return number


def _parse_session(row: Row, status: str) -> Session:
    duration = row.get("duration_seconds")
    if isinstance(duration, bool) or not isinstance(duration, int | float):
        raise ValueError("duration_seconds is not a number")
    if not 0 <= duration < 1e10:
        raise ValueError("duration_seconds is not a time")
    if status not in STATUSES:
        raise ValueError("unknown status")
    start = parse_count(row, "start_episode", least=1, most=MAX_EPISODES + 1)
    timestamp, device = (_parse_text(row, key) for key in ("session_timestamp", "device"))
    return Session(timestamp, start, device, duration, status)


def _parse_metrics(row: Row) -> _Metrics:
    for name, value in row.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and abs(value) < 1e300):
            raise ValueError(f"metric {name!r:.60} is not a number")
    return row


def _parse_hash(row: object) -> None:
    if not isinstance(row, dict):
        raise ValueError("not a file entry")
    entry = cast(Row, row)
    parse_count(entry, "bytes")
    if not re.fullmatch(r"[0-9a-f]{64}", _parse_text(entry, "sha256"), re.ASCII):
        raise ValueError("sha256 is not 64 hex digits")


def _parse_text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"{key} is not a text")
    return value


def parse_count(
    row: Row, key: str, default: int | None = None, *, least: int = 0, most: int = (1 << 53) - 1
) -> int:
    value = row.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} is not a count")
    if not least <= value <= most:
        raise ValueError(f"{key} is not from {least} to {most}")
    return value


def _rows(row: Row, key: str) -> list[Row]:
    value = row.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    rows = cast(list[object], value)
    if not all(isinstance(entry, dict) for entry in rows):
        raise ValueError(f"{key} holds something else than objects")
    return cast(list[Row], rows)
