"""What a session will do follows from what was asked and where the run stands, and from no more."""

import re
from pathlib import Path
from typing import Any

import pytest

from co2lightning.errors import UserError
from co2lightning.settings.parser import check_settings, complete, parse_flags, run_settings
from co2lightning.train.fit import run_fit
from co2lightning.train.plan import Asked, Start, plan
from co2lightning.train.signals import Signals
from conftest import TINY

RECIPE = {"episodes": 10, "model.gamma": 0.9}


def asked(**flags: Any) -> Asked:
    return Asked("PPO", "mine.yaml", check_settings(RECIPE, "PPO", "mine.yaml"), flags)


def start(episode: int, target: int, stopped_by: tuple[str, str] | None = None) -> Start:
    settings = run_settings(complete({"model.gamma": 0.8, "model.compile": False}, "PPO"))
    return Start(episode, Path("e.pt"), (1, 2, 3), settings, target, stopped_by, 1, ("old",), {})


WHY, TIRED = ("EarlyStopping", "no better"), ("OutOfTime", "")


@pytest.mark.parametrize(
    ("flags", "begun", "target"),
    [
        ({}, None, 10),
        ({"episodes": 3}, None, 3),
        ({"total_episodes": 7}, None, 7),
        ({}, start(4, 6), 6),
        ({}, start(6, 6), 16),
        ({"episodes": 3}, start(4, 6), 7),
        ({"total_episodes": 5}, start(4, 6), 5),
        ({"total_episodes": 3}, start(4, 6), 3),
        ({}, start(4, 6, WHY), 4),
        ({"total_episodes": 6}, start(4, 6, WHY), 4),
        ({"total_episodes": 8}, start(4, 6, WHY), 8),
        ({"total_episodes": 6}, start(4, 6, TIRED), 6),
        ({"episodes": 1}, start(4, 6, WHY), 5),
    ],
)
def test_the_last_episode(flags: dict[str, Any], begun: Start | None, target: int) -> None:
    assert plan(asked(**flags), begun).target == target


def test_flags_win_over_the_run_and_that_over_the_recipe() -> None:
    assert plan(asked(), None).settings["model.gamma"] == 0.9
    kept = plan(asked(), start(4, 6))
    assert kept.settings["model.gamma"] == 0.8
    note = "mine.yaml has model.gamma 0.9, the run keeps 0.8; --model.gamma 0.9 applies it"
    assert kept.notes == ("old", note)
    changed = plan(asked(**{"model.gamma": 0.7}), start(4, 6))
    assert changed.settings["model.gamma"] == 0.7
    assert changed.notes == ("old", "gamma: 0.8 -> 0.7")
    with pytest.raises(UserError, match="its weights have that shape"):
        plan(asked(**{"model.hidden": (3,)}), start(4, 6))


def test_a_window_s_length_is_a_setting_of_the_run() -> None:
    assert plan(asked(), None).settings["env.hours"] == 24
    changed = plan(asked(**{"env.hours": 48.0}), start(4, 6))
    assert changed.settings["env.hours"] == 48
    assert any(re.fullmatch(r"hours: 24(\.0)? -> 48(\.0)?", note) for note in changed.notes)
    with pytest.raises(UserError, match=r"--env\.hours 48.*: is for sites; Pendulum-v1 has a time"):
        plan(asked(**{"env.hours": 48.0, "env.id": "Pendulum-v1"}), None)
    with pytest.raises(UserError, match=r"--evaluate_every 5: is for sites; Pendulum-v1 has no"):
        plan(asked(**{"evaluate_every": 5, "env.id": "Pendulum-v1"}), None)
    assert plan(asked(**{"evaluate_every": 0, "env.id": "Pendulum-v1"}), None).target == 10
    for wrong in ("0", "-1", "0.5", "nan", "x", "1e9"):
        with pytest.raises(UserError, match=r"--env\.hours .*must be"):
            parse_flags(["--env.hours", wrong], "PPO")


def test_another_process_trains_between_the_plan_and_the_lock(place: Path) -> None:
    words = ["--env.num_envs", "4", *TINY["PPO"], "--episodes", "1"]
    flags = {**parse_flags(words, "PPO"), "ckpt_path": "last"}
    lines: list[str] = []

    class Meanwhile(Signals):
        def install(self, speaks: bool = True) -> None:
            run_fit(flags, agent="PPO", echo=lambda line: None)

    run_fit(flags, agent="PPO", echo=lambda line: None)
    result = run_fit(flags, agent="PPO", signals=Meanwhile(), echo=lines.append)
    assert (result.first_episode, result.last_episode) == (3, 3)
    assert "Resuming PPO at episode 3 (2 episodes done)" in lines
