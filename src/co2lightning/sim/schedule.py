"""Schedules: what a policy, a rule or the optimum does in every step of held-out days.

Shapes: T = 96 steps a day, D days.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.rules import Rule
from co2lightning.control.state import SiteModel, begin_day
from co2lightning.sim.objective import Booked, book, settle
from co2lightning.sim.physics import Flows, step
from co2lightning.site.model import Floats, Site, T


def evaluation_soc(site: Site) -> Tensor:
    """Return the battery's start [D] of every day in evaluation, fixed by the site's seed."""
    battery = site.battery
    draws = np.random.default_rng(site.seed).uniform(
        battery.start_soc_min, battery.start_soc_max, len(site.days)
    )
    return torch.tensor(draws, dtype=torch.float32)


@torch.inference_mode()
def run_days(model: SiteModel, rule: Rule, day: Tensor, soc_start: Tensor) -> _Trace:
    """Run a rule, or any policy in its form, through whole days.

    Args:
        model: With prices, as `priced_model` makes it.
        day: [B] indices of the days to run, each once.
        soc_start: [B] state of charge where they begin.
    """
    trace = _Trace([], [])
    following = begin_day(model, day.to(model.device), soc_start.to(model.device))
    for ahead in reversed(range(T)):
        state = following
        following, flows = step(model, state, rule(model, state))
        booked = book(state, flows)
        trace.flows.append(flows)
        trace.booked.append(booked if ahead else settle(model, state, flows, booked))
    return trace


class _Trace(NamedTuple):
    """Days as they went, in each of the T steps."""

    flows: list[Flows]
    booked: list[Booked]

    def each(self, name: str) -> list[Tensor]:
        """Return what of the flows or of what was booked has this name, T of [B]."""
        steps = self.booked if name in Booked._fields else self.flows
        return [getattr(step, name) for step in steps]

    def total(self, name: str) -> Tensor:
        """Return the day's sum [B] of one of them, for instance "co2_kg"."""
        return torch.stack(self.each(name)).sum(0)


def by_day(steps: list[Tensor]) -> Floats:
    """Return T figures [B] of a step each as rows of days [B, T]."""
    return torch.stack(steps, 1).double().cpu().numpy()


_DAYS_AT_ONCE = 64  # bounds the memory of a long year with many sockets


class Schedule(NamedTuple):
    """Days as they went; every field is [D, T]. Powers are means over a step."""

    ev_kw: Floats
    battery_kw: Floats  # at the AC side, charging positive
    grid_import_kw: Floats
    curtailed_kwh: Floats  # PV that found no use
    unmet_kwh: Floats  # owed to vehicles that left at the end of the step
    soc: Floats  # 0-1, at the end of the step
    co2_kg: Floats  # in the last step with the battery's settlement at midnight


def schedule(model: SiteModel, rule: Rule, site: Site, days: list[int]) -> Schedule:
    """Run a rule, or any policy in its form, through days [D] as evaluation starts them."""
    soc_start = evaluation_soc(site)
    columns: list[list[Floats]] = []
    for some in torch.as_tensor(days).split(_DAYS_AT_ONCE):
        trace = run_days(model, rule, some, soc_start[some])
        columns.append([by_day(trace.each(name)) for name in Schedule._fields])
    return Schedule(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))
