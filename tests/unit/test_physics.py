"""The physics: steps worked by hand, the order of the vehicles, gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from co2lightning.control.shield import dispatch
from co2lightning.control.state import SiteModel, build_model, laxity_order
from co2lightning.sim.physics import step
from co2lightning.site.model import Site
from small_site import H, Row, T, begin, play, random_site, small_site


def constant(action_ev: float, action_battery: float, steps: int = T) -> Tensor:
    return torch.tensor([action_ev, action_battery], dtype=torch.float64).expand(steps, 1, 2)


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
    state = begin(model)
    socket_kw = dispatch(model, state, torch.tensor([5.0]))
    torch.testing.assert_close(socket_kw, torch.tensor([[0.0, 4.0, 1.0]]))


def staying(steps: int, step_minutes: int = 15) -> SiteModel:
    """The tables of a site whose longest stay is so many steps."""
    row: Row = (0, 0, 0, steps, 1.0, 4.0)
    days = -(-steps * step_minutes // (24 * 60))
    return build_model(small_site(days=days, step_minutes=step_minutes, sessions=[row]))


@pytest.mark.parametrize(
    ("sockets", "longest", "step_minutes"),
    [
        *((sockets, 96, 15) for sockets in (1, 2, 3, 128, 1000)),
        (1000, 7 * 288, 5),  # a week of 5 minutes
        (1000, 14 * 288, 5),  # two: the order needs more than 32 bits
        (128, 24, 60),
    ],
)
def test_laxity_order_is_a_stable_argsort(sockets: int, longest: int, step_minutes: int) -> None:
    """Of laxities to 1/1024 step, among them many equal ones."""
    model = staying(longest, step_minutes)
    rng = np.random.default_rng(sockets)
    laxity = rng.integers(0, longest * 1024, (50, sockets)) / 1024
    laxity[:, ::3] = np.round(laxity[:, ::3] / 8) * 8
    expected = np.argsort(laxity, axis=1, kind="stable")
    for dtype in (torch.float32, torch.float64):
        order = laxity_order(model, torch.tensor(laxity, dtype=dtype))
        assert order.dtype == torch.int64
        np.testing.assert_array_equal(order.numpy(), expected)


def test_laxity_order_tells_apart_what_float32_tells_apart_above_64_steps() -> None:
    rng = np.random.default_rng(0)
    laxity = rng.uniform(64.0, 96.0, (50, 128)).astype(np.float32)
    order = laxity_order(staying(96), torch.from_numpy(laxity)).numpy()
    np.testing.assert_array_equal(order, np.argsort(laxity, axis=1, kind="stable"))


def test_rounding_below_zero_does_not_upset_the_order() -> None:
    order = laxity_order(staying(96), torch.tensor([[3.0, -1e-6, 0.0, -3e-5, 1.0]]))
    assert sorted(order[0].tolist()) == [0, 1, 2, 3, 4]
    assert order[0, -2:].tolist() == [4, 0]


@pytest.mark.parametrize("longest", [96, 127, 128, 7 * 96, 365 * 96])
def test_the_longest_stay_waits_for_the_shorter_one(longest: int) -> None:
    """However long: its laxity must not come round to the urgent end of the order."""
    rows: list[Row] = [(0, 0, 0, longest, 1.0, 4.0), (0, 1, 0, 20, 1.0, 4.0)]
    model = build_model(small_site(days=-(-longest // T), sockets=2, sessions=rows))
    state = begin(model)
    assert state.laxity.tolist() == [[longest - 1.0, 19.0]]
    assert dispatch(model, state, torch.tensor([4.0])).tolist() == [[0.0, 4.0]]


def test_a_session_stays_whole_over_midnight() -> None:
    """A vehicle from 90 to 106 steps, charged in the last six: nothing ends at step 96."""
    site = small_site(days=2, sessions=[(0, 0, 90, 106, 6.0, 4.0)])
    run = play(site, constant(-1.0, 0.0, 2 * T), dtype=torch.float32)
    expected = [0.0] * 100 + [4.0] * 6 + [0.0] * 86
    np.testing.assert_allclose(run.figures("ev_kw"), expected, atol=1e-5)
    assert run.figures("unmet_kwh").max() < 1e-6


def test_nobody_stands_there_after_the_last_step() -> None:
    """Who stays to the end is owed what is left, and leaves with the series."""
    site = small_site(sessions=[(0, 0, 90, 96, 6.5, 4.0)])
    model = build_model(site)
    state = begin(model)
    for _ in range(T):
        state, flows = step(model, state, torch.tensor([[-1.0, 0.0]]))
    assert flows.unmet_kw.item() * H == pytest.approx(0.5)
    assert state.place.item() == T
    assert state.owed_kw.abs().max().item() == 0.0
    assert state.could_total_kw.item() == 0.0


@pytest.mark.parametrize(("step_minutes", "steps"), [(5, 12), (60, 1)])
def test_powers_do_not_depend_on_the_length_of_a_step(step_minutes: int, steps: int) -> None:
    """An hour at 8 kW puts 7.2 kWh into the battery, and a vehicle takes its 3 kW."""
    row: Row = (0, 0, 0, 3 * steps, 9.0, 3.0)
    site = small_site(step_minutes=step_minutes, sessions=[row], load_kw=5.0)
    run = play(site, constant(1.0, 0.8, 3 * steps), soc_start=0.2)
    np.testing.assert_allclose(run.figures("soc")[steps - 1 :: steps] * 40, [15.2, 22.4, 29.6])
    np.testing.assert_allclose(run.figures("ev_kw"), 3.0)
    np.testing.assert_allclose(run.figures("co2_kg").sum(), 3 * 16.0 * 0.4)


# --- a plug's least power ------------------------------------------------------------------------


def test_what_must_be_charged_is_charged_at_the_least_power() -> None:
    """3.1 kWh at 4 kW need 3.1 of 4 steps: instead of 0.4 kW the plug gives 1.5."""
    site = small_site(sessions=[(0, 0, 0, 4, 3.1, 4.0)], min_kw=1.5)
    run = play(site, constant(-1.0, 0.0))
    # 2.725 kWh are left, 2.725 of 3 steps: again what is missing, 2.9 kW.
    np.testing.assert_allclose(run.figures("ev_kw")[:5], [1.5, 2.9, 4, 4, 0], atol=1e-9)
    assert run.figures("unmet_kwh").sum() == 0.0


def test_less_than_the_least_power_is_charged_for_part_of_a_step() -> None:
    """0.2 kWh are owed: 0.8 kW in the mean of a step whose plug gives 1.5 for a while."""
    site = small_site(sessions=[(0, 0, 0, 4, 1.2, 4.0)], min_kw=1.5)
    run = play(site, constant(1.0, 0.0))
    np.testing.assert_allclose(run.figures("ev_kw")[:4], [4.0, 0.8, 0.0, 0.0], atol=1e-9)


@pytest.mark.parametrize(("budget_kw", "last_kw"), [(5.4, 0.0), (5.5, 1.5), (7.0, 3.0)])
def test_the_vehicle_at_the_margin_gets_none_or_the_least_power(
    budget_kw: float, last_kw: float
) -> None:
    rows: list[Row] = [(0, 0, 0, 8, 1.0, 4.0), (0, 1, 0, 4, 2.0, 4.0)]
    model = build_model(small_site(sockets=2, sessions=rows, min_kw=1.5), dtype=torch.float64)
    given_kw = dispatch(model, begin(model), torch.tensor([budget_kw], dtype=torch.float64))
    np.testing.assert_allclose(given_kw, [[last_kw, 4.0]])


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


@pytest.mark.parametrize("carbon", [0.4, 0.0])
def test_the_meter_counts_imports_alone(carbon: float) -> None:
    """What the battery holds at the end is nobody's business in a step."""
    actions = constant(0.0, 0.0).clone()
    actions[3, 0, 1], actions[5, 0, 1] = -0.4, 0.5
    run = play(small_site(load_kw=5.0, carbon=carbon), actions)
    kwh = 5.0 * 24 - 4.0 * H + 5.0 * H
    assert run.figures("co2_kg").sum() == pytest.approx(carbon * kwh)


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


