"""What a controller knows at the beginning of a step: the site's tables and its state.

Pure functions on torch tensors. A step of 64 days is bounded by the number of tensor operations, a
few microseconds each whatever their size. Hence a few liberties: tables hold what depends on the
step alone, the equipment's numbers are tensors (arithmetic with a Python float takes twice as
long), two rows go through one operation where they can, a state carries what both step and
observation need.

Shapes: P steps of the site, P + 1 places in the tables, B sites at once, C sockets that are ever
taken (one that is never taken where there is none), K prices, M that the meter counts afterwards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.site.model import Battery, Floats, Site

_NO_BATTERY = Battery(1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
_ROUNDED_UP = 1.0001  # more than a sum of powers in float32 is off by
_FRACTION_BITS = 10  # of a laxity's step, at least
_STEPS_AT_ONCE = 1 << 20  # of sessions; bounds the memory of a long year with many sockets


class SiteModel(NamedTuple):
    """A site as tensors on one device. Build it with `build_model`.

    Who stands where and for how long is a fact that no controller changes, so it is looked up, not
    simulated. The step after that at place p is at place p + 1; at the last place, where the last
    step leads, nobody stands.
    """

    series: Tensor  # [2 + K, P + 1]: what `State` calls net_kw, room_kw, prices
    metered: Tensor  # [M, P + 1]: what no step looks up, see `sim.objective`
    sockets: Tensor  # [4, P + 1, C]: later kW, session kW, 1.0 if it stays, owed kW
    truth: Tensor | None  # [2, P + 1, C] later and owed kW in truth; None where `sockets` has them
    floor_kw: Tensor | None  # [C] a socket's least power; None where no socket has one
    soc_bounds: Tensor  # [2, 1] the highest SoC that operation may reach, the lowest
    kw_per_soc: Tensor  # [2, 1] what charges, discharges the battery by 1 within a step
    most_kw: Tensor  # [2, 1] its power at the AC side, 0
    least_kw: Tensor  # [2, 1] 0, minus its power
    action_scale: Tensor  # [2] from actions to the share of the EV power and to the battery's kW
    action_shift: Tensor  # [2]
    soc_per_kw: float  # what a kW at the AC side charges within a step
    step_h: float
    laxity_bits: int  # of the longest stay, in steps
    may_charge_from_grid: bool
    ample: bool  # whether the connection always has room for whoever stands there, at full power
    # The rest is 0-dim.
    losses: Tensor  # what a kW given takes out of the battery, in kW that charge it again
    battery_kw: Tensor  # rating at the AC side
    zero: Tensor
    one: Tensor
    minus_one: Tensor
    tiny: Tensor

    @property
    def device(self) -> torch.device:
        return self.zero.device


class Carry(NamedTuple):
    """What a step takes over from the one before; everything else follows from it."""

    place: Tensor  # [B] where this step stands in the tables
    soc: Tensor  # [B] 0-1
    owed_kw: Tensor  # [B, C] at the meter: the power that would finish a vehicle within this step
    true_kw: Tensor | None = None  # [B, C] what truly would, where drivers announce something else

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What there is of it: `Carry(*parts)` is the same again."""
        return tuple(part for part in self if part is not None)

    @property
    def truly_owed_kw(self) -> Tensor:
        """What vehicles would truly take, [B, C]; no controller looks at it."""
        return self.owed_kw if self.true_kw is None else self.true_kw


