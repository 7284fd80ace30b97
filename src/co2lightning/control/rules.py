"""The rules a learned controller is measured against.

Shapes: P steps of the site, B at once, A = 2 actions, C columns of sockets, n steps that are looked
ahead. Every rule maps (model, state) to an action [B, A] or to powers, and sees no more than a
controller does.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from co2lightning.control.outlook import Outlook
from co2lightning.control.shield import dispatch, ev_power_kw, vehicles_total_kw
from co2lightning.control.state import Powers, SiteModel, State, within
from co2lightning.site.model import DAY_H, Site

Rule = Callable[[SiteModel, State], Tensor | Powers]


def _greedy_battery(model: SiteModel, others_kw: Tensor) -> Tensor:
    """Return the battery action [B] for load + vehicles - PV: store a surplus, serve a deficit."""
    return -(others_kw / model.battery_kw).clamp(-1.0, 1.0)


def uncontrolled(model: SiteModel, state: State) -> Tensor | Powers:
    """Charge on arrival, leave the battery idle: the site without any control.

    Who charges on arrival asks nobody, so it does so whatever drivers announce.
    """
    if state.true_kw is not None:
        return Powers(state.power_kw, torch.zeros_like(state.soc), as_told=False)
    return torch.stack([torch.ones_like(state.soc), torch.zeros_like(state.soc)], dim=1)


def rbc_a(model: SiteModel, state: State) -> Tensor:
    """Charge on arrival, greedy battery."""
    action_ev = torch.ones_like(state.soc)
    others_kw = state.net_kw + ev_power_kw(state, action_ev)
    return torch.stack([action_ev, _greedy_battery(model, others_kw)], dim=1)


def rbc_b(model: SiteModel, state: State) -> Tensor:
    """Charge vehicles from the sun where they can wait, greedy battery."""
    # Where load - PV lies between -must (0) and -could (-1): vehicles take max(must, PV - load).
    share = state.need_kw / torch.maximum(state.spread_kw, model.tiny)
    action_ev = -2.0 * share.clamp(-1.0, 0.0) - 1.0
    # The grid connection does not matter: beyond must these vehicles take a surplus only.
    others_kw = model.zero.clamp(state.need_kw, state.net_kw + state.could_total_kw)
    if model.floor_kw is not None:
        others_kw = state.net_kw + dispatch(model, state, others_kw - state.net_kw).sum(1)
    return torch.stack([action_ev, _greedy_battery(model, others_kw)], dim=1)


def steps_left(later_kw: Tensor, power_kw: Tensor, known: int) -> Tensor:
    """Return how many steps [B, C] of each stay follow this one, of which so many are known."""
    return (later_kw / power_kw).round().long().clamp(max=known - 1)


def beyond_cheaper_kw(state: State, steps: Tensor) -> Tensor:
    """Return what each vehicle is owed beyond what cheaper steps can give; the last step partial.

    Args:
        steps: [..., B, C] how many of its stay are expected to be cheaper than this one.

    Returns:
        [..., B, C] in kW.
    """
    return within(state.owed_kw - state.power_kw * steps, state.must_kw, state.could_kw)


def solar_powers_kw(
    model: SiteModel,
    state: State,
    least_kw: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Return the powers [B, C] of vehicles that take the surplus, those of least laxity first.

    Args:
        least_kw: [B, C] what each gets in any case, by default must.
        order: The sockets [B, C] by laxity, where that is known already.
    """
    least_total_kw = state.must_total_kw if least_kw is None else least_kw.sum(1)
    ev_kw = (-state.net_kw).clamp(least_total_kw, state.could_total_kw)
    return dispatch(model, state, ev_kw, least_kw=least_kw, order=order)


# --- what a search chooses -----------------------------------------------------------------------


class Window(NamedTuple):
    """A time of each day, across midnight too; 0 steps are none.

    Tensors [B] give each of B at once a window of its own.
    """

    begin: int | Tensor = 0  # slot of the day
    steps: int | Tensor = 0


