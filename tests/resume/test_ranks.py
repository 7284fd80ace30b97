"""Two processes that train one agent: equal weights, days of their own, one writer, exact resume.

The quick tests fork the ranks from a warm process, as torchrun would start them; the slow ones
start them in every way a user can.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from processes import fork
from test_exact import check_history, curves, digest, state

from co2lightning.agents import AGENTS
from co2lightning.agents.a2c import A2C
from co2lightning.learn.dataset import RolloutDataset
from co2lightning.learn.descent import Descent
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.days import make_environment
from co2lightning.train.signals import Interrupted, Signals
from conftest import TINY, Outcome, tree

PATIENCE = 240.0
TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
KEEP = ["--trainer.callbacks", '[{"class_path": "keep_rank.KeepRank"}]']


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def words_of(agent: str, *words: str) -> list[str]:
    return ["fit", "--model", agent, "--env.num_envs", "4", *TINY[agent], *TWO, *KEEP, *words]


def rank(place: str, number: int, port: int, words: list[str]) -> None:
    """Be one of two processes that something else has started."""
    os.chdir(place)
    os.environ |= {"LOCAL_RANK": str(number), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from co2lightning.cli import main

    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os._exit(main(words))


def run(places: Sequence[Path], words: list[str]) -> tuple[list[int | None], str]:
    """Run the command on two forked ranks; return their exit codes and what they said."""
    port = free_port()
    for place in places:
        (place / "out").unlink(missing_ok=True)
    ranks = [fork(rank, str(place), n, port, words) for n, place in enumerate(places)]
    for process in ranks:
        process.join(PATIENCE)
        process.kill()
    said = [(place / name).read_text() for place in {*places} for name in ("err", "out")]
    return [process.exitcode for process in ranks], "".join(said)


def train(place: Path, agent: str, *words: str) -> str:
    """Run `fit` on two forked ranks, which must succeed; return what they said."""
    codes, said = run([place, place], words_of(agent, *words))
    assert codes == [0, 0], said
    return said


def kept(place: Path, name: str, number: int) -> dict[str, Any]:
    return torch.load(place / f"{name}-rank{number}.pt", weights_only=True)


@pytest.mark.parametrize(
    "agent", [pytest.param(n, marks=[] if n == "SAC" else pytest.mark.slow) for n in AGENTS]
)
def test_ranks_stay_equal_and_a_cut_run_is_the_straight_one(agent: str, place: Path) -> None:
    evaluated = "--evaluate_every", "3"
    said = train(place, agent, "--episodes", "3", *evaluated, "--name", "straight")
    assert f"Training {agent} for 3 episodes (seed 0) on 2 processes" in said
    assert said.count("Episode ") == 3
    train(place, agent, "--episodes", "1", *evaluated, "--name", "cut")
    said = train(place, agent, "--ckpt_path", "last", "--episodes", "2", "--name", "cut")
    assert f"Resuming {agent} at episode 2 (1 episode done) on 2 processes" in said

    for name in ("straight", "cut"):
        ranks = [kept(place, name, number) for number in (0, 1)]
        assert all("eval/objective_vs_uncontrolled" in rank["metrics"] for rank in ranks)
        for part in ("weights", "optimizer", "metrics"):
            assert digest(ranks[0][part]) == digest(ranks[1][part]), part
        if agent == "SAC":  # their days are their own
            assert digest(ranks[0]["replay"]) != digest(ranks[1]["replay"])
        check_history(f"checkpoints/{name}", 3)
    for number in (0, 1):
        assert digest(kept(place, "straight", number)) == digest(kept(place, "cut", number))
    assert state("checkpoints/cut", 3) == state("checkpoints/straight", 3)
    assert curves("cut") == curves("straight")


def test_a_step_follows_the_mean_of_the_gradients(
    place: Path, command: Callable[..., Outcome]
) -> None:
    """The same step, taken in this process for both ranks; then another number is refused."""
    train(place, "A2C", "--model.n_steps", "0", "--model.start", "even", "--episodes", "1")
    content = TrainingCheckpoint.read("checkpoints/A2C/episode_0001.pt")

    class Second(A2C):
        global_rank = 1

    env = make_environment(num_envs=4, action="moves")
    gradients: list[list[torch.Tensor]] = []
    reward: list[float] = []
    for kind in (Second, A2C):
        agent = kind(**content["hyper_parameters"])
        agent.train_on(env)
        (rollout,) = RolloutDataset(env, agent).play()
        loss, _ = agent.loss(rollout)
        gradients.append(list(torch.autograd.grad(loss, list(agent.parameters()))))
        reward.append(float(rollout.reward.sum(0).mean()))
    assert content["metrics"]["reward"] == pytest.approx(sum(reward) / 2)
    assert reward[0] != reward[1]
    optimizer = agent.configure_optimizers()
    descent = Descent(agent, optimizer, max_norm=agent.settings.max_grad_norm, compiled=False)
    descent.step([(a + b) / 2 for a, b in zip(*gradients, strict=True)])
    for name, weight in agent.state_dict().items():
        torch.testing.assert_close(content["state_dict"][name], weight, rtol=1e-5, atol=1e-6)

    before = tree(place)
    outcome = command("fit", "--model", "A2C", "--ckpt_path", "last")
    assert outcome.code == 2
    assert "episode_0001.pt: trained on 2 processes, not on 1" in outcome.err
    assert "give --trainer.devices 2" in outcome.err
    assert tree(place) == before


def test_ranks_end_together_where_numbers_are_not_finite(place: Path) -> None:
    """Rank 0 says it and closes the session; the other must not end in error before."""
    words = words_of("PPO", "--episodes", "3", "--model.learning_rate", "1e30")
    codes, said = run([place, place], words)
    assert codes == [1, 0], said
    assert said.count("error: ") == said.count("without a finite gradient: 4") == 1
    trained = TrainingCheckpoint("checkpoints/PPO")
    assert trained.load_history()["trainings"][-1]["status"] == "failed"
    assert trained.verify() == []


@pytest.mark.slow
def test_compiled_ranks_do_what_eager_ones_do(place: Path) -> None:
    train(place, "PPO", "--episodes", "2", "--name", "eager")
    said = train(place, "PPO", "--episodes", "2", "--name", "graph", "--model.compile", "true")
    assert said.count("Compiling the update") == 1
    assert "cannot be compiled" not in said
    graph = kept(place, "graph", 0)
    assert digest(graph["weights"]) == digest(kept(place, "graph", 1)["weights"])
    for name, weight in kept(place, "eager", 0)["weights"].items():
        torch.testing.assert_close(graph["weights"][name], weight, rtol=0.0, atol=1e-5)


def test_ranks_that_see_different_directories_are_refused(place: Path) -> None:
    train(place, "PPO", "--episodes", "1")
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    before = tree(place / "checkpoints" / "PPO")
    codes, said = run([place, elsewhere], words_of("PPO", "--ckpt_path", "last"))
    assert codes == [2, 2], said
    assert said.count("on several machines on a shared disk") == 2
    assert tree(place / "checkpoints" / "PPO") == before


def test_a_signal_while_ranks_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes between what a rank tells the others and their answer."""
    signals = Signals()
    signals.install(speaks=False)
    trainer: Any = SimpleNamespace(
        world_size=2, global_rank=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )

    agent = A2C(3, 2)

    def message(value: int, device: torch.device) -> int:
        if not signals.received:
            signal.raise_signal(signal.SIGTERM)
        return value

    monkeypatch.setattr("co2lightning.learn.ranks.highest", message)
    signals.on_train_epoch_start(trainer, agent)
    with pytest.raises(Interrupted, match="SIGTERM"):
        signals.on_train_epoch_start(trainer, agent)
    signals.restore()


