"""`history` and `verify`: what they show, what they find, how fast they are."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from co2lightning.runs.run import TrainingCheckpoint
from conftest import Outcome, tree

Command = Callable[..., Outcome]


def train(name: str, shares: list[float], status: str | None = "completed") -> TrainingCheckpoint:
    """Write a run without training: an episode for each share of the uncontrolled CO2."""
    run = TrainingCheckpoint(Path("checkpoints") / name)
    first = run.get_next_episode()
    run.begin_session(start_episode=first, device="cpu", info={"agent": "PPO", "seed": 0})
    for episode, share in enumerate(shares, first):
        metrics = {
            "co2_kg": 500.0 * share + 10.0 * episode,
            "co2_vs_uncontrolled": share,
            "unmet_kwh": 1.25,
            "reward": 1.0,
            "time_seconds": 0.1,
        }
        run.save_checkpoint({"weights": torch.zeros(3)}, episode=episode, metrics=metrics)
    if status:
        run.end_session(status)
    return run


def test_the_table(command: Command) -> None:
    train("PPO", [0.9, 0.4], "interrupted")
    train("PPO", [0.7, 0.5])
    train("[red]night", [0.8])
    (Path("checkpoints") / "archive" / "PPO-1").mkdir(parents=True)
    (Path("checkpoints") / "notes").mkdir()
    before = tree(Path("checkpoints"))
    outcome = command("history")
    assert tree(Path("checkpoints")) == before, "looking changes nothing"
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["PPO", "PPO", "4", "last", "4", "290.0", "50%", "1.2", "4", "2", "completed"] in lines
    assert ["best", "2", "220.0", "40%", "1.2"] in lines
    assert [
        "[red]night",
        *["PPO", "1", "last", "1", "410.0", "80%", "1.2", "1", "1", "completed"],
    ] in lines
    assert len(lines) == 2 + 2 * 2 + 1
    assert outcome.code == 0


def test_costs_are_shown_where_an_episode_has_one(command: Command) -> None:
    run = train("PPO", [0.9], None)
    metrics = {"co2_kg": 50.0, "co2_vs_uncontrolled": 0.5, "unmet_kwh": 0.0, "cost": 12.345}
    metrics |= {"reward": 1.0, "time_seconds": 0.1}
    assert "cost" not in command("history").out
    run.save_checkpoint({"weights": torch.zeros(3)}, episode=2, metrics=metrics)
    run.end_session("completed")
    for words in (("history",), ("history", "PPO")):
        out = command(*words).out
        assert "cost" in out
        assert "12.35" in out or "12.34" in out


def test_of_nothing_there_is_no_share(command: Command) -> None:
    run = train("PPO", [0.9], None)
    metrics = {"co2_kg": 1.5, "uncontrolled_kg": 0.0, "co2_vs_uncontrolled": 1.5e9}
    run.save_checkpoint({"weights": torch.zeros(3)}, episode=2, metrics=metrics)
    run.end_session("completed")
    (last,) = [line for line in command("history").out.splitlines() if "last 2" in line]
    assert "1.5 " in last
    assert "%" not in last


def test_a_run_with_its_sessions(command: Command) -> None:
    train("PPO", [0.9, 0.4], "interrupted")
    train("PPO", [])
    train("A", [0.1])
    out = command("history", "PPO").out
    assert "1-2       2" in out
    assert "interrupted" in out
    assert "A " not in out


def test_the_same_as_data(command: Command) -> None:
    train("PPO", [0.9, 0.4, 0.5])
    (run,) = json.loads(command("history", "--json").out)["runs"]
    assert (run["name"], run["agent"], run["total_episodes"]) == ("PPO", "PPO", 3)
    assert (run["last"]["episode"], run["best"]["episode"]) == (3, 2)
    assert (run["checkpoints"], run["status"], len(run["sessions"])) == (3, "completed", 1)
    assert command("history", "PPO", "--json").out == command("history", "--json").out


def test_running_and_killed(command: Command, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = train("PPO", [0.9], status=None)
    assert json.loads(command("history", "--json").out)["runs"][0]["status"] == "running"
    assert command("verify").code == 0
    copy = tmp_path_factory.mktemp("dead") / "PPO"
    shutil.copytree("checkpoints/PPO", copy)
    words = ("history", "--json", "--checkpoints.dir", str(copy.parent))
    assert json.loads(command(*words).out)["runs"][0]["status"] == "killed"
    run.end_session("completed")


def test_verify(command: Command) -> None:
    train("PPO", [0.9, 0.4])
    train("b", [0.9])
    outcome = command("verify")
    assert outcome == (0, "PPO: ok, 2 checkpoints\nb: ok, 1 checkpoint\n", "")
    file = Path("checkpoints/PPO/episode_0001.pt")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    Path("checkpoints/PPO/metadata.json").unlink()
    before = tree(Path("checkpoints"))
    outcome = command("verify")
    assert outcome.code == 1
    assert outcome.out.splitlines() == [
        "PPO: episode_0001.pt is damaged (checksum differs)",
        "PPO: metadata.json is missing",
        "b: ok, 1 checkpoint",
    ]
    assert command("verify", "b").code == 0
    assert tree(Path("checkpoints")) == before


@pytest.mark.parametrize("name", ["history", "verify"])
def test_what_cannot_be(command: Command, place: Path, name: str) -> None:
    for words, says in (
        (["SAC"], "error: SAC: no such run in checkpoints; there are: none\n"),
        (["../PPO"], "error: ../PPO: no such run in checkpoints; there are: none\n"),
        (["--jason"], f"error: {name}: unrecognized arguments: --jason; --help shows what"),
        (["--checkpoints.dir"], f"error: {name}: argument --checkpoints.dir: expected one"),
    ):
        outcome = command(name, *words)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert outcome.err.startswith(says)
    assert tree(place) == {}


def test_nothing_trained_yet(command: Command) -> None:
    outcome = command("history")
    assert outcome.code == 0
    assert outcome.out.startswith("No runs in checkpoints; co2lightning fit --config ppo.yaml")
    assert json.loads(command("history", "--json").out) == {"runs": []}
    assert command("verify").err.startswith("error: no runs in checkpoints")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["history"], ["history", "--help"], ["verify"], ["report", "--help"]],
)
def test_starts_without_torch(place: Path, environment: dict[str, str], words: list[str]) -> None:
    train("PPO", [0.9])
    script = (
        "import sys; from co2lightning.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "assert not code and not {'torch', 'lightning', 'pandas'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout
