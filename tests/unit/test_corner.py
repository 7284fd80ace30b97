"""Where a policy begins: the best corner of a site's moves, and equal weights where asked for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from co2lightning.agents import AGENTS, agent_class
from co2lightning.agents.agent import Agent
from co2lightning.agents.load import load_agent
from co2lightning.control.moves import (
    MOVES,
    Corner,
    corners,
    in_words,
    move_tables,
    moves_of,
    powers_of,
)
from co2lightning.control.outlook import outlook_of
from co2lightning.control.state import Powers, SiteModel, State
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import play
from co2lightning.sim.search import corner_of
from co2lightning.sim.weeks import training_weeks
from co2lightning.site.load import load_site
from co2lightning.site.model import Site
from conftest import Outcome
from hand_site import battery, hand_site
from small_site import real, write_site

Fit = Callable[..., Outcome]
HOURS = 6 * 7 * 24
CLOCK = np.arange(HOURS) % 24
SAID = "Starting from the corner: "


def six_weeks(**parts: object) -> Site:
    """Six weeks of hours, the last one held out."""
    return hand_site(HOURS, **({"stretches": [(35, 42)]} | parts))  # pyright: ignore[reportArgumentType]


def each_day(
    kwh: float, begin: int = 18, hours: int = 12
) -> list[tuple[int, int, int, float, float]]:
    """Return the sessions of a vehicle that comes every day, at 4 kW."""
    return [(0, day * 24 + begin, day * 24 + begin + hours, kwh, 4.0) for day in range(41)]


# --- which corner --------------------------------------------------------------------------------

CLEAN_NIGHT = np.where((CLOCK >= 1) & (CLOCK < 5), 0.1, 0.6)
SUN_KW = np.where((CLOCK >= 11) & (CLOCK < 14), 10.0, 0.0)
BY_HAND = {
    # Carbon is low from 1 to 5, vehicles stand there from 18 to 6.
    "cheap hold": six_weeks(carbon=CLEAN_NIGHT, sessions=each_day(8.0)),
    # They come before the sun does, and stay.
    "solar hold": six_weeks(pv_kw=SUN_KW, sessions=each_day(8.0, begin=8, hours=10)),
    # A surplus at noon, a load all day.
    "must greedy": six_weeks(pv_kw=SUN_KW, load_kw=2.0, battery=battery(10.0, 5.0, 0.9)),
    # Nothing varies: what little the other moves fill in is best given back at once.
    "must serve": six_weeks(load_kw=2.0, battery=battery(10.0, 5.0, 0.8)),
    # Clean when they come, and sun before they leave, of which the battery has better use.
    "could greedy": six_weeks(
        carbon=np.where(CLOCK < 12, 0.6, 0.1),
        pv_kw=np.where((CLOCK >= 2) & (CLOCK < 5), 8.0, 0.0),
        load_kw=1.0,
        sessions=each_day(8.0),
        battery=battery(10.0, 5.0, 0.9),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_best_corner_is_found(name: str) -> None:
    corner = corner_of(BY_HAND[name])
    assert corner is not None
    found = MOVES[corner.vehicles][0], MOVES[5 + corner.battery][0]
    assert " ".join(found) == name


@pytest.mark.parametrize("name", BY_HAND)
def test_no_other_corner_costs_less(name: str) -> None:
    """One after another, week by week, settled by hand."""
    site = BY_HAND[name]
    model = priced_model(site)
    tables = move_tables(site, model, outlook_of(site))
    left_kg = 0.8 * site.carbon_kg_per_kwh[site.training_steps].mean()

    def kg_of(corner: Corner) -> float:
        action = torch.tensor([corner.action()])

        def rule(model: SiteModel, state: State) -> Tensor | Powers:
            moves = moves_of(tables, model, state)
            return powers_of(tables, model, state, moves, action.expand(len(state.soc), -1))

        weeks = play(model, rule, site, training_weeks(site))
        left_kwh = sum(week.owed_kwh.sum() - week.stored_kwh for week in weeks)
        return sum(week.schedule.co2_kg.sum() for week in weeks) + left_kg * left_kwh

    found = corner_of(site)
    assert found is not None
    best = min(kg_of(corner) for corner in corners(tables))
    assert kg_of(found) == pytest.approx(best, rel=1e-4)


def test_nothing_held_out_is_looked_at() -> None:
    site = BY_HAND["cheap hold"]
    (begin, end), carbon = site.stretch_bounds[0], site.carbon_kg_per_kwh.copy()
    carbon[begin:end] = np.where(CLOCK[begin:end] < 12, 50.0, 0.0)
    assert corner_of(replace(site, carbon_kg_per_kwh=carbon)) == corner_of(site)


@pytest.mark.parametrize(
    ("site", "vehicles", "store"),
    [
        (real("caltech-2019"), {"must", "cheap", "could"}, {"hold"}),
        (real("citylearn-5"), {"must"}, {"hold", "store", "serve", "greedy", "fill"}),
        (BY_HAND["must serve"], {"must"}, {"hold", "serve", "fill"}),
        (BY_HAND["solar hold"], {"must", "solar", "cheap", "could"}, {"hold"}),
        (
            six_weeks(load_kw=2.0, battery=battery(10.0, 5.0, may_charge_from_grid=False)),
            {"must"},
            {"hold", "serve"},
        ),
    ],
)
def test_what_a_site_cannot_do_is_no_corner(
    site: Site, vehicles: set[str], store: set[str]
) -> None:
    tried = corners(move_tables(site, priced_model(site), outlook_of(site)))
    assert {MOVES[corner.vehicles][0] for corner in tried} == vehicles
    assert {MOVES[5 + corner.battery][0] for corner in tried} == store
    assert len(tried) == len(vehicles) * len(store)
    assert corner_of(site) in tried


def test_a_site_that_is_never_whole_is_searched_by_days() -> None:
    few = hand_site(
        6 * 24,
        carbon=np.where((CLOCK >= 12) & (CLOCK < 16), 0.1, 0.6)[: 6 * 24],
        sessions=each_day(8.0, begin=8)[:5],
        stretches=[(4, 5)],
    )
    assert corner_of(few) == Corner(2, 0)


def test_it_is_said_of_the_parts_that_are_there() -> None:
    sites = BY_HAND["cheap hold"], BY_HAND["must greedy"], BY_HAND["could greedy"]
    both = Corner(3, 3)
    store = "battery: store the surplus and serve the deficit"
    said = ["charge all now", store, f"charge all now; {store}"]
    assert [in_words(both, site) for site in sites] == said


# --- an agent begins there -----------------------------------------------------------------------


def start_of(agent: str) -> Agent:
    path = Path("checkpoints", agent, "start.pt")
    return load_agent(TrainingCheckpoint.read(path), path)


def first_actions(agent: Agent) -> Tensor:
    obs = torch.randn(200, agent.observation_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return agent.act(obs)


@pytest.mark.parametrize("name", AGENTS)
def test_a_fresh_agent_begins_at_the_corner_and_says_so(fit: Fit, place: Path, name: str) -> None:
    write_site(place / "village")
    out = fit(name, "--episodes", "1", "--env.site", "village").out
    site = load_site(place / "village")
    corner = corner_of(site)
    assert corner is not None
    assert f"{SAID}{in_words(corner, site)}\n" in out
    action = [0.0] * len(MOVES)
    first = agent_class(name).first_action
    action[corner.vehicles], action[5 + corner.battery] = first
    assert (first_actions(start_of(name)) - torch.tensor(action)).abs().max() < 0.1
    again = fit(name, "--episodes", "1", "--ckpt_path", "last").out
    assert SAID not in again


@pytest.mark.parametrize("name", AGENTS)
def test_even_weighs_all_alike(fit: Fit, place: Path, name: str) -> None:
    write_site(place / "village")
    words = "--env.site", "village", "--model.start", "even"
    assert SAID not in fit(name, "--episodes", "1", *words).out
    assert first_actions(start_of(name)).abs().max() < 0.1


def test_powers_begin_as_ever(fit: Fit, place: Path) -> None:
    write_site(place / "village")
    for start in ("corner", "even"):
        words = "--env.site", "village", "--env.action", "powers", "--model.start", start
        assert SAID not in fit("PPO", "--episodes", "1", "--name", start, *words).out
    corner, even = (
        TrainingCheckpoint.read(Path("checkpoints", name, "episode_0001.pt"))["state_dict"]
        for name in ("corner", "even")
    )
    assert corner.keys() == even.keys()
    assert all(torch.equal(corner[key], even[key]) for key in corner)


def test_a_resumed_run_is_the_uninterrupted_one(fit: Fit, place: Path) -> None:
    write_site(place / "village")
    words = "--env.site", "village", "--name"
    fit("PPO", "--episodes", "2", *words, "whole")
    fit("PPO", "--episodes", "1", *words, "halves")
    fit("PPO", "--episodes", "1", *words, "halves", "--ckpt_path", "last")
    whole, halves = (
        TrainingCheckpoint.read(Path("checkpoints", name, "episode_0002.pt"))["state_dict"]
        for name in ("whole", "halves")
    )
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


def test_a_run_keeps_where_it_began(command: Callable[..., Outcome], fit: Fit, place: Path) -> None:
    write_site(place / "village")
    fit("PPO", "--episodes", "1", "--env.site", "village")
    asked = "fit", "--model", "PPO", "--ckpt_path", "last", "--model.start"
    outcome = command(*asked, "even")
    assert outcome.code == 2
    assert outcome.err.startswith("error: --model.start even: the checkpoint was trained with")
    outcome = command(*asked, "middle")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
