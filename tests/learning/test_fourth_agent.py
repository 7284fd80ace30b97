"""A fourth agent is one file: this one needs nothing of the sources changed.

`co2lightning fit` would take it, too, with its name in `agents.AGENTS` and a recipe in configs/.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from probes import choice, train_class
from torch import Tensor

from co2lightning.agents.agent import Agent
from co2lightning.agents.networks import MLP, gaussian_log_prob
from co2lightning.agents.ranges import POSITIVE, setting
from co2lightning.learn.dataset import Rollout

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:lightning")


class Reinforce(Agent):
    """The gradient of Williams 1992, for episodes of one step."""

    @dataclass(kw_only=True)
    class Settings(Agent.Settings):
        """What can be set of it.

        Args:
            spread: Standard deviation of what is tried.
        """

        spread: float = setting(0.3, POSITIVE)

    settings: Settings  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self) -> None:
        shape = self.shape_of_networks()
        self.actor = MLP(self.observation_dim, n_out=self.action_dim, output_gain=0.01, **shape)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.settings.learning_rate, fused=True)

    def segment_steps(self, horizon: int) -> int:
        return horizon

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.policy_mean(obs) + self.settings.spread * noise

    def minibatches(self, rollout: Rollout) -> Iterator[Rollout]:
        self.note("reward_spread", rollout.reward.std())
        yield rollout

    def loss(self, rollout: Rollout, /) -> tuple[Tensor, dict[str, Tensor]]:
        log_std = torch.tensor(self.settings.spread).log()
        log_prob = gaussian_log_prob(rollout.action, self.policy_mean(rollout.obs), log_std)
        advantage = rollout.reward - rollout.reward.mean()
        loss = -(log_prob * advantage * rollout.valid).mean()
        return loss, {"loss": loss}


def test_it_learns_under_the_trainer() -> None:
    agent = train_class(Reinforce, "ActionMatters", 60, learning_rate=3e-2, hidden=(8,), spread=0.3)
    assert choice(agent, 0.0) == pytest.approx(0.5, abs=0.15)
    assert agent.updates == 60
    assert agent.metrics.keys() >= {"train/loss", "train/reward_spread", "rollout/ep_rew_mean"}
