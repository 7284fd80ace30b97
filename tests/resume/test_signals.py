"""The command in processes of its own: killed, signalled, started twice."""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from test_exact import QUICK, check_history, curves, shipped, state

from co2lightning import storage
from co2lightning.checkpoints import TrainingCheckpoint
from conftest import TINY, Outcome, tree

if sys.platform == "win32":
    pytest.skip("POSIX signals", allow_module_level=True)

# Every process below is forked from one that has imported torch and Lightning already.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["co2lightning.session", "co2lightning.cli"])
PATIENCE = 120.0
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def child(place: str, words: list[str], hang: bool) -> None:
    """Be the command; with `hang`, one that never ends its first update."""
    os.chdir(place)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for signum in SIGNALS:  # what the shell sees of a Python that has not begun yet
        signal.signal(signum, lambda signum, frame: os._exit(128 + signum))
    from co2lightning.agents.agent import Agent
    from co2lightning.cli import main

    if hang:

        def wait(self: Agent, rollout: Any, batch_idx: int) -> None:
            Path("hanging").touch()
            while True:
                time.sleep(0.01)

        Agent.training_step = wait
    code = main(words)
    sys.stdout.flush()
    os._exit(code)


class Trainer:
    """Starts `fit` on a tiny run of an agent, and ends what is left of it."""

    def __init__(self, agent: str, place: Path) -> None:
        self.agent = agent
        self.place = place
        self.started: list[BaseProcess] = []

    @property
    def directory(self) -> str:
        return str(self.place / "checkpoints" / self.agent)

    def start(self, *words: str, hang: bool = False) -> BaseProcess:
        tiny = ["fit", "--model", self.agent, "--env.num_envs", "4", *TINY[self.agent]]
        process = SERVER.Process(target=child, args=(str(self.place), [*tiny, *words], hang))
        process.start()
        self.started.append(process)
        return process

    def wait_for(self, process: BaseProcess, name: str) -> None:
        end = time.monotonic() + PATIENCE
        while not (self.place / name).exists() and process.is_alive():
            assert time.monotonic() < end
            time.sleep(0.005)

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.join()

    def errors(self) -> str:
        return (self.place / "err").read_text() if (self.place / "err").exists() else ""


@pytest.fixture
def trainer(place: Path, request: pytest.FixtureRequest) -> Iterator[Trainer]:
    made = Trainer(getattr(request, "param", "PPO"), place)
    yield made
    made.end()


def ended(process: BaseProcess) -> int | None:
    process.join(PATIENCE)
    return process.exitcode


def kill_and_restart(
    trainer: Trainer, reference: Trainer, kills: int, total: int, dice: random.Random
) -> int:
    """Kill a restart loop until it is done or was killed often enough; returns the kills."""
    done = 0
    while True:
        process = trainer.start("--ckpt_path", "last", "--total_episodes", str(total))
        if done < kills:
            if dice.random() < 0.7:  # wait for news first: most kills shall hit the training
                newest = TrainingCheckpoint(trainer.directory).episodes()
                name = f"episode_{len(newest) + 1:04d}.pt"
                trainer.wait_for(process, f"checkpoints/{trainer.agent}/{name}")
                process.join(dice.uniform(0.0, 0.15))
            else:
                process.join(dice.uniform(0.0, 2.0))
            if process.is_alive():
                process.kill()
        code = ended(process)
        assert code in (0, -signal.SIGKILL), trainer.errors()
        for file in Path(trainer.directory).glob("episode_*.pt"):
            storage.read_sealed(file)  # raises where a file is torn
        if code == 0:
            break
        done += 1
    assert trainer.errors() == ""
    assert state(trainer.directory, total) == state(reference.directory, total)
    check_history(trainer.directory, total)
    assert storage.stray(Path(trainer.directory)) == []
    return done


def reference_run(agent: str, place: Path, total: int) -> Trainer:
    place.mkdir(exist_ok=True)
    reference = Trainer(agent, place)
    assert ended(reference.start("--episodes", str(total))) == 0, reference.errors()
    return reference


