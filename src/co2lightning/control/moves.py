"""Moves: what any site can do in a step, and how a controller's numbers weigh them.

Vehicles charge what presses, from the sun, in the cheap hours of each stay, all now, or in the
hours that are cheap by their price alone. The battery holds, stores a surplus, serves a deficit,
does both, or fills from the grid. Each move of the vehicles gives a power for every one of them,
and one set of weights mixes them all: ten numbers whatever the number of sockets. What a site
cannot do has no weight, so one network fits every site. The rules are corners of this.

Shapes: P steps of the site, B at once, C columns of sockets, V = 5 moves of vehicles, M = 5 of the
battery, A = V + M.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from co2lightning.control.outlook import Outlook, sun_exceeds_load
from co2lightning.control.rules import beyond_cheaper_kw, solar_powers_kw, steps_left
from co2lightning.control.shield import vehicles_total_kw
from co2lightning.control.state import Powers, SiteModel, State, laxity_order
from co2lightning.site.model import Site

MOVES = (
    ("must", "charge only what presses"),
    ("solar", "charge from the surplus, least laxity first"),
    ("cheap", "charge each vehicle in the cheap hours of its stay, sun counted as free"),
    ("could", "charge all now"),
    ("cheap_price", "charge each vehicle in the hours of its stay that are cheap without sun"),
    ("hold", "battery: leave it as it is"),
    ("store", "battery: store the surplus"),
    ("serve", "battery: serve the deficit"),
    ("greedy", "battery: store the surplus and serve the deficit"),
    ("fill", "battery: charge it at full power"),
)
"""Name and meaning of each number of an action."""

ACTIONS = {"powers": 2, "moves": len(MOVES)}
"""How many numbers an action has: EV and battery power, or what moves weigh."""


def kind_of(action_dim: int) -> str:
    """Return what actions of so many numbers are; on a site there is no other."""
    return next((kind for kind, width in ACTIONS.items() if width == action_dim), "")


SHARPNESS = 5.0  # what an action of 1 is as a logit
_ROWS_AT_ONCE = 8192
_NEVER = -1e4  # the logit of what a site cannot do; finite, so that gradients are


class Corner(NamedTuple):
    """One move of the vehicles and one of the battery, that weigh most: where a policy begins."""

    vehicles: int  # among the V
    battery: int  # among the M

    def action(self, vehicles: float = 0.4, battery: float = 0.6) -> tuple[float, ...]:
        """Return what weighs these two most, yet leaves others in sight: 0.65, 0.83 of five."""
        weighed = [0.0] * len(MOVES)
        weighed[self.vehicles], weighed[_GROUP + self.battery] = vehicles, battery
        return tuple(weighed)


_GROUP = len(MOVES) // 2


class MoveTables(NamedTuple):
    """What the moves of a site look up, on the model's device."""

    # [2, P + 1, C] steps of each stay expected to be cheaper, with sun and without; [1, ...] if
    # there is none:
    cheaper: Tensor
    mask: Tensor  # [A] 0.0, or for what the site cannot do `_NEVER`
    sun: bool  # whether there may be a surplus


class Moves(NamedTuple):
    """What each move of the vehicles would do now."""

    socket_kw: Tensor  # [V, B, C]
    order: Tensor  # [B, C] sockets by laxity


def move_tables(site: Site, model: SiteModel, outlook: Outlook) -> MoveTables:
    """Return what the moves of a site look up; the three are on one device."""
    sun = sun_exceeds_load(site)
    known = (outlook.cheaper_or_sun, outlook.cheaper) if sun else (outlook.cheaper,)
    cheaper = _of_stays(model, known)
    price = site.import_price
    varies = bool(price.max() - price.min() > 1e-6)
    vehicles, battery = bool(site.sockets), site.battery is not None
    can = {
        "solar": vehicles and sun,
        "cheap": vehicles and (sun or varies),
        "could": vehicles,
        "cheap_price": vehicles and sun and varies,
        "store": battery and sun,
        "serve": battery,
        "greedy": battery and sun,
        "fill": site.battery is not None and site.battery.may_charge_from_grid,
    }
    mask = [0.0 if can.get(name, True) else _NEVER for name, _ in MOVES]
    return MoveTables(cheaper, torch.tensor(mask).to(model.zero), sun)


