"""What anyone may read of a run, at any time: its files, its history, where it stands.

    checkpoints/PPO/episode_0001.pt ...   one per episode, each verifies itself (seal.py)
    checkpoints/PPO/start.pt              what it began with, verifies itself, too; episode 0
    checkpoints/PPO/replay/               what each episode added to a replay buffer (pieces.py)
    checkpoints/PPO/history.json          every session and every episode (ledger.py)
    checkpoints/PPO/metadata.json         where the run stands
    checkpoints/PPO/damaged/              files that failed their check
    checkpoints/.PPO.lock                 outside, for archiving moves the directory
    checkpoints/archive/PPO-<UTC time>/   older runs and branches, whole run directories

The episode files decide: where the JSON files are missing, corrupt or behind, what they should say
comes from them. Reading history needs no torch.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from co2lightning.errors import UserError
from co2lightning.places import local
from co2lightning.runs.ledger import (
    EPISODE_PATTERN,
    MAX_EPISODES,
    Episode,
    Ledger,
    Row,
    episode_file,
    parse_history,
    parse_metadata,
    parse_record,
    rebuild,
)
from co2lightning.runs.lock import is_held
from co2lightning.runs.seal import Damaged, load_content, read_json, read_sealed

_COMPUTED = {  # what metadata.json has beyond the run's info
    *("last_episode", "total_episodes_trained", "last_training", "final_metrics"),
    *("best_episode", "device", "session_timestamp", "status"),
}


class Layout:
    """Where everything of a run stands or would stand."""

    def __init__(self, directory: Path, logs: Path | None = None) -> None:
        self.directory = directory
        self.logs = logs
        self.name = directory.name or directory.resolve().name
        self.history_file = directory / "history.json"
        self.metadata_file = directory / "metadata.json"
        self.replay_directory = directory / "replay"
        self.damaged_directory = directory / "damaged"

    def path(self, episode: int) -> Path:
        """Return where the file of `episode` stands or would stand; 0 is the start."""
        return self.directory / episode_file(episode)

    def replay_path(self, episode: int) -> Path:
        """Return where the replay piece of `episode` stands or would stand."""
        return self.replay_directory / self.path(episode).name

    def episodes(self) -> list[int]:
        """Return the episodes with a file, ascending, good or not."""
        return _listing(self.directory)

    def pieces(self) -> list[int]:
        """Return the episodes with a piece of the replay, ascending, good or not."""
        return _listing(self.replay_directory)

    def misplaced(self) -> list[str]:
        """Name what should be a directory in the run: behind a link we would change another run."""
        return [
            f"{place.name} is {'a link' if place.is_symlink() else 'a file'}, not a directory"
            for place in (self.replay_directory, self.damaged_directory)
            if os.path.lexists(place) and (place.is_symlink() or not place.is_dir())
        ]


def _listing(directory: Path) -> list[int]:
    names = set(os.listdir(directory)) if directory.is_dir() else set[str]()
    numbers = {int(m[1]) for m in map(EPISODE_PATTERN.fullmatch, names) if m}
    return sorted(n for n in numbers if n and episode_file(n) in names)


def read_history(layout: Layout) -> tuple[Ledger | None, list[str]]:
    """Return what history.json says, None where it is lost, and what is wrong with it."""
    return _read(layout, layout.history_file, parse_history)


def read_metadata(layout: Layout) -> tuple[Row, list[str]]:
    """Return what metadata.json says, nothing where it is lost, and what is wrong with it."""
    found, problems = _read(layout, layout.metadata_file, parse_metadata)
    return found or {}, problems


def _read(layout: Layout, path: Path, parse: Callable[[Row], Any]) -> tuple[Any, list[str]]:
    try:
        return parse(read_json(path)), []
    except FileNotFoundError:  # without episodes, a kill came before its first word
        return None, [f"{path.name} is missing"] if layout.episodes() else []
    except ValueError as error:
        return None, [f"{path.name} is damaged ({error})"]


def read_ledger(
    layout: Layout, damaged: list[Damaged] | None = None, last: int = MAX_EPISODES
) -> Ledger:
    """Return history.json brought up to date from the files, or all of it from them.

    Only files that history does not know are read; bad ones are left out and appended to
    `damaged`. Of the files beyond `last` none is looked at.
    """
    ledger, _ = read_history(layout)
    if ledger is None:
        ledger = Ledger(read_metadata(layout)[0].get("agent", layout.name))
    agent = ledger.agent if ledger.episodes else None
    kept = ledger.kept()
    # Listed after history was read: it may only be behind them.
    files = [n for n in layout.episodes() if n <= last]
    records: dict[int, Row] = {}
    rows: dict[int, Row] = {}
    for number in files:
        try:
            if number not in kept:
                data, records[number] = read_checked(layout, "episode", number, agent=agent)
                rows[number] = file_row(data, records[number])
        except FileNotFoundError:
            pass
        except Damaged as error:
            if damaged is not None:
                damaged.append(error)
    newest = max(kept.keys() & files | rows.keys(), default=0)
    known = [n for n in ledger.episodes.keys() | rows.keys() if n <= newest]
    if newest not in rows and (kept.keys() - files or len(known) < newest):
        try:
            records[newest] = read_checked(layout, "episode", newest)[1]
        except (Damaged, FileNotFoundError):
            records[newest] = {}
    metadata = read_metadata(layout)[0] if rows else {}
    running = bool(rows) and is_held(layout.directory)
    return rebuild(ledger, files, records, rows, metadata, running)


def read_checked(
    layout: Layout, kind: str, number: int, listed: Episode | None = None, agent: str | None = None
) -> tuple[bytes, Row]:
    """Return the bytes and the record of an "episode" or its "replay", or of the "start", 0.

    The content is not checked.

    Raises:
        Damaged: It fails its check, is of another episode or agent, or history lists another file.
        FileNotFoundError: There is none.
    """
    path = layout.replay_path(number) if kind == "replay" else layout.path(number)
    data, record = read_sealed(path)
    if parse_record(path, record, kind) != number:
        raise Damaged(path, f"it is episode {record['episode']}")
    if agent is not None and record["agent"] != agent:
        raise Damaged(path, f"it belongs to a run of {record['agent']!r:.40}, not {agent}")
    row = listed and (listed.file if kind == "episode" else listed.file.get("replay"))
    expected = row and row.get("sha256")
    if expected is not None and hash_row(data)["sha256"] != expected:
        raise Damaged(path, "not the file that history.json lists")
    return data, record


def hash_row(data: bytes) -> Row:
    """Return what history says of the bytes of a file."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def file_row(data: bytes, record: Row) -> Row:
    """Return what history says of an episode's file."""
    row = {"file": episode_file(record["episode"]), **hash_row(data)}
    return row if record.get("replay") is None else {**row, "replay": record["replay"]}


