"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from co2lightning.agents.returns import gae, n_step
from co2lightning.learn.dataset import Rollout


def column(*values: float) -> Tensor:
    return torch.tensor(values).unsqueeze(1)


def advantages(terminated: Tensor, truncated: Tensor, gae_lambda: float) -> list[float]:
    return gae(
        reward=column(1.0, 2.0, 3.0),
        value=column(0.5, 1.0, 1.5),
        next_value=column(1.0, 1.5, 2.0),
        terminated=terminated,
        truncated=truncated,
        gamma=0.5,
        gae_lambda=gae_lambda,
    )[:, 0].tolist()


ZEROS = column(0.0, 0.0, 0.0)


def test_every_step_is_discounted_into_the_one_before() -> None:
    # delta = 1 + 0.5*1 - 0.5 = 1, 2 + 0.75 - 1 = 1.75, 3 + 1 - 1.5 = 2.5; carry 0.5 * 0.8 = 0.4
    assert advantages(ZEROS, ZEROS, 0.8) == pytest.approx([1 + 0.4 * 2.75, 2.75, 2.5])


def test_lambda_0_is_the_one_step_error() -> None:
    assert advantages(ZEROS, ZEROS, 0.0) == pytest.approx([1.0, 1.75, 2.5])


def test_a_real_end_has_no_future() -> None:
    # The middle step ends: delta = 2 - 1 = 1 and nothing of the third step reaches the second.
    ended = column(0.0, 1.0, 0.0)
    assert advantages(ended, ZEROS, 0.8) == pytest.approx([1 + 0.4 * 1.0, 1.0, 2.5])


def test_a_time_limit_keeps_its_bootstrap_but_passes_nothing_on() -> None:
    cut = column(0.0, 1.0, 0.0)
    assert advantages(ZEROS, cut, 0.8) == pytest.approx([1 + 0.4 * 1.75, 1.75, 2.5])


def stepped(terminated: Tensor, truncated: Tensor, n_steps: int) -> Rollout:
    """Return three steps whose next observations are 10, 20 and 30."""
    rollout = Rollout(
        obs=torch.zeros(3, 1, 1),
        action=torch.zeros(3, 1, 1),
        reward=column(1.0, 2.0, 4.0),
        next_obs=column(10.0, 20.0, 30.0).unsqueeze(-1),
        terminated=terminated,
        truncated=truncated,
        valid=column(1.0, 1.0, 1.0),
    )
    return n_step(rollout, gamma=0.5, n_steps=n_steps)


def targets(rollout: Rollout) -> list[float]:
    """Return R + gamma (1 - terminated) V, where an observation is its own value."""
    value = rollout.next_obs.squeeze(-1)
    return (rollout.reward + 0.5 * (1.0 - rollout.terminated) * value).flatten().tolist()


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [
        (1, [1 + 0.5 * 10, 2 + 0.5 * 20, 4 + 0.5 * 30]),
        (2, [1 + 0.5 * 2 + 0.25 * 20, 2 + 0.5 * 4 + 0.25 * 30, 4 + 0.5 * 30]),
        (3, [1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 30, 2 + 0.5 * 4 + 0.25 * 30, 4 + 0.5 * 30]),
        (9, [1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 30, 2 + 0.5 * 4 + 0.25 * 30, 4 + 0.5 * 30]),
    ],
)
def test_a_target_sums_the_rewards_of_n_steps(n_steps: int, expected: list[float]) -> None:
    assert targets(stepped(ZEROS, ZEROS, n_steps)) == expected


def test_no_target_looks_beyond_an_end() -> None:
    middle = column(0.0, 1.0, 0.0)
    ended = [1 + 0.5 * 2, 2.0, 4 + 0.5 * 30]
    assert targets(stepped(middle, ZEROS, 3)) == ended
    cut = [1 + 0.5 * 2 + 0.25 * 20, 2 + 0.5 * 20, 4 + 0.5 * 30]
    assert targets(stepped(ZEROS, middle, 3)) == cut
