"""Episodes as Lightning reads them: one of the environment at a time, in segments.

Shapes: n steps of a segment, B environments, O features, A actions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from co2lightning.learn.player import Actor, Player
from co2lightning.sim.interface import Environment


class Rollout(NamedTuple):
    """A segment of one episode, on the agent's device."""

    obs: Tensor  # [n, B, O]
    action: Tensor  # [n, B, A] the policy's output, before it became the environment's action
    reward: Tensor  # [n, B]
    next_obs: Tensor  # [n, B, O], before any reset
    terminated: Tensor  # [n, B] 1.0 at a real end
    truncated: Tensor  # [n, B] 1.0 where a time limit cut
    valid: Tensor  # [n, B] 0.0 where an environment was only resetting


class RolloutDataset(IterableDataset[Iterator[Rollout]]):
    """Lets the agent act, one episode after the other; an episode is played segment by segment.

    One `iter` is one episode, given as its segments: the next is collected only when it is asked
    for, so the agent always acts with the weights its last update left.

    Args:
        env: The environment, B copies in lockstep.
        agent: Acts; also says how long a segment is, which episode it is in and whether to compile.
    """

    def __init__(self, env: Environment, agent: Actor) -> None:
        self.env = env
        self.agent = agent
        self._player = Player(env, agent)

    def __len__(self) -> int:
        """Return the number of episodes of an epoch."""
        return 1

    def __iter__(self) -> Iterator[Iterator[Rollout]]:
        """Give the agent's current episode, still to be played."""
        yield self.play()

    def play(self) -> Iterator[Rollout]:
        """Play the agent's current episode."""
        env, agent = self.env, self.agent
        env.to(agent.device)
        following = env.reset(agent.episode_seed("days"))
        noise = agent.draw_noise(env.horizon, env.num_envs)
        segments = noise.split(agent.segment_steps(env.horizon))
        play = self._player.begin(following, segments[0])
        for segment in segments:
            obs = following
            with torch.no_grad():
                following, action, (next_obs, *outcome) = play(obs, segment)
                obs = torch.cat([obs.unsqueeze(0), next_obs[:-1]])
            reward, terminated, truncated, valid = outcome
            yield Rollout(obs, action, reward, next_obs, terminated, truncated, valid)