def _of_stays(model: SiteModel, signals: Sequence[Tensor]) -> Tensor:
    """Return how many of the steps left of each stay are cheaper [S, P + 1, C], for S signals.

    Args:
        signals: Each [P + 1, n + 1], how many of the next 0, 1, ... n steps are.
    """
    later_kw, power_kw = model.sockets[:2]
    found = signals[0].new_empty(len(signals), *later_kw.shape)
    for first in range(0, len(later_kw), _ROWS_AT_ONCE):  # the index takes 8 bytes for each
        rows = slice(first, first + _ROWS_AT_ONCE)
        for own, known in zip(found, signals, strict=True):
            steps = steps_left(later_kw[rows], power_kw[rows], known.shape[1])
            own[rows] = known[rows].gather(1, steps)
    return found


def corners(tables: MoveTables) -> list[Corner]:
    """Return the corners of what a site can do, the simplest first."""
    able = (tables.mask == 0.0).unflatten(0, (2, -1)).tolist()
    each = ([i for i in range(_GROUP) if group[i]] for group in able)
    return [Corner(*pair) for pair in itertools.product(*each)]


def in_words(corner: Corner, site: Site) -> str:
    """Say what a corner does, of the parts that a site has."""
    vehicles, battery = MOVES[corner.vehicles], MOVES[_GROUP + corner.battery]
    parts = (vehicles, bool(site.sockets)), (battery, site.battery is not None)
    return "; ".join(meaning for (_, meaning), there in parts if there)


def moves_of(tables: MoveTables, model: SiteModel, state: State) -> Moves:
    """Return what each move would do in a state."""
    order = laxity_order(model, state.laxity)
    cheap_kw = beyond_cheaper_kw(state, tables.cheaper.index_select(1, state.place))
    solar_kw = solar_powers_kw(model, state, order=order) if tables.sun else state.must_kw
    each = state.must_kw, solar_kw, cheap_kw[0], state.could_kw, cheap_kw[-1]
    return Moves(torch.stack(each), order)


def powers_of(
    tables: MoveTables, model: SiteModel, state: State, moves: Moves, action: Tensor
) -> Tensor | Powers:
    """Return what an action [B, A] means to the physics; two numbers are powers as they are.

    Each group's weights are the softmax of 5 x the action, so 1 beside four moves of -1 is all but
    alone, and what is alike weighs alike.
    """
    if action.shape[1] != len(MOVES):
        return action
    logits = torch.add(tables.mask, action.clamp(model.minus_one, model.one), alpha=SHARPNESS)
    # Softmax by hand, at most e^5 each: torch's own takes as long as all that follows.
    weights = logits.exp().unflatten(1, (2, -1))
    weights = weights / weights.sum(2, keepdim=True)
    of_vehicles, of_battery = weights.unbind(1)
    each_kw = moves.socket_kw.transpose(0, 1)
    wanted_kw = torch.bmm(of_vehicles.unsqueeze(1), each_kw).squeeze(1)
    ev_kw = vehicles_total_kw(model, state, wanted_kw, moves.order)
    surplus_kw = (-(state.net_kw + ev_kw)).clamp(state.battery_min_kw, state.battery_max_kw)
    _, store, serve, greedy, fill = of_battery.unbind(1)
    stored_kw = (store + greedy) * surplus_kw.relu()
    battery_kw = torch.addcmul(stored_kw, serve + greedy, (-surplus_kw).relu(), value=-1.0)
    return Powers(wanted_kw, torch.addcmul(battery_kw, fill, state.battery_max_kw))
