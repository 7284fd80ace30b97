"""The observation: of order one, right in a case worked by hand, and blind to the future."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from co2lightning.control.moves import moves_of
from co2lightning.control.observation import HIGHEST, NAMES, give, observe
from co2lightning.control.rules import RULES, Rule, rbc_b
from co2lightning.control.state import SiteModel, State, restore
from co2lightning.errors import UserError
from co2lightning.sim.days import SiteDays
from co2lightning.sim.objective import priced_model
from co2lightning.sim.scales import observer_of
from co2lightning.sim.schedule import run, start
from co2lightning.site.model import Floats, Ints, Sessions, Site
from small_site import Row, random_site, real, shipped, small_site


def anything(seed: int = 0) -> Rule:
    """Return a policy that does anything."""
    generator = torch.Generator().manual_seed(seed)

    def act(model: SiteModel, state: State) -> Tensor:
        return torch.rand(len(state.soc), 2, generator=generator) * 2.0 - 1.0

    return act


def observations(
    site: Site, places: Ints, steps: int, rule: Rule, soc: float = 0.5, high: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return what is observed [n, B, O] in runs of a rule, and what the rule does [n, B, 2].

    Args:
        high: How much higher the bounds are than they should be.
    """
    model, observer = priced_model(site), observer_of(site)
    observer = observer._replace(high=high * observer.high)
    seen: list[Tensor] = []
    actions: list[Tensor] = []

    def watched(model: SiteModel, state: State) -> Tensor:
        seen.append(observe(observer, model, state, moves_of(observer.moves, model, state)))
        action = rule(model, state)
        assert isinstance(action, Tensor)
        actions.append(action)
        return action

    run(model, watched, start(model, site, places, soc if site.battery else 0.0), steps)
    return torch.stack(seen), torch.stack(actions)


def in_units(site: Site, obs: Tensor) -> dict[str, float]:
    """Return what an observation [O] says, in the features' units; without what is always 0."""
    observer = observer_of(site)
    rows = zip(NAMES, obs.tolist(), observer.centre, observer.spread, strict=True)
    return {name: value * spread + centre for name, value, centre, spread in rows if spread}


# --- worked by hand ------------------------------------------------------------------------------


def by_hand() -> Site:
    """Three days, the first a Saturday: too few for a regression, so the usual is expected.

    Which is 7 kW of PV, a load of 3.5 kW on a weekend and 5 on a Monday, 0.4 kg/kWh.
    """
    rows: list[Row] = [(0, 0, 0, 20, 2.0, 4.0), (0, 1, 0, 3, 2.6, 4.0), (1, 0, 40, 60, 9.0, 4.0)]
    return small_site(
        days=3,
        sockets=2,
        sessions=rows,
        pv_kw=[[7.0], [3.0], [11.0]],
        load_kw=[[4.0], [3.0], [5.0]],
        carbon=[[0.5], [0.2], [0.5]],
        power_kw=6.0,
        grid_kw=20.0,
    )


def check(site: Site, obs: Tensor, expected: dict[str, float]) -> None:
    """Compare an observation [O] with what is expected of it, in the features' units."""
    told = in_units(site, obs)
    for name, value in expected.items():
        assert told[name] == pytest.approx(value, abs=1e-4), name


def test_the_state_worked_by_hand() -> None:
    site = by_hand()
    seen, _ = observations(site, np.array([0]), 1, rbc_b)
    # Laxities 20 - 2 = 18 and 3 - 2.6 = 0.4 steps; the second vehicle must take 0.6 * 4 kW.
    room_kwh, stored_kwh = 0.4 * 40.0 / 0.9, 0.4 * 40.0 * 0.8
    expected = {
        "hour_sin": np.sin(2 * np.pi * 0.125 / 24),
        "half_day_cos": np.cos(4 * np.pi * 0.125 / 24),
        "weekend": 1.0,
        "price": 0.5,
        "price_unusual": 0.5 - 0.4,
        "price_last_day": 0.0,  # the series has just begun
        "price_mean_2_h": 0.4 - 0.5,
        "price_lowest_6_h": 0.4 - 0.5,
        "price_highest_24_h": 0.4 - 0.5,
        "price_cheaper_2_h": 1.0,
        "pv": 7.0,
        "pv_unusual": 0.0,
        "pv_6_h": 0.0,
        "load": 4.0,
        "load_unusual": 4.0 - 3.5,
        "load_2_h": 3.5 - 4.0,
        "surplus_1_h": 3.5,
        "surplus_8_h": 8 * 3.5,
        "surplus_24_h": 24 * 3.5,
        "soc": 0.5,
        "charge_limit": 6.0,
        "discharge_limit": 6.0,
        "room_2_h": 2 * 3.5 - room_kwh,
        "room_8_h": 8 * 3.5 - room_kwh,
        "store_2_h": stored_kwh,
        "spare_surplus": 24 * 3.5 - 4.6 - room_kwh,
        "spare_store": stored_kwh - 4.6,
        "surplus": 7.0 - 4.0 - 2.4,
        "owed": 4.6,
        # Beside a tenth of a socket's power, so that crumbs are no large share.
        "owed_1_h": 2.6 * (1 - 0.4 / 4) / 4.7,
        "owed_4_h": 2.6 * (1 - 0.4 / 16) / 4.7,
        "owed_10_h": (2.0 * (1 - 18 / 40) + 2.6 * (1 - 0.4 / 40)) / 4.7,
        "must": 2.4,
        "solar": 3.0,
        "cheap": 8.0,  # the sun is free, and more of it is no cheaper
        "could": 8.0,
        "cheap_price": 2.4,  # every later hour is expected to be cheaper
    }
    check(site, seen[0, 0], expected)


