"""Probe environments: each asks one thing of an algorithm, so the first red one names what broke.

`observation` says what the value function must know, `action` what the policy must find.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import torch

from co2lightning.agents import agent_class
from co2lightning.agents.agent import Agent
from co2lightning.sim.foreign import GymEnvironment

HORIZON = 32


class Probe(gym.Env[np.ndarray, np.ndarray]):
    """One number to see, one to choose; subclasses say what follows."""

    observation_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.seen = self.first()
        self.steps = 0
        return self._obs(), {}

    def step(self, action: np.ndarray):
        self.steps += 1
        reward, ended = self.follow(float(action[0]))
        return self._obs(), reward, ended, False, {}

    def _obs(self) -> np.ndarray:
        return np.array([self.seen], dtype=np.float32)

    def first(self) -> float:
        return 0.0

    def follow(self, action: float) -> tuple[float, bool]:
        raise NotImplementedError


class ConstantReward(Probe):
    """One step, reward 1: is the value learned at all?"""

    def follow(self, action: float) -> tuple[float, bool]:
        return 1.0, True


class RewardFollowsObservation(Probe):
    """One step, reward as seen: does the value look at the observation?"""

    def first(self) -> float:
        return float(self.np_random.choice([-1.0, 1.0]))

    def follow(self, action: float) -> tuple[float, bool]:
        return self.seen, True


class RewardDelayed(Probe):
    """Two steps, reward 1 at the end: does the value reach back, discounted?"""

    def follow(self, action: float) -> tuple[float, bool]:
        self.seen = 1.0
        return float(self.steps == 2), self.steps == 2


class ActionMatters(Probe):
    """One step, best action 0.5: does the policy move to it?"""

    def follow(self, action: float) -> tuple[float, bool]:
        return 1.0 - (action - 0.5) ** 2, True


class ActionFollowsObservation(Probe):
    """One step, best action half of what is seen: does the policy look at the observation?"""

    def first(self) -> float:
        return float(self.np_random.choice([-1.0, 1.0]))

    def follow(self, action: float) -> tuple[float, bool]:
        return 1.0 - (action - 0.5 * self.seen) ** 2, True


class DiscountMatters(Probe):
    """A gain now against 1.5 times that gain a step later: 0.3 takes the first, 0.95 the second."""

    def follow(self, action: float) -> tuple[float, bool]:
        if self.steps == 1:
            self.seen = 1.0 + 0.5 * action  # Markov: what was chosen is in sight
            return -action, False
        return 3.0 * (self.seen - 1.0), True


class NeverEnds(Probe):
    """Reward 1 at every step, cut by the clock: is a time limit taken for an end?"""

    def follow(self, action: float) -> tuple[float, bool]:
        return 1.0, False


for _probe in (
    ConstantReward,
    RewardFollowsObservation,
    RewardDelayed,
    ActionMatters,
    ActionFollowsObservation,
    DiscountMatters,
    NeverEnds,
):
    gym.register(f"probe/{_probe.__name__}-v0", entry_point=_probe, max_episode_steps=HORIZON)

SETTINGS: dict[str, dict[str, Any]] = {
    "APG": {"hidden": (32,)},
    "A2C": {"n_steps": 8, "learning_rate": 1e-2, "log_std_init": -1.0, "hidden": (32,)},
    "PPO": {
        "n_epochs": 10,
        "batch_size": 256,
        "learning_rate": 1e-2,
        "log_std_init": -1.0,
        "hidden": (32,),
    },
    "SAC": {
        "train_freq": 4,
        "gradient_steps": 6,
        "learning_starts": 256,
        "batch_size": 128,
        "learning_rate": 1e-2,
        "tau": 0.05,
        "ent_coef_init": 0.2,
        "target_entropy": -1.0,
        "hidden": (32,),
    },
}
EPISODES = {"A2C": 24, "PPO": 8, "SAC": 8}
VALUE_EPISODES = {"A2C": 18, "PPO": 5, "SAC": 5}
"""Enough for a value, which is there before the policy is."""


def train(name: str, probe: str, episodes: int | None = None, **settings: Any) -> Agent:
    """Train one of the agents on a probe."""
    options = {"gamma": 0.9, **SETTINGS[name], **settings}
    return train_class(agent_class(name), probe, episodes or EPISODES[name], **options)


def train_class(made: type[Agent], probe: str, episodes: int, **settings: Any) -> Agent:
    """Train an agent on a probe under the real Trainer."""
    env = GymEnvironment(f"probe/{probe}-v0", num_envs=16)
    agent = made(env.observation_dim, env.action_dim, seed=1, **settings)
    trainer = pl.Trainer(
        max_epochs=episodes,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    agent.train_on(env)
    trainer.fit(agent)
    return agent


@torch.no_grad()
def value(agent: Agent, seen: float) -> float:
    """Return the agent's value of an observation, with its own policy's action."""
    obs = torch.tensor([[seen]])
    if hasattr(agent, "target"):
        return float(agent.critic(obs, agent.act(obs)).mean())
    return float(agent.critic(obs))


def choice(agent: Agent, seen: float) -> float:
    """Return the agent's deterministic action."""
    return float(agent.predict(np.array([seen], dtype=np.float32))[0][0])