class State(NamedTuple):
    """The site at the beginning of a step, arrivals of that step included."""

    place: Tensor  # [B] where this step stands in the tables
    soc: Tensor  # [B] 0-1
    net_kw: Tensor  # [B] building load - PV
    room_kw: Tensor  # [B] what the grid connection leaves for vehicles and battery
    prices: list[Tensor]  # K of [B], of nobody's business here: see `sim.objective`
    reach_kw: Tensor  # [2, B] what would fill the battery within this step, what would empty it
    battery_max_kw: Tensor  # [B] what the battery can take in this step, >= 0
    battery_min_kw: Tensor  # [B] what it can give, <= 0
    owed_kw: Tensor  # [B, C] at the meter: the power that would finish a vehicle within this step
    power_kw: Tensor  # [B, C] a vehicle's full power, 1.0 where none stands
    later_kw: Tensor  # [B, C] that times the steps after this one in its stay
    laxity: Tensor  # [B, C] steps a vehicle can still wait at full power afterwards
    must_kw: Tensor  # [B, C] the shield's minimum
    could_kw: Tensor  # [B, C] what the vehicle can take
    must_total_kw: Tensor  # [B]
    could_total_kw: Tensor  # [B]
    spread_kw: Tensor  # [B] could - must
    need_kw: Tensor  # [B] load + must - PV
    supply_kw: Tensor  # [B] EV power the grid connection has room for when the battery helps
    true_kw: Tensor | None  # of `Carry`; of no controller's business

    @property
    def carry(self) -> Carry:
        return Carry(self.place, self.soc, self.owed_kw, self.true_kw)


class Powers(NamedTuple):
    """What a controller wants that decides for each vehicle by itself."""

    socket_kw: Tensor  # [B, C]
    battery_kw: Tensor  # [B] at the AC side, charging positive
    as_told: bool = True  # False: whatever drivers announce, vehicles and shield go by the truth


