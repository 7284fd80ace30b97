"""Runs: the whole series in one go, stretches, and that time goes on between them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hand_site
from co2lightning.control.rules import RULES, Rule, rbc_a, rbc_b, uncontrolled
from co2lightning.control.state import SiteModel, State, restore
from co2lightning.sim.objective import priced_model
from co2lightning.sim.physics import step
from co2lightning.sim.schedule import Course, Played, Trace, play, run, start, start_soc, through
from co2lightning.site.load import load_site
from co2lightning.site.model import Site
from small_site import random_site, real, shipped, small_site, write_site


def hesitant(model: SiteModel, state: State) -> Tensor:
    """Charge a little by day, give a little by night: most batteries never fill or empty."""
    wave = (state.place * model.step_h / 24.0 * 6.2831853).sin()
    return torch.stack([0.3 * wave, 0.02 * wave + 0.005], dim=1)


POLICIES: dict[str, Rule] = {**RULES, "hesitant": hesitant}


def close(own: Course, plain: Trace, slack_kw: float = 0.0) -> None:
    """Compare each figure of two runs, to rounding of its own size."""
    for name, values in own._asdict().items():
        expected = getattr(plain, name)[:, 0].double().numpy()
        near = 2e-5 * max(1.0, np.abs(expected).max()) + slack_kw
        np.testing.assert_allclose(values, expected, atol=near, err_msg=name)


# --- the whole series ----------------------------------------------------------------------------

HOURS = {"days": 9, "step_minutes": 60}
WHOLE: dict[str, dict[str, Any]] = {
    "all parts": {"days": 4},
    "5 minutes": {"days": 2, "step_minutes": 5, "sockets": 3},
    "60 minutes": {"days": 14, "step_minutes": 60},
    "never full": {**HOURS, "capacity_kwh": 1e4, "power_kw": 900.0},
    "sun all day": {**HOURS, "pv": 20.0, "capacity_kwh": 2e3},
    "tiny": {**HOURS, "capacity_kwh": 0.5},
    "no battery": {**HOURS, "capacity_kwh": None},
    "battery alone": {**HOURS, "sockets": 0, "load": 0.0},
    "kept for outages": {**HOURS, "reserve_soc": 0.5},
    "short": {**HOURS, "grid_kw": 5.0},
    "least power": {**HOURS, "min_kw": 0.9},
}
BY_HAND: dict[str, Site] = {
    "stays of days": small_site(
        days=9, step_minutes=60, sessions=[(0, 0, 5, 150, 80.0, 1.0)], pv_kw=2.0, load_kw=1.0
    ),
    "not whole days": hand_site.random_site(1, steps=131),
    "shorter than a day": hand_site.random_site(1, steps=11),
    "a step": hand_site.hand_site(1, load_kw=3.0),
}


@functools.cache
def whole(name: str) -> Site:
    return BY_HAND[name] if name in BY_HAND else random_site(len(name), **WHOLE[name])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [*WHOLE, *BY_HAND])
def test_pieces_side_by_side_are_the_series_in_one_go(name: str, policy: str) -> None:
    site, model = whole(name), priced_model(whole(name))
    soc = site.battery.soc_min if site.battery else 0.0
    plain, _ = run(model, POLICIES[policy], start(model, site, np.array([0]), soc), site.n_steps)
    close(through(site, POLICIES[policy]), plain)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["iquitos", "citylearn-5"])
def test_a_year_in_pieces_is_a_year_in_one_go(name: str, policy: str) -> None:
    site = shipped(name) if name == "iquitos" else real(name)
    assert site.battery
    model = priced_model(site)
    begun = start(model, site, np.array([0]), site.battery.soc_min)
    plain, _ = run(model, POLICIES[policy], begun, site.n_steps)
    # What fills the battery in a step is as well known as what it holds.
    slack_kw = 2e-6 * site.battery.capacity_kwh / site.step_h
    close(through(site, POLICIES[policy]), plain, slack_kw)


def test_evaluation_begins_with_what_rbc_b_has_when_training_days_begin() -> None:
    assert start_soc(shipped()) == 0.10
    assert start_soc(real("citylearn-5")) == 0.04
    assert start_soc(real("caltech-2019")) == 0.0


@pytest.mark.parametrize("held_out", [[], [3], [0, 1, 2, 3, 5]])
def test_held_out_days_do_not_count_for_the_start(held_out: list[int]) -> None:
    """The sun is always there: RBC B fills the battery day by day."""
    site = small_site(days=6, load_kw=1.0, pv_kw=1.5, capacity_kwh=80.0, held_out=held_out)
    stored_kwh = 0.5 * 0.9 * 24 * np.arange(6)
    soc = np.minimum(0.1 + stored_kwh / 80.0, 0.9)[~site.held_out]
    assert start_soc(site) == pytest.approx(soc.mean(), abs=0.00501)
    assert start_soc(site) == round(start_soc(site), 2)


# --- state is carried over -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("step_minutes", [5, 15, 60])
def test_days_in_one_go_are_days_one_after_the_other(policy: str, step_minutes: int) -> None:
    """Battery and vehicles go on across midnight; nothing else is passed on."""
    site = random_site(3, days=2, step_minutes=step_minutes)
    model, rule, a_day = priced_model(site), POLICIES[policy], site.steps(24.0)
    begun = start(model, site, np.array([0]), 0.5)
    in_one_go, ended = run(model, rule, begun, 2 * a_day)
    first, carry = run(model, rule, begun, a_day)
    assert carry.owed_kw.any(), "no vehicle stays over midnight"
    second, carry = run(model, rule, carry, a_day)
    for name in Trace._fields:
        chained = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(getattr(in_one_go, name), chained), name
    assert all(torch.equal(a, b) for a, b in zip(ended.parts, carry.parts, strict=True))


def test_a_run_is_single_steps_one_after_the_other() -> None:
    site = random_site(4, days=2, step_minutes=60)
    model = priced_model(site)
    trace, ended = run(model, rbc_b, start(model, site, np.array([0]), 0.5), 48)
    carry = start(model, site, np.array([0]), 0.5)
    for t in range(48):
        state = restore(model, carry)
        following, flows = step(model, state, rbc_b(model, state))
        carry = following.carry
        assert torch.equal(flows.grid_kw, trace.grid_kw[t])
        assert torch.equal(flows.soc, trace.soc[t])
        assert torch.equal(state.owed_kw.sum(1), trace.owed_kw[t])
    assert all(torch.equal(a, b) for a, b in zip(ended.parts, carry.parts, strict=True))


def test_who_stands_there_owes_what_charging_on_arrival_has_left() -> None:
    """5 kWh at 2 kW, 1 h before: 3 kWh. Who has had enough owes nothing, who arrives all."""
    rows = [
        (0, 0, 20, 40, 5.0, 2.0),
        (0, 1, 4, 40, 1.0, 2.0),
        (0, 2, 24, 40, 4.0, 2.0),
        (0, 3, 0, 24, 9.0, 2.0),
    ]
    site = small_site(sockets=4, sessions=rows)
    carry = start(priced_model(site), site, np.array([24]), 0.5)
    np.testing.assert_allclose(carry.owed_kw[0] * 0.25, [3.0, 0.0, 4.0, 0.0])
    np.testing.assert_allclose(site.owed_on_arrival_kwh(24), [3.0, 0.0, 4.0, 0.0])


@pytest.mark.parametrize("name", ["all parts", "5 minutes", "60 minutes", "no battery"])
def test_uncontrolled_arrives_where_charging_on_arrival_does(name: str) -> None:
    """What is owed at each midnight is what a stretch begun there would begin with."""
    site = whole(name)
    course = through(site, uncontrolled)
    for place in site.day_bounds[1:-1].tolist():
        owed_kwh = course.owed_kw[place] * site.step_h
        assert owed_kwh == pytest.approx(site.owed_on_arrival_kwh(place).sum(), abs=1e-4)


# --- stretches -----------------------------------------------------------------------------------


@functools.cache
def stretched() -> Site:
    """Two stretches of three days, and single ones."""
    site = random_site(6, days=14, step_minutes=60, held_out=[2, 3, 4, 7, 9, 10, 11, 13])
    return dataclasses.replace(site, stretches=np.array([[2, 5], [7, 8], [9, 12], [13, 14]]))


def test_each_stretch_is_played_in_one_go_from_the_same_battery() -> None:
    site = stretched()
    model, bounds = priced_model(site), site.stretch_bounds
    for rule in (rbc_b, hesitant):
        together = play(model, rule, site, bounds)
        assert [len(one.schedule.soc) for one in together] == [72, 24, 72, 24]
        if rule is hesitant:
            assert together[0].stored_kwh != together[2].stored_kwh
        for (begin, end), own in zip(bounds.tolist(), together, strict=True):
            begun = start(model, site, np.array([begin]), start_soc(site))
            trace, ended = run(model, rule, begun, end - begin)
            alone = play(model, rule, site, np.array([[begin, end]]))[0]
            check_played(site, own, trace, ended.soc.item(), ended.owed_kw[0])
            for one, other in zip(own.schedule, alone.schedule, strict=True):
                np.testing.assert_array_equal(one, other)


def check_played(site: Site, own: Played, trace: Trace, soc: float, owed_kw: Tensor) -> None:
    plan, grid_kw = own.schedule, trace.grid_kw[:, 0].numpy()
    np.testing.assert_allclose(plan.grid_import_kw, np.maximum(grid_kw, 0.0), rtol=1e-6)
    np.testing.assert_allclose(plan.curtailed_kwh, np.maximum(-grid_kw, 0.0), rtol=1e-6)
    np.testing.assert_allclose(plan.unmet_kwh, trace.unmet_kw[:, 0].numpy(), rtol=1e-6)
    for name in ("ev_kw", "battery_kw", "soc", "co2_kg"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(trace, name)[:, 0].numpy())
    assert site.battery
    assert own.stored_kwh == pytest.approx(soc * site.battery.capacity_kwh, rel=1e-6)
    np.testing.assert_allclose(own.owed_kwh, owed_kw.numpy() * site.step_h, rtol=1e-6)


def test_what_is_left_holds_the_arrivals_of_that_moment() -> None:
    rows = [(0, 0, 90, 100, 4.0, 2.0), (1, 1, 0, 20, 3.0, 2.0)]
    site = small_site(days=3, sockets=2, sessions=rows, held_out=[0])
    model = priced_model(site)
    (on_arrival,) = play(model, uncontrolled, site, site.stretch_bounds)
    np.testing.assert_allclose(on_arrival.owed_kwh, [1.0, 3.0], atol=1e-6)
    (late,) = play(model, rbc_b, site, site.stretch_bounds)
    np.testing.assert_allclose(late.owed_kwh, [4.0 - 4 * 0.5, 3.0], atol=1e-6)
    # With the series' end everybody leaves.
    (last,) = play(model, rbc_b, site, np.array([[0, site.n_steps]]))
    np.testing.assert_allclose(last.owed_kwh, 0.0)


@pytest.mark.parametrize("parts", [{"capacity_kwh": None}, {"sockets": 0}])
def test_a_stretch_of_a_site_without_a_part(parts: dict[str, Any]) -> None:
    site = random_site(6, days=3, step_minutes=60, held_out=[1], **parts)
    (own,) = play(priced_model(site), rbc_b, site, site.stretch_bounds)
    assert len(own.owed_kwh) == len(site.sessions.used_sockets)
    if not site.battery:
        assert own.stored_kwh == 0.0
        assert not own.schedule.soc.any()
        assert not own.schedule.battery_kw.any()


def test_more_stretches_than_are_played_at_once_stay_in_order() -> None:
    site = random_site(8, days=80, step_minutes=60, sockets=2, held_out=range(70))
    together = play(priced_model(site), rbc_b, site, site.stretch_bounds)
    assert len(together) == 70
    for row in (0, 34, 35, 63, 64, 69):
        alone = play(priced_model(site), rbc_b, site, site.stretch_bounds[[row]])[0]
        np.testing.assert_array_equal(alone.schedule.co2_kg, together[row].schedule.co2_kg)


# --- the length of a step ------------------------------------------------------------------------


def by_the_hour(folder: Path, directory: Path) -> Path:
    """Write a folder of 15-minute steps anew in steps of an hour, vehicles as they are."""
    directory.mkdir()
    for file in ("site.yaml", "sessions.csv"):
        (directory / file).write_text((folder / file).read_text())
    header, *rows = (folder / "series.csv").read_text().splitlines()
    times = [row.split(",")[0] for row in rows[::4]]
    values = np.array([[float(v) for v in row.split(",")[1:]] for row in rows])
    hourly = values.reshape(-1, 4, values.shape[1]).mean(1)
    lines = [
        ",".join([t, *(f"{v:.6f}" for v in row)]) for t, row in zip(times, hourly, strict=True)
    ]
    (directory / "series.csv").write_text("\n".join([header, *lines]) + "\n")
    return directory


def test_a_day_is_a_day_in_24_steps_and_in_96(tmp_path: Path) -> None:
    quarter = load_site(write_site(tmp_path / "village"))
    hour = load_site(by_the_hour(tmp_path / "village", tmp_path / "hourly"))
    assert (quarter.step_minutes, hour.step_minutes) == (15, 60)
    assert (quarter.n_steps, hour.n_steps) == (6 * 96, 6 * 24)
    assert quarter.days == hour.days
    assert quarter.turned_away.sum() == hour.turned_away.sum() == 0
    for name in ("pv_kw", "load_kw"):
        kwh = [getattr(site, name).sum() * site.step_h for site in (quarter, hour)]
        assert kwh[1] == pytest.approx(kwh[0], rel=1e-3)
    kwh = [site.sessions.energy_kwh.sum() for site in (quarter, hour)]
    assert kwh[1] == pytest.approx(kwh[0], rel=1e-3)
    for rule in RULES.values():
        kg = [through(site, rule).co2_kg.sum() for site in (quarter, hour)]
        assert kg[1] == pytest.approx(kg[0], rel=0.05)
        unmet_kw = [through(site, rule).unmet_kw.max() for site in (quarter, hour)]
        assert max(unmet_kw) < 1e-6


@pytest.mark.parametrize("step_minutes", [5, 10, 20, 30, 60])
def test_steps_of_any_length_agree_where_nothing_happens_within_them(step_minutes: int) -> None:
    """Series by the hour, vehicles that come and go on the hour and take whole hours."""
    rng = np.random.default_rng(0)
    hourly = {
        "pv_kw": np.maximum(rng.uniform(-10.0, 15.0, (2, 24)), 0.0),
        "load_kw": rng.uniform(1.0, 6.0, (2, 24)),
        "carbon": rng.uniform(0.2, 0.9, (2, 24)),
    }
    stays = [(0, 0, 2, 9, 12.0, 4.0), (0, 0, 11, 30, 9.0, 3.0), (0, 1, 20, 40, 8.0, 2.0)]

    def site(minutes: int) -> Site:
        n = 60 // minutes
        return small_site(
            days=2,
            step_minutes=minutes,
            sockets=2,
            sessions=[(d, s, n * a, n * b, kwh, kw) for d, s, a, b, kwh, kw in stays],
            **{name: np.repeat(values, n, axis=1) for name, values in hourly.items()},
        )

    own, hours = site(step_minutes), site(60)
    for rule in (uncontrolled, rbc_a):
        kg = [through(one, rule).co2_kg.sum() for one in (own, hours)]
        assert kg[0] == pytest.approx(kg[1], rel=1e-5)
    assert through(own, rbc_b).co2_kg.sum() == pytest.approx(
        through(hours, rbc_b).co2_kg.sum(), rel=0.05
    )
