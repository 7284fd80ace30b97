"""What holds on any site, on any day, for any actions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from co2lightning.control.rules import RULES, Rule, uncontrolled
from co2lightning.control.state import SiteModel, State
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import run_days
from co2lightning.site.model import T
from small_site import H, day_by_hand, play, random_site, shipped

FIGURES = (
    *("ev_kw", "battery_kw", "grid_kw", "grid_import_kw", "curtailed_kwh", "unmet_kwh"),
    *("co2_kg", "reward", "socket_kw"),
)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=10, deadline=None, derandomize=True)


def random_actions(seed: int, batch: int = 1) -> Tensor:
    """Actions [T, B, 2]: in between, at the ends, and beyond them."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1.2, 1.2, (T, batch, 2))
    extreme = rng.random((T, batch, 2)) < 0.3
    return torch.tensor(np.where(extreme, np.sign(actions), actions), dtype=torch.float32)


@few
@given(seed=seeds, sockets=st.integers(1, 9), grid_kw=st.sampled_from([1e6, 12.0, 6.0]))
def test_every_step_balances_and_stays_within_bounds(
    seed: int, sockets: int, grid_kw: float
) -> None:
    site = random_site(seed, sockets=sockets, grid_kw=grid_kw)
    day = play(site, random_actions(seed), dtype=torch.float32)
    battery = site.battery
    soc = [state.soc.item() for state in day.states]
    for t, (state, flow, booked) in enumerate(zip(*day, strict=True)):
        ev_kw, battery_kw = flow.socket_kw.sum().item(), flow.battery_kw.item()
        net_kwh = H * (site.load_kw[0, t] - site.pv_kw[0, t] + ev_kw + battery_kw)
        meter_kwh = flow.grid_import_kw.item() * H - flow.curtailed_kwh.item()
        assert meter_kwh == pytest.approx(net_kwh, abs=1e-4)
        assert flow.ev_kw.item() == pytest.approx(ev_kw, abs=1e-4)
        if t + 1 < T:
            charged, given = max(battery_kw, 0.0), max(-battery_kw, 0.0)
            stored = H * (
                charged * battery.charge_efficiency - given / battery.discharge_efficiency
            )
            gained = (soc[t + 1] - soc[t]) * battery.capacity_kwh
            assert gained == pytest.approx(stored, abs=1e-4)
        assert battery.soc_min - 1e-6 <= soc[t] <= battery.soc_max + 1e-6
        assert abs(battery_kw) <= battery.power_kw + 1e-5
        assert flow.grid_import_kw.item() >= 0.0
        assert flow.curtailed_kwh.item() >= 0.0
        assert booked.co2_kg.item() >= 0.0
        assert (flow.socket_kw >= state.must_kw - 1e-6).all()
        assert (flow.socket_kw <= state.could_kw).all()
        assert (state.must_kw <= state.could_kw).all()
        # Nothing but the load and what must be charged can overload the connection, and only
        # when the battery gives all it has.
        if flow.grid_import_kw.item() > grid_kw + 1e-4:
            assert battery_kw == pytest.approx(state.battery_min_kw.item(), abs=1e-4)
            assert ev_kw == pytest.approx(state.must_total_kw.item(), abs=1e-4)


@few
@given(seed=seeds, sockets=st.integers(2, 20))
def test_no_vehicle_goes_before_one_with_less_laxity(seed: int, sockets: int) -> None:
    day = play(random_site(seed, sockets=sockets), random_actions(seed), dtype=torch.float32)
    for state, flow in zip(day.states, day.flows, strict=True):
        extra = (flow.socket_kw - state.must_kw)[0]
        more = (state.could_kw - flow.socket_kw)[0]
        laxity = state.laxity[0]
        served_early = (extra[:, None] > 1e-4) & (more[None, :] > 1e-4)
        assert not (served_early & (laxity[:, None] > laxity[None, :] + 1e-4)).any()


@few
@given(seed=seeds, sockets=st.integers(1, 9), most=st.sampled_from([0.98, 1.3]))
def test_no_policy_leaves_more_unserved_than_charging_on_arrival(
    seed: int, sockets: int, most: float
) -> None:
    """Some sites ask for more than a window allows: that much is missing under every policy."""
    site = random_site(seed, sockets=sockets, most=most)
    own = play(site, random_actions(seed), dtype=torch.float32)
    on_arrival = play(site, torch.tensor([1.0, 0.0]).expand(T, 1, 2), dtype=torch.float32)
    unmet, unavoidable = (torch.stack(day.each("unmet_kwh")) for day in (own, on_arrival))
    torch.testing.assert_close(unmet, unavoidable, atol=1e-4, rtol=0.0)
    rows = site.sessions
    possible = rows.max_kw * H * (rows.departure_step - rows.arrival_step)
    expected = np.maximum(rows.energy_kwh - possible, 0.0).sum()
    assert unmet.sum().item() == pytest.approx(expected, abs=1e-3)


