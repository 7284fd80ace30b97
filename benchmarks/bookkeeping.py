"""What keeping every episode costs: a save in milliseconds, and how it grows with the run.

    python benchmarks/bookkeeping.py --episodes 5000

Runs of 50, 500 and 5,000 episodes are made, then continued in turns, so that a busy disk slows all
alike: by saves without pause, and by saves with a pause like that of training, between which the
session's thread writes the JSON files. `save` is save_checkpoint as a whole (serialise, check,
hash, write, fsync, history); `plain` is torch.save to a file and fsync.

Then SAC itself trains 200 episodes in small, and the files of some of them are weighed: what an
episode adds to the disk must not grow with the replay buffer.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.train.fit import run_fit

METRICS = [
    *("co2_kg", "reward", "time_seconds", "unmet_kwh", "co2_vs_uncontrolled", "grid_import_kwh"),
    *("curtailment_kwh", "self_consumption", "loss", "value_loss", "policy_loss", "entropy"),
    *("approx_kl", "clip_fraction", "learning_rate"),
]


def checkpoint(width: int) -> dict[str, Any]:
    """Return what a PPO agent of two hidden layers saves: weights and Adam's two moments."""
    actor = torch.nn.Sequential(
        *(torch.nn.Linear(60, width), torch.nn.Tanh(), torch.nn.Linear(width, width)),
        *(torch.nn.Tanh(), torch.nn.Linear(width, 12)),
    )
    optimizer = torch.optim.Adam(actor.parameters())
    actor(torch.ones(4, 60)).sum().backward()
    optimizer.step()
    return {"state_dict": actor.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def plain_save(content: dict[str, Any], path: Path) -> float:
    """Return the seconds of a bare torch.save with fsync."""
    start = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def save(run: TrainingCheckpoint, content: dict[str, Any], count: int, pause: float) -> list[float]:
    """Save the next episodes of a run and return the seconds that each took."""
    seconds: list[float] = []
    first = run.get_next_episode()
    for episode in range(first, first + count):
        metrics = {name: episode / 7 + i for i, name in enumerate(METRICS)}
        time.sleep(pause)
        start = time.perf_counter()
        run.save_checkpoint(content, episode=episode, metrics=metrics)
        seconds.append(time.perf_counter() - start)
    return seconds


def weigh_sac(place: Path, episodes: int) -> TrainingCheckpoint:
    """Train SAC in small; its buffer is full after 50 episodes."""
    settings = {
        "env.num_envs": 4,
        "model.hidden": [8],
        "model.train_freq": 24,
        "model.gradient_steps": 1,
        "model.batch_size": 16,
        "model.buffer_size": 50 * 4 * 96,
    }
    places = {"checkpoints.dir": str(place / "runs"), "logs.dir": str(place / "logs")}
    flags = {**settings, **places, "episodes": episodes}
    run_fit(flags, agent="SAC", echo=lambda line: None)
    return TrainingCheckpoint(place / "runs" / "SAC")


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description="Measure the cost of saving episodes.")
    parser.add_argument("--lengths", default="50,500,5000", help="episodes of the runs")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each run")
    parser.add_argument("--saves", type=int, default=15, help="saves in a turn")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between paced saves")
    parser.add_argument("--width", type=int, default=64, help="hidden units of the agent")
    parser.add_argument("--sac_episodes", type=int, default=200, help="episodes of SAC")
    parser.add_argument("--directory", default=".", help="disk to measure")
    arguments = parser.parse_args()
    content = checkpoint(arguments.width)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    plain: list[float] = []
    times: dict[int, tuple[list[float], list[float]]] = {length: ([], []) for length in lengths}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        runs = {length: TrainingCheckpoint(Path(place) / f"{length}") for length in lengths}
        for length, run in runs.items():
            run.begin_session(start_episode=1, device="cpu", info={"agent": "PPO", "seed": 0})
            save(run, content, length, 0.0)
        for _ in range(arguments.rounds):
            plain += [plain_save(content, Path(place) / "plain.pt") for _ in range(arguments.saves)]
            for length, run in runs.items():
                for column, pause in enumerate((0.0, arguments.pause)):
                    times[length][column].extend(save(run, content, arguments.saves, pause))
                    time.sleep(1.2)  # until this run's thread is quiet
        for run in runs.values():
            run.end_session("completed")
        size = runs[lengths[0]].path(1).stat().st_size
        history = (runs[lengths[-1]].directory / "history.json").stat().st_size
    print(f"checkpoint {size / 1000:.0f} kB, history of the longest run {history / 1e6:.2f} MB")
    print(f"plain torch.save + fsync: median {statistics.median(plain) * 1000:.2f} ms\n")
    print("        | save without pause        | save with pause")
    print("episode | median ms  mean ms  ratio | median ms  mean ms  ratio")
    for length in lengths:
        columns = [f"{length:7d}"]
        for first, here in zip(times[lengths[0]], times[length], strict=True):
            median, mean = statistics.median(here) * 1000, statistics.fmean(here) * 1000
            columns.append(
                f"{median:9.2f} {mean:8.2f} {mean / statistics.fmean(first) / 1000:6.2f}"
            )
        print(" | ".join(columns))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        run = weigh_sac(Path(place), arguments.sac_episodes)
        print("\nSAC     | checkpoint  replay piece       sum | since the start")
        print("episode |      bytes         bytes     bytes |        megabytes")
        total = 0
        for episode in run.episodes():
            file, piece = (p(episode).stat().st_size for p in (run.path, run.replay_path))
            total += file + piece
            if episode in (1, 10, 50, 100, arguments.sac_episodes):
                print(
                    f"{episode:7d} | {file:10,d} {piece:13,d} {file + piece:9,d} "
                    f"| {total / 1e6:16.2f}"
                )


if __name__ == "__main__":
    main()
