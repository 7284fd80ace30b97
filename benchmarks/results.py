"""Run every benchmark of speed and memory and write what they print, with where and how.

    make bench        this, in the project's environment: benchmarks/RESULTS.md

Half an hour or more. What is learned is measured elsewhere: sites.py and stable_baselines.py,
hours (`make bench-learning`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from sites import machine, versions

PLACE = Path(__file__).parent
SCRIPTS = {
    "peers.py": "Training beside other libraries",
    "environment.py": "The environment alone",
    "actions.py": "Moves beside powers",
    "overhead.py": "What the Trainer adds to an episode",
    "ranks.py": "What two ranks cost each other",
    "bookkeeping.py": "What keeping every episode costs",
    "commands.py": "Whole commands",
}


def main() -> None:
    """Run them and write the page after each."""
    parser = argparse.ArgumentParser(description="Run all benchmarks of speed and memory.")
    parser.add_argument("--output", type=Path, default=PLACE / "RESULTS.md")
    parser.add_argument("--only", default=",".join(SCRIPTS), help="scripts, comma separated")
    arguments = parser.parse_args()
    known = versions() | {name: version(name) for name in ("stable-baselines3", "sbx-rl", "jax")}
    page = [
        "# Speed and memory",
        f"`make bench`, {datetime.now(UTC):%Y-%m-%d}, on {machine()['cpu']}, {machine()['cores']} "
        f"cores, {machine()['system']}; one thread each.",
        ", ".join(f"{name} {number}" for name, number in known.items()),
    ]
    for name in arguments.only.split(","):
        print(f"== {name}", flush=True)
        done = subprocess.run(
            [sys.executable, str(PLACE / name)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        print(done.stdout, flush=True)
        shown = done.stdout.strip()
        if not shown.startswith("|"):
            shown = f"```text\n{shown}\n```"
        page += [f"## {SCRIPTS[name]}", f"`python benchmarks/{name}`", shown]
        arguments.output.write_text("\n\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
