"""What whole commands take: seconds from the command to its exit, and memory at the peak.

    python benchmarks/commands.py

Each is the installed `co2lightning` in an empty directory and a process of its own, as a user
starts it. Seconds are the clock's, so other programs count; those of the processor stand beside.
Memory is the largest resident set of the command's process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

if sys.platform == "win32":
    sys.exit("this benchmark asks POSIX systems what a process took")

COMMANDS = (
    "--help",
    "history",
    "fit --config ppo.yaml --episodes 1",
    "fit --config ppo.yaml",
    "fit --config a2c.yaml",
    "fit --config sac.yaml",
    "fit-all --episodes 10",
)


class Cost(NamedTuple):
    """Of one command."""

    seconds: float
    processor_seconds: float
    megabytes: float


def run(words: str) -> Cost:
    """Run a command where nothing is yet."""
    with tempfile.TemporaryDirectory() as place, open(Path(place) / "out", "w") as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "co2lightning", *words.split()],
            cwd=place,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode and words != "history":  # which has nothing to show
            sys.exit((Path(place) / "out").read_text())
    scale = 1e6 if sys.platform == "darwin" else 1e3  # of maxrss: bytes there, kB elsewhere
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / scale)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure whole commands.")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print("| command | seconds, median | lowest | of the processor | MB at the peak |")
    print("|---|---:|---:|---:|---:|")
    for words in COMMANDS:
        costs = [run(words) for _ in range(arguments.rounds)]
        seconds, processor, megabytes = zip(*costs, strict=True)
        print(
            f"| `co2lightning {words}` | {statistics.median(seconds):.1f} | {min(seconds):.1f} | "
            f"{statistics.median(processor):.1f} | {max(megabytes):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
