"""What the ranks of a distributed run tell each other.

A rank is one process with its own days, one of `world_size`. Lightning starts and connects them;
they hold the same weights because they take the same steps: each gradient is averaged between
`Descent.gradient` and `Descent.step`. DistributedDataParallel's own hooks never see it, since an
update asks autograd for the gradients alone.

Every function that sends waits for all ranks, which therefore must all call it.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Rank(NamedTuple):
    """Which process of how many this is."""

    number: int = 0
    world_size: int = 1


def average(values: Tensor) -> Tensor:
    """Return the mean of a tensor over the ranks, the same bits on each.

    Gathered and summed in the ranks' order: for tensors of this size gloo takes half as long as for
    `all_reduce`, and the sum does not depend on how a library routes its messages.
    """
    return together(values.unsqueeze(0)).mean(0)


def together(rows: Tensor) -> Tensor:
    """Return the rows [n, ...] of all ranks [world_size x n, ...], in the ranks' order."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def average_all(tensors: list[Tensor]) -> list[Tensor]:
    """Return the mean of each tensor over the ranks, in one message."""
    flat = average(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def from_first(value: Any) -> Any:
    """Return what rank 0 has, plain data; waits for the device."""
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]


def highest(value: int, device: torch.device) -> int:
    """Return the highest of the ranks' numbers; waits for the device."""
    number = torch.tensor(value, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def agree(value: int, device: torch.device) -> bool:
    """Say whether all ranks have the same number."""
    return highest(value, device) == -highest(-value, device)


def gather(value: Any) -> list[Any] | None:
    """Return what every rank has, in their order, to rank 0; None to the others."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def is_loss(error: BaseException) -> bool:
    """Say whether an error is that of a rank which another one has left alone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
