"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from co2lightning.agents.returns import gae


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
