"""Losses of the three agents against numbers worked out by hand or by torch.distributions."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any, cast

import pytest
import torch
from torch import nn

from co2lightning.agents.a2c import A2C
from co2lightning.agents.networks import (
    MLP,
    TwinCritic,
    gaussian_entropy,
    gaussian_log_prob,
    squashed_gaussian,
)
from co2lightning.agents.ppo import PPO, Samples
from co2lightning.agents.replay import ReplayBatch
from co2lightning.agents.sac import SAC, Update
from co2lightning.learn.dataset import Rollout


def silence(module: nn.Module) -> None:
    """Set every weight to 0, so that a network returns its last bias: 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


def number(tensor: torch.Tensor) -> float:
    return float(tensor.detach())


def samples(action: list[float], old_log_prob: list[float], advantage: list[float]) -> Samples:
    n = len(action)
    return Samples(
        obs=torch.zeros(n, 3),
        action=torch.tensor(action).unsqueeze(1),
        log_prob=torch.tensor(old_log_prob),
        advantage=torch.tensor(advantage),
        value_target=torch.tensor([1.0, -2.0][:n]),
        weight=torch.ones(n),
    )


LOG_NORMAL_0 = -0.5 * math.log(2 * math.pi)  # log density of N(0, 1) at 0


def test_ppo_clips_only_where_it_would_gain() -> None:
    agent = PPO(3, 1, hidden=(4,), clip_range=0.2, vf_coef=0.5, ent_coef=0.01)
    silence(agent)
    # Under the policy N(0, 1) both actions 0 have LOG_NORMAL_0; ratios 1.5 and 0.5.
    old = [LOG_NORMAL_0 - math.log(1.5), LOG_NORMAL_0 - math.log(0.5)]
    loss, parts = agent.loss(samples([0.0, 0.0], old, [1.0, 1.0]))
    # min(1.5, 1.2) = 1.2 and min(0.5, 0.8) = 0.5; value 0 against 1 and -2.
    entropy = 0.5 + 0.5 * math.log(2 * math.pi)
    assert number(parts["policy_loss"]) == pytest.approx(-(1.2 + 0.5) / 2)
    assert number(parts["value_loss"]) == pytest.approx((1.0 + 4.0) / 2)
    assert number(parts["entropy"]) == pytest.approx(entropy)
    assert number(loss) == pytest.approx(-0.85 + 0.5 * 2.5 - 0.01 * entropy)
    assert number(parts["clip_fraction"]) == pytest.approx(1.0)
    kl = ((0.5 - math.log(1.5)) + (-0.5 - math.log(0.5))) / 2
    assert number(parts["approx_kl"]) == pytest.approx(kl)


def test_ppo_with_a_bad_action_takes_the_worse_of_both() -> None:
    agent = PPO(3, 1, hidden=(4,), clip_range=0.2)
    silence(agent)
    old = [LOG_NORMAL_0 - math.log(1.5), LOG_NORMAL_0 - math.log(0.5)]
    _, parts = agent.loss(samples([0.0, 0.0], old, [-1.0, -1.0]))
    # min(-1.5, -1.2) = -1.5 and min(-0.5, -0.8) = -0.8
    assert number(parts["policy_loss"]) == pytest.approx((1.5 + 0.8) / 2)


def test_a_reset_step_counts_for_nothing() -> None:
    agent = PPO(3, 1, hidden=(4,))
    silence(agent)
    batch = samples([0.0, 5.0], [LOG_NORMAL_0, -1.0], [1.0, 9.0])
    loss, parts = agent.loss(batch._replace(weight=torch.tensor([1.0, 0.0])))
    assert number(parts["policy_loss"]) == pytest.approx(-1.0)
    assert number(loss) == pytest.approx(-1.0 + 0.5 * 1.0)


