"""What the shield makes of wishes: powers that serve what must be served and break no limit."""

import torch
from torch import Tensor

from co2lightning.control.state import SiteModel, State, laxity_order, within


def ev_power_kw(state: State, share: Tensor) -> Tensor:
    """Return the EV budget [B] in kW for a share [B] of the way from must (0) to could (1).

    Where the grid connection is too small the budget yields, but never below what must be charged.
    """
    wanted_kw = torch.addcmul(state.must_total_kw, state.spread_kw, share)
    return state.supply_kw.clamp(state.must_total_kw, wanted_kw)


def dispatch(
    model: SiteModel,
    state: State,
    ev_kw: Tensor,
    least_kw: Tensor | None = None,
    most_kw: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Share the EV budget `ev_kw` [B] among the sockets [B, C]: must first, then least laxity.

    Who would get less than its socket's least power waits: the budget is never exceeded.

    Args:
        least_kw: What each gets at least, by default must; the budget covers it.
        most_kw: What each gets at most, by default could.
        order: The sockets [B, C] by laxity, where that is known already.
    """
    most_kw = state.could_kw if most_kw is None else most_kw
    least_total_kw = state.must_total_kw if least_kw is None else least_kw.sum(1)
    least_kw = state.must_kw if least_kw is None else least_kw
    order = laxity_order(model, state.laxity) if order is None else order
    # What a vehicle goes without, negative: what those up to it could take beyond the budget, at
    # most what it could take itself.
    spare_kw = (least_kw - most_kw).gather(1, order)
    rest_kw = (ev_kw - least_total_kw).unsqueeze(1)
    without_kw = (spare_kw.cumsum(1) + rest_kw).clamp(spare_kw, model.zero)
    if without_kw.requires_grad:  # 0 of who has nothing to spare, whatever the others do
        without_kw = torch.where(spare_kw < model.zero, without_kw, model.zero)
    return _with_floor(model, state, most_kw.scatter_add(1, order, without_kw))


def _with_floor(model: SiteModel, state: State, socket_kw: Tensor) -> Tensor:
    """Return powers [B, C] of which those below their socket's least power wait."""
    if model.floor_kw is None:
        return socket_kw
    floor_kw = torch.minimum(state.could_kw, model.floor_kw) - model.tiny
    return torch.where(socket_kw < floor_kw, state.must_kw, socket_kw)


def vehicle_powers_kw(
    model: SiteModel, state: State, wanted_kw: Tensor, order: Tensor | None = None
) -> Tensor:
    """Return the powers [B, C] of vehicles as near to `wanted_kw` [B, C] as can be.

    Where the grid connection is too small they yield by the same order as a budget's.
    """
    wanted_kw = within(wanted_kw, state.must_kw, state.could_kw)
    if model.ample and order is not None:
        # In training, where it counts; what rules come to stays what it is to the last bit.
        return _with_floor(model, state, wanted_kw)
    ev_kw = within(state.supply_kw, state.must_total_kw, wanted_kw.sum(1))
    return dispatch(model, state, ev_kw, most_kw=wanted_kw, order=order)


def vehicles_total_kw(
    model: SiteModel, state: State, wanted_kw: Tensor, order: Tensor | None = None
) -> Tensor:
    """Return what all vehicles together get [B] where `wanted_kw` [B, C] is wanted of each."""
    if model.floor_kw is None:  # the connection alone may cut the sum
        return within(state.supply_kw, state.must_total_kw, wanted_kw.sum(1))
    return vehicle_powers_kw(model, state, wanted_kw, order).sum(1)


def battery_power_kw(model: SiteModel, state: State, wanted_kw: Tensor, ev_kw: Tensor) -> Tensor:
    """Return the battery's power [B] in kW, charging positive, as near to `wanted_kw` as can be.

    Where load and vehicles leave the grid connection too little room charging yields first, and
    then the battery gives what the connection cannot. Where it may not charge from the grid it
    takes a surplus only.
    """
    wanted_kw = torch.minimum(wanted_kw, state.room_kw - ev_kw)
    if not model.may_charge_from_grid:
        surplus_kw = -(state.net_kw + ev_kw)
        wanted_kw = torch.minimum(wanted_kw, torch.maximum(surplus_kw, model.zero))
    return wanted_kw.clamp(state.battery_min_kw, state.battery_max_kw)
