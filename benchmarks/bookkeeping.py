"""What keeping every episode costs: a save in milliseconds, and how it grows with the run.

    python benchmarks/bookkeeping.py --episodes 5000

One run is saved without pause; around each mark the saves are measured, first without pause, then
with a pause like that of training, during which the session's thread writes the JSON files.
`save` is save_checkpoint as a whole (serialise, check, hash, write, fsync, history); `plain` what
it is compared with: torch.save to a file and fsync.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from co2lightning.checkpoints import TrainingCheckpoint

METRICS = (
    "co2_kg reward time_seconds unmet_kwh co2_vs_uncontrolled grid_import_kwh curtailment_kwh "
    "self_consumption loss value_loss policy_loss entropy approx_kl clip_fraction learning_rate"
).split()


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


def measure(
    directory: Path, content: dict[str, Any], marks: list[int], window: int, pause: float
) -> dict[int, tuple[list[float], list[float]]]:
    """Save a run; return, for each mark, the seconds of saves without and with a pause."""
    times: dict[int, tuple[list[float], list[float]]] = {mark: ([], []) for mark in marks}
    run = TrainingCheckpoint(directory)
    run.begin_session(start_episode=1, device="cpu", info={"agent": "PPO", "seed": 0})
    for episode in range(1, marks[-1] + window + 1):
        metrics = {name: episode / 7 + i for i, name in enumerate(METRICS)}
        paced = [mark for mark in marks if mark < episode <= mark + window]
        if paced:
            time.sleep(pause)
        start = time.perf_counter()
        run.save_checkpoint(content, episode=episode, metrics=metrics)
        seconds = time.perf_counter() - start
        for mark in marks:
            if mark - window < episode <= mark + window:
                times[mark][mark in paced].append(seconds)
    run.end_session("completed")
    return times


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure the cost of saving episodes.")
    parser.add_argument("--episodes", type=int, default=5000, help="length of the run")
    parser.add_argument("--window", type=int, default=50, help="saves measured at each mark")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between paced saves")
    parser.add_argument("--width", type=int, default=64, help="hidden units of the agent")
    parser.add_argument("--directory", default=".", help="disk to measure")
    arguments = parser.parse_args()
    content = checkpoint(arguments.width)
    marks = [mark for mark in (50, 500, 5000, 50_000) if mark <= arguments.episodes]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        run = Path(place) / "PPO"
        plain = [plain_save(content, Path(place) / "plain.pt") for _ in range(50)]
        times = measure(run, content, marks, arguments.window, arguments.pause)
        size = (run / "episode_0001.pt").stat().st_size
        history = (run / "history.json").stat().st_size
    print(f"checkpoint {size / 1000:.0f} kB, history after the run {history / 1e6:.2f} MB")
    print(f"plain torch.save + fsync: median {statistics.median(plain) * 1000:.2f} ms\n")
    print("        | without pause             | with pause")
    print("episode | median ms  mean ms  ratio | median ms  mean ms  ratio")
    for mark in marks:
        columns = [f"{mark:7d}"]
        for first, here in zip(times[marks[0]], times[mark], strict=True):
            median, mean = statistics.median(here) * 1000, statistics.fmean(here) * 1000
            columns.append(
                f"{median:9.2f} {mean:8.2f} {mean / statistics.fmean(first) / 1000:6.2f}"
            )
        print(" | ".join(columns))


if __name__ == "__main__":
    main()
