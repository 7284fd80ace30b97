"""A run directory: every episode a verified file, the history and the lock around them.

    checkpoints/PPO/episode_0001.pt ...   one per episode, each verifies itself (files.py)
    checkpoints/PPO/replay/               what each episode added to a replay buffer (SAC)
    checkpoints/PPO/history.json          every session and every episode
    checkpoints/PPO/metadata.json         where the run stands
    checkpoints/PPO/damaged/              files that failed their check
    checkpoints/.PPO.lock                 outside, for archiving moves the directory
    checkpoints/archive/PPO-<UTC time>/   older runs and branches, whole run directories

The episode files decide. The two JSON files can be rebuilt from them and are, whenever they are
missing, corrupt or behind. Reading history needs no torch.
"""

import contextlib
import errno
import filecmp
import hashlib
import itertools
import json
import math
import os
import re
import stat
import threading
import time
import weakref
from collections.abc import Generator, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from co2lightning.errors import UserError
from co2lightning.places import local
from co2lightning.runs.files import (
    discard,
    instead_of_file,
    now,
    read_file,
    stray,
    sweep,
    sync_directory,
    write_atomic,
)
from co2lightning.runs.ledger import (
    EPISODE_PATTERN,
    MAX_EPISODES,
    STATUSES,
    Episode,
    Ledger,
    Metrics,
    Row,
    Session,
    parse_count,
    parse_hash,
    parse_history,
    parse_metrics,
    parse_session,
    parse_text,
    score,
)
from co2lightning.runs.lock import FileLock
from co2lightning.runs.seal import (
    Damaged,
    check_content,
    load_sealed,
    read_json,
    read_sealed,
    seal_checkpoint,
    seal_json,
)

COMPUTED = {  # what metadata.json has beyond the run's info
    *("last_episode", "total_episodes_trained", "last_training", "final_metrics"),
    *("best_episode", "device", "session_timestamp", "status"),
}
ROOM_IN_NAMES = 55  # bytes that an archive's name and its temporary ones add to a run's
WRITE_INTERVAL = 1.0  # seconds the JSON files may be behind during a session