@pytest.mark.parametrize("trainer", QUICK, indirect=True)
def test_a_restart_loop_under_kills(
    trainer: Trainer, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path_factory.mktemp("reference")
    reference = reference_run(trainer.agent, place, 6)
    kill_and_restart(trainer, reference, 3, 6, random.Random(0))
    resumed = curves(trainer.agent)
    monkeypatch.chdir(place)
    assert resumed == curves(trainer.agent)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", shipped(), indirect=True)
def test_three_hundred_kills(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> None:
    total, done, dice = 30, 0, random.Random(1)
    reference = reference_run(trainer.agent, tmp_path_factory.mktemp("reference"), total)
    place = trainer.place
    for number in range(100):
        if done >= 300:
            break
        trainer.place = place / str(number)
        trainer.place.mkdir()
        done += kill_and_restart(trainer, reference, 300 - done, total, dice)
    assert done >= 300


def interrupt(trainer: Trainer, signum: int, news: str, delay: float) -> int | None:
    """Send a signal to a long session some time after a file is there; returns the exit code."""
    process = trainer.start("--ckpt_path", "last", "--episodes", "1000")
    trainer.wait_for(process, news)
    process.join(delay)
    assert process.pid is not None
    os.kill(process.pid, signum)
    return ended(process)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal(trainer: Trainer, signum: int) -> None:
    assert interrupt(trainer, signum, "checkpoints/PPO/episode_0002.pt", 0.05) == 128 + signum, (
        trainer.errors()
    )
    run = TrainingCheckpoint(trainer.directory)
    last = run.get_next_episode() - 1
    assert last >= 2
    (session,) = run.load_history()["trainings"]
    assert (session["end_episode"], session["status"]) == (last, "interrupted")
    check_history(trainer.directory, last)
    out = (trainer.place / "out").read_text()
    assert out.endswith(f"Stopped by {signal.Signals(signum).name}; --ckpt_path last continues\n")
    assert trainer.errors() == ""


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_second_signal_ends_at_once(trainer: Trainer, signum: int) -> None:
    process = trainer.start("--episodes", "3", hang=True)
    trainer.wait_for(process, "hanging")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.3)
    assert process.is_alive(), "the first signal waits for the segment's end"
    os.kill(process.pid, signum)
    assert ended(process) == 128 + signum
    (session,) = TrainingCheckpoint(trainer.directory).load_history()["trainings"]
    assert session["episodes_count"] == 0


@pytest.mark.slow
def test_fifty_signals(trainer: Trainer) -> None:
    dice = random.Random(2)
    for _ in range(50):
        signum = dice.choice(SIGNALS)
        run = TrainingCheckpoint(trainer.directory)
        before = len(run.load_history()["trainings"]) if run.directory.exists() else 0
        if dice.random() < 0.5:
            news = f"checkpoints/PPO/{run.path(run.get_next_episode()).name}"
            code = interrupt(trainer, signum, news, dice.uniform(0.0, 0.3))
        else:
            (trainer.place / "out").unlink(missing_ok=True)
            code = interrupt(trainer, signum, "out", dice.uniform(0.0, 2.0))
        assert code == 128 + signum, trainer.errors()
        if not run.directory.exists():
            continue
        sessions = run.load_history()["trainings"]
        assert len(sessions) - before in (0, 1)
        assert {session["status"] for session in sessions} <= {"interrupted"}
        check_history(trainer.directory, run.get_next_episode() - 1)
    assert trainer.errors() == ""
    curves("PPO")


def test_a_second_start(trainer: Trainer, command: Callable[..., Outcome]) -> None:
    first = trainer.start("--episodes", "3", hang=True)
    trainer.wait_for(first, "hanging")
    before = tree(trainer.place)
    began = time.monotonic()
    for words in (["--ckpt_path", "last"], []):
        outcome = command("fit", "--config", "ppo.yaml", *words)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert f"is in use by process {first.pid} on {socket.gethostname()}" in outcome.err
        assert tree(trainer.place) == before
    assert time.monotonic() - began < 10.0
    first.kill()
    first.join()
    words = ("--env.num_envs", "4", *TINY["PPO"], "--ckpt_path", "last", "--episodes", "1")
    assert command("fit", "--config", "ppo.yaml", *words).code == 0


@pytest.mark.slow
def test_fifty_double_starts(trainer: Trainer) -> None:
    for number in range(50):
        both = [trainer.start("--ckpt_path", "last", hang=True) for _ in range(2)]
        end = time.monotonic() + PATIENCE
        while all(process.is_alive() for process in both) and time.monotonic() < end:
            time.sleep(0.01)
        loser = next(process for process in both if not process.is_alive())
        assert ended(loser) == 2
        winner = next(process for process in both if process is not loser)
        trainer.wait_for(winner, "hanging")
        assert winner.is_alive()
        winner.kill()
        winner.join()
        (trainer.place / "hanging").unlink()
        lines = trainer.errors().splitlines()
        assert len(lines) == number + 1
        assert f"process {winner.pid} on {socket.gethostname()}" in lines[-1]