@pytest.mark.parametrize("kind", [A2C, PPO, SAC])
def test_an_agent_can_be_pickled(kind: type[A2C | PPO | SAC]) -> None:
    """As processes that are spawned need it."""
    agent = kind(3, 1, seed=4, hidden=(4,))
    again = pickle.loads(pickle.dumps(agent))
    for name, weight in agent.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_a2c_is_log_density_times_advantage() -> None:
    agent = A2C(3, 1, hidden=(4,), gamma=0.5, vf_coef=0.5, ent_coef=0.01)
    silence(agent)
    # The values are 0, so advantage and target are what comes: 2.5 - 0.5 * 1 and then -1.
    reward = torch.tensor([[2.5], [-1.0]])
    obs, one, zero = torch.zeros(2, 1, 3), torch.ones(2, 1), torch.zeros(2, 1)
    action = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
    rollout = Rollout(obs, action, reward, obs, zero, zero, one)
    loss, parts = agent.loss(rollout)
    policy_loss = -((LOG_NORMAL_0 - 0.5) * 2.0 - LOG_NORMAL_0) / 2
    entropy = 0.5 + 0.5 * math.log(2 * math.pi)
    assert number(parts["policy_loss"]) == pytest.approx(policy_loss)
    assert number(parts["value_loss"]) == pytest.approx(2.5)
    assert number(parts["explained_variance"]) == pytest.approx(0.0)
    assert number(loss) == pytest.approx(policy_loss + 0.5 * 2.5 - 0.01 * entropy)


def cut_rollout() -> Rollout:
    """Return two steps of a window whose end is a cut; rewards 1, all that is seen is the same."""
    obs, one, zero = torch.zeros(2, 1, 3), torch.ones(2, 1), torch.zeros(2, 1)
    cut = torch.tensor([[0.0], [1.0]])
    return Rollout(obs, torch.zeros(2, 1, 1), one, obs, zero, cut, one)


@pytest.mark.parametrize("kind", [A2C, PPO])
def test_a_window_that_is_cut_goes_on_in_the_value(kind: type[A2C | PPO]) -> None:
    agent = kind(3, 1, hidden=(4,), gamma=0.5, gae_lambda=1.0, normalize_advantage=False)
    silence(agent)
    with torch.no_grad():
        agent.critic.biases[-1].fill_(8.0)
    rollout = cut_rollout()
    advantage, target, _ = agent.judge(rollout, agent.values(rollout))
    assert target[:, 0].tolist() == [1.0 + 0.5 * (1.0 + 0.5 * 8.0), 1.0 + 0.5 * 8.0]
    assert torch.equal(advantage, target - 8.0)
    ended = rollout._replace(terminated=rollout.truncated, truncated=rollout.terminated)
    _, target, _ = agent.judge(ended, agent.values(ended))
    assert target[:, 0].tolist() == [1.5, 1.0]


class Cut:
    """An environment that only the clock cuts; nobody steps it."""

    may_reset = False
    observation_names = ()

    def let_begin_alike(self, size: int) -> int:
        return 1


def test_sac_keeps_what_a_cut_led_to_and_bootstraps_from_it() -> None:
    agent = SAC(3, 1, hidden=(4,), gamma=0.5, ent_coef_init=1e-9, learning_starts=0, batch_size=9)
    for network in (agent.actor, agent.critic, agent.target):
        silence(network)
    with torch.no_grad():
        agent.target.biases[-1].fill_(8.0)
    agent.train_on(cast(Any, Cut()))
    agent.update_generator = torch.Generator().manual_seed(1)
    update = next(iter(agent.minibatches(cut_rollout())))
    assert not update.batch.terminated.any()
    _, parts = agent.loss(update)
    assert number(parts["critic_loss"]) == pytest.approx(2 * (1.0 + 0.5 * 8.0) ** 2)


# What is per step of 15 minutes: the same after an hour, whatever the step.


