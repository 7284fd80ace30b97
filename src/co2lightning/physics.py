"""The physics of a site over B days at once: battery, sockets, shield, meter.

Pure functions on torch tensors: no Gymnasium, no Lightning, no in-place write, so a day can be
differentiated from its CO2 back to every action. Everything lives on one device; the step number
is a Python int, so nothing here waits for a GPU.

Shapes: T = 96 steps a day, D days of the site, B days at once, S sockets, A = 2 actions.
Signs: grid import and battery charging are positive. Units are in the names.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.site import STEP_H, Site, T

_TINY_KWH = 1e-9
_REWARD_SHARE = 0.5  # of the day's mean intensity: what a kWh earns when it is stored or charged


class SiteModel(NamedTuple):
    """A site as tensors on one device. Build it with `build_model`.

    Who stands where and for how long is a fact of the day that no controller changes, so it is
    looked up, not simulated: row `day * T + step` of both tables belongs to that step.
    """

    series: Tensor  # [D * T, 4]: PV kW, load kW, carbon kg/kWh, the day's mean carbon kg/kWh
    sockets: Tensor  # [D * T, 3, S]: session power kW, steps left, kWh that arrive
    capacity_kwh: float
    battery_kw: float
    charge_efficiency: float
    discharge_efficiency: float
    soc_min: float
    soc_max: float
    grid_kw: float

    @property
    def device(self) -> torch.device:
        return self.series.device


class State(NamedTuple):
    """The site at the beginning of a step, arrivals of that step included."""

    step: int
    day: Tensor  # [B] index into the site's days
    soc: Tensor  # [B] 0-1
    soc_start: Tensor  # [B] 0-1, at midnight
    pv_kw: Tensor  # [B]
    load_kw: Tensor  # [B]
    carbon_kg_per_kwh: Tensor  # [B]
    carbon_mean_kg_per_kwh: Tensor  # [B] of the day: what a kWh missing at midnight costs
    owed_kwh: Tensor  # [B, S] still to be charged, at the meter
    laxity: Tensor  # [B, S] steps a vehicle can still wait at full power afterwards
    must_kw: Tensor  # [B, S] the shield's minimum
    could_kw: Tensor  # [B, S] what the vehicle can take
    steps_left: Tensor  # [B, S] until departure, this step included; 0: no vehicle
    must_total_kw: Tensor  # [B]
    could_total_kw: Tensor  # [B]


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


def build_model(site: Site, device: torch.device | str = "cpu") -> SiteModel:
    """Turn a site into float32 tables on `device`."""
    days, n_sockets = len(site.days), site.n_sockets
    sessions = site.sessions
    sockets = np.zeros((days, T, 3, n_sockets), dtype=np.float32)
    window = sessions.departure_step - sessions.arrival_step
    session = np.repeat(np.arange(len(window)), window)
    first = np.repeat(np.cumsum(window) - window, window)
    step = sessions.arrival_step[session] + np.arange(len(session)) - first
    day, socket = sessions.day[session], sessions.socket[session]
    sockets[day, step, 0, socket] = sessions.max_kw[session]
    sockets[day, step, 1, socket] = sessions.departure_step[session] - step
    sockets[sessions.day, sessions.arrival_step, 2, sessions.socket] = sessions.energy_kwh

    carbon = site.carbon_kg_per_kwh
    carbon_mean = np.broadcast_to(carbon.mean(axis=1, keepdims=True), carbon.shape)
    series = np.stack([site.pv_kw, site.load_kw, carbon, carbon_mean], axis=-1)
    battery = site.battery
    return SiteModel(
        series=torch.tensor(series.reshape(days * T, 4), dtype=torch.float32, device=device),
        sockets=torch.from_numpy(sockets.reshape(days * T, 3, n_sockets)).to(device),
        capacity_kwh=battery.capacity_kwh,
        battery_kw=battery.power_kw,
        charge_efficiency=battery.charge_efficiency,
        discharge_efficiency=battery.discharge_efficiency,
        soc_min=battery.soc_min,
        soc_max=battery.soc_max,
        grid_kw=site.grid_kw,
    )


def begin_day(model: SiteModel, day: Tensor, soc_start: Tensor) -> State:
    """Return the state at midnight of `day` [B] with the battery at `soc_start` [B]."""
    nothing_owed = model.sockets.new_zeros(len(day), model.sockets.shape[2])
    return _arrive(model, 0, day, soc_start, soc_start, nothing_owed)


def _arrive(
    model: SiteModel, step: int, day: Tensor, soc: Tensor, soc_start: Tensor, owed_kwh: Tensor
) -> State:
    """Let the vehicles of `step` plug in and work out what each must and could take."""
    row = day * T + step
    pv_kw, load_kw, carbon, carbon_mean = model.series.index_select(0, row).unbind(1)
    power_kw, steps_left, arriving_kwh = model.sockets.index_select(0, row).unbind(1)
    owed_kwh = owed_kwh + arriving_kwh
    finish_now_kw = owed_kwh / STEP_H
    # A vehicle whose laxity is below one step must take what later steps cannot deliver.
    could_kw = torch.minimum(power_kw, finish_now_kw)
    must_kw = torch.minimum(
        (finish_now_kw - power_kw * (steps_left - 1.0)).clamp(min=0.0), power_kw
    )
    laxity = (steps_left - finish_now_kw / (power_kw + _TINY_KWH)).clamp(min=0.0)
    return State(
        step=step,
        day=day,
        soc=soc,
        soc_start=soc_start,
        pv_kw=pv_kw,
        load_kw=load_kw,
        carbon_kg_per_kwh=carbon,
        carbon_mean_kg_per_kwh=carbon_mean,
        owed_kwh=owed_kwh,
        laxity=laxity,
        must_kw=must_kw,
        could_kw=could_kw,
        steps_left=steps_left,
        must_total_kw=must_kw.sum(1),
        could_total_kw=could_kw.sum(1),
    )


def laxity_order(laxity: Tensor) -> Tensor:
    """Return the sockets [B, S] by ascending laxity, the lower index first among equals.

    Laxity and socket number are packed into one integer, so that sorting the values alone gives
    the order: on a CPU numpy sorts them several times faster than torch.
    """
    bits = max(1, (laxity.shape[1] - 1).bit_length())
    # The bits of a non-negative float32 ascend with its value.
    key = laxity.detach().contiguous().view(torch.int32).to(torch.int64) << bits
    key = key | torch.arange(laxity.shape[1], device=laxity.device)
    if key.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(key.numpy(), axis=1))
    else:
        ordered = key.sort(dim=1).values
    return ordered & ((1 << bits) - 1)


def dispatch(state: State, ev_kw: Tensor) -> Tensor:
    """Share the EV budget `ev_kw` [B] among the sockets: must first, then by least laxity."""
    order = laxity_order(state.laxity)
    extra_kw = (state.could_kw - state.must_kw).gather(1, order)
    rest_kw = (ev_kw - state.must_total_kw).unsqueeze(1)
    before_kw = extra_kw.cumsum(1) - extra_kw
    granted_kw = torch.minimum((rest_kw - before_kw).clamp(min=0.0), extra_kw)
    return state.must_kw + torch.zeros_like(granted_kw).scatter(1, order, granted_kw)


def battery_limits_kw(model: SiteModel, soc: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much the battery could charge and discharge in this step, both >= 0, in kW."""
    room_kwh = (model.soc_max - soc) * (model.capacity_kwh / model.charge_efficiency)
    store_kwh = (soc - model.soc_min) * (model.capacity_kwh * model.discharge_efficiency)
    charge_kw = (room_kwh / STEP_H).clamp(min=0.0, max=model.battery_kw)
    discharge_kw = (store_kwh / STEP_H).clamp(min=0.0, max=model.battery_kw)
    return charge_kw, discharge_kw


