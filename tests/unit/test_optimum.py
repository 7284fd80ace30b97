"""The optimum: days solved by hand, and the bound that nothing passes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from co2lightning.control.rules import RULES
from co2lightning.control.state import SiteModel, State
from co2lightning.sim.objective import priced_model
from co2lightning.sim.optimum import optimum
from co2lightning.sim.schedule import evaluation_soc, run_days
from co2lightning.site.model import Battery, Sessions, Site, SocketType, T
from small_site import shipped

Row = tuple[int, int, float, float]  # arrival step, departure step, kWh, kW


def one_day(
    *,
    pv_kw: object = 0.0,
    load_kw: object = 0.0,
    carbon: object = 0.5,
    sessions: Sequence[Row] = (),
    capacity_kwh: float = 100.0,
    power_kw: float = 50.0,
    efficiency: float = 0.9,
    grid_kw: float = 1e6,
) -> Site:
    """A site of one day; every session has a socket of its own."""
    columns = [np.array(column) for column in zip(*sessions, strict=True)] or [np.zeros(0)] * 4
    arrival, departure, energy_kwh, max_kw = columns
    count = len(sessions)

    def series(values: object) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, dtype=float), (1, T)).copy()

    return Site(
        name="hand",
        directory=Path("hand"),
        sha256="0" * 64,
        latitude=0.0,
        longitude=0.0,
        altitude_m=0.0,
        timezone="UTC",
        pv_kwp=100.0,
        grid_kw=grid_kw,
        charger_efficiency=0.9,
        seed=0,
        battery=Battery(capacity_kwh, power_kw, efficiency, efficiency, 0.1, 0.9, 0.3, 0.7),
        sockets=(SocketType("moto", max(count, 1), 10.0),),
        days=("2025-01-01",),
        held_out=np.array([True]),
        pv_kw=series(pv_kw),
        load_kw=series(load_kw),
        carbon_kg_per_kwh=series(carbon),
        sessions=Sessions(
            np.zeros(count, dtype=np.int64),
            np.arange(count),
            arrival.astype(np.int64),
            departure.astype(np.int64),
            energy_kwh.astype(float),
            max_kw.astype(float),
        ),
        turned_away=np.zeros(1, dtype=np.int64),
        notes=(),
    )


def at(steps: slice, value: float, otherwise: float = 0.0) -> np.ndarray:
    """A series with `value` in some steps."""
    series = np.full(T, otherwise)
    series[steps] = value
    return series


def test_a_load_alone_is_its_own_optimum() -> None:
    best = optimum(one_day(load_kw=10.0), 0, 0.5)
    assert best.co2_kg.sum() == pytest.approx(10.0 * 24.0 * 0.5, abs=1e-9)
    assert best.grid_import_kw == pytest.approx(np.full(T, 10.0))
    # Discharging at 0.9 saves less than the missing energy costs at 1 / 0.9.
    assert best.battery_kw == pytest.approx(np.zeros(T), abs=1e-9)
    assert best.soc == pytest.approx(np.full(T, 0.5))


def test_a_vehicle_charges_in_the_cleanest_steps_of_its_window() -> None:
    carbon = at(slice(0, 20), 0.1, 0.6)  # cleaner still, but before the vehicle comes
    carbon[42], carbon[45], carbon[60] = 0.2, 0.3, 0.1  # the last one after it has left
    site = one_day(carbon=carbon, sessions=[(40, 50, 2.0, 4.0)], power_kw=1e-9)
    best = optimum(site, 0, 0.5)
    assert best.co2_kg.sum() == pytest.approx(1.0 * 0.2 + 1.0 * 0.3)
    assert best.ev_kw == pytest.approx(at(slice(42, 46, 3), 4.0))


def test_a_surplus_is_shifted_through_both_efficiencies() -> None:
    """20 kWh of surplus at noon, 20 kWh of load at night: 16.2 kWh of it arrive."""
    site = one_day(pv_kw=at(slice(48, 52), 20.0), load_kw=at(slice(80, 84), 20.0))
    best = optimum(site, 0, 0.5)
    assert best.co2_kg.sum() == pytest.approx((20.0 - 20.0 * 0.9 * 0.9) * 0.5)
    assert best.soc[51] - best.soc[47] == pytest.approx(20.0 * 0.9 / 100.0)
    assert best.soc[-1] == pytest.approx(0.5)
    assert best.curtailed_kwh.sum() == pytest.approx(0.0, abs=1e-9)


def test_a_full_battery_curtails() -> None:
    """Room for 40 kWh in the battery takes 44.4 kWh; 60 kWh are there and nobody wants them."""
    best = optimum(one_day(pv_kw=at(slice(48, 54), 40.0)), 0, 0.5)
    assert best.co2_kg.sum() == pytest.approx(0.0, abs=1e-9)
    assert best.curtailed_kwh.sum() == pytest.approx(60.0)  # a gain at midnight earns nothing
    assert best.soc.max() <= 0.9 + 1e-9


def test_energy_missing_at_midnight_is_paid_for() -> None:
    """In a peak the battery empties: 40 kWh less in store are 36 kWh less import, and a debt."""
    carbon = at(slice(92, 96), 1.9, 0.1)
    site = one_day(load_kw=at(slice(92, 96), 100.0), carbon=carbon, power_kw=100.0)
    mean = (4 * 1.9 + 92 * 0.1) / 96
    best = optimum(site, 0, 0.5)
    # Charging beforehand at 0.1 to 0.9 full, then emptying to 0.1: 80 kWh in store are 72 kWh.
    expected = (100.0 - 72.0) * 1.9 + 40.0 / 0.9 * 0.1 + 40.0 / 0.9 * mean
    assert best.co2_kg.sum() == pytest.approx(expected)
    assert best.soc[-1] == pytest.approx(0.1)


def test_what_its_window_cannot_hold_is_nobodys_debt() -> None:
    best = optimum(one_day(sessions=[(10, 12, 5.0, 4.0)]), 0, 0.5)
    assert best.ev_kw.sum() * 0.25 == pytest.approx(2.0)


def test_the_connection_is_no_limit_of_the_bound() -> None:
    site = one_day(load_kw=100.0, grid_kw=50.0, power_kw=1e-9)
    best = optimum(site, 0, 0.5)
    assert best.grid_import_kw.max() == pytest.approx(100.0)


def test_the_metric_is_that_of_the_physics() -> None:
    """A day with nothing to decide: the physics and the program count the same kg."""
    site = one_day(
        load_kw=np.linspace(5.0, 30.0, T),
        pv_kw=at(slice(40, 50), 50.0),
        carbon=np.linspace(0.2, 0.9, T),
        sessions=[(88, 92, 9.99, 10.0), (3, 5, 1.5, 3.0)],
        power_kw=1e-9,
    )
    trace = run_days(
        priced_model(site), RULES["uncontrolled"], torch.tensor([0]), torch.tensor([0.5])
    )
    assert optimum(site, 0, 0.5).co2_kg.sum() == pytest.approx(
        trace.total("co2_kg").item(), rel=1e-5
    )


@pytest.mark.parametrize("name", ["iquitos", "iquitos-flat"])
def test_no_rule_passes_the_bound_on_the_shipped_sites(name: str) -> None:
    site = shipped(name)
    model, soc_start = priced_model(site), evaluation_soc(site)
    days = torch.arange(5, 365, 90)
    bound = np.array([optimum(site, d, float(soc_start[d])).co2_kg.sum() for d in days.tolist()])
    for rule in RULES.values():
        co2_kg = run_days(model, rule, days, soc_start[days]).total("co2_kg").numpy()
        assert (co2_kg >= bound - 1e-6).all()
    best = optimum(site, 5, float(soc_start[5]))
    balance_kw = best.grid_import_kw + site.pv_kw[5] - best.curtailed_kwh / 0.25
    needed_kw = site.load_kw[5] + best.ev_kw + best.battery_kw
    assert balance_kw == pytest.approx(needed_kw, abs=1e-6)
    own = site.sessions.day == 5
    assert best.ev_kw.sum() * 0.25 == pytest.approx(site.sessions.energy_kwh[own].sum())


@st.composite
def days_and_policies(draw: st.DrawFn) -> tuple[Site, float, int]:
    """A day with anything in it, a battery start and the seed of a policy."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sessions: list[Row] = []
    for _ in range(draw(st.integers(0, 6))):
        arrival = int(rng.integers(0, T - 2))
        departure = int(rng.integers(arrival + 2, T + 1))
        max_kw = float(rng.uniform(1.0, 10.0))
        share = float(rng.uniform(0.01, 0.98))
        sessions.append((arrival, departure, share * (departure - arrival) * max_kw / 4, max_kw))
    site = one_day(
        pv_kw=rng.uniform(0.0, draw(st.sampled_from([0.0, 60.0])), T),
        load_kw=rng.uniform(0.0, draw(st.sampled_from([0.0, 30.0])), T),
        carbon=rng.uniform(draw(st.sampled_from([0.0, 0.5])), 0.5, T),
        sessions=sessions,
        capacity_kwh=draw(st.sampled_from([1.0, 100.0])),
        efficiency=draw(st.sampled_from([0.5, 0.9, 1.0])),
        grid_kw=draw(st.sampled_from([10.0, 1e6])),
    )
    return site, float(rng.uniform(0.3, 0.7)), int(rng.integers(2**31))


@settings(max_examples=10, deadline=None)
@given(days_and_policies())
def test_no_policy_passes_the_bound_on_any_day(case: tuple[Site, float, int]) -> None:
    """Random and bang-bang actions, an idle battery and the rules, side by side."""
    site, soc_start, seed = case
    generator = torch.Generator().manual_seed(seed)

    def anything(model: SiteModel, state: State) -> torch.Tensor:
        action = 2.0 * torch.rand(3, 2, generator=generator) - 1.0
        action[1] = action[1].sign()
        action[2, 1] = 0.0
        rules = [rule(model, state)[:1] for rule in RULES.values()]
        return torch.cat([action, *rules])

    count = 3 + len(RULES)
    start = torch.full((count,), soc_start)
    day = torch.zeros(count, dtype=torch.int64)
    emitted = run_days(priced_model(site), anything, day, start).total("co2_kg")
    # The physics rounds to float32: what 96 steps of it can amount to on a site of this size.
    assert emitted.min().item() >= optimum(site, 0, float(start[0])).co2_kg.sum() - 2e-3
