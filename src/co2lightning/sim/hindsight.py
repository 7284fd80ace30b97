"""What only hindsight knows: how the next day goes for the rule RBC B.

Days differ far more than actions do, so most of what a policy gradient sees is weather. Two things
take that out without changing what is best. The reward is measured against the rule in the same
step (see `objective`). And a critic, which only training needs, may look ahead: it observes what
the next day will be, while the policy never does. A baseline may depend on all inputs that no
action changes: Mao et al. 2018 (arXiv:1807.02264); a critic with more to see than its actor:
Pinto et al. 2017 (arXiv:1710.06542).

Shapes: P steps of the site, K = 11 features.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from co2lightning.control.observation import HIGHEST, centre_and_spread
from co2lightning.sim.schedule import Course
from co2lightning.site.model import DAY_H, Floats, Site

HINDSIGHT = (
    "the rule's state of charge, 0-1",
    "energy it owes to the vehicles present",
    "energy it will curtail within 24 hours",
    "energy it will import within 24 hours",
    "what it will cost, CO2 or money, within 24 hours",
    "energy it will curtail within 2 hours",
    "energy it will import within 2 hours",
    "energy it will curtail within 6 hours",
    "energy it will import within 6 hours",
    "its highest state of charge within 24 hours, 0-1",
    "its lowest state of charge within 24 hours, 0-1",
)
"""Each less its mean and in units of its spread on the training days, as observations are."""


def hindsight(site: Site, rule: Course) -> Floats:
    """Return the features [P + 1, K], each step at its place; beyond the series nothing happens.

    Args:
        site: The site.
        rule: The run of RBC B through the whole series.
    """
    a_day = site.steps(DAY_H)
    before = [site.battery.soc_min if site.battery else 0.0]
    soc = np.concatenate([before, rule.soc])
    later = sliding_window_view(np.pad(soc[1:], (0, a_day), mode="edge"), a_day)
    curtailed, imported = np.maximum(-rule.grid_kw, 0.0), np.maximum(rule.grid_kw, 0.0)
    features = np.stack(
        [
            soc,
            np.append(rule.owed_kw, 0.0),
            _ahead(curtailed, a_day),
            _ahead(imported, a_day),
            _ahead(site.objective.of(rule.co2_kg, rule.cost), a_day),
            _ahead(curtailed, site.steps(2.0)),
            _ahead(imported, site.steps(2.0)),
            _ahead(curtailed, site.steps(6.0)),
            _ahead(imported, site.steps(6.0)),
            later.max(axis=1),
            later.min(axis=1),
        ]
    )
    centre, spread = centre_and_spread(features[:, :-1][:, site.training_steps])
    gain = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    observed = (features - centre[:, None]) * gain[:, None]
    return observed.clip(-HIGHEST, HIGHEST).T


def _ahead(values: Floats, steps: int) -> Floats:
    """Return the sums [P + 1] of each step [P] and those after it, `steps` in all."""
    until = np.concatenate([[0.0], values.cumsum(), np.full(steps, values.sum())])
    return until[steps : steps + len(values) + 1] - until[: len(values) + 1]
