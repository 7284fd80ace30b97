"""The run directory under fire, with real processes: kills, double starts, full disks."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SERVER, fork

if sys.platform == "win32":
    pytest.skip("POSIX processes, signals and limits", allow_module_level=True)

import fcntl
import resource

from co2lightning.errors import UserError
from co2lightning.runs.lock import Locked
from co2lightning.runs.run import TrainingCheckpoint
from conftest import pruned


def open_run(place: Path, **options: Any) -> TrainingCheckpoint:
    return TrainingCheckpoint(
        place / "checkpoints" / "PPO", logs=place / "lightning_logs" / "PPO", **options
    )


def write(
    pipe: Connection, place: Path, total: int, keep: int = 0, pause: float = 0.0, limit: int = 0
) -> None:
    """Be a trainer without the training: save episodes as fast as it goes, up to `total`."""
    os.environ["TMPDIR"] = "/dev/shm"  # another file system: nothing may pass through it
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run = open_run(place, keep_last=keep or None)
    try:
        with run.lock():
            messages = run.recover()
            latest = run.load_latest_checkpoint()
            first = run.get_next_episode()
            assert first == (latest["episode"] if latest else 0) + 1
            value = float(latest["value"][0]) if latest else 0.0
            assert value == (first - 1) * first / 2, "the state is not that of the last episode"
            pipe.send(("started", first, messages))
            run.begin_session(start_episode=first, device="cpu", info={"agent": "PPO"})
            status = "failed"
            try:
                for episode in range(first, total + 1):
                    value += episode
                    run.save_checkpoint(
                        {"value": torch.full((20_000,), value, dtype=torch.float64)},
                        episode=episode,
                        metrics={"co2_kg": 1.0, "reward": -float(episode % 7)},
                        replay={"obs": torch.full((100,), float(episode))},
                    )
                    pipe.send(("saved", episode, None))
                    time.sleep(pause)
                status = "completed"
            finally:
                run.end_session(status)
    except UserError as error:
        pipe.send(("refused", 0, str(error)))
        sys.exit(2)
    except OSError as error:
        pipe.send(("disk", 0, str(error)))
        sys.exit(1)


@contextlib.contextmanager
def process(
    target: Callable[..., None], *arguments: Any
) -> Iterator[tuple[BaseProcess, Connection]]:
    here, there = SERVER.Pipe(duplex=False)
    child = fork(target, there, *arguments)
    there.close()
    try:
        yield child, here
    finally:
        child.kill()
        child.join()
        here.close()


def events(pipe: Connection) -> Iterator[tuple[str, int, Any]]:
    """Yield what a process says until it ends."""
    with contextlib.suppress(EOFError):
        while True:
            yield pipe.recv()


def wait_for(pipe: Connection, word: str) -> tuple[str, int, Any]:
    return next(event for event in events(pipe) if event[0] == word)


def finish(place: Path, *arguments: Any) -> tuple[int | None, list[tuple[str, int, Any]]]:
    with process(write, place, *arguments) as (child, pipe):
        said = list(events(pipe))
        child.join()
        return child.exitcode, said


def assert_whole(run: TrainingCheckpoint) -> None:
    history = run.load_history()
    total = sum(session["episodes_count"] for session in history["trainings"])
    assert total == history["total_episodes"] == len(run.episodes()) + len(pruned(run))
    assert total == run.get_next_episode() - 1
    assert run.verify() == run.leftovers() == []
    assert not list(run.directory.rglob("*.tmp"))


def kill_loop(place: Path, kills: int, seed: int, keep: int) -> None:
    """SIGKILL a saving process again and again; no file is ever torn, no episode lost."""
    rng = random.Random(seed)
    run = open_run(place)
    for _ in range(kills):
        with process(write, place, 1_000_000, keep) as (child, pipe):
            _, first, messages = wait_for(pipe, "started")
            assert messages == []
            time.sleep(rng.uniform(0.0, 0.12))
            child.kill()
            done = max([first - 1, *(episode for _, episode, _ in events(pipe))])
        assert not run.is_running()
        assert run.get_next_episode() - 1 in (done, done + 1), "an episode that was saved is lost"
        if run.directory.exists():  # a kill may come before it was made
            assert run.verify() == [], "what a kill leaves is not damage"
    last = run.get_next_episode()
    assert finish(place, last, keep)[0] == 0
    assert run.get_next_episode() - 1 == last
    statuses = [session["status"] for session in run.load_history()["trainings"]]
    assert statuses == ["killed"] * (len(statuses) - 1) + ["completed"]
    assert len(statuses) <= kills + 1  # a kill may come before its session was written down
    assert_whole(run)
    assert not (run.directory / "damaged").exists()


def test_a_few_sigkills_tear_nothing(tmp_path: Path) -> None:
    kill_loop(tmp_path, 3, seed=1, keep=3)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 3])
def test_150_sigkills_tear_nothing(tmp_path: Path, keep: int) -> None:
    kill_loop(tmp_path, 150, seed=2, keep=keep)


def double_start(place: Path) -> None:
    """Two trainers at once: one goes on, the other says who has the run and changes nothing."""
    with (
        process(write, place, 100_000, 0, 0.02) as first,
        process(write, place, 100_000, 0, 0.02) as second,
    ):
        (ended,) = wait([first[0].sentinel, second[0].sentinel], timeout=60)
        (loser, said), (winner, pipe) = (
            (first, second) if ended == first[0].sentinel else (second, first)
        )
        ((word, _, line),) = events(said)
        assert (loser.exitcode, word) == (2, "refused")
        assert f"process {winner.pid} on {os.uname().nodename}" in line
        assert wait_for(pipe, "started")[1] == 1
        assert wait_for(pipe, "saved")[1] == 1
        assert winner.is_alive()
    run = open_run(place)
    assert len(run.load_history()["trainings"]) == 1
    run.recover()
    assert_whole(run)


def test_of_two_trainers_one_goes_on(tmp_path: Path) -> None:
    double_start(tmp_path)


@pytest.mark.slow
def test_50_double_starts(tmp_path: Path) -> None:
    for number in range(50):
        place = tmp_path / str(number)
        place.mkdir()
        double_start(place)


def test_the_lock_is_refused_at_once_covers_the_logs_and_dies_with_its_process(
    tmp_path: Path,
) -> None:
    run = open_run(tmp_path)
    same_logs = TrainingCheckpoint(tmp_path / "x" / "A", logs=tmp_path / "lightning_logs" / "PPO")
    with process(write, tmp_path, 1000, 0, 0.05) as (child, pipe):
        wait_for(pipe, "saved")
        assert run.is_running()
        assert run.load_history()["trainings"][0]["status"] == "running"
        for other in (run, same_logs):
            began = time.monotonic()
            with pytest.raises(Locked, match=rf"process {child.pid} on"):
                other.begin_session(start_episode=1, device="cpu", info={})
            assert time.monotonic() - began < 1.0
            with pytest.raises(Locked):
                other.archive()
        assert not same_logs.directory.exists()
        assert not same_logs.is_running()
    assert not run.is_running()
    with run.lock(), run.lock():
        assert run.is_running()
    with pytest.raises(Locked), run.lock(), open_run(tmp_path).lock():
        pass
    assert not run.is_running()


@pytest.mark.parametrize("linked", ["", "PPO"])
def test_every_name_of_a_run_leads_to_one_lock(tmp_path: Path, linked: str) -> None:
    """Either the run and its logs are links, or the directories that they lie in."""
    for place in ("checkpoints", "lightning_logs"):
        target, link = tmp_path / "disk" / place / linked, tmp_path / place / linked
        target.mkdir(parents=True)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(target)
    run, other = open_run(tmp_path), open_run(tmp_path / "disk")
    same_logs = TrainingCheckpoint(tmp_path / "x" / "A", logs=other.logs)
    with process(write, tmp_path, 1000, 0, 0.05) as (child, pipe):
        wait_for(pipe, "saved")
        assert run.is_running()
        assert other.is_running()
        for second in (other, same_logs):
            with pytest.raises(Locked, match=rf"process {child.pid} on"), second.lock():
                pass
    with other.lock(), pytest.raises(Locked), run.lock():
        pass
    # A process of an earlier version knows only the lock beside the name.
    with open(tmp_path / "checkpoints" / ".PPO.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Locked), run.lock():
            pass
    with run.lock():
        assert other.is_running()
    assert (run.recover(), run.verify()) == ([], [])
    assert (tmp_path / "checkpoints" / linked).is_symlink()


def fork_under_the_lock(pipe: Connection, place: Path) -> None:
    with open_run(place).lock():
        child = os.fork()
        if child:
            pipe.send(("started", child, None))
        time.sleep(60)


def test_a_forked_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    with process(fork_under_the_lock, tmp_path) as (_, pipe):
        grandchild = wait_for(pipe, "started")[1]
        assert open_run(tmp_path).is_running()
    try:
        os.kill(grandchild, 0)  # it lives
        assert not open_run(tmp_path).is_running()
    finally:
        os.kill(grandchild, signal.SIGKILL)


def look(pipe: Connection, place: Path) -> None:
    run = open_run(place)
    pipe.send(("started", 0, None))
    while True:
        run.is_running()


def test_readers_do_not_disturb_a_starting_writer(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with run.lock():
        pass
    with process(look, tmp_path) as (_, pipe):
        wait_for(pipe, "started")
        for _ in range(300):
            with run.lock():
                pass


def test_history_can_be_read_at_any_time_and_is_a_second_behind_at_most(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    behind = []
    with process(write, tmp_path, 10_000, 0, 0.03) as (_, pipe):
        wait_for(pipe, "saved")
        for _ in range(30):
            newest = run.episodes()[-1]
            assert run.load_history()["total_episodes"] >= newest
            assert run.load_metadata()["last_episode"] >= newest
            assert run.verify() == []
            shown = json.loads((run.directory / "history.json").read_text(encoding="utf-8"))
            json.loads((run.directory / "metadata.json").read_text(encoding="utf-8"))
            if shown["total_episodes"] < newest:
                behind.append(time.time() - run.path(shown["total_episodes"] + 1).stat().st_mtime)
            time.sleep(0.05)
    assert max(behind) < 2.0  # a second and what a busy machine adds


def test_a_full_disk_leaves_the_last_good_state(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the write of the next episode fails."""
    assert finish(tmp_path, 3)[0] == 0
    code, said = finish(tmp_path, 6, 0, 0.0, 100_000)
    assert code == 1
    assert said[-1][0] == "disk"
    run = open_run(tmp_path)
    assert not list(run.directory.rglob("*.tmp"))
    assert run.episodes() == [1, 2, 3]
    assert [s["status"] for s in run.load_history()["trainings"]] == ["completed", "failed"]
    code, said = finish(tmp_path, 6)
    assert (code, said[0]) == (0, ("started", 4, []))
    assert_whole(run)


def test_no_permission_is_an_os_error_and_changes_nothing(tmp_path: Path) -> None:
    """Root ignores modes, so a file stands where the directory should be."""
    (tmp_path / "checkpoints").write_text("a file")
    run = open_run(tmp_path)
    with pytest.raises(OSError, match="checkpoints"):
        run.begin_session(start_episode=1, device="cpu", info={})
    assert (run.episodes(), run.is_running(), run.recover()) == ([], False, [])


def test_permission_lost_in_mid_run_stops_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.begin_session(start_episode=1, device="cpu", info={"agent": "PPO"})
    run.save_checkpoint({"epoch": 0}, episode=1, metrics={})
    away = tmp_path / "away"
    run.directory.rename(away)
    with pytest.raises(FileNotFoundError):
        run.save_checkpoint({"epoch": 1}, episode=2, metrics={})
    away.rename(run.directory)
    run.save_checkpoint({"epoch": 1}, episode=2, metrics={})
    run.end_session("completed")
    assert_whole(run)
