"""Runs that older versions of the project wrote verify, load and go on; tests/golden/make.py.

Those on a site as 0.1.0 had it, whose days stand alone, and as 0.2.0 had it, whose observations
have no names, are shown and checked, no more. Those of 0.3.0, whose critics looked ahead and
whose rewards were others, act.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_exact import check_history

import co2lightning
from co2lightning.errors import UserError
from co2lightning.runs.run import TrainingCheckpoint
from conftest import TINY, Outcome, tree
from forged import seal_content, unseal

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = sorted(path.parent for path in GOLDEN.glob("*/*/history.json"))
ENDED = [path for path in RUNS if path.parent.name in ("0.1.0", "0.2.0")]
ACTING = [path for path in RUNS if path not in ENDED]
GOING_ON = [path for path in ACTING if path.parent.name != "0.3.0"]
AGENTS = {"A2C", "SAC", "PPO"}


def each(runs: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("golden", runs, ids=lambda p: f"{p.parent.name} {p.name}")


@pytest.fixture
def run(golden: Path, place: Path) -> TrainingCheckpoint:
    """Copy a run to where its owner would have it."""
    return TrainingCheckpoint(shutil.copytree(golden, place / "checkpoints" / golden.name))


def test_there_is_a_run_of_each_agent() -> None:
    assert {path.name for path in ENDED} == AGENTS
    assert {path.name for path in GOING_ON} == AGENTS
    assert {path.name for path in ACTING if path not in GOING_ON} == AGENTS


@each([path for path in ACTING if path not in GOING_ON])
def test_whose_critics_looked_ahead_acts_and_is_not_trained(
    golden: Path, run: TrainingCheckpoint, command: Callable[..., Outcome]
) -> None:
    outcome = command("fit", "--model", golden.name, "--ckpt_path", "last")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: checkpoints/{golden.name}/episode_0002.pt: trained by ")
    assert "version 0.3.0 on rewards that are others now; " in outcome.err
    outcome = command("predict", golden.name, "--day", "2025-03-01", "--output", "plan.csv")
    assert outcome.code == 0
    assert f"2025-03-01: {golden.name} after episode 2 emits" in outcome.err
    assert tree(run.directory) == tree(golden), "using it changes nothing"


@each(ACTING)
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


@each(GOING_ON)
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
    assert run.load_metadata()["trained_days"]["iquitos"]
    before, after = (run.read(run.path(episode)) for episode in (2, 3))
    assert math.isfinite(after["metrics"]["co2_kg"])
    for content in (before, after):
        states = content["optimizer_states"][0]["state"].values()
        assert {int(state["step"]) for state in states} == {content["counters"]["updates"]}
    assert after["counters"]["updates"] > before["counters"]["updates"] > 0
    if golden.name == "SAC":
        pieces = dict(run.load_replay([1, 2, 3]))
        assert pieces[3]["began"] == len(pieces[1]["rows"]) + len(pieces[2]["rows"])


WHY = {
    "0.1.0": (
        "trained by version 0.1.0 on days that stand alone",
        "now a site's time goes on from day to day",
    ),
    "0.2.0": (
        "trained by version 0.2.0 on observations without names",
        "now a site's forecast is observed by name",
    ),
}


@each(ENDED)
def test_a_run_on_a_site_as_it_was_is_shown_and_checked(
    golden: Path, run: TrainingCheckpoint, command: Callable[..., Outcome]
) -> None:
    check_history(str(run.directory), 2)
    shown = json.loads(command("history", "--json").out)["runs"]
    assert [row["name"] for row in shown] == [golden.name]
    outcome = command("history", golden.name)
    assert (outcome.code, outcome.err) == (0, "")
    outcome = command("verify", golden.name)
    assert (outcome.code, outcome.out) == (0, f"{golden.name}: ok, 2 checkpoints\n")
    assert tree(run.directory) == tree(golden), "looking changes nothing"


@each(ENDED)
def test_a_run_on_a_site_as_it_was_is_not_used(
    golden: Path, run: TrainingCheckpoint, command: Callable[..., Outcome]
) -> None:
    trained, now = WHY[golden.parent.name]
    name, file = golden.name, f"checkpoints/{golden.name}/episode_0002.pt"
    for words in (
        ("fit", "--model", name, "--ckpt_path", "last"),
        ("fit", "--ckpt_path", file),
        ("test", name),
        ("predict", name, "--day", "2025-03-01", "--output", "plan.csv"),
        ("export", name, "--output", "policy.onnx"),
    ):
        outcome = command(*words)
        assert (outcome.code, outcome.out) == (2, ""), words
        assert outcome.err == (
            f"error: {file}: {trained}; {now}; train anew: co2lightning fit --model {name}\n"
        )
    with pytest.raises(UserError, match=trained):
        getattr(co2lightning, name).load_from_checkpoint(run.path(2))
    outcome = command("report", "--output", "report.html")
    assert outcome.code == 2
    assert f"{name}: {trained}, left out" in outcome.err
    assert tree(run.directory) == tree(golden)


@pytest.mark.parametrize("version", ["0.1.0", "0.3.0"])
def test_training_anew_archives_it(
    place: Path, command: Callable[..., Outcome], version: str
) -> None:
    """As any run, but that nothing says how it could go on."""
    old = shutil.copytree(GOLDEN / version / "PPO", place / "checkpoints" / "PPO")
    files = tree(old)
    words = ("--env.num_envs", "2", *TINY["PPO"], "--episodes", "1")
    outcome = command("fit", "--model", "PPO", *words)
    assert (outcome.code, outcome.err) == (0, "")
    (moved,) = Path("checkpoints/archive").iterdir()
    assert tree(moved).items() >= files.items()
    assert f"was moved to {moved}" in outcome.out.replace("./", "")
    assert "continues it" not in outcome.out
    assert TrainingCheckpoint("checkpoints/PPO").get_next_episode() == 2


def test_the_command_to_train_anew_names_site_and_run(
    place: Path, command: Callable[..., Outcome]
) -> None:
    run = Path("checkpoints/night tariff")
    run.mkdir(parents=True)
    content, record = unseal(GOLDEN / "0.1.0" / "PPO" / "episode_0001.pt")
    content["run"]["config"]["env.site"] = "/data/my site"
    (run / "episode_0001.pt").write_bytes(seal_content(content, record))
    outcome = command("test", "night tariff")
    assert outcome.err.endswith(
        "co2lightning fit --model PPO --env.site '/data/my site' --name 'night tariff'\n"
    )


@pytest.mark.parametrize("versions", [None, {}, 3, {"co2lightning": 7}, {"co2lightning": "dev"}])
def test_a_run_on_a_site_says_by_which_version(place: Path, versions: Any) -> None:
    content, record = unseal(GOLDEN / "0.1.0" / "PPO" / "episode_0001.pt")
    content["run"]["versions"] = versions
    Path("odd.pt").write_bytes(seal_content(content, record))
    with pytest.raises(UserError, match="trained by version unknown"):
        co2lightning.PPO.load_from_checkpoint("odd.pt")


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0"])
def test_a_run_on_a_gymnasium_environment_goes_on(
    place: Path, command: Callable[..., Outcome], version: str
) -> None:
    """What older versions trained on no site is what it was."""
    words = ("--env.id", "Pendulum-v1", "--env.num_envs", "2", *TINY["PPO"], "--episodes", "1")
    assert command("fit", "--model", "PPO", *words).code == 0
    file = Path("checkpoints/PPO/episode_0001.pt")
    content, record = unseal(file)
    content["run"]["versions"]["co2lightning"] = version
    made, config = content["hyper_parameters"], content["run"]["config"]
    made["hindsight_dim"], config["env.hindsight"] = 0, False
    del made["group_size"], config["model.group_size"]
    if version != "0.3.0":
        del made["observation_names"], config["env.action"]
        made["action"] = config["model.action"] = "direct"
    if version == "0.1.0":
        del made["step_minutes"], config["env.hours"]
    Path("old.pt").write_bytes(seal_content(content, record))
    assert co2lightning.PPO.load_from_checkpoint("old.pt").step_minutes == 15
    outcome = command("fit", "--ckpt_path", "old.pt", "--name", "on", "--episodes", "1")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Resuming PPO at episode 2" in outcome.out
    assert "hours" not in outcome.out


def test_a_run_keeps_its_step(place: Path, command: Callable[..., Outcome]) -> None:
    words = ("--env.id", "Pendulum-v1", "--env.num_envs", "2", *TINY["PPO"], "--episodes", "1")
    assert command("fit", "--model", "PPO", *words).code == 0
    content, record = unseal(Path("checkpoints/PPO/episode_0001.pt"))
    content["hyper_parameters"]["step_minutes"] = 60
    Path("hourly.pt").write_bytes(seal_content(content, record))
    outcome = command("fit", "--ckpt_path", "hourly.pt", "--name", "on")
    assert outcome.code == 2
    assert "hourly.pt: trained on 60 minutes a step, the environment has 15; " in outcome.err
