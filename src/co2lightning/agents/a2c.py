"""Advantage actor-critic, Mnih et al. 2016 (arXiv:1602.01783), synchronous.

Shapes: n steps of a rollout, B environments.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from co2lightning.agents.actor_critic import ActorCritic, weighted_mean
from co2lightning.agents.networks import gaussian_entropy
from co2lightning.learn.rollout import Rollout
from co2lightning.sim.interface import Environment


class A2C(ActorCritic):
    """A2C: one gradient step for every n_steps of the episode.

    Args:
        observation_dim: O; set by the environment.
        action_dim: A; set by the environment.
        seed: Seed of the run; every draw follows from (seed, episode, rank).
        hindsight_dim: K, what only critics observe; set by the environment.
        action: direct, or correction: what is added to the action of the rule RBC B.
        n_steps: Steps of the episode between two updates; 0 is the whole episode.
        learning_rate: Of Adam, at episode 1.
        anneal_episodes: Episodes over which the learning rate shrinks; 0 keeps it.
        anneal_to: Share of the learning rate that is left after them.
        gamma: Discount per step.
        gae_lambda: 1 is the n-step return of the paper, 0 trusts the value function.
        normalize_advantage: To mean 0 and standard deviation 1 over a rollout.
        ent_coef: Weight of the entropy bonus.
        vf_coef: Weight of the value loss.
        max_grad_norm: The gradient's norm is clipped to this.
        hidden: Width of each hidden layer, of actor and critic alike.
        activation: tanh, relu or silu.
        log_std_init: Logarithm of the first standard deviation of an action.
        reward_scale: Factor on rewards before they reach the critic.
        compile: Compiled updates and rollouts; auto: in runs that repay some 30 s of compiling.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        seed: int = 0,
        hindsight_dim: int = 0,
        action: Literal["direct", "correction"] = "direct",
        n_steps: int = 8,
        learning_rate: float = 7e-4,
        anneal_episodes: int = 0,
        anneal_to: float = 0.1,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        normalize_advantage: bool = False,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        hidden: tuple[int, ...] = (64, 64),
        activation: str = "tanh",
        log_std_init: float = 0.0,
        reward_scale: float = 1.0,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build()

    def loss(self, rollout: Rollout, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a rollout and its parts: section 4 of the paper."""
        values = self.values(rollout)
        advantage, value_target, explained_variance = self.judge(rollout, values.detach())
        log_prob = self.log_prob(rollout.obs, rollout.action)
        policy_loss = -weighted_mean(log_prob * advantage, rollout.valid)
        value_loss = weighted_mean((values[:-1] - value_target).square(), rollout.valid)
        entropy = gaussian_entropy(self.log_std)
        loss = (
            policy_loss + self.hparams["vf_coef"] * value_loss - self.hparams["ent_coef"] * entropy
        )
        return loss, {
            "loss": loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "explained_variance": explained_variance,
        }

    def learn(self, rollout: Rollout) -> dict[str, Tensor]:
        """Take one gradient step on a rollout."""
        self.descend(rollout)
        return {}

    def updates_per_episode(self, env: Environment) -> int:
        return -(-env.horizon // self.segment_steps(env.horizon))
