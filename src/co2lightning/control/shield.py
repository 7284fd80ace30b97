"""What the shield makes of wishes: powers that serve what must be served and break no limit."""

import torch
from torch import Tensor

from co2lightning.control.state import State


def ev_power_kw(state: State, share: Tensor) -> Tensor:
    """Return the EV budget [B] in kW for a share [B] of the way from must (0) to could (1).

    Where the grid connection is too small the budget yields, but never below what must be charged.
    """
    wanted_kw = torch.addcmul(state.must_total_kw, state.spread_kw, share)
    return state.supply_kw.clamp(state.must_total_kw, wanted_kw)


def battery_power_kw(state: State, wanted_kw: Tensor, ev_kw: Tensor) -> Tensor:
    """Return the battery's power [B] in kW, charging positive, as near to `wanted_kw` as can be.

    Where load and vehicles leave the grid connection too little room charging yields first, and
    then the battery gives what the connection cannot.
    """
    wanted_kw = torch.minimum(wanted_kw, state.room_kw - ev_kw)
    return wanted_kw.clamp(state.battery_min_kw, state.battery_max_kw)
