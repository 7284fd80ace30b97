"""A run directory as others see it: every episode a verified file, the history, one writer."""

import contextlib
import os
from collections.abc import Generator, Iterable
from pathlib import Path

from co2lightning.errors import UserError, counted
from co2lightning.places import local
from co2lightning.runs import branches, inspect, pieces, reading
from co2lightning.runs.ledger import STATUSES, Ledger, Row
from co2lightning.runs.lock import hold, is_held
from co2lightning.runs.writer import Writer


class TrainingCheckpoint(reading.Layout):
    """A run directory (reading.py): saves episodes, finds damage, keeps history and metadata.

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
        self, directory: str | Path, *, logs: str | Path | None = None, keep_last: int | None = None
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise UserError(f"--checkpoints.keep_last {keep_last}: must be at least 1")
        super().__init__(
            Path(local("run", directory)), None if logs is None else Path(local("logs", logs))
        )
        if self.logs:
            own, other = (Path(os.path.realpath(place)) for place in (self.directory, self.logs))
            if own.is_relative_to(other) or other.is_relative_to(own):  # archived, both would move
                raise UserError(
                    f"--checkpoints.dir {self.directory.parent} and --logs.dir {self.logs.parent}: "
                    f"a run's episodes would be in {self.directory}, its curves in {self.logs}; "
                    "give two directories apart, such as checkpoints and lightning_logs"
                )
        self._keep_last = keep_last
        self._depth = 0
        self._locks = contextlib.ExitStack()
        self._session = contextlib.ExitStack()
        self._writer: Writer | None = None  # while a session is open here

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Hold the run, checkpoints and logs, as its only writer; may be nested.

        Raises:
            Locked: Another process holds it; nothing was changed.
            UserError: The lock is none, or what belongs into the run lies behind a link.
        """
        if self._depth == 0:
            if problems := self.misplaced():
                raise UserError(f"{self.directory}: {problems[0]}; move it, or link the whole run")
            self._locks.enter_context(hold(self.directory, self.logs))
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._locks.close()

    def is_running(self) -> bool:
        """Say whether a process holds the lock, without disturbing it."""
        return is_held(self.directory)

    def load_history(self) -> Row:
        """Return the content of history.json, brought up to date from the episode files.

        Where the file is lost all of it comes from them. Pruned episodes then keep their count, not
        their metrics, and count to the session before them.
        """
        return self._ledger().view()

    def load_metadata(self) -> Row:
        """Return the content of metadata.json, brought up to date from the episode files."""
        ledger = self._ledger()
        run = self._writer.run if self._writer else reading.stored_run(self, ledger)
        return reading.metadata_of(ledger, run)

    @staticmethod
    def read(path: str | Path) -> Row:
        """Verify and load any one checkpoint file on the CPU; no code in it runs.

        Raises:
            UserError: Not a local file.
            Damaged: The file fails its check.
        """
        return reading.load_file(reading.local_file(path))[0]

    def load_latest_checkpoint(self) -> Row | None:
        """Return the newest good checkpoint, None if there is no episode file.

        Raises:
            UserError: All episode files are damaged.
        """
        _, content, _ = reading.load_newest(self)
        if content is None and (bad := self.episodes()):
            count = counted(len(bad), "checkpoint")
            raise UserError(f"{self.directory}: {count}, none of them good; see `verify`")
        return content

    def load_best_checkpoint(self) -> tuple[Row, Path, list[str]]:
        """Return the best evaluated episode, or what the run began with if none is better.

        Returns:
            Its content, its file, and a line for each thing the user must know.

        Raises:
            UserError: No episode was evaluated, or none of them has a good file.
        """
        return reading.load_best(self)

    def best_evaluated(self) -> tuple[float, int] | None:
        """Return the share of uncontrolled and the number of the best evaluated episode.

        0 stands for what the run began with; None where no episode was evaluated. No file is read.
        """
        return next(iter(self._ledger().evaluated()), None)

    def get_next_episode(self) -> int:
        """Return the episode after the newest good one, 1 for a new run."""
        return 1 + (self._writer.ledger.last if self._writer else reading.load_newest(self)[0])

    def load_replay(
        self, episodes: Iterable[int], allow_partial: bool = False
    ) -> Generator[tuple[int, Row]]:
        """Yield each of `episodes` with its replay piece, verified; read when it is asked for.

        Raises:
            UserError: A piece is missing or damaged; `allow_partial` leaves such pieces out.
        """
        yield from pieces.load_pieces(self, self._ledger().episodes, episodes, allow_partial)

    def _ledger(self) -> Ledger:
        return self._writer.ledger if self._writer else reading.read_ledger(self)

    def verify(self) -> list[str]:
        """Check every file and return one line for each problem.

        That the JSON files are behind the episodes is none: see `leftovers`.
        """
        return inspect.verify(self)

    def leftovers(self) -> list[str]:
        """Say what a session that was cut off, as by SIGKILL, left to the next start.

        No episode is lost by any of it. While a process holds the run there is nothing to say.
        """
        return inspect.leftovers(self)

    def half_archived(self) -> Path | None:
        """Return the archive of the run that was cut off when all was in it; `recover` goes on."""
        return branches.half_archived(self)

    def recover(self) -> list[str]:
        """Put the run in order before a session; returns a line for each thing the user must know.

        Sweeps temporary files, ends an archiving that was cut off, moves damaged newest files to
        `damaged/`, rebuilds history.json and metadata.json where they are corrupt or behind,
        closes sessions found dead. Of the episode files only the newest good one is read, unless
        history must be rebuilt; `verify` reads all.
        """
        if not self.directory.exists() and not branches.unfinished(self):
            return []
        with self.lock():
            return inspect.recover(self)

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
        with contextlib.ExitStack() as held:
            held.enter_context(self.lock())
            self._writer = Writer(self, self._keep_last, start_episode, device, info)
            self._session.push(held.pop_all())

    def save_checkpoint(
        self,
        checkpoint: Row,
        *,
        episode: int,
        metrics: dict[str, float],
        replay: Row | None = None,
        replay_capacity_episodes: int | None = None,
    ) -> Path:
        """Save one episode and return its path; the disk has it then.

        Without `begin_session` a session is opened here.

        Args:
            checkpoint: Tensors and plain data, such as Lightning's checkpoint; not changed.
                "episode", "timestamp", "metrics", "session" and "run" are added.
            episode: Its number, the one after the last.
            metrics: Its figures; what is not finite is stored as null.
            replay: What the episode added to the replay buffer, saved as its own file.
            replay_capacity_episodes: So many newest pieces fill the buffer; with `keep_last`
                older ones are deleted.

        Raises:
            OSError: Disk full, no permission; the last good state stands.
            ValueError: Not the next episode, or content that a safe load would refuse.
        """
        if self._writer is None:
            self.begin_session(start_episode=episode, device="cpu", info={"agent": self.name})
        assert self._writer is not None
        return self._writer.save(checkpoint, episode, metrics, replay, replay_capacity_episodes)

    def save_start(self, checkpoint: Row) -> Path:
        """Save what an open session begins a run with, as start.pt, and return its path.

        It is no episode and not counted. An earlier one is replaced.

        Args:
            checkpoint: As of `save_checkpoint`.

        Raises:
            OSError: Disk full, no permission.
            ValueError: The run has episodes, or content that a safe load would refuse.
        """
        assert self._writer is not None
        return self._writer.save_start(checkpoint)

    def end_session(self, status: str) -> None:
        """Close the session and write history.json and metadata.json.

        Args:
            status: "completed", "interrupted" (a signal) or "failed" (an error).
        """
        if self._writer is None:
            return
        if status not in STATUSES[1:4]:
            raise ValueError(f"status {status!r}")
        writer, self._writer = self._writer, None
        with self._session:
            writer.end(status)

    def archive(self) -> Path | None:
        """Move the run and its logs to `archive/<name>-<UTC time>`; overwrite nothing.

        A directory that is a link or a disk of its own stays, empty. See `branch` about a cut.
        Returns the archived run directory; None if there was no run.
        """
        with self.lock():
            return branches.archive(self)

    def branch(self, episode: int) -> Path | None:
        """Go back to `episode`: archive the run as it is, then drop the later episodes here.

        The archived copy is a whole run directory that can be read, verified and continued, with
        its logs; it shares the files (hard links where the disk has them). A cut before it stands
        changes nothing; what is left to do after that `recover` does. Returns the archived run
        directory; None if there are no later episodes.

        Raises:
            UserError: There is no good file of `episode`.
        """
        with self.lock():
            return branches.branch(self, episode)

    def adopt(self, source: Path, logs: Path | None = None) -> None:
        """Start this run from a file of another directory: take its episodes up to that one.

        Episodes that the other directory does not have are counted and marked as pruned. The
        files are linked, or copied where links are impossible; so are the other run's `logs`.

        Raises:
            UserError: This run has episodes already, or `source` is no local file.
            Damaged: `source` fails its check.
        """
        with self.lock():
            branches.adopt(self, source, logs)
