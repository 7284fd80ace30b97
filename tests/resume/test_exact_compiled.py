"""A compiled run that is cut is the straight one, bit for bit; each session is a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_exact import curves, state

from co2lightning.agents import AGENTS
from conftest import TINY, Outcome

N = 3


def session(agent: str, environment: dict[str, str], cache: Path, *words: str) -> str:
    """Run `fit`, compiled, in a process of its own; return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "co2lightning", "fit", "--model", agent, "--env.num_envs", "5"]
        + [*TINY[agent], *words],
        env={**environment, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Compiling the update" in done.stdout
    assert "cannot be compiled" not in done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("agent", "caches"), [("PPO", "own"), ("A2C", "one"), ("SAC", "one")])
def test_a_cut_compiled_run_is_the_straight_one(
    agent: str,
    caches: str,
    place: Path,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """TINY on five sites leaves PPO a smaller last minibatch, which no graph takes."""
    common = tmp_path_factory.getbasetemp() / "compiled"
    first, second, third = (
        common if caches == "one" else place / f"cache{number}" for number in range(3)
    )
    fresh = ("--model.compile", "true")
    session(agent, environment, first, *fresh, "--name", "straight", "--episodes", str(N))
    session(agent, environment, second, *fresh, "--episodes", "1")
    rest = session(agent, environment, third, "--ckpt_path", "last", "--episodes", str(N - 1))
    assert "Resuming" in rest
    assert state(f"checkpoints/{agent}", N) == state("checkpoints/straight", N)


@pytest.mark.slow
@pytest.mark.parametrize("agent", [name for name in AGENTS if name != "APG"])
def test_every_cut_of_a_compiled_run(
    fit: Callable[..., Outcome], agent: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process: what differs between processes is the other test's subject."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place / "cache"))
    episodes = 10
    fresh = ("--model.compile", "true")

    def session(name: str, count: int, *words: str) -> None:
        outcome = fit(agent, "--name", name, "--episodes", str(count), *words)
        assert "cannot be compiled" not in outcome.out

    session("straight", episodes, *fresh)
    wanted = state("checkpoints/straight", episodes), curves("straight")
    splits = [[cut, episodes - cut] for cut in range(1, episodes)] + [[1] * episodes]
    for split in splits:
        name = "-".join(map(str, split))
        for number, count in enumerate(split):
            session(name, count, *(("--ckpt_path", "last") if number else fresh))
        assert (state(f"checkpoints/{name}", episodes), curves(name)) == wanted, split
