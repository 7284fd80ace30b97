"""What an episode costs under Lightning's Trainer, beside the bare loop.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py

One process, the shipped PPO recipe. An episode of `co2lightning fit` (Trainer, callbacks, metrics,
TensorBoard, checkpoint with fsync, history), then one of a bare loop of the same rollout and update
functions that keeps nothing, in turns. The ratio is the median over the pairs.
"""

import argparse
import os
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import torch

from co2lightning.agents import agent_class
from co2lightning.settings.parser import check_settings, complete
from co2lightning.settings.recipe import read_recipe
from co2lightning.sim.days import make_environment
from co2lightning.train.fit import run_fit


class BareLoop:
    """Plays and learns episode after episode without a Trainer."""

    def __init__(self, settings: dict[str, Any], average: Any = None, agent: str = "PPO") -> None:
        groups: dict[str, dict[str, Any]] = {"env": {}, "model": {}}
        for key, value in settings.items():
            group, _, name = key.partition(".")
            if group in groups:
                groups[group][name] = value
        self.env = make_environment(**groups["env"])
        self.agent = agent_class(agent)(
            self.env.observation_dim,
            self.env.action_dim,
            **groups["model"],
        )
        self.agent.train_on(self.env)
        self.dataset = self.agent.train_dataloader()
        # All that the agent asks of a Trainer.
        self.trainer: Any = SimpleNamespace(
            optimizers=[self.agent.configure_optimizers()],
            current_epoch=0,
            global_rank=0,
            is_global_zero=True,
            world_size=1,
        )
        self.agent._trainer = self.trainer
        self.agent.on_train_start()
        self.agent.descent.average = average

    def episode(self) -> None:
        """Play one episode and learn from it."""
        self.agent.on_train_epoch_start()
        for rollout in self.dataset.play():
            self.agent.env_steps += rollout.reward.numel()
            for minibatch in self.agent.minibatches(rollout):
                self.agent.descent(minibatch)
        self.trainer.current_epoch += 1


class Clock:
    """Receives a line after every episode of the Trainer, and has the bare loop play one then."""

    def __init__(self, bare: BareLoop) -> None:
        self.bare = bare
        self.trainer_s: list[float] = []
        self.bare_s: list[float] = []
        self.began: float | None = None

    def __call__(self, line: str) -> None:
        if not line.startswith("Episode"):
            return
        ended = time.perf_counter()
        if self.began is not None:  # the first episode also starts the session
            self.trainer_s.append(ended - self.began)
        ended = time.perf_counter()
        self.bare.episode()
        self.began = time.perf_counter()
        self.bare_s.append(self.began - ended)


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description="Measure what the Trainer adds to an episode.")
    parser.add_argument("--config", default="ppo.yaml", help="a PPO recipe")
    parser.add_argument("--episodes", type=int, default=20)
    arguments = parser.parse_args()
    os.environ["NO_COLOR"] = "1"  # lines, also on a terminal
    torch.set_num_threads(1)
    agent, recipe = read_recipe(arguments.config)
    settings = complete(check_settings(recipe, agent, arguments.config), agent)
    clock = Clock(BareLoop(settings))
    with tempfile.TemporaryDirectory() as place:
        flags: dict[str, Any] = {
            "checkpoints.dir": f"{place}/checkpoints",
            "logs.dir": f"{place}/logs",
        }
        flags["episodes"] = arguments.episodes + 1
        run_fit(flags, agent=agent, config=arguments.config, echo=clock)
    # Each episode under the Trainer lies between two of the bare loop.
    pairs = zip(clock.trainer_s, clock.bare_s, clock.bare_s[1:], strict=False)
    ratios = [2.0 * trainer / (before + after) for trainer, before, after in pairs]
    print(f"{len(ratios)} pairs of episodes of {arguments.config}")
    print(f"under the Trainer: median {statistics.median(clock.trainer_s) * 1000:.0f} ms")
    print(f"bare loop:         median {statistics.median(clock.bare_s) * 1000:.0f} ms")
    print(f"overhead:          median {(statistics.median(ratios) - 1.0) * 100:+.1f} %")


if __name__ == "__main__":
    main()
