"""Rules that look ahead: cheap hours by hand, the windows of RBC C, and what a forecast may see."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from co2lightning.control.forecast import cheaper, forecast, to_come
from co2lightning.control.outlook import outlook_of
from co2lightning.control.rules import VEHICLES, Choice, Rule, Window, rbc_c, uncontrolled, words
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import Trace, run, start
from co2lightning.site.model import Site
from hand_site import battery, hand_site
from small_site import random_site


def ran(site: Site, rule: Rule, soc: float = 0.0, steps: int | None = None) -> Trace:
    """Run a rule from the first step on."""
    model = priced_model(site, dtype=torch.float64)
    return run(model, rule, start(model, site, np.array([0]), soc), steps or site.n_steps)[0]


def ev_kw(site: Site, choice: Choice, foresight: bool = True) -> list[float]:
    rule = functools.partial(rbc_c, choice, outlook_of(site, foresight=foresight))
    return ran(site, rule).ev_kw[:, 0].tolist()


# --- cheap hours ---------------------------------------------------------------------------------

CHEAP = Choice("cheap")
CARBON = [0.5, 0.3, 0.4, 0.2]


def test_a_vehicle_takes_the_cheapest_steps_of_its_stay_the_last_one_partial() -> None:
    site = hand_site(4, carbon=CARBON, sessions=[(0, 0, 4, 3.0, 2.0)])
    assert ev_kw(site, CHEAP) == pytest.approx([0.0, 1.0, 0.0, 2.0])


def test_each_vehicle_decides_for_itself() -> None:
    """The second one leaves before the cheapest step, so the first does not wait for it."""
    rows = [(0, 0, 4, 2.0, 2.0), (1, 0, 3, 2.0, 2.0)]
    site = hand_site(4, carbon=CARBON, sessions=rows)
    assert ev_kw(site, CHEAP) == pytest.approx([0.0, 2.0, 0.0, 2.0])


def test_what_is_cheaper_by_less_than_a_millionth_is_not_waited_for() -> None:
    for less, expected in ((5e-7, [2.0, 0.0]), (5e-6, [0.0, 2.0])):
        site = hand_site(2, carbon=[0.5, 0.5 - less], sessions=[(0, 0, 2, 2.0, 2.0)])
        assert ev_kw(site, CHEAP) == pytest.approx(expected)


def test_what_lies_beyond_two_days_counts_as_dearer() -> None:
    carbon = np.full(72, 0.5)
    carbon[[49, 50]] = 0.1  # 49 and 50 steps later: at the first step nobody sees them
    site = hand_site(72, carbon=carbon, sessions=[(0, 0, 60, 3.0, 2.0)])
    taken = ev_kw(site, CHEAP)
    assert taken[:2] == pytest.approx([2.0, 0.0])
    assert taken[49:51] == pytest.approx([1.0, 0.0])


def test_less_than_a_plug_can_give_waits() -> None:
    site = hand_site(4, carbon=CARBON, sessions=[(0, 0, 4, 3.0, 2.0)])
    site = replace(site, sessions=replace(site.sessions, min_kw=np.array([1.5])))
    assert ev_kw(site, CHEAP) == pytest.approx([0.0, 0.0, 1.5, 1.5])


def test_short_steps_stand_for_the_lead_they_lie_in() -> None:
    """Leads of 15 minutes over steps of 5: each counts three times."""
    now, expected = np.array([0.5, 0.5]), np.array([[0.1, 0.9], [0.9, 0.1]])
    counts = cheaper(now, expected, 3)
    assert counts.tolist() == [[0, 1, 2, 3, 3, 3, 3], *[[0, 0, 0, 0, 1, 2, 3]] * 2]
    site = hand_site(3 * 288, step_minutes=5, carbon=np.tile([0.5] * 144 + [0.2] * 144, 3))
    later = cheaper(site.carbon_kg_per_kwh, forecast(site, "carbon_kg_per_kwh"), 3)
    true = cheaper(site.carbon_kg_per_kwh, to_come(site.carbon_kg_per_kwh, 576))
    assert later.shape == true.shape
    assert np.abs(later - true)[:288].max() <= 2 * 4  # up to two steps at each change


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_with_the_truth_no_way_of_charging_alone_emits_less(seed: int) -> None:
    """Against 200 random ways: without battery, PV and limits each vehicle's cheapest is best."""
    site = random_site(seed, days=2, step_minutes=60, sockets=3, pv=0.0, capacity_kwh=None)
    rng = np.random.default_rng(seed)
    rule = functools.partial(rbc_c, CHEAP, outlook_of(site, foresight=True))
    best_kg = ran(site, rule).co2_kg.sum()

    def anything(model: object, state: object) -> torch.Tensor:
        return torch.as_tensor(rng.uniform(-1.0, 1.0, (200, 2)))

    model = priced_model(site, dtype=torch.float64)
    trace, _ = run(model, anything, start(model, site, np.zeros(200, int), 0.0), site.n_steps)
    assert trace.co2_kg.sum(0).min() >= best_kg - 1e-6


