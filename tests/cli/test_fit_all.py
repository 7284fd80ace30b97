"""fit-all: real processes, the tables, one failing agent, bad input, a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from co2lightning.cli import main
from small_site import write_site

TINY = ["--env.num_envs", "2", "--model.hidden", "[8]"]


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "co2lightning", "fit-all", *arguments, *TINY],
        cwd=place,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
        timeout=300,
    )


def history(place: Path, agent: str) -> dict[str, object]:
    return json.loads((place / f"checkpoints/{agent}/history.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_histories_add_up_and_the_tables_tell(tmp_path: Path) -> None:
    first = run(tmp_path, "--episodes", "2", "--agents", "A2C,PPO")
    assert first.returncode == 0, first.stderr
    second = run(tmp_path, "--episodes", "2", "--ckpt_path", "last", "--agents", "A2C,PPO")
    assert second.returncode == 0, second.stderr
    for agent in ("A2C", "PPO"):
        assert len(list((tmp_path / "checkpoints" / agent).glob("episode_*.pt"))) == 4
        assert history(tmp_path, agent)["total_episodes"] == 4
        assert f"{agent}  Resuming {agent} at episode 3 (2 episodes done)" in second.stdout
    assert "mean CO2 of a session's episodes, kg" in second.stdout
    assert "unmet" in second.stdout


def test_a_failing_agent_is_named_and_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "A2C").write_text("in the way", encoding="utf-8")
    write_site(tmp_path / "village")
    result = run(tmp_path, "--episodes", "1", "--agents", "A2C,PPO", "--env.site", "village")
    assert result.returncode == 1
    assert result.stderr == "error: failed: A2C (exit code 2); the others are done\n"
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("A2C ")]
    assert line.startswith("A2C  error: ")
    assert "checkpoints/A2C is not a directory" in line
    assert history(tmp_path, "PPO")["total_episodes"] == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--agents", "A2C,DQN"], "--agents DQN: no such agent; choose from A2C,SAC,PPO"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--config", "ppo.yaml"], "--config: fit-all trains each agent by its own recipe"),
        (["--print_config"], "--print_config: fit-all trains each agent by its own recipe"),
        (["--name", "x"], "--name: fit-all trains each agent by its own recipe"),
        (["--ckpt_path", "x.pt"], "--ckpt_path x.pt: fit-all takes last only"),
        (["--ckpt_path=x.pt"], "--ckpt_path x.pt: fit-all takes last only"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit-all", *arguments]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of another process are POSIX")
def test_the_agents_outlive_the_terminal(tmp_path: Path) -> None:
    """As under nohup: SIGHUP was ignored from the start, and nobody reads the lines any more."""
    process = subprocess.Popen(
        ["bash", "-c", "trap '' HUP; exec \"$@\"", "-", sys.executable, "-m", "co2lightning"]
        + ["fit-all", "--agents", "A2C,PPO", "--jobs", "2", "--episodes", "20", *TINY],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if "Episode" in line:
            break
    process.stdout.close()
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=240) == 0
    assert process.communicate()[1] == ""
    for agent in ("A2C", "PPO"):
        assert history(tmp_path, agent)["total_episodes"] == 20


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of another process are POSIX")
def test_a_signal_reaches_the_agents(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "co2lightning", "fit-all", "--episodes", "500", *TINY],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Episode" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 143
    assert "Stopped; fit-all --ckpt_path last continues" in rest
    for agent in ("A2C", "SAC", "PPO"):
        directory = tmp_path / "checkpoints" / agent
        if directory.exists():
            sessions = history(tmp_path, agent)["trainings"]
            assert isinstance(sessions, list)
            assert sessions[-1]["status"] == "interrupted"
