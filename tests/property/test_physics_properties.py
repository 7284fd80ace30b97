"""What holds on any site, in any step, for any actions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from co2lightning.control.moves import ACTIONS
from co2lightning.control.rules import RULES, Rule, uncontrolled
from co2lightning.control.state import SiteModel, State
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import run, start
from co2lightning.site.model import Site
from small_site import Played, by_hand, play, random_site, shipped

FIGURES = (
    *("ev_kw", "battery_kw", "grid_kw", "grid_import_kw", "curtailed_kwh", "unmet_kwh"),
    *("co2_kg", "reward", "socket_kw"),
)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=6, deadline=None, derandomize=True)
several = settings(max_examples=12, deadline=None, derandomize=True)

# What a site has, and what of it is out of the ordinary.
EQUIPMENT: dict[str, dict[str, Any]] = {
    "all parts": {},
    "no battery": {"capacity_kwh": None},
    "no sockets": {"sockets": 0},
    "no PV": {"pv": 0.0},
    "no load": {"load": 0.0},
    "battery alone": {"sockets": 0, "pv": 0.0, "load": 0.0},
    "vehicles alone": {"capacity_kwh": None, "pv": 0.0, "load": 0.0},
    "net meter": {"pv": 0.0, "load": -1.0},
    "1 socket": {"sockets": 1},
    "10 MWh": {"capacity_kwh": 10_000.0, "power_kw": 2_500.0},
    "1 kWh": {"capacity_kwh": 1.0},
    "least power": {"min_kw": 0.9},
    "surplus only": {"may_charge_from_grid": False},
    "kept for outages": {"reserve_soc": 0.45},
}


@st.composite
def sites(draw: st.DrawFn, most: float = 0.98) -> Site:
    """Any site of a day (5 minutes) or two, with a connection that is wide, short or dimmed."""
    seed, equipment = draw(seeds), EQUIPMENT[draw(st.sampled_from(sorted(EQUIPMENT)))]
    step_minutes = draw(st.sampled_from([5, 15, 60]))
    days = 1 if step_minutes == 5 else 2
    limit_kw: Any = draw(st.sampled_from([1e6, 12.0, 6.0]))
    if draw(st.booleans()):
        shape = (days, 24 * 60 // step_minutes)
        limit_kw = np.random.default_rng(seed).uniform(0.2, 2.0, shape) * limit_kw
    given = {"sockets": draw(st.integers(2, 9)), "most": most, "import_limit_kw": limit_kw}
    return random_site(seed, days=days, step_minutes=step_minutes, **(given | equipment))


widths = st.sampled_from(sorted(ACTIONS.values()))


def random_actions(site: Site, seed: int, batch: int = 1, width: int = 2) -> Tensor:
    """Actions [P, B, A]: in between, at the ends, and beyond them."""
    rng = np.random.default_rng(seed)
    shape = (site.n_steps, batch, width)
    actions = rng.uniform(-1.2, 1.2, shape)
    extreme = rng.random(shape) < 0.3
    return torch.tensor(np.where(extreme, np.sign(actions), actions), dtype=torch.float32)


def constant(site: Site, action_ev: float, action_battery: float) -> Tensor:
    return torch.tensor([action_ev, action_battery]).expand(site.n_steps, 1, 2)


def column(played: list[Any], name: str) -> np.ndarray:
    """Return a field of all steps [P] of a single run, or [P, C]."""
    return np.stack([getattr(one, name)[0].double().numpy() for one in played])


def check_balance(site: Site, run: Played) -> None:
    """Hold every step against its meter, its battery, its vehicles and its connection."""
    battery, h = site.battery, site.step_h
    given_kw, must_kw, could_kw = (
        column(run.flows, "socket_kw"),
        column(run.states, "must_kw"),
        column(run.states, "could_kw"),
    )
    ev_kw, battery_kw, grid_kw = (run.figures(f"{name}_kw") for name in ("ev", "battery", "grid"))
    close = 1e-4 + 1e-6 * max(battery.power_kw if battery else 0.0, np.abs(ev_kw).max())
    net_kw = site.load_kw - site.pv_kw
    np.testing.assert_allclose(grid_kw, net_kw + given_kw.sum(1) + battery_kw, atol=close)
    np.testing.assert_allclose(ev_kw, given_kw.sum(1), atol=close)
    carbon_kg = np.maximum(grid_kw, 0.0) * h * site.carbon_kg_per_kwh
    np.testing.assert_allclose(run.figures("co2_kg"), carbon_kg, rtol=1e-5)
    assert (must_kw <= given_kw + 1e-6).all()
    assert (given_kw <= could_kw + 1e-6).all()
    soc = np.append(column(run.states, "soc")[0], run.figures("soc"))
    if battery:
        charged, given = np.maximum(battery_kw, 0.0), np.maximum(-battery_kw, 0.0)
        stored_kwh = h * (
            charged * battery.charge_efficiency - given / battery.discharge_efficiency
        )
        near = 1e-4 + 1e-6 * battery.capacity_kwh
        np.testing.assert_allclose(np.diff(soc) * battery.capacity_kwh, stored_kwh, atol=near)
        assert (soc <= battery.soc_max + 1e-6).all()
        assert (soc >= min(battery.least_soc, soc[0]) - 1e-6).all()
        assert np.abs(battery_kw).max() <= battery.power_kw + 1e-5
        if not battery.may_charge_from_grid:
            surplus_kw = np.maximum(-(net_kw + ev_kw), 0.0)
            assert (battery_kw <= surplus_kw + close).all()
    else:
        assert not battery_kw.any()
        assert not soc.any()
    # Nothing but the load and what must be charged can overload the connection, and only when the
    # battery gives all it has. Charging it yields first.
    over = grid_kw > site.import_limit_kw + close
    least_kw = column(run.states, "battery_min_kw")
    np.testing.assert_allclose(battery_kw[over], least_kw[over], atol=close)
    np.testing.assert_allclose(ev_kw[over], must_kw.sum(1)[over], atol=close)
    short = (battery_kw > close) & (grid_kw > 0.0)
    assert (grid_kw[short] <= site.import_limit_kw[short] + close).all()


@several
@given(site=sites(), seed=seeds, soc=st.floats(0.05, 0.9), width=widths)
def test_every_step_balances_and_stays_within_bounds(
    site: Site, seed: int, soc: float, width: int
) -> None:
    check_balance(site, play(site, random_actions(site, seed, width=width), soc, torch.float32))


@pytest.mark.parametrize("width", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("equipment", sorted(EQUIPMENT))
def test_every_step_balances_whatever_is_there(equipment: str, width: int) -> None:
    parts = {"sockets": 4, "grid_kw": 9.0} | EQUIPMENT[equipment]
    site = random_site(7, step_minutes=60, days=3, **parts)
    actions = random_actions(site, 1, width=width)
    check_balance(site, play(site, actions, 0.5, torch.float32))


def test_every_step_balances_with_a_thousand_sockets() -> None:
    site = random_site(1, step_minutes=60, sockets=1000, grid_kw=900.0)
    run = play(site, random_actions(site, 1), 0.5, torch.float32)
    check_balance(site, run)
    check_order(site, run)
    assert run.figures("unmet_kwh").sum() < 1e-3


def check_order(site: Site, run: Played) -> None:
    """No vehicle gets more than it must while one with less laxity goes without."""
    for state, flow in zip(run.states, run.flows, strict=True):
        extra = (flow.socket_kw - state.must_kw)[0]
        more = (state.could_kw - flow.socket_kw)[0]
        laxity = state.laxity[0]
        waits = torch.where(more > 1e-4, laxity, torch.inf).min()
        assert not ((extra > 1e-4) & (laxity > waits + 1e-3)).any()


@several
@given(seed=seeds, sockets=st.integers(2, 20), step_minutes=st.sampled_from([5, 15, 60]))
def test_no_vehicle_goes_before_one_with_less_laxity(
    seed: int, sockets: int, step_minutes: int
) -> None:
    site = random_site(seed, sockets=sockets, step_minutes=step_minutes)
    check_order(site, play(site, random_actions(site, seed), dtype=torch.float32))


@several
@given(site=sites(most=1.3), seed=seeds, width=widths)
def test_no_policy_leaves_more_unserved_than_charging_on_arrival(
    site: Site, seed: int, width: int
) -> None:
    """Some sites ask for more than a window allows: that much is missing under every policy."""
    own = play(site, random_actions(site, seed, width=width), dtype=torch.float32)
    idle = dataclasses.replace(site, import_limit_kw=np.full(site.n_steps, 1e6))
    on_arrival = play(idle, constant(site, 1.0, 0.0), dtype=torch.float32)
    unmet, unavoidable = (run.figures("unmet_kwh") for run in (own, on_arrival))
    np.testing.assert_allclose(unmet, unavoidable, atol=1e-4, rtol=0.0)
    rows = site.sessions
    possible = rows.max_kw * site.step_h * (rows.departure - rows.arrival)
    expected = np.maximum(rows.energy_kwh - possible, 0.0).sum()
    assert unmet.sum() == pytest.approx(expected, abs=1e-3)


@several
@given(
    seed=seeds,
    min_kw=st.floats(0.1, 3.0),
    step_minutes=st.sampled_from([5, 15, 60]),
    budget=st.floats(0.0, 1.0),
)
def test_a_plug_gives_nothing_or_its_least_power(
    seed: int, min_kw: float, step_minutes: int, budget: float
) -> None:
    """Or, for part of a step, what is owed; and never more than the budget beyond what must be."""
    site = random_site(seed, step_minutes=step_minutes, min_kw=min_kw, pv=0.0)
    run = play(site, constant(site, 2.0 * budget - 1.0, 0.0), dtype=torch.float32)
    given_kw, could_kw = column(run.flows, "socket_kw"), column(run.states, "could_kw")
    least_kw = np.minimum(could_kw, min_kw)
    assert ((given_kw <= 1e-6) | (given_kw >= least_kw - 1e-5)).all()
    must_kw = column(run.states, "must_kw").sum(1)
    wish_kw = must_kw + budget * (could_kw.sum(1) - must_kw)
    assert (run.figures("ev_kw") <= wish_kw + 1e-4).all()
    assert run.figures("unmet_kwh").sum() < 1e-3
    np.testing.assert_allclose(run.figures("ev_kw"), given_kw.sum(1), atol=1e-5)


@few
@given(seed=seeds, sockets=st.integers(1, 9), action_ev=st.floats(-1.0, 1.0))
def test_without_sun_and_battery_co2_is_intensity_times_energy(
    seed: int, sockets: int, action_ev: float
) -> None:
    site = random_site(seed, sockets=sockets, pv=0.0, flat=True, capacity_kwh=None, step_minutes=60)
    run = play(site, constant(site, action_ev, 0.0), dtype=torch.float32)
    energy_kwh = site.load_kw.sum() + site.sessions.energy_kwh.sum()
    assert run.figures("co2_kg").sum() == pytest.approx(0.5 * energy_kwh, rel=1e-5)


@several
@given(site=sites(most=1.1), seed=seeds, soc=st.floats(0.05, 0.95))
def test_float32_agrees_with_steps_worked_out_by_hand(site: Site, seed: int, soc: float) -> None:
    soc_start = float(np.float32(soc)) if site.battery else 0.0
    actions = random_actions(site, seed)
    expected = by_hand(site, 0, soc_start, actions[:, 0].double().clamp(-1.0, 1.0).numpy())
    single, exact = play(site, actions, soc_start, torch.float32), play(site, actions, soc_start)
    size = 1.0 + 1e-3 * (site.battery.power_kw if site.battery else 0.0)
    for name, values in expected.items():
        own, double = (column_of(one, name) for one in (single, exact))
        np.testing.assert_allclose(double, values, atol=1e-4, rtol=0.0, err_msg=name)
        np.testing.assert_allclose(own, values, atol=2e-3 * size, rtol=0.0, err_msg=name)
    kg = expected["co2_kg"].sum()
    assert single.figures("co2_kg").sum() == pytest.approx(kg, rel=1e-4, abs=1e-4)


def column_of(run: Played, name: str) -> np.ndarray:
    return np.array([value[0].double().numpy() for value in run.each(name)])


@settings(few, max_examples=4)
@given(site=sites(), seed=seeds, batch=st.integers(2, 3))
def test_a_single_run_is_a_row_of_the_batch(site: Site, seed: int, batch: int) -> None:
    actions = random_actions(site, seed, batch)
    together = play(site, actions, dtype=torch.float32)
    for row in range(batch):
        alone = play(site, actions[:, row : row + 1], dtype=torch.float32)
        for name in FIGURES:
            many, one = torch.stack(together.each(name)), torch.stack(alone.each(name))
            assert torch.equal(many[:, row], one[:, 0]), name


def recorded(rule: Rule) -> tuple[list[Tensor], Rule]:
    """Return a rule and the list that its actions go to."""
    actions: list[Tensor] = []

    def act(model: SiteModel, state: State) -> Tensor:
        actions.append(rule(model, state))
        return actions[-1]

    return actions, act


@pytest.mark.parametrize("name", RULES)
def test_two_days_of_the_shipped_site_worked_out_by_hand(name: str) -> None:
    """128 sockets, where vehicles that tie to the last bit may swap."""
    site = shipped()
    model, places, soc = priced_model(site), site.day_bounds[[5, 200]], torch.tensor([0.4, 0.65])
    steps = site.steps(36.0)
    actions, rule = recorded(RULES[name])
    trace, _ = run(model, rule, start(model, site, places, soc), steps)
    for row, place in enumerate(places.tolist()):
        assert site.owed_on_arrival_kwh(place).sum() > 10.0, "nobody stands there"
        own = torch.stack(actions)[:, row].double().numpy()
        expected = by_hand(site, place, float(soc[row]), own)
        imported_kwh = trace.grid_kw[:, row].relu().sum().item() * site.step_h
        expected_kwh = expected["grid_import_kw"].sum() * site.step_h
        assert imported_kwh == pytest.approx(expected_kwh, rel=2e-4)
        kg = trace.co2_kg[:, row].sum().item()
        assert kg == pytest.approx(expected["co2_kg"].sum(), rel=2e-4)
        assert expected["unmet_kwh"].sum() == pytest.approx(0.0, abs=1e-9)


def test_random_policies_leave_nothing_unserved_on_the_shipped_site() -> None:
    site = shipped()
    model = priced_model(site)
    generator = torch.Generator().manual_seed(0)

    def anything(model: object, state: State) -> Tensor:
        return 2.0 * torch.rand(len(state.soc), 2, generator=generator) - 1.0

    places = site.day_bounds[:-2:12]
    for policy in (anything, lambda model, state: anything(model, state).sign(), uncontrolled):
        trace, _ = run(model, policy, start(model, site, places, 0.5), site.steps(48.0))
        assert trace.unmet_kw.sum(0).max().item() * site.step_h < 1e-4
