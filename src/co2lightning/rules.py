"""The rules a learned controller is measured against, in the controller's own action space.

Shapes: B days at once, A = 2 actions. Every rule maps (model, state) to an action [B, A] and sees
no more than a controller does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from co2lightning.physics import Flows, SiteModel, State, begin_day, ev_power_kw, step

Rule = Callable[[SiteModel, State], Tensor]


def charge_on_arrival(state: State) -> Tensor:
    """Return the EV action [B] that charges every vehicle as fast as it can take."""
    return torch.ones_like(state.soc)


def solar_following(state: State) -> Tensor:
    """Return the EV action [B] that charges at max(must, PV - load)."""
    spread_kw = state.could_total_kw - state.must_total_kw
    surplus_kw = state.pv_kw - state.load_kw - state.must_total_kw
    share = (surplus_kw / spread_kw.clamp(min=1e-6)).clamp(0.0, 1.0)
    return 2.0 * share - 1.0


def greedy_battery(model: SiteModel, state: State, action_ev: Tensor) -> Tensor:
    """Return the battery action [B] that stores any surplus and serves any deficit."""
    deficit_kw = state.load_kw + ev_power_kw(model, state, action_ev) - state.pv_kw
    return (-deficit_kw / max(model.battery_kw, 1e-6)).clamp(-1.0, 1.0)


def uncontrolled(model: SiteModel, state: State) -> Tensor:
    """Charge on arrival, leave the battery idle: the site without any control."""
    action_ev = charge_on_arrival(state)
    return torch.stack([action_ev, torch.zeros_like(action_ev)], dim=1)


def solar_only(model: SiteModel, state: State) -> Tensor:
    """Charge vehicles from the sun where they can wait, leave the battery idle."""
    action_ev = solar_following(state)
    return torch.stack([action_ev, torch.zeros_like(action_ev)], dim=1)


def rbc_a(model: SiteModel, state: State) -> Tensor:
    """Charge on arrival, greedy battery."""
    action_ev = charge_on_arrival(state)
    return torch.stack([action_ev, greedy_battery(model, state, action_ev)], dim=1)


def rbc_b(model: SiteModel, state: State) -> Tensor:
    """Charge vehicles from the sun where they can wait, greedy battery."""
    action_ev = solar_following(state)
    return torch.stack([action_ev, greedy_battery(model, state, action_ev)], dim=1)


RULES: dict[str, Rule] = {"uncontrolled": uncontrolled, "rbc_a": rbc_a, "rbc_b": rbc_b}


@torch.inference_mode()
def run_days(model: SiteModel, rule: Rule, day: Tensor, soc_start: Tensor) -> Trace:
    """Run a rule, or any policy in its form, through whole days.

    Args:
        day: [B] indices of the days to run, each once.
        soc_start: [B] state of charge at midnight.
    """
    states: list[State] = []
    flows: list[Flows] = []
    state: State | None = begin_day(model, day.to(model.device), soc_start.to(model.device))
    while state is not None:
        states.append(state)
        state, flow = step(model, state, rule(model, state))
        flows.append(flow)
    return Trace(states, flows)


class Trace(NamedTuple):
    """Days as they went: a state and its flows for each of the T steps."""

    states: list[State]
    flows: list[Flows]

    def total(self, name: str) -> Tensor:
        """Return the day's sum [B] of one of the flows, for instance "co2_kg"."""
        return torch.stack([getattr(flow, name) for flow in self.flows]).sum(0)
