"""What the next steps are expected to cost: tables for rules and moves that wait for cheap hours.

Shapes: P steps of the site, L leads of its forecast, n steps that are looked ahead.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.forecast import cheaper, forecast, slots, steps_per_lead, to_come
from co2lightning.site.model import DAY_H, Floats, Site


class Outlook(NamedTuple):
    """What is known of each place and expected of the steps after it."""

    slot: Tensor  # [P + 1] step of the day by the clock on the wall
    slots: int  # of a day
    cheaper: Tensor  # [P + 1, n + 1] how many of the next 0, 1, ... n steps cost less
    cheaper_or_sun: Tensor  # likewise, if a step whose PV exceeds the load costs nothing


def price(site: Site) -> tuple[Floats, Floats]:
    """Return what a kWh of import costs in each step [P], and is expected to cost [P, L]."""
    return site.import_price, forecast(site, "import_price")


def _unit(site: Site) -> float:
    """Return how much dearer a kWh is than it emits: in any currency the same is the same."""
    known = site.training_steps
    price, carbon = np.abs(site.import_price[known]).sum(), site.carbon_kg_per_kwh[known].sum()
    return float(price / carbon) if price > 0.0 and carbon > 0.0 else 1.0


def slots_a_day(site: Site) -> int:
    """Return how many steps a day by the clock on the wall has."""
    return site.steps(DAY_H)


def sun_exceeds_load(site: Site) -> bool:
    """Say whether a site may have a surplus at all."""
    return bool(site.pv_kw.any() or site.load_kw.min() < 0.0)


@functools.lru_cache(maxsize=8)
def outlook_of(site: Site, device: torch.device | str = "cpu", foresight: bool = False) -> Outlook:
    """Return what the rules of a site know of each step and expect of the next ones.

    Args:
        site: The site.
        device: Where the rules act.
        foresight: Whether what import will cost is known instead.
    """
    stays = site.sessions_told.departure - site.sessions_told.arrival
    (now, expected), each = price(site), steps_per_lead(site)
    leads = min(expected.shape[1], -(-int(stays.max(initial=1)) // each))  # nobody looks further
    sun = site.load_kw - site.pv_kw < 0.0
    expected = expected[:, :leads]
    sun_expected = np.zeros(expected.shape, dtype=np.bool_)
    if sun_exceeds_load(site):
        net_kw = forecast(site, "load_kw")[:, :leads] - forecast(site, "pv_kw")[:, :leads]
        sun_expected = net_kw < 0.0
    credit, earns = site.export_credit, np.zeros(expected.shape)
    if credit.any():
        earns = forecast(site, "export_credit")[:, :leads]
    if foresight:
        expected = to_come(now, leads * each)
        earns = to_come(credit, leads * each)
        sun_expected, each = sun_expected.repeat(each, axis=1), 1
    unit = _unit(site)
    counts = cheaper(now, expected, each, unit)
    with_sun = counts
    if sun.any() or sun_expected.any():
        # A surplus costs what it would have earned.
        now, expected = np.where(sun, credit, now), np.where(sun_expected, earns, expected)
        with_sun = cheaper(now, expected, each, unit)
    slot, _ = slots(site, 1)
    tensors = (torch.as_tensor(table, device=device) for table in (slot, counts, with_sun))
    of_step, plain, sunny = tensors
    return Outlook(of_step, slots_a_day(site), plain, sunny)