def test_the_next_hours_are_expected_as_usual_where_nothing_can_be_learned() -> None:
    """Noon of the second day, a Sunday: 47 steps of it follow, then a Monday's."""
    site = by_hand()
    seen, _ = observations(site, np.array([96]), 49, rbc_b)
    expected = {
        "price_unusual": 0.2 - 0.4,
        "price_last_day": 0.2 - (47 * 0.5 + 49 * 0.2) / 96,
        "price_lowest_2_h": 0.4 - 0.2,
        "price_cheaper_24_h": 0.0,
        "pv_unusual": 3.0 - 7.0,
        "pv_2_h": 7.0 - 3.0,
        "load_unusual": 3.0 - 3.5,
        "load_6_h": 3.5 - 3.0,
        "load_24_h": (47 * 3.5 + 49 * 5.0) / 96 - 3.0,
        "surplus_8_h": 8 * 3.5,
        "surplus_24_h": 0.25 * (47 * 3.5 + 49 * 2.0),
    }
    check(site, seen[48, 0], expected)


def test_what_comes_again_every_week_is_expected_as_it_comes() -> None:
    """The regression finds last week: from then on nothing is left to guess."""
    week = np.random.default_rng(3).uniform(0.2, 0.8, (7, 24))
    site = small_site(
        days=28, step_minutes=60, pv_kw=10.0 * np.tile(week, (4, 1)), carbon=np.tile(week, (4, 1))
    )
    now = 20 * 24 + 7
    seen, _ = observations(site, np.array([now]), 1, rbc_b)
    told = in_units(site, seen[0, 0])
    price = site.carbon_kg_per_kwh
    for hours in (2, 6, 24):
        ahead = price[now + 1 : now + 1 + hours]
        for what, value in (
            (f"price_mean_{hours}_h", ahead.mean() - price[now]),
            (f"price_lowest_{hours}_h", ahead.min() - price[now]),
            (f"price_highest_{hours}_h", ahead.max() - price[now]),
            (f"price_cheaper_{hours}_h", (ahead < price[now]).mean()),
            (f"pv_{hours}_h", 10.0 * (ahead.mean() - price[now])),
        ):
            assert told[what] == pytest.approx(value, abs=1e-3), what


@pytest.mark.parametrize("step_minutes", [5, 15, 60])
def test_hours_ahead_are_hours_whatever_a_step_is(step_minutes: int) -> None:
    """From noon on the intensity is 0.6 instead of 0.3 and the load 5 kW instead of 2; PV 3."""
    n = 60 // step_minutes
    morning = np.arange(24 * n) < 12 * n
    row: Row = (0, 0, 9 * n, 13 * n, 8.0, 4.0)
    site = small_site(
        days=3,
        step_minutes=step_minutes,
        sessions=[row],
        pv_kw=3.0 * np.array([[1.0], [0.8], [1.2]]),
        load_kw=np.where(morning, 2.0, 5.0),
        carbon=np.where(morning, 0.3, 0.6),
    )
    seen, _ = observations(site, np.array([0]), 13 * n + 1, anything(1))
    # What is looked ahead is 15 minutes apart or a step: at ten the last of two hours is noon.
    each = 4 if step_minutes < 60 else 1
    at_ten = {
        "price_mean_2_h": 0.3 / (2 * each),
        "price_mean_6_h": 0.3 * (4 * each + 1) / (6 * each),
        "price_mean_24_h": 0.15,
        "price_highest_2_h": 0.3,
        "price_cheaper_24_h": 0.0,
        "load_2_h": 3.0 / (2 * each),
        "load_24_h": 1.5,
        "surplus_1_h": 1.0,
        "surplus_2_h": (2 * each - 1) / each,
        "surplus_8_h": (2 * each - 1) / each,
        "deficit_2_h": 2.0 / each,
        "deficit_8_h": 2.0 * (6 * each + 1) / each,
    }
    check(site, seen[10 * n, 0], at_ten)
    at_one = {
        "price_mean_24_h": -0.15,
        "price_lowest_6_h": 0.0,
        "price_lowest_24_h": -0.3,
        "price_cheaper_6_h": 0.0,
        "price_cheaper_24_h": 0.5,
    }
    check(site, seen[13 * n, 0], at_one)