@pytest.mark.parametrize(("minutes", "steps"), [(5, 12), (10, 6), (15, 4), (20, 3), (60, 1)])
@pytest.mark.parametrize("kind", [A2C, PPO, SAC])
def test_settings_follow_the_step(kind: type[A2C | PPO | SAC], minutes: int, steps: int) -> None:
    name = "train_freq" if kind is SAC else "n_steps"
    agent = kind(3, 1, step_minutes=minutes, hidden=(4,), gamma=0.9, **{name: 4})
    assert agent.segment_steps(24 * 60 // minutes) == steps
    assert agent.per_step(0.9) ** steps == pytest.approx(0.9**4)
    assert agent.per_step(0.0) == 0.0
    assert agent.per_step(1.0) == 1.0
    assert kind(3, 1, step_minutes=60, hidden=(4,), **{name: 1}).segment_steps(24) == 1
    assert agent.hyperparameters()["step_minutes"] == minutes


def test_a_step_of_15_minutes_has_the_settings_as_they_are() -> None:
    agent = PPO(3, 1, hidden=(4,))
    for share in (0.97, 0.98, 0.99, 0.999, 1 / 3):
        assert agent.per_step(share) == share
    assert [agent.in_steps(count) for count in (1, 4, 7, 10_000_000)] == [1, 4, 7, 10_000_000]
    assert agent.segment_steps(96) == 96


@pytest.mark.parametrize("kind", [A2C, PPO])
def test_an_hour_discounts_as_four_quarters_of_one(kind: type[A2C | PPO]) -> None:
    settings = {"gamma": 0.5, "gae_lambda": 0.5, "normalize_advantage": False, "hidden": (4,)}
    agent = kind(3, 1, step_minutes=60, **settings)
    silence(agent)
    rollout = cut_rollout()
    advantage, *_ = agent.judge(rollout, agent.values(rollout))
    assert advantage[:, 0].tolist() == [1.0 + 0.5**4 * 0.5**4, 1.0]


def test_sac_discounts_by_the_hour_too() -> None:
    agent = SAC(3, 1, step_minutes=60, hidden=(4,), gamma=0.5, ent_coef_init=1e-9)
    for network in (agent.actor, agent.critic, agent.target):
        silence(network)
    with torch.no_grad():
        agent.target.biases[-1].fill_(8.0)
    seen, one = torch.zeros(1, 3), torch.ones(1)
    batch = ReplayBatch(seen, torch.zeros(1, 1), one, seen, 0.0 * one)
    _, parts = agent.loss(Update(batch, torch.zeros(1, 1), torch.zeros(1, 1)))
    assert number(parts["critic_loss"]) == pytest.approx(2 * (1.0 + 0.5**4 * 8.0) ** 2)


def test_sac_losses_by_hand() -> None:
    agent = SAC(3, 1, hidden=(4,), gamma=0.5, ent_coef_init=0.1, target_entropy=-1.0)
    for network in (agent.actor, agent.critic, agent.target):
        silence(network)
    with torch.no_grad():
        agent.critic.biases[-1].copy_(torch.tensor([2.0, 3.0]).reshape(2, 1, 1))
        agent.target.biases[-1].copy_(torch.tensor([5.0, 4.0]).reshape(2, 1, 1))
    batch = ReplayBatch(
        obs=torch.zeros(2, 3),
        action=torch.zeros(2, 1),
        reward=torch.tensor([1.0, 1.0]),
        next_obs=torch.zeros(2, 3),
        terminated=torch.tensor([0.0, 1.0]),
    )
    zero = torch.zeros(2, 1)
    _, parts = agent.loss(Update(batch, zero, zero))
    # Noise 0 at mean 0: action 0, log density LOG_NORMAL_0, tanh's slope 1 there.
    target_going_on = 1.0 + 0.5 * (4.0 - 0.1 * LOG_NORMAL_0)
    errors = [(q - target_going_on) ** 2 + (q - 1.0) ** 2 for q in (2.0, 3.0)]
    assert number(parts["critic_loss"]) == pytest.approx(sum(errors) / 2)
    assert number(parts["actor_loss"]) == pytest.approx(0.1 * LOG_NORMAL_0 - 2.0)
    assert number(parts["entropy"]) == pytest.approx(-LOG_NORMAL_0)


def test_sac_weighs_what_a_group_has_in_common_less() -> None:
    agent = SAC(3, 1, hidden=(4,), gamma=0.5)
    for network in (agent.actor, agent.critic, agent.target):
        silence(network)
    agent.group_size = 2
    zero = torch.zeros(4, 1)
    ended = ReplayBatch(
        zero.expand(4, 3),
        zero,
        torch.tensor([1.0, 3.0, -4.0, -4.0]),
        zero.expand(4, 3),
        zero[:, 0] + 1,
    )
    _, parts = agent.loss(Update(ended, zero, zero))
    # Two critics of 0 are off by 2 and -4 in common, and by 1 each way in the first group.
    assert number(parts["critic_loss"]) == pytest.approx(2 * (0.5 + 0.002 * 10), rel=1e-5)


def test_no_group_crosses_the_end_of_the_ring() -> None:
    agent = SAC(3, 1, hidden=(4,), learning_starts=0, buffer_size=5, batch_size=2)
    agent.train_on(cast(Any, Cut()))
    agent.group_size = 2
    agent.update_generator = torch.Generator().manual_seed(1)
    columns = (column.expand(-1, 2, *column.shape[2:]) for column in cut_rollout())
    rollout = Rollout(*columns)
    for first in range(7):
        list(agent.minibatches(rollout._replace(obs=rollout.obs + first)))
    assert agent.replay is not None
    assert agent.replay.capacity == 4
    for batch in agent.replay.sample(20, 2, agent.update_generator, 2):
        assert (batch.obs[0] == batch.obs[1]).all()


def test_each_sac_loss_moves_its_own_part_only() -> None:
    agent = SAC(3, 2, hidden=(8,))
    batch = ReplayBatch(
        torch.randn(6, 3), torch.rand(6, 2), torch.randn(6), torch.randn(6, 3), torch.zeros(6)
    )
    update = Update(batch, torch.randn(6, 2), torch.randn(6, 2))
    loss, parts = agent.loss(update)
    critic, actor = list(agent.critic.parameters()), list(agent.actor.parameters())
    whole = torch.autograd.grad(loss, critic, retain_graph=True)
    own = torch.autograd.grad(parts["critic_loss"], critic, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, own, strict=True))
    whole = torch.autograd.grad(loss, actor, retain_graph=True)
    own = torch.autograd.grad(parts["actor_loss"], actor, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, own, strict=True))
    (temperature,) = torch.autograd.grad(loss, [agent.log_ent_coef])
    assert number(temperature) == pytest.approx(number(parts["entropy"]) - agent.target_entropy)


