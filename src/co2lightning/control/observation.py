"""What a controller knows at the beginning of a step, and nothing it could not know.

Measured now: PV, load, intensity, battery, vehicles plugged in. Remembered: PV of this day so far
and of yesterday. Learned from the training days only: the usual PV of the season, the usual load
and the usual intensity by time of day, which serve as forecasts.

Every feature is measured in kW, kWh or what its unit says, and given to the policy in units of its
own spread on this site: (value - shift) / scale. So a network sees numbers of order one on a site
of any size, and a 0 of whatever belongs to a part that the site has not.

Shapes: P steps of the site, B at once, O = 30 features.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from co2lightning.control.forecast import clock, slots, usual
from co2lightning.control.rules import after_solar_kw, solar_share
from co2lightning.control.state import SiteModel, State
from co2lightning.site.model import DAY_H, Floats, Ints, Site

_Bools = NDArray[np.bool_]
_Days = NDArray[np.datetime64]


class _Feature(NamedTuple):
    name: str
    meaning: str
    unit: str
    part: str = ""  # of a site; without it the feature is a constant 0


# Known from the clock, the meter's history and the training days; a table row per step.
_EXOGENOUS = (
    _Feature("hour_sin", "sine of the time of day", "-"),
    _Feature("hour_cos", "cosine of the time of day", "-"),
    _Feature("half_day_sin", "sine of twice the time of day", "-"),
    _Feature("half_day_cos", "cosine of twice the time of day", "-"),
    _Feature("weekend", "1 on Saturday and Sunday", "-"),
    _Feature("pv", "PV power now", "kW"),
    _Feature("load", "building load now", "kW"),
    _Feature("import_limit", "what may be imported now", "kW"),
    _Feature("carbon", "intensity now", "kg/kWh"),
    _Feature("carbon_next_hour", "usual intensity of the next hour - now", "kg/kWh"),
    _Feature("carbon_next_3_h", "usual intensity of the next 3 hours - now", "kg/kWh"),
    _Feature("carbon_next_6_h", "usual intensity of the next 6 hours - now", "kg/kWh"),
    _Feature("carbon_peak_ahead", "highest usual intensity of the next 24 h - now", "kg/kWh"),
    _Feature("pv_recent", "PV of the last hour / usual PV of it, 1 at night", "-"),
    _Feature("pv_outlook", "PV of this day so far / usual PV of it", "-"),
    _Feature("surplus_ahead", "PV above load expected in the next 24 h", "kWh"),
    _Feature("deficit_ahead", "load above PV expected in the next 24 h", "kWh"),
)
# The state of the site.
_ENDOGENOUS = (
    _Feature("soc", "battery state of charge", "0-1", "battery"),
    _Feature("charge_limit", "power the battery can take", "kW", "battery"),
    _Feature("discharge_limit", "power the battery can give", "kW", "battery"),
    _Feature("must", "EV power the shield demands", "kW", "sockets"),
    _Feature("could", "EV power the vehicles can take", "kW", "sockets"),
    _Feature("surplus", "PV - load - must", "kW"),
    _Feature("owed", "energy owed to the vehicles present", "kWh", "sockets"),
    _Feature("owed_2_h", "part of it that cannot wait 2 hours", "kWh", "sockets"),
    _Feature("owed_5_h", "part of it that cannot wait 5 hours", "kWh", "sockets"),
    _Feature("spare_surplus", "surplus_ahead - owed - room in the battery", "kWh"),
    _Feature("spare_store", "energy in the battery - deficit_ahead - owed", "kWh"),
    _Feature("rule_ev", "EV action of solar-following", "action", "sockets"),
    _Feature("rule_battery", "battery action of greedy after it", "action", "battery"),
)
FEATURES: tuple[_Feature, ...] = _EXOGENOUS + _ENDOGENOUS
RULE_FEATURES = (len(FEATURES) - 2, len(FEATURES) - 1)
"""Where RBC B's own action [2] stands in an observation."""

HIGHEST = 10.0
"""The largest an observed feature gets: what is beyond, a step in a thousand, is clamped."""

_AHEAD = slice(len(_EXOGENOUS) - 2, None)  # surplus_ahead, deficit_ahead
_SEASON_DAYS = 20
_WAIT_H = 2.0, 5.0  # of owed_2_h, owed_5_h
_RARE = 0.999  # this share of the steps shall not be clamped
_ROUNDING = 1e-9  # relative, of sums over a long series
_ROWS_AT_ONCE = 4096


class Observer(NamedTuple):
    """The tables `observe` looks things up in, on the model's device."""

    exogenous: Tensor  # [len(_EXOGENOUS) + 2, P + 1], each step at its place in the model's tables
    scale: Tensor  # [O, 1] from kW and shares to features as they are observed
    shift: Tensor  # [O, 1]
    high: Tensor  # [O, 1]
    wait_steps: Tensor  # [2, 1, 1] of "cannot wait 2 hours" and "5 hours"
    centre: tuple[float, ...]  # O, in the features' units: observed is (value - centre) / spread
    spread: tuple[float, ...]  # O, in the features' units; 0 of what is always observed as 0


