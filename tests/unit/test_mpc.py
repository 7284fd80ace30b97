"""Model predictive control: plans that are clear by hand, what it may know, what is kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from co2lightning.sim.evaluate import beside, evaluate, summarise
from co2lightning.sim.mpc import mpc
from co2lightning.sim.mpc_stretches import play_mpc
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import Trace, play, run, start
from co2lightning.site.load import load_site
from co2lightning.site.model import Battery, Objective, Site
from hand_site import Row, battery, hand_site, random_site

DAYS, HOURS = 21, np.arange(24)
SITES = Path(__file__).parents[1] / "sites"


def periodic(
    carbon: object = 0.5,
    *,
    rows: list[Row] | None = None,
    battery: Battery | None = None,
    stretches: tuple[tuple[int, int], ...] = ((14, 15),),
    **others: object,
) -> Site:
    """Three weeks of which every day is like the other, its hours and sessions given for one."""
    sessions = [
        (socket, day * 24 + arrival, day * 24 + departure, kwh, kw)
        for day in range(DAYS)
        for socket, arrival, departure, kwh, kw in rows or []
    ]
    daily = {key: np.tile(np.broadcast_to(v, 24), DAYS) for key, v in others.items()}  # pyright: ignore[reportArgumentType,reportCallIssue]
    hours = np.tile(np.broadcast_to(carbon, 24), DAYS)  # pyright: ignore[reportArgumentType,reportCallIssue]
    return hand_site(
        24 * DAYS,
        carbon=hours,
        sessions=sessions,
        battery=battery,
        stretches=stretches,
        **daily,  # pyright: ignore[reportArgumentType]
    )


def go(site: Site, begin: int, steps: int, soc: float = 0.5) -> Trace:
    model = priced_model(site)
    return run(model, mpc(site), start(model, site, np.array([begin]), soc), steps)[0]


def test_a_vehicle_charges_in_the_cleanest_hours_of_its_stay() -> None:
    carbon = np.where(HOURS == 13, 0.1, np.where(HOURS == 12, 0.2, 0.6))
    site = periodic(carbon, rows=[(0, 8, 18, 7.0, 5.0)])
    (day,) = play(priced_model(site), mpc(site), site, site.stretch_bounds)
    expected = np.where(HOURS == 13, 5.0, np.where(HOURS == 12, 2.0, 0.0))
    assert day.schedule.ev_kw == pytest.approx(expected, abs=1e-5)
    assert day.schedule.unmet_kwh.sum() == 0.0


def test_a_battery_takes_the_clean_hour_and_serves_the_dirty_one() -> None:
    carbon = np.where(HOURS == 3, 0.1, np.where(HOURS == 20, 0.9, 0.4))
    site = periodic(carbon, load_kw=np.where(HOURS == 20, 4.0, 0.0), battery=battery(4.0))
    trace = go(site, 14 * 24, 24, soc=0.0)
    expected = np.where(HOURS == 3, 4.0, np.where(HOURS == 20, -4.0, 0.0))
    assert trace.battery_kw[:, 0].numpy() == pytest.approx(expected, abs=1e-5)


def test_of_equal_hours_it_buys_in_the_last_and_leaves_room_for_the_sun() -> None:
    site = periodic(0.5, rows=[(0, 0, 6, 5.0, 5.0)])
    charged_kw = go(site, 14 * 24, 6).ev_kw[:, 0].numpy()
    assert charged_kw == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.0, 5.0], abs=1e-5)


def test_of_a_surplus_the_first_is_stored() -> None:
    site = periodic(
        0.5,
        pv_kw=np.where((HOURS > 7) & (HOURS < 16), 5.0, 0.0),
        load_kw=np.where(HOURS == 20, 5.0, 0.0),
        battery=battery(5.0),
    )
    stored_kw = go(site, 14 * 24, 24, soc=0.0).battery_kw[:, 0].numpy()
    assert stored_kw[8] == pytest.approx(5.0, abs=1e-5)
    assert stored_kw[20] == pytest.approx(-5.0, abs=1e-5)


def test_vehicles_that_are_expected_get_the_sun_that_a_vehicle_now_can_do_without() -> None:
    """The first could charge now or at noon; at noon another one comes that leaves 0.2 kWh."""
    noon = np.where((HOURS >= 11) & (HOURS < 13), 5.0, 0.0)
    rows: list[Row] = [(0, 9, 13, 5.0, 5.0), (1, 11, 13, 9.8, 5.0)]
    carbon = np.where(HOURS == 9, 0.4, 0.6)
    site = periodic(carbon, rows=rows, pv_kw=noon)
    alone = periodic(carbon, rows=rows[:1], pv_kw=noon)
    assert go(site, 14 * 24 + 9, 1).ev_kw.item() == pytest.approx(4.8, abs=1e-5)
    assert go(alone, 14 * 24 + 9, 1).ev_kw.item() == pytest.approx(0.0, abs=1e-5)


def test_it_charges_early_where_the_connection_would_be_too_small_later() -> None:
    rows: list[Row] = [(0, 8, 18, 25.0, 5.0), (1, 8, 18, 25.0, 5.0)]
    site = periodic(np.linspace(0.9, 0.1, 24), rows=rows, limit_kw=6.0)
    trace = go(site, 14 * 24 + 8, 10)
    assert trace.grid_kw.max() <= 6.0 + 1e-5
    assert trace.unmet_kw.sum() == 0.0
    assert trace.ev_kw.sum().item() == pytest.approx(50.0, abs=1e-4)


def test_a_battery_that_may_not_charge_from_the_grid_does_not() -> None:
    carbon = np.where(HOURS == 3, 0.01, 0.9)
    own = replace(battery(20.0, 10.0, 0.9), may_charge_from_grid=False)
    pv_kw = np.where((HOURS > 8) & (HOURS < 15), 6.0, 0.0)
    site = periodic(carbon, pv_kw=pv_kw, load_kw=1.0, rows=[(0, 9, 14, 4.0, 2.0)], battery=own)
    trace = go(site, 14 * 24, 48)
    charging = trace.battery_kw > 1e-5
    assert charging.any()
    assert (trace.grid_kw[charging] <= 1e-5).all()


# --- prices --------------------------------------------------------------------------------------


def priced(site: Site, price: object, credit: object = 0.0) -> Site:
    """The site with prices of each hour, settled by what it costs."""
    series = [np.tile(np.broadcast_to(hours, 24), DAYS) for hours in (price, credit)]  # pyright: ignore[reportArgumentType,reportCallIssue]
    own, export = (values.astype(float) for values in series)
    objective = Objective(co2=0.0, cost=1.0)
    return replace(site, price_per_kwh=own, export_price_per_kwh=export, objective=objective)


def test_where_import_is_paid_for_it_takes_what_the_site_can_use() -> None:
    """And no more: the battery has room for 4 kWh, the vehicle for 7."""
    price = np.where(HOURS == 13, -0.4, np.where(HOURS == 12, -0.1, 0.3))
    site = periodic(
        rows=[(0, 8, 18, 7.0, 5.0)],
        load_kw=np.where(HOURS == 20, 4.0, 0.0),
        pv_kw=np.where(HOURS == 13, 3.0, 0.0),
        battery=battery(4.0),
    )
    trace = go(priced(site, price), 14 * 24, 24, soc=0.0)
    vehicle_kw = np.where(HOURS == 13, 5.0, np.where(HOURS == 12, 2.0, 0.0))
    assert trace.ev_kw[:, 0].numpy() == pytest.approx(vehicle_kw, abs=1e-5)
    battery_kw = np.where(HOURS == 13, 4.0, np.where(HOURS == 20, -4.0, 0.0))
    assert trace.battery_kw[:, 0].numpy() == pytest.approx(battery_kw, abs=1e-5)


def test_a_full_battery_makes_room_for_what_is_paid_for() -> None:
    """A surplus that is thrown away costs nothing, a kWh then taken earns."""
    site = periodic(0.5, pv_kw=np.where(HOURS == 10, 1.0, 0.0), battery=battery(4.0))
    trace = go(priced(site, np.where(HOURS == 11, -0.9, 0.1)), 14 * 24 + 10, 2, soc=1.0)
    assert trace.battery_kw[:, 0].numpy() == pytest.approx([-4.0, 4.0], abs=1e-5)


@pytest.mark.parametrize(("credit", "begins"), [(0.3, 14), (0.0, 12)])
def test_a_surplus_is_sold_where_that_earns_more_than_it_saves(credit: float, begins: int) -> None:
    site = periodic(rows=[(0, 12, 16, 5.0, 5.0)], pv_kw=np.where(HOURS == 12, 5.0, 0.0))
    price = np.where(HOURS == 14, 0.1, 0.3)
    trace = go(priced(site, price, np.where(HOURS == 12, credit, 0.0)), 14 * 24 + 12, 4)
    expected = [5.0 if hour == begins else 0.0 for hour in range(12, 16)]
    assert trace.ev_kw[:, 0].numpy() == pytest.approx(expected, abs=1e-5)


def test_a_battery_sells_at_the_dearest_hour_where_that_earns_the_price() -> None:
    price = np.where(HOURS == 3, 0.1, np.where(HOURS == 20, 0.9, 0.4))
    site = periodic(load_kw=1.0, battery=battery(4.0, efficiency=0.95))
    bought_kw = go(priced(site, price, price), 14 * 24, 24, soc=0.0).battery_kw[:, 0].numpy()
    assert bought_kw[3] == pytest.approx(4.0 / 0.95, abs=1e-4)
    assert bought_kw[20] == pytest.approx(-4.0 * 0.95, abs=1e-4)
    saved_kw = go(priced(site, price), 14 * 24, 24, soc=0.0).battery_kw[:, 0].numpy()
    assert saved_kw.min() >= -1.0 - 1e-5


@pytest.mark.parametrize("price", [0.0, -0.2, 0.3])
@pytest.mark.parametrize("credit", [0.0, None, -0.1])
def test_prices_that_never_change_leave_nothing_undone(price: float, credit: float | None) -> None:
    site = periodic(
        rows=[(0, 8, 12, 15.0, 5.0)], load_kw=2.0, pv_kw=3.0 * (HOURS > 9), battery=battery()
    )
    trace = go(priced(site, price, max(price, 0.0) if credit is None else credit), 14 * 24, 24)
    assert trace.unmet_kw.sum() == 0.0
    assert trace.ev_kw.sum().item() == pytest.approx(15.0, abs=1e-4)
    assert trace.grid_kw.isfinite().all()


@pytest.mark.parametrize("factor", [0.25, 3.0, 40_000.0])
def test_with_price_in_proportion_to_carbon_every_plan_stays(factor: float) -> None:
    site = random_site(3, steps=24 * 8, battery=battery(9.0, 4.0, 0.9), stretches=[(6, 8)])
    price, objective = factor * site.carbon_kg_per_kwh, Objective(co2=0.0, cost=1.0)
    money = replace(site, price_per_kwh=price, objective=objective)
    ours, theirs = (go(each, 6 * 24, 48) for each in (site, money))
    assert ours.battery_kw.abs().sum() > 0.0
    for name in ("ev_kw", "battery_kw"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-6)


# --- on any site ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_site_vehicles_leave_served_and_two_runs_are_one(seed: int) -> None:
    site = random_site(seed, steps=24 * 8, stretches=[(6, 8)])
    first, again = (
        play(priced_model(site), mpc(site), site, site.stretch_bounds)[0] for _ in range(2)
    )
    for a, b in zip(first.schedule, again.schedule, strict=True):
        np.testing.assert_array_equal(a, b)
    evaluation = beside(evaluate(None, site), site, "mpc", [first])
    assert list(evaluation.policies)[-2:] == ["mpc", "optimum"]
    assert evaluation.policies["mpc"].unmet_kwh.max() < 1e-3
    bound_kg = evaluation.policies["optimum"].co2_kg - evaluation.tolerance
    assert (evaluation.policies["mpc"].co2_kg >= bound_kg).all()


@pytest.mark.parametrize("step_minutes", [5, 60])
def test_nothing_after_the_step_and_nothing_held_out_is_known(step_minutes: int) -> None:
    rng = np.random.default_rng(3)
    a_day = 24 * 60 // step_minutes
    site = random_site(
        4,
        steps=a_day * 16,
        step_minutes=step_minutes,
        battery=battery(),
        load_kw=rng.uniform(0, 5, a_day * 16),
        pv_kw=rng.uniform(0, 9, a_day * 16),
        stretches=[(8, 9), (12, 13)],
    )
    price = rng.uniform(-0.3, 0.5, site.n_steps)
    site = replace(
        site,
        price_per_kwh=price,
        export_price_per_kwh=0.5 * price.clip(0.0),
        objective=Objective(co2=0.3, cost=1.0),
    )
    begin, steps = 8 * a_day, a_day // 4
    now = begin + steps - 1
    later = ~site.training_steps & (np.arange(site.n_steps) > now)
    sessions = site.sessions
    arriving = later[sessions.arrival]
    assert arriving.any()
    other = replace(
        site,
        **{
            name: np.where(later, 7.0 + 3.0 * getattr(site, name), getattr(site, name))
            for name in (
                *("carbon_kg_per_kwh", "load_kw", "pv_kw", "import_limit_kw"),
                *("price_per_kwh", "export_price_per_kwh"),
            )
        },
        sessions=replace(
            sessions,
            energy_kwh=np.where(arriving, sessions.energy_kwh / 3, sessions.energy_kwh),
            max_kw=np.where(arriving, sessions.max_kw * 2, sessions.max_kw),
        ),
    )
    expected, found = (go(each, begin, steps) for each in (site, other))
    for name in ("ev_kw", "battery_kw"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert expected.battery_kw.abs().sum() > 0.0


# --- what is kept --------------------------------------------------------------------------------


def small() -> Site:
    carbon = np.where(HOURS == 13, 0.1, 0.6)
    rows: list[Row] = [(0, 8, 18, 7.0, 5.0)]
    return periodic(carbon, rows=rows, battery=battery(), stretches=((14, 15), (17, 18)))


def test_what_was_done_is_kept(tmp_path: Path) -> None:
    counts: list[int] = []
    first = play_mpc(small(), tmp_path, counts.append)
    assert counts == [1, 2]
    again = play_mpc(small(), tmp_path, counts.append)
    assert counts == [1, 2]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.stack(a.schedule), np.stack(b.schedule))
        np.testing.assert_array_equal(a.owed_kwh, b.owed_kwh)
        assert a.stored_kwh == b.stored_kwh
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("harm", ["cut", "changed", "directory"])
def test_what_is_damaged_is_computed_anew(tmp_path: Path, harm: str) -> None:
    first = play_mpc(small(), tmp_path)
    file = min(tmp_path.iterdir())
    content = file.read_bytes()
    file.unlink()
    if harm == "cut":
        file.write_bytes(content[:-8])
    elif harm == "changed":
        file.write_bytes(content[:-8] + b"\x01" + content[-7:])
    else:
        file.mkdir()
    counts: list[int] = []
    again = play_mpc(small(), tmp_path, counts.append)
    assert counts == [2]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.stack(a.schedule), np.stack(b.schedule))


def test_another_training_day_or_battery_is_another_result(tmp_path: Path) -> None:
    site, counts = small(), list[int]()
    play_mpc(site, tmp_path)
    held_out = site.held_out.copy()
    held_out[2] = True
    play_mpc(replace(site, held_out=held_out), tmp_path, counts.append)
    assert counts == [1, 2]
    play_mpc(replace(site, battery=battery(9.0)), tmp_path, counts.append)
    assert counts == [1, 2, 1, 2]


@pytest.mark.slow
def test_side_by_side_it_is_the_same(tmp_path: Path) -> None:
    site = replace(small(), stretches=np.array([[5, 16], [9, 20]]))
    alone, together = play_mpc(site, jobs=1), play_mpc(site, tmp_path, jobs=2)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(np.stack(a.schedule), np.stack(b.schedule))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gap"),
    [("iquitos", 0.95), (SITES / "caltech-2019", 0.43), (SITES / "citylearn-5", 0.87)],
)
def test_what_it_reaches(name: str | Path, gap: float) -> None:
    site = load_site(name, announced=False)
    evaluation = beside(evaluate(None, site), site, "mpc", play_mpc(site))
    closed = summarise(evaluation)["mpc"].gap_closed
    assert closed is not None
    assert closed >= gap
    assert evaluation.policies["mpc"].unmet_kwh.max() < 1e-3
    assert evaluation.policies["mpc"].over_limit_kwh.max() < 1e-3
