"""The physics of a site over B days at once: battery, sockets, shield, meter.

Pure functions on torch tensors: no Gymnasium, no Lightning, no in-place write, so a day can be
differentiated from its CO2 back to every action. Everything lives on one device; the step number
is a Python int, so nothing here waits for a GPU.

A step of 64 days is bounded by the number of tensor operations, a few microseconds each whatever
their size. Hence a few liberties: tables hold what depends on the day alone, the equipment's
numbers are tensors (arithmetic with a Python float takes twice as long), two rows go through one
operation where they can, a state carries what both step and observation need, and what is only
reported is worked out when it is asked for.

Shapes: T = 96 steps a day, D days of the site, B days at once, S sockets, A = 2 actions.
Signs: grid import and battery charging are positive. Units are in the names.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.site import STEP_H, Site, T

_REWARD_SHARE = 0.5  # of the day's mean intensity: what a kWh earns when it is stored or charged
_LAXITY_BITS = 7  # for the whole steps of a laxity: 96 < 2 ** 7


class SiteModel(NamedTuple):
    """A site as tensors on one device. Build it with `build_model`.

    Who stands where and for how long is a fact of the day that no controller changes, so it is
    looked up, not simulated. Step t of day d has place t * D + d in every table.
    """

    series: Tensor  # [5, T * D]: what `State` calls net_kw ... room_kw
    sockets: Tensor  # [4, T * D, S]: later kW, session kW, 1.0 if it stays, owed kW
    soc_bounds: Tensor  # [2, 1] soc_max, soc_min
    kw_per_soc: Tensor  # [2, 1] what charges, discharges the battery by 1 within a step
    action_scale: Tensor  # [2] from actions to the share of the EV power and to the battery's kW
    action_shift: Tensor  # [2]
    soc_per_kw: float  # what a kW at the AC side charges within a step
    # The rest is 0-dim.
    days: Tensor  # D, an integer: from one step's place to the next one's
    charge_kw_per_soc: Tensor
    losses: Tensor  # what a kW given takes out of the battery, in kW that charge it again
    battery_kw: Tensor  # rating at the AC side
    least_battery_kw: Tensor  # minus that
    zero: Tensor
    one: Tensor
    minus_one: Tensor
    tiny: Tensor

    @property
    def device(self) -> torch.device:
        return self.zero.device


class Carry(NamedTuple):
    """What a step takes over from the one before; everything else follows from it."""

    place: Tensor  # [B] where this step of the day stands in the tables
    soc: Tensor  # [B] 0-1
    soc_start: Tensor  # [B] 0-1, at midnight
    owed_kw: Tensor  # [B, S] at the meter: the power that would finish a vehicle within this step


class State(NamedTuple):
    """The site at the beginning of a step, arrivals of that step included."""

    step: int
    place: Tensor  # [B] where this step of the day stands in the tables
    soc: Tensor  # [B] 0-1
    soc_start: Tensor  # [B] 0-1, at midnight
    net_kw: Tensor  # [B] building load - PV
    carbon_kg_per_kw: Tensor  # [B] CO2 of a kW imported throughout this step
    baseline_kg: Tensor  # [B] this step's part of what the reward is measured against
    credit_kg_per_kw: Tensor  # [B] what a kW charged throughout this step earns, see `step`
    room_kw: Tensor  # [B] what the grid connection leaves for vehicles and battery
    reach_kw: Tensor  # [2, B] what would fill the battery within this step, what would empty it
    limits_kw: Tensor  # [2, B] what the battery can take in this step, >= 0, and give, <= 0
    battery_max_kw: Tensor  # [B] the first of them
    battery_min_kw: Tensor  # [B] the second
    owed_kw: Tensor  # [B, S] at the meter: the power that would finish a vehicle within this step
    laxity: Tensor  # [B, S] steps a vehicle can still wait at full power afterwards
    must_kw: Tensor  # [B, S] the shield's minimum
    could_kw: Tensor  # [B, S] what the vehicle can take
    must_total_kw: Tensor  # [B]
    could_total_kw: Tensor  # [B]
    spread_kw: Tensor  # [B] could - must
    need_kw: Tensor  # [B] load + must - PV
    supply_kw: Tensor  # [B] EV power the grid connection has room for when the battery helps

    @property
    def carry(self) -> Carry:
        return Carry(self.place, self.soc, self.soc_start, self.owed_kw)


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


def build_model(
    site: Site, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SiteModel:
    """Turn a site into tables of `dtype` on `device`."""
    days, n_sockets = len(site.days), site.n_sockets
    sessions = site.sessions
    exact = np.float64 if dtype == torch.float64 else np.float32
    sockets = np.zeros((4, T * days * n_sockets), dtype=exact)
    later_kw, max_kw, stays, arriving_kw = sockets
    max_kw[:] = 1.0  # where no vehicle stands, nothing is owed; this is only divided by
    # Where a session stands in a column, step after step of its stay.
    window = sessions.departure_step - sessions.arrival_step
    arrival = (sessions.arrival_step * days + sessions.day) * n_sockets + sessions.socket
    since = np.arange(int(window.sum())) - np.repeat(np.cumsum(window) - window, window)
    stay = np.repeat(arrival, window) + since * (days * n_sockets)
    power_kw = np.repeat(sessions.max_kw.astype(exact), window)
    later_kw[stay] = power_kw * (np.repeat(window - 1, window) - since)
    max_kw[stay] = power_kw
    stays[stay] = since > 0
    arriving_kw[arrival] = sessions.energy_kwh / STEP_H

    net_kw = site.load_kw - site.pv_kw
    carbon_kg_per_kw = site.carbon_kg_per_kwh * STEP_H
    baseline_kg = np.maximum(net_kw, 0.0) * carbon_kg_per_kw
    credit_kg_per_kw = _REWARD_SHARE * carbon_kg_per_kw.mean(axis=1, keepdims=True)
    credit_kg_per_kw = np.broadcast_to(credit_kg_per_kw, net_kw.shape)
    room_kw = site.grid_kw - net_kw
    series = np.stack([net_kw, carbon_kg_per_kw, baseline_kg, credit_kg_per_kw, room_kw])
    battery = site.battery
    charge_kw_per_soc = battery.capacity_kwh / battery.charge_efficiency / STEP_H
    discharge_kw_per_soc = battery.capacity_kwh * battery.discharge_efficiency / STEP_H

    def tensor(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=device)

    return SiteModel(
        series=tensor(series.transpose(0, 2, 1).reshape(len(series), -1)),
        sockets=tensor(sockets.reshape(4, T * days, n_sockets)),
        soc_bounds=tensor([[battery.soc_max], [battery.soc_min]]),
        kw_per_soc=tensor([[charge_kw_per_soc], [discharge_kw_per_soc]]),
        action_scale=tensor([0.5, battery.power_kw]),
        action_shift=tensor([0.5, 0.0]),
        soc_per_kw=1.0 / charge_kw_per_soc,
        days=torch.tensor(days, device=device),
        charge_kw_per_soc=tensor(charge_kw_per_soc),
        losses=tensor(charge_kw_per_soc / discharge_kw_per_soc),
        battery_kw=tensor(battery.power_kw),
        least_battery_kw=tensor(-battery.power_kw),
        zero=tensor(0.0),
        one=tensor(1.0),
        minus_one=tensor(-1.0),
        tiny=tensor(1e-6),
    )


def begin_day(model: SiteModel, day: Tensor, soc_start: Tensor) -> State:
    """Return the state at midnight of `day` [B] with the battery at `soc_start` [B]."""
    soc_start = soc_start.to(model.zero.dtype)
    nobody = model.zero.new_zeros(len(day), model.sockets.shape[-1])
    return _arrive(model, 0, day, soc_start, soc_start, nobody)[0]


def _arrive(
    model: SiteModel, step: int, place: Tensor, soc: Tensor, soc_start: Tensor, left_kw: Tensor
) -> tuple[State, Tensor]:
    """Let vehicles leave and arrive before `step` and work out what can be done in it.

    Args:
        left_kw: [B, S] what the vehicles of the step before are still owed.

    Returns:
        The state and what those that left are still owed [B].
    """
    later_kw, power_kw, stays, arriving_kw = model.sockets.index_select(1, place).unbind(0)
    staying_kw = left_kw * stays
    unmet_kw = (left_kw - staying_kw).sum(1)
    carry = Carry(place, soc, soc_start, staying_kw + arriving_kw)
    return _work_out(model, step, carry, later_kw, power_kw), unmet_kw


def restore(model: SiteModel, step: int, carry: Carry) -> State:
    """Return the state at the beginning of `step` from what it came from."""
    later_kw, power_kw = model.sockets[:2].index_select(1, carry.place).unbind(0)
    return _work_out(model, step, carry, later_kw, power_kw)


def _work_out(
    model: SiteModel, step: int, carry: Carry, later_kw: Tensor, power_kw: Tensor
) -> State:
    """Work out what can be done in a step; later and power [B, S] are the sessions' of it."""
    place, soc, soc_start, owed_kw = carry
    series = model.series.index_select(1, place)
    net_kw, carbon_kg_per_kw, baseline_kg, credit_kg_per_kw, room_kw = series.unbind(0)
    could_kw = torch.minimum(owed_kw, power_kw)
    # What the steps after this one cannot deliver at full power must be charged now.
    pressing_kw = owed_kw - later_kw
    must_kw = pressing_kw.clamp(model.zero, could_kw)
    laxity = torch.addcdiv(model.one, pressing_kw, power_kw, value=-1.0)
    must_total_kw, could_total_kw = must_kw.sum(1), could_kw.sum(1)
    reach_kw = (model.soc_bounds - soc) * model.kw_per_soc
    limits_kw = reach_kw.clamp(model.least_battery_kw, model.battery_kw)
    battery_max_kw, battery_min_kw = limits_kw.unbind(0)
    return State(
        step=step,
        place=place,
        soc=soc,
        soc_start=soc_start,
        net_kw=net_kw,
        carbon_kg_per_kw=carbon_kg_per_kw,
        baseline_kg=baseline_kg,
        credit_kg_per_kw=credit_kg_per_kw,
        room_kw=room_kw,
        reach_kw=reach_kw,
        limits_kw=limits_kw,
        battery_max_kw=battery_max_kw,
        battery_min_kw=battery_min_kw,
        owed_kw=owed_kw,
        laxity=laxity,
        must_kw=must_kw,
        could_kw=could_kw,
        must_total_kw=must_total_kw,
        could_total_kw=could_total_kw,
        spread_kw=could_total_kw - must_total_kw,
        need_kw=net_kw + must_total_kw,
        supply_kw=room_kw - battery_min_kw,
    )


