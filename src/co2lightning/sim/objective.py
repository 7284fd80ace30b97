"""What a step costs and earns: the one place that knows.

Physics says what flowed; grid import emits CO2, export earns nothing.

A step's reward is what the rule RBC B is exceeded by, in units of what the site emits on a day
without control, so that one recipe fits sites of any size: reference - CO2, where the reference is
the rule's own at that step of one run through the whole series. Within it energy that is stored or
given to vehicles counts at half the mean intensity, a potential in the sense of Ng, Harada and
Russell 1999: it moves reward to the step that earned it. At half the price, storing a surplus pays
at once and storing grid power does not, whatever the hour.

Shapes: P steps, B at once.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.state import SiteModel, State, build_model
from co2lightning.sim.physics import Flows
from co2lightning.site.model import DAY_H, Floats, Site

_CREDIT_SHARE = 0.5  # of the mean intensity: what a kWh earns when it is stored or charged
_CARBON, _PER_KW, _REFERENCE, _CREDIT = -4, -3, -2, -1  # the prices among the model's series


class Booked(NamedTuple):
    """What a step cost and earned."""

    co2_kg: Tensor  # [B] of the grid import
    reward: Tensor  # [B] CO2 less than the reference, in days of the uncontrolled site


def mean_kg_per_kwh(site: Site) -> float:
    """Return the mean intensity of the steps that are not held out."""
    return float(site.carbon_kg_per_kwh[site.training_steps].mean())


def _daily_kwh(site: Site) -> float:
    """Return the energy that a site uses on a day, load and vehicles, of its training days.

    Where it uses none: what its PV gives; then what its battery holds.
    """
    training = site.training_steps
    days = training.sum() * site.step_h / DAY_H
    of_training = training[site.sessions.arrival]
    used_kwh = np.abs(site.load_kw[training]).sum() * site.step_h
    used_kwh += site.sessions.energy_kwh[of_training].sum()
    used_kwh = used_kwh or site.pv_kw[training].sum() * site.step_h
    capacity_kwh = site.battery.capacity_kwh if site.battery else 1.0
    return float(used_kwh / days) or capacity_kwh


def priced_model(
    site: Site, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SiteModel:
    """Turn a site into tables that hold its prices too; rewards are 0 until `rewarded`.

    They are the largest a site has, so they are made once a process; never write to them.
    """
    return _priced_model(site, torch.device(device), dtype)


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)  # what it would make can never be trained on
def _priced_model(site: Site, device: torch.device, dtype: torch.dtype) -> SiteModel:
    carbon_kg_per_kw = site.carbon_kg_per_kwh * site.step_h
    nothing = np.zeros(site.n_steps)
    return build_model(site, device, dtype, [carbon_kg_per_kw, nothing, nothing, nothing])


def rewarded(
    model: SiteModel, site: Site, uncontrolled_kg: float, co2_kg: Floats, credited_kw: Floats
) -> SiteModel:
    """Return a priced model that gives rewards.

    Args:
        model: As `priced_model` makes it.
        site: Its site.
        uncontrolled_kg: What the site emits on a day without control, the unit of the rewards.
            Where that is nothing, what its daily energy would emit at the mean intensity.
        co2_kg: Of the rule that is to be exceeded, in each step [P].
        credited_kw: What that rule charged, [P].
    """
    mean_kg = mean_kg_per_kwh(site)
    fallback_kg = _daily_kwh(site) * mean_kg
    unit_kg = uncontrolled_kg if uncontrolled_kg > 1e-6 * fallback_kg else fallback_kg
    unit_kg = unit_kg or 1.0
    credit_per_kw = _CREDIT_SHARE * mean_kg * site.step_h / unit_kg
    reference = co2_kg / unit_kg - credit_per_kw * credited_kw
    series = model.series.clone()
    series[_PER_KW] = series[_CARBON] / unit_kg
    series[_REFERENCE, :-1] = torch.as_tensor(reference).to(series)
    series[_CREDIT, :-1] = credit_per_kw
    return model._replace(series=series)


def book(state: State, flows: Flows) -> Booked:
    """Return what a step cost and earned, `state` at its beginning."""
    carbon_kg_per_kw, per_kw, reference, credit_per_kw = state.prices
    import_kw = flows.grid_kw.relu()
    earned = torch.addcmul(reference, import_kw, per_kw, value=-1.0)
    credited_kw = flows.ev_kw + flows.stored_kw
    return Booked(import_kw * carbon_kg_per_kw, torch.addcmul(earned, credit_per_kw, credited_kw))