# --- sun and windows -----------------------------------------------------------------------------


def sunny(hours: int = 96, **more: object) -> Site:
    """A site with 5 kW of sun from 10 to 14, the same each day."""
    clock = np.arange(hours) % 24
    pv_kw = np.where((clock >= 10) & (clock < 14), 5.0, 0.0)
    return hand_site(hours, pv_kw=pv_kw, **more)  # pyright: ignore[reportArgumentType]


def test_sun_that_is_expected_costs_nothing() -> None:
    site = sunny(carbon=0.4, sessions=[(0, 6, 20, 6.0, 2.0)])
    on_arrival, from_ten = ([0.0] * a + [2.0] * 3 + [0.0] * 20 for a in (6, 10))
    for way, expected in zip(VEHICLES, (on_arrival, from_ten, on_arrival, from_ten), strict=True):
        assert ev_kw(site, Choice(way), foresight=False)[:23] == pytest.approx(expected[:23]), way


def test_a_window_across_midnight_in_which_all_charge() -> None:
    site = sunny(carbon=0.4, sessions=[(0, 20, 40, 6.0, 2.0)])
    taken = ev_kw(site, Choice("solar", charge=Window(23, 2)))
    assert np.flatnonzero(taken).tolist() == [23, 24, 34]


def test_fill_hold_and_serve() -> None:
    site = hand_site(48, load_kw=1.0, battery=battery(10.0, 5.0))
    choice = Choice(greedy=True, fill=Window(23, 3), fill_soc=0.8, hold=Window(22, 1))
    rule = functools.partial(rbc_c, choice, outlook_of(site))
    trace = ran(site, rule, soc=0.9, steps=28)
    taken = trace.battery_kw[:, 0].tolist()
    assert taken[:9] == pytest.approx([-1.0, 0.0, *[-1.0] * 7], abs=1e-6)  # to the level
    assert taken[17:23] == pytest.approx([0.0] * 6, abs=1e-6)  # empty, then held
    assert taken[23:] == pytest.approx([5.0, 3.0, 0.0, -1.0, -1.0], abs=1e-6)


def test_a_battery_that_may_not_charge_from_the_grid_is_filled_from_the_sun() -> None:
    own = battery(10.0, 5.0, may_charge_from_grid=False)
    site = sunny(24, load_kw=1.0, battery=own)
    choice = Choice(greedy=True, fill=Window(0, 24), fill_soc=1.0)
    trace = ran(site, functools.partial(rbc_c, choice, outlook_of(site)), soc=0.5)
    assert trace.battery_kw[:, 0].tolist() == pytest.approx([0.0] * 10 + [4.0, 1.0] + [0.0] * 12)


def test_rows_of_choices_are_each_as_alone() -> None:
    site = random_site(5, days=3)
    n = site.steps(24.0)
    some = [
        Choice("solar", Window(60, 8), True, Window(90, 12), 0.7, Window(70, 4)),
        Choice("solar", greedy=False),
        Choice("solar", Window(90, 20), True, hold=Window(0, n)),
    ]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def window(name: str) -> Window:
        windows = [getattr(choice, name) for choice in some]
        return Window(*(torch.tensor([w[i] for w in windows]) for i in (0, 1)))

    rows = Choice(
        vehicles="solar",
        charge=window("charge"),
        greedy=column([float(choice.greedy) for choice in some]),
        fill=window("fill"),
        fill_soc=column([float(choice.fill_soc) for choice in some]),
        hold=window("hold"),
    )
    model, outlook = priced_model(site, dtype=torch.float64), outlook_of(site)
    begun = start(model, site, np.zeros(3, int), 0.5)
    together, _ = run(model, functools.partial(rbc_c, rows, outlook), begun, site.n_steps)
    for i, choice in enumerate(some):
        alone = ran(site, functools.partial(rbc_c, choice, outlook), 0.5)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one[:, 0], other[:, i], rtol=1e-12, atol=1e-12)


