"""The command in processes of its own: killed, signalled, started twice.

Most are forked from a warm process, so that kills and signals fall on the training and several
come each second; fewer go to the command as the shell starts it.
"""

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from processes import fork
from test_exact import QUICK, check_history, curves, shipped, state

from co2lightning.runs.run import TrainingCheckpoint
from conftest import TINY, Outcome, tree

if sys.platform == "win32":
    pytest.skip("POSIX signals", allow_module_level=True)

PATIENCE = 120.0
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
ACKNOWLEDGED = "Stopping after this segment; once more ends at once\n"
OTHER_DISK = "/dev/shm"  # nothing of a run may pass through $TMPDIR


def child(place: str, words: list[str], hang: bool, ignored: list[int]) -> None:
    """Be the command; with `hang`, one that never ends its first update."""
    os.chdir(place)
    if os.path.isdir(OTHER_DISK):
        os.environ["TMPDIR"] = OTHER_DISK
    for signum in SIGNALS:  # what the shell sees of a Python that has not begun yet
        signal.signal(signum, lambda signum, frame: os._exit(128 + signum))
    for signum in ignored:  # as nohup does, and a shell's & in a script
        signal.signal(signum, signal.SIG_IGN)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)  # which looks at what that is now
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


class Command:
    """The command as the shell starts it, with the face of a forked process."""

    def __init__(self, place: Path, words: list[str]) -> None:
        variables = {"OMP_NUM_THREADS": "1", "TMPDIR": OTHER_DISK, "PYTHONWARNINGS": "default"}
        if not os.path.isdir(OTHER_DISK):
            del variables["TMPDIR"]
        with open(place / "out", "a") as out, open(place / "err", "a") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "co2lightning", *words],
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **variables},
            )
        self.pid = self.process.pid
        self.kill = self.process.kill

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()


class Trainer:
    """Starts `fit` on a tiny run of an agent, and ends what is left of it."""

    def __init__(self, agent: str, place: Path, *, shell: bool = False) -> None:
        self.agent = agent
        self.place = place
        self.shell = shell
        self.started: list[BaseProcess | Command] = []

    @property
    def run(self) -> TrainingCheckpoint:
        return TrainingCheckpoint(self.place / "checkpoints" / self.agent)

    @property
    def directory(self) -> str:
        return str(self.run.directory)

    def start(
        self, *words: str, hang: bool = False, ignored: Sequence[int] = ()
    ) -> BaseProcess | Command:
        tiny = ["fit", "--model", self.agent, "--env.num_envs", "4", *TINY[self.agent], *words]
        process = (
            Command(self.place, tiny)
            if self.shell
            else fork(child, str(self.place), tiny, hang, list(ignored))
        )
        self.started.append(process)
        return process

    def wait_for(self, process: BaseProcess | Command, name: str) -> None:
        end = time.monotonic() + PATIENCE
        while not (self.place / name).exists() and process.is_alive():
            assert time.monotonic() < end
            time.sleep(0.005)

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.join()

    def read(self, name: str) -> str:
        return (self.place / name).read_text() if (self.place / name).exists() else ""

    def errors(self) -> str:
        return self.read("err")

    def said(self) -> int:
        """Return the newest episode that the command spoke of as saved."""
        lines = re.findall(r"^Episode +(\d+)/|\((\d+) episodes? done\)", self.read("out"), re.M)
        return max((int(number) for line in lines for number in line if number), default=0)


@pytest.fixture
def trainer(place: Path, request: pytest.FixtureRequest) -> Iterator[Trainer]:
    made = Trainer(getattr(request, "param", "PPO"), place)
    yield made
    made.end()


def ended(process: BaseProcess | Command) -> int | None:
    process.join(PATIENCE)
    return process.exitcode


