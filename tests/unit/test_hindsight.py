"""The reward against the rule, and what critics see beyond the policy."""

import functools

import numpy as np
import pytest
import torch

from co2lightning.agents.a2c import A2C
from co2lightning.agents.agent import Agent
from co2lightning.agents.ppo import PPO
from co2lightning.agents.sac import SAC
from co2lightning.control.observation import FEATURES
from co2lightning.control.rules import rbc_b
from co2lightning.sim.days import SiteDays
from co2lightning.sim.hindsight import HINDSIGHT
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import evaluation_soc, run_days
from co2lightning.site.model import T
from small_site import shipped

O, K = len(FEATURES), len(HINDSIGHT)  # noqa: E741


@functools.cache
def days() -> SiteDays:
    return SiteDays(shipped(), 4, hindsight=True)


@functools.cache
def middle() -> torch.Tensor:
    battery = shipped().battery
    return torch.full((4,), (battery.start_soc_min + battery.start_soc_max) / 2)


CHOSEN = torch.tensor([3, 100, 200, 364])


def play(soc_start: torch.Tensor, seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rewards [T, B] and observations [T, B, O + K]; without a seed the rule acts."""
    env = days()
    generator = torch.Generator().manual_seed(seed or 0)
    obs, rewards, seen = env.begin(CHOSEN, soc_start), [], []
    for _ in range(T):
        assert env.state is not None
        rule = rbc_b(env.model, env.state)
        action = rule if seed is None else torch.rand(4, 2, generator=generator) * 2 - 1
        seen.append(obs)
        step = env.step(action)
        rewards.append(step.reward)
        obs = step.obs
    return torch.stack(rewards), torch.stack(seen)


def test_the_rule_itself_earns_nothing_at_any_step() -> None:
    rewards, _ = play(middle(), None)
    assert rewards.abs().max().item() < 1e-4


def test_a_days_reward_is_the_rules_co2_minus_ones_own() -> None:
    rewards, _ = play(middle(), 7)
    own_kg = days().totals()["co2_kg"]
    rule_kg = run_days(priced_model(shipped()), rbc_b, CHOSEN, middle()).total("co2_kg")
    torch.testing.assert_close(rewards.sum(0), rule_kg - own_kg, atol=0.01, rtol=1e-5)


def test_hindsight_depends_on_the_day_alone() -> None:
    _, seen = play(middle(), 1)
    _, other = play(evaluation_soc(shipped())[CHOSEN], 2)
    assert seen.shape == (T, 4, O + K)
    assert (seen[..., O:] == other[..., O:]).all()
    assert (seen[..., :O] != other[..., :O]).any()


def test_hindsight_is_what_happens_to_the_rule() -> None:
    trace = run_days(priced_model(shipped()), rbc_b, CHOSEN, middle())
    _, seen = play(middle(), 1)
    table = dict(zip(HINDSIGHT, seen[..., O:].double().unbind(-1), strict=True))
    capacity_kwh = shipped().battery.capacity_kwh
    import_kwh = torch.stack([flow.grid_import_kw for flow in trace.flows]).double() * 0.25
    curtailed_kwh = torch.stack([flow.curtailed_kwh for flow in trace.flows]).double()
    for t in (0, 40, 90, 95):
        for name, values, steps in (
            ("energy it will import until midnight", import_kwh, T),
            ("energy it will import within 2 hours", import_kwh, 8),
            ("energy it will curtail within 6 hours", curtailed_kwh, 24),
        ):
            wanted = values[t : t + steps].sum(0) / capacity_kwh
            torch.testing.assert_close(table[name][t], wanted, atol=1e-4, rtol=1e-4)
    soc = table["the rule's state of charge, 0-1"]
    torch.testing.assert_close(soc[0], middle().double())
    highest = table["its highest state of charge until midnight, 0-1"]
    torch.testing.assert_close(highest[30], soc[30:].amax(0))


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
