"""One step of a site over B days at once: battery, sockets, meter.

Pure functions on torch tensors: no Gymnasium, no Lightning, no in-place write, so a day can be
differentiated from its CO2 back to every action. Everything lives on one device; the step number
is a Python int, so nothing here waits for a GPU. What is only reported is worked out when it is
asked for.

Shapes: B days at once, S sockets, A = 2 actions.
Signs: grid import and battery charging are positive. Units are in the names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from co2lightning.control.shield import battery_power_kw, ev_power_kw
from co2lightning.control.state import (
    REWARD_SHARE,
    SiteModel,
    State,
    arrive,
    laxity_order,
)
from co2lightning.site.model import STEP_H, T


class Flows(NamedTuple):
    """What one step did. Powers are means over the step, energies are of the step."""

    ev_kw: Tensor  # [B]
    battery_kw: Tensor  # [B] at the AC side, charging positive
    grid_kw: Tensor  # [B] at the meter, import positive
    unmet_kw: Tensor  # [B] owed to vehicles that left at the end of this step
    meter_kg: Tensor  # [B] CO2 of the grid import
    settlement_kg: Tensor | None  # [B] of the battery, in the day's last step
    reward: Tensor  # [B] kg CO2 less than the reference, see `step`
    soc: Tensor  # [B] 0-1, at the end of the step
    socket_kw: Tensor  # [B, S]

    @property
    def grid_import_kw(self) -> Tensor:
        return self.grid_kw.relu()

    @property
    def curtailed_kwh(self) -> Tensor:
        """PV [B] that found no use."""
        return (-self.grid_kw).relu() * STEP_H

    @property
    def unmet_kwh(self) -> Tensor:
        """Energy [B] owed to vehicles that left at the end of this step."""
        return self.unmet_kw * STEP_H

    @property
    def co2_kg(self) -> Tensor:
        """CO2 [B] of the grid import; in the day's last step also of the battery's settlement."""
        return self.meter_kg if self.settlement_kg is None else self.meter_kg + self.settlement_kg


def dispatch(model: SiteModel, state: State, ev_kw: Tensor) -> Tensor:
    """Share the EV budget `ev_kw` [B] among the sockets [B, S]: must first, then least laxity."""
    order = laxity_order(state.laxity)
    # What a vehicle goes without, negative: what those up to it could take beyond the budget, at
    # most what it could take itself.
    spare_kw = (state.must_kw - state.could_kw).gather(1, order)
    rest_kw = (ev_kw - state.must_total_kw).unsqueeze(1)
    without_kw = (spare_kw.cumsum(1) + rest_kw).clamp(spare_kw, model.zero)
    return state.could_kw.scatter_add(1, order, without_kw)


def step(model: SiteModel, state: State, action: Tensor) -> tuple[State | None, Flows]:
    """Run one step of 15 minutes.

    Args:
        action: [B, A] in [-1, 1]: EV power between must and could, battery power / its rating.

    Returns:
        The next state (None after the day's last step) and the flows.

    The day's CO2 is sum(import * h * intensity) + mean intensity * max(0, SoC start - SoC end)
    * capacity / charge efficiency: a battery emptied at midnight is not a gift.

    The day's reward is reference - CO2 in kg, where the reference depends on the day alone. With a
    model as `build_model` makes it, that is the building's import without battery and vehicles,
    and half the mean intensity for every kWh that vehicles get; `hindsight.measure_against_rule`,
    which every environment uses, makes it what the rule RBC B emits. Within the day energy stored
    in the battery counts at that same half price, a potential in the sense of Ng, Harada and
    Russell 1999: it moves reward to the step that earned it and leaves the sum over the day as it
    is. At half the price, storing a surplus pays at once and storing grid power does not, whatever
    the hour.
    """
    action = action.clamp(model.minus_one, model.one)
    action = torch.addcmul(model.action_shift, model.action_scale, action)
    ev_share, wanted_kw = action.unbind(1)
    ev_kw = ev_power_kw(state, ev_share)
    socket_kw = dispatch(model, state, ev_kw)
    battery_kw = battery_power_kw(state, wanted_kw, ev_kw)
    # Of the two the lesser is right: a kW given takes more out than a kW taken puts in.
    # Rounding may carry the SoC past a bound by 1e-7; the next step's limits bring it back.
    stored_kw = torch.minimum(battery_kw, battery_kw * model.losses)
    soc = torch.add(state.soc, stored_kw, alpha=model.soc_per_kw)
    grid_kw = state.net_kw + ev_kw + battery_kw
    meter_kg = grid_kw.relu() * state.carbon_kg_per_kw
    left_kw = state.owed_kw - socket_kw
    credited_kw = ev_kw + stored_kw
    reward = torch.addcmul(state.baseline_kg - meter_kg, state.credit_kg_per_kw, credited_kw)
    following, settlement_kg = None, None
    if state.step == T - 1:
        unmet_kw = left_kw.sum(1)
        gained_kw = (soc - state.soc_start) * model.charge_kw_per_soc
        settlement_kg = (-gained_kw).relu() * (state.credit_kg_per_kw / REWARD_SHARE)
        reward = reward - settlement_kg - gained_kw * state.credit_kg_per_kw
    else:
        following, unmet_kw = arrive(
            model, state.step + 1, state.place + model.days, soc, state.soc_start, left_kw
        )
    flows = Flows(
        ev_kw=ev_kw,
        battery_kw=battery_kw,
        grid_kw=grid_kw,
        unmet_kw=unmet_kw,
        meter_kg=meter_kg,
        settlement_kg=settlement_kg,
        reward=reward,
        soc=soc,
        socket_kw=socket_kw,
    )
    return following, flows
