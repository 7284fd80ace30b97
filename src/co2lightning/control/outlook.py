"""What the next steps are expected to cost: tables for rules and moves that wait for cheap hours.

Shapes: P steps of the site, L leads of its forecast, n steps that are looked ahead.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.forecast import cheaper, forecast, slots, steps_per_lead, to_come
from co2lightning.site.model import DAY_H, Site

_ROWS_AT_ONCE = 8192


class Outlook(NamedTuple):
    """What is known of each place and expected of the steps after it."""

    slot: Tensor  # [P + 1] step of the day by the clock on the wall
    slots: int  # of a day
    cheaper: Tensor  # [P + 1, n + 1] how many of the next 0, 1, ... n steps cost less
    cheaper_or_sun: Tensor  # likewise, if a step whose PV exceeds the load costs nothing


def _unit(site: Site) -> float:
    """Return how much dearer a kWh is than it emits: in any currency the same is the same."""
    known = site.training_steps
    price, carbon = np.abs(site.import_price[known]).sum(), site.carbon_kg_per_kwh[known].sum()
    return float(price / carbon) if price > 0.0 and carbon > 0.0 else 1.0


def sun_exceeds_load(site: Site) -> bool:
    """Say whether a site may have a surplus at all."""
    return bool(site.pv_kw.any() or site.load_kw.min() < 0.0)


def outlook_of(site: Site, device: torch.device | str = "cpu", foresight: bool = False) -> Outlook:
    """Return what the rules of a site know of each step and expect of the next ones.

    Args:
        site: The site.
        device: Where the rules act.
        foresight: Whether what import will cost is known instead.
    """
    return _outlook_of(site, torch.device(device), foresight)


@functools.lru_cache(maxsize=8)
def _outlook_of(site: Site, device: torch.device, foresight: bool) -> Outlook:
    stays = site.sessions_told.departure - site.sessions_told.arrival
    now, expected = site.import_price, forecast(site, "import_price")
    each = steps_per_lead(site)
    leads = min(expected.shape[1], -(-int(stays.max(initial=1)) // each))  # nobody looks further
    sun, credit, unit = site.load_kw - site.pv_kw < 0.0, site.export_credit, _unit(site)
    sunny = sun_exceeds_load(site)
    load_kw, pv_kw = (forecast(site, name) if sunny else now for name in ("load_kw", "pv_kw"))
    earns = forecast(site, "export_credit") if credit.any() else np.zeros((site.n_steps, leads))
    ahead, apart = leads, each  # of a table: its columns, and how many steps each stands for
    if foresight:
        ahead, apart = leads * each, 1
        expected, earns = to_come(now, ahead), to_come(credit, ahead)
    counts = np.zeros((site.n_steps + 1, leads * each + 1), dtype=np.int16)
    with_sun = np.zeros_like(counts) if sunny else counts
    for first in range(0, site.n_steps, _ROWS_AT_ONCE):  # a long site's tables are some 100 MB each
        rows = slice(first, min(first + _ROWS_AT_ONCE, site.n_steps))
        costs = expected[rows, :ahead]
        counts[rows] = cheaper(now[rows], costs, apart, unit)[:-1]
        if sunny:  # a surplus costs what it would have earned
            free = (load_kw[rows, :leads] - pv_kw[rows, :leads] < 0.0).repeat(each // apart, axis=1)
            here = np.where(sun[rows], credit[rows], now[rows])
            costs = np.where(free, earns[rows, :ahead], costs)
            with_sun[rows] = cheaper(here, costs, apart, unit)[:-1]
    counts[-1], with_sun[-1] = counts[-2], with_sun[-2]
    slot, _ = slots(site, 1)
    tensors = (torch.as_tensor(table, device=device) for table in (slot, counts, with_sun))
    of_step, plain, with_surplus = tensors
    return Outlook(of_step, site.steps(DAY_H), plain, with_surplus)