@few
@given(seed=seeds, sockets=st.integers(1, 9), action_ev=st.floats(-1.0, 1.0))
def test_without_sun_and_battery_co2_is_intensity_times_energy(
    seed: int, sockets: int, action_ev: float
) -> None:
    site = random_site(seed, sockets=sockets, pv=0.0, flat=True)
    day = play(site, torch.tensor([action_ev, 0.0]).expand(T, 1, 2), dtype=torch.float32)
    energy_kwh = site.load_kw.sum() * H + site.sessions.energy_kwh.sum()
    assert day.figures("co2_kg").sum() == pytest.approx(0.5 * energy_kwh, rel=1e-5)


@few
@given(seed=seeds, soc_start=st.floats(0.1, 0.9))
def test_the_days_reward_is_reference_minus_co2(seed: int, soc_start: float) -> None:
    site = random_site(seed)
    day = play(site, random_actions(seed), soc_start, torch.float32)
    carbon = site.carbon_kg_per_kwh[0]
    own_kg = (np.maximum(site.load_kw - site.pv_kw, 0.0)[0] * carbon).sum() * H
    reference_kg = own_kg + 0.5 * carbon.mean() * site.sessions.energy_kwh.sum()
    reward, co2_kg = day.figures("reward").sum(), day.figures("co2_kg").sum()
    assert reward == pytest.approx(reference_kg - co2_kg, abs=1e-3)


@few
@given(seed=seeds, sockets=st.integers(1, 9), grid_kw=st.sampled_from([1e6, 8.0]))
def test_float32_agrees_with_a_day_worked_out_by_hand(
    seed: int, sockets: int, grid_kw: float
) -> None:
    site = random_site(seed, sockets=sockets, grid_kw=grid_kw)
    soc_start = float(np.float32(np.random.default_rng(seed).uniform(0.1, 0.9)))
    actions = random_actions(seed)
    expected = day_by_hand(site, 0, soc_start, actions[:, 0].double().clamp(-1.0, 1.0).numpy())
    day = play(site, actions, soc_start, torch.float32)
    exact = play(site, actions, soc_start)
    for name, values in expected.items():
        if name == "soc":
            continue
        single, double = (np.array([v[0].numpy() for v in d.each(name)]) for d in (day, exact))
        np.testing.assert_allclose(double, values, atol=1e-4, rtol=0.0, err_msg=name)
        np.testing.assert_allclose(single, values, atol=2e-3, rtol=0.0, err_msg=name)
    assert day.figures("co2_kg").sum() == pytest.approx(expected["co2_kg"].sum(), rel=1e-5)


@few
@given(seed=seeds, batch=st.integers(2, 3))
def test_a_single_day_is_a_row_of_the_batch(seed: int, batch: int) -> None:
    site = random_site(seed)
    actions = random_actions(seed, batch)
    together = play(site, actions, dtype=torch.float32)
    for row in range(batch):
        alone = play(site, actions[:, row : row + 1], dtype=torch.float32)
        for name in FIGURES:
            for many, one in zip(together.each(name), alone.each(name), strict=True):
                assert torch.equal(many[row], one[0]), name


def recorded(rule: Rule) -> tuple[list[Tensor], Rule]:
    """Return a rule and the list that its actions go to."""
    actions: list[Tensor] = []

    def act(model: SiteModel, state: State) -> Tensor:
        actions.append(rule(model, state))
        return actions[-1]

    return actions, act


def test_a_day_of_the_shipped_site_worked_out_by_hand() -> None:
    """128 sockets, where vehicles that tie to the last bit may swap."""
    site = shipped()
    model = priced_model(site)
    days, soc_start = torch.tensor([5, 200]), torch.tensor([0.4, 0.65])
    for name, rule in RULES.items():
        actions, rule = recorded(rule)
        trace = run_days(model, rule, days, soc_start)
        for column, day in enumerate(days.tolist()):
            own = torch.stack(actions)[:, column].double().numpy()
            expected = day_by_hand(site, day, float(soc_start[column]), own)
            for figure in ("co2_kg", "curtailed_kwh", "grid_import_kw"):
                total = trace.total(figure)[column].item()
                assert total == pytest.approx(expected[figure].sum(), rel=2e-4), (name, figure)
            assert expected["unmet_kwh"].sum() == pytest.approx(0.0, abs=1e-9)


def test_random_policies_leave_nothing_unserved_on_the_shipped_site() -> None:
    site = shipped()
    model = priced_model(site)
    generator = torch.Generator().manual_seed(0)

    def anything(model: object, state: State) -> Tensor:
        return 2.0 * torch.rand(len(state.soc), 2, generator=generator) - 1.0

    days = torch.arange(0, len(site.days), 12)
    soc_start = torch.full((len(days),), 0.5)
    for policy in (anything, lambda model, state: anything(model, state).sign(), uncontrolled):
        assert run_days(model, policy, days, soc_start).total("unmet_kwh").max() < 1e-4