def test_gaussian_matches_torch() -> None:
    mean, log_std, action = torch.randn(5, 2), torch.randn(2), torch.randn(5, 2)
    normal = torch.distributions.Normal(mean, log_std.exp())
    expected = normal.log_prob(action).sum(-1)
    assert torch.allclose(gaussian_log_prob(action, mean, log_std), expected, atol=1e-5)
    assert torch.allclose(gaussian_entropy(log_std), normal.entropy().sum(-1)[0], atol=1e-5)


def test_squashed_gaussian_matches_torch_and_holds_in_saturation() -> None:
    torch.manual_seed(5)
    head = 0.5 * torch.randn(7, 4, dtype=torch.float64)
    noise = torch.randn(7, 2, dtype=torch.float64)
    action, log_prob = squashed_gaussian(head, noise)
    mean, log_std = head.chunk(2, -1)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()),
        [torch.distributions.TanhTransform(cache_size=1)],
    )
    assert torch.allclose(log_prob, squashed.log_prob(action).sum(-1), atol=1e-6)
    far = torch.tensor([[30.0, 0.0]])
    _, log_prob = squashed_gaussian(far, torch.zeros(1, 1))
    # log(1 - tanh(u)^2) is about 2 (log 2 - u) there, where 1 - tanh(30)^2 is 0 in float32.
    assert number(log_prob) == pytest.approx(LOG_NORMAL_0 - 2 * (math.log(2) - 30.0), rel=1e-5)


def test_twin_critic_is_two_networks_and_its_target_follows() -> None:
    generator = torch.Generator().manual_seed(3)
    critic = TwinCritic(4, (8, 8), "relu", generator=generator)
    target = TwinCritic(4, (8, 8), "relu", generator=generator)
    obs, action = torch.randn(5, 3), torch.randn(5, 1)
    both = critic(obs, action)
    for i in range(2):
        x = torch.cat([obs, action], 1)
        for layer in range(3):
            x = x @ critic.weights[layer][i] + critic.biases[layer][i]
            x = x.relu() if layer < 2 else x
        assert torch.allclose(both[i], x.squeeze(1), atol=1e-6)
    before = [p.clone() for p in target.parameters()]
    target.follow(critic, 0.25)
    for old, new, aim in zip(before, target.parameters(), critic.parameters(), strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * aim, atol=1e-7)


def test_a_network_computes_with_its_own_parameters_wherever_they_come_from() -> None:
    def network(seed: int) -> MLP:
        generator = torch.Generator().manual_seed(seed)
        return MLP(3, (4,), 2, activation="tanh", output_gain=1.0, generator=generator)

    x, original, other = torch.randn(5, 3), network(1), network(2)
    expected = original(x)
    twin = copy.deepcopy(original)
    other.load_state_dict(original.state_dict())
    with torch.no_grad():
        original.weights[0].zero_()
    assert torch.equal(twin(x), expected)
    assert torch.equal(other(x), expected)
    assert not torch.equal(original(x), expected)
    double = twin.double()(x.double())
    assert torch.allclose(double, expected.double(), atol=1e-6)
    assert list(twin.state_dict()) == ["weights.0", "weights.1", "biases.0", "biases.1"]