def load_newest(layout: Layout) -> tuple[int, Row | None, list[Damaged]]:
    """Load the newest good episode, walking back; returns the bad ones, too."""
    damaged: list[Damaged] = []
    stored = read_history(layout)[0] or Ledger("")
    agent = stored.agent if stored.episodes else None
    for number in reversed(layout.episodes()):
        path, row = layout.path(number), stored.episodes.get(number)
        try:
            data, _ = read_checked(layout, "episode", number, row, agent)
            content = load_content(path, data)
            _check_content(path, content, number)
            return number, content, damaged
        except FileNotFoundError:
            continue
        except Damaged as error:
            damaged.append(error)
    return 0, None, damaged


def load_best(layout: Layout) -> tuple[Row, Path, list[str]]:
    """Load the best evaluated episode, see `TrainingCheckpoint.load_best_checkpoint`."""
    ledger, remarks = read_ledger(layout), list[str]()
    ranking = ledger.evaluated()
    if not ranking:
        raise UserError(
            f"--ckpt_path best: no episode in {layout.directory} was evaluated; fit on a site with "
            "--evaluate_every 10 evaluates every tenth one; --ckpt_path last takes the newest"
        )
    for _, number in ranking:
        path = layout.path(number)
        try:
            content = load_file(path)[0]
        except UserError as error:  # damaged, or taken away
            remarks.append(f"{error}; the next best one is taken")
            continue
        if not number:
            remarks.append(
                f"{layout.name}: no evaluated episode is better than what it started from: "
                f"{path.name}"
            )
        return content, path, remarks
    raise UserError(
        f"--ckpt_path best: none of the evaluated episodes in {layout.directory} has a good file; "
        f"see co2lightning verify {layout.name}"
    )


def load_file(path: Path) -> tuple[Row, Row, bytes]:
    """Load any checkpoint file; returns what was saved, its record and its bytes.

    Raises:
        UserError: There is none, or not to be read.
        Damaged: It fails its check.
    """
    try:
        data, record = read_sealed(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    content = load_content(path, data)
    if (kind := record.get("kind")) in ("episode", "start"):
        _check_content(path, content, parse_record(path, record, kind))
    return content, record, data


def _check_content(path: Path, content: Row, number: int) -> None:
    """Raise `Damaged` unless what an episode's file holds is what its record says."""
    if type(held := content.get("episode")) is not int or held != number:
        raise Damaged(path, f"its record says episode {number}, its content does not")
    if not isinstance(content.get("run"), dict):
        raise Damaged(path, "does not say which run it is of")


def local_file(path: str | Path) -> Path:
    """Return the file that a user named, perhaps by a link."""
    text = local("checkpoint", path)
    if Path(text).is_dir():
        layout = Layout(Path(text))
        file = layout.path(max(layout.episodes(), default=1))
        raise UserError(f"{text}: a directory, not a file; give a file in it, such as {file}")
    return Path(os.path.realpath(text) if os.path.islink(text) else text)


def plain(value: Row) -> Row:
    """Return a copy of plain data: no classes, no NaN (null instead)."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def stored_run(layout: Layout, ledger: Ledger) -> Row:
    """Return the run's info from metadata.json or else from the newest good file."""
    metadata, _ = read_metadata(layout)
    if not metadata:
        content = load_newest(layout)[1]
        return plain(content["run"]) if content else {"agent": ledger.agent}
    run = {key: value for key, value in metadata.items() if key not in _COMPUTED}
    run["config"] = run.pop("configuration", None)
    return run


def metadata_of(ledger: Ledger, run: Row) -> Row:
    """Return what metadata.json should say."""
    final = next(reversed(ledger.episodes.values())).metrics if ledger.episodes else None
    best = ledger.best()
    session = ledger.sessions[-1] if ledger.sessions else None
    rest = {key: value for key, value in run.items() if key != "config"}
    return {
        **rest,
        "agent": ledger.agent,
        "last_episode": ledger.last,
        "total_episodes_trained": len(ledger.episodes),
        "last_training": session and session.end,
        "final_metrics": {k: v for k, v in (final or {}).items() if k != "episode"},
        "best_episode": best and ledger.episodes[best].metrics,
        "device": session and session.device,
        "seed": run.get("seed"),
        "configuration": run.get("config"),
        "versions": run.get("versions"),
        "session_timestamp": session and session.timestamp,
        "status": session and session.status,
    }
