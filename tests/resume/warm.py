"""Imported by the server that `processes.fork` forks from: what any start of the command does.

Everything is imported, the site's tables are built and each agent has trained an episode, so that
a forked command trains within half a second, and a kill at a random moment hits the training.
"""

import contextlib
import io
import os
import sys
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"

import test_exact  # noqa: F401

from co2lightning.cli import main
from conftest import TINY

with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
    for agent, tiny in TINY.items():
        dirs = [f"--checkpoints.dir={place}/checkpoints", f"--logs.dir={place}/lightning_logs"]
        words = ["fit", "--model", agent, "--env.num_envs", "4", *tiny, "--episodes", "1", *dirs]
        if main(words):
            sys.exit(1)
