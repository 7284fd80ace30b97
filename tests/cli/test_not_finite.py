"""Numbers that are not finite: an update is skipped and counted, or training ends and says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import co2lightning
from co2lightning.errors import UserError
from co2lightning.runs import seal
from co2lightning.runs.run import TrainingCheckpoint
from conftest import TINY, Outcome
from forged import unseal

Command = Callable[..., Outcome]


class Odd(gym.Env[np.ndarray, np.ndarray]):
    """Rewards with an odd number now and then, otherwise with nothing."""

    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, reward: float) -> None:
        self.odd = reward

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, Any]:
        super().reset(seed=seed)
        return self.observation_space.low, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, Any]:
        odd = self.np_random.random() < 0.004
        obs = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)
        return obs, self.odd if odd else 0.0, False, False, {}


for name, value in (("Huge", 1e30), ("NaN", math.nan)):
    options: dict[str, Any] = {"max_episode_steps": 50, "kwargs": {"reward": value}}
    gym.register(id=f"odd/{name}-v0", entry_point=Odd, disable_env_checker=True, **options)
SAC = ["--model", "SAC", *TINY["SAC"], "--model.learning_starts", "100"]
SAC += ["--model.gradient_steps", "8"]


def train(command: Command, *words: str) -> Outcome:
    outcome = command("fit", "--env.num_envs", "4", *words)
    assert outcome.err.count("\n") == (outcome.code != 0), outcome.err
    return outcome


def run(name: str) -> TrainingCheckpoint:
    found = TrainingCheckpoint(f"checkpoints/{name}")
    assert found.verify() == []
    return found


def test_a_skipped_update_is_counted_and_training_goes_on(command: Command) -> None:
    """A minibatch with a huge reward is left out, the others are learned from."""
    assert train(command, *SAC, "--env.id", "odd/Huge-v0", "--episodes", "4").code == 0
    (session,) = run("SAC").load_history()["trainings"]
    skipped = [row["skipped_updates"] for row in session["metrics"]]
    assert sum(skipped) > 0.0
    assert all(math.isfinite(value) for row in session["metrics"] for value in row.values())
    content = TrainingCheckpoint.read("checkpoints/SAC/episode_0004.pt")
    states = [content["state_dict"], *content["optimizer_states"][0]["state"].values()]
    assert all(tensor.isfinite().all() for state in states for tensor in state.values())
    updates = content["counters"]["updates"]
    assert float(states[1]["step"]) == updates - sum(skipped)


@pytest.mark.parametrize(
    ("words", "saved", "said"),
    [
        (
            ["--model", "PPO", "--model.learning_rate", "1e30", "--model.n_epochs", "10"],
            1,
            "without a finite gradient: 10",
        ),
        (
            ["--model", "A2C", "--model.reward_scale", "1e38", "--model.n_steps", "8"],
            0,
            "train/loss is nan, updates in a row without a finite gradient: 12",
        ),
        (
            [*SAC, "--env.id", "odd/NaN-v0", "--seed_everything", "4"],
            1,
            "rollout/ep_rew_mean is nan",
        ),
        (
            [*SAC, "--model.learning_rate", "3e38"],
            0,
            "rollout/ep_rew_mean is nan, updates in a row",
        ),
    ],
)
def test_training_ends_before_it_saves_what_is_not_finite(
    command: Command, words: list[str], saved: int, said: str
) -> None:
    outcome = train(command, *words, "--episodes", "3")
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: episode {saved + 1}: ")
    assert said in outcome.err
    ended = run(words[1])
    assert ended.episodes() == list(range(1, saved + 1))
    assert ended.load_history()["trainings"][-1]["status"] == "failed"
    if saved:
        again = train(command, *words, "--episodes", "1", "--ckpt_path", "last")
        assert (again.code, again.err) == (1, outcome.err)


def test_a_checkpoint_that_is_not_finite_is_refused(command: Command) -> None:
    assert train(command, *SAC, "--episodes", "2").code == 0
    path = Path("checkpoints/SAC/episode_0002.pt")
    content, record = unseal(path)

    def spoil(tensor: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.view(-1)[-1] = math.inf
        Path("bad.pt").write_bytes(seal.seal_checkpoint(content, record))

    moments = content["optimizer_states"][0]["state"][3]
    spoil(moments["exp_avg_sq"])
    given = ["--ckpt_path", "bad.pt"]
    outcome = train(command, *SAC, *given, "--episodes", "1")
    assert outcome.code == 2
    assert "bad.pt: does not fit SAC (the optimizer's exp_avg_sq of weights 3" in outcome.err
    moments["exp_avg_sq"].zero_()
    spoil(content["state_dict"]["critic.weights.1"])
    said = "bad.pt: its weights critic.weights.1 are no finite numbers"
    with pytest.raises(UserError, match=said):
        co2lightning.SAC.load_from_checkpoint("bad.pt")
    commands = (["test"], ["predict"], ["export", "--output", "policy.onnx"])
    outcomes = [command(name, "SAC", *given, *more) for name, *more in commands]
    outcomes.append(train(command, *SAC, *given, "--episodes", "1"))
    for outcome in outcomes:
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert said in outcome.err
    assert not Path("policy.onnx").exists()
    with torch.no_grad():  # finite, but what it multiplies is not
        for weights in content["state_dict"].values():
            weights.copy_(torch.sign(torch.randn_like(weights)) * 3e38)
    Path("bad.pt").write_bytes(seal.seal_checkpoint(content, record))
    for words in (["test"], ["predict"]):
        outcome = command(*words, "SAC", *given)
        assert outcome.code == 2
        assert "the policy's actions are no finite numbers" in outcome.err
