"""The observation: of order one, right in a case worked by hand, and blind to the future."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from co2lightning.control.observation import FEATURES, HIGHEST, RULE_FEATURES, observe
from co2lightning.control.rules import RULES, Rule, rbc_b
from co2lightning.control.state import SiteModel, State
from co2lightning.sim.days import SiteDays
from co2lightning.sim.objective import priced_model
from co2lightning.sim.scales import observer_of
from co2lightning.sim.schedule import run, start
from co2lightning.site.model import Floats, Ints, Sessions, Site
from small_site import Row, random_site, real, shipped, small_site

NAMES = [feature.name for feature in FEATURES]
PLAIN = [i for i in range(len(FEATURES)) if i not in RULE_FEATURES]


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
        seen.append(observe(observer, model, state))
        actions.append(rule(model, state))
        return actions[-1]

    run(model, watched, start(model, site, places, soc if site.battery else 0.0), steps)
    return torch.stack(seen), torch.stack(actions)


def in_units(site: Site, obs: Tensor) -> dict[str, float]:
    """Return what an observation [O] says, in the features' units; without what is always 0."""
    observer = observer_of(site)
    rows = zip(NAMES, obs.tolist(), observer.centre, observer.spread, strict=True)
    return {name: value * spread + centre for name, value, centre, spread in rows if spread}


# --- worked by hand ------------------------------------------------------------------------------


def by_hand() -> Site:
    """Three days, the first a Saturday; the season's usual PV is 7 kW, a weekend's load 3.5."""
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


def test_the_state_worked_by_hand() -> None:
    site = by_hand()
    seen, _ = observations(site, np.array([0]), 1, rbc_b)
    # Laxities 20 - 2 = 18 and 3 - 2.6 = 0.4 steps; the second vehicle must take 0.6 * 4 kW.
    expected = {
        "hour_sin": np.sin(2 * np.pi * 0.125 / 24),
        "half_day_cos": np.cos(4 * np.pi * 0.125 / 24),
        "weekend": 1.0,
        "pv": 7.0,
        "load": 4.0,
        "carbon": 0.5,
        "carbon_next_hour": 0.4 - 0.5,
        "carbon_next_3_h": 0.4 - 0.5,
        "carbon_next_6_h": 0.4 - 0.5,
        "carbon_peak_ahead": 0.4 - 0.5,
        "pv_recent": 1.0,
        "pv_outlook": 1.0,
        "surplus_ahead": 24 * (7.0 - 3.5),
        "soc": 0.5,
        "charge_limit": 6.0,
        "discharge_limit": 6.0,
        "must": 2.4,
        "could": 8.0,
        "surplus": 7.0 - 4.0 - 2.4,
        "owed": 4.6,
        "owed_2_h": 2.6 * (1 - 0.4 / 8),
        "owed_5_h": 2.0 * (1 - 18 / 20) + 2.6 * (1 - 0.4 / 20),
        "spare_surplus": 24 * 3.5 - 4.6 - 0.4 * 40.0 / 0.9,
        "spare_store": 0.4 * 40.0 * 0.8 - 4.6,
        "rule_ev": 2.0 * (3.0 - 2.4) / (8.0 - 2.4) - 1.0,
        "rule_battery": 0.0,
    }
    told = in_units(site, seen[0, 0])
    for name, value in expected.items():
        assert told[name] == pytest.approx(value, abs=1e-4), name


