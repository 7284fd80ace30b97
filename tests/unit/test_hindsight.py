"""The reward against the rule, and what critics see beyond the policy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from co2lightning.agents.a2c import A2C
from co2lightning.agents.agent import Agent
from co2lightning.agents.ppo import PPO
from co2lightning.agents.sac import SAC
from co2lightning.control.observation import FEATURES
from co2lightning.control.rules import rbc_b, uncontrolled
from co2lightning.control.state import Carry
from co2lightning.sim.days import SiteDays
from co2lightning.sim.hindsight import HINDSIGHT
from co2lightning.sim.objective import mean_per_kwh
from co2lightning.sim.schedule import run, start, through
from co2lightning.site.model import Site
from small_site import T, random_site, shipped, small_site

O, K = len(FEATURES), len(HINDSIGHT)  # noqa: E741


@functools.cache
def days() -> SiteDays:
    return SiteDays(shipped(), 4, hindsight=True)


CHOSEN = torch.tensor([3, 100, 200, 363])
PLACES = T * CHOSEN.numpy()


def play(soc: float, seed: int | None) -> tuple[Tensor, Tensor]:
    """Return rewards [n, B] and observations [n, B, O + K]; without a seed the rule acts."""
    env = days()
    obs = env.begin(CHOSEN, torch.full((4,), soc))
    return play_on(env, obs, seed)


def play_on(env: SiteDays, obs: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed or 0)
    rewards, seen = [], []
    while env.steps_left:
        assert env.state is not None
        rule = rbc_b(env.model, env.state)
        drawn = torch.rand(env.num_envs, 2, generator=generator) * 2 - 1
        seen.append(obs)
        step = env.step(rule if seed is None else drawn)
        rewards.append(step.reward)
        obs = step.obs
    return torch.stack(rewards), torch.stack(seen)


def at_the_rules(env: SiteDays, day: int) -> None:
    """Set the windows to where RBC B's unbroken run is when a day begins."""
    site, place = env.site, int(env.site.day_bounds[day])
    begun = start(env.model, site, np.array([0]), site.battery.soc_min if site.battery else 0.0)
    _, at = run(env.model, rbc_b, begun, place)
    several = Carry(*(part.expand(env.num_envs, *part.shape[1:]).clone() for part in at.parts))
    env.begin(torch.full((env.num_envs,), day), several.soc)
    env.go_on(several, torch.zeros(0, 3, env.num_envs))


# --- rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [24, 48])
def test_the_rule_itself_earns_nothing_at_any_step(hours: float) -> None:
    """From where its own unbroken run stands."""
    env = SiteDays(shipped(), 1, hours=hours)
    at_the_rules(env, 3)
    rewards, _ = play_on(env, torch.zeros(1, O), None)
    assert len(rewards) == env.horizon
    assert rewards.abs().max().item() < 2e-6


def unit_kg(site: Site) -> float:
    """Return what the site emits without control on a training day."""
    training = site.training_steps
    return float(
        through(site, uncontrolled).co2_kg[training].sum() / (training.sum() * site.step_h / 24)
    )


def test_rewards_are_the_rules_co2_minus_ones_own_in_uncontrolled_days() -> None:
    """What is stored or charged more than the rule has counts half, 0.8 of the mean intensity."""
    site, rule = shipped(), through(shipped(), rbc_b)
    env, rewards = days(), play(0.5, 7)[0]
    begun = start(env.model, site, PLACES, 0.5)
    generator = torch.Generator().manual_seed(7)

    def same(model: object, state: object) -> Tensor:
        return torch.rand(4, 2, generator=generator) * 2 - 1

    own, _ = run(env.model, same, begun, T)
    within = np.stack([np.arange(place, place + T) for place in PLACES], axis=1)
    saved_kg = rule.co2_kg[within] - own.co2_kg.numpy()
    more_kwh = (own.credited_kw.numpy() - rule.credited_kw[within]) * site.step_h
    expected = saved_kg + 0.8 * mean_per_kwh(site)[0] * more_kwh
    np.testing.assert_allclose(rewards, expected / unit_kg(site), atol=1e-6)
    assert 0.01 < rewards.sum(0).abs().min() < rewards.sum(0).abs().max() < 3.0


