"""Gymnasium environments as rollouts want them: scaling, resets, refusals."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from co2lightning.errors import UserError
from co2lightning.sim.foreign import GymEnvironment


class Countdown(gym.Env[np.ndarray, np.ndarray]):
    """Ends after 3 steps; the reward is the action it got, bounds 10 to 20."""

    observation_space = gym.spaces.Box(0.0, 9.0, (1,), np.float32)
    action_space = gym.spaces.Box(10.0, 20.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = np.full(1, self.steps, np.float32)
        return obs, float(action[0]), self.steps == 3, False, {}


gym.register("test/Countdown-v0", entry_point=Countdown, max_episode_steps=8)
gym.register("test/Endless-v0", entry_point=Countdown)


def test_actions_are_scaled_and_resets_are_no_transitions() -> None:
    env = GymEnvironment("test/Countdown-v0", num_envs=2)
    assert (env.horizon, env.observation_dim, env.action_dim) == (8, 1, 1)
    obs = env.reset(seed=1)
    assert obs.tolist() == [[0.0], [0.0]]
    steps = [env.step(torch.tensor([[-1.0], [0.5]])) for _ in range(8)]
    assert steps[0].reward.tolist() == [10.0, 17.5]
    # Steps 1 to 3, then a step that only resets, then 1 to 3 again, then a reset.
    assert [float(s.valid[0]) for s in steps] == [1, 1, 1, 0, 1, 1, 1, 0]
    assert [float(s.terminated[0]) for s in steps] == [0, 0, 1, 0, 0, 0, 1, 0]
    # The observation after the last step is that of the finished episode, not of the next.
    assert [float(s.obs[0, 0]) for s in steps] == [1, 2, 3, 0, 1, 2, 3, 0]


def test_a_seed_means_the_same_episode() -> None:
    first, second = (GymEnvironment("Pendulum-v1", num_envs=2) for _ in range(2))
    assert torch.equal(first.reset(5), second.reset(5))
    assert not torch.equal(first.reset(6), second.reset(5))


@pytest.mark.parametrize(
    ("id", "word"),
    [
        ("Nothing-v9", "--env.id Nothing-v9: "),
        ("CartPole-v1", "its actions are Discrete.2., not a flat Box"),
        ("test/Endless-v0", "it has no time limit"),
    ],
)
def test_what_cannot_train_is_refused_in_one_line(id: str, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        GymEnvironment(id, num_envs=2)
    assert "\n" not in str(caught.value)