def test_a_connection_that_is_dimmed_counts_step_by_step() -> None:
    """Charging yields first, then the battery gives, what must be charged still wins."""
    limit_kw = np.full(T, 20.0)
    limit_kw[2:4], limit_kw[4:6] = 8.0, 3.0
    rows: list[Row] = [(0, 0, 0, 90, 12.0, 2.0), (0, 1, 0, 6, 5.5, 4.0)]
    site = small_site(sockets=2, sessions=rows, load_kw=5.0, import_limit_kw=limit_kw)
    run = play(site, constant(1.0, 1.0))
    battery_kw, grid_kw, ev_kw = (run.figures(f"{name}_kw") for name in ("battery", "grid", "ev"))
    np.testing.assert_allclose(ev_kw[:6], [6.0] * 5 + [4.0], atol=1e-9)
    # At 20 kW it charges with what is left, below 11 it gives what is missing.
    np.testing.assert_allclose(battery_kw[:6], [9.0, 9.0, -3.0, -3.0, -8.0, -6.0], atol=1e-9)
    np.testing.assert_allclose(grid_kw[:6], [20.0, 20.0, 8.0, 8.0, 3.0, 3.0], atol=1e-9)
    empty = play(site, constant(1.0, 1.0), soc_start=0.1)
    # With the battery empty the vehicles yield, never below what they must have.
    assert (empty.figures("ev_kw") >= [s.must_total_kw.item() - 1e-9 for s in empty.states]).all()
    assert empty.figures("unmet_kwh").sum() == pytest.approx(0.0, abs=1e-9)


