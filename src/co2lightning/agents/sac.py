"""Soft actor-critic with automatic temperature, Haarnoja et al. 2018 (arXiv:1812.05905).

Shapes: M transitions of a minibatch, O features, A actions.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from co2lightning.agents.agent import Agent
from co2lightning.agents.networks import MLP, TwinCritic, squashed_gaussian
from co2lightning.agents.replay import Replay, ReplayBatch
from co2lightning.learn import ranks
from co2lightning.learn.rollout import Rollout
from co2lightning.sim.interface import Environment


class Update(NamedTuple):
    """What one update needs: a minibatch and the noise of the two sampled actions."""

    batch: ReplayBatch
    noise: Tensor  # [M, A]
    next_noise: Tensor  # [M, A]


class SAC(Agent):
    """SAC with twin critics, a squashed Gaussian policy and a replay buffer.

    Args:
        observation_dim: O; set by the environment.
        action_dim: A; set by the environment.
        seed: Seed of the run; every draw follows from (seed, episode, rank).
        hindsight_dim: K, what only critics observe; set by the environment.
        action: direct, or correction: what is added to the action of the rule RBC B.
        train_freq: Steps of the episode between two rounds of updates.
        gradient_steps: Updates in a round.
        learning_starts: Transitions acted at random before the first update.
        buffer_size: Transitions the replay buffer holds.
        batch_size: Transitions of a minibatch.
        learning_rate: Of Adam for actor, critics and temperature, at episode 1.
        anneal_episodes: Episodes over which the learning rate shrinks; 0 keeps it.
        anneal_to: Share of the learning rate that is left after them.
        gamma: Discount per step.
        tau: Share by which the target critics follow the critics at each update.
        ent_coef_init: First temperature.
        target_entropy: Entropy the temperature aims for, in nats; null is minus the number of
            actions.
        hidden: Width of each hidden layer, of actor and critics alike.
        activation: tanh, relu or silu.
        reward_scale: Factor on rewards before they reach the critics.
        compile: Compiled updates and rollouts; auto: in runs that repay some 30 s of compiling.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        seed: int = 0,
        hindsight_dim: int = 0,
        action: Literal["direct", "correction"] = "direct",
        train_freq: int = 4,
        gradient_steps: int = 16,
        learning_starts: int = 1536,
        buffer_size: int = 300_000,
        batch_size: int = 256,
        learning_rate: float = 3e-4,
        anneal_episodes: int = 0,
        anneal_to: float = 0.1,
        gamma: float = 0.99,
        tau: float = 0.005,
        ent_coef_init: float = 1.0,
        target_entropy: float | None = None,
        hidden: tuple[int, ...] = (256, 256),
        activation: str = "relu",
        reward_scale: float = 1.0,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = self.weights_generator()
        self.actor = MLP(
            observation_dim,
            hidden,
            2 * action_dim,
            activation=activation,
            output_gain=0.01,
            generator=generator,
        )
        shape = (observation_dim + hindsight_dim + action_dim, hidden, activation)
        self.critic = TwinCritic(*shape, generator=generator)
        self.target = TwinCritic(*shape, generator=generator)
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)
        self.log_ent_coef = nn.Parameter(torch.tensor(math.log(ent_coef_init)))
        self.target_entropy = -float(action_dim) if target_entropy is None else target_entropy
        self.replay: Replay | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one Adam over actor, critics and temperature."""
        learned = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(learned, lr=self.hparams["learning_rate"], fused=True)

    def segment_steps(self, horizon: int) -> int:
        return min(self.hparams["train_freq"], horizon)

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        if self.env_steps < self.hparams["learning_starts"]:
            return torch.erf(noise / math.sqrt(2.0))  # uniform in (-1, 1)
        return squashed_gaussian(self.actor(self.policy_obs(obs)), noise)[0]

    @property
    def acts_in_a_graph(self) -> bool:
        return super().acts_in_a_graph and self.env_steps >= self.hparams["learning_starts"]

    def policy_mean(self, obs: Tensor) -> Tensor:
        return self.actor(self.policy_obs(obs)).chunk(2, dim=-1)[0].tanh()

    def loss(self, update: Update, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the three losses and their parts: eqs. 5, 7 and 18 of the paper.

        The sum descends each on its own: the critics' weights are constants to the actor's loss,
        the policy is one to the temperature's.
        """
        batch, gamma = update.batch, self.hparams["gamma"]
        ent_coef = self.log_ent_coef.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = squashed_gaussian(
                self.actor(self.policy_obs(batch.next_obs)), update.next_noise
            )
            next_value = self.target(batch.next_obs, next_action).amin(0) - ent_coef * next_log_prob
            reward = batch.reward * self.hparams["reward_scale"]
            target = reward + gamma * (1.0 - batch.terminated) * next_value
        value = self.critic(batch.obs, batch.action)
        critic_loss = (value - target).square().mean(1).sum()

        action, log_prob = squashed_gaussian(self.actor(self.policy_obs(batch.obs)), update.noise)
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

    def learn(self, rollout: Rollout) -> dict[str, Tensor]:
        """Keep the segment, then run its share of updates."""
        if self.replay is None:
            self.replay = Replay(self.hparams["buffer_size"], rollout)
        assert self.env is not None
        self.replay.add(rollout, masked=self.env.may_reset)
        if self.env_steps < self.hparams["learning_starts"]:
            return {}
        for update in self._updates():
            self.descend(update)
        return {}

    def follow(self) -> None:
        """Let the target critics follow the critics."""
        self.target.follow(self.critic, self.hparams["tau"])

    def updates_per_episode(self, env: Environment) -> int:
        return -(-env.horizon // self.segment_steps(env.horizon)) * self.hparams["gradient_steps"]

    def _updates(self) -> list[Update]:
        """Draw the minibatches and the noise of a round at once."""
        assert self.replay is not None
        count, size = self.hparams["gradient_steps"], self.hparams["batch_size"]
        generator = self.update_generator
        batches = self.replay.sample(count, size, generator)
        shape = (count, 2, size, self.hparams["action_dim"])
        noise = torch.randn(shape, generator=generator, device=self.device)
        return [Update(b, n[0], n[1]) for b, n in zip(batches, noise.unbind(0), strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what this episode put into the replay buffer; it is stored beside the weights."""
        super().on_save_checkpoint(checkpoint)
        if self.replay is None:
            return
        piece = self.replay.piece()
        checkpoint["replay"] = piece if self.world_size == 1 else {"ranks": ranks.gather(piece)}

    def restore_replay(self, pieces: list[dict[str, Any]]) -> None:
        """Rebuild the buffer from the pieces of its episodes, oldest first."""
        self.replay = Replay.rebuild(self.hparams["buffer_size"], pieces, self.device)