def test_features_are_given_by_name_in_any_order() -> None:
    site = shipped()
    model, observer = priced_model(site), observer_of(site)
    state = restore(model, start(model, site, site.day_bounds[[4, 9]], 0.5))
    moves = moves_of(observer.moves, model, state)
    names = ("could", "hour_sin", "soc", "price_mean_6_h")
    seen = observe(give(observer, names, "X"), model, state, moves)
    every = observe(observer, model, state, moves)
    assert torch.equal(seen, every[:, [NAMES.index(name) for name in names]])
    with pytest.raises(UserError, match="X: trained on the observation carbon, which") as said:
        give(observer, ("soc", "carbon"), "X")
    assert "\n" not in str(said.value)


# --- of order one --------------------------------------------------------------------------------

MANY = {"days": 30, "step_minutes": 60}
DRAWN = np.random.default_rng(0).random((30, 24))
ODD: dict[str, dict[str, Any]] = {
    "all parts": {"days": 20},
    "5 minutes": {"days": 8, "step_minutes": 5},
    "1 socket": {**MANY, "sockets": 1},
    "1,000 sockets": {"days": 12, "step_minutes": 60, "sockets": 1000},
    "1 kWh": {**MANY, "capacity_kwh": 1.0, "power_kw": 0.5},
    "10 MWh": {**MANY, "capacity_kwh": 1e4, "power_kw": 2_500.0},
    "10 MWh, 1 socket": {**MANY, "capacity_kwh": 1e4, "power_kw": 2_500.0, "sockets": 1},
    "clean": {**MANY, "carbon": 0.05 * DRAWN},
    "dirty": {**MANY, "carbon": 1.5 + DRAWN},
    "constant, clean": {**MANY, "carbon": 0.05},
    "constant, dirty": {**MANY, "carbon": 1.5},
    "no battery": {**MANY, "capacity_kwh": None},
    "no sockets": {**MANY, "sockets": 0},
    "no PV": {**MANY, "pv": 0.0},
    "no load": {**MANY, "load": 0.0},
    "battery alone": {**MANY, "sockets": 0, "pv": 0.0, "load": 0.0},
    "vehicles alone": {**MANY, "capacity_kwh": None, "pv": 0.0, "load": 0.0},
    "net meter": {**MANY, "pv": 0.0, "load": -1.0},
    "least power": {**MANY, "min_kw": 0.9},
    "dimmed": {**MANY, "import_limit_kw": np.where(DRAWN < 0.5, 4.0, 11.0)},
    "rarely dimmed": {**MANY, "import_limit_kw": np.where(DRAWN < 0.01, 4.0, 1e6)},
}
REAL = ("iquitos", "caltech-2019", "citylearn-5")


@functools.cache
def site_of(name: str) -> Site:
    if name in REAL:
        return shipped(name) if name == "iquitos" else real(name)
    return random_site(len(name), **ODD[name])


