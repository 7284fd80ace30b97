"""Training weeks, evenly spread: on them RBC C is searched and a policy judged while it trains.

Each begins as evaluation begins and goes in one go. What a policy leaves at its end is settled by
what the best operation of the two days after it would still cost. Where these are held out nobody
looks at them: what is left is priced at 0.8 times the mean.

Shapes: W weeks, C columns of sockets.
"""

import functools
from collections import Counter

import numpy as np
import torch

from co2lightning.control.rules import Rule, uncontrolled
from co2lightning.sim.objective import priced_model, unit_a_day, unserved_price
from co2lightning.sim.optimum import tail_objective
from co2lightning.sim.schedule import play, start_kwh
from co2lightning.site.model import DAY_H, TAIL_H, Floats, Ints, Site

_WEEKS = 6
_WEEK = 7  # days
_LEFT_SHARE = 0.8  # of the mean price: what a kWh is worth that is stored or owed at a week's end


@functools.lru_cache(maxsize=8)
def training_weeks(site: Site) -> Ints:
    """Return the places [W, 2] where training weeks begin and end, of one length, evenly spread.

    Those that follow held-out days look back on them: they are left out where others are enough.
    A site without whole training weeks has days instead, one without either has none.
    """
    for days in (_WEEK, 1):
        first = np.arange(0, len(site.days) - days + 1, days)
        bounds = np.stack([site.day_bounds[first], site.day_bounds[first + days]], axis=1)
        known = [not site.held_out[a : a + days].any() for a in first]
        if not any(known):
            continue
        lengths = np.diff(bounds, axis=1)[:, 0]  # a week in which clocks change is longer
        usual = Counter(lengths[known].tolist()).most_common(1)[0][0]
        good = known & (lengths == usual)
        calm = good & [not site.held_out[max(a - _WEEK, 0) : a].any() for a in first]
        most = _WEEKS * _WEEK // days
        own = bounds[calm if calm.sum() >= most else good]
        count = min(most, len(own))
        return own[(2 * np.arange(count) + 1) * len(own) // (2 * count)]
    return np.zeros((0, 2), dtype=np.int64)


def left_price(site: Site) -> float:
    """Return what a kWh owed at a week's end is priced at, and one stored the other way."""
    return _LEFT_SHARE * float(site.import_price[site.training_steps].mean())


def settled_a_day(policy: Rule, site: Site, device: torch.device | str = "cpu") -> float:
    """Return what a policy's objective comes to in the training weeks, settled, a day.

    Where drivers announce, what they then go without counts at the mean price.

    Whoever leaves what charging on arrival leaves, and in the battery what was there, settles at 0.

    Args:
        policy: In the form of a rule.
        site: The site; it has training weeks.
        device: Where the policy acts.

    Returns:
        In the objective's unit; NaN where the policy's actions are no finite numbers.
    """
    total, bounds = -float(_standard(site).sum()), training_weeks(site)
    weeks = play(priced_model(site, device), policy, site, bounds)
    for end, played in zip(bounds[:, 1].tolist(), weeks, strict=True):
        plan = played.schedule
        counted = float(site.objective.of(plan.co2_kg, plan.cost).sum())
        if not np.isfinite(counted):
            return float("nan")
        unserved_kwh = float(plan.unmet_kwh.sum()) if site.told is not None else 0.0
        total += counted + unserved_price(site) * unserved_kwh
        total += _left(site, end, played.stored_kwh, played.owed_kwh)
    return total / float(np.diff(bounds).sum() * site.step_h / DAY_H)


def of_uncontrolled(a_day: float, site: Site) -> float:
    """Return what `settled_a_day` gives as a share of what it is without control.

    Where that is nothing, or money is earned: 1 less what is gained, in the site's unit of a day.
    """
    without = _uncontrolled_a_day(site)
    return 1.0 - (without - a_day) / unit_a_day(site, without)


@functools.lru_cache(maxsize=4)
def _uncontrolled_a_day(site: Site) -> float:
    return settled_a_day(uncontrolled, site)


@functools.lru_cache(maxsize=4)
def _standard(site: Site) -> Floats:
    """Return what charging on arrival leaves to do [W], the battery as it was at the begin."""
    stored_kwh = start_kwh(site)
    ends = training_weeks(site)[:, 1].tolist()
    return np.array([_left(site, end, stored_kwh, site.owed_on_arrival_kwh(end)) for end in ends])


def _left(site: Site, end: int, stored_kwh: float, owed_kwh: Floats) -> float:
    """Return what it still costs to give vehicles what they are owed [C], less what is stored."""
    if site.training_steps[end : end + site.steps(TAIL_H)].all():
        return tail_objective(site, end, stored_kwh, owed_kwh)
    return left_price(site) * (float(owed_kwh.sum()) - stored_kwh)
