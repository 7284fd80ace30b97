"""The sweep of examples/: trials whose processes are killed are taken up where they stood."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from test_exact import check_history, state

from co2lightning.runs.run import TrainingCheckpoint
from conftest import Outcome

SCRIPT = Path(__file__).parents[2] / "examples" / "sweep.py"
HEARTBEAT_S, EPISODES, PATIENCE = 1, 200, 600.0
RECIPE = {
    "agent": "PPO",
    "env": {"site": "iquitos"},
    "model": {"hidden": [8], "n_epochs": 2, "batch_size": 192},
}


def start(place: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    words = ["--config", "tiny.yaml", "--trials", "2", "--episodes", str(EPISODES)]
    words += ["--num_envs", "4", "--heartbeat_s", str(HEARTBEAT_S)]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_two_killed_trials_go_on(
    place: Path, environment: dict[str, str], command: Callable[..., Outcome]
) -> None:
    (place / "tiny.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    runs = [TrainingCheckpoint(f"checkpoints/sweep-{number:04d}") for number in (0, 1)]
    deadline = time.monotonic() + PATIENCE
    optuna.create_study(study_name="sweep", storage="sqlite:///sweep.db")
    workers = [start(place, environment) for _ in runs]
    while not all(run.episodes() for run in runs):
        assert time.monotonic() < deadline
        for worker in workers:
            assert worker.poll() is None, worker.communicate()[0]
        time.sleep(0.01)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
    assert all(0 < len(run.episodes()) < EPISODES for run in runs)

    time.sleep(4 * HEARTBEAT_S)  # dead after three
    said = (last := start(place, environment)).communicate(timeout=PATIENCE)[0]
    assert last.returncode == 0, said
    assert said.count("Resuming PPO") == 2
    assert "best: sweep-000" in said
    for run in runs:
        check_history(str(run.directory), EPISODES)
        sessions = run.load_history()["trainings"]
        assert [session["status"] for session in sessions] == ["killed", "completed"]
        tried = run.load_metadata()["configuration"]
        words = [
            word
            for key in ("model.learning_rate", "model.ent_coef")
            for word in (f"--{key}", repr(tried[key]))
        ]
        words += ["--config", "tiny.yaml", "--env.num_envs", "4", "--name", "straight"]
        assert command("fit", *words, "--episodes", str(EPISODES)).code == 0
        assert state(str(run.directory), EPISODES) == state("checkpoints/straight", EPISODES)
