"""Small networks: multilayer perceptrons with orthogonal weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

_LOG_2 = math.log(2.0)
_HALF_LOG_2_PI = 0.5 * math.log(2.0 * math.pi)
_LOG_STD_MIN, _LOG_STD_MAX = -10.0, 2.0

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "silu": nn.functional.silu,
}


class _Layers(nn.Module):
    """Weights and biases, layer by layer.

    `layers` and `last` hold the parameters themselves, which keep their identity under `to` and
    `load_state_dict`: while acting, the calls between layers of `nn.Sequential`, or the iteration
    of a `ParameterList`, cost as much as the layers.
    """

    def __init__(
        self, weights: Iterable[Tensor], biases: Iterable[Tensor], activation: str
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.weights = nn.ParameterList(map(nn.Parameter, weights))
        self.biases = nn.ParameterList(map(nn.Parameter, biases))
        *self.layers, self.last = zip(self.weights, self.biases, strict=True)


class MLP(_Layers):
    """A multilayer perceptron whose weights are drawn from a generator.

    Args:
        n_in: Input features.
        hidden: Width of each hidden layer.
        n_out: Output features.
        activation: One of `ACTIVATIONS`.
        output_gain: Gain of the last layer: 0.01 starts a policy near its mean action.
        generator: Source of the weights, so that a seed means the same network.
    """

    def __init__(
        self,
        n_in: int,
        hidden: Sequence[int],
        n_out: int,
        *,
        activation: str,
        output_gain: float,
        generator: torch.Generator,
    ) -> None:
        weights = [torch.empty(b, a) for a, b in itertools.pairwise([n_in, *hidden, n_out])]
        for weight in weights:
            gain = output_gain if weight is weights[-1] else 2.0**0.5
            nn.init.orthogonal_(weight, gain, generator=generator)
        super().__init__(weights, [torch.zeros(len(weight)) for weight in weights], activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs [..., n_out] for inputs [..., n_in]."""
        for weight, bias in self.layers:
            x = self.activation(nn.functional.linear(x, weight, bias))
        return nn.functional.linear(x, *self.last)


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log density [...] of `action` [..., A] under N(mean, exp(log_std)^2)."""
    z = (action - mean) * (-log_std).exp()
    return (-0.5 * z * z - log_std - _HALF_LOG_2_PI).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Return the entropy of a Gaussian with independent components, log_std [..., A]."""
    return (log_std + 0.5 + _HALF_LOG_2_PI).sum(-1)


def squashed_gaussian(head: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a = tanh(u), u ~ N(mean, std^2), and its log density.

    log pi(a) = log N(u) - sum log(1 - tanh(u)^2), Haarnoja et al. 2018, appendix C, with
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which does not lose its digits where tanh
    saturates.

    Args:
        head: [..., 2 A], the mean and the log standard deviation.
        noise: [..., A], standard normal.

    Returns:
        Actions [..., A] in (-1, 1) and log densities [...].
    """
    mean, log_std = head.chunk(2, dim=-1)
    log_std = log_std.clamp(_LOG_STD_MIN, _LOG_STD_MAX)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - _HALF_LOG_2_PI
    action = u.tanh()
    log_slope = 2.0 * (_LOG_2 - u - nn.functional.softplus(-2.0 * u))
    return action, (log_normal - log_slope).sum(-1)


class TwinCritic(_Layers):
    """Two Q functions of the same shape, evaluated as one batched matrix product.

    Args:
        n_in: Features of observation and action together.
        hidden: Width of each hidden layer.
        activation: One of `ACTIVATIONS`.
        generator: Source of the weights.
    """

    def __init__(
        self, n_in: int, hidden: Sequence[int], activation: str, *, generator: torch.Generator
    ) -> None:
        shapes = list(itertools.pairwise([n_in, *hidden, 1]))
        weights = [torch.empty(2, a, b) for a, b in shapes]
        for weight, (a, _) in zip(weights, shapes, strict=True):
            weight.uniform_(-(a**-0.5), a**-0.5, generator=generator)
        super().__init__(weights, [torch.zeros(2, 1, b) for _, b in shapes], activation)

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Return Q [2, M] of obs [M, O] and action [M, A]; `frozen` weights get no gradient."""
        x = torch.cat([obs, action], dim=-1).expand(2, -1, -1)
        layers = [*self.layers, self.last]
        if frozen:
            layers = [(weight.detach(), bias.detach()) for weight, bias in layers]
        *inner, (weight, bias) = layers
        for w, b in inner:
            x = self.activation(torch.baddbmm(b, x, w))
        return torch.baddbmm(bias, x, weight).squeeze(-1)

    @torch.no_grad()
    def follow(self, other: TwinCritic, tau: float) -> None:
        """Move the weights towards another's: target = (1 - tau) target + tau other."""
        for own, theirs in zip(self.parameters(), other.parameters(), strict=True):
            own.lerp_(theirs, tau)
