"""What a step costs and earns: the one place that knows.

What is to be made small is a series, not a branch: of a site and its objective come two, what an
imported kWh adds and what an exported one takes off (`Site.import_price`, `Site.export_credit`).
Kilograms of CO2, which export does not lessen, and money follow afterwards from what the meter has
counted.

A step's reward is what is saved against the same step without control, in units of what the site
costs on a day without control, so that one recipe fits sites of any size: reference - cost, where
the reference comes from one run of charging on arrival through the whole series. What no action
changes, such as load and arrivals, is in both. Within it energy that is stored counts at half the
mean price and what vehicles are given at 0.8 of it: what is stored less what is owed is a potential
in the sense of Ng, Harada and Russell 1999, which moves reward to the step that earned it. At half
the price, storing a surplus pays at once and storing grid power does not; vehicles will be charged
anyhow, so that it pays at once where it is cheap. To who discounts what is to come, holding costs
what the discount takes off; otherwise it would pay to store and charge early, whatever the hour.
Where drivers announce, what a vehicle leaves without costs what is missing to the whole mean price
more: nobody wins by a driver's error.

Shapes: P steps, B at once, n steps of a run.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.state import SiteModel, State, build_model
from co2lightning.sim.physics import Flows
from co2lightning.site.model import DAY_H, Floats, Site

_CANCELLED = 0.05  # of the daily energy's value: a cost below that is a difference of larger ones
_CREDIT_SHARE = 0.8  # of the mean price: what a kWh earns when a vehicle is charged
_STORED = 0.5 / _CREDIT_SHARE  # of that: when it is stored
# The prices among the model's series. What is imported is counted at the price less the export
# credit, and all that flows at the credit: a sum instead of two cases.
_MARGIN, _EXPORT, _REFERENCE, _CREDIT = -4, -3, -2, -1


def mean_per_kwh(site: Site) -> tuple[float, float]:
    """Return the mean intensity and the mean price of the steps that are not held out."""
    of_training = site.training_steps
    price = site.money_per_kwh[0]
    return float(site.carbon_kg_per_kwh[of_training].mean()), float(price[of_training].mean())


def unserved_price(site: Site) -> float:
    """Return what a kWh that a vehicle goes without is compared at: the mean price, 0 at least."""
    return max(0.0, float(site.import_price[site.training_steps].mean()))


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


def unit_a_day(site: Site, uncontrolled: float) -> float:
    """Return what objectives of a day are measured in, above 0.

    Args:
        site: The site.
        uncontrolled: Its objective on a training day without control. Where that is nothing or
            less, or what is paid and what is earned all but cancel out, the unit is what its daily
            energy would be at the mean absolute price.
    """
    price = site.import_price[site.training_steps]
    fallback = _daily_kwh(site) * float(np.abs(price).mean())
    least = _CANCELLED if price.min() < 0.0 or site.export_credit.any() else 1e-6
    return (uncontrolled if uncontrolled > least * fallback else fallback) or 1.0


def priced_model(
    site: Site, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SiteModel:
    """Turn a site into tables that hold its prices too; rewards are - objective until `rewarded`.

    They are the largest a site has, so they are made once a process; never write to them.
    """
    return _priced_model(site, torch.device(device), dtype)


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)  # what it would make can never be trained on
def _priced_model(site: Site, device: torch.device, dtype: torch.dtype) -> SiteModel:
    carbon_kg_per_kw = site.carbon_kg_per_kwh * site.step_h
    price, credit = site.money_per_kwh * site.step_h
    per_kw = np.stack([site.import_price - site.export_credit, site.export_credit]) * site.step_h
    metered = [carbon_kg_per_kw, price - credit, credit]
    return build_model(site, device, dtype, [*per_kw, *np.zeros((2, site.n_steps))], metered)


def rewarded(
    model: SiteModel, site: Site, a_day: float, uncontrolled: Floats, ev_kw: Floats
) -> SiteModel:
    """Return a priced model that gives rewards.

    Args:
        model: As `priced_model` makes it.
        site: Its site.
        a_day: What its objective is on a training day without control.
        uncontrolled: What it is in each step [P].
        ev_kw: What vehicles are given then, [P].
    """
    unit = unit_a_day(site, a_day)
    of_training = float(site.import_price[site.training_steps].mean())
    credit_per_kw = _CREDIT_SHARE * of_training * site.step_h / unit
    reference = uncontrolled / unit - credit_per_kw * ev_kw
    series = model.series.clone()
    series[_MARGIN], series[_EXPORT] = series[_MARGIN] / unit, series[_EXPORT] / unit
    series[_REFERENCE, :-1] = torch.as_tensor(reference).to(series)
    series[_CREDIT, :-1] = credit_per_kw
    return model._replace(series=series)


def reward(model: SiteModel, state: State, flows: Flows, discount: float = 1.0) -> Tensor:
    """Return what a step earned [B]: in days of the uncontrolled site.

    Args:
        model: The site's.
        state: At the step's beginning.
        flows: What flowed.
        discount: What the next step's reward counts to who learns from these.
    """
    _, _, reference, credit_per_kw = state.prices
    earned = reference - objective(state, flows)
    if flows.misled_kw is not None:
        rest = 1.0 / _CREDIT_SHARE - 1.0
        earned = torch.addcmul(earned, credit_per_kw, flows.unmet_kw, value=-rest)
    gained_kw = torch.add(flows.ev_kw, flows.stored_kw, alpha=_STORED)
    if discount < 1.0:
        held_kw = _STORED * state.soc * model.kw_per_soc[0] - state.owed_kw.sum(1)
        gained_kw = torch.sub(gained_kw, held_kw + gained_kw, alpha=1.0 - discount)
    return torch.addcmul(earned, credit_per_kw, gained_kw)


def objective(state: State, flows: Flows) -> Tensor:
    """Return what a step cost [B], `state` at its beginning: in days of the uncontrolled site."""
    margin_per_kw, export_per_kw, _, _ = state.prices
    return torch.addcmul(flows.grid_kw.relu() * margin_per_kw, flows.grid_kw, export_per_kw)


def metered(model: SiteModel, begin: Tensor, grid_kw: Tensor) -> tuple[Tensor, Tensor]:
    """Return what n steps came to: CO2 of the import in kg, and cost, [n, B] each.

    Cost is of import less export, in the site's currency; 0 without prices.

    Args:
        model: As `priced_model` makes it.
        begin: [B] where each run begins.
        grid_kw: [n, B] at the meter, import positive.
    """
    steps = torch.arange(len(grid_kw), device=model.device).unsqueeze(1)
    places = (begin + steps).clamp(max=model.metered.shape[1] - 1)
    carbon_kg_per_kw, margin_per_kw, export_per_kw = model.metered[:, places]
    import_kw = grid_kw.relu()
    cost = torch.addcmul(import_kw * margin_per_kw, grid_kw, export_per_kw)
    return import_kw * carbon_kg_per_kw, cost
