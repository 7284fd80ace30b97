"""What holds whatever drivers announce, and whatever they then do."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from co2lightning.control.rules import RULES
from co2lightning.control.state import Powers, SiteModel, State
from co2lightning.sim.objective import priced_model
from co2lightning.sim.physics import Flows, step
from co2lightning.sim.schedule import run, start
from co2lightning.site.model import Site, Told
from small_site import begin, random_site

seeds = st.integers(0, 2**32 - 1)
several = settings(max_examples=15, deadline=None, derandomize=True)


@st.composite
def liars(draw: st.DrawFn) -> Site:
    """A site whose drivers announce anything: too early, too late, too little, too much."""
    seed = draw(seeds)
    given = {
        "days": 2,
        "step_minutes": draw(st.sampled_from([15, 60])),
        "sockets": draw(st.integers(1, 7)),
        "min_kw": draw(st.sampled_from([0.0, 0.9])),
        "may_charge_from_grid": draw(st.booleans()),
        "import_limit_kw": draw(st.sampled_from([1e6, 9.0])),
        "capacity_kwh": draw(st.sampled_from([None, 20.0])),
    }
    site = random_site(seed, **given)
    rng, rows = np.random.default_rng(seed + 1), site.sessions
    stay = rows.departure - rows.arrival
    told = np.maximum(1, np.round(stay * rng.uniform(0.2, 2.5, len(stay)))).astype(np.int64)
    honest = rng.random(len(stay)) < 0.3
    told[honest] = stay[honest]
    most_kwh = 0.98 * rows.max_kw * site.step_h * told
    kwh = np.minimum(rows.energy_kwh * rng.uniform(0.2, 3.0, len(stay)), most_kwh)
    return dataclasses.replace(site, told=Told(rows.arrival + told, kwh))


def anything(site: Site, seed: int) -> list[Tensor | Powers]:
    """Wishes of all kinds: shares, and powers of each vehicle."""
    rng, columns = np.random.default_rng(seed), max(1, len(site.sessions.used_sockets))
    wishes: list[Tensor | Powers] = []
    for _ in range(site.n_steps):
        if rng.random() < 0.5:
            wishes.append(torch.tensor(rng.uniform(-1.2, 1.2, (1, 2)), dtype=torch.float64))
        else:
            socket_kw = torch.tensor(rng.uniform(-1.0, 5.0, (1, columns)) * rng.integers(0, 2))
            wishes.append(Powers(socket_kw, torch.tensor(rng.uniform(-9.0, 9.0, 1))))
    return wishes


def played(site: Site, wishes: list[Tensor | Powers]) -> tuple[list[State], list[Flows]]:
    model = priced_model(site, dtype=torch.float64)
    states, flows = [begin(model, 0.5 if site.battery else 0.0)], list[Flows]()
    for wish in wishes:
        following, flowed = step(model, states[-1], wish)
        states.append(following)
        flows.append(flowed)
    return states, flows


def given_kwh(site: Site, flows: list[Flows]) -> np.ndarray:
    """What each session took, [N]."""
    kwh = np.stack([flow.socket_kw[0].numpy() for flow in flows]) * site.step_h
    rows = site.sessions
    stays = zip(rows.arrival, rows.departure, rows.column, strict=True)
    return np.array([kwh[a:d, column].sum() for a, d, column in stays])


@several
@given(site=liars(), seed=seeds)
def test_who_stays_as_long_as_said_gets_what_was_said_or_all_it_takes(
    site: Site, seed: int
) -> None:
    states, flows = played(site, anything(site, seed))
    took_kwh, rows, told = given_kwh(site, flows), site.sessions, site.told
    assert told is not None
    wanted_kwh = np.minimum(told.energy_kwh, rows.energy_kwh)
    stayed = (rows.departure >= told.departure) & (told.departure <= site.n_steps)
    np.testing.assert_array_less(wanted_kwh[stayed] - 1e-6, took_kwh[stayed])
    # Never more than it can take, in all and in a step; and what it did not take is unmet.
    assert (took_kwh <= rows.energy_kwh + 1e-9).all()
    for state, flow in zip(states, flows, strict=False):
        assert state.true_kw is not None
        assert (flow.socket_kw <= torch.minimum(state.true_kw, state.power_kw) + 1e-9).all()
        assert (flow.socket_kw >= 0.0).all()
        assert (state.owed_kw >= 0.0).all()
    unmet_kwh, misled_kwh = (
        sum(float(of) for of in column) * site.step_h
        for column in zip(*((flow.unmet_kw, flow.misled_kw) for flow in flows), strict=True)
    )
    gone = rows.departure < site.n_steps
    left_kwh = (rows.energy_kwh - took_kwh).sum()
    np.testing.assert_allclose(unmet_kwh, left_kwh, atol=1e-6)
    assert gone.any() or not unmet_kwh
    # The shield serves what was said, so that all of it is due to what was said.
    np.testing.assert_allclose(misled_kwh, unmet_kwh, atol=1e-6)


@several
@given(site=liars(), seed=seeds)
def test_every_step_balances(site: Site, seed: int) -> None:
    states, flows = played(site, anything(site, seed))
    for state, flow in zip(states, flows, strict=False):
        for value in (*flow, *state.carry.parts):
            assert torch.isfinite(value).all()
        meter_kw = state.net_kw + flow.socket_kw.sum(1) + flow.battery_kw
        torch.testing.assert_close(flow.grid_kw, meter_kw, atol=1e-9, rtol=0.0)
        assert state.battery_min_kw - 1e-9 <= flow.battery_kw <= state.battery_max_kw + 1e-9
        # Beyond the connection's limit goes what must be charged alone.
        if flow.grid_kw > site.import_limit_kw[int(state.place)] + 1e-6:
            assert flow.socket_kw.sum() <= state.must_total_kw + 1e-6


@several
@given(site=liars())
def test_charging_on_arrival_asks_nobody(site: Site) -> None:
    """It is what it is where the truth is known, and leaves nothing that could be charged."""
    places, runs = np.array([0]), []
    for one in (site, site.truth):
        model = priced_model(one, dtype=torch.float64)
        begun = start(model, one, places, 0.5 if site.battery else 0.0)
        runs.append(run(model, RULES["uncontrolled"], begun, site.n_steps)[0])
    lied, true = runs
    for name in ("ev_kw", "grid_kw", "unmet_kw", "soc"):
        torch.testing.assert_close(getattr(lied, name), getattr(true, name), atol=1e-9, rtol=0.0)


@several
@given(site=liars(), seed=seeds, row=st.integers(0, 1000))
def test_a_future_that_does_not_show_is_not_seen(site: Site, seed: int, row: int) -> None:
    """Another true energy, another true departure: all is the same until one of them shows."""
    wishes, rows = anything(site, seed), site.sessions
    i = row % len(rows.socket)
    energy_kwh, departure = rows.energy_kwh.copy(), rows.departure.copy()
    energy_kwh[i] *= 1.7
    following = rows.arrival[(rows.socket == rows.socket[i]) & (rows.arrival >= departure[i])]
    departure[i] = min([site.n_steps, departure[i] + 5, *following.tolist()])
    other = dataclasses.replace(
        site, sessions=dataclasses.replace(rows, energy_kwh=energy_kwh, departure=departure)
    )
    (seen, flows), (otherwise, _) = played(site, wishes), played(other, wishes)
    # It shows after the step in which the vehicle has taken all, or leaves.
    took = np.array([flow.socket_kw[0, rows.column[i]] for flow in flows]) * site.step_h
    full = np.flatnonzero(took[rows.arrival[i] :].cumsum() > rows.energy_kwh[i] - 1e-9)
    for place in range(int(min([rows.departure[i] - 1, *(rows.arrival[i] + full)])) + 1):
        for name in State._fields:
            if name not in ("true_kw", "prices"):
                own, others = getattr(seen[place], name), getattr(otherwise[place], name)
                assert torch.equal(own, others), name


def test_honest_drivers_change_nothing() -> None:
    """Whose announcements are true is known as if the truth were known."""
    site = random_site(5, days=2)
    rows = site.sessions
    honest = dataclasses.replace(site, told=Told(rows.departure, rows.energy_kwh))
    for name, rule in RULES.items():
        traces = []
        for one in (site, honest):
            model: SiteModel = priced_model(one)
            traces.append(run(model, rule, start(model, one, np.array([0, 96]), 0.5), 96))
        (true, _), (told, ended) = traces
        assert not told.misled_kw.any()
        assert ended.true_kw is not None
        if name != "uncontrolled":  # which does not look at what was said
            assert torch.equal(ended.owed_kw, ended.true_kw)
            for field in ("battery_kw", "soc", "owed_kw"):
                assert torch.equal(getattr(true, field), getattr(told, field)), (name, field)
            torch.testing.assert_close(told.grid_kw, true.grid_kw, atol=1e-5, rtol=0.0)
