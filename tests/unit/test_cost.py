"""What it costs: prices, objectives, and the bound that holds whatever their sign."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from co2lightning.control.outlook import outlook_of
from co2lightning.control.rules import Rule, rbc_b
from co2lightning.control.state import SiteModel, State
from co2lightning.sim.days import SiteDays
from co2lightning.sim.evaluate import RULE_NAMES, beside, evaluate, summarise, violations
from co2lightning.sim.mpc_stretches import play_mpc
from co2lightning.sim.optimum import optimum, tail_objective
from co2lightning.sim.schedule import through
from co2lightning.site.model import Objective, Site
from small_site import random_site, real, small_site

COST = Objective(co2=0.0, cost=1.0)
DAYS, MINUTES = 6, 60
SHAPE = (DAYS, 24)


def priced(seed: int, kind: str, objective: Objective = COST, **other: Any) -> Site:
    """A random site of some days with prices of a kind; two stretches, sessions across ends."""
    rng = np.random.default_rng(seed)
    price = rng.uniform(0.05, 0.5, SHAPE)
    prices: dict[str, tuple[object, object]] = {
        "as the sun shines": (price, None),
        "negative": (rng.uniform(-0.4, 0.4, SHAPE), None),
        "all negative": (-price, None),
        "zero": (0.0, 0.0),
        "constant": (0.3, 0.1),
        "credit is the price": (price, price),
        "credit below it": (price, price * rng.uniform(0.0, 1.0, SHAPE)),
        "both ways": (moved := price - 0.25, np.where(moved > 0, moved * 0.9, moved)),
        "rial": (40_000.0 * (price - 0.1), 40_000.0 * np.minimum(price - 0.1, 0.05)),
    }
    own, export = prices[kind]
    return random_site(
        seed,
        days=DAYS,
        step_minutes=MINUTES,
        sockets=3,
        held_out=(1, 3),
        price=own,
        export_price=export,
        objective=objective,
        **other,
    )


KINDS = (
    *("as the sun shines", "negative", "all negative", "zero", "constant"),
    *("credit is the price", "credit below it", "both ways", "rial"),
)
EQUIPMENT: tuple[dict[str, Any], ...] = (
    {},
    {"capacity_kwh": None},
    {"pv": 0.0},
    {"pv": 4.0},
    {"may_charge_from_grid": False},
    {"import_limit_kw": 9.0},
    {"load": -1.0, "pv": 0.0},
    {"min_kw": 0.9},
)


def wild(seed: int) -> Rule:
    """Random actions, or bang-bang, or one held."""
    generator = torch.Generator().manual_seed(seed)
    held = 2.0 * torch.rand(1, 2, generator=generator) - 1.0

    def policy(model: SiteModel, state: State) -> Tensor:
        action = 2.0 * torch.rand(len(state.soc), 2, generator=generator) - 1.0
        return (action, action.sign(), held.expand_as(action))[seed % 3]

    return policy


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(KINDS),
    st.sampled_from(range(len(EQUIPMENT))),
    st.sampled_from([COST, Objective(1.0, 0.2)]),
)
def test_no_policy_passes_the_bound_whatever_the_prices(
    seed: int, kind: str, part: int, objective: Objective
) -> None:
    """And everything that is told is a number."""
    found = evaluate(wild(seed), priced(seed, kind, objective, **EQUIPMENT[part]))
    assert violations(found) == []
    for name, figures in found.policies.items():
        assert all(np.isfinite(column).all() for column in figures), name
    for name, own in summarise(found).items():
        assert own.gap_closed is None or np.isfinite(own.gap_closed), name
    if "import_limit_kw" not in EQUIPMENT[part]:
        owed = found.policies["uncontrolled"].settlement
        assert owed == pytest.approx(0.0, abs=float(found.tolerance.max()))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.sampled_from(range(len(EQUIPMENT))))
def test_a_plan_there_is_whatever_the_prices(seed: int, kind: str, part: int) -> None:
    """Of what is expected it leaves nothing unserved that could be, and passes no bound."""
    site = priced(seed, kind, **EQUIPMENT[part])
    found = beside(evaluate(None, site), site, "mpc", play_mpc(site, jobs=1))
    assert violations(found) == []
    assert found.policies["mpc"].unmet_kwh.max() < 1e-3
    assert all(np.isfinite(column).all() for column in found.policies["mpc"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_rewards_are_of_order_one_and_numbers_whatever_the_prices(seed: int, kind: str) -> None:
    env = SiteDays(priced(seed, kind), 3)
    obs, earned = [env.reset(1)], []
    for _ in range(env.horizon):
        step = env.step(torch.rand(3, 2) * 2 - 1)
        obs.append(step.obs)
        earned.append(step.reward)
    assert torch.isfinite(torch.stack(obs)).all()
    assert torch.isfinite(torch.stack(earned)).all()
    assert torch.stack(earned).sum(0).abs().max() < 50.0
    figures = env.metrics()
    assert np.isfinite(list(figures.values())).all()
    assert {"site/cost", "site/uncontrolled_cost", "site/objective_vs_uncontrolled"} <= set(figures)


@pytest.mark.parametrize("factor", [0.5, 3.0, 1500.0])
def test_with_price_in_proportion_to_carbon_every_decision_stays(factor: float) -> None:
    site = random_site(3, days=DAYS, step_minutes=MINUTES, held_out=(1, 3))
    money = replace(site, price_per_kwh=factor * site.carbon_kg_per_kwh, objective=COST)
    of_co2, of_cost = evaluate(None, site), evaluate(None, money)
    for name in RULE_NAMES:
        for ours, theirs in zip(of_co2.schedules[name], of_cost.schedules[name], strict=True):
            np.testing.assert_array_equal(ours.battery_kw, theirs.battery_kw)
            np.testing.assert_array_equal(ours.ev_kw, theirs.ev_kw)
    for name, figures in of_co2.policies.items():
        own = of_cost.policies[name]
        np.testing.assert_allclose(own.settled, factor * figures.settled, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(own.cost, own.settled)
    a, b = (SiteDays(one, 2) for one in (site, money))
    torch.testing.assert_close(a.reset(5), b.reset(5), rtol=1e-4, atol=1e-5)
    for _ in range(24):
        action = torch.rand(2, 2) * 2 - 1
        ours, theirs = a.step(action), b.step(action)
        torch.testing.assert_close(ours.obs, theirs.obs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.reward, theirs.reward, rtol=1e-4, atol=1e-6)


def test_what_is_cheaper_is_so_in_any_currency() -> None:
    site = replace(real("caltech-2019"), provided={})
    money = replace(site, price_per_kwh=3.0 * site.carbon_kg_per_kwh, objective=COST)
    ours, theirs = outlook_of(site), outlook_of(money)
    assert torch.equal(ours.cheaper, theirs.cheaper)


def test_with_co2_as_the_objective_prices_change_nothing_but_what_it_costs() -> None:
    site = random_site(4, days=DAYS, step_minutes=MINUTES, held_out=(1, 3))
    priced_ = priced(4, "both ways", Objective())
    plain, other = evaluate(None, replace(priced_, price_per_kwh=None)), evaluate(None, priced_)
    for name, figures in plain.policies.items():
        for field in ("settled", "co2_kg", "grid_import_kwh", "curtailed_kwh"):
            ours, theirs = getattr(figures, field), getattr(other.policies[name], field)
            np.testing.assert_array_equal(ours, theirs)
    assert plain.currency is None
    assert other.currency == ""
    assert site.money_per_kwh.max() == 0.0


# --- by hand -------------------------------------------------------------------------------------


def hours(price: list[float], export: list[float] | None = None, **other: Any) -> Site:
    """A site of a day whose first hours have these prices, the rest the last of them."""

    def whole(values: list[float]) -> list[float]:
        return values + [values[-1]] * (24 - len(values))

    return small_site(
        step_minutes=60,
        price=whole(price),
        export_price=None if export is None else whole(export),
        objective=COST,
        **{"sockets": 0, "capacity_kwh": None, **other},
    )


def test_a_load_costs_its_price_and_a_surplus_earns_its_credit() -> None:
    site = hours([0.3], load_kw=2.0)
    assert optimum(site, 0, 4, 0.0, np.zeros(0)).settled == pytest.approx(24 * 2.0 * 0.3)
    sunny = hours([0.3], [0.1], pv_kw=5.0, load_kw=2.0)
    assert tail_objective(sunny, 20, 0.0, np.zeros(0)) == pytest.approx(-4 * 3.0 * 0.1)
    dumped = hours([0.3], [-0.1], pv_kw=5.0, load_kw=2.0)
    assert tail_objective(dumped, 20, 0.0, np.zeros(0)) == 0.0


def test_the_meter_counts_money_as_the_program_does() -> None:
    site = hours([0.3, 0.2, -0.1, 0.4], [0.1, 0.2, -0.2, 0.0], load_kw=2.0, pv_kw=[0, 5, 1, 6] * 6)
    course = through(site, rbc_b)
    of_hand = [0.3 * 2, -0.2 * 3, -0.1 * 1, 0.0]
    assert course.cost[:4] == pytest.approx(of_hand, abs=1e-6)
    best = optimum(site, 0, 24, 0.0, np.zeros(0))
    assert best.schedule.cost[:2] == pytest.approx(of_hand[:2])
    assert best.settled <= course.cost.sum() + 1e-6


def test_import_that_is_paid_for_is_what_the_site_can_use() -> None:
    """A load of 2 kW and a battery that may burn what it takes, but not more than it has."""
    own = {"load_kw": 2.0}
    assert tail_objective(hours([-0.1], **own), 20, 0.0, np.zeros(0)) == pytest.approx(-4 * 2 * 0.1)
    whole = {**own, "capacity_kwh": 10.0, "power_kw": 5.0, "grid_kw": 6.0}
    paid = tail_objective(hours([-0.1], **whole), 20, 1.0, np.zeros(0))
    assert -4 * 6.0 * 0.1 - 1e-9 <= paid < -4 * 2 * 0.1
    vehicle = hours([-0.1, 0.2], **own, sockets=1, sessions=[(0, 0, 0, 2, 3.0, 4.0)])
    assert optimum(vehicle, 0, 2, 0.0, np.array([3.0])).settled == pytest.approx(
        -0.1 * 5.0 + 0.2 * 2.0 * 23
    )


def test_a_battery_buys_low_and_sells_high_into_the_grid() -> None:
    """0.9 in, 0.8 out, from empty: 5 kWh bought at 0.1, 3.6 kWh sold at 0.4."""
    site = hours([0.1, 0.5, 0.5], [0.0, 0.4, 0.0], capacity_kwh=100.0, power_kw=5.0, carbon=0.4)
    assert optimum(site, 0, 3, 10.0, np.zeros(0)).settled == pytest.approx(0.5 - 3.6 * 0.4)
