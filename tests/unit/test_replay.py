"""The ring of transitions: wraps right, forgets the oldest, is rebuilt exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from co2lightning.agents.replay import Replay, is_piece
from co2lightning.learn.dataset import Rollout


def segment(first: int, count: int) -> Rollout:
    """Return `count` transitions of one environment whose reward is their running number."""
    number = torch.arange(first, first + count, dtype=torch.float32).unsqueeze(1)
    ones = torch.ones_like(number)
    obs = number.unsqueeze(-1).repeat(1, 1, 3)
    return Rollout(
        obs=obs,
        action=obs[..., :1],
        reward=number,
        next_obs=obs + 1,
        terminated=0 * ones,
        truncated=0 * ones,
        valid=ones,
    )


def empty(capacity: int) -> Replay:
    """Return a buffer of transitions such as `segment` has."""
    return Replay(capacity, 3, 1, torch.device("cpu"))


def rewards(replay: Replay) -> list[float]:
    return replay.table[:, 4].tolist()


def test_it_wraps_and_forgets_the_oldest() -> None:
    replay = empty(5)
    for first in (0, 3, 6):
        replay.add(segment(first, 3), masked=False)
    assert rewards(replay) == [5, 6, 7, 8, 4]
    assert replay.total == 9


def test_a_segment_larger_than_the_buffer_keeps_its_end_in_place() -> None:
    replay = empty(5)
    replay.add(segment(0, 12), masked=False)
    assert rewards(replay) == [10, 11, 7, 8, 9]


@pytest.mark.parametrize(("capacity", "newest"), [(4, 1), (5, 2), (7, 2), (8, 3), (12, 4), (99, 4)])
def test_pieces_rebuild_it_exactly(capacity: int, newest: int) -> None:
    """The newest pieces that fill the buffer are enough, wherever the ring stood."""
    replay = empty(capacity)
    pieces: list[dict[str, Any]] = []
    first = 0
    for count in (4, 3, 4, 4):
        replay.add(segment(first, count), masked=False)
        first += count
        pieces.append(replay.piece())
    rebuilt = empty(capacity)
    rebuilt.take_up(pieces[-newest:])
    assert torch.equal(rebuilt.table, replay.table)
    assert rebuilt.total == replay.total
    for buffer in (replay, rebuilt):  # and both go on alike
        buffer.add(segment(first, 3), masked=False)
    assert torch.equal(rebuilt.table, replay.table)
    assert torch.equal(rebuilt.piece()["rows"], replay.piece()["rows"])


def test_resets_are_left_out_and_samples_are_reproducible() -> None:
    replay = empty(10)
    rollout = segment(0, 4)
    rollout = rollout._replace(valid=torch.tensor([[1.0], [0.0], [1.0], [1.0]]))
    replay.add(rollout, masked=True)
    assert replay.total == 3
    draws = [replay.sample(3, 8, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert all(torch.equal(a.reward, b.reward) for a, b in zip(*draws, strict=True))
    seen = {float(r) for batch in draws[0] for r in batch.reward}
    assert seen == {0.0, 2.0, 3.0}


def test_a_group_is_drawn_whole() -> None:
    """Rows 0 to 2 are a group, 3 to 5 the next."""
    replay = empty(7)
    replay.add(segment(0, 6), masked=False)
    for size, rows in ((8, 6), (3, 3), (1, 3)):
        batches = replay.sample(20, size, torch.Generator().manual_seed(1), 3)
        drawn = torch.stack([batch.reward for batch in batches]).unflatten(1, (-1, 3))
        assert drawn.shape == (20, rows // 3, 3)
        assert (drawn - drawn[..., :1] == torch.arange(3.0)).all()
        assert set(drawn[..., 0].flatten().tolist()) == {0.0, 3.0}


def test_a_buffer_smaller_than_a_group_gives_what_it_has() -> None:
    replay = empty(2)
    replay.add(segment(0, 4), masked=False)
    (batch,) = replay.sample(1, 6, torch.Generator().manual_seed(1), 3)
    assert batch.reward.tolist() == [2.0, 3.0, 2.0] * 2


def test_a_cut_is_no_end() -> None:
    """A window stopped by the clock: the next observation is real and its value counts."""
    replay = empty(4)
    rollout = segment(0, 4)
    rollout.truncated[-1] = 1.0
    replay.add(rollout, masked=False)
    obs, _, _, next_obs, terminated = replay.table.split(replay.sizes, dim=1)
    assert not terminated.any()
    assert torch.equal(next_obs, obs + 1)


def test_what_is_no_piece_is_told() -> None:
    replay = empty(10)
    replay.add(segment(0, 4), masked=False)
    good = replay.piece()
    assert is_piece(good, 3, 1)
    assert is_piece({**good, "rows": good["rows"][:0]}, 3, 1)
    assert not is_piece(good, 4, 1)
    assert not is_piece({}, 3, 1)
    for bad in (
        *({"began": -1}, {"began": True}, {"began": 1.5}),
        *({"sizes": [10**12, 1, 1, 3, 1]}, {"sizes": [3, 1, 1]}, {"sizes": 3}),
        *({"rows": [[0.0] * 9]}, {"rows": good["rows"][0]}, {"rows": good["rows"][:, 1:]}),
        {"rows": good["rows"].double()},
    ):
        assert not is_piece({**good, **bad}, 3, 1), bad