Record = Callable[[Callable[[State], None]], None]
"""Shows the states that a site comes to when it is run in several ways, on the CPU."""


def build_observer(
    site: Site, model: SiteModel, record: Record, device: torch.device | str = "cpu"
) -> Observer:
    """Build the feature tables of a site.

    Args:
        site: The site.
        model: Its model, on the CPU.
        record: What the spread of the state's features is found with.
        device: Where the tables go.
    """
    exogenous, step_h, dtype = _exogenous_features(site), site.step_h, torch.float32
    ahead_kw = exogenous[_AHEAD] * [[1.0 / step_h], [-1.0 / step_h]]
    table = np.pad(np.concatenate([exogenous, ahead_kw]), ((0, 0), (0, 1)), mode="edge")
    units = {f.name: step_h if f.unit == "kWh" else 1.0 for f in FEATURES}
    units |= dict.fromkeys((f.name for f in _EXOGENOUS), 1.0)
    units |= {"discharge_limit": -1.0, "surplus": -1.0}
    units |= {f"owed_{hours:g}_h": step_h * step_h / hours for hours in _WAIT_H}
    units |= {"rule_ev": -2.0, "rule_battery": -1.0 / float(model.battery_kw)}
    unit = np.array(list(units.values()))

    def column(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).unsqueeze(1)

    plain = Observer(
        exogenous=torch.as_tensor(table, dtype=dtype),
        scale=column(unit),
        shift=column(np.zeros_like(unit)),
        high=column(np.full_like(unit, np.inf)),
        wait_steps=torch.tensor([[[hours / step_h]] for hours in _WAIT_H], dtype=dtype),
        centre=(),
        spread=(),
    )
    seen: list[Tensor] = []
    record(lambda state: seen.append(observe(plain, model, state).T[len(_EXOGENOUS) :]))
    states = torch.cat(seen, dim=1).double().numpy()
    parts = [centre_and_spread(exogenous[:, site.training_steps]), centre_and_spread(states)]
    centre, spread = np.concatenate(parts, axis=1)
    high, rule = np.full_like(unit, HIGHEST), list(RULE_FEATURES)
    centre[rule], spread[rule], high[rule] = [1.0, 0.0], 1.0, 1.0  # -2 x share - 1 is the action
    absent = {"battery": site.battery is None, "sockets": not site.sockets}
    spread[[absent.get(f.part, False) for f in FEATURES]] = 0.0
    gain = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    centre_of_action = np.where(np.isin(np.arange(len(unit)), rule), 0.0, centre)
    return Observer(
        exogenous=plain.exogenous.to(device),
        scale=column(unit * gain).to(device),
        shift=column(-centre * gain).to(device),
        high=column(high).to(device),
        wait_steps=plain.wait_steps.to(device),
        centre=tuple(centre_of_action.tolist()),
        spread=tuple(spread.tolist()),
    )


def centre_and_spread(values: Floats) -> Floats:
    """Return the mean of each feature [F, M] and what it is divided by, [2, F].

    That is its standard deviation, or more where it has a long tail, so that no more than a step
    in a thousand is clamped; 0 of a feature that hardly changes.
    """
    centre = values.mean(axis=1)
    away = np.abs(values - centre[:, None])
    spread = np.maximum(values.std(axis=1), np.quantile(away, _RARE, axis=1) / HIGHEST)
    spread[spread < 1e-4 * np.abs(values).max(axis=1)] = 0.0
    return np.stack([centre, spread])


