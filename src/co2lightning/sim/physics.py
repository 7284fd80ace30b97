"""One step of a site, B times at once: battery, sockets, meter.

Pure functions on torch tensors: no Gymnasium, no Lightning, no in-place write, so a day can be
differentiated from its CO2 back to every action. Everything lives on one device, and nothing here
waits for a GPU. Time goes on from place to place in the tables: who plays says where a day ends,
and `objective` what it costs. Energies are worked out where they are reported.

Shapes: B at once, C sockets that are ever taken, A = 2 actions.
Signs: grid import and battery charging are positive. Units are in the names.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from co2lightning.control.shield import (
    battery_power_kw,
    dispatch,
    ev_power_kw,
    vehicle_powers_kw,
)
from co2lightning.control.state import Powers, SiteModel, State, arrive, in_truth


class Flows(NamedTuple):
    """What one step did. Powers are means over the step."""

    ev_kw: Tensor  # [B]
    battery_kw: Tensor  # [B] at the AC side, charging positive
    stored_kw: Tensor  # [B] what of it stays: a kW given takes more out than a kW taken puts in
    grid_kw: Tensor  # [B] at the meter, import positive
    unmet_kw: Tensor  # [B] owed to vehicles that left at the end of this step
    misled_kw: Tensor | None  # [B] of it what by their announcements could have waited, or was none
    soc: Tensor  # [B] 0-1, at the end of the step
    socket_kw: Tensor  # [B, C] what vehicles took


def step(
    model: SiteModel, state: State, action: Tensor | Powers, order: Tensor | None = None
) -> tuple[State, Flows]:
    """Run one step; return the next state and what flowed.

    Args:
        action: [B, A] in [-1, 1]: EV power between must and could, battery power / its rating; or
            the powers that are wanted of each vehicle and the battery.
        order: The sockets [B, C] by laxity, where that is known already.
    """
    told, as_told = state, True
    if isinstance(action, Powers):
        if not (as_told := action.as_told):
            state, order = in_truth(model, state), None
        socket_kw = vehicle_powers_kw(model, state, action.socket_kw, order)
        ev_kw, wanted_kw = socket_kw.sum(1), action.battery_kw
    else:
        action = action.clamp(model.minus_one, model.one)
        action = torch.addcmul(model.action_shift, model.action_scale, action)
        ev_share, wanted_kw = action.unbind(1)
        ev_kw = ev_power_kw(state, ev_share)
        socket_kw = dispatch(model, state, ev_kw, order=order)
        if model.floor_kw is not None:
            ev_kw = socket_kw.sum(1)
    battery_kw = battery_power_kw(model, state, wanted_kw, ev_kw)
    # Of the two the lesser is right.
    # Rounding may carry the SoC past a bound by 1e-7; from there it goes back only.
    stored_kw = torch.minimum(battery_kw, battery_kw * model.losses)
    soc = torch.add(state.soc, stored_kw, alpha=model.soc_per_kw)
    if model.truth is None or state.true_kw is None:
        left_kw = state.owed_kw - socket_kw
        following, unmet_kw = arrive(model, state.place + 1, soc, left_kw)
        misled_kw = None
    else:
        # Who refuses power is full. The battery did what was decided before that showed.
        refuses = (socket_kw if as_told else state.power_kw) > state.true_kw
        socket_kw = torch.minimum(socket_kw, state.true_kw)
        left_kw = torch.where(refuses, model.zero, (told.owed_kw - socket_kw).relu())
        ev_kw, true_left_kw = socket_kw.sum(1), state.true_kw - socket_kw
        following, unmet_kw = arrive(model, state.place + 1, soc, left_kw, true_left_kw)
        # What was due by what was said is due to no wrong announcement.
        due_kw = (left_kw - told.later_kw).relu()
        leaves = model.one - model.sockets[2].index_select(0, state.place + 1)
        misled_kw = ((true_left_kw - due_kw).relu() * leaves).sum(1)
    return following, Flows(
        ev_kw=ev_kw,
        battery_kw=battery_kw,
        stored_kw=stored_kw,
        grid_kw=state.net_kw + ev_kw + battery_kw,
        unmet_kw=unmet_kw,
        misled_kw=misled_kw,
        soc=soc,
        socket_kw=socket_kw,
    )
