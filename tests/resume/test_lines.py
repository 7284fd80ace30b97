"""The lines between ranks, with real processes."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import fork

from co2lightning.learn import ranks

SIZES = (1, 1000, 300_000)  # the last is more than a line takes at once


def join(number: int, size: int, port: int, body: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=number, world_size=size)
    body(number, *arguments)


def run(size: int, body: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run `body` in as many ranks; return their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [fork(join, number, size, port, body, *arguments) for number in range(size)]
    for process in processes:
        process.join(60.0)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def average_both_ways(number: int, place: str) -> None:
    lines = ranks.Lines.open()
    assert lines
    draws = torch.Generator().manual_seed(number)
    results: list[torch.Tensor] = []
    for size in SIZES:
        values = torch.randn(size, generator=draws)
        for _ in range(3):
            one, mean = lines.average_all([torch.full((1, 2), float(number)), values])
            assert one.shape == (1, 2)
            assert torch.equal(mean, ranks.average(values))
        results.append(mean)
    torch.save(results, f"{place}/{number}.pt")


@pytest.mark.parametrize("size", [2, 3])
def test_lines_average_as_gloo_does(size: int, tmp_path: Path) -> None:
    assert run(size, average_both_ways, str(tmp_path)) == [0] * size
    draws = [torch.Generator().manual_seed(number) for number in range(size)]
    for n, length in enumerate(SIZES):
        mean = torch.stack([torch.randn(length, generator=draw) for draw in draws]).mean(0)
        for number in range(size):
            kept = torch.load(tmp_path / f"{number}.pt", weights_only=True)[n]
            assert torch.equal(kept, mean)


def lose_the_first(number: int, watched_s: float) -> None:
    ranks._WATCHED_S = watched_s  # pyright: ignore[reportPrivateUsage]
    lines = ranks.Lines.open()
    assert lines
    lines.average_all([torch.ones(10)])
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        lines.average_all([torch.ones(300_000)])
    except Exception as error:
        os._exit(7 if ranks.is_loss(error) else 8)


@pytest.mark.parametrize("watched_s", [0.0, 60.0])
def test_a_lost_rank_is_noticed(watched_s: float) -> None:
    assert run(3, lose_the_first, watched_s) == [-signal.SIGKILL, 7, 7]


def have_none(number: int, folder: str) -> None:
    tempfile.tempdir = folder
    assert ranks.Lines.open() is None
    assert torch.equal(ranks.average(torch.full((3,), float(number))), torch.full((3,), 0.5))
    assert not list(Path(folder).iterdir())


def test_where_a_line_cannot_be_there_is_none(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    assert run(2, have_none, str(folder)) == [0, 0]
