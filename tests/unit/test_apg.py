"""Descent through the physics: its gradient, its costates, what it does on odd sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from co2lightning.agents.apg import APG, Windows
from co2lightning.sim.days import SiteDays
from co2lightning.site.model import Site
from small_site import random_site

B = 3


class Alone(APG):
    """An agent without a Trainer, in its first episode."""

    episode = 1  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    global_rank = 0  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def pupil(site: Site, num_envs: int = B, **settings: Any) -> Alone:
    """Return an agent that is about to play windows of a site."""
    env = SiteDays(site, num_envs, action="moves")
    sizes = {"step_minutes": env.step_minutes, "observation_names": env.observation_names}
    agent = Alone(env.observation_dim, env.action_dim, seed=5, **sizes, **settings)
    agent.train_on(env)
    agent.update_generator = agent.episode_generator("updates")
    return agent


def windows_of(agent: APG) -> Windows:
    (windows,) = agent.train_dataloader()
    return windows


def double(part: Any) -> Any:
    """Return tables in float64."""
    if isinstance(part, Tensor):
        return part.double() if part.is_floating_point() else part
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*map(double, part))
    return part


ALL_PARTS = {"days": 3, "grid_kw": 40.0}


@pytest.mark.parametrize(
    "other",
    [{}, {"capacity_kwh": None}, {"grid_kw": 14.0}, {"min_kw": 0.5}, {"sockets": 0}],
    ids=["every part", "no battery", "a small connection", "least powers", "no vehicles"],
)
def test_the_gradient_is_that_of_finite_differences(other: dict[str, Any]) -> None:
    """Of a whole window in float64: by all weights at once, by each battery and by each vehicle."""
    agent = pupil(random_site(7, **{**ALL_PARTS, **other}), hidden=(16,))
    env: Any = agent.env
    env.model, env.observer = double(env.model), double(env.observer)
    agent.double()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in agent.actor.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        for costate in (agent.stored_costate, agent.owed_costate):  # what prices the cut is held
            for weight in costate.weights:
                weight.zero_()
    windows = windows_of(agent)
    # Nobody begins where waiting has just ended: less owed changes what must be, more does not.
    recorded = env.recorded(windows.days, windows.soc.detach())
    soc = (0.9 * windows.soc.detach().double()).requires_grad_()
    more_kw = (-0.1 * recorded.owed_kw.double()).requires_grad_()
    at = [*agent.actor.parameters(), soc, more_kw]

    def loss() -> Tensor:
        return agent.loss(Windows(windows.days, soc, more_kw))[0]

    slopes = torch.autograd.grad(loss(), at, materialize_grads=True)
    present = recorded.owed_kw > 0
    for _ in range(2):
        along = [torch.randn_like(part) for part in at]
        along[-1] = along[-1] * present
        expected = sum(float((a * g).sum()) for a, g in zip(along, slopes, strict=True))
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for part, direction in zip(at, along, strict=True):
                    part.add_(sign * H * direction)
                ends.append(float(loss()))
                for part, direction in zip(at, along, strict=True):
                    part.sub_(sign * H * direction)
        found = (ends[0] - ends[1]) / (2 * H)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


H = 1e-7