def laxity_order(laxity: Tensor) -> Tensor:
    """Return the sockets [B, S] by ascending laxity, the lower index first among equals.

    Laxity and socket number are packed into one int32, so that sorting the values alone gives the
    order: numpy on a CPU does that 20 times faster than torch sorts with indices. 128 sockets
    leave 17 bits for the fraction of a step, 7 ms: what float32 resolves at a laxity above 64.
    """
    n_sockets = laxity.shape[1]
    socket_bits = (n_sockets - 1).bit_length()
    per_step = 1 << (31 - _LAXITY_BITS - socket_bits)
    laxity = laxity.detach() if laxity.requires_grad else laxity
    if laxity.is_cpu and not torch.compiler.is_compiling():
        with np.errstate(invalid="ignore"):  # NaN of a policy that diverged: others tell
            key = (laxity.numpy() * np.float32(per_step)).astype(np.int32)
        key <<= socket_bits
        key |= np.arange(n_sockets, dtype=np.int32)
        key.sort(axis=1)
        key &= (1 << socket_bits) - 1
        return torch.as_tensor(key.astype(np.int64))
    key = (laxity * per_step).to(torch.int32) << socket_bits
    key = key | torch.arange(n_sockets, dtype=torch.int32, device=laxity.device)
    rows = sort_rows(key) if key.is_cpu else key.sort(dim=1).values
    return (rows & ((1 << socket_bits) - 1)).long()


