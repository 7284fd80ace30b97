"""The session that writes a run: it saves episodes, prunes old ones and keeps the JSON files."""

import itertools
import json
import math
import threading
import time
import weakref
from pathlib import Path

from co2lightning.runs.files import now, write_atomic
from co2lightning.runs.ledger import Episode, Ledger, Row, Session, score
from co2lightning.runs.pieces import prune_pieces, save_piece
from co2lightning.runs.reading import Layout, file_row, metadata_of, plain, read_ledger, stored_run
from co2lightning.runs.seal import seal_checkpoint, seal_json

_WRITE_INTERVAL = 1.0  # seconds the JSON files may be behind during a session


def write_json(layout: Layout, ledger: Ledger, run: Row | None = None) -> None:
    """Write history.json and metadata.json, with another `run` or that of before; wait for both."""
    run = stored_run(layout, ledger) if run is None else plain(run)
    _write_texts(layout, _encode(ledger, run), durable=True)


def _encode(ledger: Ledger, run: Row) -> tuple[str, str]:
    return ledger.text(), json.dumps(metadata_of(ledger, run), allow_nan=False, indent=1)


def _write_texts(layout: Layout, texts: tuple[str, str], *, durable: bool) -> None:
    for path, text in zip((layout.history_file, layout.metadata_file), texts, strict=True):
        write_atomic(path, seal_json(text), durable=durable)


class Writer:
    """An open session, see `TrainingCheckpoint`; who opens it holds the run's lock to its end."""

    def __init__(
        self, layout: Layout, keep_last: int | None, start_episode: int, device: str, info: Row
    ) -> None:
        ledger = read_ledger(layout)
        if start_episode != ledger.last + 1:
            raise ValueError(f"start_episode {start_episode}, but {ledger.last + 1} is next")
        ledger.close_dead()
        self.ledger = ledger
        self._layout = layout
        self._keep_last = keep_last
        self.run = plain(info)
        ledger.agent = str(self.run.get("agent", ledger.agent))
        self._previous_status = next(
            (e.session.status for e in reversed(ledger.episodes.values())), None
        )
        ledger.sessions.append(Session(now(), start_episode, device))
        best = ledger.best(kept=True)  # never pruned
        self._best = (score(ledger.episodes[best].metrics), best) if best else None
        self._kept = dict.fromkeys(ledger.kept())  # episodes with a file, ascending
        pruned = (n for n, e in ledger.episodes.items() if e.pruned and not e.deleted)
        self._pruned_to = max(pruned, default=0)
        self._started = time.monotonic()
        self._changing = threading.Lock()  # held while the ledger changes or is encoded
        self._unwritten = False
        self._failure: OSError | None = None
        layout.directory.mkdir(parents=True, exist_ok=True)
        write_json(layout, ledger, self.run)
        self._stop = threading.Event()
        arguments = weakref.ref(self), self._stop
        self._thread = threading.Thread(target=_write_each_second, args=arguments, daemon=True)
        self._thread.start()

    def save_start(self, checkpoint: Row) -> Path:
        """Save what the run begins with, see `TrainingCheckpoint.save_start`."""
        if self.ledger.episodes:
            raise ValueError(f"the run stands at episode {self.ledger.last}")
        record: Row = {"kind": "start", "agent": self.ledger.agent, "episode": 0}
        content = {**checkpoint, "episode": 0, "timestamp": now(), "metrics": {}, "run": self.run}
        path = self._layout.path(0)
        write_atomic(path, seal_checkpoint(content, record))
        return path

    def save(
        self,
        checkpoint: Row,
        episode: int,
        metrics: dict[str, float],
        replay: Row | None,
        replay_capacity_episodes: int | None,
    ) -> Path:
        """Save one episode, see `TrainingCheckpoint.save_checkpoint`."""
        ledger, session = self.ledger, self.ledger.sessions[-1]
        if self._failure is not None:
            raise self._failure
        if episode != ledger.last + 1:
            raise ValueError(f"episode {episode}, but {ledger.last + 1} is next")
        duration = round(time.monotonic() - self._started, 3)
        values: dict[str, float | None] = {"episode": episode}
        for key, value in metrics.items():
            if key != "episode":
                values[key] = float(value) if math.isfinite(value) else None
        rank = score(values), episode
        best = min(self._best, rank) if self._best else rank
        doomed = self._doomed(episode, best[1])
        replay_to = ledger.replay_pruned_to
        if replay_capacity_episodes is not None and self._keep_last is not None:
            replay_to = max(replay_to, episode - replay_capacity_episodes)
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
            record["replay"] = save_piece(self._layout, ledger.agent, episode, replay)
        figures = {key: value for key, value in values.items() if key != "episode"}
        added = {key: record[key] for key in ("episode", "timestamp", "session")}
        content = {**checkpoint, **added, "metrics": figures, "run": self.run}
        data = seal_checkpoint(content, record)
        path = self._layout.path(episode)
        write_atomic(path, data)
        entry = Episode(session, values, file_row(data, record))
        with self._changing:
            ledger.episodes[episode] = entry
            session.duration = duration
            self._best = best
            self._kept[episode] = None
            for number in doomed:
                self._layout.path(number).unlink(missing_ok=True)
                del self._kept[number]
                ledger.episodes[number].mark_pruned()
            self._pruned_to = record["pruned_to"]
            prune_pieces(self._layout, ledger, replay_to)
            self._unwritten = True
        return path

    def _doomed(self, episode: int, best: int) -> list[int]:
        """Return the episodes whose files `keep_last` deletes once `episode` is saved."""
        if self._keep_last is None:
            return []
        window = episode - self._keep_last
        old = itertools.takewhile(lambda number: number <= window, self._kept)
        return [number for number in old if number != best]

    def write_news(self) -> None:
        """Write the JSON files if an episode came since; called by the session's thread."""
        with self._changing:
            if not self._unwritten:
                return
            self._unwritten = False
            texts = _encode(self.ledger, self.run)
        try:
            _write_texts(self._layout, texts, durable=False)
        except OSError as error:
            self._failure = error  # the next save raises it

    def end(self, status: str) -> None:
        """Close the session with the status and write the JSON files."""
        self._stop.set()
        self._thread.join()
        self.ledger.sessions[-1].status = status
        self.ledger.sessions[-1].duration = round(time.monotonic() - self._started, 3)
        write_json(self._layout, self.ledger, self.run)


def _write_each_second(reference: "weakref.ref[Writer]", stop: threading.Event) -> None:
    """Keep the JSON files of a session at most a second behind, off the training's path."""
    while not stop.wait(_WRITE_INTERVAL):
        writer = reference()
        if writer is None:
            return
        writer.write_news()
        del writer
