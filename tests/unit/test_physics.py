"""The physics: steps worked by hand, the order of the vehicles, gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from co2lightning.control.state import begin_day, build_model, laxity_order
from co2lightning.sim.objective import priced_model
from co2lightning.sim.physics import dispatch, step
from co2lightning.site.model import Site, T
from small_site import H, Row, play, random_site, small_site


def constant(action_ev: float, action_battery: float) -> Tensor:
    return torch.tensor([action_ev, action_battery], dtype=torch.float64).expand(T, 1, 2)


# --- vehicles ------------------------------------------------------------------------------------


def test_a_vehicle_waits_until_it_must() -> None:
    """3 kWh at 4 kW need 3 of its 6 steps; with the lowest action it charges in the last three."""
    site = small_site(sessions=[(0, 0, 10, 16, 3.0, 4.0)])
    day = play(site, constant(-1.0, 0.0))
    ev_kw = day.figures("ev_kw")
    np.testing.assert_allclose(ev_kw[10:16], [0, 0, 0, 4, 4, 4], atol=1e-12)
    assert ev_kw.sum() * H == pytest.approx(3.0)
    np.testing.assert_allclose([s.laxity.item() for s in day.states[10:16]], [3, 2, 1, 0, 0, 0])
    assert day.figures("unmet_kwh").sum() == 0.0


def test_a_laxity_below_one_step_forces_the_difference() -> None:
    """3.4 kWh at 4 kW need 3.4 of 4 steps: 1.6 kW is what the first must take."""
    site = small_site(sessions=[(0, 0, 0, 4, 3.4, 4.0)])
    day = play(site, constant(-1.0, 0.0))
    np.testing.assert_allclose(day.figures("ev_kw")[:5], [1.6, 4, 4, 4, 0], atol=1e-9)


def test_a_vehicle_on_arrival_takes_all_it_can() -> None:
    site = small_site(sessions=[(0, 0, 10, 16, 2.5, 4.0)])
    day = play(site, constant(1.0, 0.0))
    np.testing.assert_allclose(day.figures("ev_kw")[10:16], [4, 4, 2, 0, 0, 0], atol=1e-12)


def test_half_way_between_must_and_could() -> None:
    site = small_site(sessions=[(0, 0, 0, 4, 3.4, 4.0)])
    day = play(site, constant(0.0, 0.0))
    assert day.figures("ev_kw")[0] == pytest.approx((1.6 + 4.0) / 2)


def test_what_cannot_be_charged_is_unmet_when_the_vehicle_leaves() -> None:
    site = small_site(sessions=[(0, 0, 0, 2, 5.0, 4.0), (0, 0, 2, 4, 1.0, 4.0)])
    for action_ev in (-1.0, 0.3, 1.0):
        day = play(site, constant(action_ev, 0.0))
        unmet_kwh = day.figures("unmet_kwh")
        assert unmet_kwh[1] == pytest.approx(3.0)
        assert unmet_kwh.sum() == pytest.approx(3.0)
        assert day.figures("ev_kw").sum() * H == pytest.approx(3.0)


def test_the_budget_goes_by_least_laxity() -> None:
    """Laxities 7, 2 and 5 steps: 5 kW serve the second, then the third in part."""
    rows: list[Row] = [
        (0, 0, 0, 8, 1.0, 4.0),
        (0, 1, 0, 4, 2.0, 4.0),
        (0, 2, 0, 6, 1.0, 4.0),
    ]
    model = build_model(small_site(sockets=3, sessions=rows))
    state = begin_day(model, torch.tensor([0]), torch.tensor([0.5]))
    socket_kw = dispatch(model, state, torch.tensor([5.0]))
    torch.testing.assert_close(socket_kw, torch.tensor([[0.0, 4.0, 1.0]]))


@pytest.mark.parametrize("sockets", [1, 2, 3, 128, 1000])
def test_laxity_order_is_a_stable_argsort(sockets: int) -> None:
    """Of laxities to 1/1024 step, among them many equal ones."""
    rng = np.random.default_rng(sockets)
    laxity = rng.integers(0, 96 * 1024, (50, sockets)) / 1024
    laxity[:, ::3] = np.round(laxity[:, ::3] / 8) * 8
    expected = np.argsort(laxity, axis=1, kind="stable")
    for dtype in (torch.float32, torch.float64):
        order = laxity_order(torch.tensor(laxity, dtype=dtype))
        assert order.dtype == torch.int64
        np.testing.assert_array_equal(order.numpy(), expected)


def test_laxity_order_tells_apart_what_float32_tells_apart_above_64_steps() -> None:
    rng = np.random.default_rng(0)
    laxity = rng.uniform(64.0, 96.0, (50, 128)).astype(np.float32)
    order = laxity_order(torch.from_numpy(laxity)).numpy()
    np.testing.assert_array_equal(order, np.argsort(laxity, axis=1, kind="stable"))


def test_rounding_below_zero_does_not_upset_the_order() -> None:
    order = laxity_order(torch.tensor([[3.0, -1e-6, 0.0, -3e-5, 1.0]]))
    assert sorted(order[0].tolist()) == [0, 1, 2, 3, 4]
    assert order[0, -2:].tolist() == [4, 0]


def test_a_stay_longer_than_the_order_can_tell_is_refused() -> None:
    """Laxities from 128 steps on would come first, as the most urgent."""
    rows: list[Row] = [(0, 0, 0, 127, 1.0, 4.0), (0, 1, 0, 20, 1.0, 4.0)]
    model = build_model(small_site(days=3, sockets=2, sessions=rows))
    state = begin_day(model, torch.tensor([0]), torch.tensor([0.5]))
    assert state.laxity.tolist() == [[126.0, 19.0]]
    assert dispatch(model, state, torch.tensor([4.0])).tolist() == [[0.0, 4.0]]
    rows[0] = (0, 0, 0, 128, 1.0, 4.0)
    with pytest.raises(ValueError, match=r"stays 128 steps; .* for stays of up to 127"):
        build_model(small_site(days=3, sockets=2, sessions=rows))


def test_time_goes_on_after_a_day() -> None:
    """A vehicle from 90 to 106 steps: nothing in a step asks which day it is."""
    site = small_site(days=2, sessions=[(0, 0, 90, 106, 6.0, 4.0)])
    with pytest.raises(ValueError, match="leaves at step 106 of its day; a day ends after 96"):
        priced_model(site)
    model = build_model(site)
    state = begin_day(model, torch.tensor([0]), torch.tensor([0.5]))
    ev_kw = []
    for _ in range(2 * T):
        state, flows = step(model, state, torch.tensor([[-1.0, 0.0]]))
        ev_kw.append(flows.ev_kw.item())
        assert flows.unmet_kwh.item() == 0.0
    np.testing.assert_allclose(ev_kw, [0.0] * 100 + [4.0] * 6 + [0.0] * 86, atol=1e-5)


# --- battery and meter ---------------------------------------------------------------------------


def test_the_battery_loses_on_the_way_in_and_out() -> None:
    """40 kWh, 90 % in, 80 % out: 8 kW for a step store 1.8 kWh, taking 4 kW costs 1.25 kWh."""
    actions = constant(0.0, 0.0).clone()
    actions[0, 0, 1], actions[1, 0, 1] = 0.8, -0.4
    day = play(small_site(load_kw=5.0), actions)
    soc_kwh = [state.soc.item() * 40.0 for state in day.states[:3]]
    np.testing.assert_allclose(soc_kwh, [20.0, 21.8, 20.55])
    np.testing.assert_allclose(day.figures("grid_import_kw")[:3], [13.0, 1.0, 5.0])


def test_the_battery_stops_when_full_and_when_empty() -> None:
    site = small_site(load_kw=100.0)
    day = play(site, constant(0.0, 1.0), soc_start=0.88)
    # 0.8 kWh of room take 0.8 / 0.9 kWh, 3.556 kW for a step.
    np.testing.assert_allclose(day.figures("battery_kw")[:2], [3.2 / 0.9, 0.0], atol=1e-9)
    assert day.states[-1].soc.item() == pytest.approx(0.9)
    day = play(site, constant(0.0, -1.0), soc_start=0.12)
    np.testing.assert_allclose(day.figures("battery_kw")[:2], [-3.2 * 0.8, 0.0], atol=1e-9)
    assert day.states[-1].soc.item() == pytest.approx(0.1)


def test_an_emptied_battery_is_paid_back_at_the_mean_intensity() -> None:
    carbon = np.linspace(0.2, 0.8, T)
    actions = constant(0.0, 0.0).clone()
    actions[3, 0, 1] = -0.4
    day = play(small_site(load_kw=5.0, carbon=carbon), actions)
    meter_kg = day.figures("grid_import_kw") * H * carbon
    settlement_kg = 0.5 * 1.25 / 0.9  # 1 kWh given is 1.25 kWh stored, 1.389 kWh to buy again
    np.testing.assert_allclose(day.figures("co2_kg")[:-1], meter_kg[:-1])
    assert day.figures("co2_kg")[-1] == pytest.approx(meter_kg[-1] + settlement_kg)


def test_a_battery_fuller_than_at_midnight_earns_nothing() -> None:
    actions = constant(0.0, 0.0).clone()
    actions[3, 0, 1] = 0.5
    day = play(small_site(load_kw=5.0), actions)
    assert day.figures("co2_kg").sum() == pytest.approx(0.4 * (5.0 * 24 + 5.0 * H))


def test_surplus_is_curtailed_and_earns_nothing() -> None:
    day = play(small_site(load_kw=5.0, pv_kw=9.0), constant(0.0, 0.0))
    assert day.figures("curtailed_kwh").sum() == pytest.approx(4.0 * 24)
    assert day.figures("co2_kg").sum() == 0.0


def test_a_small_connection_first_takes_from_the_battery_then_from_vehicles() -> None:
    # 6 kW of connection, 5 kW of load, a vehicle that could take 4 kW and can wait.
    row: Row = (0, 0, 0, 90, 10.0, 4.0)
    site = small_site(sessions=[row], load_kw=5.0, grid_kw=6.0)
    # Battery charging yields first: nothing is left for it.
    day = play(site, constant(-1.0, 1.0))
    np.testing.assert_allclose(day.figures("battery_kw")[:60], 1.0, atol=1e-9)
    assert day.figures("grid_import_kw").max() == pytest.approx(6.0)
    # The vehicle takes what the battery can give, whatever the battery was told.
    day = play(site, constant(1.0, 1.0), soc_start=0.5)
    assert day.figures("ev_kw")[0] == pytest.approx(4.0)
    assert day.figures("battery_kw")[0] == pytest.approx(-3.0)
    assert day.figures("grid_import_kw").max() <= 6.0 + 1e-9
    # With the battery empty the vehicle yields.
    day = play(site, constant(1.0, 0.0), soc_start=0.1)
    np.testing.assert_allclose(day.figures("ev_kw")[:30], 1.0, atol=1e-9)
    assert day.figures("unmet_kwh").sum() == pytest.approx(0.0)


def test_what_must_be_charged_goes_before_the_connection() -> None:
    site = small_site(sessions=[(0, 0, 0, 2, 2.0, 4.0)], load_kw=5.0, grid_kw=6.0)
    day = play(site, constant(-1.0, 0.0), soc_start=0.1)
    np.testing.assert_allclose(day.figures("grid_import_kw")[:2], 9.0)
    assert day.figures("unmet_kwh").sum() == 0.0


def test_actions_beyond_their_bounds_count_as_the_bounds() -> None:
    site = random_site(3)
    day = play(site, constant(7.0, -9.0))
    clipped = play(site, constant(1.0, -1.0))
    np.testing.assert_array_equal(day.figures("co2_kg"), clipped.figures("co2_kg"))


# --- gradients -----------------------------------------------------------------------------------


def days_kg(site: Site, actions: Tensor) -> Tensor:
    """CO2 [B] of the days that actions [T, B, 2] make."""
    day = play(site, actions, dtype=actions.dtype)
    return torch.stack(day.each("co2_kg")).sum(0)


def test_the_days_co2_answers_to_every_action() -> None:
    """Vehicles that can always wait, a battery never at its limit, an hour never like another."""
    rows: list[Row] = [(0, 0, 0, 96, 20.0, 4.0), (0, 1, 0, 96, 10.0, 3.0)]
    carbon = 0.4 + 0.1 * np.sin(np.arange(T))
    site = small_site(sockets=2, sessions=rows, load_kw=20.0, carbon=carbon, capacity_kwh=400.0)
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(T, 1, 2, generator=generator) * 0.2
    actions[..., 0] -= 0.8
    actions[..., 1] -= 0.1
    for dtype in (torch.float32, torch.float64):
        leaf = actions.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(days_kg(site, leaf).sum(), leaf)
        assert gradient.isfinite().all()
        assert (gradient[:, :, 1] != 0.0).all()
        # In the last step before they leave vehicles must take what they are owed: no choice.
        assert (gradient[:-1, :, 0] != 0.0).all()
        assert (gradient[-1, :, 0] == 0.0).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    site = random_site(seed, sockets=5, grid_kw=14.0)
    generator = torch.Generator().manual_seed(seed)
    actions = torch.rand(T, 1, 2, generator=generator, dtype=torch.float64) * 1.8 - 0.9
    leaf = actions.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(days_kg(site, leaf).sum(), leaf)
    assert gradient.isfinite().all()
    width = 1e-6
    moves = torch.eye(2 * T, dtype=torch.float64).reshape(2 * T, T, 2).transpose(0, 1) * width
    day_kg = days_kg(site, actions)
    right = (days_kg(site, actions + moves) - day_kg) / width
    left = (day_kg - days_kg(site, actions - moves)) / width
    # At a kink the derivative lies between the two one-sided ones.
    own = gradient[:, 0].flatten()
    assert (own >= torch.minimum(left, right) - 1e-5).all()
    assert (own <= torch.maximum(left, right) + 1e-5).all()
    assert (own != 0.0).sum() > T


def test_nothing_is_written_in_place() -> None:
    model = build_model(random_site(1))
    state = begin_day(model, torch.tensor([0, 0]), torch.tensor([0.4, 0.6]))
    before = [x.clone() for x in state if isinstance(x, Tensor)]
    action = torch.tensor([[0.3, 0.5], [-0.2, -0.7]])
    step(model, state, action)
    step(model, state, action)
    for old, new in zip(before, [x for x in state if isinstance(x, Tensor)], strict=True):
        assert torch.equal(old, new)


def test_a_float64_model_stays_in_float64() -> None:
    day = play(random_site(2), constant(0.2, 0.1))
    for record in (*day.states, *day.flows, *day.booked):
        for value in record:
            assert not isinstance(value, Tensor) or value.dtype in (torch.float64, torch.int64)
