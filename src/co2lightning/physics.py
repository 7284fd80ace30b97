"""The physics of a site over B days at once: battery, sockets, shield, meter.

Pure functions on torch tensors: no Gymnasium, no Lightning, no in-place write, so a day can be
differentiated from its CO2 back to every action. Everything lives on one device; the step number
is a Python int, so nothing here waits for a GPU.

A step of 64 days costs some 60 tensor operations of a few microseconds, most of it their overhead.
Hence a few liberties: tables hold what depends on the day alone, the equipment's numbers are
tensors (arithmetic with a Python float takes twice as long), and a state carries what both step
and observation need.

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
    looked up, not simulated: entry `day * T + step` of both tables belongs to that step.
    """

    series: Tensor  # [4, D * T]: net kW, carbon kg/kW, baseline kg, credit kg/kW, see `State`
    sockets: Tensor  # [D * T, 4, S]: session kW, steps left, 1.0 in the last of them, kW owed
    soc_bounds: Tensor  # [2, 1] soc_max, soc_min
    kw_per_soc: Tensor  # [2, 1] what charges, discharges the battery by 1 within a step
    highest_kw: Tensor  # [2, 1] rating, 0
    lowest_kw: Tensor  # [2, 1] 0, -rating
    # The rest is 0-dim.
    charge_kw_per_soc: Tensor
    discharge_kw_per_soc: Tensor
    battery_kw: Tensor  # rating at the AC side
    soc_min: Tensor
    soc_max: Tensor
    grid_kw: Tensor
    step_h: Tensor
    zero: Tensor
    half: Tensor
    tiny: Tensor

    @property
    def device(self) -> torch.device:
        return self.series.device


class State(NamedTuple):
    """The site at the beginning of a step, arrivals of that step included."""

    step: int
    row: Tensor  # [B] of the model's tables: day * T + step
    soc: Tensor  # [B] 0-1
    soc_start: Tensor  # [B] 0-1, at midnight
    net_kw: Tensor  # [B] building load - PV
    carbon_kg_per_kw: Tensor  # [B] CO2 of a kW imported throughout this step
    baseline_kg: Tensor  # [B] CO2 of this step without battery and vehicles
    credit_kg_per_kw: Tensor  # [B] what a kW charged throughout this step earns, see `step`
    reach_kw: Tensor  # [2, B] what would fill the battery within this step, what would empty it
    battery_max_kw: Tensor  # [B] what it can take in this step, >= 0
    battery_min_kw: Tensor  # [B] what it can give, <= 0
    owed_kw: Tensor  # [B, S] at the meter: the power that would finish a vehicle within this step
    laxity: Tensor  # [B, S] steps a vehicle can still wait at full power afterwards
    must_kw: Tensor  # [B, S] the shield's minimum
    could_kw: Tensor  # [B, S] what the vehicle can take
    leaves: Tensor  # [B, S] 1.0 for a vehicle that leaves at the end of this step
    must_total_kw: Tensor  # [B]
    could_total_kw: Tensor  # [B]
    need_kw: Tensor  # [B] load + must - PV
    allowed_kw: Tensor  # [B] EV power the grid connection has room for, at least must


class Flows(NamedTuple):
    """What one step did. Powers are means over the step, energies are of the step."""

    ev_kw: Tensor  # [B]
    battery_kw: Tensor  # [B] at the AC side, charging positive
    grid_import_kw: Tensor  # [B]
    curtailed_kwh: Tensor  # [B] PV that found no use
    unmet_kwh: Tensor  # [B] owed to vehicles that left at the end of this step
    co2_kg: Tensor  # [B] of the grid import; the last step also carries the battery's settlement
    reward: Tensor  # [B] kg CO2 avoided, see `step`
    socket_kw: Tensor  # [B, S]


