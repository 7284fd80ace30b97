"""Each agent on each probe; the first red one names the broken part."""

from __future__ import annotations

import pytest
from probes import VALUE_EPISODES, choice, train, value

from co2lightning.agents import AGENTS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:lightning")
# APG descends through a site's physics, which these have not: see tests/unit/test_apg.py.
every_agent = pytest.mark.parametrize("name", [name for name in AGENTS if name != "APG"])


@every_agent
def test_the_value_is_learned(name: str) -> None:
    assert value(train(name, "ConstantReward", VALUE_EPISODES[name]), 0.0) == pytest.approx(
        1.0, abs=0.15
    )


@every_agent
def test_the_value_looks_at_the_observation(name: str) -> None:
    agent = train(name, "RewardFollowsObservation", VALUE_EPISODES[name])
    assert value(agent, 1.0) == pytest.approx(1.0, abs=0.2)
    assert value(agent, -1.0) == pytest.approx(-1.0, abs=0.2)


@every_agent
def test_the_value_reaches_back_discounted(name: str) -> None:
    agent = train(name, "RewardDelayed", VALUE_EPISODES[name], gamma=0.5)
    assert value(agent, 1.0) == pytest.approx(1.0, abs=0.15)
    assert value(agent, 0.0) == pytest.approx(0.5, abs=0.15)


@every_agent
def test_a_time_limit_is_not_an_end(name: str) -> None:
    agent = train(name, "NeverEnds", VALUE_EPISODES[name], gamma=0.5)
    assert value(agent, 0.0) == pytest.approx(2.0, abs=0.2)


@every_agent
def test_the_policy_moves(name: str) -> None:
    assert choice(train(name, "ActionMatters"), 0.0) == pytest.approx(0.5, abs=0.15)


@every_agent
def test_the_policy_looks_at_the_observation(name: str) -> None:
    agent = train(name, "ActionFollowsObservation")
    assert choice(agent, 1.0) == pytest.approx(0.5, abs=0.2)
    assert choice(agent, -1.0) == pytest.approx(-0.5, abs=0.2)


@pytest.mark.slow
@every_agent
def test_the_discount_decides(name: str) -> None:
    assert choice(train(name, "DiscountMatters", gamma=0.3), 0.0) < -0.3
    assert choice(train(name, "DiscountMatters", gamma=0.95), 0.0) > 0.3
