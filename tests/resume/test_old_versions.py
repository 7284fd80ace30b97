"""Runs that older versions of the project wrote verify, load and go on; tests/golden/make.py."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_exact import check_history

import co2lightning
from co2lightning.runs.run import TrainingCheckpoint
from conftest import Outcome, tree

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = sorted(path.parent for path in GOLDEN.glob("*/*/history.json"))


@pytest.fixture
def run(golden: Path, place: Path) -> TrainingCheckpoint:
    """Copy a run to where its owner would have it."""
    return TrainingCheckpoint(shutil.copytree(golden, place / "checkpoints" / golden.name))


def test_there_is_a_run_of_each_agent() -> None:
    assert {path.name for path in RUNS} == {"A2C", "SAC", "PPO"}


@pytest.mark.parametrize("golden", RUNS, ids=lambda p: f"{p.parent.name} {p.name}")
def test_it_verifies_and_predicts_as_it_did(golden: Path, run: TrainingCheckpoint) -> None:
    check_history(str(run.directory), 2)
    assert run.load_metadata()["agent"] == golden.name
    learner = getattr(co2lightning, golden.name).load_from_checkpoint(run.path(2))
    size = 3 * learner.observation_dim
    obs = np.linspace(-1.0, 1.0, size, dtype=np.float32).reshape(3, -1)
    expected = json.loads((golden.parent / "actions.json").read_text())[golden.name]
    assert np.ptp(expected) > 0.01, "the actions tell one policy from another"
    assert learner.predict(obs)[0] == pytest.approx(np.array(expected), rel=1e-3, abs=1e-5)
    assert tree(run.directory) == tree(golden), "looking changes nothing"


@pytest.mark.parametrize("golden", RUNS, ids=lambda p: f"{p.parent.name} {p.name}")
@pytest.mark.parametrize("lost", [(), ("history.json", "metadata.json")], ids=["whole", "rebuilt"])
def test_it_goes_on(
    golden: Path, run: TrainingCheckpoint, lost: tuple[str, ...], command: Callable[..., Outcome]
) -> None:
    for name in lost:
        (run.directory / name).unlink()
    config = torch.load(run.path(2), weights_only=True)["run"]["config"]
    words = ("--model", golden.name, "--ckpt_path", "last", "--episodes", "2")
    outcome = command("fit", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"Resuming {golden.name} at episode 3 (2 episodes done)" in outcome.out
    check_history(str(run.directory), 4)
    # It is the same run that goes on: settings, optimizer and replay are taken up.
    assert config.items() <= run.load_metadata()["configuration"].items()
    assert len(run.load_metadata()["trained_days"]["iquitos"]) == 61
    before, after = (run.read(run.path(episode)) for episode in (2, 3))
    assert math.isfinite(after["metrics"]["co2_kg"])
    for content in (before, after):
        states = content["optimizer_states"][0]["state"].values()
        assert {int(state["step"]) for state in states} == {content["counters"]["updates"]}
    assert after["counters"]["updates"] > before["counters"]["updates"] > 0
    if golden.name == "SAC":
        pieces = dict(run.load_replay([1, 2, 3]))
        assert pieces[3]["began"] == len(pieces[1]["rows"]) + len(pieces[2]["rows"])
