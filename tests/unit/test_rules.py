"""The rules: against independent figures of the shipped sites, and worked by hand."""

import functools

import numpy as np
import pytest
import torch

from co2lightning.control.rules import RULES, Rule, rbc_a, rbc_b, uncontrolled
from co2lightning.control.state import SiteModel, State, build_model
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import play, run, start, through
from co2lightning.site.model import Site
from small_site import Row, begin, random_site, shipped, small_site


def solar_only(model: SiteModel, state: State) -> torch.Tensor:
    """Charge vehicles as RBC B does, leave the battery idle."""
    return rbc_b(model, state) * torch.tensor([1.0, 0.0])


# Mean kg a day of a year from two models written independently of this one, and how far another
# random draw of the year may lie. They played days that stand alone, which without a battery is
# the same.
YEAR = [
    ("iquitos", uncontrolled, 557.0),
    ("iquitos", solar_only, 430.0),
    ("iquitos-flat", uncontrolled, 552.0),
    ("iquitos-flat", solar_only, 402.0),
]
# Of the held-out weeks, from a model written independently of this one, in time that goes on;
# what the weeks leave undone is settled in them, a few tenths of a kilogram.
WEEKS = [("uncontrolled", 557.2), ("rbc_a", 284.5), ("rbc_b", 182.2)]


@functools.cache
def model_of(name: str) -> SiteModel:
    return priced_model(shipped(name))


@pytest.mark.parametrize(("name", "rule", "expected_kg"), YEAR)
def test_a_year_of_a_rule(name: str, rule: Rule, expected_kg: float) -> None:
    site = shipped(name)
    course = through(site, rule)
    days = site.n_steps * site.step_h / 24.0
    assert course.co2_kg.sum() / days == pytest.approx(expected_kg, rel=0.05)
    assert course.unmet_kw.max() * site.step_h < 1e-6
    # Everybody gets what they asked for.
    energy_kwh = site.sessions.energy_kwh.sum()
    assert course.ev_kw.sum() * site.step_h == pytest.approx(energy_kwh, rel=1e-5)


@pytest.mark.parametrize(("rule", "expected_kg"), WEEKS)
def test_the_held_out_weeks_of_a_rule(rule: str, expected_kg: float) -> None:
    site = shipped()
    weeks = play(model_of("iquitos"), RULES[rule], site, site.stretch_bounds)
    kg = sum(week.schedule.co2_kg.sum() for week in weeks)
    assert kg / (7 * len(weeks)) == pytest.approx(expected_kg, rel=0.01)
    assert max(week.schedule.unmet_kwh.max() for week in weeks) < 1e-6


def test_solar_following_charges_at_surplus_between_must_and_could() -> None:
    """Must 1.6, could 4 kW; surpluses of -2, 1, 3 and 9 kW."""
    row: list[Row] = [(day, 0, 0, 4, 3.4, 4.0) for day in range(4)]
    pv_kw = [[3.0], [6.0], [8.0], [14.0]]
    site = small_site(days=4, sessions=row, pv_kw=pv_kw, load_kw=5.0)
    model = priced_model(site)
    states, _ = states_at(model, site, site.day_bounds[:-1])
    action = rbc_b(model, states)
    share = (torch.tensor([1.6, 1.6, 3.0, 4.0]) - 1.6) / 2.4
    torch.testing.assert_close(action[:, 0], 2.0 * share - 1.0)
    # The battery of 10 kW serves what is missing and stores what is left.
    left_kw = torch.tensor([-3.6, -0.6, 0.0, 5.0])
    torch.testing.assert_close(action[:, 1], left_kw / 10.0)


def states_at(model: SiteModel, site: Site, places: np.ndarray) -> tuple[State, State]:
    """Return the states at places, and after a step of RBC B."""
    seen: list[State] = []

    def watched(model: SiteModel, state: State) -> torch.Tensor:
        seen.append(state)
        return rbc_b(model, state)

    run(model, watched, start(model, site, places, 0.5), 2)
    return seen[0], seen[1]


def test_solar_following_keeps_to_a_plugs_least_power() -> None:
    """A surplus of 1 kW is too little for a plug that gives 1.5: the battery takes all of it."""
    row: Row = (0, 0, 0, 40, 9.0, 4.0)
    site = small_site(sessions=[row], pv_kw=1.0, min_kw=1.5)
    course = through(site, rbc_b)
    np.testing.assert_allclose(course.battery_kw[:30], 1.0, atol=1e-6)
    assert not course.ev_kw[:30].any()
    # With 2 kW the vehicle takes them.
    course = through(small_site(sessions=[row], pv_kw=2.0, min_kw=1.5), rbc_b)
    np.testing.assert_allclose(course.ev_kw[:16], 2.0, atol=1e-6)
    np.testing.assert_allclose(course.battery_kw[:16], 0.0, atol=1e-6)


def test_without_sun_rbc_b_charges_what_must_be_charged_and_no_more() -> None:
    site = random_site(2, days=2, step_minutes=60, pv=0.0)
    must_kw: list[float] = []

    def watched(model: SiteModel, state: State) -> torch.Tensor:
        must_kw.append(state.must_total_kw.item())
        return rbc_b(model, state)

    model = priced_model(site)
    trace, _ = run(model, watched, start(model, site, np.array([0]), 0.5), 48)
    np.testing.assert_allclose(trace.ev_kw[:, 0], must_kw, atol=1e-5)
    assert max(must_kw) > 0.0


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"sockets": 0},
        {"capacity_kwh": None},
        {"pv": 0.0},
        {"sockets": 0, "pv": 0.0, "load": 0.0},
        {"min_kw": 1.0, "grid_kw": 6.0},
    ],
)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_runs_on_any_site_and_stays_within_bounds(name: str, parts: dict) -> None:
    site = random_site(5, step_minutes=60, **parts)
    model = priced_model(site)

    def watched(model: SiteModel, state: State) -> torch.Tensor:
        action = RULES[name](model, state)
        assert action.isfinite().all()
        assert (action.abs() <= 1.0).all()
        return action

    run(model, watched, start(model, site, np.array([0]), 0.0), site.n_steps)


def test_uncontrolled_leaves_the_battery_alone() -> None:
    model, site = model_of("iquitos"), shipped()
    trace, _ = run(model, uncontrolled, start(model, site, site.day_bounds[[3]], 0.5), 96)
    assert trace.battery_kw.shape == (96, 1)
    assert not trace.battery_kw.any()
    assert (trace.soc == 0.5).all()


def test_rbc_a_stores_a_surplus_and_serves_a_deficit() -> None:
    """4 kW of surplus go in; 4 kW of vehicle beyond it come out."""
    site = small_site(sessions=[(0, 0, 0, 4, 3.4, 4.0)], pv_kw=4.0)
    model = build_model(site)
    assert rbc_a(model, begin(model)).tolist() == [[1.0, 0.0]]
    idle = build_model(small_site(pv_kw=4.0))
    torch.testing.assert_close(rbc_a(idle, begin(idle))[:, 1], torch.tensor([0.4]))
