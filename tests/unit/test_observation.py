"""The observation: within bounds, right in a case worked by hand, and blind to the future."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from co2lightning.control.observation import FEATURES, RULE_FEATURES, build_observer, observe
from co2lightning.control.rules import rbc_b
from co2lightning.control.state import begin_day, build_model
from co2lightning.sim.physics import step
from co2lightning.site.model import Sessions, Site, T
from small_site import H, Row, shipped, small_site

NAMES = [feature.name for feature in FEATURES]


def observations(site: Site, days: Tensor, actions: Tensor, soc_start: float = 0.5) -> Tensor:
    """Return the observations [T, B, O] of days that actions [T, B, 2] make."""
    model, observer = build_model(site), build_observer(site)
    state = begin_day(model, days, torch.full((len(days),), soc_start))
    seen: list[Tensor] = []
    for action in actions:
        seen.append(observe(observer, model, state))
        state, _ = step(model, state, action)
    return torch.stack(seen)


def some_actions(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(T, batch, 2, generator=generator) * 2.0 - 1.0


def test_features_have_names_of_their_own_and_lie_within_their_bounds() -> None:
    assert len(set(NAMES)) == len(NAMES) == 29
    days = torch.arange(0, 365, 20)
    obs = observations(shipped(), days, some_actions(len(days)))
    assert obs.shape == (T, len(days), 29)
    assert obs.dtype == torch.float32
    assert obs.isfinite().all()
    for i, feature in enumerate(FEATURES):
        column = obs[..., i]
        assert column.min() >= feature.low, feature.name
        assert column.max() <= feature.high, feature.name
        assert column.std() > 0.01, f"{feature.name} says nothing"
        at_bounds = ((column == feature.low) | (column == feature.high)).float().mean()
        within = feature.name.startswith(("rule", "owed", "charge", "discharge", "must", "could"))
        assert within or at_bounds < 0.6, f"{feature.name} is mostly cut off"


def test_the_state_worked_by_hand() -> None:
    """Power scale 8 kW (two sockets of 4), energy scale 16 kWh."""
    rows: list[Row] = [(0, 0, 0, 20, 2.0, 4.0), (0, 1, 0, 3, 2.6, 4.0)]
    site = small_site(
        sockets=2, sessions=rows, pv_kw=7.0, load_kw=4.0, power_kw=6.0, capacity_kwh=40.0
    )
    obs = observations(site, torch.tensor([0]), torch.zeros(T, 1, 2))[0, 0]
    seen = dict(zip(NAMES, obs.tolist(), strict=True))
    # Laxities 20 - 2 = 18 and 3 - 2.6 = 0.4 steps; the second vehicle must take 0.6 * 4 kW.
    expected = {
        "soc": 0.5,
        "soc_gain": 0.0,
        "charge_limit": 6.0 / 8.0,
        "discharge_limit": 6.0 / 8.0,
        "must": 2.4 / 8.0,
        "could": 8.0 / 8.0,
        "surplus": (7.0 - 4.0 - 2.4) / 8.0,
        "owed": 4.6 / 16.0,
        "owed_2_h": 2.6 * (1 - 0.4 / 8) / 16.0,
        "owed_5_h": (2.0 * (1 - 18 / 20) + 2.6 * (1 - 0.4 / 20)) / 16.0,
        "rule_ev": 2.0 * (3.0 - 2.4) / (8.0 - 2.4) - 1.0,
        "rule_battery": 0.0,
        "pv": 7.0 / 8.0,
        "load": 4.0 / 8.0,
        # The rest of the day: 95 steps of 3 kW.
        "surplus_ahead": 95 * 3.0 * H / 16.0,
        "deficit_ahead": 0.0,
        "spare_surplus": (95 * 3.0 * H - 4.6 - 0.4 * 40.0 / 0.9) / 16.0,
        "spare_store": (0.4 * 40.0 * 0.8 - 4.6) / 16.0,
        "pv_recent": 1.0,
        "pv_outlook": 1.0,
        "carbon": 0.0,
        "carbon_peak_ahead": 0.0,
    }
    for name, value in expected.items():
        assert seen[name] == pytest.approx(value, abs=1e-5), name


def test_the_rule_in_the_observation_is_the_rule() -> None:
    site = shipped()
    model, observer = build_model(site), build_observer(site)
    days = torch.arange(0, 365, 10)
    state = begin_day(model, days, torch.full((len(days),), 0.5))
    for action in some_actions(len(days)):
        obs = observe(observer, model, state)
        rule = rbc_b(model, state)
        torch.testing.assert_close(obs[:, list(RULE_FEATURES)], rule, atol=1e-5, rtol=0.0)
        state, _ = step(model, state, action)


@pytest.mark.parametrize("now", [0, 30, 47, 70, 95])
def test_what_comes_later_is_not_seen(now: int) -> None:
    """Another future of a held-out day: series after `now`, sessions that arrive after it."""
    site = shipped()
    rng = np.random.default_rng(now)
    days = site.held_out_days[[3, 20, 41]]
    series = {}
    for name in ("pv_kw", "load_kw", "carbon_kg_per_kwh"):
        values = getattr(site, name).copy()
        values[days, now + 1 :] *= rng.uniform(0.0, 2.0, (len(days), T - 1 - now))
        series[name] = values
    rows = site.sessions
    known = ~np.isin(rows.day, days) | (rows.arrival_step <= now)
    columns = (getattr(rows, field.name)[known] for field in dataclasses.fields(Sessions))
    other = dataclasses.replace(site, **series, sessions=Sessions(*columns))
    actions = some_actions(len(days))
    seen = observations(site, torch.as_tensor(days), actions)
    otherwise = observations(other, torch.as_tensor(days), actions)
    assert torch.equal(seen[: now + 1], otherwise[: now + 1])
    if now < 90:
        assert not torch.equal(seen, otherwise)


def test_held_out_days_teach_nothing_but_yesterday() -> None:
    """Other held-out days are replaced; only the day before one's own may matter."""
    site = shipped()
    day = int(site.held_out_days[10])
    others = np.setdiff1d(site.held_out_days, [day])
    assert day - 1 not in others
    series = {}
    for name in ("pv_kw", "load_kw", "carbon_kg_per_kwh"):
        values = getattr(site, name).copy()
        values[others] *= 1.7
        series[name] = values
    other = dataclasses.replace(site, **series)
    actions = some_actions(1)
    seen = observations(site, torch.tensor([day]), actions)
    assert torch.equal(seen, observations(other, torch.tensor([day]), actions))


def test_a_site_without_sun_and_one_of_a_single_day_can_be_observed() -> None:
    for site in (small_site(load_kw=3.0), small_site(days=3, pv_kw=5.0, held_out=[1, 2])):
        obs = observations(site, torch.tensor([0]), torch.zeros(T, 1, 2))
        assert obs.isfinite().all()


def test_float64_agrees_with_float32() -> None:
    site = shipped()
    single = observe(build_observer(site), *_midnight(site, torch.float32))
    double = observe(build_observer(site, dtype=torch.float64), *_midnight(site, torch.float64))
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0.0)


def _midnight(site: Site, dtype: torch.dtype):
    model = build_model(site, dtype=dtype)
    return model, begin_day(model, torch.tensor([4, 90]), torch.tensor([0.5, 0.3], dtype=dtype))