@pytest.mark.parametrize("gamma", [0.95, 1.0])
def test_who_discounts_gains_nothing_by_storing_early(gamma: float) -> None:
    """Between two ways, what counts is their discounted CO2 and what they leave in the end."""
    site, env = shipped(), SiteDays(shipped(), 4)
    env.discount = gamma
    weight = gamma ** np.arange(T)[:, None]
    begun = torch.full((4,), 0.5)
    returns, left = [], []
    for seed in (1, 2):
        rewards, _ = play_on(env, env.begin(CHOSEN, begun), seed)
        generator = torch.Generator().manual_seed(seed)

        def same(model: object, state: object, generator: torch.Generator = generator) -> Tensor:
            return torch.rand(4, 2, generator=generator) * 2 - 1

        own, at = run(env.model, same, start(env.model, site, PLACES, 0.5), T)
        assert site.battery
        kept_kwh = at.soc * site.battery.capacity_kwh / site.battery.charge_efficiency
        kept_kwh = 0.5 * kept_kwh - 0.8 * at.owed_kw.sum(1) * site.step_h
        returns.append((weight * (rewards.numpy() * unit_kg(site) + own.co2_kg.numpy())).sum(0))
        left.append(gamma**T * mean_per_kwh(site)[0] * kept_kwh.numpy())
    np.testing.assert_allclose(returns[1] - returns[0], left[1] - left[0], atol=0.02)
    assert abs(left[1] - left[0]).max() > 0.3


def scaled(site: Site, factor: float) -> Site:
    """Return a site of which all kW and kWh are so many times as large."""
    battery, sessions = site.battery, site.sessions
    assert battery
    return dataclasses.replace(
        site,
        battery=dataclasses.replace(
            battery,
            capacity_kwh=factor * battery.capacity_kwh,
            power_kw=factor * battery.power_kw,
        ),
        sockets=tuple(dataclasses.replace(s, max_kw=factor * s.max_kw) for s in site.sockets),
        pv_kw=factor * site.pv_kw,
        load_kw=factor * site.load_kw,
        import_limit_kw=factor * site.import_limit_kw,
        grid_kw=factor * site.grid_kw,
        sessions=dataclasses.replace(
            sessions,
            energy_kwh=factor * sessions.energy_kwh,
            max_kw=factor * sessions.max_kw,
            min_kw=factor * sessions.min_kw,
        ),
    )


@pytest.mark.parametrize("min_kw", [0.0, 0.8])
def test_a_site_a_thousand_times_as_large_is_the_same_to_a_policy(min_kw: float) -> None:
    site = random_site(3, days=5, step_minutes=60, grid_kw=20.0, min_kw=min_kw)
    played = []
    for one in (site, scaled(site, 1024.0)):  # a power of two, so that rounding is the same
        env = SiteDays(one, 2, hindsight=True, hours=48)
        played.append(play_on(env, env.begin(torch.tensor([1, 2]), torch.tensor([0.3, 0.6])), 4))
    (rewards, seen), (other_rewards, other_seen) = played
    torch.testing.assert_close(rewards, other_rewards, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen, other_seen, atol=1e-4, rtol=1e-4)
    assert rewards.abs().max() > 1e-3


