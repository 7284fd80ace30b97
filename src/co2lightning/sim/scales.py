"""The observer of a site: what observations are measured in is found by running it.

Shapes: B runs at once, A = 2 actions.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.forecast import forecast, untouched
from co2lightning.control.moves import MoveTables
from co2lightning.control.observation import Observer, build_observer, in_world
from co2lightning.control.outlook import outlook_of
from co2lightning.control.rules import Rule, rbc_b, uncontrolled
from co2lightning.control.state import Powers, SiteModel, State
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import run, start
from co2lightning.site.model import Site

_MOST_RUNS = 48  # training days, evenly spread
_SHORTEST_DAY_H = 23.0
_LONG = 60_000  # steps; its forecasts, 100 MB each and more, are rather made anew than kept


def observer_of(site: Site, device: torch.device | str = "cpu") -> Observer:
    """Return the observer of a site, made once a process and device.

    The spread of what is observed of a state is that of the training days, run by two rules and
    by a policy that wanders, from batteries of all levels. In another world it is that of the site
    itself.
    """
    return _observer_of(site, torch.device(device))


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # what it would make can never be trained on
def _observer_of(site: Site, device: torch.device) -> Observer:
    if device.type != "cpu":
        return _moved(observer_of(site), device)
    if site.fitted_on:
        own = observer_of(site.fitted_on)
        observer = in_world(own, site, priced_model(site), outlook_of(site))
    else:
        observer = _built(site)
    if site.n_steps > _LONG:
        forecast.cache_clear()
    return observer


def _built(site: Site) -> Observer:
    model = priced_model(site)
    training = site.training_days
    clear = training[untouched(site)[site.day_bounds[training]]]
    among = clear if len(clear) else training
    # Not every seventh day: that would be the same day of each week.
    evenly = np.linspace(0, len(among) - 1, min(len(among), _MOST_RUNS))
    days = among[evenly.round().astype(np.int64)]
    battery = site.battery
    least, most = (battery.least_soc, battery.soc_max) if battery else (0.0, 0.0)
    soc = torch.linspace(least, most, len(days))
    begun = start(model, site, site.day_bounds[days], soc)

    def record(watch: Callable[[State], None]) -> None:
        for rule in (rbc_b, uncontrolled, _wander):
            run(model, watched(rule, watch), begun, site.steps(_SHORTEST_DAY_H))

    return build_observer(site, model, outlook_of(site), record)


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, Observer | MoveTables):
        return type(part)(*(_moved(inner, device) for inner in part))
    return part.to(device) if isinstance(part, Tensor) else part


def watched(rule: Rule, watch: Callable[[State], None]) -> Rule:
    """Return a rule that shows each state it decides in."""

    def decide(model: SiteModel, state: State) -> Tensor | Powers:
        watch(state)
        return rule(model, state)

    return decide


def _wander(model: SiteModel, state: State) -> Tensor:
    """Swing both actions to and fro, the one in seven hours, the other in eleven."""
    hours = state.place * model.step_h
    return torch.stack([(2 * math.pi / period * hours).sin() for period in (7, 11)], dim=1)
