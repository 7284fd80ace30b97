"""Advantage actor-critic, Mnih et al. 2016 (arXiv:1602.01783), synchronous.

Shapes: n steps of a rollout, B environments.
"""

from dataclasses import dataclass

from torch import Tensor

from co2lightning.agents.actor_critic import ActorCritic, weighted_mean
from co2lightning.agents.networks import gaussian_entropy
from co2lightning.agents.ranges import COUNT_OR_NONE, POSITIVE, SHARE, setting
from co2lightning.learn.dataset import Rollout


class A2C(ActorCritic):
    """A2C: one gradient step for every n_steps of the episode."""

    @dataclass(kw_only=True)
    class Settings(ActorCritic.Settings):
        """What can be set of A2C.

        Args:
            gae_lambda: Per 15 minutes; 1 is the n-step return of the paper, 0 trusts the value
                function.
        """

        n_steps: int = setting(8, COUNT_OR_NONE)
        learning_rate: float = setting(7e-4, POSITIVE)
        gae_lambda: float = setting(1.0, SHARE)
        normalize_advantage: bool = False

    def loss(self, rollout: Rollout, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a rollout and its parts: section 4 of the paper."""
        values = self.values(rollout)
        advantage, value_target, explained_variance = self.judge(rollout, values.detach())
        log_prob = self.log_prob(rollout.obs, rollout.action)
        policy_loss = -weighted_mean(log_prob * advantage, rollout.valid)
        value_loss = weighted_mean((values[:-1] - value_target).square(), rollout.valid)
        entropy = gaussian_entropy(self.log_std)
        loss = policy_loss + self.settings.vf_coef * value_loss - self.settings.ent_coef * entropy
        return loss, {
            "loss": loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "explained_variance": explained_variance,
        }
