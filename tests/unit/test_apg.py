"""Descent through the physics: its gradient, its costates, what it does on odd sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from co2lightning.agents.apg import APG, Windows
from co2lightning.errors import UserError
from co2lightning.learn.descent import Descent
from co2lightning.sim.days import SiteDays
from co2lightning.sim.foreign import GymEnvironment
from co2lightning.site.model import Objective, Site
from small_site import random_site, small_site

B = 3
H = 1e-7  # of finite differences


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
    windows = agent.draw_windows()
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


# --- costates ------------------------------------------------------------------------------------


def flat(agent: APG, stored: float, owed: float) -> None:
    """Let costates be the same whatever is seen."""
    with torch.no_grad():
        for network, value in ((agent.stored_costate, stored), (agent.owed_costate, owed)):
            for parameter in network.parameters():
                parameter.zero_()
            network.last[1].fill_(value)


def descend(agent: Alone) -> Descent:
    """Return what takes an agent's steps."""
    return agent.descends(
        agent, agent.configure_optimizers(), max_norm=agent.settings.max_grad_norm, compiled=False
    )


def test_the_cut_is_priced_by_the_costates() -> None:
    """A battery alone at a load of 2 kW and 0.5 kg/kWh: its day costs 24 kg without control."""
    site = small_site(sockets=0, load_kw=2.0, carbon=0.5, capacity_kwh=20.0)
    agent = pupil(site, num_envs=1)
    flat(agent, stored=0.6, owed=0.0)
    agent.begin_at([0.0] * 5 + [0.99, -0.99, -0.99, -0.99, -0.99])  # hold
    windows = agent.draw_windows()
    figures = {name: figure.detach() for name, figure in agent.loss(windows)[1].items()}
    left = -0.6 * 0.5 * 20.0 * float(windows.soc.detach()) / 24.0
    assert float(figures["left_at_end"]) == pytest.approx(left, rel=1e-2)
    assert float(figures["loss"]) == pytest.approx(1.0 + left, rel=1e-2)


def test_what_a_beginning_is_worth_is_remembered() -> None:
    """A battery that is served in any case: a kWh in it spares 0.8 kWh of import, 0.4 kg."""
    site = small_site(sockets=0, load_kw=2.0, carbon=0.5, capacity_kwh=20.0)
    agent = pupil(site, num_envs=2)
    agent.begin_at([0.0] * 5 + [-0.99, -0.99, 0.99, -0.99, -0.99])  # serve: empty by the end
    windows = agent.draw_windows()
    windows.soc.data = torch.tensor([0.5, 0.6])
    descend(agent)(windows)
    assert int(agent.remembered) == 2
    of_batteries, none = agent.of_stored[:2, -2], agent.of_owed[:2]
    torch.testing.assert_close(of_batteries, torch.full((2,), 0.8), rtol=2e-2, atol=0.0)
    assert (agent.of_stored[:2, -1] == 1.0).all()
    assert not agent.of_stored[2:].any()
    assert not none.any()  # nobody stands there


def test_what_a_vehicle_owes_is_remembered() -> None:
    """One that stands there at the day's beginning, 2 of 6 kWh charged: a kWh costs a kWh."""
    sessions = [(0, 0, 94, 186, 6.0, 4.0)]
    site = small_site(
        days=2, sessions=sessions, capacity_kwh=None, load_kw=2.0, carbon=0.5, held_out=[0]
    )
    agent = pupil(site, num_envs=1)
    agent.begin_at([-0.99, -0.99, -0.99, 0.99, -0.99] + [0.0] * 5)
    descend(agent)(agent.draw_windows())
    *stay, costate, weight = agent.of_owed[0, -9:].tolist()
    a_day = 96
    expected = [90 / a_day, 4 / a_day, 4 / 90, 86 / a_day, 0.0, 0.0, 4 / a_day]
    assert stay == pytest.approx(expected, rel=1e-4)
    assert (costate, weight) == (pytest.approx(1.0, rel=1e-2), 1.0)
    assert not agent.of_stored.any()  # there is no battery


def test_costates_follow_what_is_remembered() -> None:
    agent = pupil(random_site(3, days=4), num_envs=4, learning_rate=1e-2)
    take, wrong = descend(agent), list[float]()
    for _ in range(15):
        take.begin(1e-2)
        take(agent.draw_windows())
        wrong.append(float(take.end()["costate_loss"]))
    assert int(agent.remembered) == 60
    assert wrong[0] == 0.0  # nothing is remembered yet
    assert wrong[-1] < 0.5 * wrong[1]


# --- what may come -------------------------------------------------------------------------------

ODD: dict[str, dict[str, Any]] = {
    "one socket": {"sockets": 1},
    "constant carbon": {"flat": True},
    "no carbon": {"carbon": 0.0},
    "no vehicles": {"sockets": 0},
    "no battery": {"capacity_kwh": None},
    "a huge battery": {"capacity_kwh": 1e4, "power_kw": 1e3},
    "a battery that must not charge from the grid": {"may_charge_from_grid": False},
    "no sun": {"pv": 0.0},
    "no load": {"load": 0.0},
    "an hour a step": {"step_minutes": 60},
    "cost alone": {"price": 0.3, "objective": Objective(0.0, 1.0)},
}


@pytest.mark.parametrize("other", ODD.values(), ids=ODD)
def test_nothing_is_nan_on_odd_sites(other: dict[str, Any]) -> None:
    agent = pupil(random_site(2, **{"days": 3, **other}), hidden=(8,))
    take = descend(agent)
    for _ in range(3):
        take(agent.draw_windows())
    figures = take.end()
    assert figures["skipped_updates"] == 0.0
    assert all(figure.isfinite() for figure in figures.values())
    assert all(tensor.isfinite().all() for tensor in agent.state_dict().values())


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted() -> None:
    agent = pupil(random_site(3, days=3), hidden=(8,))
    take = descend(agent)
    take(agent.draw_windows())
    before = {name: tensor.clone() for name, tensor in agent.named_parameters()}
    windows = agent.draw_windows()
    with torch.no_grad():
        windows.soc[0] = torch.nan
    take(windows)
    for name, tensor in agent.named_parameters():
        assert torch.equal(tensor, before[name]), name
    assert take.end()["skipped_updates"] == 1.0
    assert agent.of_stored.isfinite().all()
    assert agent.of_owed.isfinite().all()


def test_other_environments_are_refused_in_a_line() -> None:
    env = GymEnvironment("Pendulum-v1", 1)
    agent = Alone(env.observation_dim, env.action_dim)
    with pytest.raises(UserError, match="APG descends through the physics of a site"):
        agent.train_on(env)


def test_without_an_environment_a_line_says_what_to_call() -> None:
    with pytest.raises(UserError, match=r"no environment: call agent.train_on\(environment\)"):
        Alone(3, 10).train_dataloader()
