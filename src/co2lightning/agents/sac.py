"""Soft actor-critic with automatic temperature, Haarnoja et al. 2018 (arXiv:1812.05905).

Shapes: M transitions of a minibatch, O features, A actions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from co2lightning.agents.agent import Agent
from co2lightning.agents.networks import ACTIVATIONS, MLP, TwinCritic, squashed_gaussian
from co2lightning.agents.ranges import COUNT, POSITIVE, WIDTH, Range, setting
from co2lightning.agents.replay import Replay, ReplayBatch
from co2lightning.agents.returns import n_step
from co2lightning.learn import ranks
from co2lightning.learn.dataset import Rollout
from co2lightning.sim.interface import Environment

_COMMON = 0.002  # weight of what the critics' errors of a group have in common


class Update(NamedTuple):
    """What one update needs: a minibatch and the noise of the two sampled actions."""

    batch: ReplayBatch
    noise: Tensor  # [M, A]
    next_noise: Tensor  # [M, A]


class SAC(Agent):
    """SAC with twin critics, a squashed Gaussian policy and a replay buffer."""

    @dataclass(kw_only=True)
    class Settings(Agent.Settings):
        """What can be set of SAC.

        Args:
            train_freq: Steps of 15 minutes between two rounds of updates.
            gradient_steps: Updates in a round.
            n_steps: Steps of 15 minutes whose rewards a target sums up before it asks the critics;
                fewer at the end of a round's steps.
            group_size: Windows that begin alike, on one day with one state of charge: critics
                learn above all how they differ. Fewer where num_envs is no multiple of it.
            learning_starts: Transitions before the first update, acted by the fresh policy.
            buffer_size: Transitions the replay buffer holds.
            batch_size: Transitions of a minibatch, in whole groups.
            learning_rate: Of Adam for actor, critics and temperature, at episode 1.
            tau: Share by which the target critics follow the critics at each update.
            ent_coef_init: First temperature.
            target_entropy: Entropy the temperature aims for, in nats; null is minus the number of
                actions.
            log_std_init: Logarithm of the first standard deviation of an action before tanh.
        """

        train_freq: int = setting(4, COUNT)
        gradient_steps: int = setting(16, COUNT)
        n_steps: int = setting(1, COUNT)
        group_size: int = setting(1, COUNT)
        learning_starts: int = setting(1536, Range(0))
        buffer_size: int = setting(300_000, Range(1, 100_000_000))
        batch_size: int = setting(256, COUNT)
        tau: float = setting(0.005, Range(0, 1, above=True))
        ent_coef_init: float = setting(1.0, POSITIVE)
        target_entropy: float | None = None
        log_std_init: float = setting(0.0, Range(-10, 2))
        hidden: tuple[int, ...] = setting((256, 256), WIDTH)
        activation: str = setting("relu", ACTIVATIONS)

    settings: Settings  # pyright: ignore[reportIncompatibleVariableOverride]
    squashed = True

    def build(self) -> None:
        shape = self.shape_of_networks()
        n_seen, n_actions = self.observation_dim, self.action_dim
        self.actor = MLP(n_seen, n_out=2 * n_actions, output_gain=0.01, **shape)
        nn.init.constant_(self.actor.last[1][n_actions:], self.settings.log_std_init)
        self.critic = TwinCritic(n_seen + n_actions, **shape)
        self.target = TwinCritic(n_seen + n_actions, **shape)
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)
        self.log_ent_coef = nn.Parameter(torch.tensor(math.log(self.settings.ent_coef_init)))
        aim = self.settings.target_entropy
        self.target_entropy = -float(n_actions) if aim is None else aim
        self.replay: Replay | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one Adam over actor, critics and temperature."""
        learned = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(learned, lr=self.settings.learning_rate, fused=True)

    def segment_steps(self, horizon: int) -> int:
        return min(self.in_steps(self.settings.train_freq), horizon)

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        return squashed_gaussian(self.actor(obs), noise)[0]

    def loss(self, update: Update, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the three losses and their parts: eqs. 5, 7 and 18 of the paper.

        The sum descends each on its own: the critics' weights are constants to the actor's loss,
        the policy is one to the temperature's. Where windows begin alike, the critics' squared
        errors are those of generalised least squares: weather makes the errors of a group alike.
        """
        batch, gamma = update.batch, self.per_step(self.settings.gamma)
        ent_coef = self.log_ent_coef.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = squashed_gaussian(
                self.actor(batch.next_obs), update.next_noise
            )
            next_value = self.target(batch.next_obs, next_action).amin(0) - ent_coef * next_log_prob
            reward = batch.reward * self.settings.reward_scale
            target = reward + gamma * (1.0 - batch.terminated) * next_value
        error = self.critic(batch.obs, batch.action) - target
        critic_loss = error.square().mean(1).sum()
        if (size := self.group_size) > 1:
            common = error.unflatten(1, (-1, size)).mean(2)
            critic_loss = critic_loss - (1.0 - _COMMON) * common.square().mean(1).sum()

        action, log_prob = squashed_gaussian(self.actor(batch.obs), update.noise)
        soft_value = self.critic(batch.obs, action, frozen=True).amin(0)
        actor_loss = (ent_coef * log_prob - soft_value).mean()

        entropy = -log_prob.detach().mean()
        temperature_loss = self.log_ent_coef * (entropy - self.target_entropy)

        loss = critic_loss + actor_loss + temperature_loss
        return loss, {
            "loss": loss,
            "critic_loss": critic_loss,
            "actor_loss": actor_loss,
            "entropy": entropy,
            "ent_coef": ent_coef,
        }

    def minibatches(self, rollout: Rollout) -> Iterator[Update]:
        """Keep the segment, then hand out its share of updates, all drawn at once."""
        if self.replay is None:
            self.replay = self._empty_replay()
        assert self.env is not None
        gamma, steps = self.per_step(self.settings.gamma), self.in_steps(self.settings.n_steps)
        self.replay.add(n_step(rollout, gamma=gamma, n_steps=steps), masked=self.env.may_reset)
        if self.env_steps < self.settings.learning_starts:
            return
        count, size = self.settings.gradient_steps, self.settings.batch_size
        batches = self.replay.sample(count, size, self.update_generator, self.group_size)
        shape = (count, 2, len(batches[0].reward), self.action_dim)
        noise = torch.randn(shape, generator=self.update_generator, device=self.device)
        for batch, (own, following) in zip(batches, noise.unbind(0), strict=True):
            yield Update(batch, own, following)

    def follow(self) -> None:
        """Let the target critics follow the critics."""
        self.target.follow(self.critic, self.settings.tau)

    def updates_per_episode(self, env: Environment) -> int:
        return super().updates_per_episode(env) * self.settings.gradient_steps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what this episode put into the replay buffer; it is stored beside the weights."""
        super().on_save_checkpoint(checkpoint)
        if self.replay is None:
            return
        piece = self.replay.piece()
        checkpoint["replay"] = piece if self.world_size == 1 else {"ranks": ranks.gather(piece)}

    @property
    def replay_capacity(self) -> int:
        return self.settings.buffer_size

    def restore_replay(self, pieces: list[dict[str, Any]]) -> None:
        """Rebuild the buffer from the pieces of its episodes, oldest first."""
        self.replay = self._empty_replay()
        self.replay.take_up(pieces)

    def _empty_replay(self) -> Replay:
        seen, acted, size = self.observation_dim, self.action_dim, self.settings.buffer_size
        whole = size - size % self.group_size or size  # so that no group crosses the ring's end
        return Replay(whole, seen, acted, self.device)
