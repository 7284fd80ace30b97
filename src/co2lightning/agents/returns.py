"""Advantages and returns as pure functions.

Shapes: n steps, B environments. A step that terminates has no future; one that is merely
truncated bootstraps from the value of the state it stopped in.
"""

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation, Schulman et al. 2016, eq. 16.

    delta_t = r_t + gamma * V(s_t+1) * (1 - terminated_t) - V(s_t)
    A_t = delta_t + gamma * lambda * (1 - terminated_t) * (1 - truncated_t) * A_t+1

    Args:
        reward: [n, B].
        value: [n, B], V(s_t).
        next_value: [n, B], V of the state the step led to (before any reset).
        terminated: [n, B], 1.0 where the episode really ended.
        truncated: [n, B], 1.0 where it was cut by a time limit.
        gamma: Discount.
        gae_lambda: 0 is the one-step error, 1 the Monte Carlo return less the value.

    Returns:
        Advantages [n, B]; the value targets are advantage + value.
    """
    delta = reward + gamma * next_value * (1.0 - terminated) - value
    carry = gamma * gae_lambda * (1.0 - terminated) * (1.0 - truncated)
    advantages: list[Tensor] = []
    last = torch.zeros_like(reward[0])
    for t in range(len(reward) - 1, -1, -1):
        last = delta[t] + carry[t] * last
        advantages.append(last)
    return torch.stack(advantages[::-1])
