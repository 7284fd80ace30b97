"""How fast the environment is, alone and under a policy, and what an environment takes in memory.

    OMP_NUM_THREADS=1 python benchmarks/environment.py

One core, in seconds of its time, not of the clock's, so that other programs count for little; what
they take of caches and memory still shows. Every figure is the median of whole days, the best one
in brackets. `rollout` is the training's own, a policy of two layers of 64 that acts, observations
and actions kept; `compiled` as with `--model.compile true`, the compiling left out.
Memory is that of the tensors which a day of many environments makes; the site's tables are shared
and counted apart.
"""

import argparse
import gc
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from co2lightning.agents.ppo import PPO
from co2lightning.control.moves import ACTIONS
from co2lightning.learn.dataset import RolloutDataset
from co2lightning.sim.days import SiteDays
from co2lightning.site.load import load_site
from co2lightning.site.model import Site


class Actor(PPO):
    """A fresh PPO agent outside of a Trainer."""

    episode = 1
    global_rank = 0


def day_of(env: SiteDays) -> Callable[[], None]:
    """Return a function that plays a day with actions drawn beforehand."""
    actions = torch.rand(env.horizon, env.num_envs, env.action_dim) * 2.0 - 1.0

    def play() -> None:
        with torch.inference_mode():
            env.reset(0)
            for action in actions:
                env.step(action)

    return play


def episode_of(dataset: RolloutDataset) -> Callable[[], object]:
    """Return a function that plays an episode as training does."""
    return lambda: list(dataset.play())


def steps_per_second(
    play: Callable[[], object], env: SiteDays, seconds: float
) -> tuple[float, float]:
    """Return median and best environment steps a second over days for about `seconds`."""
    play()
    rates: list[float] = []
    start = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - start < seconds:
        began = time.process_time()
        play()
        rates.append(env.horizon * env.num_envs / (time.process_time() - began))
    return statistics.median(rates), max(rates)


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that still live.

    Args:
        tables: Tensors that were there before; views of them are no memory.
    """

    def __init__(self, tables: tuple[object, ...]) -> None:
        super().__init__()
        made = [table for table in tables if isinstance(table, torch.Tensor)]
        self.known = {table.untyped_storage().data_ptr() for table in made}
        self.users: dict[int, int] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place in self.known or (place not in self.users and tensor._base is not None):
                continue  # a view of what was there before
            if place not in self.users:
                self.users[place] = 0
                self.bytes += storage.nbytes()
            self.users[place] += 1
            weakref.finalize(tensor, self.release, place, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def release(self, place: int, size: int) -> None:
        """Forget one of the tensors on a storage."""
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place]
            self.bytes -= size


def memory(site: Site, batch: int, action: str) -> tuple[float, float]:
    """Return the bytes an environment holds between the steps of a day, and within them."""
    env = SiteDays(site, batch, action=action)
    with torch.no_grad(), Held((*env.model, *env.observer, *env.tables)) as held:
        env.reset(0)
        for _ in range(env.horizon - 1):
            env.step(torch.zeros(batch, env.action_dim))
        gc.collect()
        return held.bytes / batch, held.peak / batch


def nbytes(part: object) -> int:
    """Return the bytes of a tensor, or of the tensors in a tuple."""
    if isinstance(part, tuple):
        return sum(map(nbytes, part))
    return part.nbytes if isinstance(part, torch.Tensor) else 0


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description="Measure the environment.")
    parser.add_argument("--site", default="iquitos")
    parser.add_argument("--action", choices=ACTIONS, default="moves")
    parser.add_argument("--sizes", default="1,16,64,256,1024,4096")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    site = load_site(arguments.site)
    print("environments | steps a second, median (best)")
    for size in arguments.sizes.split(","):
        env = SiteDays(site, int(size), action=arguments.action)
        median, best = steps_per_second(day_of(env), env, arguments.seconds)
        print(f"{size:>12} | {median:9,.0f} ({best:,.0f})")
    for compile in (False, True):
        env = SiteDays(site, 64, action=arguments.action)
        actor = Actor(env.observation_dim, env.action_dim, compile=compile)
        actor.say = lambda line: None
        dataset = RolloutDataset(env, actor)
        median, best = steps_per_second(episode_of(dataset), env, arguments.seconds)
        print(f"  rollout 64 | {median:9,.0f} ({best:,.0f}){' compiled' if compile else ''}")
    between, within = memory(site, 64, arguments.action)
    tables = sum(nbytes(part) for part in (*env.model, *env.observer))
    print(f"memory of an environment: {between / 1000:.1f} kB kept between steps,", end=" ")
    print(f"{within / 1000:.1f} kB at the peak of one;", end=" ")
    print(f"{tables / 1e6:.0f} MB of tables for all")


if __name__ == "__main__":
    main()
