"""Small networks: multilayer perceptrons with orthogonal weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


def mlp(
    n_in: int,
    hidden: Sequence[int],
    n_out: int,
    *,
    activation: str,
    output_gain: float,
    generator: torch.Generator,
) -> nn.Sequential:
    """Build a multilayer perceptron whose weights are drawn from `generator`.

    Args:
        n_in: Input features.
        hidden: Width of each hidden layer.
        n_out: Output features.
        activation: One of `ACTIVATIONS`.
        output_gain: Gain of the last layer: 0.01 starts a policy near its mean action.
        generator: Source of the weights, so that a seed means the same network.
    """
    sizes = [n_in, *hidden, n_out]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        is_last = i == len(sizes) - 2
        layer = nn.utils.skip_init(nn.Linear, a, b)
        gain = output_gain if is_last else 2.0**0.5
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        nn.init.zeros_(layer.bias)
        layers.append(layer)
        if not is_last:
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log density [...] of `action` [..., A] under N(mean, exp(log_std)^2)."""
    z = (action - mean) * (-log_std).exp()
    log_2_pi = 1.8378770664093453
    return (-0.5 * (z * z + log_2_pi) - log_std).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Return the entropy of a Gaussian with independent components, log_std [..., A]."""
    return (log_std + 1.4189385332046727).sum(-1)
