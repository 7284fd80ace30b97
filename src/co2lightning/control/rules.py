"""The rules a learned controller is measured against.

Shapes: B at once, A = 2 actions, C columns of sockets, L leads of a forecast. Every rule maps
(model, state) to an action [B, A] or to powers, and sees no more than a controller does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from co2lightning.control.shield import dispatch, ev_power_kw
from co2lightning.control.state import Powers, SiteModel, State

Rule = Callable[[SiteModel, State], Tensor | Powers]


def solar_share(model: SiteModel, state: State) -> Tensor:
    """Return where [B] load - PV lies between -must (0) and -could (-1); it can lie beyond."""
    return state.need_kw / torch.maximum(state.spread_kw, model.tiny)


def _solar_following(model: SiteModel, state: State) -> Tensor:
    """Return the EV action [B] that charges at max(must, PV - load), as far as vehicles allow."""
    return -2.0 * solar_share(model, state).clamp(-1.0, 0.0) - 1.0


def after_solar_kw(model: SiteModel, state: State) -> Tensor:
    """Return load + vehicles - PV [B] in kW under solar-following.

    The grid connection does not matter: beyond must these vehicles take a surplus only.
    """
    others_kw = model.zero.clamp(state.need_kw, state.net_kw + state.could_total_kw)
    if model.floor_kw is None:
        return others_kw
    return state.net_kw + dispatch(model, state, others_kw - state.net_kw).sum(1)


def _greedy_battery(model: SiteModel, others_kw: Tensor) -> Tensor:
    """Return the battery action [B] for load + vehicles - PV: store a surplus, serve a deficit."""
    return -(others_kw / model.battery_kw).clamp(-1.0, 1.0)


def uncontrolled(model: SiteModel, state: State) -> Tensor:
    """Charge on arrival, leave the battery idle: the site without any control."""
    return torch.stack([torch.ones_like(state.soc), torch.zeros_like(state.soc)], dim=1)


def rbc_a(model: SiteModel, state: State) -> Tensor:
    """Charge on arrival, greedy battery."""
    action_ev = torch.ones_like(state.soc)
    others_kw = state.net_kw + ev_power_kw(state, action_ev)
    return torch.stack([action_ev, _greedy_battery(model, others_kw)], dim=1)


def rbc_b(model: SiteModel, state: State) -> Tensor:
    """Charge vehicles from the sun where they can wait, greedy battery."""
    action_ev = _solar_following(model, state)
    return torch.stack([action_ev, _greedy_battery(model, after_solar_kw(model, state))], dim=1)


def cheap_powers_kw(cheaper: Tensor, state: State) -> Tensor:
    """Return the power [B, C] of vehicles of which each charges in the cheap hours of its stay.

    What it is owed beyond what the steps of its stay can give that are expected to be cheaper than
    this one; the last step partial.

    Args:
        cheaper: [P + 1, L + 1] how many of the next 0, 1, ... L steps those are, at each place.
    """
    of_stay = cheaper.index_select(0, state.place)
    later = (state.later_kw / state.power_kw).round().long()
    steps = of_stay.gather(1, later.clamp(max=cheaper.shape[1] - 1))
    return (state.owed_kw - state.power_kw * steps).clamp(state.must_kw, state.could_kw)


RULES: dict[str, Rule] = {"uncontrolled": uncontrolled, "rbc_a": rbc_a, "rbc_b": rbc_b}