def test_in_words() -> None:
    def site(step_minutes: int, **parts: object) -> Site:
        return random_site(1, days=1, step_minutes=step_minutes, **parts)

    choice = Choice("solar", Window(63, 7), True, Window(8, 12), 0.8, Window(68, 5))
    assert words(choice, site(15)) == (
        "charge all from 15:45 to 17:30, otherwise from the sun; battery: store surplus and serve "
        "the load, fill to 80 % from 02:00 to 05:00, hold from 17:00 to 18:15"
    )
    assert words(Choice(), site(15)) == "charge on arrival; battery: idle"
    night = Choice("cheap", Window(46, 6))
    assert words(night, site(30, capacity_kwh=None)) == (
        "charge all from 23:00 to 02:00, otherwise in the cheap hours of each stay"
    )
    all_day = Choice(greedy=True, hold=Window(5, 24))
    assert words(all_day, site(60, sockets=0)) == (
        "battery: store surplus and serve the load, hold all day"
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(VEHICLES), st.data())
def test_nobody_is_left_with_less_than_by_charging_on_arrival(
    seed: int, way: str, data: st.DataObject
) -> None:
    def drawn(most: int) -> int:
        return data.draw(st.integers(0, most))

    minutes = data.draw(st.sampled_from((5, 15, 60)))
    slots = 24 * 60 // minutes
    windows = [Window(drawn(slots - 1), drawn(slots)) for _ in range(3)]
    site = random_site(
        seed,
        days=2,
        step_minutes=minutes,
        min_kw=data.draw(st.sampled_from((0.0, 0.9))),
        grid_kw=data.draw(st.sampled_from((4.0, 1e6))),
        held_out=[1],
        most=1.3,
    )
    choice = Choice(way, windows[0], drawn(1) == 1, windows[1], drawn(10) / 10, windows[2])
    rule = functools.partial(rbc_c, choice, outlook_of(site, foresight=drawn(1) == 1))
    own, other = (ran(site, one, 0.5) for one in (rule, uncontrolled))
    assert own.unmet_kw.sum() <= other.unmet_kw.sum() + 1e-6
    assert torch.isfinite(torch.stack(list(own))).all()


# --- what a forecast may see ---------------------------------------------------------------------


def weeks(**more: object) -> Site:
    """Five weeks of hours, the third held out, every signal with noise in it."""
    rng = np.random.default_rng(7)
    hours = np.arange(5 * 168)
    wave = 1.0 + 0.4 * np.sin(hours / 24 * 2 * np.pi) + 0.2 * rng.standard_normal(len(hours))
    given = {"carbon": 0.4 * wave, "load_kw": 5.0 * wave[::-1], "pv_kw": np.maximum(wave - 1.0, 0)}
    return hand_site(len(hours), stretches=[(14, 21)], **(given | more))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("signal", ["carbon_kg_per_kwh", "load_kw", "pv_kw"])
def test_a_forecast_uses_nothing_after_its_step_and_nothing_held_out_for_its_fit(
    signal: str,
) -> None:
    site = weeks()
    place = int(site.stretch_bounds[0, 0]) + 50
    values = getattr(site, signal).copy()
    values[place : int(site.stretch_bounds[0, 1])] = 1e3
    poisoned = replace(site, **{signal: values})
    own, other = forecast(site, signal), forecast(poisoned, signal)
    assert own[:place] == pytest.approx(other[:place], abs=1e-8)  # sums round otherwise
    assert not np.isclose(own[place], other[place]).any()
    # Once nothing of it lies within the past week, all is as before.
    later = int(site.stretch_bounds[0, 1]) + 168
    assert own[later:] == pytest.approx(other[later:], abs=1e-8)


def test_a_rule_on_the_truth_of_the_past_alone_does_the_same() -> None:
    """What a rule does up to a step does not follow from what comes after it."""
    rows = [(0, a, a + 14, 8.0, 2.0) for a in range(14 * 24, 20 * 24, 24)]
    site = weeks(sessions=rows)
    begin, end = site.stretch_bounds[0].tolist()
    place = begin + 61
    poisoned_kg, poisoned_kw = site.carbon_kg_per_kwh.copy(), site.load_kw.copy()
    poisoned_kg[place:end] = 0.01
    poisoned_kw[place:end] = 50.0
    poisoned = replace(site, carbon_kg_per_kwh=poisoned_kg, load_kw=poisoned_kw)
    for way in ("cheap", "solar_cheap"):
        own, other = (ev_kw(one, Choice(way), foresight=False) for one in (site, poisoned))
        assert own[:place] == pytest.approx(other[:place], abs=1e-6)
        assert sum(own[begin:place]) > 0.0


def test_what_no_training_step_shows_is_expected_as_the_mean() -> None:
    """Less than a week in all, one day of it to train on."""
    site = hand_site(48, carbon=np.tile([0.4, 0.6], 24), stretches=[(1, 2)])
    expected = forecast(site, "carbon_kg_per_kwh")
    assert np.isfinite(expected).all()
    assert expected[10, :4] == pytest.approx([0.6, 0.4, 0.6, 0.4])