def _hash(data: bytes) -> Row:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(value: Row) -> Row:
    """Return a copy of plain data: no classes, no NaN (null instead)."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class TrainingCheckpoint:
    """A run directory: saves episodes, finds damage, keeps history and metadata.

    Anyone may read at any time. Whatever writes holds the run's lock, taken by `lock` or, where
    the caller has not, by the method itself (`begin_session` keeps it until `end_session`).

    Args:
        directory: The run directory, such as `checkpoints/PPO`; need not exist.
        logs: The run's TensorBoard directory; the lock covers it and `archive` moves it too.
        keep_last: Keep the newest so many episode files and the best one, delete older ones and
            mark them in the history; None keeps all. With few kept, damage to all of these costs
            the episodes back to the best one.

    Raises:
        UserError: `keep_last` is below 1, or the logs lie in the run directory or around it.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        logs: str | Path | None = None,
        keep_last: int | None = None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise UserError(f"--checkpoints.keep_last {keep_last}: must be at least 1")
        self._directory = Path(local("run", directory))
        self._logs = None if logs is None else Path(local("logs", logs))
        if self._logs:
            _check_apart(self._directory, self._logs)
        self._keep_last = keep_last
        self._locks: list[FileLock] = []
        self._depth = 0
        self._session_lock = contextlib.ExitStack()
        self._ledger: Ledger | None = None  # the writer's copy, during a session only
        self._run: Row = {}
        self._best: tuple[tuple[int, float], int] | None = None
        self._kept: dict[int, None] = {}  # episodes with a file, ascending
        self._pruned_to = 0
        self._previous_status: str | None = None
        self._started = 0.0
        self._changing = threading.Lock()  # held while the ledger changes or is encoded
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._unwritten = False
        self._failure: OSError | None = None

    @property
    def name(self) -> str:
        """The run's name, that of its directory."""
        return self._directory.name or self._directory.resolve().name

    @property
    def directory(self) -> Path:
        """The run directory as given."""
        return self._directory

    @property
    def logs(self) -> Path | None:
        """The run's TensorBoard directory."""
        return self._logs

    def path(self, episode: int) -> Path:
        """Return where the file of `episode` stands or would stand."""
        return self._directory / f"episode_{episode:04d}.pt"

    def replay_path(self, episode: int) -> Path:
        """Return where the replay piece of `episode` stands or would stand."""
        return self._directory / "replay" / f"episode_{episode:04d}.pt"

    # --- the lock ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Hold the run, checkpoints and logs, as its only writer; may be nested.

        Raises:
            Locked: Another process holds it; nothing was changed.
            UserError: The lock is none, or what belongs into the run lies behind a link.
        """
        if self._depth == 0:
            if problems := self._misplaced():
                raise UserError(f"{self._directory}: {problems[0]}; move it, or link the whole run")
            places = [place for place in (self._directory, self._logs) if place is not None]
            paths = dict.fromkeys(path for place in places for path in _lock_paths(place))
            locks = [FileLock(path) for path in paths]
            try:
                for lock in locks:
                    lock.acquire(str(self._directory))
            except BaseException:
                for lock in locks:
                    lock.release()
                raise
            self._locks = locks
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for lock in self._locks:
                    lock.release()

    def is_running(self) -> bool:
        """Say whether a process holds the lock, without disturbing it."""
        return any(FileLock(path).taken() for path in _lock_paths(self._directory))

    def _misplaced(self) -> list[str]:
        """Name what should be a directory in the run: behind a link we would change another run."""
        places = (self._directory / "replay", self._directory / "damaged")
        return [
            f"{place.name} is {'a link' if place.is_symlink() else 'a file'}, not a directory"
            for place in places
            if os.path.lexists(place) and (place.is_symlink() or not place.is_dir())
        ]

    # --- reading ----------------------------------------------------------------------------

    def episodes(self) -> list[int]:
        """Return the episodes with a file, ascending, good or not."""
        return _listing(self._directory)

    def pruned(self) -> list[int]:
        """Return the episodes whose files `keep_last` or somebody deleted, ascending."""
        return [number for number, e in self._current().episodes.items() if e.pruned]

    def load_history(self) -> Row:
        """Return the content of history.json, brought up to date from the episode files.

        Where the file is missing or corrupt all of it comes from the episode files. The status
        of a session is then taken from the next one's files, that of the last session from
        metadata.json or else from the lock: "running" while held, "killed" otherwise. Pruned
        episodes keep their count, not their metrics, and count to the session before them.
        """
        return self._current().view()

    def load_metadata(self) -> Row:
        """Return the content of metadata.json, brought up to date from the episode files."""
        ledger = self._current()
        run = self._run if self._ledger else self._stored_run(ledger)
        return self._metadata(ledger, run)

    @staticmethod
    def read(path: str | Path) -> Row:
        """Verify and load any one checkpoint file on the CPU; no code in it runs.

        Raises:
            UserError: Not a local file.
            Damaged: The file fails its check.
        """
        return _load(_local(path))[0]

    def load_latest_checkpoint(self) -> Row | None:
        """Return the newest good checkpoint, None if there is no episode file.

        Raises:
            UserError: All episode files are damaged.
        """
        content = self._newest()[1]
        if content is None and (bad := self.episodes()):
            count = _plural(len(bad), "checkpoint")
            raise UserError(f"{self._directory}: {count}, none of them good; see `verify`")
        return content

    def get_next_episode(self) -> int:
        """Return the episode after the newest good one, 1 for a new run."""
        return 1 + (self._ledger.last if self._ledger else self._newest()[0])

    def load_replay(
        self, episodes: Iterable[int], allow_partial: bool = False
    ) -> Generator[tuple[int, Row]]:
        """Yield each of `episodes` with its replay piece, verified; read when it is asked for.

        Args:
            episodes: Episodes whose additions to the buffer are wanted.
            allow_partial: Leave out missing and damaged pieces.

        Raises:
            UserError: A piece is missing or damaged and `allow_partial` is off.
        """
        known = self._current().episodes
        for number in episodes:
            path = self.replay_path(number)
            try:
                content, record, data = load_sealed(path)
                self._check(path, record, data, number, "replay", known.get(number), None)
            except (Damaged, FileNotFoundError) as error:
                if allow_partial:
                    continue
                reason = str(error) if isinstance(error, Damaged) else f"{path} is missing"
                raise UserError(
                    f"{reason}: the replay buffer cannot be restored exactly; "
                    "--allow_partial_replay goes on without it"
                ) from None
            yield number, content

    def verify(self) -> list[str]:
        """Check every file and say what is wrong.

        Returns:
            One line for each problem; empty if all is well. That the JSON files are behind the
            episodes is none: see `leftovers`.
        """
        if archived := self.half_archived():
            return TrainingCheckpoint(archived).verify()
        running = self.is_running()
        problems: list[str] = []
        stored: Ledger | None = None
        if not self._directory.is_dir():
            return [f"{self._directory}: no such run"]
        problems += self._misplaced()
        try:
            stored = self._stored_history()
        except FileNotFoundError:
            if self.episodes():  # without, a kill came before its first word
                problems.append("history.json is missing")
        except ValueError as error:
            problems.append(f"history.json is damaged ({error})")
        files = self.episodes()
        known = stored.episodes if stored else {}
        for number in files:
            path = self.path(number)
            try:
                data, record = read_sealed(path)
                row = known.get(number)
                self._check(path, record, data, number, "episode", row, stored and stored.agent)
                check_content(path, data)
            except FileNotFoundError:
                continue  # pruned while we looked
            except Damaged as error:
                problems.append(f"{path.name} is damaged ({error.reason})")
        ledger = self._current()
        deleted = (n for n, e in ledger.episodes.items() if e.deleted and n not in files)
        problems += [f"{self.path(number).name} is missing" for number in deleted]
        if stored and not running:
            lost = sorted(n for n in stored.kept() if n > ledger.last and n not in files)
            problems += [f"{self.path(n).name} is in history.json but missing" for n in lost]
        problems += self._verify_replay(ledger, running)
        problems += self._verify_metadata(ledger, running)
        return problems

    def leftovers(self) -> list[str]:
        """Say what a session that was cut off, as by SIGKILL, left to the next start.

        Returns:
            A few words for each thing; empty if there is nothing, or a process holds the run. No
            episode is lost by any of them.
        """
        if self.is_running():
            return []
        if archived := self.half_archived():
            return [f"being moved to {archived}"]
        found: list[str] = []
        with contextlib.suppress(FileNotFoundError, ValueError):  # which `verify` tells
            stored = self._stored_history()
            if any(session.status == "running" for session in stored.sessions):
                found.append("session not closed")
            if late := [n for n in self.episodes() if n not in stored.episodes]:
                found.append(f"history.json {_plural(len(late), 'episode')} behind")
        ledger = self._current()
        if self._stored_metadata().get("last_episode", ledger.last) < ledger.last:
            found.append("metadata.json behind")
        pieces = _listing(self._directory / "replay")
        if ledger.last + 1 in pieces:
            found.append("replay piece of the next episode")
        if old := [n for n in pieces if n <= ledger.replay_pruned_to]:
            found.append(f"{_plural(len(old), 'replay piece')} no longer needed")
        strays = [stray(d) for d in (self._directory, self._directory / "replay")]
        if count := len([*itertools.chain(*strays), *self._staged(), *self._notes()]):
            found.append(_plural(count, "temporary file"))
        return found

    def _verify_replay(self, ledger: Ledger, running: bool) -> list[str]:
        problems: list[str] = []
        for number, entry in ledger.episodes.items():
            if entry.file.get("replay") is None or number <= ledger.replay_pruned_to:
                continue
            path = self.replay_path(number)
            try:
                data, record = read_sealed(path)
                self._check(path, record, data, number, "replay", entry, None)
                check_content(path, data)
            except FileNotFoundError:
                if number > self._current().replay_pruned_to:  # else pruned while we looked
                    problems.append(f"replay/{path.name} is missing")
            except Damaged as error:
                problems.append(f"replay/{path.name} is damaged ({error.reason})")
        pieces = _listing(self._directory / "replay")
        orphans = [n for n in pieces if n not in ledger.episodes and n != ledger.last + 1]
        if not running:
            problems += [f"replay/{self.path(n).name} belongs to no episode" for n in orphans]
        return problems

    def _verify_metadata(self, ledger: Ledger, running: bool) -> list[str]:
        try:
            metadata = self._read_metadata()
        except FileNotFoundError:
            return ["metadata.json is missing"] if ledger.episodes else []
        except ValueError as error:
            return [f"metadata.json is damaged ({error})"]
        last = metadata["last_episode"]
        if last > ledger.last and last not in self.episodes() and not running:
            return [f"metadata.json tells of episode {last}, which is missing"]
        return []

    # --- a session --------------------------------------------------------------------------

    def recover(self) -> list[str]:
        """Put the run directory in order before a session.

        Sweeps temporary files, ends an archiving that was cut off, moves damaged newest files to
        `damaged/`, rebuilds history.json and metadata.json where they are corrupt or behind,
        closes sessions found dead. Of the
        episode files only the newest good one is read, unless history must be rebuilt; `verify`
        reads all.

        Returns:
            One line for each thing the user must know; empty if nothing was wrong.
        """
        if not self._directory.exists() and not self._staged() and not self._notes():
            return []
        with self.lock():
            self._sweep()
            ended: list[str] = []
            for note, target, episode in self._notes():
                if self.half_archived() == target:
                    self._carry_out(target, episode)
                    what = f"the episodes after {episode} were" if episode else "the run was"
                    ended.append(f"The last start was cut off; {what} moved to {target}")
                discard(note)
            odd = self._set_aside()
            files = self.episodes()
            try:
                stored = self._stored_history()
            except (FileNotFoundError, ValueError):
                stored = Ledger("")
            damaged: list[Damaged] = []
            newest, _ = self._newest(damaged)
            messages = self._json_problems()
            older: list[Damaged] = []
            ledger = self._current(older, newest)
            ledger.close_dead()
            # Written first: what is moved or deleted below is missed by nobody if we are killed.
            if _filled(self._directory):
                self._write(ledger, self._stored_run(ledger))
            bad = {error.path for error in damaged}
            for number in _listing(self._directory / "replay"):
                # Of an episode whose own file was never written, or left by a cut pruning.
                needless = number > newest or number <= ledger.replay_pruned_to
                if needless and self.path(number) not in bad:
                    self.replay_path(number).unlink()
            moved = [self._quarantine(error) for error in (*older, *damaged)]
            end = (
                f"continuing after episode {newest}"
                if newest
                else "no good checkpoint is left, starting at episode 1"
            )
            if moved:
                lost = max(files) - newest
                moved[-1] += f", {_plural(lost, 'episode') + ' lost, ' if lost else ''}{end}"
            marked = {n for n, e in stored.episodes.items() if e.deleted}
            gone = [n for n, e in ledger.episodes.items() if e.deleted and n not in marked]
            gone += [n for n in stored.kept() if n > newest and n not in files]
            if gone:
                names = ", ".join(self.path(n).name for n in gone[:5])
                more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
                moved.append(f"{names}{more} missing, {end}")
            return ended + odd + moved + messages

    def begin_session(self, *, start_episode: int, device: str, info: Row) -> None:
        """Open a session and write it down as running.

        Args:
            start_episode: The first episode to come; `get_next_episode` says which.
            device: Where it trains, such as "cuda".
            info: Plain data for metadata.json and every checkpoint: "agent", "seed", "config",
                "versions" and whatever else describes the run.

        Raises:
            Locked: Another process writes this run.
            ValueError: `start_episode` is not the next one.
        """
        self._session_lock.enter_context(self.lock())
        try:
            ledger = self._current()
            if start_episode != ledger.last + 1:
                raise ValueError(f"start_episode {start_episode}, but {ledger.last + 1} is next")
            ledger.close_dead()
            self._run = _plain(info)
            ledger.agent = str(self._run.get("agent", ledger.agent))
            self._previous_status = next(
                (e.session.status for e in reversed(ledger.episodes.values())), None
            )
            ledger.sessions.append(Session(now(), start_episode, device))
            best = ledger.best()
            self._best = (score(ledger.episodes[best].metrics), best) if best else None
            self._kept = dict.fromkeys(ledger.kept())
            pruned = (n for n, e in ledger.episodes.items() if e.pruned and not e.deleted)
            self._pruned_to = max(pruned, default=0)
            self._started = time.monotonic()
            self._directory.mkdir(parents=True, exist_ok=True)
            self._write(ledger, self._run)
        except BaseException:
            self._session_lock.close()
            raise
        self._ledger, self._unwritten, self._failure = ledger, False, None
        self._stop = threading.Event()
        arguments = weakref.ref(self), self._stop
        self._thread = threading.Thread(target=_write_each_second, args=arguments, daemon=True)
        self._thread.start()

    def save_checkpoint(
        self,
        checkpoint: Row,
        *,
        episode: int,
        metrics: dict[str, float],
        replay: Row | None = None,
        replay_capacity_episodes: int | None = None,
    ) -> Path:
        """Save one episode; when this returns, the disk has it.

        Without `begin_session` a session is opened here.

        Args:
            checkpoint: Tensors and plain data, such as Lightning's checkpoint; not changed.
                "episode", "timestamp", "metrics", "session" and "run" are added.
            episode: Its number, the one after the last.
            metrics: Its figures; what is not finite is stored as null.
            replay: What the episode added to the replay buffer, saved as its own file.
            replay_capacity_episodes: So many newest pieces fill the buffer; with `keep_last`
                older ones are deleted.

        Returns:
            The path of the file.

        Raises:
            OSError: Disk full, no permission; the last good state stands.
            ValueError: Not the next episode, or content that a safe load would refuse.
        """
        if self._ledger is None:
            self.begin_session(start_episode=episode, device="cpu", info={"agent": self.name})
        ledger = self._ledger
        assert ledger is not None
        if self._failure is not None:
            raise self._failure
        if episode != ledger.last + 1:
            raise ValueError(f"episode {episode}, but {ledger.last + 1} is next")
        session = ledger.sessions[-1]
        duration = round(time.monotonic() - self._started, 3)
        values: Metrics = {"episode": episode}
        values |= {key: _finite(value) for key, value in metrics.items() if key != "episode"}
        rank = score(values), episode
        best = min(self._best, rank) if self._best else rank
        doomed = self._doomed(episode, best[1])
        if replay_capacity_episodes is not None and self._keep_last is not None:
            replay_to = max(ledger.replay_pruned_to, episode - replay_capacity_episodes)
        else:
            replay_to = ledger.replay_pruned_to
        record: Row = {
            "kind": "episode",
            "agent": ledger.agent,
            "episode": episode,
            "timestamp": now(),
            "metrics": values,
            "session": {
                "session_timestamp": session.timestamp,
                "start_episode": session.start,
                "device": session.device,
                "duration_seconds": duration,
                "previous_status": self._previous_status,
            },
            "keep_last": self._keep_last,
            "pruned_to": max([self._pruned_to, *doomed]),
            "replay_pruned_to": replay_to,
        }
        if replay is not None:
            piece = {"kind": "replay", "agent": ledger.agent, "episode": episode}
            data = seal_checkpoint(replay, piece)
            path = self.replay_path(episode)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, data)
            record["replay"] = _hash(data)
        figures = {key: value for key, value in values.items() if key != "episode"}
        added = {key: record[key] for key in ("episode", "timestamp", "session")}
        content = {**checkpoint, **added, "metrics": figures, "run": self._run}
        data = seal_checkpoint(content, record)
        path = self.path(episode)
        write_atomic(path, data)
        entry = Episode(session, values, _file_row(path, record, _hash(data)))
        with self._changing:
            ledger.episodes[episode] = entry
            session.duration = duration
            self._best = best
            self._kept[episode] = None
            self._prune(ledger, doomed, replay_to)
            self._unwritten = True
        return path

    def end_session(self, status: str) -> None:
        """Close the session and write history.json and metadata.json.

        Args:
            status: "completed", "interrupted" (a signal) or "failed" (an error).
        """
        if self._ledger is None:
            return
        if status not in STATUSES[1:4]:
            raise ValueError(f"status {status!r}")
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        ledger, self._ledger = self._ledger, None
        ledger.sessions[-1].status = status
        ledger.sessions[-1].duration = round(time.monotonic() - self._started, 3)
        try:
            self._write(ledger, self._run)
        finally:
            self._session_lock.close()

    # --- archive and branches ---------------------------------------------------------------

    def archive(self) -> Path | None:
        """Move the run and its logs to `archive/<name>-<UTC time>`; overwrite nothing.

        A directory that is a link or a disk of its own stays, empty. See `branch` about a cut.

        Returns:
            The archived run directory; None if there was no run.
        """
        with self.lock():
            is_run = _filled(self._directory)
            if not is_run and not (self._logs and _filled(self._logs)):
                return None
            target = self._put_away(0)
            return target if is_run else None

    def branch(self, episode: int) -> Path | None:
        """Go back to `episode`: archive the run as it is, then drop the later episodes here.

        The archived copy is a whole run directory that can be read, verified and continued, with
        its logs; it shares the files (hard links where the disk has them). A cut before it stands
        changes nothing; what is left to do after that `recover` does.

        Returns:
            The archived run directory; None if there are no later episodes.

        Raises:
            UserError: There is no good file of `episode`.
        """
        with self.lock():
            _, record, data = _load(self.path(episode))
            self._check(self.path(episode), record, data, episode, "episode", None, None)
            ledger = self._current()
            if self.episodes()[-1] == episode:
                return None
            ledger.close_dead()
            self._write(ledger, self._stored_run(ledger))
            return self._put_away(episode)

    def adopt(self, source: Path, logs: Path | None = None) -> None:
        """Start this run from a file of another directory: take its episodes up to that one.

        Episodes that the other directory does not have are counted and marked as pruned. The
        files are linked, or copied where links are impossible.

        Args:
            source: The file.
            logs: The other run's logs, taken over where they are.

        Raises:
            UserError: This run has episodes already, or `source` is no local file.
            Damaged: `source` fails its check.
        """
        with self.lock():
            if _filled(self._directory):
                raise UserError(f"{self._directory} is not empty; archive it first")
            source = _local(source)
            content, record, data = _load(source)
            last = _parse_record(source, record, "episode")
            other = TrainingCheckpoint(source.parent)
            if other.path(last).name == source.name:
                ledger = other._current()
                ledger.trim(last)
            else:
                ledger = Ledger(record["agent"])
            if last not in ledger.episodes:
                ledger.add(record, _file_row(other.path(last), record, _hash(data)))
            ledger.close_dead()
            ledger.mark_missing(last, last)
            files = {self.path(last).name: source}
            for number in ledger.kept():
                files.setdefault(self.path(number).name, other.path(number))
            for number in _listing(source.parent / "replay"):
                if number <= last:
                    files[f"replay/{self.path(number).name}"] = other.replay_path(number)
            with _building(self._directory) as place:
                _share(files, place)
                TrainingCheckpoint(place)._write(ledger, _run_of(content, ledger))
            if logs and self._logs and not _filled(self._logs):
                with _building(self._logs) as place:
                    _share(_files_in(logs), place)

    # --- inside -----------------------------------------------------------------------------

    def _stored_history(self) -> Ledger:
        return parse_history(read_json(self._directory / "history.json"))

    def _current(self, damaged: list[Damaged] | None = None, last: int | None = None) -> Ledger:
        """Return history.json brought up to date from the files, or all of it from them.

        Only files that history does not know are read; bad ones are left out and appended to
        `damaged`. Of the files beyond `last` none is looked at.
        """
        if self._ledger is not None:
            return self._ledger
        known: set[int] = set()
        try:
            ledger = self._stored_history()
            known = {id(session) for session in ledger.sessions}
        except (FileNotFoundError, ValueError):
            ledger = Ledger(self._stored_metadata().get("agent", self.name))
        agent = ledger.agent if ledger.episodes else None
        # Listed after history was read: it may only be behind them.
        files = [n for n in self.episodes() if last is None or n <= last]
        records: dict[int, Row] = {}
        for number in files:
            if number in ledger.episodes and not ledger.episodes[number].pruned:
                continue
            path = self.path(number)
            try:
                data, records[number] = read_sealed(path)
                self._check(path, records[number], data, number, "episode", None, agent)
                ledger.add(records[number], _file_row(path, records[number], _hash(data)))
            except (Damaged, FileNotFoundError) as error:
                records.pop(number, None)
                if isinstance(error, Damaged) and damaged is not None:
                    damaged.append(error)
        gone = set(ledger.kept()).difference(files)
        newest = max(set(ledger.kept()).difference(gone), default=0)
        ledger.trim(newest)
        if newest in records or gone or len(ledger.episodes) < newest:
            record = records.get(newest) or self._record(newest)
            # Where `keep_last` is at work, a later file that is lost may have pruned this one.
            pruned_to = newest - 1 if record.get("keep_last") else record.get("pruned_to", 0)
            ledger.mark_missing(newest, pruned_to, gone)
            replay_to = max(ledger.replay_pruned_to, record.get("replay_pruned_to", 0))
            ledger.replay_pruned_to = min(replay_to, newest)
        ledger.sessions.sort(key=lambda session: session.start)
        self._guess_status(ledger, known, records)
        return ledger

    def _guess_status(self, ledger: Ledger, known: set[int], records: dict[int, Row]) -> None:
        """Set the status of sessions that only episode files tell of."""
        before = {id(s): p for p, s in itertools.pairwise(ledger.sessions) if id(p) not in known}
        for number, record in records.items():
            previous = before.get(id(ledger.episodes[number].session))
            status = record["session"].get("previous_status")
            if previous and previous.status == "running":
                previous.status = status if status in STATUSES[1:] else "killed"
        if ledger.sessions and id(session := ledger.sessions[-1]) not in known:
            metadata = self._stored_metadata()
            if metadata.get("session_timestamp") == session.timestamp:
                session.status = metadata.get("status", "killed")
            if session.status == "running" and not self.is_running():
                session.status = "killed"

    def _record(self, number: int) -> Row:
        try:
            return read_sealed(self.path(number))[1]
        except (Damaged, FileNotFoundError):
            return {}

    def _check(
        self,
        path: Path,
        record: Row,
        data: bytes,
        number: int,
        kind: str,
        row: Episode | None,
        agent: str | None,
    ) -> None:
        """Check that a sealed file is the one that stands here.

        Raises:
            Damaged: It belongs to another episode or agent, or history has another hash of it.
        """
        if _parse_record(path, record, kind) != number:
            raise Damaged(path, f"it is episode {record['episode']}")
        if agent is not None and record["agent"] != agent:
            raise Damaged(path, f"it belongs to a run of {record['agent']!r:.40}, not {agent}")
        entry = row.file if row and kind == "episode" else row and row.file.get("replay")
        expected = entry and entry.get("sha256")
        if expected is not None and _hash(data)["sha256"] != expected:
            raise Damaged(path, "not the file that history.json lists")

    def _newest(self, damaged: list[Damaged] | None = None) -> tuple[int, Row | None]:
        """Load the newest good episode, walking back; bad ones are appended to `damaged`."""
        try:
            stored = self._stored_history()
        except (FileNotFoundError, ValueError):
            stored = Ledger("")
        agent = stored.agent if stored.episodes else None
        for number in reversed(self.episodes()):
            path = self.path(number)
            try:
                content, record, data = load_sealed(path)
                row = stored.episodes.get(number)
                self._check(path, record, data, number, "episode", row, agent)
                _check_episode(path, content, record)
            except FileNotFoundError:
                continue
            except Damaged as error:
                if damaged is not None:
                    damaged.append(error)
                continue
            return number, content
        return 0, None

    def _read_metadata(self) -> Row:
        """Return the content of metadata.json as it stands.

        Raises:
            ValueError: It is corrupt.
            FileNotFoundError: There is none.
        """
        data = read_json(self._directory / "metadata.json")
        parse_text(data, "agent")
        parse_count(data, "last_episode", most=MAX_EPISODES)
        if data.get("status") not in (*STATUSES, None):
            raise ValueError("unknown status")
        return data

    def _stored_metadata(self) -> Row:
        try:
            return self._read_metadata()
        except (FileNotFoundError, ValueError):
            return {}

    def _stored_run(self, ledger: Ledger) -> Row:
        """Return the run's info from metadata.json or else from the newest good file."""
        metadata = self._stored_metadata()
        if metadata:
            run = {key: value for key, value in metadata.items() if key not in COMPUTED}
            run["config"] = run.pop("configuration", None)
            return run
        return _run_of(self._newest()[1], ledger)

    def _metadata(self, ledger: Ledger, run: Row) -> Row:
        final = next(reversed(ledger.episodes.values())).metrics if ledger.episodes else None
        best = self._best[1] if self._ledger and self._best else ledger.best()
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

    def _write(self, ledger: Ledger, run: Row) -> None:
        """Write history.json and metadata.json and wait for the disk."""
        self._write_texts(self._encode(ledger, run), durable=True)

    def _encode(self, ledger: Ledger, run: Row) -> tuple[str, str]:
        metadata = self._metadata(ledger, run)
        return ledger.text(), json.dumps(metadata, allow_nan=False, indent=1)

    def _write_texts(self, texts: tuple[str, str], *, durable: bool) -> None:
        for file, text in zip(("history.json", "metadata.json"), texts, strict=True):
            path = self._directory / file
            write_atomic(path, seal_json(text), durable=durable)

    def _write_news(self) -> None:
        """Write the JSON files if an episode came since; called by the session's thread."""
        with self._changing:
            ledger, news = self._ledger, self._unwritten
            self._unwritten = False
            if ledger is None or not news:
                return
            texts = self._encode(ledger, self._run)
        try:
            self._write_texts(texts, durable=False)
        except OSError as error:
            self._failure = error  # the next save raises it

    def _doomed(self, episode: int, best: int) -> list[int]:
        """Return the episodes whose files `keep_last` deletes once `episode` is saved."""
        doomed: list[int] = []
        if self._keep_last is not None:
            for number in self._kept:
                if number > episode - self._keep_last:
                    break
                if number != best:
                    doomed.append(number)
        return doomed

    def _prune(self, ledger: Ledger, doomed: list[int], replay_to: int) -> None:
        for number in doomed:
            self.path(number).unlink(missing_ok=True)
            del self._kept[number]
            entry = ledger.episodes[number]
            entry.file["pruned"] = True
            entry.text = None
        for number in range(ledger.replay_pruned_to + 1, replay_to + 1):
            self.replay_path(number).unlink(missing_ok=True)
        ledger.replay_pruned_to = replay_to
        self._pruned_to = max([self._pruned_to, *doomed])

    def _json_problems(self) -> list[str]:
        messages: list[str] = []
        readers = {"history.json": self._stored_history, "metadata.json": self._read_metadata}
        for file, read in readers.items():
            try:
                read()
            except FileNotFoundError:
                if self.episodes():
                    messages.append(f"{file} is missing; rebuilt from the checkpoints")
            except ValueError as error:
                messages.append(f"{file} is damaged ({error}); rebuilt from the checkpoints")
        return messages

    def _quarantine(self, error: Damaged) -> str:
        """Move a damaged file, and its replay piece, out of the way."""
        place = self._directory / "damaged"
        place.mkdir(exist_ok=True)
        replay = self._directory / "replay"
        for source in dict.fromkeys((replay / error.path.name, error.path)):
            if os.path.lexists(source):
                prefix = "replay_" if source.parent == replay else ""
                os.rename(source, _free(place, prefix + source.stem, source.suffix))
        sync_directory(place)
        sync_directory(self._directory)
        return f"{error.path.name} is damaged ({error.reason}); moved to {place}/"

    def _set_aside(self) -> list[str]:
        """Move what stands in the place of a file and is none, such as a link, out of the way."""
        pieces = _listing(self._directory / "replay")
        files = [self._directory / name for name in ("history.json", "metadata.json")]
        files += [*map(self.path, self.episodes()), *map(self.replay_path, pieces)]
        found = ((path, instead_of_file(path)) for path in files)
        return [self._quarantine(Damaged(path, problem)) for path, problem in found if problem]

    def _archive_target(self) -> Path:
        name = f"{self.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        number, free = 1, name
        while any(os.path.lexists(place) for _, place in self._archives(free)):
            number += 1
            free = f"{name}-{number}"
        return self._directory.parent / "archive" / free

    def _archives(self, name: str) -> list[tuple[Path, Path]]:
        """Return the run directory and the logs, each with the place of that name to archive it."""
        places = [place for place in (self._directory, self._logs) if place is not None]
        return [(place, place.parent / "archive" / name) for place in places]

    def _put_away(self, episode: int) -> Path:
        """Archive the run and its logs, and keep here what is up to `episode`."""
        target = self._archive_target()
        target.parent.mkdir(exist_ok=True)
        note = target.parent / f".{target.name}.keeps-{episode}"
        os.close(os.open(note, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        sync_directory(target.parent)
        self._carry_out(target, episode)
        note.unlink()
        return target

    def _notes(self) -> list[tuple[Path, Path, int]]:
        """Return what a cut `_put_away` left: its note, its target, the episode it goes back to."""
        note = re.compile(rf"\.({self._archive_name()})\.keeps-(\d{{1,6}})", re.ASCII)
        archive = self._directory.parent / "archive"
        found = map(note.fullmatch, sorted(os.listdir(archive)) if archive.is_dir() else [])
        return [(archive / m[0], archive / m[1], int(m[2])) for m in found if m]

    def half_archived(self) -> Path | None:
        """Return the archive of the run that was cut off when all was in it; `recover` goes on.

        What is still in the run directory is there, too, and is about to be deleted here.
        """
        for _, target, _ in self._notes():
            if any(os.path.lexists(place) for _, place in self._archives(target.name)):
                return target
        return None

    def _carry_out(self, target: Path, episode: int) -> None:
        """Archive what is not yet in the archive, then drop it here; may be done again.

        Nothing is deleted here that the archive does not hold.
        """
        archives = self._archives(target.name)
        for source, place in archives:
            if _filled(source) and not os.path.lexists(place):
                _transfer(source, place, keep=episode > 0)
        if episode:
            ledger = self._current()
            ledger.trim(episode)
            numbers = {*self.episodes(), *_listing(self._directory / "replay")}
            for number in sorted(numbers, reverse=True):
                if number > episode:
                    for path in (self.path(number), self.replay_path(number)):
                        _delete_copy(path, target / path.relative_to(self._directory))
            self._write(ledger, _run_of(_load(self.path(episode))[0], ledger))
            return
        for source, place in archives:
            for name, path in _files_in(source).items():
                _delete_copy(path, place / name)
            for directory, _, _ in os.walk(source, topdown=False):
                with contextlib.suppress(OSError):  # a link, a disk, not empty
                    os.rmdir(directory)

    def _archive_name(self) -> str:
        return rf"{re.escape(self.name)}-\d{{8}}T\d{{6}}Z(?:-\d+)?"

    def _staged(self) -> list[Path]:
        """Return what a cut `adopt`, `archive` or `branch` left half built."""
        own = re.compile(rf"\.{self._archive_name()}\.tmp", re.ASCII)
        found: list[Path] = []
        for _, place in self._archives("any"):
            archive, stage = place.parent, place.parent.parent / f".{self.name}.tmp"
            names = os.listdir(archive) if archive.is_dir() else []
            found += [archive / name for name in names if own.fullmatch(name)]
            found += [stage] if os.path.lexists(stage) else []
        return found

    def _sweep(self) -> None:
        for directory in (self._directory, self._directory / "replay"):
            sweep(directory)
        for stage in self._staged():
            discard(stage)


def _write_each_second(reference: "weakref.ref[TrainingCheckpoint]", stop: threading.Event) -> None:
    """Keep the JSON files of a session at most a second behind, off the training's path."""
    while not stop.wait(WRITE_INTERVAL):
        run = reference()
        if run is None:
            return
        run._write_news()  # pyright: ignore[reportPrivateUsage]
        del run


def _lock_paths(place: Path) -> list[Path]:
    """Return the locks of a directory: beside its name, and beside what that is a link to.

    So each of its names leads to one lock of them all, and the first is that of earlier versions.
    Beside a disk that is mounted there may be no place for the second.
    """
    place = Path(os.path.abspath(place))
    named = Path(os.path.realpath(place.parent), f".{place.name}.lock")
    place = Path(os.path.realpath(place))
    own = place.parent / f".{place.name}.lock"
    return [named, own] if own.exists() or os.access(own.parent, os.W_OK) else [named]


def _check_apart(directory: Path, logs: Path) -> None:
    """Refuse logs that lie where the episodes do: archiving one would move the other."""
    own, other = (Path(os.path.realpath(place)) for place in (directory, logs))
    if own.is_relative_to(other) or other.is_relative_to(own):
        raise UserError(
            f"--checkpoints.dir {directory.parent} and --logs.dir {logs.parent}: a run's episodes "
            f"would be in {directory}, its curves in {logs}; give two directories apart, such as "
            "checkpoints and lightning_logs"
        )


def _local(path: str | Path) -> Path:
    """Return the file that a user named, perhaps by a link."""
    text = local("checkpoint", path)
    if Path(text).is_dir():
        newest = max(_listing(Path(text)), default=1)
        file = TrainingCheckpoint(text).path(newest)
        raise UserError(f"{text}: a directory, not a file; give a file in it, such as {file}")
    return Path(os.path.realpath(text) if os.path.islink(text) else text)


def _listing(directory: Path) -> list[int]:
    """Return the numbers of the episode files in `directory`, ascending."""
    if not directory.is_dir():
        return []
    names = os.listdir(directory)
    numbers = (int(m[1]) for m in map(EPISODE_PATTERN.fullmatch, names) if m)
    present = set(names)
    return sorted({n for n in numbers if n and f"episode_{n:04d}.pt" in present})


def _filled(directory: Path) -> bool:
    """Say whether a directory holds files; a prepared one, empty or with lost+found, does not."""
    return bool(_files_in(directory))


def _free(place: Path, stem: str, suffix: str) -> Path:
    number, path = 1, place / f"{stem}{suffix}"
    while os.path.lexists(path):
        number += 1
        path = place / f"{stem}-{number}{suffix}"
    return path


def _load(path: Path) -> tuple[Row, Row, bytes]:
    """Load any checkpoint file.

    Raises:
        UserError: There is none, or not to be read.
        Damaged: It fails its check.
    """
    try:
        content, record, data = load_sealed(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if record.get("kind") == "episode":
        _check_episode(path, content, record)
    return content, record, data


def _check_episode(path: Path, content: Row, record: Row) -> None:
    """Raise `Damaged` unless what an episode's file holds is what its record says."""
    number, held = _parse_record(path, record, "episode"), content.get("episode")
    if type(held) is not int or held != number:
        raise Damaged(path, f"its record says episode {number}, its content does not")
    if not isinstance(content.get("run"), dict):
        raise Damaged(path, "does not say which run it is of")


def _parse_record(path: Path, record: Row, kind: str) -> int:
    """Check the record of a file and return its episode.

    Raises:
        Damaged: It is malformed or of another kind.
    """
    try:
        if record.get("kind") != kind:
            raise ValueError(f"no {kind} file")
        number = parse_count(record, "episode", least=1, most=MAX_EPISODES)
        parse_text(record, "agent")
        if kind == "episode":
            if not isinstance(record.get("session"), dict):
                raise ValueError("no session")
            parse_session(record["session"], "running")
            parse_count(record["session"], "start_episode", most=number)
            if not isinstance(record.get("metrics"), dict):
                raise ValueError("no metrics")
            parse_count(parse_metrics(record["metrics"]), "episode", least=number, most=number)
            for key in ("pruned_to", "replay_pruned_to"):
                parse_count(record, key, most=number - 1)
            if record.get("replay") is not None:
                parse_hash(record["replay"])
    except ValueError as error:
        raise Damaged(path, f"its record is wrong: {error}") from None
    return number


def _file_row(path: Path, record: Row, hashed: Row) -> Row:
    row = {"file": path.name, **hashed}
    if record.get("replay") is not None:
        row["replay"] = record["replay"]
    return row


def _run_of(content: Row | None, ledger: Ledger) -> Row:
    """Return the run's info as a checkpoint carries it."""
    run = content.get("run") if content else None
    return _plain(cast(Row, run)) if isinstance(run, dict) else {"agent": ledger.agent}


@contextlib.contextmanager
def _building(target: Path) -> Generator[Path]:
    """Give a directory to build in, then put it in the place of `target` in one step.

    Where `target` is a link or a disk of its own, it stays and is what is built in.
    """
    try:
        if target.is_dir():
            target.rmdir()
    except OSError:
        yield target
        return
    stage = target.parent / f".{target.name}.tmp"
    if os.path.lexists(stage):
        discard(stage)
    stage.mkdir(parents=True)
    try:
        yield stage
        os.rename(stage, target)
    except BaseException:
        with contextlib.suppress(OSError):
            discard(stage)
        raise
    sync_directory(target.parent)


def _files_in(directory: Path) -> dict[str, Path]:
    """Return the regular files below a directory under their names in it."""
    found: dict[str, Path] = {}
    for place, _, names in os.walk(directory):
        paths = (Path(place, name) for name in sorted(names))
        regular = (path for path in paths if stat.S_ISREG(path.lstat().st_mode))
        found |= {path.relative_to(directory).as_posix(): path for path in regular}
    return found


def _share(files: dict[str, Path], place: Path) -> None:
    """Link files into a directory, or copy them where that cannot be; a run's episodes last."""
    for name in sorted(files, key=lambda name: ("/" not in name, name)):
        if instead_of_file(files[name]):
            continue
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(files[name], path)
        except OSError:  # another disk, or one without links
            write_atomic(path, read_file(files[name]))
    for directory in {(place / name).parent for name in files}:
        sync_directory(directory)


def _transfer(source: Path, target: Path, *, keep: bool) -> None:
    """Bring all of a directory to `target` in one step, and leave it here where it cannot move."""
    target.parent.mkdir(exist_ok=True)
    if not keep and not source.is_symlink():
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):  # a disk of its own; another disk
                raise
        else:
            sync_directory(target.parent)
            sync_directory(source.parent)
            return
    with _building(target) as place:
        _share(_files_in(source), place)


def _delete_copy(path: Path, original: Path) -> None:
    """Delete a file that stands elsewhere, too, and is not reached there by a link to itself."""
    if os.path.realpath(path) == os.path.realpath(original):
        return
    with contextlib.suppress(FileNotFoundError):
        if path.samefile(original) or filecmp.cmp(path, original, shallow=False):
            path.unlink()
