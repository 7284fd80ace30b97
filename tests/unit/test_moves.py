"""Moves: each worked by hand, their corners the rules, and what weighs nothing does nothing."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

import co2lightning  # noqa: F401  registers the id
from co2lightning.control.moves import (
    ACTIONS,
    MOVES,
    Moves,
    MoveTables,
    move_tables,
    moves_of,
    powers_of,
)
from co2lightning.control.outlook import outlook_of
from co2lightning.control.rules import Choice, Rule, rbc_a, rbc_b, rbc_c, uncontrolled
from co2lightning.control.state import Powers, SiteModel, State, restore
from co2lightning.errors import UserError
from co2lightning.sim.days import SiteDays
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import Trace, run, start
from co2lightning.site.model import Site
from small_site import Row, begin, random_site, real, shipped, small_site

NAMES = [name for name, _ in MOVES]
ID = "co2lightning/ChargingSite-v0"


def tables_of(site: Site) -> tuple[SiteModel, MoveTables]:
    model = priced_model(site)
    return model, move_tables(site, model, outlook_of(site))


def only(tables: MoveTables, *names: str) -> MoveTables:
    """Return tables that allow no other moves than these."""
    never = torch.tensor([0.0 if name in names else -1e4 for name in NAMES])
    return tables._replace(mask=torch.minimum(tables.mask, never))


def as_rule(tables: MoveTables, action: Tensor) -> Rule:
    def rule(model: SiteModel, state: State) -> Tensor | Powers:
        moves = moves_of(tables, model, state)
        return powers_of(tables, model, state, moves, action.expand(len(state.soc), -1))

    return rule


def powers(site: Site, state: State, *names: str, action: object = 0.0) -> Powers:
    """Return what moves of these names, weighing alike, do in a state."""
    model, tables = tables_of(site)
    tables = only(tables, *names) if names else tables
    numbers = torch.as_tensor(action, dtype=torch.float32).expand(1, len(MOVES))
    made = powers_of(tables, model, state, moves_of(tables, model, state), numbers)
    assert isinstance(made, Powers)
    return made


# --- worked by hand ------------------------------------------------------------------------------


def sunny(**parts: Any) -> Site:
    """PV 7 kW, load 4; laxities 18 and 0.4 steps, the second vehicle must take 2.4 kW."""
    rows: list[Row] = [(0, 0, 0, 20, 2.0, 4.0), (0, 1, 0, 3, 2.6, 4.0)]
    given: dict[str, Any] = {
        "days": 3,
        "sockets": 2,
        "sessions": rows,
        "pv_kw": 7.0,
        "load_kw": 4.0,
        "carbon": [[0.5], [0.2], [0.5]],
        "power_kw": 6.0,
    }
    return small_site(**(given | parts))


@pytest.mark.parametrize(
    ("name", "kw"),
    [
        ("must", [0.0, 2.4]),
        ("solar", [0.0, 3.0]),  # the surplus of 3 kW, least laxity first
        ("cheap", [4.0, 4.0]),  # now the sun is free, and later no more than that
        ("could", [4.0, 4.0]),
        ("cheap_price", [0.0, 2.4]),  # 0.4 is expected from the next step on, now it is 0.5
    ],
)
def test_a_move_of_the_vehicles_by_hand(name: str, kw: list[float]) -> None:
    site = sunny()
    made = powers(site, begin(priced_model(site)), name, "hold")
    assert made.socket_kw[0].tolist() == pytest.approx(kw, abs=1e-5)
    assert made.battery_kw.item() == 0.0


def test_who_waits_for_cheap_hours_charges_what_they_leave_and_the_last_step_in_part() -> None:
    """5.5 steps are owed in a stay of 8, of which the last four are cheap."""
    carbon = np.where(np.arange(96) < 4, 0.6, 0.3)
    rows: list[Row] = [(0, 0, 0, 8, 5.5, 4.0)]
    site = small_site(days=3, sessions=rows, carbon=carbon, capacity_kwh=None)
    model, tables = tables_of(site)
    rule = as_rule(only(tables, "cheap", "hold"), torch.zeros(10))
    trace, _ = run(model, rule, start(model, site, np.array([0]), 0.0), 8)
    expected = [4.0, 2.0, 0.0, 0.0, 4.0, 4.0, 4.0, 4.0]
    assert trace.ev_kw[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


BATTERY = {
    # PV - load - vehicles: 3 - 2.4 with what they must, 3 - 8 with all they can take.
    "must": {"hold": 0.0, "store": 0.6, "serve": 0.0, "greedy": 0.6, "fill": 6.0},
    "could": {"hold": 0.0, "store": 0.0, "serve": -5.0, "greedy": -5.0, "fill": 6.0},
}


@pytest.mark.parametrize("vehicles", BATTERY)
@pytest.mark.parametrize("name", NAMES[5:])
def test_a_move_of_the_battery_by_hand(vehicles: str, name: str) -> None:
    site = sunny()
    made = powers(site, begin(priced_model(site)), vehicles, name)
    assert made.battery_kw.item() == pytest.approx(BATTERY[vehicles][name], abs=1e-5)


def test_what_weighs_alike_is_the_mean() -> None:
    site = sunny()
    made = powers(site, begin(priced_model(site)))
    mean = [(0 + 0 + 4 + 4 + 0) / 5, (2.4 + 3.0 + 4.0 + 4.0 + 2.4) / 5]
    assert made.socket_kw[0].tolist() == pytest.approx(mean, abs=1e-5)
    surplus = 3.0 - sum(mean)  # below 0: nothing to store
    assert made.battery_kw.item() == pytest.approx((2 * surplus + 6.0) / 5, abs=1e-5)


def test_weights_are_the_softmax_of_five_times_the_number() -> None:
    """What lies beyond -1 and 1 is clamped; the two groups do not see each other."""
    site = sunny()
    action = torch.tensor([-1.0, 3.0, 0.5, -9.0, -1.0, 0.2, -0.4, 1.0, 0.0, -0.3])
    made = powers(site, begin(priced_model(site)), action=action)
    of_vehicles, of_battery = (5.0 * action.clamp(-1.0, 1.0)).view(2, 5).softmax(1)
    each = torch.tensor([[0, 2.4], [0, 3.0], [4.0, 4.0], [4.0, 4.0], [0, 2.4]])
    torch.testing.assert_close(made.socket_kw[0], of_vehicles @ each)
    surplus = 3.0 - made.socket_kw.sum().item()
    _, store, serve, greedy, fill = of_battery.tolist()
    share = store + greedy if surplus > 0 else serve + greedy
    assert made.battery_kw.item() == pytest.approx(share * surplus + fill * 6.0, abs=1e-5)


# --- corners are rules ---------------------------------------------------------------------------


def mixed(choice: Choice, site: Site) -> Rule:
    outlook = outlook_of(site)
    return lambda model, state: rbc_c(choice, outlook, model, state)


def compare(site: Site, moves: tuple[str, str], rule: Rule) -> None:
    """Run a corner of the moves and a rule through days of a site; step by step the same."""
    model, tables = tables_of(site)
    days = site.day_bounds[:-1][:: max(1, len(site.days) // 12)]
    begun = start(model, site, days, 0.4 if site.battery else 0.0)
    corner = as_rule(only(tables, *moves), torch.zeros(10))
    steps = site.steps(23.0)
    (own, _), (other, _) = (run(model, one, begun, steps) for one in (corner, rule))
    for name in ("ev_kw", "battery_kw", "grid_kw", "unmet_kw", "soc"):
        torch.testing.assert_close(
            getattr(own, name), getattr(other, name), atol=2e-4, rtol=1e-5, msg=name
        )


SITES: dict[str, dict[str, Any]] = {
    "all parts": {},
    "short": {"import_limit_kw": 7.0},
    "least power": {"min_kw": 0.9},
    "surplus only": {"may_charge_from_grid": False},
    "5 minutes": {"step_minutes": 5},
}


def sites() -> list[Any]:
    own = [
        pytest.param(lambda p=p: random_site(5, **({"days": 3} | p)), id=k)
        for k, p in SITES.items()
    ]
    return [pytest.param(shipped, id="iquitos"), *own]


@pytest.mark.parametrize("make", sites())
def test_corners_are_the_rules(make: Any) -> None:
    site = make()
    compare(site, ("could", "greedy"), rbc_a)
    compare(site, ("could", "hold"), uncontrolled)
    compare(site, ("solar", "greedy"), rbc_b)
    compare(site, ("cheap_price", "greedy"), mixed(Choice(vehicles="cheap", greedy=True), site))


def test_corners_of_a_site_that_has_less() -> None:
    cars = real("caltech-2019")
    compare(cars, ("cheap", "hold"), mixed(Choice(vehicles="cheap"), cars))
    compare(cars, ("could", "hold"), uncontrolled)
    houses = real("citylearn-5")
    compare(houses, ("must", "greedy"), rbc_b)


# --- what a site cannot do -----------------------------------------------------------------------

CANNOT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "all parts": ({}, set()),
    "no battery": ({"capacity_kwh": None}, {"store", "serve", "greedy", "fill"}),
    "no sockets": ({"sockets": 0}, {"solar", "cheap", "could", "cheap_price"}),
    "no sun": ({"pv": 0.0}, {"solar", "cheap_price", "store", "greedy"}),
    "constant": ({"flat": True}, {"cheap_price"}),
    "no sun, constant": (
        {"flat": True, "pv": 0.0},
        {"solar", "cheap", "cheap_price", "store", "greedy"},
    ),
    "surplus only": ({"may_charge_from_grid": False}, {"fill"}),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_a_site_cannot_do_weighs_nothing(case: str) -> None:
    """Whatever its numbers say, bit for bit; all else counts."""
    parts, cannot = CANNOT[case]
    site = random_site(3, days=2, step_minutes=60, **parts)
    model, tables = tables_of(site)
    assert {n for n, m in zip(NAMES, tables.mask.tolist(), strict=True) if m} == cannot
    action = torch.rand(10, generator=torch.Generator().manual_seed(1)) - 0.5
    masked = torch.tensor([name in cannot for name in NAMES])
    begun = start(model, site, site.day_bounds[:2], 0.5 if site.battery else 0.0)

    def trace(numbers: Tensor) -> Trace:
        return run(model, as_rule(tables, numbers), begun, 23)[0]

    first, same = (trace(torch.where(masked, value, action)) for value in (1.0, -1.0))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    for name in set(NAMES[:4]) - cannot if site.sockets else set():
        changed = trace(torch.where(torch.tensor([n == name for n in NAMES]), 1.0, action))
        assert not torch.equal(changed.ev_kw, first.ev_kw), name


def test_gradients_reach_every_number_that_counts() -> None:
    site = random_site(3, days=2, step_minutes=60)
    env, action = SiteDays(site, 2, action="moves"), torch.zeros(10, requires_grad=True)
    env.begin(torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    rewards = list[Tensor]()
    while env.steps_left:
        rewards.append(env.step(action.expand(2, -1)).reward)
    torch.stack(rewards).sum().backward()
    assert action.grad is not None
    assert action.grad.isfinite().all()
    assert (action.grad != 0.0).all()


# --- in the environment --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iquitos", "caltech-2019", "citylearn-5"])
def test_gymnasium_finds_nothing_wrong(name: str) -> None:
    place = name if name == "iquitos" else str(real(name).directory)
    env = gym.make(ID, site=place, action="moves", hours=6, disable_env_checker=True)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (10,), np.float32)
    check_env(env.unwrapped)
    vector = gym.make_vec(ID, num_envs=3, site=place, action="moves", hours=6)
    day = {"day": (shipped() if name == "iquitos" else real(name)).days[40]}
    one, _ = env.reset(options=day)
    several, _ = vector.reset(options=day)
    np.testing.assert_array_equal(several[1], one)
    draws = np.random.default_rng(0)
    for _ in range(23):
        actions = draws.uniform(-1.0, 1.0, (3, 10)).astype(np.float32)
        obs, reward, *_ = env.step(actions[1])
        several, rewards, *_ = vector.step(actions)
        np.testing.assert_array_equal(several[1], obs)
        assert rewards[1] == reward
        assert env.observation_space.contains(obs)


def test_the_docstring_has_every_move_and_no_other_action_is_taken() -> None:
    vector = gym.make_vec(ID, num_envs=1, action="moves").unwrapped
    for name, meaning in MOVES:
        assert name in str(vector.__doc__)
        assert meaning in str(vector.__doc__)
    with pytest.raises(UserError, match="action jumps: must be powers or moves"):
        gym.make(ID, action="jumps")


def test_an_environment_steps_as_the_moves_say() -> None:
    site = shipped()
    env = SiteDays(site, 4, action="moves")
    assert env.action_dim == ACTIONS["moves"] == 10
    env.reset(3)
    assert env.state is not None
    begun = env.state.carry
    action = torch.rand(10, generator=torch.Generator().manual_seed(2)) * 2.0 - 1.0
    model, tables = env.model, env.observer.moves
    trace, _ = run(model, as_rule(tables, action), begun, 24)
    for t in range(24):
        env.step(action.expand(4, -1))
        # Up to rounding: a rule's powers go through the shield's dispatch.
        torch.testing.assert_close(env.flows.grid_kw, trace.grid_kw[t], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(env.flows.battery_kw, trace.battery_kw[t], rtol=1e-5, atol=1e-3)


def test_moves_in_a_state_have_the_sum_that_is_observed() -> None:
    env = SiteDays(shipped(), 8, action="moves")
    obs = env.reset(1)
    for _ in range(40):
        obs = env.step(torch.zeros(8, 10)).obs
    assert env.state is not None
    moves: Moves = moves_of(env.observer.moves, env.model, restore(env.model, env.carry))
    columns = [env.observation_names.index(name) for name in NAMES[:5]]
    spread, centre = (
        torch.tensor(of)[columns] for of in (env.observer.spread, env.observer.centre)
    )
    sums = moves.socket_kw.sum(2).T
    torch.testing.assert_close(obs[:, columns] * spread + centre, sums, atol=1e-3, rtol=1e-4)
