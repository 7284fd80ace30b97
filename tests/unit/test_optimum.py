"""The optimum and what settles a stretch: by hand, against a naive program, as shapes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from co2lightning.sim.optimum import optimum, tail_objective
from co2lightning.site.model import TAIL_H, Site
from hand_site import battery, hand_site, random_site

SEEDS = st.integers(0, 2**32 - 1)
NOBODY = np.zeros(0)


# --- by hand -------------------------------------------------------------------------------------


def test_a_load_alone_is_its_own_optimum() -> None:
    site = hand_site(3, load_kw=[10.0, 20.0, -5.0], carbon=[0.5, 0.1, 0.3])
    best = optimum(site, 0, 2, 0.0, NOBODY)
    assert best.settled == pytest.approx(5.0 + 2.0)
    assert best.schedule.grid_import_kw == pytest.approx([10.0, 20.0])
    assert best.schedule.soc == pytest.approx([0.0, 0.0])
    late = optimum(site, 2, 3, 0.0, NOBODY)
    assert late.settled == 0.0
    assert late.schedule.curtailed_kwh == pytest.approx([5.0])


def test_a_battery_moves_energy_to_the_dear_step_and_is_worth_nothing_in_the_end() -> None:
    """4 kWh at 0.2 become 4 x 0.9 in store and 4 x 0.81 at 1.0; nothing is left."""
    site = hand_site(2, carbon=[0.2, 1.0], load_kw=[1.0, 10.0], battery=battery(10.0, 4.0, 0.9))
    best = optimum(site, 0, 2, 0.0, NOBODY)
    assert best.settled == pytest.approx(5.0 * 0.2 + (10.0 - 4.0 * 0.81) * 1.0)
    assert best.schedule.battery_kw == pytest.approx([4.0, -4.0 * 0.81])
    assert best.schedule.soc == pytest.approx([0.36, 0.0], abs=1e-9)
    # With 0.9 kWh there the rating decides: 4 kW are given, 4 / 0.9 kWh taken out for that.
    charged_kwh = (4.0 / 0.9 - 0.9) / 0.9
    assert tail_objective(site, 0, 0.9, NOBODY) == pytest.approx((1.0 + charged_kwh) * 0.2 + 6.0)


def test_stretch_and_tail_are_one() -> None:
    """A vehicle charges in the clean step after the stretch; the stretch alone would not wait."""
    site = hand_site(3, carbon=[0.5, 0.9, 0.1], sessions=[(0, 0, 3, 6.0, 4.0)])
    owed_kwh = site.owed_on_arrival_kwh(0)
    best = optimum(site, 0, 2, 0.0, owed_kwh)
    assert best.schedule.ev_kw == pytest.approx([2.0, 0.0], abs=1e-9)
    assert best.settled == pytest.approx(2.0 * 0.5 + 4.0 * 0.1)
    assert tail_objective(site, 2, 0.0, np.array([4.0])) == pytest.approx(0.4)
    assert optimum(site, 0, 3, 0.0, owed_kwh).settled == pytest.approx(best.settled)


def test_who_stands_there_is_owed_what_is_left_and_who_arrives_comes_whole() -> None:
    site = hand_site(
        4, carbon=1.0, sessions=[(3, 0, 2, 8.0, 5.0), (7, 0, 3, 9.0, 5.0), (3, 2, 4, 3.0, 5.0)]
    )
    assert tail_objective(site, 1, 0.0, np.array([0.5, 2.0])) == pytest.approx(0.5 + 2.0 + 3.0)
    assert tail_objective(site, 2, 0.0, np.array([3.0, 0.0])) == pytest.approx(
        3.0
    )  # arrived just now
    assert tail_objective(site, 1, 0.0, np.zeros(2)) == pytest.approx(3.0)
    # No more than its stay holds.
    assert tail_objective(site, 1, 0.0, np.array([7.0, 0.0])) == pytest.approx(5.0 + 3.0)


def test_a_tail_is_two_days_or_what_the_series_has() -> None:
    site = hand_site(60, carbon=1.0, load_kw=1.0)
    assert tail_objective(site, 0, 0.0, NOBODY) == pytest.approx(TAIL_H)
    assert tail_objective(site, 50, 0.0, NOBODY) == pytest.approx(10.0)
    assert tail_objective(site, 60, 0.0, NOBODY) == 0.0
    assert optimum(site, 0, 5, 0.0, NOBODY).settled == pytest.approx(5.0 + TAIL_H)
    quarters = hand_site(400, step_minutes=15, carbon=1.0, load_kw=1.0)
    assert tail_objective(quarters, 4, 0.0, NOBODY) == pytest.approx(TAIL_H)


def test_sessions_are_cut_at_the_tails_end() -> None:
    site = hand_site(100, carbon=1.0, sessions=[(0, 0, 100, 90.0, 1.0), (1, 46, 100, 9.0, 1.0)])
    assert tail_objective(site, 0, 0.0, np.array([90.0, 0.0])) == pytest.approx(48.0 + 2.0)


def test_who_defers_beyond_the_tail_is_no_better_than_the_bound() -> None:
    """A vehicle of 90 kWh stays 60 h beyond the tail: of what it waits for 48 are asked."""
    site = hand_site(120, carbon=1.0, sessions=[(0, 0, 120, 90.0, 1.0)])
    owed_kwh = np.array([90.0])
    assert (
        optimum(site, 0, 24, 0.0, owed_kwh).settled
        <= tail_objective(site, 24, 0.0, owed_kwh) + 1e-9
    )
    # Where the tail can give all, all is asked.
    asked = optimum(site, 0, 24, 0.0, np.array([48.0]))
    assert asked.settled == pytest.approx(48.0)


def test_a_battery_that_may_not_charge_from_the_grid_takes_surplus_alone() -> None:
    own = replace(battery(10.0, 5.0), may_charge_from_grid=False)
    site = hand_site(
        3, carbon=[0.1, 0.1, 1.0], load_kw=[2.0, 0, 9.0], pv_kw=[0, 3.0, 0], battery=own
    )
    best = optimum(site, 0, 3, 0.0, NOBODY)
    assert best.settled == pytest.approx(0.2 + (9.0 - 3.0) * 1.0)
    # A vehicle that can take less than the surplus leaves the rest, no more.
    with_vehicle = replace(site, sessions=hand_site(3, sessions=[(0, 1, 3, 2.0, 2.0)]).sessions)
    assert optimum(with_vehicle, 0, 3, 0.0, np.zeros(1)).settled == pytest.approx(0.2 + 8.0)


def test_a_battery_keeps_its_reserve_and_a_start_below_it_is_no_fault() -> None:
    own = replace(battery(10.0, 5.0), reserve_soc=0.4)
    site = hand_site(1, carbon=1.0, load_kw=9.0, battery=own)
    assert tail_objective(site, 0, 6.0, NOBODY) == pytest.approx(9.0 - 2.0)
    assert tail_objective(site, 0, 1.0, NOBODY) == pytest.approx(9.0)
    assert tail_objective(
        replace(site, battery=replace(own, soc_max=0.5)), 0, 8.0, NOBODY
    ) == pytest.approx(5.0)


def test_a_connection_limits_what_is_not_a_vehicles() -> None:
    """Import may reach the limit, or load and all vehicles where that is more."""
    own = battery(10.0, 10.0)
    site = hand_site(2, carbon=[0.0, 1.0], load_kw=[1.0, 9.0], battery=own, limit_kw=6.0)
    assert optimum(site, 0, 2, 0.0, NOBODY).settled == pytest.approx(9.0 - 5.0)
    assert tail_objective(replace(site, import_limit_kw=np.array([2.0, 2.0])), 0, 0.0, NOBODY) == (
        pytest.approx(9.0 - 1.0)
    )
    # No vehicle is left without because the connection is weak.
    weak = hand_site(2, carbon=1.0, load_kw=5.0, limit_kw=2.0, sessions=[(0, 0, 2, 4.0, 2.0)])
    assert tail_objective(weak, 0, 0.0, np.array([4.0])) == pytest.approx(14.0)


# --- shapes --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([15, 60]), st.integers(0, 20), st.integers(0, 30))
def test_it_is_the_naive_program(seed: int, step_minutes: int, begin: int, length: int) -> None:
    site = random_site(seed, steps=60, step_minutes=step_minutes)
    capacity_kwh = site.battery.capacity_kwh if site.battery else 0.0
    owed_kwh = 0.7 * site.owed_on_arrival_kwh(begin)
    ours = (
        optimum(site, begin, begin + length, 0.5 * capacity_kwh, owed_kwh).settled
        if length
        else tail_objective(site, begin, 0.5 * capacity_kwh, owed_kwh)
    )
    naive = naive_kg(site, begin, begin + length, 0.5 * capacity_kwh, owed_kwh)
    assert ours == pytest.approx(naive, abs=1e-4)


def naive_kg(site: Site, begin: int, end: int, stored_kwh: float, owed_kwh: np.ndarray) -> float:
    """Write down row by row what continuing time says; import, waste, charge, discharge, kWh."""
    until, h, s = min(end + site.steps(48.0), site.n_steps), site.step_h, site.sessions
    n, own = until - begin, site.battery or battery(0.0, 0.0)
    vehicles = []
    for i in range(len(s.socket)):
        if s.departure[i] <= begin or s.arrival[i] >= until:
            continue
        here = range(max(s.arrival[i], begin) - begin, min(s.departure[i], until) - begin)
        asked_kwh = owed_kwh[s.column[i]] if s.arrival[i] <= begin else s.energy_kwh[i]
        vehicles.append((here, min(asked_kwh, s.max_kw[i] * len(here) * h), s.max_kw[i]))
    count = 5 * n + len(vehicles) * n
    rows, right = [], []
    limits: list[tuple[float, float]] = [(0.0, 0.0)] * count
    for t in range(n):
        net_kw = site.load_kw[begin + t] - site.pv_kw[begin + t]
        balance = np.zeros(count)
        balance[[t, n + t, 2 * n + t, 3 * n + t]] = 1.0, -1.0, -1.0, 1.0
        balance[5 * n + t :: n] = -1.0
        kept = np.zeros(count)
        kept[[2 * n + t, 3 * n + t, 4 * n + t]] = (
            -h * own.charge_efficiency,
            h / own.discharge_efficiency,
            1.0,
        )
        if t:
            kept[4 * n + t - 1] = -1.0
        rows += [balance, kept]
        right += [net_kw, 0.0 if t else stored_kwh]
        standing_kw = sum(kw for here, _, kw in vehicles if t in here)
        limits[t] = (0.0, max(site.import_limit_kw[begin + t], net_kw + standing_kw))
        limits[n + t] = (0.0, np.inf)
        limits[2 * n + t] = limits[3 * n + t] = (0.0, own.power_kw)
        limits[4 * n + t] = (own.soc_min * own.capacity_kwh, own.soc_max * own.capacity_kwh)
    for v, (here, asked_kwh, kw) in enumerate(vehicles):
        served = np.zeros(count)
        for t in here:
            served[5 * n + v * n + t] = h
            limits[5 * n + v * n + t] = (0.0, kw)
        rows.append(served)
        right.append(asked_kwh)
    cost = np.zeros(count)
    cost[:n] = h * site.carbon_kg_per_kwh[begin:until]
    found = linprog(cost, A_eq=np.array(rows), b_eq=right, bounds=limits, method="highs-ipm")
    assert found.status == 0
    return float(found.fun)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.floats(0.0, 1.0))
def test_what_is_left_is_worth_less_and_less(seed: int, a: float, b: float, share: float) -> None:
    """J falls with what is stored, and is convex in it and in what is owed."""
    site = random_site(seed, steps=70, battery=battery(30.0, 6.0, 0.9, 0.1, 0.9))
    most_kwh = site.owed_on_arrival_kwh(10)

    def kg(soc: float, owed: float) -> float:
        return tail_objective(site, 10, soc * 30.0, owed * most_kwh)

    assert kg(max(a, b), share) <= kg(min(a, b), share) + 1e-4
    assert kg((a + b) / 2, share) <= (kg(a, share) + kg(b, share)) / 2 + 1e-4
    assert kg(share, (a + b) / 2) <= (kg(share, a) + kg(share, b)) / 2 + 1e-4


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 30))
def test_the_bound_is_reached_by_its_own_path(seed: int, length: int) -> None:
    """One vehicle at a time, so that what the path leaves to be charged is known."""
    drawn = random_site(seed, steps=80, load_kw=2.0)
    s = drawn.sessions
    of_one = s.socket == 0
    one = replace(s, **{k: getattr(s, k)[of_one] for k in s.__dataclass_fields__})
    site = replace(drawn, sessions=one)
    end, capacity_kwh = 5 + length, site.battery.capacity_kwh if site.battery else 0.0
    owed_kwh = site.owed_on_arrival_kwh(5)
    best = optimum(site, 5, end, 0.5 * capacity_kwh, owed_kwh)
    left_kwh = np.zeros_like(owed_kwh)
    for i in one.standing(end):
        since = max(one.arrival[i], 5)
        asked_kwh = owed_kwh[0] if one.arrival[i] <= 5 else one.energy_kwh[i]
        left_kwh[0] = max(asked_kwh - best.schedule.ev_kw[since - 5 :].sum(), 0.0)
    rest_kg = tail_objective(site, end, best.schedule.soc[-1] * capacity_kwh, left_kwh)
    assert best.schedule.co2_kg.sum() + rest_kg == pytest.approx(best.settled, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_sites_of_any_size_are_solved(scale: float) -> None:
    """1 kWh or 10 MWh: what is large is not less exact for it."""
    shape = random_site(5, steps=80, battery=battery(20.0, 6.0, 0.9, 0.1, 0.9), limit_kw=1e6)
    s = shape.sessions
    site = replace(
        shape,
        load_kw=shape.load_kw * scale,
        pv_kw=shape.pv_kw * scale,
        battery=battery(20.0 * scale, 6.0 * scale, 0.9, 0.1, 0.9),
        sessions=replace(s, energy_kwh=s.energy_kwh * scale, max_kw=s.max_kw * scale),
    )
    kg = optimum(site, 0, 40, 10.0 * scale, site.owed_on_arrival_kwh(0)).settled
    unit = optimum(shape, 0, 40, 10.0, shape.owed_on_arrival_kwh(0)).settled
    assert kg / scale == pytest.approx(unit, rel=1e-6)
