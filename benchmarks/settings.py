"""How a recipe learns with other settings, judged on the training days alone.

    python benchmarks/settings.py --agent PPO --episodes 10 --seeds 10,11,12 \
        --try "" --try "model.n_epochs=5" --try "model.n_epochs=5 model.activation=relu"

Each `--try` is one variant: keys of the recipe and their values, none for the recipe as it is.
Every run is `co2lightning fit`, a process with one torch thread in a temporary directory. The table
gives the deterministic policy's kg CO2 a day less those of the rule RBC B in the same training
weeks, as if these were held out, so the held-out ones stay unseen until a choice is made.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from co2lightning.agents.load import load_agent, policy_of
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.evaluate import evaluate, summarise
from co2lightning.site.load import load_site
from co2lightning.site.model import Site

WEEK = 7  # days


def in_training_weeks(site: Site, every: int) -> Site:
    """Return a site whose stretches are every so many of the weeks that it trains on."""
    weeks = [
        (day, day + WEEK)
        for day in range(0, len(site.days) - WEEK + 1, WEEK)
        if not site.held_out[day : day + WEEK].any()
    ]
    return replace(site, stretches=np.array(weeks[::every]))


def main() -> None:
    """Train every variant with every seed; print a row for each."""
    parser = argparse.ArgumentParser(description="Variants of a recipe, on the training days.")
    parser.add_argument("--agent", default="PPO", help="a recipe: PPO is ppo.yaml")
    parser.add_argument("--episodes", type=int, default=10, help="of each run")
    parser.add_argument("--at", default="", help="episodes to judge, comma separated; default last")
    parser.add_argument("--seeds", default="10,11,12", help="comma separated")
    parser.add_argument("--site", default="iquitos", help="a shipped site")
    parser.add_argument("--every", type=int, default=3, help="every so many training weeks")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--try", action="append", default=[], dest="variants", metavar="SETTINGS")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    variants: list[str] = arguments.variants or [""]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    at = [int(episode) for episode in arguments.at.split(",") if episode] or [arguments.episodes]
    site = in_training_weeks(load_site(arguments.site), arguments.every)
    references = evaluate(None, site)

    def train(run: tuple[int, str, int], place: Path) -> tuple[dict[int, float], float]:
        number, settings, seed = run
        name = f"{number}-{seed}"
        command = [sys.executable, "-m", "co2lightning", "fit", "--name", name]
        command += ["--config", f"{arguments.agent.lower()}.yaml", "--seed_everything", str(seed)]
        command += ["--episodes", str(arguments.episodes), "--env.site", site.name]
        command += [f"--{setting}" for setting in settings.split()]
        subprocess.run(
            command,
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        files = TrainingCheckpoint(place / "checkpoints" / name)
        above: dict[int, float] = {}
        seconds: list[float] = []
        for episode in range(1, arguments.episodes + 1):
            content = files.read(files.path(episode))
            seconds.append(content["metrics"]["time_seconds"])
            if episode in at:
                policy = policy_of(load_agent(content, files.path(episode)), site)
                found = summarise(evaluate(policy, site, references))
                above[episode] = found["agent"].co2_kg - found["rbc_b"].co2_kg
        return above, statistics.median(seconds)

    runs = [(n, variant, seed) for n, variant in enumerate(variants) for seed in seeds]
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda run: train(run, Path(place)), runs))
    columns = " | ".join(f"after {episode}" for episode in at)
    print(f"| settings | {columns} | s an episode |")
    print("|---|" + "---|" * (len(at) + 1))
    for n, variant in enumerate(variants):
        mine = results[n * len(seeds) : (n + 1) * len(seeds)]
        cells = [" ".join(f"{above[episode]:+.1f}" for above, _ in mine) for episode in at]
        seconds = statistics.median(s for _, s in mine)
        print(f"| {variant or 'the recipe'} | {' | '.join(cells)} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