class Choice(NamedTuple):
    """What RBC C does with vehicles and battery."""

    vehicles: str = "arrival"  # one of `VEHICLES`
    charge: Window = Window()  # in which all vehicles charge
    greedy: bool | Tensor = False  # whether the battery stores a surplus and serves the load
    fill: Window = Window()  # in which it charges to a level and gives nothing below it
    fill_soc: float | Tensor = 0.0
    hold: Window = Window()  # in which it gives nothing


_IN_WORDS = {
    "arrival": "on arrival",
    "solar": "from the sun",
    "cheap": "in the cheap hours of each stay",
    "solar_cheap": "from the sun and in the cheap hours of each stay",
}
VEHICLES = tuple(_IN_WORDS)
"""When vehicles charge, the simplest first."""


def rbc_c(choice: Choice, outlook: Outlook, model: SiteModel, state: State) -> Powers:
    """Do what was chosen for the site: see `Choice`."""
    slot = outlook.slot.index_select(0, state.place)

    def within(window: Window) -> Tensor:
        return (slot - window.begin) % outlook.slots < window.steps

    wanted_kw = state.could_kw
    if choice.vehicles != "arrival":
        wanted_kw = _vehicles_kw(choice.vehicles, outlook, model, state)
        wanted_kw = torch.where(within(choice.charge)[:, None], state.could_kw, wanted_kw)
    others_kw = state.net_kw + vehicles_total_kw(model, state, wanted_kw)
    battery_kw = -others_kw * choice.greedy
    battery_kw = torch.where(within(choice.hold), battery_kw.relu(), battery_kw)
    # Up to the level at what charging takes, down to it at what discharging gives: the greater.
    level_kw = ((choice.fill_soc - state.soc) * model.kw_per_soc).amax(0)
    fill_kw = torch.maximum(battery_kw, level_kw)
    return Powers(wanted_kw, torch.where(within(choice.fill), fill_kw, battery_kw))


def _vehicles_kw(vehicles: str, outlook: Outlook, model: SiteModel, state: State) -> Tensor:
    """Return the power [B, C] of vehicles that charge from the sun, in cheap hours, or both."""
    if vehicles == "solar":
        return solar_powers_kw(model, state)
    cheaper = outlook.cheaper if vehicles == "cheap" else outlook.cheaper_or_sun
    steps = steps_left(state.later_kw, state.power_kw, cheaper.shape[1])
    cheap_kw = beyond_cheaper_kw(state, cheaper.index_select(0, state.place).gather(1, steps))
    return cheap_kw if vehicles == "cheap" else solar_powers_kw(model, state, cheap_kw)


def words(choice: Choice, site: Site) -> str:
    """Say what RBC C does with what a site has, so that a person can do it by hand."""
    slots = site.steps(DAY_H)

    def clock(slot: int) -> str:
        minutes = slot % slots * site.step_minutes
        return f"{minutes // 60:02d}:{minutes % 60:02d}"

    def times(window: Window) -> str:
        begin, steps = int(window.begin), int(window.steps)
        return "all day" if steps >= slots else f"from {clock(begin)} to {clock(begin + steps)}"

    parts: list[str] = []
    if len(site.sessions.arrival):
        plain = _IN_WORDS[choice.vehicles]
        charging = f"charge {plain}"
        if choice.charge.steps and choice.vehicles != "arrival":
            charging = f"charge all {times(choice.charge)}, otherwise {plain}"
        parts.append(charging)
    if site.battery:
        doing = ["store surplus and serve the load" if choice.greedy else "idle"]
        if choice.fill.steps:
            doing.append(f"fill to {100 * float(choice.fill_soc):.0f} % {times(choice.fill)}")
        if choice.hold.steps:
            doing.append(f"hold {times(choice.hold)}")
        parts.append(f"battery: {', '.join(doing)}")
    return "; ".join(parts) or "nothing to control"


RULES: dict[str, Rule] = {"uncontrolled": uncontrolled, "rbc_a": rbc_a, "rbc_b": rbc_b}
"""Those that are the same on every site."""