SLURM = {"SLURM_JOB_ID": "77", "SLURM_NODELIST": "nowhere", "SLURM_NODEID": "0"}
SLURM |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
LEFT = {
    "a launcher by hand": {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"},
    "torchrun": {"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
    "srun": SLURM,
    "srun by node": SLURM | {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "1"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
}


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what makes this process one that a launcher has started as its second."""

    def become(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(rank_zero_only, "rank", 1)  # what Lightning reads when it is imported

    return become


@pytest.mark.parametrize("launcher", LEFT)
@pytest.mark.parametrize("words", [(), ("--trainer.strategy", "ddp")], ids=["", "ddp"])
def test_one_device_is_a_run_of_its_own(
    launcher: str, words: tuple[str, ...], second: Callable[..., None], fit: Callable[..., Outcome]
) -> None:
    """A task that shares a job, or a shell in which a launcher's variables were left."""
    second(LEFT[launcher])
    said = fit("PPO", "--episodes", "1", "--name", "packed-1", *words).out
    assert "Training PPO for 1 episode (seed 0)\n" in said
    check_history("checkpoints/packed-1", 1)
    assert curves("packed-1").keys() >= {"site/co2_kg", "train/loss"}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (LEFT["torchrun"] | {"WORLD_SIZE": "3"}, "does not match the world size (3)"),
        (LEFT["srun"], "Use `--ntasks-per-node=4` instead"),
        (LEFT["srun by node"], "Set `devices=4`"),
        (
            SLURM | {"SLURM_NTASKS_PER_NODE": "2"},
            "is for 2 processes, but the launcher has started",
        ),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is set, as by a launcher, and MASTER_PORT is not"),
        ({"LOCAL_RANK": "5", "MASTER_PORT": "1"}, "make this number 5; unset them"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_two_devices_that_a_launcher_does_not_know_of(
    variables: dict[str, str],
    says: str,
    second: Callable[..., None],
    command: Callable[..., Outcome],
) -> None:
    second(variables)
    outcome = command("fit", "--model", "PPO", *TWO)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "--trainer.devices 2" in outcome.err
    assert says in outcome.err
    assert not tree(Path())


class Launched:
    """Two ranks that the command, torchrun or a cluster's scheduler has started."""

    def __init__(self, place: Path, how: str, environment: dict[str, str], *words: str) -> None:
        path = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
        python = [sys.executable, "-m"]
        start = [[*python, "co2lightning"]]
        variables = [{}]
        if how == "torchrun":
            port = str(free_port())
            run = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "-m"]
            start = [[*python, *run, "co2lightning"]]
        if how == "SLURM":
            job = {"SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
            job |= {"SLURM_JOB_NAME": "a", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"}
            job |= {"SLURM_NTASKS_PER_NODE": "2"}
            start *= 2
            variables = [{**job, "SLURM_PROCID": n, "SLURM_LOCALID": n} for n in "01"]
        self.place = place
        with open(place / "out", "a") as out, open(place / "err", "a") as err:
            self.processes = [
                subprocess.Popen(
                    [*command, *words],
                    cwd=place,
                    env={**environment, **extra, "PYTHONPATH": path},
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
                for command, extra in zip(start, variables, strict=True)
            ]

    def said(self) -> str:
        return (self.place / "out").read_text() + (self.place / "err").read_text()

    def wait(self) -> list[int]:
        codes = [process.wait(PATIENCE) for process in self.processes]
        # Ranks that have ended in an error may outlive the first by a moment, not for long.
        deadline = time.monotonic() + PATIENCE
        while any(self._alive(process.pid) for process in self.processes):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        return codes

    def _alive(self, session: int) -> bool:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return False
        return True

    def second(self) -> int:
        """Return the process that the command has started."""
        (process,) = self.processes
        children = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (found,) = [line.split()[0] for line in children.splitlines() if " fit " in line]
        return int(found)

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
@pytest.mark.parametrize("how", ["the command", "torchrun", "SLURM"])
def test_every_way_to_start_them(how: str, place: Path, environment: dict[str, str]) -> None:
    train(place, "PPO", "--episodes", "2", "--name", "expected")
    words = words_of("PPO", "--name", "started")
    for more in ([], ["--ckpt_path", "last"]):
        with Launched(place, how, environment, *words, "--episodes", "1", *more) as ranks:
            assert set(ranks.wait()) == {0}, ranks.said()
    assert ranks.said().count("Training PPO for 1 episode") == 1
    assert ranks.said().count("Resuming PPO at episode 2") == 1
    assert state("checkpoints/started", 2) == state("checkpoints/expected", 2)
    assert digest(kept(place, "started", 1)) == digest(kept(place, "expected", 1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGTERM, "interrupted"), (signal.SIGINT, "interrupted"), (signal.SIGKILL, "killed")],
)
def test_a_signal_to_one_ends_all(
    victim: int, signum: signal.Signals, status: str, place: Path, environment: dict[str, str]
) -> None:
    words = words_of("PPO", "--figures_every", "0")
    deadline = time.monotonic() + PATIENCE
    with Launched(place, "the command", environment, *words, "--episodes", "10000") as ranks:
        while "Episode    2/" not in ranks.said():
            assert time.monotonic() < deadline, ranks.said()
            time.sleep(0.02)
        os.kill(ranks.second() if victim else ranks.processes[0].pid, signum)
        (code,) = ranks.wait()
    if signum == signal.SIGKILL:
        assert code == (1 if victim else -signum), ranks.said()
        assert "another process of this run ended" in ranks.said()
        status = "failed" if victim else "killed"
    else:
        assert code == 128 + signum, ranks.said()
        assert ranks.said().count("Stopped by") == 1
    assert "Traceback" not in ranks.said()

    before = TrainingCheckpoint("checkpoints/PPO").get_next_episode() - 1
    assert before >= 2
    train(place, "PPO", "--ckpt_path", "last", "--episodes", "1")
    trainings = TrainingCheckpoint("checkpoints/PPO").load_history()["trainings"]
    assert [session["status"] for session in trainings] == [status, "completed"]
    check_history("checkpoints/PPO", before + 1)