def ev_power_kw(model: SiteModel, state: State, action_ev: Tensor) -> Tensor:
    """Return the EV budget [B] in kW that an action in [-1, 1] asks for.

    -1 is what the shield demands, 1 is everything the vehicles can take. Where the grid
    connection is too small the budget yields, but never below what must be charged.
    """
    spread_kw = state.could_total_kw - state.must_total_kw
    wanted_kw = state.must_total_kw + 0.5 * (action_ev.clamp(-1.0, 1.0) + 1.0) * spread_kw
    _, discharge_kw = battery_limits_kw(model, state.soc)
    supply_kw = model.grid_kw + state.pv_kw + discharge_kw - state.load_kw
    allowed_kw = torch.maximum(state.must_total_kw, supply_kw)
    return torch.minimum(wanted_kw, allowed_kw)


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
    pv_kw, load_kw = state.pv_kw, state.load_kw
    carbon, carbon_mean = state.carbon_kg_per_kwh, state.carbon_mean_kg_per_kwh

    ev_kw = ev_power_kw(model, state, action[:, 0])
    socket_kw = dispatch(state, ev_kw)
    ev_kw = socket_kw.sum(1)

    charge_limit_kw, discharge_limit_kw = battery_limits_kw(model, state.soc)
    others_kw = load_kw + ev_kw - pv_kw
    # If the connection were too small, battery charging yields first.
    charge_limit_kw = torch.minimum(charge_limit_kw, (model.grid_kw - others_kw).clamp(min=0.0))
    wanted_kw = action[:, 1].clamp(-1.0, 1.0) * model.battery_kw
    battery_kw = torch.minimum(torch.maximum(wanted_kw, -discharge_limit_kw), charge_limit_kw)
    charge_kw, discharge_kw = battery_kw.clamp(min=0.0), (-battery_kw).clamp(min=0.0)
    stored_kwh = STEP_H * (
        charge_kw * model.charge_efficiency - discharge_kw / model.discharge_efficiency
    )
    # The clamp only removes the rounding of float32.
    soc = (state.soc + stored_kwh / model.capacity_kwh).clamp(model.soc_min, model.soc_max)

    net_kw = others_kw + battery_kw
    grid_import_kw = net_kw.clamp(min=0.0)
    curtailed_kwh = (-net_kw).clamp(min=0.0) * STEP_H

    left_kwh = (state.owed_kwh - socket_kw * STEP_H).clamp(min=0.0)
    stays = (state.steps_left - 1.0).clamp(0.0, 1.0)
    staying_kwh = left_kwh * stays
    unmet_kwh = (left_kwh - staying_kwh).sum(1)

    co2_kg = grid_import_kw * STEP_H * carbon
    stored_value = carbon_mean * (model.capacity_kwh / model.charge_efficiency)
    price = _REWARD_SHARE * carbon_mean
    reference_kg = STEP_H * ((load_kw - pv_kw).clamp(min=0.0) * carbon + ev_kw * price)
    reward = reference_kg - co2_kg + _REWARD_SHARE * stored_value * (soc - state.soc)
    last = state.step == T - 1
    if last:
        gained = soc - state.soc_start
        settlement_kg = stored_value * (-gained).clamp(min=0.0)
        co2_kg = co2_kg + settlement_kg
        reward = reward - settlement_kg - _REWARD_SHARE * stored_value * gained
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
    return _arrive(model, state.step + 1, state.day, soc, state.soc_start, staying_kwh), flows