def test_later_in_the_day_the_outlook_is_that_of_the_sun_so_far() -> None:
    """Of the second day, 3 kW instead of 7; yesterday was as usual, and counts a tenth."""
    site = by_hand()
    seen, _ = observations(site, np.array([96]), 48, rbc_b)
    told = in_units(site, seen[47, 0])
    so_far, usual, weight = 48 * 3.0, 48 * 7.0, 0.1 * 96 * 7.0
    outlook = (so_far + weight) / (usual + weight)
    assert told["pv_outlook"] == pytest.approx(outlook, rel=1e-4)
    assert told["pv_recent"] == pytest.approx(3.0 / 7.0, rel=1e-4)
    # The rest of Sunday and half of Monday, the only weekday: 5 kW. PV as the outlook says.
    ahead_kw = np.where(np.arange(1, 97) < 49, outlook * 7.0 - 3.5, outlook * 7.0 - 5.0)
    surplus_kwh = np.maximum(ahead_kw, 0.0).sum() / 4
    deficit_kwh = np.maximum(-ahead_kw, 0.0).sum() / 4
    assert told["surplus_ahead"] == pytest.approx(surplus_kwh, abs=1e-3)
    assert told["deficit_ahead"] == pytest.approx(deficit_kwh, abs=1e-3)


def test_a_day_begins_with_a_little_of_the_day_before() -> None:
    """Yesterday had 3 kW instead of 7: three tenths of that until the sun has shown itself."""
    site = by_hand()
    seen, _ = observations(site, np.array([192]), 1, rbc_b)
    prior, weight = 1.0 + 0.3 * (3.0 / 7.0 - 1.0), 0.1 * 96 * 7.0
    outlook = (11.0 + weight * prior) / (7.0 + weight)
    assert in_units(site, seen[0, 0])["pv_outlook"] == pytest.approx(outlook, rel=1e-4)


@pytest.mark.parametrize("step_minutes", [5, 60])
def test_hours_ahead_are_hours_whatever_a_step_is(step_minutes: int) -> None:
    """From noon on the intensity is 0.6 instead of 0.3, every day; load 2 kW, PV 3."""
    n = 60 // step_minutes
    carbon = np.where(np.arange(24 * n) < 12 * n, 0.3, 0.6)
    days = np.array([[1.0], [0.8], [1.2]])
    row: Row = (0, 0, 9 * n, 13 * n, 8.0, 4.0)
    site = small_site(
        days=3,
        step_minutes=step_minutes,
        sessions=[row],
        pv_kw=3.0 * days,
        load_kw=2.0,
        carbon=carbon,
    )
    seen, _ = observations(site, np.array([0]), 11 * n, anything(1))
    told = in_units(site, seen[10 * n, 0])
    # At ten: the next hour ends within the hour before noon, three hours reach one step beyond.
    assert told["carbon_next_hour"] == pytest.approx(0.0, abs=1e-6)
    assert told["carbon_next_3_h"] == pytest.approx(0.3 * (n + 1) / (3 * n), abs=1e-6)
    assert told["carbon_next_6_h"] == pytest.approx(0.3 * (4 * n + 1) / (6 * n), abs=1e-6)
    assert told["carbon_peak_ahead"] == pytest.approx(0.3, abs=1e-6)
    assert told["surplus_ahead"] == pytest.approx(24.0, rel=1e-4)


@pytest.mark.parametrize("name", ["iquitos", "caltech-2019", "citylearn-5"])
def test_the_rule_in_the_observation_is_the_rule(name: str) -> None:
    site = site_of(name)
    seen, own = observations(site, site.day_bounds[:-2:12], site.steps(24.0), rbc_b)
    for column, feature in enumerate(RULE_FEATURES):
        part = (site.sockets, site.battery)[column]
        expected = own[..., column] if part else torch.zeros_like(own[..., column])
        torch.testing.assert_close(seen[..., feature], expected, atol=1e-5, rtol=0.0)


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
    assert seen[:, list(RULE_FEATURES)].abs().max() <= 1.0
    free = mixed(site_of(name), high=1e6)
    for i in PLAIN:
        clipped = (free[:, i].abs() > HIGHEST + 1e-4).float().mean().item()
        assert clipped <= 1e-3, f"{NAMES[i]}: {clipped:.2%} of the steps are clipped"
        spread = seen[:, i].std().item()
        assert spread < 1e-6 or 0.1 <= spread <= 3.0, f"{NAMES[i]}: {spread}"


