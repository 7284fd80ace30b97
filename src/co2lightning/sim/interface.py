"""What a rollout needs of an environment, whatever is simulated.

Shapes: B copies at once, A actions, O features, n steps.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

NOMINAL_STEP_MINUTES = 15
"""The step that what agents' settings give per step is meant for; it follows an environment's."""


class Step(NamedTuple):
    """What one step of B environments gave."""

    obs: Tensor  # [B, O] after the step; of the finished episode where one ended
    reward: Tensor  # [B]
    terminated: Tensor  # [B] 1.0 where the future is worth nothing
    truncated: Tensor  # [B] 1.0 where only the clock stopped it
    valid: Tensor  # [B] 0.0 where the step was a reset, not a transition


class Environment(Protocol):
    """What a rollout needs of an environment: B copies in lockstep, tensors on one device."""

    num_envs: int
    observation_dim: int
    action_dim: int
    horizon: int
    step_minutes: int
    observation_names: tuple[str, ...]  # () where they have none
    may_reset: bool  # whether a step can be a reset instead of a transition
    discount: float  # a step, of who learns from its rewards

    def to(self, device: torch.device) -> None: ...
    def show(self, names: tuple[str, ...], who: str = "the agent") -> None: ...
    def let_begin_alike(self, size: int) -> int: ...
    def reset(self, seed: int) -> Tensor: ...
    def step(self, action: Tensor) -> Step: ...
    def metrics(self, mean: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]: ...