def test_dirtier_power_changes_no_reward() -> None:
    """Nor what is observed: 0.05 and 1.5 kg/kWh are a matter of the unit."""
    played = []
    for carbon in (0.05, 1.5):
        env = SiteDays(random_site(3, days=4, step_minutes=60, carbon=carbon), 1)
        played.append(play_on(env, env.begin(torch.tensor([1]), torch.tensor([0.3])), 4))
    torch.testing.assert_close(*(rewards for rewards, _ in played), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(*(seen for _, seen in played), atol=1e-4, rtol=1e-4)


ODD: dict[str, dict[str, Any]] = {
    "clean": {"carbon": 0.0},
    "constant": {"flat": True},
    "no battery": {"capacity_kwh": None},
    "no sockets": {"sockets": 0},
    "no imports": {"load": 0.0, "sockets": 0},
    "battery alone": {"load": 0.0, "sockets": 0, "pv": 0.0},
    "exports": {"load": -1.0, "pv": 0.0, "sockets": 0},
}


@pytest.mark.parametrize("hindsight", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_rewards_and_observations_are_finite_and_of_order_one(name: str, hindsight: bool) -> None:
    env = SiteDays(random_site(2, days=6, step_minutes=60, **ODD[name]), 6, hindsight=hindsight)
    rewards, seen = play_on(env, env.reset(0), 1)
    assert rewards.isfinite().all()
    assert seen.isfinite().all()
    assert seen.abs().max() <= 10.0
    assert rewards.abs().max() < 3.0
    assert np.isfinite(list(env.metrics().values())).all()
    if name == "clean":
        assert not rewards.any()


# --- what critics see ----------------------------------------------------------------------------


def test_hindsight_depends_on_the_place_alone() -> None:
    _, seen = play(0.4, 1)
    _, other = play(0.6, 2)
    assert seen.shape == (T, 4, O + K)
    assert (seen[..., O:] == other[..., O:]).all()
    assert (seen[..., :O] != other[..., :O]).any()


def test_hindsight_is_what_happens_to_the_rule() -> None:
    """Across midnight, less the mean of the training steps and in units of their spread."""
    site, rule = shipped(), through(shipped(), rbc_b)
    _, seen = play(0.4, 1)
    table = dict(zip(HINDSIGHT, seen[..., O:].double().unbind(-1), strict=True))
    assert site.battery
    soc = np.concatenate([[site.battery.soc_min], rule.soc])
    imported, curtailed = np.maximum(rule.grid_kw, 0.0), np.maximum(-rule.grid_kw, 0.0)

    def ahead(values: np.ndarray, steps: int) -> np.ndarray:
        padded = np.concatenate([values, np.zeros(steps)])
        return np.lib.stride_tricks.sliding_window_view(padded, steps)[: len(values)].sum(1)

    expected = {
        "the rule's state of charge, 0-1": soc[:-1],
        "energy it owes to the vehicles present": rule.owed_kw,
        "energy it will import within 24 hours": ahead(imported, 96),
        "energy it will import within 2 hours": ahead(imported, 8),
        "energy it will curtail within 6 hours": ahead(curtailed, 24),
        "what it will cost, CO2 or money, within 24 hours": ahead(rule.co2_kg, 96),
    }
    training = site.training_steps
    for name, values in expected.items():
        own = values[np.stack([np.arange(place, place + T) for place in PLACES], axis=1)]
        known = values[training]
        # Rare large values may widen the spread beyond the standard deviation.
        rare = np.quantile(np.abs(known - known.mean()), 0.999) / 10.0
        wanted = (own - known.mean()) / max(known.std(), rare)
        np.testing.assert_allclose(table[name], wanted, atol=2e-4, rtol=1e-4, err_msg=name)
    # The highest of the next day is that of the next day.
    highest = table["its highest state of charge within 24 hours, 0-1"]
    best = np.array([[soc[p + t + 1 : p + t + 97].max() for p in PLACES] for t in range(T)])
    assert np.corrcoef(highest.flatten(), best.flatten())[0, 1] == pytest.approx(1.0)


def test_hindsight_ends_with_the_series() -> None:
    """Beyond it nothing happens: what is to come dwindles, and the end itself is observed."""
    site = small_site(days=3, load_kw=5.0, carbon=[[0.3], [0.4], [0.5]])
    env = SiteDays(site, 1, hindsight=True)
    _, seen = play_on(env, env.begin(torch.tensor([2]), torch.tensor([0.1])), 1)
    co2 = seen[:, 0, O + HINDSIGHT.index("what it will cost, CO2 or money, within 24 hours")]
    assert (co2.diff() < 0.0).all()
    assert env.carry.place.item() == site.n_steps


@pytest.mark.parametrize(
    ("parts", "word"), [({"capacity_kwh": None}, "charge"), ({"sockets": 0}, "owes")]
)
def test_hindsight_of_a_part_that_is_not_there_is_nothing(parts: dict, word: str) -> None:
    env = SiteDays(random_site(2, days=4, step_minutes=60, **parts), 2, hindsight=True)
    _, seen = play_on(env, env.reset(1), 1)
    for name, column in zip(HINDSIGHT, seen[..., O:].unbind(-1), strict=True):
        assert column.any() != (word in name), name


@pytest.mark.parametrize("kind", [A2C, SAC, PPO])
def test_a_policy_never_looks_ahead(kind: type[Agent]) -> None:
    agent = kind(O, 2, hindsight_dim=K)
    generator = torch.Generator().manual_seed(3)
    obs, noise = torch.randn(5, O + K, generator=generator), torch.randn(5, 2, generator=generator)
    other = torch.cat([obs[:, :O], torch.randn(5, K, generator=generator)], dim=1)
    agent.env_steps = 10**9  # past SAC's random start
    assert (agent.act(obs) == agent.act(other)).all()
    assert (agent.act(obs) == agent.act(obs[:, :O])).all()
    assert (agent.explore(obs, noise) == agent.explore(other, noise)).all()
    predicted, _ = agent.predict(obs[:, :O].numpy())
    assert np.array_equal(predicted, agent.act(obs).detach().numpy())


def test_a_critic_does() -> None:
    agent = PPO(O, 2, hindsight_dim=K)
    obs = torch.zeros(1, O + K)
    ahead = obs.clone()
    ahead[0, O:] = 1.0
    assert agent.critic(obs).item() != agent.critic(ahead).item()