def test_features_have_names_of_their_own_and_say_something() -> None:
    assert len(set(NAMES)) == len(NAMES) == 30
    spread = dict(zip(NAMES, mixed(shipped()).std(0).tolist(), strict=True))
    constant = [name for name, value in spread.items() if value < 0.1]
    assert constant == ["import_limit"]  # a connection that nobody dims


ABSENT = {
    "no battery": {"soc", "charge_limit", "discharge_limit", "rule_battery"},
    "no sockets": {"must", "could", "owed", "owed_2_h", "owed_5_h", "rule_ev"},
    "no PV": {"pv", "pv_recent", "pv_outlook", "surplus_ahead"},
    "no load": {"load", "deficit_ahead"},
    "constant, dirty": {name for name in NAMES if name.startswith("carbon")},
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_belongs_to_an_absent_part_is_0_and_nothing_else(name: str) -> None:
    seen = mixed(site_of(name))
    silent = {NAMES[i] for i in range(len(FEATURES)) if not seen[:, i].any()}
    assert silent == ABSENT[name] | {"import_limit"}


def test_a_site_of_a_single_day_can_be_observed() -> None:
    for site in (small_site(load_kw=3.0), small_site(days=3, pv_kw=5.0, held_out=[1, 2])):
        seen, _ = observations(site, np.array([0]), 96, anything())
        assert seen.isfinite().all()


def test_the_environment_tells_its_bounds() -> None:
    env = SiteDays(shipped(), 2)
    assert env.observer.high[PLAIN].tolist() == [[HIGHEST]] * len(PLAIN)
    assert env.observer.high[list(RULE_FEATURES)].tolist() == [[1.0], [1.0]]
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
    # The day after a week begins with what the week's last one was like.
    later = later[~np.isin(later, np.concatenate([np.arange(e - 96, e) for e in weeks[:, 1]]))]
    other = changed(site, later, rng.uniform(0.0, 2.0, len(later)))
    rows = site.sessions
    known = np.ones(len(rows.socket), dtype=bool)
    for begin, end in weeks:
        known &= ~((rows.arrival > begin + now) & (rows.departure < end - 96))
    columns = (getattr(rows, field.name)[known] for field in dataclasses.fields(Sessions))
    other = dataclasses.replace(other, sessions=Sessions(*columns))
    seen, _ = observations(site, weeks[:, 0], 260, anything())
    otherwise, _ = observations(other, weeks[:, 0], 260, anything())
    torch.testing.assert_close(seen[: now + 1], otherwise[: now + 1], atol=1e-5, rtol=0.0)
    assert (seen[now + 1 :] - otherwise[now + 1 :]).abs().max() > 0.1


@pytest.mark.parametrize("factor", [0.0, 1e6])
@pytest.mark.parametrize("name", ["iquitos", "citylearn-5"])
def test_held_out_days_teach_nothing(name: str, factor: float) -> None:
    """They may be anything: what is observed on other days is the same, but for the day after."""
    site = site_of(name)
    poisoned = [np.arange(*site.day_bounds[[last - 4, last - 1]]) for _, last in site.stretches]
    other = changed(site, np.concatenate(poisoned), factor, shift=factor)
    places, steps = site.day_bounds[site.training_days][::3], site.steps(23.0)
    seen, own = observations(site, places, steps, rbc_b)
    otherwise, actions = observations(other, places, steps, rbc_b)
    torch.testing.assert_close(seen, otherwise, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(own, actions, atol=1e-5, rtol=0.0)
    # Nor on the first days of the held-out weeks themselves.
    seen, otherwise = (
        observations(one, site.stretch_bounds[:, 0], site.steps(48.0), RULES["uncontrolled"])[0]
        for one in (site, other)
    )
    torch.testing.assert_close(seen, otherwise, atol=1e-5, rtol=0.0)
