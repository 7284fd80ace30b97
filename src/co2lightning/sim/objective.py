"""What a step costs and earns, and what an end is worth: the one place that knows.

Physics says what flowed. Grid import emits CO2, and a day's CO2 is sum(import * h * intensity) +
mean intensity * max(0, SoC start - SoC end) * capacity / charge efficiency: a battery emptied at
the day's end is not a gift.

The day's reward is reference - CO2 in kg, where the reference depends on the day alone: as
`priced_model` makes it, the building's import without battery and vehicles, and half the mean
intensity for every kWh that vehicles get; after `measured_against` whatever a rule emits. Within
the day energy stored in the battery counts at that same half price, a potential in the sense of
Ng, Harada and Russell 1999: it moves reward to the step that earned it and leaves the sum over the
day as it is. At half the price, storing a surplus pays at once and storing grid power does not,
whatever the hour.

Shapes: T = 96 steps a day, D days of the site, B days at once.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.state import SiteModel, State, build_model
from co2lightning.sim.physics import Flows
from co2lightning.site.model import STEP_H, Floats, Site, T

_CREDIT_SHARE = 0.5  # of what refilling costs: what a kWh earns when it is stored or charged
_REFERENCE_ROW = -2  # of the model's series, whose last rows are the prices


class Booked(NamedTuple):
    """What a step cost and earned."""

    co2_kg: Tensor  # [B] of the grid import; in a day's last step also of the settlement
    reward: Tensor  # [B] kg CO2 less than the reference


def refill_kg_per_kwh(carbon_kg_per_kwh: Floats) -> Floats:
    """Return the CO2 [...] of a kWh that refills the battery after a day [..., T]."""
    return carbon_kg_per_kwh.mean(axis=-1)


def priced_model(
    site: Site, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SiteModel:
    """Turn a site into tables that hold its prices too: what `build_model` makes and days need.

    Raises:
        ValueError: A vehicle stays on when its day has ended and been settled.
    """
    if (last := int(site.sessions.departure_step.max(initial=0))) > T:
        raise ValueError(f"a vehicle leaves at step {last} of its day; a day ends after {T}")
    carbon_kg_per_kw = site.carbon_kg_per_kwh * STEP_H
    reference_kg = np.maximum(site.load_kw - site.pv_kw, 0.0) * carbon_kg_per_kw
    refill_kg_per_kw = refill_kg_per_kwh(site.carbon_kg_per_kwh)[:, None] * np.full(T, STEP_H)
    return build_model(site, device, dtype, [carbon_kg_per_kw, reference_kg, refill_kg_per_kw])


def measured_against(model: SiteModel, reward: Tensor) -> SiteModel:
    """Return a model whose rewards are what those of somebody, at each step [T * D], exceed."""
    series = model.series.clone()
    series[_REFERENCE_ROW, :-1] -= reward.to(series)
    return model._replace(series=series)


def book(state: State, flows: Flows) -> Booked:
    """Return what a step cost and earned, `state` at its beginning."""
    carbon_kg_per_kw, reference_kg, refill_kg_per_kw = state.prices
    co2_kg = flows.grid_kw.relu() * carbon_kg_per_kw
    credited_kw = flows.ev_kw + flows.stored_kw
    return Booked(
        co2_kg,
        torch.addcmul(reference_kg - co2_kg, refill_kg_per_kw, credited_kw, value=_CREDIT_SHARE),
    )


def settle(model: SiteModel, state: State, flows: Flows, booked: Booked) -> Booked:
    """Return what a day's last step cost and earned with the end that it made.

    A deficit against the day's start costs the kWh that refill it, a surplus earns nothing. The
    reward gives back the credit for what is still stored.
    """
    refill_kg_per_kw = state.prices[-1]
    gained_kw = (flows.soc - state.soc_start) * model.charge_kw_per_soc
    settlement_kg = (-gained_kw).relu() * refill_kg_per_kw
    return Booked(
        booked.co2_kg + settlement_kg,
        booked.reward - settlement_kg - gained_kw * (_CREDIT_SHARE * refill_kg_per_kw),
    )
