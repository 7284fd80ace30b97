"""Any split of a run is the unsplit run, bit for bit: weights, optimizer, metrics, curves."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from co2lightning.agents import AGENTS
from co2lightning.cli import main
from co2lightning.errors import UserError
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.settings.recipe import read_recipe
from co2lightning.train.curves import Curves
from conftest import Outcome, pruned

Fit = Callable[..., Outcome]
N = 10


def shipped() -> list[str]:
    """Return the agents that have a recipe."""
    names: list[str] = []
    for name in AGENTS:
        try:
            read_recipe(f"{name.lower()}.yaml")
        except UserError:
            continue
        names.append(name)
    return names


# A2C adds little to what the other two show here.
# SAC has what the others have, and a replay buffer.
QUICK = [n if n == "SAC" else pytest.param(n, marks=pytest.mark.slow) for n in shipped()]


def digest(value: Any) -> str:
    """Return the SHA-256 of tensors and plain data."""
    state = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            state.update(f"{part.dtype}{tuple(part.shape)}".encode())
            state.update(part.contiguous().numpy().tobytes())
        elif isinstance(part, dict):
            for key in part:
                state.update(repr(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            state.update(str(len(part)).encode())
            for entry in part:
                add(entry)
        else:
            state.update(repr(part).encode())

    add(value)
    return state.hexdigest()


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k not in ("time_seconds", "env_steps_per_second")}


def state(directory: str, last: int = N, episodes: Sequence[int] | None = None) -> dict[str, Any]:
    """Return all that must be equal of every episode up to `last`, or of `episodes`."""
    run = TrainingCheckpoint(directory)
    found: dict[str, Any] = {}
    for episode in range(1, last + 1) if episodes is None else episodes:
        content = run.read(run.path(episode))
        for key in ("state_dict", "optimizer_states", "counters", "global_step", "epoch"):
            found[f"{key} {episode}"] = digest(content[key])
        found[f"metrics {episode}"] = timeless(content["metrics"])
        if run.replay_path(episode).exists():
            found[f"replay {episode}"] = digest(list(run.load_replay([episode])))
    return found


def curves(run: str, place: Path | None = None) -> dict[str, dict[int, float]]:
    """Read the curves as TensorBoard does, times aside; no step may stand twice."""
    logs = (place or Path()) / "lightning_logs"
    reader = EventAccumulator(str(logs / run), size_guidance={"scalars": 0})
    reader.Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in reader.Tags()["scalars"]:
        steps = [event.step for event in reader.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
        found[tag] = {event.step: event.value for event in reader.Scalars(tag)}
    return {tag: values for tag, values in found.items() if not tag.startswith("time/")}


def check_history(directory: str, last: int) -> None:
    run = TrainingCheckpoint(directory)
    assert run.verify() == run.leftovers() == []
    history = json.loads((Path(directory) / "history.json").read_text())
    assert sum(s["episodes_count"] for s in history["trainings"]) == last
    assert history["total_episodes"] == last == len(history["checkpoints"])
    assert run.get_next_episode() == last + 1


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return an uninterrupted run of N episodes, trained once per agent."""
    from co2lightning.settings.parser import parse_flags
    from co2lightning.train.fit import run_fit
    from conftest import TINY

    made: dict[str, Path] = {}

    def make(agent: str) -> Path:
        if agent not in made:
            place = tmp_path_factory.mktemp(agent)
            words = ["--env.num_envs", "4", *TINY[agent], "--episodes", str(N)]
            words += [
                f"--checkpoints.dir={place}/checkpoints",
                f"--logs.dir={place}/lightning_logs",
            ]
            run_fit(parse_flags(words, agent), agent=agent, echo=lambda line: None)
            made[agent] = place
        return made[agent]

    return make


@pytest.fixture
def expected(
    agent: str, straight: Callable[[str], Path], place: Path
) -> tuple[dict[str, Any], dict[str, dict[int, float]]]:
    """Return the state and the curves of the uninterrupted run."""
    source = straight(agent)
    shutil.copytree(source / "lightning_logs" / agent, "lightning_logs/straight")
    return state(str(source / "checkpoints" / agent)), curves("straight")


def check_split(
    fit: Fit, agent: str, expected: tuple[dict[str, Any], Any], sessions: list[int]
) -> None:
    for episodes in sessions:
        fit(agent, "--episodes", str(episodes), "--ckpt_path", "last")
    assert state(f"checkpoints/{agent}") == expected[0]
    assert curves(agent) == expected[1]
    check_history(f"checkpoints/{agent}", N)


@pytest.mark.parametrize("agent", shipped())
def test_five_and_five(fit: Fit, agent: str, expected: tuple[Any, Any]) -> None:
    check_split(fit, agent, expected, [5, 5])


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["PPO", "SAC"])
def test_a_session_for_each_episode(fit: Fit, agent: str, expected: tuple[Any, Any]) -> None:
    check_split(fit, agent, expected, [1] * N)


@pytest.mark.slow
@pytest.mark.parametrize("agent", shipped())
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 6, 7, 8, 9])
def test_the_other_cuts(fit: Fit, agent: str, expected: tuple[Any, Any], cut: int) -> None:
    fit(agent, "--episodes", str(cut))
    fit(agent, "--total_episodes", str(N), "--ckpt_path", "last")
    assert state(f"checkpoints/{agent}") == expected[0]
    assert curves(agent) == expected[1]
    check_history(f"checkpoints/{agent}", N)