def mixed(site: Site, high: float = 1.0) -> Tensor:
    """Return what is observed [M, O] under RBC B and a policy that does anything."""
    days = site.day_bounds[:-1][site.training_days]
    days = days[:: -(-len(days) // 30)]
    steps, rules = site.steps(23.0), (rbc_b, anything())
    parts = [observations(site, days, steps, rule, high=high)[0] for rule in rules]
    return torch.cat(parts).flatten(0, 1)


@pytest.mark.parametrize("name", [*REAL, *ODD])
def test_inputs_are_of_order_one_on_every_site(name: str) -> None:
    seen = mixed(site_of(name))
    assert seen.dtype == torch.float32
    assert seen.isfinite().all()
    assert seen.abs().max() <= HIGHEST
    free = mixed(site_of(name), high=1e6)
    for i in range(len(NAMES)):
        clipped = (free[:, i].abs() > HIGHEST + 1e-4).float().mean().item()
        assert clipped <= 1e-3, f"{NAMES[i]}: {clipped:.2%} of the steps are clipped"
        spread = seen[:, i].std().item()
        assert spread < 1e-6 or 0.1 <= spread <= 3.0, f"{NAMES[i]}: {spread}"


def test_features_have_names_of_their_own_and_say_something() -> None:
    assert len(set(NAMES)) == len(NAMES) == 63
    spread = dict(zip(NAMES, mixed(shipped()).std(0).tolist(), strict=True))
    constant = [name for name, value in spread.items() if value < 0.1]
    # Nobody dims the connection or pays for export, and all days have the same intensity.
    assert constant == ["import_limit", "price_unusual", "credit"]


BATTERY = {"soc", "charge_limit", "discharge_limit"}
BATTERY |= {f"{what}_{hours}_h" for what in ("room", "store") for hours in (2, 8, 24)}
ABSENT = {
    "no battery": BATTERY,
    "no sockets": {"must", "solar", "cheap", "could", "cheap_price", "owed"}
    | {f"owed_{hours}_h" for hours in (1, 4, 10)},
    "no PV": {name for name in NAMES if name.startswith(("pv", "surplus_"))},
    "no load": {name for name in NAMES if name.startswith(("load", "deficit_"))},
    "constant, dirty": {name for name in NAMES if name.startswith("price")},
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_belongs_to_an_absent_part_is_0_and_nothing_else(name: str) -> None:
    seen = mixed(site_of(name))
    silent = {NAMES[i] for i in range(len(NAMES)) if not seen[:, i].any()}
    assert silent == ABSENT[name] | {"import_limit", "credit"}


def test_a_site_of_a_single_day_can_be_observed() -> None:
    for site in (small_site(load_kw=3.0), small_site(days=3, pv_kw=5.0, held_out=[1, 2])):
        seen, _ = observations(site, np.array([0]), 96, anything())
        assert seen.isfinite().all()


def test_the_environment_tells_its_bounds() -> None:
    env = SiteDays(shipped(), 2)
    assert env.observer.high.tolist() == [[HIGHEST]] * len(NAMES)
    assert env.observer is observer_of(shipped(), torch.device("cpu"))


# --- blind to the future -------------------------------------------------------------------------

SERIES = ("pv_kw", "load_kw", "carbon_kg_per_kwh")


def changed(site: Site, where: Ints, factor: Floats | float, shift: float = 0.0) -> Site:
    """Return a site with other series at some places."""
    series: dict[str, Any] = {}
    for name in SERIES:
        series[name] = getattr(site, name).copy()
        series[name][where] = series[name][where] * factor + shift
    return dataclasses.replace(site, **series)


@pytest.mark.parametrize("now", [0, 47, 95, 250])
def test_what_comes_later_is_not_seen(now: int) -> None:
    """Another future of held-out weeks: series after `now`, vehicles that arrive after it."""
    site = shipped()
    rng = np.random.default_rng(now)
    weeks = site.stretch_bounds[[1, 3, 5]]
    later = np.concatenate([np.arange(begin + now + 1, end) for begin, end in weeks])
    other = changed(site, later, rng.uniform(0.0, 2.0, len(later)))
    rows = site.sessions
    known = np.ones(len(rows.socket), dtype=bool)
    for begin, end in weeks:
        known &= ~((rows.arrival > begin + now) & (rows.departure < end))
    columns = (getattr(rows, field.name)[known] for field in dataclasses.fields(Sessions))
    other = dataclasses.replace(other, sessions=Sessions(*columns))
    seen, _ = observations(site, weeks[:, 0], 260, anything())
    otherwise, _ = observations(other, weeks[:, 0], 260, anything())
    assert torch.equal(seen[: now + 1], otherwise[: now + 1])
    assert (seen[now + 1 :] - otherwise[now + 1 :]).abs().max() > 0.1


@pytest.mark.parametrize("factor", [0.0, 1e6])
@pytest.mark.parametrize("name", REAL)
def test_held_out_days_teach_nothing(name: str, factor: float) -> None:
    """They may be anything: what is observed is the same, bit for bit, until they are the past.

    A training day up to a week after one remembers it.
    """
    site = site_of(name)
    poisoned = np.concatenate([np.arange(*bounds) for bounds in site.stretch_bounds])
    other = changed(site, poisoned, factor, shift=factor)
    training = site.training_days
    recent = np.array([site.held_out[max(day - 7, 0) : day].any() for day in training])
    places, steps = site.day_bounds[training[~recent]][::3], site.steps(23.0)
    seen, own = observations(site, places, steps, rbc_b)
    otherwise, actions = observations(other, places, steps, rbc_b)
    assert torch.equal(seen, otherwise)
    assert torch.equal(own, actions)
    # Nor in what is seen before the first step of a held-out week has gone by, but for its meters.
    for rule in (rbc_b, RULES["uncontrolled"]):
        before = site.stretch_bounds[:, 0] - site.steps(24.0)
        seen, otherwise = (
            observations(one, before, site.steps(24.0), rule)[0] for one in (site, other)
        )
        assert torch.equal(seen, otherwise)
