"""`--evaluate_every`: how the policy does without noise, so that a run's best episode is known."""

import math
from pathlib import Path

import torch

from co2lightning.agents.agent import Agent
from co2lightning.agents.load import load_agent, policy_of
from co2lightning.errors import UserError
from co2lightning.learn import ranks
from co2lightning.metrics import TRAINING
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.days import SiteDays
from co2lightning.sim.weeks import of_uncontrolled, settled_a_day, training_weeks

_IN_WORDS = "of uncontrolled in training weeks"
_KEYS = "eval_vs_uncontrolled", "eval_a_day", "eval_start_vs_uncontrolled"


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
        self._start_share: float | None = None  # NaN where there is none

    def of(self, agent: Agent) -> dict[str, float]:
        """Return the figures of an episode just finished under their tags; all ranks ask."""
        if agent.episode % self.every or not len(training_weeks(self.env.site)):
            return {}
        figures = torch.zeros(len(_KEYS), dtype=torch.float64)
        if agent.global_rank == 0:
            figures = torch.tensor(self._measured(agent), dtype=torch.float64)
        if agent.world_size > 1:
            figures = ranks.from_first(figures.to(agent.device))
        own, a_day, start = figures.tolist()
        known = dict(zip(_KEYS, (own, a_day, start), strict=True))
        if math.isnan(start):
            del known[_KEYS[-1]]
        return {TRAINING[key].tag: value for key, value in known.items()}

    def _measured(self, agent: Agent) -> tuple[float, float, float]:
        site = self.env.site
        a_day = settled_a_day(policy_of(agent, site), site, agent.device)
        if self._start_share is None:
            self._start_share = math.nan
            try:
                began = load_agent(TrainingCheckpoint.read(self.start), self.start)
            except UserError:  # a run of an older version has none
                pass
            else:
                began = began.to(agent.device)
                of_start = settled_a_day(policy_of(began, site), site, agent.device)
                self._start_share = of_uncontrolled(of_start, site)
        return of_uncontrolled(a_day, site), a_day, self._start_share


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