def build_model(
    site: Site, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SiteModel:
    """Turn a site into tables of `dtype` on `device`."""
    days, n_sockets = len(site.days), site.n_sockets
    sessions = site.sessions
    exact = np.float64 if dtype == torch.float64 else np.float32
    sockets = np.zeros((days, T, 4, n_sockets), dtype=exact)
    sockets[:, :, 0] = 1.0  # where no vehicle stands, nothing is owed; this is only divided by
    window = sessions.departure_step - sessions.arrival_step
    session = np.repeat(np.arange(len(window)), window)
    first = np.repeat(np.cumsum(window) - window, window)
    step = sessions.arrival_step[session] + np.arange(len(session)) - first
    day, socket = sessions.day[session], sessions.socket[session]
    sockets[day, step, 0, socket] = sessions.max_kw[session]
    sockets[day, step, 1, socket] = sessions.departure_step[session] - step
    sockets[sessions.day, sessions.departure_step - 1, 2, sessions.socket] = 1.0
    sockets[sessions.day, sessions.arrival_step, 3, sessions.socket] = sessions.energy_kwh / STEP_H

    net_kw = site.load_kw - site.pv_kw
    carbon_kg_per_kw = site.carbon_kg_per_kwh * STEP_H
    baseline_kg = np.maximum(net_kw, 0.0) * carbon_kg_per_kw
    credit_kg_per_kw = _REWARD_SHARE * carbon_kg_per_kw.mean(axis=1, keepdims=True)
    credit_kg_per_kw = np.broadcast_to(credit_kg_per_kw, net_kw.shape)
    series = np.stack([net_kw, carbon_kg_per_kw, baseline_kg, credit_kg_per_kw])
    battery = site.battery
    charge_kw_per_soc = battery.capacity_kwh / battery.charge_efficiency / STEP_H
    discharge_kw_per_soc = battery.capacity_kwh * battery.discharge_efficiency / STEP_H

    def tensor(*values: float) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    return SiteModel(
        series=torch.as_tensor(series.reshape(4, days * T), dtype=dtype, device=device),
        sockets=torch.as_tensor(
            sockets.reshape(days * T, 4, n_sockets), dtype=dtype, device=device
        ),
        soc_bounds=tensor(battery.soc_max, battery.soc_min),
        kw_per_soc=tensor(charge_kw_per_soc, discharge_kw_per_soc),
        highest_kw=tensor(battery.power_kw, 0.0),
        lowest_kw=tensor(0.0, -battery.power_kw),
        charge_kw_per_soc=scalar(charge_kw_per_soc),
        discharge_kw_per_soc=scalar(discharge_kw_per_soc),
        battery_kw=scalar(battery.power_kw),
        soc_min=scalar(battery.soc_min),
        soc_max=scalar(battery.soc_max),
        grid_kw=scalar(site.grid_kw),
        step_h=scalar(STEP_H),
        zero=scalar(0.0),
        half=scalar(0.5),
        tiny=scalar(1e-6),
    )


def begin_day(model: SiteModel, day: Tensor, soc_start: Tensor) -> State:
    """Return the state at midnight of `day` [B] with the battery at `soc_start` [B]."""
    nothing_owed = model.sockets.new_zeros(len(day), model.sockets.shape[2])
    soc_start = soc_start.to(model.sockets.dtype)
    return _arrive(model, 0, day * T, soc_start, soc_start, nothing_owed)


def _arrive(
    model: SiteModel, step: int, row: Tensor, soc: Tensor, soc_start: Tensor, owed_kw: Tensor
) -> State:
    """Let the vehicles of `step` plug in and work out what can be done in it."""
    series = model.series.index_select(1, row)
    net_kw, carbon_kg_per_kw, baseline_kg, credit_kg_per_kw = series.unbind(0)
    power_kw, steps_left, leaves, arriving_kw = model.sockets.index_select(0, row).unbind(1)
    owed_kw = owed_kw + arriving_kw
    could_kw = torch.minimum(owed_kw, power_kw)
    laxity = torch.addcdiv(steps_left, owed_kw, power_kw, value=-1.0)
    # A vehicle whose laxity is below one step must take what later steps cannot deliver:
    # owed_kw - power_kw * (steps_left - 1), which is power_kw * (1 - laxity).
    must_kw = torch.addcmul(power_kw, power_kw, laxity, value=-1.0).clamp(model.zero, could_kw)
    must_total_kw = must_kw.sum(1)
    reach_kw = (model.soc_bounds - soc) * model.kw_per_soc
    battery_max_kw, battery_min_kw = reach_kw.clamp(model.lowest_kw, model.highest_kw).unbind(0)
    supply_kw = model.grid_kw - net_kw - battery_min_kw
    return State(
        step=step,
        row=row,
        soc=soc,
        soc_start=soc_start,
        net_kw=net_kw,
        carbon_kg_per_kw=carbon_kg_per_kw,
        baseline_kg=baseline_kg,
        credit_kg_per_kw=credit_kg_per_kw,
        reach_kw=reach_kw,
        battery_max_kw=battery_max_kw,
        battery_min_kw=battery_min_kw,
        owed_kw=owed_kw,
        laxity=laxity,
        must_kw=must_kw,
        could_kw=could_kw,
        leaves=leaves,
        must_total_kw=must_total_kw,
        could_total_kw=could_kw.sum(1),
        need_kw=net_kw + must_total_kw,
        allowed_kw=torch.maximum(supply_kw, must_total_kw),
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
    if laxity.device.type == "cpu":
        key = (laxity.detach().numpy() * np.float32(per_step)).astype(np.int32)
        key <<= socket_bits
        key |= np.arange(n_sockets, dtype=np.int32)
        key.sort(axis=1)
        key &= (1 << socket_bits) - 1
        return torch.as_tensor(key.astype(np.int64))
    key = (laxity.detach() * per_step).to(torch.int32) << socket_bits
    key = key | torch.arange(n_sockets, dtype=torch.int32, device=laxity.device)
    return (key.sort(dim=1).values & ((1 << socket_bits) - 1)).long()


def dispatch(model: SiteModel, state: State, ev_kw: Tensor) -> Tensor:
    """Share the EV budget `ev_kw` [B] among the sockets [B, S]: must first, then least laxity."""
    order = laxity_order(state.laxity)
    extra_kw = (state.could_kw - state.must_kw).gather(1, order)
    rest_kw = (ev_kw - state.must_total_kw).unsqueeze(1)
    # What the vehicles before it leave of the rest, at most what it can take.
    granted_kw = (extra_kw - extra_kw.cumsum(1) + rest_kw).clamp(model.zero, extra_kw)
    return state.must_kw.scatter_add(1, order, granted_kw)


def ev_power_kw(model: SiteModel, state: State, action_ev: Tensor) -> Tensor:
    """Return the EV budget [B] in kW that an action in [-1, 1] asks for.

    -1 is what the shield demands, 1 is everything the vehicles can take. Where the grid
    connection is too small the budget yields, but never below what must be charged.
    """
    share = torch.addcmul(model.half, model.half, action_ev)
    wanted_kw = torch.lerp(state.must_total_kw, state.could_total_kw, share)
    return torch.minimum(wanted_kw, state.allowed_kw)


def battery_power_kw(
    model: SiteModel, state: State, action_battery: Tensor, others_kw: Tensor
) -> Tensor:
    """Return the battery's power [B] in kW for an action in [-1, 1], charging positive.

    Args:
        others_kw: [B] load + vehicles - PV. Where they leave the grid connection too little room
            charging yields first, and then the battery gives what the connection cannot.
    """
    wanted_kw = torch.minimum(action_battery * model.battery_kw, model.grid_kw - others_kw)
    return torch.maximum(torch.minimum(wanted_kw, state.battery_max_kw), state.battery_min_kw)


def step(model: SiteModel, state: State, action: Tensor) -> tuple[State | None, Flows]:
    """Run one step of 15 minutes.

    Args:
        action: [B, A] in [-1, 1]: EV power between must and could, battery power / its rating.

    Returns:
        The next state (None after the day's last step) and the flows.

    The day's CO2 is sum(import * h * intensity) + mean intensity * max(0, SoC start - SoC end)
    * capacity / charge efficiency: a battery emptied at midnight is not a gift.

    The day's reward is reference - CO2 in kg, where the reference depends on the day alone: the
    building's import without battery and vehicles, and half the mean intensity for every kWh that
    vehicles get. Within the day energy stored in the battery counts at that same half price, a
    potential in the sense of Ng, Harada and Russell 1999: it moves reward to the step that earned
    it and leaves the sum over the day as it is. At half the price, storing a surplus pays at once
    and storing grid power does not, whatever the hour.
    """
    action_ev, action_battery = action.clamp(-1.0, 1.0).unbind(1)
    ev_kw = ev_power_kw(model, state, action_ev)
    socket_kw = dispatch(model, state, ev_kw)
    others_kw = state.net_kw + ev_kw
    battery_kw = battery_power_kw(model, state, action_battery, others_kw)
    # Of the two the lesser is right: a kW taken lifts the SoC less than a kW given lowers it.
    gain = torch.minimum(
        battery_kw / model.charge_kw_per_soc, battery_kw / model.discharge_kw_per_soc
    )
    # The clamp only removes rounding.
    soc = (state.soc + gain).clamp(model.soc_min, model.soc_max)

    net_kw = others_kw + battery_kw
    grid_import_kw = net_kw.relu()
    curtailed_kwh = (grid_import_kw - net_kw) * model.step_h

    left_kw = (state.owed_kw - socket_kw).relu()
    unmet_kw = left_kw * state.leaves
    unmet_kwh = unmet_kw.sum(1) * model.step_h

    co2_kg = grid_import_kw * state.carbon_kg_per_kw
    stored_kw = (soc - state.soc) * model.charge_kw_per_soc
    reward = state.baseline_kg - co2_kg + (ev_kw + stored_kw) * state.credit_kg_per_kw
    last = state.step == T - 1
    if last:
        gained_kw = (soc - state.soc_start) * model.charge_kw_per_soc
        settlement_kg = (-gained_kw).relu() * (state.credit_kg_per_kw / _REWARD_SHARE)
        co2_kg = co2_kg + settlement_kg
        reward = reward - settlement_kg - gained_kw * state.credit_kg_per_kw
    flows = Flows(
        ev_kw=ev_kw,
        battery_kw=battery_kw,
        grid_import_kw=grid_import_kw,
        curtailed_kwh=curtailed_kwh,
        unmet_kwh=unmet_kwh,
        co2_kg=co2_kg,
        reward=reward,
        socket_kw=socket_kw,
    )
    if last:
        return None, flows
    owed_kw = left_kw - unmet_kw
    return _arrive(model, state.step + 1, state.row + 1, soc, state.soc_start, owed_kw), flows
