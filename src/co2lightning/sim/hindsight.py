"""What only hindsight knows: how the rest of a day goes for the rule RBC B.

Days differ far more than actions do, so most of what a policy gradient sees is weather. Two things
take that out without changing what is best. The reward is measured against the rule on the same
day (see `measure_against_rule`). And a critic, which only training needs, may look ahead: it
observes what the rest of this very day will be, while the policy never does. A baseline may depend
on all inputs that no action changes: Mao et al. 2018 (arXiv:1807.02264); a critic with more to see
than its actor: Pinto et al. 2017 (arXiv:1710.06542).

Shapes: T = 96 steps a day, D days of the site, K = 11 features.
"""

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.rules import rbc_b
from co2lightning.control.state import SiteModel, State
from co2lightning.sim.objective import measured_against
from co2lightning.sim.schedule import by_day, run_days
from co2lightning.site.model import STEP_H, Site, T

HINDSIGHT = (
    "the rule's state of charge, 0-1",
    "energy it owes to the vehicles present",
    "energy it will curtail until midnight",
    "energy it will import until midnight",
    "CO2 it will emit until midnight",
    "energy it will curtail within 2 hours",
    "energy it will import within 2 hours",
    "energy it will curtail within 6 hours",
    "energy it will import within 6 hours",
    "its highest state of charge until midnight, 0-1",
    "its lowest state of charge until midnight, 0-1",
)
"""Energies as shares of the battery's capacity, CO2 as that of a charge at the mean intensity."""

_STEPS_2_H, _STEPS_6_H = round(2 / STEP_H), round(6 / STEP_H)


def measure_against_rule(model: SiteModel, site: Site) -> tuple[SiteModel, Tensor]:
    """Run RBC B through every day of the site, the battery starting in the middle of its range.

    Returns:
        The model with the rule as its reference, so that a step's reward is what the rule's is
        exceeded by, and the hindsight features [T * D, K], each step at its place.
    """
    owed_kw: list[Tensor] = []

    def watched(model: SiteModel, state: State) -> Tensor:
        owed_kw.append(state.owed_kw.sum(1))
        return rbc_b(model, state)

    days = torch.arange(len(site.days), device=model.device)
    middle = (site.battery.start_soc_min + site.battery.start_soc_max) / 2
    soc_start = torch.full_like(days, middle, dtype=torch.float32)
    trace = run_days(model, watched, days, soc_start)
    soc = by_day([soc_start, *trace.each("soc")[:-1]])
    owed_kwh = by_day(owed_kw) * STEP_H
    curtailed_kwh = by_day(trace.each("curtailed_kwh"))
    import_kwh = by_day(trace.each("grid_import_kw")) * STEP_H
    co2_kg = by_day(trace.each("co2_kg"))
    capacity_kwh = site.battery.capacity_kwh
    charge_kg = capacity_kwh * max(float(site.carbon_kg_per_kwh.mean()), 1e-9)
    features = [
        soc,
        owed_kwh / capacity_kwh,
        _ahead(curtailed_kwh, T) / capacity_kwh,
        _ahead(import_kwh, T) / capacity_kwh,
        _ahead(co2_kg, T) / charge_kg,
        _ahead(curtailed_kwh, _STEPS_2_H) / capacity_kwh,
        _ahead(import_kwh, _STEPS_2_H) / capacity_kwh,
        _ahead(curtailed_kwh, _STEPS_6_H) / capacity_kwh,
        _ahead(import_kwh, _STEPS_6_H) / capacity_kwh,
        np.maximum.accumulate(soc[:, ::-1], axis=1)[:, ::-1],
        np.minimum.accumulate(soc[:, ::-1], axis=1)[:, ::-1],
    ]
    table = np.stack(features, axis=-1).reshape(-1, len(HINDSIGHT))
    reward = torch.as_tensor(by_day(trace.each("reward")).ravel())
    return measured_against(model, reward), torch.as_tensor(table).to(model.zero)


def _ahead(values: np.ndarray, steps: int) -> np.ndarray:
    """Return the sums [D, T] of this step and those after it, `steps` in all, within the day."""
    until = np.pad(values.cumsum(axis=1), ((0, 0), (1, 0)))
    end = np.minimum(np.arange(T) + steps, T)
    return until[:, end] - until[:, :-1]
