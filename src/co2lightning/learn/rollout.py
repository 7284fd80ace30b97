"""Rollouts: one episode of the environment, in segments an agent learns from.

Shapes: n steps of a segment, B environments, O features, A actions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from co2lightning.learn.graphs import NO_COMPILER, why_not
from co2lightning.sim.days import SiteDays
from co2lightning.sim.interface import Environment, Play, Step

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


class RolloutDataset(IterableDataset[Iterator[Rollout]]):
    """Lets the agent act, one episode after the other; an episode is played segment by segment.

    One `iter` is one episode, given as its segments: the next is collected only when it is asked
    for, so the agent always acts with the weights its last update left.

    Args:
        env: The environment, B copies in lockstep.
        agent: Acts; also says how long a segment is, which episode it is in and whether to compile.
    """

    def __init__(self, env: Environment, agent: Agent) -> None:
        self.env = env
        self.agent = agent
        self._graph: Play | None = None

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
        obs = env.reset(agent.episode_seed("days"))
        noise = agent.draw_noise(env.horizon, env.num_envs)
        length = agent.segment_steps(env.horizon)
        play = self._steps
        if agent.acts_in_a_graph and isinstance(env, SiteDays):
            self._graph = self._graph or self._fuse(env, obs, noise[:length])
            play = self._graph
        for start in range(0, env.horizon, length):
            obs, rollout = self._segment(play, obs, noise[start : start + length])
            yield rollout

    def _policy(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        output = self.agent.explore(obs, noise)
        return output, self.agent.environment_action(obs, output)

    def _steps(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Step]:
        """Play as many steps as there is noise, one operation after the other."""
        outputs: list[Tensor] = []
        results: list[Step] = []
        with torch.inference_mode():
            for draw in noise.unbind(0):
                output, action = self._policy(obs, draw)
                outputs.append(output)
                results.append(self.env.step(action))
                obs = results[-1].obs
        # What inference_mode made cannot be trained on; what is stacked outside of it can.
        steps = Step(*(torch.stack(column) for column in zip(*results, strict=True)))
        return obs, torch.stack(outputs), steps

    def _fuse(self, env: SiteDays, obs: Tensor, noise: Tensor) -> Play:
        """Return policy and environment as one graph, or one after the other if that fails."""
        self.agent.say("Compiling the rollout (some 20 s, once)")
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                return env.fuse(self._policy, obs, noise)
        except Exception as error:
            if (why := why_not(error)) != NO_COMPILER:  # which the update will say
                self.agent.say(f"The rollout cannot be compiled: {why}; training goes on without")
            return self._steps

    @torch.no_grad()
    def _segment(self, play: Play, obs: Tensor, noise: Tensor) -> tuple[Tensor, Rollout]:
        following, action, steps = play(obs, noise)
        return following, Rollout(
            obs=torch.cat([obs.unsqueeze(0), steps.obs[:-1]]),
            action=action,
            reward=steps.reward,
            next_obs=steps.obs,
            terminated=steps.terminated,
            truncated=steps.truncated,
            valid=steps.valid,
        )
