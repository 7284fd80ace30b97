"""What the on-policy agents share: a Gaussian policy, a value function, advantages.

Shapes: n steps of a rollout, B environments, O features, A actions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from co2lightning.agents.agent import Agent
from co2lightning.agents.networks import MLP, gaussian_log_prob
from co2lightning.agents.returns import gae
from co2lightning.learn.rollout import Rollout


class ActorCritic(Agent):
    """A Gaussian policy with a learned standard deviation, and a value function beside it.

    Subclasses save their hyperparameters before they call `build`.
    """

    def build(self) -> None:
        """Make the networks the hyperparameters ask for."""
        generator = self.weights_generator()
        n_in, n_actions = self.hparams["observation_dim"], self.hparams["action_dim"]
        n_seen = n_in + self.hparams["hindsight_dim"]
        shape = {
            "hidden": self.hparams["hidden"],
            "activation": self.hparams["activation"],
            "generator": generator,
        }
        self.actor = MLP(n_in, n_out=n_actions, output_gain=0.01, **shape)
        self.critic = MLP(n_seen, n_out=1, output_gain=1.0, **shape)
        self.log_std = nn.Parameter(torch.full((n_actions,), float(self.hparams["log_std_init"])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with the epsilon of 1e-5 that on-policy codes agree on."""
        return torch.optim.Adam(
            self.parameters(), lr=self.hparams["learning_rate"], eps=1e-5, fused=True
        )

    def segment_steps(self, horizon: int) -> int:
        return min(self.hparams["n_steps"] or horizon, horizon)

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.actor(self.policy_obs(obs)) + self.log_std.exp() * noise

    def policy_mean(self, obs: Tensor) -> Tensor:
        return self.actor(self.policy_obs(obs))

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the log density [...] of the policy's outputs [..., A] at obs [..., O]."""
        return gaussian_log_prob(action, self.actor(self.policy_obs(obs)), self.log_std)

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
            rollout.reward * self.hparams["reward_scale"],
            value,
            next_value,
            rollout.terminated,
            rollout.truncated,
            gamma=self.hparams["gamma"],
            gae_lambda=self.hparams["gae_lambda"],
        )
        target = advantage + value
        mean, variance = _moments(advantage, rollout.valid)
        _, spread = _moments(target, rollout.valid)
        if self.hparams["normalize_advantage"]:
            advantage = (advantage - mean) / (variance.sqrt() + 1e-8)
        return advantage, target, 1.0 - variance / (spread + 1e-8)


def _moments(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted mean and variance."""
    mean = weighted_mean(values, weight)
    return mean, weighted_mean((values - mean).square(), weight)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of `values` where `weight` is 1."""
    return (values * weight).sum() / weight.sum().clamp(min=1.0)