def observe(observer: Observer, model: SiteModel, state: State) -> Tensor:
    """Return the observations [B, O] of a state, each feature within its bounds."""
    # Features come first until the end: [B] rows are quick to stack, scale and clamp.
    table = observer.exogenous.index_select(1, state.place)
    exogenous, ahead_kw = table.split_with_sizes([len(_EXOGENOUS), 2])
    owed_kw = state.owed_kw.sum(1)
    # A vehicle with laxity 0 cannot wait for any of its energy, one with 2 h can for all.
    hurry = (observer.wait_steps - state.laxity).relu()
    features = torch.vstack(
        [
            exogenous,
            state.soc,
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
    scaled = torch.addcmul(observer.shift, observer.scale, features)
    return scaled.clamp(-observer.high, observer.high).T


# --- what is known beforehand --------------------------------------------------------------------


def _exogenous_features(site: Site) -> Floats:
    """Return [len(_EXOGENOUS), P]; a step's column uses measurements up to that step only."""
    step_h, a_day = site.step_h, site.steps(DAY_H)
    # Beyond the series, for a day, the clock goes on.
    local = clock(site, a_day)
    days, day = np.unique(local.astype("datetime64[D]"), return_inverse=True)
    slot, weekend = slots(site, a_day)

    n = site.n_steps
    known = site.training_steps
    carbon = site.import_price  # or the price, where that is to be made small
    usual_carbon = usual(site, carbon, weekends=False, steps_more=a_day)
    usual_load_kw = usual(site, site.load_kw, weekends=True, steps_more=a_day)
    usual_pv_kw = _seasonal(site.pv_kw, known, slot, day, days)

    def beyond_now(expected: Floats) -> Floats:
        change = expected - carbon  # of a constant intensity nothing but rounding
        return np.where(np.abs(change) > _ROUNDING * np.abs(usual_carbon).max(), change, 0.0)

    def carbon_ahead(hours: float) -> Floats:
        steps = site.steps(hours)
        until = np.concatenate([[0.0], usual_carbon.cumsum()])
        return beyond_now((until[steps + 1 : steps + 1 + n] - until[1 : 1 + n]) / steps)

    ahead = np.lib.stride_tricks.sliding_window_view(usual_carbon[1:], a_day)

    # Yesterday counts a little (weather persists), today counts by what the sun has shown so far.
    today = day[:n]
    pv_day = np.bincount(today, site.pv_kw, len(days))
    usual_day = np.bincount(today, usual_pv_kw[:n], len(days))
    ratio = np.ones(len(days))
    ratio[1:] = np.where(usual_day[:-1] > 0, pv_day[:-1] / np.maximum(usual_day[:-1], 1e-6), 1.0)
    prior = 1.0 + 0.3 * (np.clip(ratio, 0.0, 4.0) - 1.0)
    whole_day = np.bincount(day, usual_pv_kw, len(days))
    weight = (0.1 * whole_day + 1e-6)[today]
    so_far, usual_so_far = (
        _since_midnight(site.pv_kw, today),
        _since_midnight(usual_pv_kw[:n], today),
    )
    outlook = (so_far + weight * prior[today]) / (usual_so_far + weight)

    hour_kw, usual_hour_kw = (_last_hour(kw, site.steps(1.0)) for kw in (site.pv_kw, usual_pv_kw))
    daylight = usual_hour_kw[:n] > 0.02 * max(float(usual_pv_kw.max()), 1e-6)
    recent = np.where(daylight, hour_kw / np.maximum(usual_hour_kw[:n], 1e-6), 1.0)

    since_midnight = (site.local - site.local.astype("datetime64[D]")).astype("timedelta64[m]")
    hour = since_midnight.astype(np.int64) / 60
    angle = 2 * np.pi * (hour + step_h / 2) / DAY_H
    return np.stack(
        [
            np.sin(angle),
            np.cos(angle),
            np.sin(2 * angle),
            np.cos(2 * angle),
            weekend[:n].astype(np.float64),
            site.pv_kw,
            site.load_kw,
            site.import_limit_kw,
            carbon,
            carbon_ahead(1.0),
            carbon_ahead(3.0),
            carbon_ahead(6.0),
            beyond_now(ahead[:n].max(axis=1)),
            recent,
            outlook,
            *(step_h * _expected_ahead(outlook, usual_pv_kw, usual_load_kw, a_day)),
        ]
    )


def _seasonal(values: Floats, known: _Bools, slot: Ints, day: Ints, days: _Days) -> Floats:
    """Return the mean of the known steps of each slot on the days of that season, like `slot`."""
    n, shape = len(values), (len(days), int(slot.max()) + 1)
    place = (day[:n] * shape[1] + slot[:n])[known]
    sums = np.bincount(place, values[known], shape[0] * shape[1]).reshape(shape)
    counts = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)
    ordinal = (days - days.astype("datetime64[Y]")).astype(np.float64)
    distance = np.abs(ordinal[:, None] - ordinal[None, :])
    distance = np.minimum(distance, 365.25 - distance)
    distance[:, ~counts.any(axis=1)] = np.inf
    # Where the site has no training day that near, the nearest ones serve.
    near = distance <= np.maximum(_SEASON_DAYS, distance.min(axis=1, keepdims=True))
    found = near @ counts
    usual = np.divide(near @ sums, found, out=np.zeros(shape), where=found > 0)
    return usual[day, slot]


def _since_midnight(values: Floats, day: Ints) -> Floats:
    """Return the sums [n] of each step and those before it on the same day."""
    until = values.cumsum()
    first = np.flatnonzero(np.diff(day, prepend=-1))
    return until - (until - values)[first][np.searchsorted(first, np.arange(len(day)), "right") - 1]


def _last_hour(power_kw: Floats, steps: int) -> Floats:
    """Return the mean of each step and those of the hour before its end."""
    padded = np.pad(power_kw, (steps - 1, 0), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, steps).mean(axis=1)


def _expected_ahead(outlook: Floats, pv_kw: Floats, load_kw: Floats, steps: int) -> Floats:
    """Return surplus and deficit [2, n] in kW, added up over the steps after each."""
    window = np.lib.stride_tricks.sliding_window_view
    pv_ahead, load_ahead = window(pv_kw[1:], steps), window(load_kw[1:], steps)
    found = np.empty((2, len(outlook)))
    for first in range(0, len(outlook), _ROWS_AT_ONCE):
        rows = slice(first, min(first + _ROWS_AT_ONCE, len(outlook)))
        net_kw = outlook[rows, None] * pv_ahead[rows] - load_ahead[rows]
        found[:, rows] = np.maximum(net_kw, 0.0).sum(axis=1), np.maximum(-net_kw, 0.0).sum(axis=1)
    return found
