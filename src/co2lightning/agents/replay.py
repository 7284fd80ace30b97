"""The replay buffer: a ring of transitions, stored as what each episode added.

Shapes: C transitions of capacity, M of a minibatch, O features, A actions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from co2lightning.learn.dataset import Rollout


class ReplayBatch(NamedTuple):
    obs: Tensor  # [M, O]
    action: Tensor  # [M, A]
    reward: Tensor  # [M]
    next_obs: Tensor  # [M, O]
    terminated: Tensor  # [M] 1.0 at a real end, see `returns.n_step` for others


class Replay:
    """The newest `capacity` transitions, each one row of a table on the agent's device.

    Where a row stands depends only on how many came before it, so a buffer rebuilt from its
    episodes' pieces equals the one that was never interrupted.

    Args:
        capacity: C.
        observation_dim: O.
        action_dim: A.
        device: Where the table is.
    """

    def __init__(
        self, capacity: int, observation_dim: int, action_dim: int, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.sizes = _columns(observation_dim, action_dim)
        self.total = 0  # transitions ever added
        self.table = torch.zeros(capacity, sum(self.sizes), device=device)
        self._added: list[Tensor] = []  # in this episode
        self._began = 0

    def take_up(self, pieces: list[dict[str, Any]]) -> None:
        """Fill an empty buffer with the pieces of its newest episodes, oldest first."""
        self.total = pieces[0]["began"] if pieces else 0
        for piece in pieces:
            self._write(piece["rows"].to(self.table.device))
        self._began = self.total

    def add(self, rollout: Rollout, *, masked: bool) -> None:
        """Add a segment's transitions; `masked` where some of its steps were only resets."""
        rows = torch.cat(
            [
                rollout.obs,
                rollout.action,
                rollout.reward.unsqueeze(-1),
                rollout.next_obs,
                rollout.terminated.unsqueeze(-1),
            ],
            dim=-1,
        ).flatten(0, 1)
        if masked:
            rows = rows[rollout.valid.flatten() > 0.5]
        self._added.append(rows)
        self._write(rows)

    def _write(self, rows: Tensor) -> None:
        self.total += len(rows)
        rows = rows[-self.capacity :]
        start = (self.total - len(rows)) % self.capacity
        first = min(len(rows), self.capacity - start)
        self.table[start : start + first] = rows[:first]
        self.table[: len(rows) - first] = rows[first:]

    def sample(
        self, count: int, size: int, generator: torch.Generator, group_size: int = 1
    ) -> list[ReplayBatch]:
        """Return `count` minibatches, drawn with replacement.

        Each has `size` transitions or what whole groups make of it, at least one: of `group_size`
        rows side by side, a step of windows that begin alike, all are drawn or none.
        """
        device, groups = self.table.device, max(size // group_size, 1)
        filled = min(self.total, self.capacity)
        whole = max(filled // group_size, 1)
        first = torch.randint(whole, (count * groups, 1), generator=generator, device=device)
        index = (first * group_size + torch.arange(group_size, device=device)).flatten() % filled
        batches: list[ReplayBatch] = []
        for rows in self.table.index_select(0, index).split(groups * group_size):
            obs, action, reward, next_obs, terminated = rows.split(self.sizes, dim=1)
            batches.append(
                ReplayBatch(obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1))
            )
        return batches

    def piece(self) -> dict[str, Any]:
        """Return what this episode added, and begin the next piece."""
        rows = torch.cat(self._added).cpu() if self._added else self.table[:0].cpu()
        piece = {"began": self._began, "sizes": list(self.sizes), "rows": rows}
        self._added = []
        self._began = self.total
        return piece


def pieces_of_ranks(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the piece of each rank in a file; it holds the piece itself where one rank trained."""
    pieces = content.get("ranks", [content])
    return pieces if isinstance(pieces, list) else []


def fewest_rows(content: dict[str, Any]) -> int:
    """Return the rows of the rank that added the fewest; each fills a buffer of its own."""
    return min(len(piece["rows"]) for piece in pieces_of_ranks(content))


def is_piece(piece: Any, observation_dim: int, action_dim: int) -> bool:
    """Say whether a file's content is a piece that `Replay` can take up, of these sizes."""
    if not isinstance(piece, dict):
        return False
    began, rows = piece.get("began"), piece.get("rows")
    sizes = _columns(observation_dim, action_dim)
    return (
        piece.get("sizes") == list(sizes)
        and type(began) is int
        and began >= 0
        and isinstance(rows, Tensor)
        and rows.dtype == torch.float32
        and rows.dim() == 2
        and rows.shape[1] == sum(sizes)
        and bool(rows.isfinite().all())
    )


def _columns(observation_dim: int, action_dim: int) -> tuple[int, ...]:
    """Return the widths of a row's parts: obs, action, reward, next_obs, terminated."""
    return observation_dim, action_dim, 1, observation_dim, 1
