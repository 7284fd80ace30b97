"""The rules against the independent figures of a year on the shipped sites."""

import functools

import pytest
import torch

from co2lightning.control.rules import RULES, Rule, rbc_a, rbc_b, uncontrolled
from co2lightning.control.state import SiteModel, State, begin_day
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import evaluation_soc, run_days
from co2lightning.site.model import STEP_H
from small_site import Row, shipped, small_site


def solar_only(model: SiteModel, state: State) -> torch.Tensor:
    """Charge vehicles as RBC B does, leave the battery idle."""
    return rbc_b(model, state) * torch.tensor([1.0, 0.0])


# Mean kg of 365 days from two models written independently of this one, and how far another
# random draw of the year may lie.
FIGURES = [
    ("iquitos", uncontrolled, 557.0, 0.05),
    ("iquitos", solar_only, 430.0, 0.05),
    ("iquitos", rbc_a, 303.0, 0.05),
    ("iquitos", rbc_b, 192.0, 0.10),
    ("iquitos-flat", uncontrolled, 552.0, 0.05),
    ("iquitos-flat", solar_only, 402.0, 0.05),
    ("iquitos-flat", rbc_a, 311.0, 0.05),
    ("iquitos-flat", rbc_b, 192.0, 0.10),
]


@functools.cache
def model_of(name: str) -> SiteModel:
    return priced_model(shipped(name))


@pytest.mark.parametrize(("name", "rule", "expected_kg", "tolerance"), FIGURES)
def test_a_year_of_a_rule(name: str, rule: Rule, expected_kg: float, tolerance: float) -> None:
    site, model = shipped(name), model_of(name)
    trace = run_days(model, rule, torch.arange(len(site.days)), evaluation_soc(site))
    assert trace.total("co2_kg").mean().item() == pytest.approx(expected_kg, rel=tolerance)
    assert trace.total("unmet_kwh").max().item() < 1e-6
    # Everybody gets what they asked for.
    energy_kwh = site.sessions.energy_kwh.sum()
    assert trace.total("ev_kw").sum().item() * STEP_H == pytest.approx(energy_kwh, rel=1e-5)


def test_solar_following_charges_at_surplus_between_must_and_could() -> None:
    """Must 1.6, could 4 kW; surpluses of -2, 1, 3 and 9 kW."""
    row: list[Row] = [(day, 0, 0, 4, 3.4, 4.0) for day in range(4)]
    pv_kw = [[3.0], [6.0], [8.0], [14.0]]
    model = priced_model(small_site(days=4, sessions=row, pv_kw=pv_kw, load_kw=5.0))
    state = begin_day(model, torch.arange(4), torch.full((4,), 0.5))
    action = rbc_b(model, state)
    share = (torch.tensor([1.6, 1.6, 3.0, 4.0]) - 1.6) / 2.4
    torch.testing.assert_close(action[:, 0], 2.0 * share - 1.0)
    # The battery of 10 kW serves what is missing and stores what is left.
    left_kw = torch.tensor([-3.6, -0.6, 0.0, 5.0])
    torch.testing.assert_close(action[:, 1], left_kw / 10.0)


def test_a_rule_runs_on_no_vehicles_and_stays_within_bounds() -> None:
    model = priced_model(small_site(pv_kw=300.0))
    for rule in RULES.values():
        state = begin_day(model, torch.tensor([0]), torch.tensor([0.5]))
        action = rule(model, state)
        assert action.isfinite().all()
        assert (action.abs() <= 1.0).all()


def test_uncontrolled_leaves_the_battery_alone() -> None:
    model = model_of("iquitos")
    trace = run_days(model, uncontrolled, torch.tensor([3]), torch.tensor([0.5]))
    assert all(flow.battery_kw.item() == 0.0 for flow in trace.flows)
    assert len(trace.flows) == 96