def kill_and_restart(
    trainer: Trainer, reference: Trainer, kills: int, total: int, dice: random.Random
) -> int:
    """Kill a restart loop until it is done or was killed often enough; returns the kills."""
    done = 0
    run = trainer.run
    startup_s = 6.0 if trainer.shell else 0.6
    while True:
        process = trainer.start("--ckpt_path", "last", "--total_episodes", str(total))
        if done < kills:
            if dice.random() < 0.7:  # wait for news first: most kills shall hit the training
                news = run.path(run.get_next_episode()).relative_to(trainer.place)
                trainer.wait_for(process, str(news))
                process.join(dice.uniform(0.0, 0.2))
            else:
                process.join(dice.uniform(0.0, startup_s))
            if process.is_alive():
                process.kill()
        code = ended(process)
        assert code in (0, -signal.SIGKILL), trainer.errors()
        if code == 0:
            break
        done += 1
        if run.directory.exists():
            assert run.verify() == [], "what a kill leaves is not damage"
            # What was reported saved is saved; the kill may have come before the report.
            assert run.get_next_episode() - 1 in (trainer.said(), trainer.said() + 1)
    assert trainer.errors() == ""
    assert not re.search("damaged|missing|lost", trainer.read("out"))
    assert state(trainer.directory, total) == state(reference.directory, total)
    check_history(trainer.directory, total)
    statuses = [session["status"] for session in run.load_history()["trainings"]]
    assert statuses[:-1] == ["killed"] * (len(statuses) - 1)
    assert statuses[-1] in ("completed", "killed")  # killed after its last episode was saved
    assert not list(trainer.place.rglob("*.tmp"))
    assert curves(trainer.agent, trainer.place) == curves(reference.agent, reference.place)
    return done


def kill_often(
    trainer: Trainer, reference: Trainer, kills: int, total: int, dice: random.Random
) -> None:
    """Kill one run after the other, each until it is done, `kills` times in all."""
    done, place = 0, trainer.place
    for attempt in itertools.count():  # one may be done before any kill
        trainer.place = place / str(attempt)
        trainer.place.mkdir()
        done += kill_and_restart(trainer, reference, kills - done, total, dice)
        if done >= kills:
            break


def reference_run(agent: str, place: Path, total: int) -> Trainer:
    place.mkdir(exist_ok=True)
    reference = Trainer(agent, place)
    assert ended(reference.start("--episodes", str(total))) == 0, reference.errors()
    return reference


