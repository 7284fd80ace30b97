"""What the on-policy agents share: a Gaussian policy, a value function, advantages.

Shapes: n steps of a rollout, B environments, O features, A actions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from co2lightning.agents.agent import Agent
from co2lightning.agents.networks import MLP, gaussian_log_prob
from co2lightning.agents.ranges import COUNT, COUNT_OR_NONE, POSITIVE, SHARE, Range, setting
from co2lightning.agents.returns import gae
from co2lightning.learn.dataset import Rollout


class ActorCritic(Agent):
    """A Gaussian policy with a learned standard deviation, and a value function beside it."""

    @dataclass(kw_only=True)
    class Settings(Agent.Settings):
        """What can be set of an on-policy agent.

        Args:
            n_steps: Steps of 15 minutes between two updates; 0 is the whole episode.
            gae_lambda: Per 15 minutes; 0 trusts the value function, 1 the rollout.
            group_size: Windows that begin alike, on one day with one state of charge: what they
                have in common is no advantage. Fewer where num_envs is no multiple of it.
            normalize_advantage: To mean 0 and standard deviation 1 over a rollout.
            ent_coef: Weight of the entropy bonus.
            vf_coef: Weight of the value loss.
            max_grad_norm: The gradient's norm is clipped to this.
            log_std_init: Logarithm of the first standard deviation of an action.
        """

        n_steps: int = setting(0, COUNT_OR_NONE)
        gae_lambda: float = setting(0.95, SHARE)
        group_size: int = setting(1, COUNT)
        normalize_advantage: bool = True
        ent_coef: float = setting(0.0, Range(0))
        vf_coef: float = setting(0.5, Range(0))
        max_grad_norm: float = setting(0.5, POSITIVE)
        log_std_init: float = setting(0.0, Range(-20, 2))

    settings: Settings  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self) -> None:
        shape = self.shape_of_networks()
        n_in, n_actions = self.observation_dim, self.action_dim
        self.actor = MLP(n_in, n_out=n_actions, output_gain=0.01, **shape)
        self.critic = MLP(n_in, n_out=1, output_gain=1.0, **shape)
        log_std = torch.full((n_actions,), float(self.settings.log_std_init))
        self.log_std = nn.Parameter(log_std)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with the epsilon of 1e-5 that on-policy codes agree on."""
        rate = self.settings.learning_rate
        return torch.optim.Adam(self.parameters(), lr=rate, eps=1e-5, fused=True)

    def segment_steps(self, horizon: int) -> int:
        n_steps = self.settings.n_steps
        return min(self.in_steps(n_steps), horizon) if n_steps else horizon

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.actor(obs) + self.log_std.exp() * noise

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the log density [...] of the policy's outputs [..., A] at obs [..., O]."""
        return gaussian_log_prob(action, self.actor(obs), self.log_std)

    def values(self, rollout: Rollout) -> Tensor:
        """Return the critic's values [n + 1, B] of what is seen before and after each step."""
        # What is seen after a step is what the next one acts on.
        seen = torch.cat([rollout.obs, rollout.next_obs[-1:]])
        return self.critic(seen).squeeze(-1)

    @torch.no_grad()
    def judge(self, rollout: Rollout, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Work out what a rollout teaches.

        Args:
            rollout: [n, B].
            values: [n + 1, B].

        Returns:
            Advantages [n, B], value targets [n, B], and the explained variance of the value
            function, 1 - Var(target - value) / Var(target).
        """
        value, next_value = values[:-1], values[1:]
        advantage = gae(
            rollout.reward * self.settings.reward_scale,
            value,
            next_value,
            rollout.terminated,
            rollout.truncated,
            gamma=self.per_step(self.settings.gamma),
            gae_lambda=self.per_step(self.settings.gae_lambda),
        )
        target = advantage + value
        explained = _explained(advantage, target, rollout.valid)
        if (size := self.group_size) > 1:
            own = advantage.unflatten(1, (-1, size))
            advantage = (own - own.mean(2, keepdim=True)).flatten(1)
        if self.settings.normalize_advantage:
            mean, variance = _moments(advantage, rollout.valid)
            advantage = (advantage - mean) / (variance.sqrt() + 1e-8)
        return advantage, target, explained


def _explained(error: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return a value function's explained variance; `error` is what targets exceed it by."""
    (_, left), (_, spread) = (_moments(values, weight) for values in (error, target))
    return 1.0 - left / (spread + 1e-8)


def _moments(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted mean and variance."""
    mean = weighted_mean(values, weight)
    return mean, weighted_mean((values - mean).square(), weight)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of `values` where `weight` is 1."""
    return (values * weight).sum() / weight.sum().clamp(min=1.0)
