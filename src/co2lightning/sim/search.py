"""The rules of a site, among them RBC C: the best one of its kind, found on training weeks.

When vehicles charge, a time of day in which all do, what the battery does, a time in which it is
filled and one in which it holds. Vehicles do as they do whatever the battery does (the connection's
limit apart), so they are run once, and batteries by the hundred on the load that they make. Coarse
choices first, then finer ones around the best, the last few again with all of the physics.
The corner of the moves that a policy begins with is searched on the same weeks.
Nothing is drawn by chance: the same site gives the same rule.

Shapes: P steps of the site, W weeks of n steps, V choices for the vehicles, K for the battery,
B runs at once.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.forecast import forecast
from co2lightning.control.moves import Corner, corners, move_tables, moves_of, powers_of
from co2lightning.control.outlook import Outlook, outlook_of
from co2lightning.control.rules import RULES, VEHICLES, Choice, Rule, Window, rbc_c
from co2lightning.control.state import Carry, Powers, SiteModel, State, restore
from co2lightning.sim.kept import digest_of, recall
from co2lightning.sim.objective import priced_model, reward
from co2lightning.sim.physics import step
from co2lightning.sim.schedule import start, start_soc
from co2lightning.sim.weeks import left_price, training_weeks
from co2lightning.site.model import DAY_H, Floats, Ints, Site

_TIE = 1e-3  # of what uncontrolled costs: the simpler rule is taken
_BEST = 2  # ways of charging that go on to the windows
_NEVER = Window()


def rules_of(
    site: Site,
    device: torch.device | str = "cpu",
    keep: Path | None = None,
    foresight: bool = False,
) -> dict[str, Rule]:
    """Return the rules that a site's policies are measured against, by name.

    Args:
        site: The site.
        device: Where they act.
        keep: Directory where the searched one is kept from one command to the next.
        foresight: Add those that look at what import will cost, each also with that known, as
            `cheap_true`, `rbc_c_true`.
    """
    choices = {"rbc_c": choice_of(site, keep)}
    if len(site.sessions.arrival):
        choices = {"cheap": Choice("cheap", greedy=site.battery is not None), **choices}
    rules = dict(RULES)
    for known in (False, True) if foresight else (False,):
        outlook = outlook_of(site, device, known)
        for name, choice in choices.items():
            if not known:
                rules[name] = functools.partial(rbc_c, choice, outlook)
            elif "cheap" in choice.vehicles:
                rules[f"{name}_true"] = functools.partial(rbc_c, choice, outlook)
    return rules


def choice_of(site: Site, keep: Path | None = None) -> Choice:
    """Return what `search` finds for a site, as it was found before or anew.

    Args:
        site: The site.
        keep: Directory where it is kept. One that cannot be read or written costs time alone.
    """
    return _choice(site.fitted_on or site, keep)


@functools.lru_cache(maxsize=8)
def _choice(site: Site, keep: Path | None) -> Choice:
    if keep is None:
        return search(site)
    clocks = site.local.astype("datetime64[s]").astype(np.int64)
    price = site.import_price, forecast(site, "import_price")
    key = digest_of(site, clocks, site.day_bounds, site.held_out, *price)
    return _from_numbers(recall(keep, "rule", key, 9, lambda: _as_numbers(_choice(site, None))))


def _as_numbers(choice: Choice) -> Floats:
    way = VEHICLES.index(choice.vehicles)
    windows = *choice.charge, *choice.fill, *choice.hold
    numbers = [way, choice.greedy, choice.fill_soc, *windows]
    return np.array([float(number) for number in numbers])


def _from_numbers(numbers: Floats) -> Choice:
    way, greedy, fill_soc = numbers[:3].tolist()
    charge, fill, hold = (
        Window(*window) for window in numbers[3:].astype(int).reshape(3, 2).tolist()
    )
    way = min(max(int(way), 0), len(VEHICLES) - 1)  # whatever a file says
    return Choice(VEHICLES[way], charge, bool(greedy), fill, fill_soc, hold)


# --- the search ----------------------------------------------------------------------------------


@torch.inference_mode()
def search(site: Site) -> Choice:
    """Return the rule that costs least in six training weeks, the simpler one among equals.

    Each begins as evaluation begins; what is left at its end, stored or owed, is priced at 0.8
    times the mean. A site without whole training weeks is searched on training days.
    """
    bounds = training_weeks(site)
    has_battery = site.battery is not None
    if not len(bounds) or not (has_battery or len(site.sessions.arrival)):
        return Choice(greedy=has_battery)
    trial = _Trial(site, priced_model(site), outlook_of(site), bounds, left_price(site))
    batteries = _battery_choices(site)

    # Each way of charging with each single window of the battery.
    driven = _drive(trial, [Choice(way, greedy=has_battery) for way in _ways(site)])
    cost = _costs(trial, driven, batteries)
    order = cost.min(1).argsort(kind="stable").tolist()
    found = [_joined(driven[i].choice, batteries[int(cost[i].argmin())]) for i in order]
    kinds = _best_of_each_kind(batteries, cost[order[0]])

    # The best ways of charging, each with a window in which all charge.
    ways = [driven[i].choice for i in order[:_BEST] if driven[i].choice.vehicles != "arrival"]
    windows = _windows(site)
    driven = [driven[i] for i in order[:_BEST]]
    driven += _drive(trial, [way._replace(charge=w) for way in ways for w in windows])
    cost = _costs(trial, driven, kinds)
    order = cost.min(1).argsort(kind="stable").tolist()[:3]
    driven = [driven[i] for i in order]

    # Both windows of the battery at once, then vehicles and battery finer and finer in turn.
    best = _cheapest(trial, driven, _both_windows(batteries))
    found.append(best)
    for hours in (1.0, 0.5, 0.25):
        unit = site.steps(hours)
        charging = _nearby(best.charge, unit, site.steps(DAY_H))
        driven = _drive(trial, [best._replace(charge=window) for window in charging])
        some = _finer_batteries(best, unit, site) if has_battery else [best]
        best = _cheapest(trial, driven, some)
    return _simplest(trial, [*_simpler(best), *found])


class _Trial(NamedTuple):
    """What rules are tried on."""

    site: Site
    model: SiteModel
    outlook: Outlook
    bounds: Ints  # [W, 2]
    left_price: float  # of a kWh that is owed, and of one stored the other way


class _Driven(NamedTuple):
    """What vehicles did in each week, and what that cost with the battery as it was."""

    choice: Choice
    ev_kw: Floats  # [W, n]
    owed_kwh: Floats  # [W] at the end
    cost: float


def _drive(trial: _Trial, choices: Sequence[Choice]) -> list[_Driven]:
    """Run choices with all of the physics; one run for each way of charging."""
    site, weeks = trial.site, len(trial.bounds)
    driven: dict[int, _Driven] = {}
    for way in dict.fromkeys(choice.vehicles for choice in choices):
        own = [i for i, choice in enumerate(choices) if choice.vehicles == way]
        rows = _stacked([choices[i] for i in own], weeks)
        carry = start(trial.model, site, np.tile(trial.bounds[:, 0], len(own)), start_soc(site))
        rule = functools.partial(rbc_c, rows, trial.outlook)
        run = _run(trial.model, rule, carry, _steps(trial), vehicles=True)
        cost = _settled(trial, run).reshape(len(own), weeks).sum(1)
        ev_kw = torch.stack(run.ev_kw, 1).reshape(len(own), weeks, -1).double().cpu().numpy()
        owed_kwh = run.owed_kwh.reshape(len(own), weeks)
        for j, i in enumerate(own):
            driven[i] = _Driven(choices[i], ev_kw[j], owed_kwh[j], float(cost[j]))
    return [driven[i] for i in range(len(choices))]


def _costs(trial: _Trial, driven: Sequence[_Driven], batteries: Sequence[Choice]) -> Floats:
    """Return what choices for the battery cost [V, K] beside vehicles that have been run."""
    site, (weeks, n) = trial.site, driven[0].ev_kw.shape
    if site.battery is None:
        return np.array([[one.cost] for one in driven])
    # One week after another on one line, each with the vehicles of one choice in its load.
    places = np.concatenate([np.arange(begin, end) for begin, end in trial.bounds.tolist()])
    place = torch.as_tensor(np.append(np.tile(places, len(driven)), 0))
    model, ev_kw = trial.model, np.concatenate([one.ev_kw.ravel() for one in driven])
    series = model.series[:, place]
    series[0, :-1] += torch.as_tensor(ev_kw)
    series[1, :-1] -= torch.as_tensor(ev_kw)
    empty = torch.tensor([0.0, 1.0, 0.0, 0.0]).to(series).expand(len(place), 1, 4).permute(2, 0, 1)
    model = model._replace(series=series, sockets=empty, truth=None, floor_kw=None)
    outlook = trial.outlook._replace(slot=trial.outlook.slot[place])
    begins = n * np.arange(len(driven) * weeks)
    cost = np.empty((len(driven), len(batteries)))
    for some in np.array_split(
        np.arange(len(batteries)), -(-len(batteries) * len(begins) // _ONCE)
    ):
        own = [batteries[i]._replace(vehicles="arrival") for i in some.tolist()]
        # Rows: for each choice of the battery, each of the vehicles, each week.
        soc = torch.full((len(own) * len(begins),), start_soc(site), dtype=model.zero.dtype)
        carry = Carry(
            torch.as_tensor(np.tile(begins, len(own))), soc, torch.zeros_like(soc)[:, None]
        )
        rule = functools.partial(rbc_c, _stacked(own, len(begins)), outlook)
        run = _run(model, rule, carry, n)
        each = _settled(trial, run).reshape(len(own), len(driven), weeks).sum(2)
        cost[:, some] = each.T
    owed_kwh = np.array([one.owed_kwh.sum() for one in driven])
    return cost + trial.left_price * owed_kwh[:, None]


def _cheapest(trial: _Trial, driven: Sequence[_Driven], batteries: Sequence[Choice]) -> Choice:
    """Return what costs least of all pairs of vehicles and battery."""
    v, k = divmod(int(_costs(trial, driven, batteries).argmin()), len(batteries))
    return _joined(driven[v].choice, batteries[k])


_ONCE = 40_000  # runs; bounds the memory


class _Ran(NamedTuple):
    cost: Floats  # [B] by the meter
    stored_kwh: Floats  # [B] at the end
    owed_kwh: Floats  # [B] and what vehicles left without that had announced something else
    ev_kw: list[Tensor]  # n of [B]; none unless asked for


def _run(model: SiteModel, rule: Rule, carry: Carry, steps: int, *, vehicles: bool = False) -> _Ran:
    state, ev_kw = restore(model, carry), list[Tensor]()
    cost, unmet_kw = torch.zeros_like(state.soc), torch.zeros_like(state.soc)
    for _ in range(steps):
        following, flows = step(model, state, rule(model, state))
        cost -= reward(model, state, flows)
        if vehicles:
            ev_kw.append(flows.ev_kw)
        if flows.misled_kw is not None:
            unmet_kw += flows.unmet_kw
        state = following
    stored_kwh = state.soc / model.soc_per_kw * model.step_h
    owed_kwh = (state.carry.truly_owed_kw.sum(1) + unmet_kw) * model.step_h
    numbers = torch.stack([cost, stored_kwh, owed_kwh]).double().cpu().numpy()
    return _Ran(*numbers, ev_kw=ev_kw)


def _settled(trial: _Trial, ran: _Ran) -> Floats:
    stored_kwh = ran.stored_kwh if trial.site.battery else 0.0
    return ran.cost + trial.left_price * (ran.owed_kwh - stored_kwh)


def _steps(trial: _Trial) -> int:
    return int(trial.bounds[0, 1] - trial.bounds[0, 0])


def _stacked(choices: Sequence[Choice], times: int) -> Choice:
    """Return choices that charge in one way as one, for rows [B] of so many of each."""

    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype).repeat_interleave(times)

    def window(windows: list[Window]) -> Window:
        parts = zip(*windows, strict=True)
        return Window(*(column((int(x) for x in part), torch.int64) for part in parts))

    return Choice(
        vehicles=choices[0].vehicles,
        charge=window([c.charge for c in choices]),
        greedy=column((float(c.greedy) for c in choices), torch.float32),
        fill=window([c.fill for c in choices]),
        fill_soc=column((float(c.fill_soc) for c in choices), torch.float32),
        hold=window([c.hold for c in choices]),
    )


# --- where a policy begins -----------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
@torch.inference_mode()
def corner_of(site: Site) -> Corner | None:
    """Return the corner of the moves that costs least in the weeks of `search`, None without any.

    All are run at once, with the weights that a policy begins with. The earlier one among equals.
    """
    if not len(bounds := training_weeks(site)):
        return None
    trial = _Trial(site, priced_model(site), outlook_of(site), bounds, left_price(site))
    tables = move_tables(site, trial.model, trial.outlook)
    tried = corners(tables)
    actions = torch.tensor([corner.action() for corner in tried]).repeat_interleave(len(bounds), 0)

    def rule(model: SiteModel, state: State) -> Tensor | Powers:
        return powers_of(tables, model, state, moves_of(tables, model, state), actions)

    places = np.tile(bounds[:, 0], len(tried))
    run = _run(trial.model, rule, start(trial.model, site, places, start_soc(site)), _steps(trial))
    cost = _settled(trial, run).reshape(len(tried), len(bounds)).sum(1)
    enough = cost.min() + _SAME * np.abs(cost).max()
    return tried[int(np.flatnonzero(cost <= enough)[0])]


_SAME = 1e-5  # relative; what rounding may make of equals


# --- what is tried -------------------------------------------------------------------------------


def _ways(site: Site) -> list[str]:
    """Return the ways of charging that differ on this site, the simplest first."""
    if not len(site.sessions.arrival):
        return ["arrival"]
    sunny = (site.load_kw - site.pv_kw).min() < 0.0
    return [way for way in VEHICLES if sunny or "solar" not in way]


def _windows(site: Site) -> list[Window]:
    begins = range(0, site.steps(DAY_H), site.steps(2.0))
    lengths = sorted({site.steps(hours) for hours in (1.5, 3.0, 6.0)})
    return [Window(*w) for w in itertools.product(begins, lengths)]


def _battery_choices(site: Site) -> list[Choice]:
    """Return what a battery can do by itself, and with each one of its windows."""
    if not (battery := site.battery):
        return [Choice()]
    windows = _windows(site)
    band = battery.soc_max - battery.least_soc
    levels = [battery.least_soc + share * band for share in (1 / 3, 2 / 3, 1.0)]
    greedy = Choice(greedy=True)
    fills = [
        greedy._replace(fill=window, fill_soc=_level(level, site))
        for window, level in itertools.product(windows, levels)
        if battery.may_charge_from_grid
    ]
    return [Choice(), greedy, *fills, *(greedy._replace(hold=window) for window in windows)]


def _level(soc: float, site: Site) -> float:
    """Return a level in whole twentieths, within what operation may use."""
    assert site.battery
    return min(max(round(20 * soc) / 20, site.battery.least_soc), site.battery.soc_max)


def _best_of_each_kind(batteries: list[Choice], cost: Floats) -> list[Choice]:
    """Return the best choice without windows, with either, and these two together."""
    fills = [i for i, one in enumerate(batteries) if one.fill.steps]
    holds = [i for i, one in enumerate(batteries) if one.hold.steps]
    kinds = batteries[:2]
    best = [batteries[min(own, key=lambda i: cost[i])] for own in (fills, holds) if own]
    if len(best) == 2:
        best.append(best[0]._replace(hold=best[1].hold))
    return [*kinds, *best]


def _both_windows(batteries: list[Choice]) -> list[Choice]:
    fills = [one for one in batteries if one.greedy and not one.hold.steps]
    holds = [one.hold for one in batteries if one.hold.steps]
    pairs = [fill._replace(hold=hold) for fill in fills for hold in [_NEVER, *holds]]
    return [batteries[0], *pairs]


def _nearby(window: Window, unit: int, slots: int) -> list[Window]:
    """Return a window and those whose beginning and end lie a unit of steps to either side."""
    begin, steps = int(window.begin), int(window.steps)
    if not steps:
        return [window]
    moves = itertools.product((0, -unit, unit), repeat=2)
    moved = [((begin + first) % slots, steps + last - first) for first, last in moves]
    return [Window(first, min(length, slots)) for first, length in moved if length > 0]


def _finer_batteries(best: Choice, unit: int, site: Site) -> list[Choice]:
    slots, level = site.steps(DAY_H), float(best.fill_soc)
    levels = {_level(level + 0.1 * unit / site.steps(1.0) * k, site) for k in (-1, 0, 1)}
    levels = sorted(levels | {level}) if best.fill.steps else [level]
    fills, holds = (_nearby(window, unit, slots) for window in (best.fill, best.hold))
    return [
        best._replace(fill=fill, fill_soc=soc, hold=hold)
        for fill, soc, hold in itertools.product(fills, levels, holds)
    ]


def _joined(charging: Choice, battery: Choice) -> Choice:
    return battery._replace(vehicles=charging.vehicles, charge=charging.charge)


def _simpler(best: Choice) -> list[Choice]:
    """Return a rule and what is left of it without some of its windows."""
    fills = {(best.fill, best.fill_soc), (_NEVER, 0.0)}
    return [
        best._replace(charge=charge, fill=fill, fill_soc=soc, hold=hold)
        for charge, (fill, soc), hold in itertools.product(
            {best.charge, _NEVER}, fills, {best.hold, _NEVER}
        )
    ]


def _simplest(trial: _Trial, choices: Sequence[Choice]) -> Choice:
    """Return the simplest of those that cost hardly more than the best, by all of the physics."""
    uncontrolled = Choice()
    some = [uncontrolled, *choices]
    some += [one._replace(fill=_NEVER, fill_soc=0.0, hold=_NEVER) for one in choices]
    tried = _drive(trial, list(dict.fromkeys(some)))
    enough = min(one.cost for one in tried) + _TIE * abs(tried[0].cost)
    return min((one for one in tried if one.cost <= enough), key=_complexity).choice


def _complexity(tried: _Driven) -> tuple[int, int, bool, float]:
    choice = tried.choice
    windows = sum(bool(window.steps) for window in (choice.charge, choice.fill, choice.hold))
    return windows, VEHICLES.index(choice.vehicles), bool(choice.greedy), tried.cost
