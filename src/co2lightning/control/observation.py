"""What a controller knows at the beginning of a step, and nothing it could not know.

Measured now: PV, load, intensity, battery, vehicles plugged in. Remembered: PV of this day so far
and of yesterday. Learned from the training days only: the usual PV of the season, the usual load
and the usual intensity by time of day, which serve as forecasts.

Shapes: T = 96 steps a day, D days of the site, B days at once, O = 29 features.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.rules import after_solar_kw, solar_share
from co2lightning.control.state import SiteModel, State
from co2lightning.site.model import STEP_H, Site, T


class _Feature(NamedTuple):
    name: str
    meaning: str
    unit: str
    low: float
    high: float


_P = "power scale"  # the larger of the battery's and the sockets' total power
_E = "energy scale"  # two hours of it
ENERGY_SCALE_H = 2.0

# Known from the clock, the meter's history and the training days; a table row per (day, step).
_EXOGENOUS = (
    _Feature("hour_sin", "sine of the time of day", "-", -1, 1),
    _Feature("hour_cos", "cosine of the time of day", "-", -1, 1),
    _Feature("half_day_sin", "sine of twice the time of day", "-", -1, 1),
    _Feature("half_day_cos", "cosine of twice the time of day", "-", -1, 1),
    _Feature("pv", "PV power now", _P, 0, 4),
    _Feature("load", "building load now", _P, 0, 4),
    _Feature("carbon", "intensity now / usual mean - 1", "-", -2, 4),
    _Feature("carbon_next_hour", "usual intensity of the next hour, against now", "-", -4, 4),
    _Feature("carbon_next_3_h", "usual intensity of the next 3 hours, against now", "-", -4, 4),
    _Feature("carbon_next_6_h", "usual intensity of the next 6 hours, against now", "-", -4, 4),
    _Feature("carbon_peak_ahead", "highest usual intensity left today, against now", "-", -4, 4),
    _Feature("pv_recent", "PV of the last hour / usual PV of it, 1 at night", "-", 0, 4),
    _Feature("pv_outlook", "PV expected for the rest of the day / usual PV of it", "-", 0, 4),
    _Feature("surplus_ahead", "PV above load expected until midnight", _E, 0, 20),
    _Feature("deficit_ahead", "load above PV expected until midnight", _E, 0, 20),
)
# The state of the site.
_ENDOGENOUS = (
    _Feature("soc", "battery state of charge", "0-1", 0, 1),
    _Feature("soc_gain", "state of charge above the day's start", "0-1", -1, 1),
    _Feature("charge_limit", "power the battery can take", _P, 0, 1),
    _Feature("discharge_limit", "power the battery can give", _P, 0, 1),
    _Feature("must", "EV power the shield demands", _P, 0, 1),
    _Feature("could", "EV power the vehicles can take", _P, 0, 1),
    _Feature("surplus", "PV - load - must", _P, -8, 4),
    _Feature("owed", "energy owed to the vehicles present", _E, 0, 20),
    _Feature("owed_2_h", "part of it that cannot wait 2 hours", _E, 0, 20),
    _Feature("owed_5_h", "part of it that cannot wait 5 hours", _E, 0, 20),
    _Feature("spare_surplus", "surplus_ahead - owed - room in the battery", _E, -40, 20),
    _Feature("spare_store", "energy in the battery - deficit_ahead - owed", _E, -40, 20),
    _Feature("rule_ev", "EV action of solar-following", "action", -1, 1),
    _Feature("rule_battery", "battery action of greedy after it", "action", -1, 1),
)
FEATURES: tuple[_Feature, ...] = _EXOGENOUS + _ENDOGENOUS
RULE_FEATURES = (len(FEATURES) - 2, len(FEATURES) - 1)
"""Where RBC B's own action [2] stands in an observation."""

_AHEAD = slice(len(_EXOGENOUS) - 2, None)  # surplus_ahead, deficit_ahead
_SEASON_DAYS = 20
_PER_HOUR = round(1 / STEP_H)
_STEPS_2_H, _STEPS_5_H = 2 / STEP_H, 5 / STEP_H
assert _PER_HOUR * STEP_H == 1.0, "whole steps make an hour"
assert T * STEP_H == 24.0, "a day's steps make a turn of the clock"


