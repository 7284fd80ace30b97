"""`--evaluate_every`: how the policy does without noise, so that a run's best episode is known."""

import math
from functools import cached_property
from pathlib import Path

from co2lightning.agents.agent import Agent
from co2lightning.agents.load import load_agent, policy_of
from co2lightning.errors import UserError
from co2lightning.learn import ranks
from co2lightning.metrics import TRAINING
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.days import SiteDays
from co2lightning.sim.weeks import of_uncontrolled, settled_a_day, training_weeks

_IN_WORDS = "of uncontrolled in training weeks"


class Evaluation:
    """Runs an agent through the training weeks of its site after every so many episodes.

    Nothing is drawn at random and nothing of the training is touched. What is found follows from
    the weights alone, and whether there is anything from the absolute episode: so a resumed run
    finds what the uninterrupted one does.

    Args:
        every: After the episodes that this number divides.
        env: The site's environment.
        start: The file of what the run began with, measured beside the first one; without a good
            one that figure is left out.
    """

    def __init__(self, every: int, env: SiteDays, start: Path) -> None:
        self.every = every
        self.env = env
        self.start = start

    def of(self, agent: Agent) -> dict[str, float]:
        """Return the figures of an episode just finished under their tags; all ranks ask."""
        site = self.env.site
        if agent.episode % self.every or not len(training_weeks(site)):
            return {}
        found: dict[str, float] = {}
        if agent.global_rank == 0:
            a_day = self._a_day(agent)
            own = {"eval_vs_uncontrolled": of_uncontrolled(a_day, site), "eval_a_day": a_day}
            figures = {**own, **self._of_start}
            found = {TRAINING[key].tag: float(value) for key, value in figures.items()}
        return ranks.from_first(found) if agent.world_size > 1 else found

    def _a_day(self, agent: Agent) -> float:
        site = self.env.site
        return settled_a_day(policy_of(agent, site), site, agent.device)

    @cached_property
    def _of_start(self) -> dict[str, float]:
        try:
            began = load_agent(TrainingCheckpoint.read(self.start), self.start)
        except UserError:  # a run of an older version has none
            return {}
        a_day = self._a_day(began.to(self.env.model.device))
        share = of_uncontrolled(a_day, self.env.site)
        return {} if math.isnan(share) else {"eval_start_vs_uncontrolled": share}


def best_in_words(run: TrainingCheckpoint) -> str | None:
    """Return a line that says which episode is the best evaluated one; None where none was."""
    best = run.best_evaluated()
    if best is None:
        return None
    share, episode = best
    if not episode:
        return (
            f"No evaluated episode is better than what it started from, {run.path(0).name}: "
            f"{100 * share:.1f} % {_IN_WORDS}; --ckpt_path best takes that"
        )
    return f"Best: episode {episode}, {100 * share:.1f} % {_IN_WORDS}; --ckpt_path best takes it"
