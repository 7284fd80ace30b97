"""One step of a site over B days at once: battery, sockets, meter.

Pure functions on torch tensors: no Gymnasium, no Lightning, no in-place write, so a day can be
differentiated from its CO2 back to every action. Everything lives on one device, and nothing here
waits for a GPU. Time goes on from place to place in the tables: who plays says where a day ends,
and `objective` what it costs. What is only reported is worked out when it is asked for.

Shapes: B days at once, S sockets, A = 2 actions.
Signs: grid import and battery charging are positive. Units are in the names.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from co2lightning.control.shield import battery_power_kw, ev_power_kw
from co2lightning.control.state import SiteModel, State, arrive, laxity_order
from co2lightning.site.model import STEP_H


class Flows(NamedTuple):
    """What one step did. Powers are means over the step, energies are of the step."""

    ev_kw: Tensor  # [B]
    battery_kw: Tensor  # [B] at the AC side, charging positive
    stored_kw: Tensor  # [B] what of it stays: a kW given takes more out than a kW taken puts in
    grid_kw: Tensor  # [B] at the meter, import positive
    unmet_kw: Tensor  # [B] owed to vehicles that left at the end of this step
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


def dispatch(model: SiteModel, state: State, ev_kw: Tensor) -> Tensor:
    """Share the EV budget `ev_kw` [B] among the sockets [B, S]: must first, then least laxity."""
    order = laxity_order(state.laxity)
    # What a vehicle goes without, negative: what those up to it could take beyond the budget, at
    # most what it could take itself.
    spare_kw = (state.must_kw - state.could_kw).gather(1, order)
    rest_kw = (ev_kw - state.must_total_kw).unsqueeze(1)
    without_kw = (spare_kw.cumsum(1) + rest_kw).clamp(spare_kw, model.zero)
    return state.could_kw.scatter_add(1, order, without_kw)


def step(model: SiteModel, state: State, action: Tensor) -> tuple[State, Flows]:
    """Run one step of 15 minutes; return the next state and what flowed.

    Args:
        action: [B, A] in [-1, 1]: EV power between must and could, battery power / its rating.
    """
    action = action.clamp(model.minus_one, model.one)
    action = torch.addcmul(model.action_shift, model.action_scale, action)
    ev_share, wanted_kw = action.unbind(1)
    ev_kw = ev_power_kw(state, ev_share)
    socket_kw = dispatch(model, state, ev_kw)
    battery_kw = battery_power_kw(state, wanted_kw, ev_kw)
    # Of the two the lesser is right.
    # Rounding may carry the SoC past a bound by 1e-7; the next step's limits bring it back.
    stored_kw = torch.minimum(battery_kw, battery_kw * model.losses)
    soc = torch.add(state.soc, stored_kw, alpha=model.soc_per_kw)
    left_kw = state.owed_kw - socket_kw
    following, unmet_kw = arrive(model, state.place + 1, soc, state.soc_start, left_kw)
    return following, Flows(
        ev_kw=ev_kw,
        battery_kw=battery_kw,
        stored_kw=stored_kw,
        grid_kw=state.net_kw + ev_kw + battery_kw,
        unmet_kw=unmet_kw,
        soc=soc,
        socket_kw=socket_kw,
    )