class Observer(NamedTuple):
    """The tables `observe` looks things up in, on the model's device."""

    exogenous: Tensor  # [len(_EXOGENOUS) + 2, D * T], each step at its place in the model's tables
    scale: Tensor  # [O, 1] from kW and shares to the units of the features
    shift: Tensor  # [O, 1]
    low: Tensor  # [O, 1]
    high: Tensor  # [O, 1]
    wait_steps: Tensor  # [2, 1, 1] of "cannot wait 2 hours" and "5 hours"


def power_scale_kw(site: Site) -> float:
    """Return what features in units of the power scale are multiples of."""
    sockets_kw = sum(sockets.count * sockets.max_kw for sockets in site.sockets)
    return max(site.battery.power_kw, sockets_kw)


def build_observer(
    site: Site, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Observer:
    """Build the feature tables of a site."""
    power_kw = power_scale_kw(site)
    energy_kwh = ENERGY_SCALE_H * power_kw
    exogenous = _exogenous_features(site, power_kw, energy_kwh)
    per_kw = STEP_H / energy_kwh
    ahead_kw = exogenous[..., _AHEAD] * [1.0 / per_kw, -1.0 / per_kw]
    table = np.ascontiguousarray(np.concatenate([exogenous, ahead_kw], axis=-1).transpose(2, 0, 1))
    scale = {f.name: {_P: 1.0 / power_kw, _E: per_kw}.get(f.unit, 1.0) for f in FEATURES}
    scale |= {f.name: 1.0 for f in _EXOGENOUS}
    scale["discharge_limit"] = scale["surplus"] = -1.0 / power_kw
    scale["owed_2_h"] /= _STEPS_2_H
    scale["owed_5_h"] /= _STEPS_5_H
    scale["rule_ev"] = -2.0
    scale["rule_battery"] = -1.0 / site.battery.power_kw
    shift = [-1.0 if f.name == "rule_ev" else 0.0 for f in FEATURES]

    def tensor(values: object) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Observer(
        exogenous=tensor(table.reshape(len(table), -1)),
        scale=tensor(list(scale.values())).unsqueeze(1),
        shift=tensor(shift).unsqueeze(1),
        low=tensor([f.low for f in FEATURES]).unsqueeze(1),
        high=tensor([f.high for f in FEATURES]).unsqueeze(1),
        wait_steps=tensor([[[_STEPS_2_H]], [[_STEPS_5_H]]]),
    )


def observe(observer: Observer, model: SiteModel, state: State) -> Tensor:
    """Return the observations [B, O] of a state, each feature within its bounds."""
    # Features come first until the end: [B] rows are quick to stack, scale and clamp.
    table = observer.exogenous.index_select(1, state.place)
    exogenous, ahead_kw = table.split_with_sizes([len(_EXOGENOUS), 2])
    owed_kw = state.owed_kw.sum(1)
    # A vehicle with laxity 0 cannot wait for any of its energy, one with 8 steps can 2 h for all.
    hurry = (observer.wait_steps - state.laxity).relu()
    features = torch.vstack(
        [
            exogenous,
            state.soc,
            state.soc - state.soc_start,
            state.limits_kw,
            state.must_total_kw,
            state.could_total_kw,
            state.need_kw,
            owed_kw,
            (hurry * state.owed_kw).sum(2),  # owed_2_h, owed_5_h
            # Surplus - owed - room in the battery; energy in the battery - deficit - owed.
            ahead_kw - state.reach_kw - owed_kw,
            solar_share(model, state),
            after_solar_kw(model, state),
        ]
    )
    return (
        torch.addcmul(observer.shift, observer.scale, features).clamp(observer.low, observer.high).T
    )


def _exogenous_features(site: Site, power_kw: float, energy_kwh: float) -> np.ndarray:
    """Return [D, T, len(_EXOGENOUS)]; row (d, t) uses measurements up to (d, t) only."""
    days = len(site.days)
    pv_kw, load_kw, carbon = site.pv_kw, site.load_kw, site.carbon_kg_per_kwh
    training = site.training_days
    hour = (np.arange(T) + 0.5) * STEP_H
    angle = np.broadcast_to(2 * np.pi * hour / 24, (days, T))

    usual_carbon = carbon[training].mean(axis=0)
    usual_load_kw = load_kw[training].mean(axis=0)
    usual_pv_kw = _seasonal_mean(site)
    carbon_mean = usual_carbon.mean()

    def carbon_ahead(steps: int) -> np.ndarray:
        ahead = [usual_carbon[t + 1 : t + 1 + steps] for t in range(T)]
        ahead[-1] = usual_carbon[-1:]
        return (np.array([a.mean() for a in ahead]) - carbon) / carbon_mean

    peak = np.maximum.accumulate(usual_carbon[::-1])[::-1]

    # Yesterday counts a little (weather persists), today counts by what the sun has shown so far.
    pv_day, usual_day = pv_kw.sum(axis=1), usual_pv_kw.sum(axis=1)
    yesterday = np.ones(days)
    yesterday[1:] = pv_day[:-1] / np.maximum(usual_day[:-1], 1e-6)
    prior = 1.0 + 0.3 * (np.clip(yesterday, 0.0, 4.0) - 1.0)
    weight = 0.1 * usual_day[:, None] + 1e-6
    so_far, usual_so_far = pv_kw.cumsum(axis=1), usual_pv_kw.cumsum(axis=1)
    outlook = (so_far + weight * prior[:, None]) / (usual_so_far + weight)

    hour_kw, usual_hour_kw = _last_hour(pv_kw), _last_hour(usual_pv_kw)
    daylight = usual_hour_kw > 0.02 * max(site.pv_kwp, 1e-6)
    recent = np.where(daylight, hour_kw / np.maximum(usual_hour_kw, 1e-6), 1.0)

    net_kw = outlook[:, :, None] * usual_pv_kw[:, None, :] - usual_load_kw
    later = np.triu(np.ones((T, T)), k=1)
    surplus_ahead = (np.maximum(net_kw, 0.0) * later).sum(axis=2) * STEP_H / energy_kwh
    deficit_ahead = (np.maximum(-net_kw, 0.0) * later).sum(axis=2) * STEP_H / energy_kwh

    return np.stack(
        [
            np.sin(angle),
            np.cos(angle),
            np.sin(2 * angle),
            np.cos(2 * angle),
            pv_kw / power_kw,
            load_kw / power_kw,
            carbon / carbon_mean - 1.0,
            carbon_ahead(_PER_HOUR),
            carbon_ahead(3 * _PER_HOUR),
            carbon_ahead(6 * _PER_HOUR),
            (peak - carbon) / carbon_mean,
            recent,
            outlook,
            surplus_ahead,
            deficit_ahead,
        ],
        axis=-1,
    )


def _seasonal_mean(site: Site) -> np.ndarray:
    """Return the mean PV [D, T] in kW of the training days around each day of the year."""
    day_of_year = np.array([np.datetime64(day) - np.datetime64(day[:4]) for day in site.days])
    ordinal = day_of_year.astype("timedelta64[D]").astype(float)
    training = site.training_days
    distance = np.abs(ordinal[:, None] - ordinal[training][None, :])
    distance = np.minimum(distance, 365.25 - distance)
    # Where the site has no training day that near, the nearest ones serve.
    near = distance <= np.maximum(_SEASON_DAYS, distance.min(axis=1, keepdims=True))
    return (near @ site.pv_kw[training]) / near.sum(axis=1, keepdims=True)


def _last_hour(power_kw: np.ndarray) -> np.ndarray:
    """Return the mean of this step and those of the hour before its end, within the day."""
    first = np.repeat(power_kw[:, :1], _PER_HOUR - 1, axis=1)
    padded = np.concatenate([first, power_kw], axis=1)
    return np.lib.stride_tricks.sliding_window_view(padded, _PER_HOUR, axis=1).mean(axis=2)
