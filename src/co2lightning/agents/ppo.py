"""Proximal policy optimisation, Schulman et al. 2017 (arXiv:1707.06347).

Shapes: N transitions of a rollout, M of a minibatch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from co2lightning.agents.actor_critic import ActorCritic, weighted_mean
from co2lightning.agents.networks import gaussian_entropy
from co2lightning.agents.ranges import COUNT, POSITIVE, setting
from co2lightning.learn.dataset import Rollout
from co2lightning.sim.interface import Environment


class Samples(NamedTuple):
    """Transitions of a rollout, or a minibatch of them, with what they teach."""

    obs: Tensor  # [N, O]
    action: Tensor  # [N, A]
    log_prob: Tensor  # [N] log density of the action under the policy that acted
    advantage: Tensor  # [N]
    value_target: Tensor  # [N]
    weight: Tensor  # [N] 1.0, or 0.0 where the step was only a reset


class PPO(ActorCritic):
    """PPO with the clipped objective and generalised advantage estimation."""

    @dataclass(kw_only=True)
    class Settings(ActorCritic.Settings):
        """What can be set of PPO.

        Args:
            n_epochs: Passes over a rollout.
            batch_size: Transitions of a minibatch.
            anneal_episodes: Episodes over which learning rate and clip range shrink; 0 keeps them.
            anneal_to: Share of them that is left then.
            clip_range: How far the probability ratio may move from 1, at episode 1.
        """

        n_epochs: int = setting(10, COUNT)
        batch_size: int = setting(256, COUNT)
        clip_range: float = setting(0.2, POSITIVE)

    settings: Settings  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self) -> None:
        super().build()
        clip_range = torch.tensor(self.settings.clip_range)
        self.register_buffer("clip_range", clip_range, persistent=False)

    clip_range: Tensor

    def loss(self, samples: Samples, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a minibatch and its parts: eqs. 7 and 9 of the paper."""
        log_ratio = self.log_prob(samples.obs, samples.action) - samples.log_prob
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1.0 - self.clip_range, 1.0 + self.clip_range)
        surrogate = torch.minimum(ratio * samples.advantage, clipped * samples.advantage)
        policy_loss = -weighted_mean(surrogate, samples.weight)
        value = self.critic(samples.obs).squeeze(-1)
        value_loss = weighted_mean((value - samples.value_target).square(), samples.weight)
        entropy = gaussian_entropy(self.log_std)
        loss = policy_loss + self.settings.vf_coef * value_loss - self.settings.ent_coef * entropy
        with torch.no_grad():
            figures = {
                "loss": loss,
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "entropy": entropy,
                # Schulman's low-variance estimate, http://joschu.net/blog/kl-approx.html
                "approx_kl": weighted_mean(ratio - 1.0 - log_ratio, samples.weight),
                "clip_fraction": weighted_mean((ratio != clipped).float(), samples.weight),
            }
        return loss, figures

    def minibatches(self, rollout: Rollout) -> Iterator[Samples]:
        """Hand out n_epochs passes over a rollout."""
        with torch.no_grad():
            advantage, target, explained_variance = self.judge(rollout, self.values(rollout))
            obs, action = rollout.obs.flatten(0, 1), rollout.action.flatten(0, 1)
            log_prob = self.log_prob(obs, action)
        self.note("explained_variance", explained_variance)
        judged = advantage.flatten(), target.flatten(), rollout.valid.flatten()
        samples = Samples(obs, action, log_prob, *judged)
        for _ in range(self.settings.n_epochs):
            order = torch.randperm(len(obs), generator=self.update_generator, device=self.device)
            shuffled = (column[order].split(self.settings.batch_size) for column in samples)
            yield from map(Samples._make, zip(*shuffled, strict=True))

    def on_train_epoch_start(self) -> None:
        """Set the episode's clip range too."""
        super().on_train_epoch_start()
        self.clip_range.fill_(self.annealed(self.settings.clip_range))

    def updates_per_episode(self, env: Environment) -> int:
        steps, batch_size = self.segment_steps(env.horizon), self.settings.batch_size
        segments = (min(steps, env.horizon - start) for start in range(0, env.horizon, steps))
        minibatches = sum(-(-size * env.num_envs // batch_size) for size in segments)
        return minibatches * self.settings.n_epochs
