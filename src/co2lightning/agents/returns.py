"""Advantages and returns as pure functions.

Shapes: n steps, B environments. A step that terminates has no future; one that is merely
truncated bootstraps from the value of the state it stopped in.
"""

import torch
from torch import Tensor

from co2lightning.learn.dataset import Rollout


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


def n_step(rollout: Rollout, *, gamma: float, n_steps: int) -> Rollout:
    """Let each step stand for the `n_steps` that follow, fewer where its episode or segment ends.

    A reward becomes R = r_t + gamma r_t+1 + ..., next_obs what the last of k steps led to, and
    `terminated` is such that R + gamma (1 - terminated) V(next_obs) has the value at its discount:
    1 - gamma^(k-1) where the episode goes on. Sutton and Barto 2018, eq. 7.1.

    Args:
        rollout: A segment.
        gamma: Discount of a step.
        n_steps: 1 leaves all as it is.
    """
    weight = 1.0 - rollout.terminated
    total, ahead, left = rollout.reward, rollout.next_obs, weight
    goes_on = (weight * (1.0 - rollout.truncated) > 0.5)[:-1]
    for _ in range(min(n_steps, len(total)) - 1):
        total = _longer(goes_on, rollout.reward[:-1] + gamma * total[1:], rollout.reward)
        ahead = _longer(goes_on.unsqueeze(-1), ahead[1:], rollout.next_obs)
        left = _longer(goes_on, gamma * left[1:], weight)
    return rollout._replace(reward=total, next_obs=ahead, terminated=1.0 - left)


def _longer(goes_on: Tensor, longer: Tensor, alone: Tensor) -> Tensor:
    """Return `longer` where the episode goes on, else, and for the last step, `alone`."""
    return torch.cat([torch.where(goes_on, longer, alone[:-1]), alone[-1:]])