def build_model(
    site: Site,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prices: Sequence[Floats] = (),
    metered: Sequence[Floats] = (),
) -> SiteModel:
    """Turn a site into tables of `dtype` on `device`.

    Args:
        prices: What else is to be looked up of a step, each [P].
        metered: What is to be looked up of steps that are done, each [P].
    """
    sessions, told, n_steps, step_h = site.sessions, site.sessions_told, site.n_steps, site.step_h
    places, n_columns = n_steps + 1, max(1, len(sessions.used_sockets))
    exact = np.float64 if dtype == torch.float64 else np.float32
    sockets = np.zeros((4, places * n_columns), dtype=exact)
    later_kw, max_kw, stays, arriving_kw = sockets
    max_kw[:] = 1.0  # where no vehicle stands, nothing is owed; this is only divided by
    window = sessions.departure - sessions.arrival
    arrival = sessions.arrival * n_columns + sessions.column
    arriving_kw[arrival] = told.energy_kwh / step_h
    truth = None
    if site.told is not None:
        truth = np.zeros((2, places * n_columns), dtype=exact)
        truth[1, arrival] = sessions.energy_kwh / step_h
    stay_told = told.departure - told.arrival
    standing_kw = np.zeros(places)
    cuts = np.arange(_STEPS_AT_ONCE, int(window.sum()), _STEPS_AT_ONCE)
    for some in np.split(np.arange(len(window)), np.searchsorted(window.cumsum(), cuts)):
        # Where a session stands in a column, step after step of its stay.
        steps = window[some]
        since = np.arange(int(steps.sum())) - np.repeat(np.cumsum(steps) - steps, steps)
        stay = np.repeat(arrival[some], steps) + since * n_columns
        power_kw = np.repeat(sessions.max_kw[some].astype(exact), steps)
        # Who said to be gone by now is about to leave.
        later_kw[stay] = power_kw * np.maximum(np.repeat(stay_told[some] - 1, steps) - since, 0)
        if truth is not None:
            truth[0, stay] = power_kw * (np.repeat(steps - 1, steps) - since)
        max_kw[stay] = power_kw
        standing_kw += np.bincount(stay // n_columns, power_kw, places)
        stays[stay] = since > 0

    floor_kw = np.zeros(n_columns)
    floor_kw[sessions.column] = sessions.min_kw
    net_kw = site.load_kw - site.pv_kw
    series = np.stack([net_kw, site.import_limit_kw - net_kw, *prices])
    afterwards = np.stack(metered) if metered else np.zeros((0, n_steps))
    battery = site.battery or _NO_BATTERY
    charge_kw_per_soc = battery.capacity_kwh / battery.charge_efficiency / step_h
    discharge_kw_per_soc = battery.capacity_kwh * battery.discharge_efficiency / step_h

    def tensor(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=device)

    return SiteModel(
        series=tensor(np.pad(series, ((0, 0), (0, 1)))),
        metered=tensor(np.pad(afterwards, ((0, 0), (0, 1)))),
        sockets=tensor(sockets.reshape(4, places, n_columns)),
        truth=None if truth is None else tensor(truth.reshape(2, places, n_columns)),
        floor_kw=tensor(floor_kw) if floor_kw.any() else None,
        soc_bounds=tensor([[battery.soc_max], [battery.least_soc]]),
        kw_per_soc=tensor([[charge_kw_per_soc], [discharge_kw_per_soc]]),
        most_kw=tensor([[battery.power_kw], [0.0]]),
        least_kw=tensor([[0.0], [-battery.power_kw]]),
        action_scale=tensor([0.5, battery.power_kw]),
        action_shift=tensor([0.5, 0.0]),
        soc_per_kw=1.0 / charge_kw_per_soc,
        step_h=step_h,
        laxity_bits=int(max(window.max(initial=1), stay_told.max(initial=1))).bit_length(),
        may_charge_from_grid=battery.may_charge_from_grid,
        ample=bool(((series[1] > _ROUNDED_UP * standing_kw[:-1]) | (standing_kw[:-1] == 0)).all()),
        losses=tensor(charge_kw_per_soc / discharge_kw_per_soc),
        battery_kw=tensor(battery.power_kw),
        zero=tensor(0.0),
        one=tensor(1.0),
        minus_one=tensor(-1.0),
        tiny=tensor(1e-6),
    )


def arrive(
    model: SiteModel,
    place: Tensor,
    soc: Tensor,
    left_kw: Tensor,
    true_left_kw: Tensor | None = None,
) -> tuple[State, Tensor]:
    """Let vehicles leave and arrive before the step at `place` and work out what can be done in it.

    Args:
        left_kw: [B, C] what the vehicles of the step before are still owed.
        true_left_kw: [B, C] what they would truly take, where drivers announce something else.

    Returns:
        The state and what those that left are truly still owed [B].
    """
    later_kw, power_kw, stays, arriving_kw = model.sockets.index_select(1, place).unbind(0)
    staying_kw = left_kw * stays
    if model.truth is None or true_left_kw is None:
        unmet_kw, true_kw = (left_kw - staying_kw).sum(1), None
    else:
        true_kw = true_left_kw * stays
        unmet_kw = (true_left_kw - true_kw).sum(1)
        true_kw = true_kw + model.truth[1].index_select(0, place)
    carry = Carry(place, soc, staying_kw + arriving_kw, true_kw)
    return _work_out(model, carry, later_kw, power_kw), unmet_kw


def restore(model: SiteModel, carry: Carry) -> State:
    """Return the state at the beginning of a step from what it came from."""
    later_kw, power_kw = model.sockets[:2].index_select(1, carry.place).unbind(0)
    return _work_out(model, carry, later_kw, power_kw)


def in_truth(model: SiteModel, state: State) -> State:
    """Return the same state as it is if vehicles do what they will do, not what was announced."""
    if model.truth is None or state.true_kw is None:
        return state
    carry = Carry(state.place, state.soc, state.true_kw, state.true_kw)
    return _work_out(model, carry, model.truth[0].index_select(0, state.place), state.power_kw)


def _work_out(model: SiteModel, carry: Carry, later_kw: Tensor, power_kw: Tensor) -> State:
    """Work out what can be done in a step; later and power [B, C] are the sessions' of it."""
    place, soc, owed_kw, true_kw = carry
    net_kw, room_kw, *prices = model.series.index_select(1, place).unbind(0)
    # Clamped, not the lesser of two: where they are equal it follows what is owed, as must does.
    could_kw = owed_kw.clamp(max=power_kw)
    # What the steps after this one cannot deliver at full power must be charged now.
    pressing_kw = owed_kw - later_kw
    must_kw = pressing_kw.clamp(model.zero, could_kw)
    if model.floor_kw is not None:
        least_kw = torch.minimum(could_kw, model.floor_kw)
        must_kw = torch.where(must_kw > model.zero, torch.maximum(must_kw, least_kw), must_kw)
    laxity = torch.addcdiv(model.one, pressing_kw, power_kw, value=-1.0)
    must_total_kw, could_total_kw = must_kw.sum(1), could_kw.sum(1)
    reach_kw = (model.soc_bounds - soc) * model.kw_per_soc
    battery_max_kw, battery_min_kw = reach_kw.clamp(model.least_kw, model.most_kw).unbind(0)
    return State(
        place=place,
        soc=soc,
        net_kw=net_kw,
        room_kw=room_kw,
        prices=prices,
        reach_kw=reach_kw,
        battery_max_kw=battery_max_kw,
        battery_min_kw=battery_min_kw,
        owed_kw=owed_kw,
        power_kw=power_kw,
        later_kw=later_kw,
        laxity=laxity,
        must_kw=must_kw,
        could_kw=could_kw,
        must_total_kw=must_total_kw,
        could_total_kw=could_total_kw,
        spread_kw=could_total_kw - must_total_kw,
        need_kw=net_kw + must_total_kw,
        supply_kw=room_kw - battery_min_kw,
        true_kw=true_kw,
    )


def within(values: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Return values clamped; of bounds that are equal `torch.clamp` would lose the gradient."""
    return torch.minimum(torch.maximum(values, least), most)


def laxity_order(model: SiteModel, laxity: Tensor) -> Tensor:
    """Return the sockets [B, C] by ascending laxity, the lower one first among equals.

    Laxity and socket number are packed into one integer, so that sorting the values alone gives
    the order: numpy on a CPU does that 20 times faster than torch sorts with indices. Of the 31
    bits, 128 sockets and stays of a day of 15-minute steps leave 17 for the fraction of a step,
    what float32 resolves at a laxity above 64; where they leave too few the integer is longer.
    """
    n_sockets = laxity.shape[1]
    socket_bits = (n_sockets - 1).bit_length()
    fraction_bits = 31 - model.laxity_bits - socket_bits
    long = fraction_bits < _FRACTION_BITS
    per_step = 1 << (17 if long else fraction_bits)
    laxity = laxity.detach() if laxity.requires_grad else laxity
    if laxity.is_cpu and not torch.compiler.is_compiling():
        whole = np.int64 if long else np.int32
        with np.errstate(invalid="ignore"):  # NaN of a policy that diverged: others tell
            key = (laxity.numpy() * np.float32(per_step)).astype(whole)
        key <<= socket_bits
        key |= np.arange(n_sockets, dtype=whole)
        key.sort(axis=1)
        key &= (1 << socket_bits) - 1
        return torch.as_tensor(key).long()
    kind = torch.int64 if long else torch.int32
    key = (laxity * per_step).to(kind) << socket_bits
    key = key | torch.arange(n_sockets, dtype=kind, device=laxity.device)
    rows = _sort_rows(key) if key.is_cpu else key.sort(dim=1).values
    return (rows & ((1 << socket_bits) - 1)).long()


@torch.library.custom_op("co2lightning::sort_rows", mutates_args=())
def _sort_rows(key: Tensor) -> Tensor:
    """Sort each row of integers [B, C] with numpy, which a compiled graph cannot do by itself."""
    return torch.as_tensor(np.sort(key.numpy(), axis=1))


_sort_rows.register_fake(torch.empty_like)  # pyright: ignore[reportUnknownMemberType]