def test_actions_beyond_their_bounds_count_as_the_bounds() -> None:
    site = random_site(3)
    day = play(site, constant(7.0, -9.0))
    clipped = play(site, constant(1.0, -1.0))
    np.testing.assert_array_equal(day.figures("co2_kg"), clipped.figures("co2_kg"))


# --- what a battery is kept from -----------------------------------------------------------------


def test_what_is_kept_for_outages_is_not_given() -> None:
    """Down to 0.4 instead of 0.1: 2 kWh of the 40 leave as 1.6."""
    run = play(small_site(load_kw=100.0, reserve_soc=0.4), constant(0.0, -1.0), soc_start=0.45)
    assert run.figures("battery_kw").sum() * H == pytest.approx(-1.6)
    assert run.figures("soc").min() == pytest.approx(0.4)
    # Not even where the connection is short.
    tight = small_site(load_kw=100.0, reserve_soc=0.4, grid_kw=50.0)
    assert play(tight, constant(0.0, -1.0), soc_start=0.4).figures("battery_kw").min() == 0.0


@pytest.mark.parametrize(("soc", "sign"), [(0.02, 1.0), (0.3, 1.0), (0.95, -1.0)])
def test_outside_its_band_a_battery_goes_back_only(soc: float, sign: float) -> None:
    site = small_site(load_kw=5.0, reserve_soc=0.4)
    for wish in (-1.0, 0.0, 1.0):
        run = play(site, constant(0.0, wish), soc_start=soc)
        battery_kw = run.figures("battery_kw")
        assert battery_kw[0] == pytest.approx(10.0 * wish if sign * wish > 0.0 else 0.0)
        first = np.concatenate([[soc], run.figures("soc")])
        assert (sign * np.diff(first)[:2] >= 0.0).all()
    run = play(site, constant(0.0, sign), soc_start=soc)
    assert 0.4 - 1e-9 <= run.figures("soc")[-1] <= 0.9 + 1e-9


def test_a_battery_that_may_not_charge_from_the_grid_takes_a_surplus_only() -> None:
    row: Row = (0, 0, 48, 60, 9.0, 4.0)
    pv_kw = np.where(np.arange(T) < 48, 0.0, 9.0)
    site = small_site(
        sessions=[row], load_kw=3.0, pv_kw=pv_kw, may_charge_from_grid=False, capacity_kwh=400.0
    )
    run = play(site, constant(1.0, 1.0))
    # 6 kW are left over, 2 beside the vehicle, of 9 kWh.
    expected = [0.0] * 48 + [2.0] * 9 + [6.0] * 39
    np.testing.assert_allclose(run.figures("battery_kw"), expected, atol=1e-9)
    # It gives as ever.
    given = play(site, constant(1.0, -1.0)).figures("battery_kw")
    np.testing.assert_allclose(given[:48], -10.0)


# --- what is not there ---------------------------------------------------------------------------


def test_without_a_battery_its_action_does_nothing() -> None:
    site = random_site(4, capacity_kwh=None, grid_kw=9.0)
    for wish in (-1.0, 1.0):
        run = play(site, constant(0.3, wish))
        assert run.figures("battery_kw").any() == 0
        np.testing.assert_array_equal(run.figures("soc"), 0.0)
        idle = play(site, constant(0.3, 0.0))
        np.testing.assert_array_equal(run.figures("co2_kg"), idle.figures("co2_kg"))


def test_without_sockets_their_action_does_nothing() -> None:
    site = random_site(4, sockets=0)
    run, other = (play(site, constant(wish, 0.5)) for wish in (-1.0, 1.0))
    np.testing.assert_array_equal(run.figures("co2_kg"), other.figures("co2_kg"))
    assert run.figures("ev_kw").any() == 0


def test_sockets_that_are_never_taken_take_no_memory() -> None:
    rows: list[Row] = [(0, 400, 0, 8, 1.0, 4.0), (0, 999, 0, 8, 1.0, 4.0)]
    model = build_model(small_site(sockets=1000, sessions=rows))
    assert model.sockets.shape == (4, T + 1, 2)
    assert begin(model).owed_kw.tolist() == [[4.0, 4.0]]


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
    state = begin(model, batch=2)
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