@pytest.mark.parametrize("agent", QUICK)
def test_a_branch_and_its_archive(
    fit: Fit, agent: str, straight: Callable[[str], Path], expected: tuple[Any, Any]
) -> None:
    shutil.copytree(straight(agent), ".", dirs_exist_ok=True)
    branch = ("--ckpt_path", f"checkpoints/{agent}/episode_0006.pt")
    fit(agent, "--total_episodes", str(N), *branch)
    assert state(f"checkpoints/{agent}") == expected[0]
    assert curves(agent) == expected[1]
    check_history(f"checkpoints/{agent}", N)
    (archived,) = Path("checkpoints/archive").iterdir()
    assert state(str(archived)) == expected[0]
    assert curves(f"archive/{archived.name}") == expected[1]
    fit(agent, "--total_episodes", str(N), "--ckpt_path", str(archived / "episode_0008.pt"))
    assert state(f"checkpoints/{agent}") == expected[0]
    assert curves(agent) == expected[1]
    check_history(f"checkpoints/{agent}", N)


@pytest.mark.parametrize("agent", QUICK)
def test_a_damaged_newest_file_costs_its_episode_only(
    fit: Fit, agent: str, straight: Callable[[str], Path], expected: tuple[Any, Any]
) -> None:
    shutil.copytree(straight(agent), ".", dirs_exist_ok=True)
    file = Path(f"checkpoints/{agent}/episode_{N:04d}.pt")
    file.write_bytes(file.read_bytes()[:-1000])
    outcome = fit(agent, "--total_episodes", str(N), "--ckpt_path", "last")
    assert f"{file.name} is damaged" in outcome.out
    assert f"1 episode lost, continuing after episode {N - 1}" in outcome.out
    assert state(f"checkpoints/{agent}") == expected[0]
    assert curves(agent) == expected[1]


@pytest.mark.parametrize("agent", QUICK)
def test_keep_last_changes_nothing_but_the_files_kept(
    fit: Fit, agent: str, expected: tuple[dict[str, Any], Any]
) -> None:
    for episodes in ("4", "5", "1"):
        fit(agent, "--episodes", episodes, "--ckpt_path", "last", "--checkpoints.keep_last", "2")
    run = TrainingCheckpoint(f"checkpoints/{agent}")
    best = run.load_metadata()["best_episode"]["episode"]
    assert run.episodes() == sorted({best, N - 1, N})
    assert pruned(run) == [n for n in range(1, N + 1) if n not in run.episodes()]
    kept = state(f"checkpoints/{agent}", episodes=run.episodes())
    assert kept.items() <= expected[0].items()
    assert curves(agent) == expected[1]
    check_history(f"checkpoints/{agent}", N)
    # A buffer of 1,000 is full after three episodes of 384.
    assert len(list(run.directory.glob("replay/*.pt"))) == (3 if agent == "SAC" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["SAC"])
def test_deleted_files_change_nothing_but_themselves(
    fit: Fit, agent: str, expected: tuple[dict[str, Any], Any]
) -> None:
    """Their figures are in the history, their transitions in the replay."""
    fit(agent, "--episodes", "5")
    run = TrainingCheckpoint(f"checkpoints/{agent}")
    for episode in range(1, 5):
        run.path(episode).unlink()
    fit(agent, "--total_episodes", str(N), "--ckpt_path", "last")
    assert state(f"checkpoints/{agent}", episodes=run.episodes()).items() <= expected[0].items()
    assert curves(agent) == expected[1]
    assert [e["episode"] for s in run.load_history()["trainings"] for e in s["metrics"]] == list(
        range(1, N + 1)
    )
    assert len(run.verify()) == 4


def test_what_an_episode_of_sac_adds_to_the_disk_does_not_grow(
    straight: Callable[[str], Path],
) -> None:
    run = TrainingCheckpoint(straight("SAC") / "checkpoints" / "SAC")
    sizes = [
        run.path(episode).stat().st_size + run.replay_path(episode).stat().st_size
        for episode in range(2, N + 1)
    ]
    assert max(sizes) - min(sizes) < 400  # figures, where evaluated some more; not transitions


@pytest.mark.slow
def test_fit_all_resumes_exactly(place: Path) -> None:
    """All agents at once, in processes of their own, in two sessions; then each in one go."""
    tiny = ["--env.num_envs", "2", "--model.hidden", "[8]"]
    for episodes in ("2", "1"):
        words = ["fit-all", "--episodes", episodes, "--ckpt_path", "last", *tiny]
        command = [sys.executable, "-m", "co2lightning", *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert ended.returncode == 0, ended.stderr
    for agent in shipped():
        words = ["fit", "--model", agent, "--name", "straight", "--episodes", "3", *tiny]
        assert main(words) == 0
        assert state(f"checkpoints/{agent}", 3) == state("checkpoints/straight", 3)
        assert curves(agent) == curves("straight")
        check_history(f"checkpoints/{agent}", 3)


@pytest.mark.parametrize("cut", range(6))
def test_event_files_keep_their_order_wherever_the_renaming_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    now = int(time.time())
    seconds = [now - 40, now - 30, now, now, now + 100]  # the clock was set back since
    for number, second in enumerate(seconds):
        (tmp_path / f"events.out.tfevents.{second:010d}.host.{number}.{number}").touch()
    rename, done = Path.rename, 0

    def rename_or_die(path: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done > cut:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_die)
    with contextlib.suppress(KeyboardInterrupt):
        Curves(str(tmp_path.parent), tmp_path.name, done=1)
    parts = [name.split(".") for name in sorted(os.listdir(tmp_path))]
    assert [int(part[5]) for part in parts] == list(range(len(seconds)))
    if cut >= len(seconds):
        assert int(parts[-1][3]) < now
