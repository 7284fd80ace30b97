"""What an episode of training costs with the weights of moves as the action, beside two powers.

    OMP_NUM_THREADS=1 python benchmarks/actions.py

One process, the shipped recipes on one site, eager, in seconds of one core's time. Two bare loops
of rollout and updates play in turns, alike but for `env.action`; the ratio is the median over the
pairs. Both see the same observations.
"""

import argparse
import statistics
import time

import torch

from co2lightning.settings.parser import check_settings, complete
from co2lightning.settings.recipe import read_recipe
from overhead import BareLoop


def main() -> None:
    """Measure and print a line for each agent."""
    parser = argparse.ArgumentParser(description="Measure what moves cost beside powers.")
    parser.add_argument("--site", default="iquitos")
    parser.add_argument("--agents", default="PPO,A2C,SAC")
    parser.add_argument("--episodes", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{given.site}, {given.episodes} pairs of episodes, CPU-us of an environment step")
    for name in given.agents.split(","):
        config = f"{name.lower()}.yaml"
        agent, recipe = read_recipe(config)
        loops: list[BareLoop] = []
        for action in ("powers", "moves"):
            own = {**recipe, "env.site": given.site, "env.action": action, "model.compile": False}
            loops.append(BareLoop(complete(check_settings(own, agent, config), agent), agent=agent))
        for loop in loops:
            loop.episode()
        took: list[list[float]] = [[], []]
        for _ in range(given.episodes):
            for loop, seconds in zip(loops, took, strict=True):
                began = time.process_time()
                loop.episode()
                seconds.append(time.process_time() - began)
        steps = loops[0].env.horizon * loops[0].env.num_envs
        powers, moves = (1e6 * statistics.median(own) / steps for own in took)
        ratio = statistics.median(b / a for a, b in zip(*took, strict=True))
        print(f"{name}: powers {powers:.1f}, moves {moves:.1f}, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
