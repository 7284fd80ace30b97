"""Twenty losses of each agent, written down: a refactor must give the same ones.

`python tests/learning/test_golden.py` writes them anew, for a change that is meant to move them.
"""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
from probes import SETTINGS

from co2lightning.agents import AGENTS, agent_class
from co2lightning.sim.days import SiteDays
from co2lightning.sim.foreign import GymEnvironment
from co2lightning.sim.interface import Environment
from small_site import random_site

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
EPISODES = 20


def losses(name: str) -> list[float]:
    """Return the mean loss of each of 20 episodes on a probe that needs everything."""
    env: Environment = GymEnvironment("probe/ActionFollowsObservation-v0", num_envs=4)
    if name == "APG":  # which needs a site
        env = SiteDays(random_site(3, days=4), 4, action="moves")
    options = {**SETTINGS[name], "seed": 3, "learning_rate": 1e-3}
    if name == "SAC":
        options["learning_starts"] = 0
    options["observation_names"] = env.observation_names
    agent = agent_class(name)(env.observation_dim, env.action_dim, **options)
    found: list[float] = []

    class Listen(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if agent.metrics:
                found.append(agent.metrics["train/loss"])

    trainer = pl.Trainer(
        max_epochs=EPISODES + 1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Listen()],
    )
    agent.train_on(env)
    trainer.fit(agent)
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:lightning")
@pytest.mark.parametrize("name", AGENTS)
def test_losses_are_the_golden_ones(name: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert len(golden) == EPISODES
    assert losses(name) == pytest.approx(golden, rel=1e-3, abs=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in AGENTS}, indent=1) + "\n")
