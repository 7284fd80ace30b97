"""What a step earns, and windows that begin alike."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from co2lightning.agents.a2c import A2C
from co2lightning.agents.ppo import PPO
from co2lightning.control.rules import uncontrolled
from co2lightning.control.state import Carry
from co2lightning.learn.dataset import Rollout
from co2lightning.sim.days import SiteDays
from co2lightning.sim.foreign import GymEnvironment
from co2lightning.sim.objective import mean_per_kwh
from co2lightning.sim.schedule import run, start, through
from co2lightning.site.model import Site
from small_site import T, random_site, shipped


@functools.cache
def days() -> SiteDays:
    return SiteDays(shipped(), 4)


CHOSEN = torch.tensor([3, 100, 200, 363])
PLACES = T * CHOSEN.numpy()


def play(soc: float, seed: int | None) -> tuple[Tensor, Tensor]:
    """Return rewards [n, B] and observations [n, B, O]; without a seed no one controls."""
    env = days()
    obs = env.begin(CHOSEN, torch.full((4,), soc))
    return play_on(env, obs, seed)


def play_on(env: SiteDays, obs: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed or 0)
    rewards, seen = [], []
    while env.steps_left:
        assert env.state is not None
        rule = uncontrolled(env.model, env.state)
        drawn = torch.rand(env.num_envs, 2, generator=generator) * 2 - 1
        seen.append(obs)
        step = env.step(rule if seed is None else drawn)
        rewards.append(step.reward)
        obs = step.obs
    return torch.stack(rewards), torch.stack(seen)


def where_it_stands(env: SiteDays, day: int) -> None:
    """Set the windows to where charging on arrival is, in one go, when a day begins."""
    site, place = env.site, int(env.site.day_bounds[day])
    begun = start(env.model, site, np.array([0]), site.battery.soc_min if site.battery else 0.0)
    _, at = run(env.model, uncontrolled, begun, place)
    several = Carry(*(part.expand(env.num_envs, *part.shape[1:]).clone() for part in at.parts))
    env.begin(torch.full((env.num_envs,), day), several.soc)
    env.go_on(several, torch.zeros(0, 3, env.num_envs))


# --- rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [24, 48])
def test_without_control_nothing_is_earned_at_any_step(hours: float) -> None:
    """From where its own unbroken run stands."""
    env = SiteDays(shipped(), 1, hours=hours)
    where_it_stands(env, 3)
    rewards, _ = play_on(env, torch.zeros(1, env.observation_dim), None)
    assert len(rewards) == env.horizon
    assert rewards.abs().max().item() < 2e-6


def unit_kg(site: Site) -> float:
    """Return what the site emits without control on a training day."""
    training = site.training_steps
    return float(
        through(site, uncontrolled).co2_kg[training].sum() / (training.sum() * site.step_h / 24)
    )


def credited_kwh(site: Site, ev_kw: np.ndarray, soc: np.ndarray) -> np.ndarray:
    """Return what vehicles are given and what is stored [n, ...], at 0.8 and at half the mean.

    `soc` is [n + 1, ...].
    """
    assert site.battery
    stored_kwh = np.diff(soc, axis=0) * site.battery.capacity_kwh / site.battery.charge_efficiency
    return 0.8 * ev_kw * site.step_h + 0.5 * stored_kwh


def test_rewards_are_what_is_saved_in_uncontrolled_days() -> None:
    """What is stored or charged more than without control counts half, 0.8 of the mean."""
    site, idle = shipped(), through(shipped(), uncontrolled)
    env, rewards = days(), play(0.5, 7)[0]
    begun = start(env.model, site, PLACES, 0.5)
    generator = torch.Generator().manual_seed(7)

    def same(model: object, state: object) -> Tensor:
        return torch.rand(4, 2, generator=generator) * 2 - 1

    own, _ = run(env.model, same, begun, T)
    within = np.stack([np.arange(place, place + T) for place in PLACES], axis=1)
    assert site.battery
    without = np.append(site.battery.soc_min, idle.soc)[np.append(within, within[-1:] + 1, axis=0)]
    soc = np.concatenate([np.full((1, 4), 0.5), own.soc.numpy()])
    more_kwh = credited_kwh(site, own.ev_kw.numpy(), soc)
    more_kwh = more_kwh - credited_kwh(site, idle.ev_kw[within], without)
    saved_kg = idle.co2_kg[within] - own.co2_kg.numpy()
    expected = saved_kg + mean_per_kwh(site)[0] * more_kwh
    np.testing.assert_allclose(rewards, expected / unit_kg(site), atol=2e-6)
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
        env = SiteDays(one, 2, hours=48)
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


@pytest.mark.parametrize("name", ODD)
def test_rewards_and_observations_are_finite_and_of_order_one(name: str) -> None:
    env = SiteDays(random_site(2, days=6, step_minutes=60, **ODD[name]), 6)
    rewards, seen = play_on(env, env.reset(0), 1)
    assert rewards.isfinite().all()
    assert seen.isfinite().all()
    assert seen.abs().max() <= 10.0
    assert rewards.abs().max() < 3.0
    assert np.isfinite(list(env.metrics().values())).all()
    if name == "clean":
        assert not rewards.any()


# --- windows that begin alike ---------------------------------------------------------------------


def pupil(kind: type[PPO] | type[A2C], env: SiteDays, **settings: Any) -> PPO | A2C:
    agent = kind(env.observation_dim, env.action_dim, hidden=(8,), **settings)
    agent.train_on(env)
    return agent


def test_windows_of_a_group_begin_alike_and_groups_do_not() -> None:
    env = SiteDays(shipped(), 6)
    pupil(PPO, env, group_size=3)
    obs = env.reset(1).unflatten(0, (2, 3))
    assert (obs == obs[:, :1]).all()
    assert (obs[0] != obs[1]).any()
    assert len(set(env.carry.place.tolist())) == 2
    assert len(set(env.carry.soc.tolist())) == 2


@pytest.mark.parametrize("kind", [PPO, A2C])
def test_what_a_group_has_in_common_is_no_advantage(kind: type[PPO] | type[A2C]) -> None:
    env = SiteDays(random_site(2, days=4, step_minutes=60), 4)
    agent = pupil(kind, env, group_size=2, normalize_advantage=False)
    generator = torch.Generator().manual_seed(1)
    obs, following = torch.rand(2, 5, 4, env.observation_dim, generator=generator)
    action, zeros = torch.rand(5, 4, 2, generator=generator), torch.zeros(5, 4)
    reward = torch.rand(5, 4, generator=generator)
    rollout = Rollout(obs, action, reward, following, zeros, zeros, zeros + 1.0)
    values = torch.rand(6, 4, generator=generator)
    own, target, _ = agent.judge(rollout, values)
    alone = pupil(kind, SiteDays(env.site, 4), normalize_advantage=False)
    advantage, same, _ = alone.judge(rollout, values)
    assert torch.equal(target, same)
    for first in (0, 2):
        pair = advantage[:, first : first + 2]
        expected = (pair - pair.flip(1)) / 2
        torch.testing.assert_close(own[:, first : first + 2], expected, atol=1e-6, rtol=1e-5)


def test_episodes_of_a_gymnasium_environment_begin_each_for_itself() -> None:
    env = GymEnvironment("Pendulum-v1", 4)
    agent = PPO(env.observation_dim, env.action_dim, hidden=(8,), group_size=4)
    agent.train_on(env)
    assert agent.group_size == 1


@pytest.mark.parametrize(("size", "num_envs", "found"), [(8, 12, 4), (8, 5, 1), (3, 6, 3)])
def test_groups_are_as_large_as_come_out_even(size: int, num_envs: int, found: int) -> None:
    env = SiteDays(random_site(2, days=30, step_minutes=60), num_envs)
    assert pupil(PPO, env, group_size=size).group_size == found
    env.reset(1)
    assert len(set(env.carry.place.tolist())) == num_envs // found