@torch.library.custom_op("co2lightning::sort_rows", mutates_args=())
def sort_rows(key: Tensor) -> Tensor:
    """Sort each row of integers [B, S] with numpy, which a compiled graph cannot do by itself."""
    return torch.as_tensor(np.sort(key.numpy(), axis=1))


sort_rows.register_fake(torch.empty_like)  # pyright: ignore[reportUnknownMemberType]


def dispatch(model: SiteModel, state: State, ev_kw: Tensor) -> Tensor:
    """Share the EV budget `ev_kw` [B] among the sockets [B, S]: must first, then least laxity."""
    order = laxity_order(state.laxity)
    # What a vehicle goes without, negative: what those up to it could take beyond the budget, at
    # most what it could take itself.
    spare_kw = (state.must_kw - state.could_kw).gather(1, order)
    rest_kw = (ev_kw - state.must_total_kw).unsqueeze(1)
    without_kw = (spare_kw.cumsum(1) + rest_kw).clamp(spare_kw, model.zero)
    return state.could_kw.scatter_add(1, order, without_kw)


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
        settlement_kg = (-gained_kw).relu() * (state.credit_kg_per_kw / _REWARD_SHARE)
        reward = reward - settlement_kg - gained_kw * state.credit_kg_per_kw
    else:
        following, unmet_kw = _arrive(
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
