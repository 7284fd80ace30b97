"""Other worlds of a site: more known, held-out days that go otherwise; the rest stays as it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from co2lightning.control.observation import NAMES, as_rule
from co2lightning.sim.evaluate import elsewhere, evaluate, summarise
from co2lightning.sim.scales import observer_of
from co2lightning.sim.schedule import start_soc
from co2lightning.sim.search import choice_of
from co2lightning.sim.worlds import KNOWLEDGE, PERTURBATIONS, knowing, perturbed
from co2lightning.site.model import Floats, Objective, Site
from small_site import real, small_site


@pytest.fixture(scope="module")
def site() -> Site:
    """Five weeks, the fourth held out: vehicles on half of the sockets, PV, a carbon that lasts."""
    rng = np.random.default_rng(0)
    days, hour = 35, np.arange(24)
    noise = rng.normal(size=24 * days + 11)
    carbon = 0.5 + 0.1 * np.convolve(noise, np.ones(12), "valid") / 12**0.5
    sun = np.clip(np.sin((hour - 6) / 12 * np.pi), 0.0, None)
    sessions = [
        (day, socket, 7 + (day + socket) % 3, 15 + (day * socket) % 5, 8.0, 4.0)
        for day in range(days)
        for socket in range(day % 2, 4, 2)
    ]
    return small_site(
        days=days,
        step_minutes=60,
        sockets=4,
        sessions=sessions,
        pv_kw=10.0 * rng.uniform(0.3, 1.0, (days, 1)) * sun,
        load_kw=2.0 + rng.uniform(0.0, 1.0, (days, 24)),
        carbon=carbon.reshape(days, 24),
        held_out=range(21, 28),
    )


def rows(of: Site, held_out: bool) -> list[tuple[float, ...]]:
    """Return the sessions that arrive in held-out steps, or in the others, and what is said."""
    sessions, told = of.sessions, of.sessions_told
    columns = (
        *(sessions.arrival, sessions.departure, sessions.energy_kwh, sessions.max_kw),
        *(told.departure, told.energy_kwh),
    )
    chosen = of.training_steps[sessions.arrival] != held_out
    return sorted(zip(*(column[chosen].tolist() for column in columns), strict=True))


def test_nothing_is_changed_in_training_steps(site: Site) -> None:
    worlds, known = perturbed(site), site.training_steps
    assert list(worlds) == list(PERTURBATIONS)
    for name, world in worlds.items():
        for series in ("pv_kw", "load_kw", "carbon_kg_per_kwh"):
            same = getattr(world, series) == getattr(site, series)
            assert same[known].all()
            assert same.all() == (series != "pv_kw" or "pv" not in name)
        assert rows(world, held_out=False) == rows(site, held_out=False)
        assert (rows(world, True) != rows(site, True)) == (name in _OF_VEHICLES)
        # What is fitted and chosen, and what is measured in.
        assert choice_of(world) == choice_of(site)
        assert start_soc(world) == start_soc(site)
        own, there = observer_of(site), observer_of(world)
        assert there.centre == own.centre
        assert torch.equal(there.scale, own.scale)
        assert torch.equal(there.moves.mask, own.moves.mask)


_OF_VEHICLES = "departures", "fewer_arrivals", "more_arrivals"


def test_what_is_perturbed_by_hand(site: Site) -> None:
    worlds, held_out = perturbed(site), ~site.training_steps
    assert worlds["less_pv"].pv_kw[held_out] == pytest.approx(0.8 * site.pv_kw[held_out])
    assert worlds["more_pv"].pv_kw[held_out] == pytest.approx(1.2 * site.pv_kw[held_out])
    told = worlds["departures"].told
    comes = held_out[site.sessions.arrival]
    assert told is not None
    off = (told.departure - site.sessions.departure)[comes]
    assert set(off.tolist()) == {-1, 1}
    fourteen = int(comes.sum())
    assert len(worlds["fewer_arrivals"].sessions.arrival) == len(comes) - round(0.2 * fourteen)
    more = worlds["more_arrivals"].sessions
    assert len(more.arrival) == len(comes) + round(0.2 * fourteen), "half of the sockets are free"
    assert (np.diff(more.arrival) >= 0).all()
    for socket in more.used_sockets:
        own = more.socket == socket
        assert (more.departure[own][:-1] <= more.arrival[own][1:]).all(), "one at a time"


def test_who_finds_no_free_socket_does_not_come() -> None:
    sessions = [(day, 0, 0, 96, 5.0, 4.0) for day in range(21)]
    full = small_site(days=21, sessions=sessions, held_out=range(7, 14))
    worlds = perturbed(full)
    assert len(worlds["more_arrivals"].sessions.arrival) == 21
    assert "less_pv" not in worlds, "there is none"
    assert "usual_price" not in worlds, "it never changes"
    assert not {"departures", "fewer_arrivals"} & perturbed(small_site(days=14)).keys()


def test_a_rule_that_asks_nobody_is_unchanged_by_what_is_expected(site: Site) -> None:
    as_it_is, usual = evaluate(None, site), evaluate(None, perturbed(site)["usual_price"])
    for name in ("uncontrolled", "rbc_a", "rbc_b", "optimum"):
        assert np.array_equal(usual.policies[name].settled, as_it_is.policies[name].settled)
    assert (usual.policies["cheap"].settled != as_it_is.policies["cheap"].settled).any()


def watched(site: Site) -> tuple[list[Tensor], Floats]:
    """Return what a policy observes on held-out days, and what it then comes to."""
    seen: list[Tensor] = []

    def act(observed: Tensor) -> Tensor:
        seen.append(observed.clone())
        return torch.tanh(observed[:, :10])

    found = evaluate(as_rule(observer_of(site), act), site)
    return seen, found.policies["agent"].settled


def test_a_perfect_forecast_is_observed(site: Site) -> None:
    world = knowing(site)["forecast"]
    for seen_in, known in ((world, True), (site, False)):
        seen, _ = watched(seen_in)
        column, observer = NAMES.index("price_mean_2_h"), observer_of(seen_in)
        observed = torch.stack([step[0, column] for step in seen]).double().numpy()
        observed = observed * observer.spread[column] + observer.centre[column]
        begin, _ = site.stretch_bounds[0]
        price = site.carbon_kg_per_kwh
        places = np.arange(begin, begin + len(observed))
        true = (price[places + 1] + price[places + 2]) / 2 - price[places]
        assert np.allclose(observed, true, atol=1e-6) == known


def test_a_world_that_is_the_same_has_the_same_figures(site: Site) -> None:
    same, evaluation = replace(site, fitted_on=site), evaluate(None, site)
    assert np.array_equal(watched(same)[1], watched(site)[1])
    for found in (evaluate(None, same), elsewhere(evaluation, same)):
        assert found.policies.keys() == evaluation.policies.keys()
        for name, figures in found.policies.items():
            for column, own in zip(figures, evaluation.policies[name], strict=True):
                assert np.array_equal(column, own)


def test_what_is_spared_changes_no_figure(site: Site) -> None:
    evaluation = evaluate(None, site)
    for world in (*knowing(site).values(), *perturbed(site).values()):
        spared, whole = summarise(elsewhere(evaluation, world)), summarise(evaluate(None, world))
        for name, summary in whole.items():
            assert spared[name].gap_closed == pytest.approx(summary.gap_closed, abs=1e-9)
            assert spared[name].unmet_kwh == pytest.approx(summary.unmet_kwh, abs=1e-9)
            assert spared[name].misled_kwh == summary.misled_kwh


def test_knowing_the_truth_of_vehicles_and_carbon_is_the_optimum() -> None:
    told = real("caltech-2019", announced=True)
    worlds, evaluation = knowing(told), evaluate(None, told)
    assert list(worlds) == list(KNOWLEDGE)
    share = {
        name: summarise(elsewhere(evaluation, world))["cheap"].gap_closed
        for name, world in worlds.items()
    }
    truth = real("caltech-2019")
    of_truth = summarise(evaluate(None, truth))["cheap"].gap_closed
    assert share["announcements"] == pytest.approx(of_truth, abs=1e-6)
    assert share["all"] == pytest.approx(1.0, abs=1e-3)
    assert list(knowing(truth)) == ["forecast"], "nothing else is told"


def test_a_price_that_is_known_stays_known(site: Site) -> None:
    of_cost = replace(site, price_per_kwh=site.carbon_kg_per_kwh, objective=Objective(0.0, 1.0))
    assert perturbed(of_cost)["usual_price"].known_ahead == {"price_per_kwh": "usual"}
    assert "usual_price" not in perturbed(replace(of_cost, known_ahead={"price_per_kwh": "13:00"}))
