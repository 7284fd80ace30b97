"""Rollouts: one episode of the environment, in segments an agent learns from.

Shapes: n steps of a segment, B environments, O features, A actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from co2lightning.env import Environment, Step

if TYPE_CHECKING:
    from co2lightning.agents.agent import Agent


class Rollout(NamedTuple):
    """A segment of one episode, on the agent's device."""

    obs: Tensor  # [n, B, O]
    action: Tensor  # [n, B, A] the policy's output, before it became the environment's action
    reward: Tensor  # [n, B]
    next_obs: Tensor  # [n, B, O], before any reset
    terminated: Tensor  # [n, B] 1.0 at a real end
    truncated: Tensor  # [n, B] 1.0 where a time limit cut
    valid: Tensor  # [n, B] 0.0 where an environment was only resetting


def episode_seed(seed: int, episode: int, rank: int, stream: str) -> int:
    """Return the seed of one stream of draws in one episode on one rank.

    Streams ("days", "noise", "update", ...) are independent; nothing depends on what was drawn
    before, so an episode can be replayed alone and no generator state need be stored.
    """
    entropy = [seed, episode, rank, *stream.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def episode_generator(
    seed: int, episode: int, rank: int, stream: str, device: torch.device
) -> torch.Generator:
    """Return a generator on `device` for one stream of draws in one episode on one rank."""
    generator = torch.Generator(device=device)
    return generator.manual_seed(episode_seed(seed, episode, rank, stream))


class RolloutDataset(IterableDataset[Rollout]):
    """Lets the agent act for one episode and yields it segment by segment.

    One `iter` is one episode. The next segment is collected only when it is asked for, so the
    agent always acts with the weights its last update left; `__len__` is what keeps Lightning
    from fetching one segment ahead.

    Args:
        env: The environment, B copies in lockstep.
        agent: Acts; also says how long a segment is and which episode it is in.
    """

    def __init__(self, env: Environment, agent: Agent) -> None:
        self.env = env
        self.agent = agent

    def __len__(self) -> int:
        """Return the number of segments in an episode."""
        return -(-self.env.horizon // self.agent.segment_steps(self.env.horizon))

    def __iter__(self) -> Iterator[Rollout]:
        """Play the agent's current episode."""
        env, agent = self.env, self.agent
        env.to(agent.device)
        obs = env.reset(agent.episode_seed("days"))
        noise = agent.draw_noise(env.horizon, env.num_envs)
        length = agent.segment_steps(env.horizon)
        for start in range(0, env.horizon, length):
            obs, rollout = self._segment(obs, noise[start : start + length])
            yield rollout

    @torch.no_grad()
    def _segment(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Rollout]:
        actions: list[Tensor] = []
        results: list[Step] = []
        first = obs
        with torch.inference_mode():
            for step_noise in noise.unbind(0):
                action = self.agent.explore(obs, step_noise)
                result = self.env.step(self.agent.environment_action(obs, action))
                actions.append(action)
                results.append(result)
                obs = result.obs
        # What inference_mode made cannot be trained on; what is stacked outside of it can.
        next_obs, reward, terminated, truncated, valid = (
            torch.stack(column) for column in zip(*results, strict=True)
        )
        observed, action = torch.cat([first.unsqueeze(0), next_obs[:-1]]), torch.stack(actions)
        return obs, Rollout(
            obs=observed,
            action=action,
            reward=reward,
            next_obs=next_obs,
            terminated=terminated,
            truncated=truncated,
            valid=valid,
        )