@pytest.mark.parametrize("trainer", QUICK, indirect=True)
def test_a_restart_loop_under_kills(
    trainer: Trainer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reference = reference_run(trainer.agent, tmp_path_factory.mktemp("reference"), 6)
    kill_and_restart(trainer, reference, 3, 6, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", shipped(), indirect=True)
def test_a_hundred_kills(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> None:
    reference = reference_run(trainer.agent, tmp_path_factory.mktemp("reference"), 30)
    kill_often(trainer, reference, 100, 30, random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["SAC"], indirect=True)
def test_ten_kills_from_the_shell(
    trainer: Trainer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each start is a new process; of all agents SAC has most on its disk."""
    reference = reference_run(trainer.agent, tmp_path_factory.mktemp("reference"), 30)
    trainer.shell = True
    kill_often(trainer, reference, 10, 30, random.Random(2))


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
    run = trainer.run
    last = run.get_next_episode() - 1
    assert last >= 2
    (session,) = run.load_history()["trainings"]
    assert (session["end_episode"], session["status"]) == (last, "interrupted")
    check_history(trainer.directory, last)
    out = (trainer.place / "out").read_text()
    stopped = f"Stopped by {signal.Signals(signum).name}; --ckpt_path last continues\n"
    assert out.endswith(stopped)
    assert out.count(ACKNOWLEDGED) == 1
    assert trainer.errors() == ""


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_second_signal_ends_at_once(trainer: Trainer, signum: int) -> None:
    process = trainer.start("--episodes", "3", hang=True)
    trainer.wait_for(process, "hanging")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.3)
    assert process.is_alive(), "the first signal waits for the segment's end"
    assert trainer.read("out").endswith(ACKNOWLEDGED), "but it is acknowledged at once"
    os.kill(process.pid, signum)
    assert ended(process) == 128 + signum
    (session,) = trainer.run.load_history()["trainings"]
    assert session["episodes_count"] == 0


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_it_was_started_to_ignore(trainer: Trainer, signum: signal.Signals) -> None:
    process = trainer.start("--episodes", "5", ignored=[signum])
    assert process.pid is not None
    trainer.wait_for(process, "err")  # then it ignores them
    while process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signum)
        process.join(0.05)
    assert process.exitcode == 0
    check_history(trainer.directory, 5)
    assert "Stop" not in trainer.read("out")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("words", [("fit", "--model", "PPO"), ("report",)], ids=" ".join)
def test_a_signal_while_it_imports_ends_it_at_once(
    place: Path, words: tuple[str, ...], signum: signal.Signals
) -> None:
    """By the system's own action, which a shell shows as 128 and the signal's number."""
    (place / "checkpoints" / "PPO").mkdir(parents=True)
    (place / "checkpoints" / "PPO" / "episode_0001.pt").touch()
    command = Command(place, list(words))
    while "libtorch" not in Path(f"/proc/{command.pid}/maps").read_text():
        assert command.is_alive()
        time.sleep(0.01)
    os.kill(command.pid, signum)
    assert ended(command) == -signum
    assert (place / "err").read_text() == ""
    assert {path.name for path in place.iterdir()} == {"checkpoints", "out", "err"}


@pytest.mark.parametrize("stream", ["full", "reader", "terminal"])
def test_training_outlives_whatever_its_lines_go_to(trainer: Trainer, stream: str) -> None:
    out = trainer.place / "out"
    if stream == "full":
        out.symlink_to("/dev/full")
    elif stream == "reader":
        os.mkfifo(out)
        reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    else:
        reader, terminal = os.openpty()
        out.symlink_to(os.ttyname(terminal))
    process = trainer.start("--episodes", "4", ignored=[signal.SIGHUP])
    if stream != "full":
        trainer.wait_for(process, "checkpoints/PPO/episode_0001.pt")
        os.close(reader)
    if stream == "terminal":
        os.close(terminal)
    assert ended(process) == 0, trainer.errors()
    check_history(trainer.directory, 4)
    full = "standard output: No space left on device; goes on, its further lines are lost\n"
    assert trainer.errors() == (full if stream == "full" else "")


@pytest.mark.slow
@pytest.mark.parametrize(("shell", "count"), [(False, 50), (True, 9)], ids=["forked", "shell"])
def test_many_signals(trainer: Trainer, shell: bool, count: int) -> None:
    dice = random.Random(3)
    trainer.shell = shell
    run = trainer.run
    for number in range(count):
        signum = SIGNALS[number % 3]
        before = len(run.load_history()["trainings"]) if run.directory.exists() else 0
        if dice.random() < 0.5:
            news = str(run.path(run.get_next_episode()).relative_to(trainer.place))
            code = interrupt(trainer, signum, news, dice.uniform(0.0, 0.3))
        else:
            (trainer.place / "out").unlink(missing_ok=True)
            code = interrupt(trainer, signum, "out", dice.uniform(0.0, 10.0 if shell else 1.0))
        # Before training it dies of the signal itself, which a shell shows alike.
        assert code in (128 + signum, -signum), trainer.errors()
        if not run.directory.exists():
            continue
        sessions = run.load_history()["trainings"]
        assert len(sessions) - before in (0, 1)
        assert {session["status"] for session in sessions} <= {"interrupted"}
        check_history(trainer.directory, run.get_next_episode() - 1)
    assert run.get_next_episode() > count / 3
    assert "Traceback" not in trainer.errors() if shell else trainer.errors() == ""
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
