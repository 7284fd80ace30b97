"""What the ranks of a distributed run tell each other.

A rank is one process with its own days, one of `world_size`. Lightning starts and connects them;
they hold the same weights because they take the same steps: each gradient is averaged between
`Descent.gradient` and `Descent.step`. DistributedDataParallel's own hooks never see it, since an
update asks autograd for the gradients alone.

Every function that sends waits for all ranks, which therefore must all call it.
"""

from __future__ import annotations

import select
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

_CONNECT_S = 60.0  # time for the others to take up their lines
_WATCHED_S = 0.02  # then the others are not about to send: rank 0 writes an episode, say


class Rank(NamedTuple):
    """Which process of how many this is."""

    number: int = 0
    world_size: int = 1


def average(values: Tensor) -> Tensor:
    """Return the mean of a tensor over the ranks, the same bits on each.

    Gathered and summed in the ranks' order: for tensors of this size gloo takes half as long as for
    `all_reduce`, and the sum does not depend on how a library routes its messages.
    """
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts).mean(0)


def average_all(tensors: list[Tensor]) -> list[Tensor]:
    """Return the mean of each tensor over the ranks, in one message."""
    return _apart(average(_together(tensors)), tensors)


def _together(tensors: list[Tensor], out: Tensor | None = None) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors], out=out)


def _apart(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    return list(_unflatten_dense_tensors(flat, like))


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


class Lines:
    """Lines between ranks that are processes of one machine, for tensors on its CPU.

    An update takes milliseconds, and for the gradients of a small network gloo takes two of them:
    three threads sleep until a message is there, and a core that sleeps wakes slowly. These lines
    are watched instead of waited for. Open them with `Lines.open`.
    """

    def __init__(self, number: int, lines: dict[int, socket.socket]) -> None:
        self._number = number
        self._lines = lines
        self._parts = torch.empty(1 + len(lines), 0)  # [ranks, what is averaged]

    @classmethod
    def open(cls) -> Self | None:
        """Connect every rank to every other one; None on each where one cannot have a line."""
        number, size = dist.get_rank(), dist.get_world_size()
        folders = [tempfile.mkdtemp() if number == 0 else None]  # which no other user can enter
        dist.broadcast_object_list(folders)
        folder = Path(str(folders[0]))
        try:
            # No such sockets on this system, a path too long for one, a folder of another machine.
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(folder / str(number)))
            listener.listen(size)
            listener.settimeout(_CONNECT_S)
        except (AttributeError, OSError):
            listener = None
        able = highest(int(listener is None), torch.device("cpu")) == 0
        lines: dict[int, socket.socket] = {}
        if listener and able:
            for other in range(number):
                lines[other] = socket.socket(socket.AF_UNIX)
                lines[other].connect(str(folder / str(other)))
                lines[other].sendall(number.to_bytes(4, "big"))
            for _ in range(number + 1, size):
                line, _ = listener.accept()
                lines[int.from_bytes(line.recv(4), "big")] = line
        if listener:
            listener.close()
        dist.barrier()
        if number == 0:
            shutil.rmtree(folder)
        for line in lines.values():
            line.setblocking(False)
        return cls(number, lines) if able else None

    def average_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the mean of each tensor over the ranks, the same bits as `average_all`'s.

        Raises:
            torch.distributed.DistError: A rank has gone.
        """
        size = sum(tensor.numel() for tensor in tensors)
        if self._parts.shape[1] != size:
            self._parts = torch.empty(len(self._parts), size, dtype=tensors[0].dtype)
        _together(tensors, out=self._parts[self._number])
        rows = [part.numpy().data.cast("B") for part in self._parts]
        outgoing = dict.fromkeys(self._lines.values(), rows[self._number])
        incoming = {line: rows[number] for number, line in self._lines.items()}
        watched_until = time.monotonic() + _WATCHED_S
        while outgoing or incoming:
            if time.monotonic() > watched_until:
                select.select(incoming, outgoing, [])
            _move(socket.socket.send, outgoing)
            _move(socket.socket.recv_into, incoming)
        return _apart(self._parts.mean(0), tensors)


def _move(
    move: Callable[[socket.socket, memoryview], int], pending: dict[socket.socket, memoryview]
) -> None:
    """Send or receive what can be at once; drop from `pending` what is done."""
    for line, part in list(pending.items()):
        try:
            moved = move(line, part)
        except BlockingIOError:
            continue
        except OSError:
            moved = 0
        if not moved:
            raise dist.DistNetworkError("another rank has gone")
        if moved < len(part):
            pending[line] = part[moved:]
        else:
            del pending[line]
