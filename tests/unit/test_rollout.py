"""Rollouts: what an agent gets to learn from, and the seeds of every draw."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from co2lightning.learn.dataset import Rollout, RolloutDataset
from co2lightning.learn.seeds import episode_generator, episode_seed
from co2lightning.sim.interface import Step


class Counter:
    """Observation: steps so far and a copy's number; the first copy ends every 4 steps."""

    num_envs, observation_dim, action_dim, horizon, step_minutes = 3, 2, 1, 10, 15
    observation_names: tuple[str, ...] = ()

    def to(self, device: torch.device) -> None:
        self.device = device

    def _obs(self) -> Tensor:
        steps = torch.full((3,), float(self.steps))
        return torch.stack([steps, torch.arange(3.0)], dim=1)

    def reset(self, seed: int) -> Tensor:
        self.seed, self.steps = seed, 0
        return self._obs()

    def step(self, action: Tensor) -> Step:
        self.steps += 1
        first = torch.tensor([1.0, 0.0, 0.0])
        ended = first * float(self.steps % 4 == 0)
        valid = 1.0 - first * float(self.steps % 4 == 1 and self.steps > 1)
        return Step(self._obs(), action[:, 0] * 2.0, ended, torch.zeros(3), valid)

    def metrics(self) -> dict[str, float]:
        return {}


def agent(segment: int, gain: float = 1.0) -> SimpleNamespace:
    """Acts with gain * obs + noise."""
    weight = torch.tensor(gain, requires_grad=True)
    return SimpleNamespace(
        device=torch.device("cpu"),
        weight=weight,
        acts_in_a_graph=False,
        segment_steps=lambda horizon: min(segment, horizon),
        episode_seed=lambda stream: 7,
        draw_noise=lambda horizon, num_envs: (
            torch.arange(horizon * num_envs).view(horizon, num_envs, 1) / 100.0
        ),
        environment_action=lambda output: output + torch.arange(3.0).unsqueeze(1),
        explore=lambda obs, noise: obs[:, :1] * weight + noise,
    )


def episode(actor: SimpleNamespace) -> list[Rollout]:
    return list(RolloutDataset(Counter(), actor).play())


def test_a_rollout_holds_what_happened() -> None:
    (rollout,) = episode(agent(10))
    steps = torch.arange(10.0)
    assert torch.equal(rollout.obs[:, 1, 0], steps)
    assert torch.equal(rollout.next_obs[:, 1, 0], steps + 1.0)
    assert torch.equal(rollout.obs[:, :, 1], torch.arange(3.0).expand(10, 3))
    noise = torch.arange(30.0).view(10, 3, 1) / 100.0
    torch.testing.assert_close(rollout.action, rollout.obs[..., :1] + noise)
    # The environment got the output plus the copy's number and pays twice that.
    torch.testing.assert_close(
        rollout.reward, rollout.action[..., 0] * 2.0 + 2.0 * rollout.obs[..., 1]
    )
    assert rollout.terminated.nonzero().tolist() == [[3, 0], [7, 0]]
    assert (rollout.valid == 0.0).nonzero().tolist() == [[4, 0], [8, 0]]
    assert not rollout.truncated.any()


@pytest.mark.parametrize(("segment", "lengths"), [(10, [10]), (4, [4, 4, 2]), (1, [1] * 10)])
def test_segments_are_an_episode_cut_in_pieces(segment: int, lengths: list[int]) -> None:
    dataset = RolloutDataset(Counter(), agent(segment))
    assert len(dataset) == 1
    (pieces,) = (list(episode) for episode in dataset)
    assert [len(piece.reward) for piece in pieces] == lengths
    (whole,) = episode(agent(10))
    for name, column in zip(Rollout._fields, zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(column), getattr(whole, name)), name


def test_the_next_segment_is_played_by_what_the_last_one_taught() -> None:
    actor = agent(5)
    pieces = RolloutDataset(Counter(), actor).play()
    next(pieces)
    actor.weight.data.fill_(3.0)
    second = next(pieces)
    noise = torch.arange(15, 30).view(5, 3, 1) / 100.0
    torch.testing.assert_close(second.action, second.obs[..., :1] * 3.0 + noise)


def test_what_a_rollout_holds_can_be_trained_on() -> None:
    for rollout in episode(agent(5)):
        for tensor in rollout:
            assert not tensor.is_inference()
            assert not tensor.requires_grad
        weight = torch.ones(2, requires_grad=True)
        (rollout.obs @ weight * rollout.reward).sum().backward()
        assert weight.grad is not None


def test_a_seed_depends_on_everything_and_on_nothing_else() -> None:
    base = (3, 5, 0, "days")
    others = [(4, 5, 0, "days"), (3, 6, 0, "days"), (3, 5, 1, "days"), (3, 5, 0, "noise")]
    assert episode_seed(*base) == episode_seed(*base)
    assert len({episode_seed(*key) for key in [base, *others]}) == 5
    assert all(0 <= episode_seed(*key) < 2**63 for key in [base, *others])


def test_a_seed_stays_what_it_was() -> None:
    """A checkpoint's next episode must draw what it would have drawn with an earlier release."""
    assert episode_seed(0, 1, 0, "days") == 11768624343443422
    generator = episode_generator(0, 1, 0, "days", torch.device("cpu"))
    assert generator.initial_seed() == 11768624343443422
