"""The site as an environment for the agents, in torch; for everybody else see `gymnasium.py`.

`SiteDays` is the one simulator. One episode is one day, 00:00-24:00 local, 96 steps.

Shapes: T = 96 steps a day, D days of the site, B days at once, A = 2 actions, O features.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from co2lightning.control.observation import (
    FEATURES,
    RULE_FEATURES,
    Observer,
    build_observer,
    observe,
)
from co2lightning.control.rules import uncontrolled
from co2lightning.control.state import Carry, SiteModel, State, begin_day, restore
from co2lightning.errors import UserError
from co2lightning.sim.hindsight import HINDSIGHT, measure_against_rule
from co2lightning.sim.interface import Environment, Step
from co2lightning.sim.objective import Booked, book, priced_model, settle
from co2lightning.sim.physics import Flows, step
from co2lightning.sim.schedule import evaluation_soc, run_days
from co2lightning.site.load import load_site
from co2lightning.site.model import STEP_H, Site, T


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)  # what it would make can never be trained on
def _tables(site: Site, device: torch.device) -> tuple[SiteModel, Tensor, Observer]:
    """Make the tables of a site: its model, the hindsight features, the observer.

    They are never written, so all environments of a site have the same; of a year they take a
    third of a second and 100 MB.
    """
    model, hindsight = measure_against_rule(priced_model(site, device), site)
    return model, hindsight, build_observer(site, device)


@functools.lru_cache(maxsize=2)
def _uncontrolled_kg(site: Site, device: torch.device) -> Tensor:
    days = torch.arange(len(site.days))
    trace = run_days(_tables(site, device)[0], uncontrolled, days, evaluation_soc(site))
    return trace.total("co2_kg")


class SiteDays:
    """B days of a site at once, each with its own date, battery start and sessions.

    Args:
        site: The site.
        num_envs: B, days simulated at once.
        device: Where the tables and the state live.
        hindsight: Whether observations end with the K features for critics, see `hindsight.py`.
    """

    observation_dim = len(FEATURES)
    action_dim = 2
    horizon = T
    rule_features = RULE_FEATURES
    may_reset = False

    def __init__(
        self,
        site: Site,
        num_envs: int,
        device: torch.device | str = "cpu",
        hindsight: bool = False,
    ) -> None:
        self.site = site
        self.num_envs = num_envs
        self.hindsight_dim = len(HINDSIGHT) if hindsight else 0
        self._past: list[Tensor] = []  # of each step [3, B]: CO2 kg, grid kW, unmet kW
        self._at: State | Carry | None = None
        self._build(torch.device(device))

    def _build(self, device: torch.device) -> None:
        self.model, self._hindsight, self.observer = _tables(self.site, device)
        self._training_days = torch.as_tensor(self.site.training_days)

    def to(self, device: torch.device) -> None:
        """Move the site's tables; a running day is dropped."""
        device = torch.empty(0, device=device).device  # cuda becomes cuda:0
        if device != self.model.device:
            self._build(device)
            self._at = None

    @property
    def uncontrolled_kg(self) -> Tensor:
        """CO2 [D] in kg of every day of the site without any control."""
        return _uncontrolled_kg(self.site, self.model.device)

    def reset(self, seed: int) -> Tensor:
        """Begin B training days drawn with `seed`; no day twice before each was drawn once."""
        return self.begin(*self.draw(seed, self.num_envs))

    def draw(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """Draw training days [count] and their battery starts [count]."""
        # Drawn on the CPU, so that a seed means the same days on every device.
        generator = torch.Generator().manual_seed(seed)
        n_days = len(self._training_days)
        rounds = -(-count // n_days)
        drawn = torch.cat([torch.randperm(n_days, generator=generator) for _ in range(rounds)])
        days = self._training_days[drawn[:count]]
        battery = self.site.battery
        span = battery.start_soc_max - battery.start_soc_min
        soc = battery.start_soc_min + span * torch.rand(count, generator=generator)
        return days, soc

    def begin(self, days: Tensor, soc_start: Tensor) -> Tensor:
        """Begin given days [B] with given battery starts [B]; returns observations [B, O]."""
        self.day = days.to(self.model.device)
        self._at = state = begin_day(self.model, self.day, soc_start.to(self.model.device))
        self._past = []
        self._ones = torch.ones_like(state.soc)
        self._zeros = torch.zeros_like(state.soc)
        return self._observe(state)

    @property
    def state(self) -> State | None:
        """The site at the beginning of the running step; None where no day is running."""
        if isinstance(self._at, Carry):
            self._at = restore(self.model, self._at)
        return self._at

    @property
    def steps_left(self) -> int:
        """How many steps of the running day are to be played."""
        return T - len(self._past)

    def _observe(self, state: State) -> Tensor:
        obs = observe(self.observer, self.model, state)
        if not self.hindsight_dim:
            return obs
        ahead = self._hindsight.index_select(0, state.place)
        return torch.cat([obs, ahead], dim=1)

    def step(self, action: Tensor) -> Step:
        """Run one step of 15 minutes with actions [B, A] in [-1, 1]."""
        state = self.state
        if state is None:
            raise RuntimeError(_NO_DAY)
        following, self.flows = step(self.model, state, action)
        self.booked = book(state, self.flows)
        zeros, ones = self._zeros, self._ones
        if self.steps_left > 1:
            self._at = following
            obs, terminated = self._observe(following), zeros
        else:
            # The battery's settlement makes the day's end a real end.
            self.booked = settle(self.model, state, self.flows, self.booked)
            self._at = None
            obs = zeros.new_zeros(len(zeros), self.observation_dim + self.hindsight_dim)
            terminated = ones
        self._past.append(_past_of(self.flows, self.booked))
        return Step(obs, self.booked.reward, terminated, zeros, ones)

    @property
    def carry(self) -> Carry:
        """What the running step takes over from the one before.

        Raises:
            RuntimeError: No day is running.
        """
        if self._at is None:
            raise RuntimeError(_NO_DAY)
        return self._at.carry if isinstance(self._at, State) else self._at

    def advance(self, carry: Carry, action: Tensor) -> tuple[Carry, Tensor, Tensor, Tensor]:
        """Work out a step that ends no day, a pure function for graphs of one or more of them.

        Args:
            carry: What it begins with.
            action: [B, A] in [-1, 1].

        Returns:
            The next step's carry, the observations [B, O + K], the rewards [B] and the step's past
            [3, B], for `go_on`.
        """
        state = restore(self.model, carry)
        following, flows = step(self.model, state, action)
        booked = book(state, flows)
        past = _past_of(flows, booked)
        return following.carry, self._observe(following), booked.reward, past

    def go_on(self, carry: Carry, past: Tensor) -> None:
        """Set the running day to a carry that `advance` led to, the past [n, 3, B] of n steps."""
        self._past += past.unbind(0)
        self._at = carry

    def totals(self) -> dict[str, Tensor]:
        """Return what the days [B] added up to so far."""
        if not self._past:
            raise RuntimeError("no step was made yet")
        co2_kg, grid_kw, unmet_kw = torch.stack(self._past, dim=1)
        totals = {
            "co2_kg": co2_kg.sum(0),
            "grid_import_kwh": grid_kw.relu().sum(0) * STEP_H,
            "curtailed_kwh": (-grid_kw).relu().sum(0) * STEP_H,
            "unmet_kwh": unmet_kw.sum(0) * STEP_H,
        }
        days = self.day.cpu().numpy()
        pv_kwh = self.site.pv_kw[days, : len(self._past)].sum(axis=1) * STEP_H
        return totals | {"pv_kwh": torch.as_tensor(pv_kwh).to(self._zeros)}

    def metrics(self, mean: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """Return the means over the finished days, for the logs.

        Args:
            mean: Averages a tensor over the ranks of a distributed run.
        """
        totals = self.totals() | {"uncontrolled_kg": self.uncontrolled_kg[self.day]}
        means = mean(torch.stack(list(totals.values())).mean(1)).tolist()
        day = dict(zip(totals, means, strict=True))
        return {
            "site/co2_kg": day["co2_kg"],
            "site/uncontrolled_kg": day["uncontrolled_kg"],
            "site/co2_vs_uncontrolled": day["co2_kg"] / max(day["uncontrolled_kg"], 1e-9),
            "site/grid_import_kwh": day["grid_import_kwh"],
            "site/curtailment_kwh": day["curtailed_kwh"],
            # A battery that discharges into a surplus is curtailed too: more than there was PV.
            "site/self_consumption": max(
                0.0, 1.0 - day["curtailed_kwh"] / max(day["pv_kwh"], 1e-9)
            ),
            "site/unmet_kwh": day["unmet_kwh"],
        }


_NO_DAY = "no day is running: call reset() or begin() first"


def _past_of(flows: Flows, booked: Booked) -> Tensor:
    """Return [3, B] what a day's totals are made of: CO2 kg, grid kW, unmet kW."""
    return torch.stack([booked.co2_kg, flows.grid_kw, flows.unmet_kw])


def day_index(site: Site, day: str) -> int:
    """Return the index of an ISO date among the site's days."""
    if day not in site.days:
        raise UserError(
            f"day: {day} is not a day of site {site.name}; its days run from "
            f"{site.days[0]} to {site.days[-1]}, written YYYY-MM-DD"
        )
    return site.days.index(day)


def make_environment(
    site: str = "iquitos", num_envs: int = 64, hindsight: bool = False, id: str | None = None
) -> Environment:
    """Make the environment an agent trains in.

    Args:
        site: Name of a shipped site, or a site folder.
        num_envs: Days simulated at once; an episode is one day of each.
        hindsight: Let critics see how the rest of a training day goes; policies never do. A
            Gymnasium environment has no hindsight.
        id: A Gymnasium environment instead of a site, such as Pendulum-v1, for checking the
            algorithms; an episode is then one horizon of each of its copies.
    """
    if num_envs < 1:
        raise UserError(f"--env.num_envs {num_envs}: must be at least 1")
    if id is not None:
        from co2lightning.sim.foreign import GymEnvironment

        return GymEnvironment(id, num_envs)
    return SiteDays(load_site(site), num_envs, hindsight=hindsight)
