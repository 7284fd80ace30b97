"""Proximal policy optimisation, Schulman et al. 2017 (arXiv:1707.06347).

Shapes: N transitions of a rollout, M of a minibatch, B environments, O features, A actions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from co2lightning.agents.agent import Agent
from co2lightning.networks import gaussian_entropy, gaussian_log_prob, mlp
from co2lightning.returns import gae
from co2lightning.rollout import Rollout


class Minibatch(NamedTuple):
    obs: Tensor  # [M, O]
    action: Tensor  # [M, A]
    log_prob: Tensor  # [M] under the policy that acted
    advantage: Tensor  # [M] normalised over the rollout
    value_target: Tensor  # [M]
    valid: Tensor  # [M]


class PPO(Agent):
    """PPO with the clipped objective and generalised advantage estimation.

    Args:
        observation_dim: O; set by the environment.
        action_dim: A; set by the environment.
        seed: Seed of the run; every draw follows from (seed, episode, rank).
        n_steps: Steps of the episode between two updates; 0 is the whole episode.
        n_epochs: Passes over a rollout.
        batch_size: Transitions of a minibatch.
        learning_rate: Of Adam, at episode 1.
        anneal_episodes: Episodes over which the learning rate shrinks; 0 keeps it.
        anneal_to: Share of the learning rate that is left after them.
        gamma: Discount per step.
        gae_lambda: 0 trusts the value function, 1 the rollout.
        clip_range: How far the probability ratio may move from 1.
        ent_coef: Weight of the entropy bonus.
        vf_coef: Weight of the value loss.
        max_grad_norm: The gradient's norm is clipped to this.
        hidden: Width of each hidden layer, of actor and critic alike.
        activation: tanh, relu or silu.
        log_std_init: Logarithm of the first standard deviation of an action.
        reward_scale: Factor on rewards before they reach the critic.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        seed: int = 0,
        n_steps: int = 0,
        n_epochs: int = 10,
        batch_size: int = 256,
        learning_rate: float = 3e-4,
        anneal_episodes: int = 0,
        anneal_to: float = 0.1,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float = 0.2,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        hidden: tuple[int, ...] = (64, 64),
        activation: str = "tanh",
        log_std_init: float = 0.0,
        reward_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = self.weights_generator()
        self.actor = mlp(
            observation_dim,
            hidden,
            action_dim,
            activation=activation,
            output_gain=0.01,
            generator=generator,
        )
        self.critic = mlp(
            observation_dim,
            hidden,
            1,
            activation=activation,
            output_gain=1.0,
            generator=generator,
        )
        self.log_std = nn.Parameter(torch.full((action_dim,), float(log_std_init)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam as in the paper's code, with its epsilon of 1e-5."""
        return torch.optim.Adam(
            self.parameters(), lr=self.hparams["learning_rate"], eps=1e-5, fused=True
        )

    def segment_steps(self, horizon: int) -> int:
        return min(self.hparams["n_steps"] or horizon, horizon)

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.actor(obs) + self.log_std.exp() * noise

    def act(self, obs: Tensor) -> Tensor:
        return self.actor(obs).clamp(-1.0, 1.0)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        return gaussian_log_prob(action, self.actor(obs), self.log_std)

    def loss(self, batch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a minibatch and its parts: eqs. 7 and 9 of the paper."""
        clip_range = self.hparams["clip_range"]
        weight = batch.valid / batch.valid.sum()
        log_ratio = self.log_prob(batch.obs, batch.action) - batch.log_prob
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
        surrogate = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
        policy_loss = -(surrogate * weight).sum()
        value_error = self.critic(batch.obs).squeeze(-1) - batch.value_target
        value_loss = (value_error * value_error * weight).sum()
        entropy = gaussian_entropy(self.log_std)
        loss = (
            policy_loss + self.hparams["vf_coef"] * value_loss - self.hparams["ent_coef"] * entropy
        )
        return loss, {
            "loss": loss.detach(),
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            # Schulman's low-variance estimate, http://joschu.net/blog/kl-approx.html
            "approx_kl": ((ratio.detach() - 1.0 - log_ratio.detach()) * weight).sum(),
            "clip_fraction": (((ratio.detach() - 1.0).abs() > clip_range) * weight).sum(),
        }

    def learn(self, rollout: Rollout) -> dict[str, Tensor]:
        """Run n_epochs passes of minibatches over a rollout."""
        batch, explained_variance = self._prepare(rollout)
        generator = self.episode_generator("minibatches")
        figures: list[dict[str, Tensor]] = []
        for _ in range(self.hparams["n_epochs"]):
            order = torch.randperm(len(batch.valid), generator=generator, device=self.device)
            shuffled = (column[order].split(self.hparams["batch_size"]) for column in batch)
            for columns in zip(*shuffled, strict=True):
                loss, info = self.loss(Minibatch(*columns))
                self.descend(loss)
                figures.append(info)
        mean = {name: torch.stack([f[name] for f in figures]).mean() for name in figures[0]}
        return {**mean, "explained_variance": explained_variance}

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> tuple[Minibatch, Tensor]:
        """Flatten a rollout and work out advantages and value targets."""
        value = self.critic(rollout.obs).squeeze(-1)
        next_value = self.critic(rollout.next_obs).squeeze(-1)
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
        count = rollout.valid.sum()
        centred = advantage - (advantage * rollout.valid).sum() / count
        std = ((centred * centred * rollout.valid).sum() / count).sqrt()
        spread = target - (target * rollout.valid).sum() / count
        unexplained = (advantage * advantage * rollout.valid).sum()
        explained_variance = 1.0 - unexplained / ((spread * spread * rollout.valid).sum() + 1e-8)
        batch = Minibatch(
            obs=rollout.obs.flatten(0, 1),
            action=rollout.action.flatten(0, 1),
            log_prob=rollout.log_prob.flatten(),
            advantage=(centred / (std + 1e-8)).flatten(),
            value_target=target.flatten(),
            valid=rollout.valid.flatten(),
        )
        return batch, explained_variance
