"""How the runs in this directory were made: `python tests/golden/make.py`, once per version.

Each directory holds, for one version of the project, a run of two episodes of each agent as
`co2lightning fit` left it, and in actions.json what `predict` said then. They are kept for ever
and never made anew: tests/resume/test_old_versions.py shows that today's version still verifies
and loads them, and continues those of 0.4.0 and later. Before a release that writes its files in
another way, run this again; it adds a directory for the version and touches no other.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

import co2lightning
from co2lightning.cli import main

GOLDEN = Path(__file__).parent
FLAGS = {
    "A2C": [
        *("--env.num_envs", "4", "--model.group_size", "2", "--model.n_steps", "48"),
        *("--model.hidden", "[4]"),
    ],
    "PPO": [
        *("--env.num_envs", "4", "--model.group_size", "2", "--model.n_epochs", "2"),
        *("--model.batch_size", "96", "--model.hidden", "[4]"),
    ],
    # The buffer is full after an episode and a half: its ring has wrapped once.
    "SAC": [
        *("--env.num_envs", "2", "--model.train_freq", "24", "--model.gradient_steps", "2"),
        *("--model.learning_starts", "96", "--model.buffer_size", "288"),
        *("--model.batch_size", "16", "--model.hidden", "[4]"),
    ],
}


def observations(observation_dim: int) -> np.ndarray:
    """Return three observations [3, O] in [-1, 1] that no later version can change."""
    return np.linspace(-1.0, 1.0, 3 * observation_dim, dtype=np.float32).reshape(3, -1)


def make(target: Path) -> None:
    """Train the runs and keep them in `target`."""
    actions: dict[str, list[list[float]]] = {}
    for agent, flags in FLAGS.items():
        with tempfile.TemporaryDirectory() as place:
            dirs = [f"--checkpoints.dir={place}/checkpoints", f"--logs.dir={place}/logs"]
            words = ["fit", "--model", agent, "--episodes", "2", *flags, *dirs]
            if main(words):
                sys.exit(1)
            run = shutil.copytree(f"{place}/checkpoints/{agent}", target / agent)
        learner = getattr(co2lightning, agent).load_from_checkpoint(run / "episode_0002.pt")
        action, _ = learner.predict(observations(learner.observation_dim))
        actions[agent] = action.tolist()
    (target / "actions.json").write_text(json.dumps(actions, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    place = GOLDEN / co2lightning.__version__
    if place.exists():
        sys.exit(f"{place} is kept as it is")
    make(place)
