"""What two ranks cost each other, beside one process alone.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py

Two processes, the shipped PPO recipe, rollout and updates as under the Trainer. In each round an
episode is played in three ways: by one process while the other sleeps; by both at once, each for
itself, which is what the machine leaves of two cores; and as ranks that average their gradients
over gloo. Of the second way it is also worked out what it would have taken had each update lasted
as long as the slower process's: ranks whose messages cost nothing would take that. The ratios, to
the episode alone in the same round, are environment steps per second of a rank; the median over
the rounds.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from co2lightning.learn import ranks
from co2lightning.settings.parser import check_settings, complete
from co2lightning.settings.recipe import read_recipe
from overhead import BareLoop

WARM_UP = 2  # rounds
BOTH, FREE = "both at once, each for itself", "ranks, were messages free"


def timed_updates(loop: BareLoop) -> list[float]:
    """Return a list that the seconds of the loop's next updates will be added to."""
    seconds: list[float] = []
    descent = loop.agent.descent

    def descend(batch: Any) -> None:
        began = time.perf_counter()
        descent(batch)
        seconds.append(time.perf_counter() - began)

    loop.agent.descend = descend
    return seconds


def play(number: int, port: int, config: str, compiled: bool, rounds: int) -> None:
    """Be one of the two processes; the first prints the table."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=2)
    agent, recipe = read_recipe(config)
    settings = complete(check_settings(recipe, agent, config), agent)
    settings["model.compile"] = compiled
    ways: dict[str, Any] = {
        "alone": None,
        BOTH: None,
        "ranks": ranks.average_all,
    }
    loops = {name: BareLoop(settings, average) for name, average in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, FREE)}
    for _ in range(WARM_UP + rounds):
        for name, loop in loops.items():
            updates = timed_updates(loop)
            dist.barrier()
            began = time.perf_counter()
            if name != "alone" or number == 0:
                loop.episode()
            seconds[name].append(time.perf_counter() - began)
            if name == BOTH:
                every = [torch.zeros(len(updates)) for _ in range(2)]
                dist.all_gather(every, torch.tensor(updates))
                slower = torch.stack(every).amax(0).sum() - sum(updates)
                seconds[FREE].append(seconds[name][-1] + float(slower))
    if number == 0:
        print(f"{rounds} rounds of an episode of {config}, {'compiled' if compiled else 'eager'}")
        alone = seconds["alone"][WARM_UP:]
        for name, each in seconds.items():
            ratios = [a / b for a, b in zip(alone, each[WARM_UP:], strict=True)]
            print(
                f"{name:29} | {statistics.median(each[WARM_UP:]) * 1000:4.0f} ms | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    dist.destroy_process_group()


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description="Measure what two ranks cost each other.")
    parser.add_argument("--config", default="ppo.yaml", help="a PPO recipe")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = (port, arguments.config, arguments.compile, arguments.rounds)
    mp.spawn(play, args=words, nprocs=2)


if __name__ == "__main__":
    main()
