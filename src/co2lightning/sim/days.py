"""The site as an environment for the agents, in torch; for everybody else see `gymnasium.py`.

`SiteDays` is the one simulator. One episode is a window of a day, cut out of a time that goes on.

Shapes: n steps of a window, P steps of the site, D days of the site, B windows at once, A
actions, O features, C columns of sockets.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.moves import ACTIONS, Moves, moves_of, powers_of
from co2lightning.control.observation import NAMES, give, observe
from co2lightning.control.rules import uncontrolled
from co2lightning.control.state import Carry, SiteModel, State, restore
from co2lightning.errors import UserError
from co2lightning.sim.interface import Environment, Step
from co2lightning.sim.objective import (
    mean_per_kwh,
    metered,
    priced_model,
    reward,
    rewarded,
    unit_a_day,
)
from co2lightning.sim.physics import Flows, step
from co2lightning.sim.scales import observer_of
from co2lightning.sim.schedule import start, through
from co2lightning.sim.starts import starts_of
from co2lightning.site.load import load_site
from co2lightning.site.model import DAY_H, Objective, Site


class _Tables(NamedTuple):
    """What all environments of a site share; never written."""

    model: SiteModel  # with rewards
    # What the cheap rule, run through the whole series, has at each day's beginning:
    soc: Tensor  # [D], on the CPU
    owed_kw: tuple[Tensor, ...]  # [D, C] each, to the vehicles, as `Carry` has it
    # What of these came before each place without control, and what is owed then, [P + 1]:
    uncontrolled_kg: Tensor
    uncontrolled_cost: Tensor
    pv_kwh: Tensor
    owed_kwh: Tensor
    unit: float  # what objectives of a day are measured in
    kwh_cost: float  # of import at the mean absolute price, in that


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)  # what it would make can never be trained on
def _tables(site: Site, device: torch.device) -> _Tables:
    # Of what is truly owed: nothing is to be won by a wrong announcement.
    idle = through(site.truth, uncontrolled)
    training = site.training_steps
    days = training.sum() * site.step_h / DAY_H
    objective = site.objective
    without = objective.of(idle.co2_kg, idle.cost)
    a_day = float(without[training].sum() / days)
    model = rewarded(priced_model(site, device), site, a_day, without, idle.ev_kw)
    soc, owed_kw = starts_of(site)

    def until(values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.concatenate([[0.0], values.cumsum()])).to(device)

    return _Tables(
        model=model,
        soc=torch.as_tensor(soc, dtype=torch.float32),
        owed_kw=tuple(torch.as_tensor(owed).to(model.zero) for owed in owed_kw),
        uncontrolled_kg=until(idle.co2_kg),
        uncontrolled_cost=until(idle.cost),
        pv_kwh=until(site.pv_kw * site.step_h),
        owed_kwh=torch.as_tensor(np.append(idle.owed_kw, 0.0) * site.step_h).to(device),
        unit=(unit := unit_a_day(site, a_day)),
        kwh_cost=float(np.abs(site.import_price[training]).mean()) / unit,
    )


class SiteDays:
    """B windows of a site at once, each with its own beginning and battery.

    Args:
        site: The site.
        num_envs: B, windows simulated at once.
        device: Where the tables and the state live.
        hours: Length of a window; it begins where a day of the site does.
        action: What actions are: "powers", A = 2, of vehicles and battery; "moves", what each
            move weighs, see `control.moves`.

    Raises:
        UserError: No window of this length lies in the training days.
    """

    may_reset = False
    discount = 1.0

    def __init__(
        self,
        site: Site,
        num_envs: int,
        device: torch.device | str = "cpu",
        hours: float = DAY_H,
        action: str = "powers",
    ) -> None:
        self.site = site
        self.action_dim = ACTIONS[action]
        self.observation_names, self.observation_dim = NAMES, len(NAMES)
        self.num_envs = num_envs
        self.step_minutes = site.step_minutes
        self.horizon = site.steps(hours)
        self._days = self.horizon * site.step_h / DAY_H
        self._training_days = torch.as_tensor(_windows(site, self.horizon, hours))
        self._alike = 1  # how many windows
        self._length = self.horizon  # of the running window, in steps
        self._past: list[Tensor] = []  # of each step [2 or 3, B]: see `_past_of`
        self._at: State | Carry | None = None
        self.moves: Moves | None = None  # what they would do in the next step, for `advance`
        self._build(torch.device(device))

    def _build(self, device: torch.device) -> None:
        self.tables = _tables(self.site, device)
        self.model = self.tables.model
        self.observer = give(observer_of(self.site, device), self.observation_names)

    def show(self, names: tuple[str, ...], who: str = "the agent") -> None:
        """Observe the features of these names alone, in this order; () are all.

        Args:
            names: Of features.
            who: Was trained on them.

        Raises:
            UserError: The site does not give one of them.
        """
        self.observer = give(observer_of(self.site, self.model.device), names, who)
        self.observation_names = names or NAMES
        self.observation_dim = len(self.observation_names)

    def to(self, device: torch.device) -> None:
        """Move the site's tables; a running window is dropped."""
        device = torch.empty(0, device=device).device  # cuda becomes cuda:0
        if device != self.model.device:
            self._build(device)
            self._at = None

    def reset(self, seed: int) -> Tensor:
        """Begin training days drawn with `seed`, none for two groups before each for one.

        Windows of a group have one day and one state of charge, see `let_begin_alike`.
        """
        days, soc = self.draw(seed, self.num_envs // self._alike)
        days, soc = (drawn.repeat_interleave(self._alike) for drawn in (days, soc))
        return self.begin(days, soc, recorded=True)

    def let_begin_alike(self, size: int) -> int:
        """Let `reset` begin windows in groups, one after another; returns how many a group has.

        It is the largest number that divides both `size` and B.
        """
        self._alike = math.gcd(size, self.num_envs)
        return self._alike

    def draw(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """Draw training days [count] and their battery starts [count].

        Half of the batteries, as the draw has it, begin as the cheap rule has left them there, the
        others anywhere in the site's start range.
        """
        # Drawn on the CPU, so that a seed means the same days on every device.
        generator = torch.Generator().manual_seed(seed)
        n_days = len(self._training_days)
        rounds = -(-count // n_days)
        drawn = torch.cat([torch.randperm(n_days, generator=generator) for _ in range(rounds)])
        days = self._training_days[drawn[:count]]
        share, coin = torch.rand(2, count, generator=generator)
        recorded = self.tables.soc[days]
        if (battery := self.site.battery) is None:
            return days, recorded
        span = battery.start_soc_max - battery.start_soc_min
        anew = battery.start_soc_min + span * share
        return days, torch.where(coin < 0.5, anew, recorded)

    def begin(
        self, days: Tensor, soc: Tensor, steps: int | None = None, *, recorded: bool = False
    ) -> Tensor:
        """Begin given days [B] with given batteries [B]; returns observations [B, O].

        Args:
            days: Indices of the site's days.
            soc: States of charge.
            steps: How long this window is, other than the horizon; it must lie in the series.
            recorded: Whether vehicles that stand there owe what the cheap rule has left, as in
                training, or what charging on arrival has, as in evaluation.
        """
        if recorded:
            return self.begin_at(self.recorded(days, soc), steps)
        places = self.site.day_bounds[days.cpu().numpy()]
        return self.begin_at(start(self.model, self.site, places, soc), steps)

    def recorded(self, days: Tensor, soc: Tensor) -> Carry:
        """Return where days [B] begin with batteries [B] and what the cheap rule has left."""
        model, places = self.model, torch.as_tensor(self.site.day_bounds[days.cpu().numpy()])
        owed_kw = (owed[days.to(model.device)] for owed in self.tables.owed_kw)
        return Carry(places.to(model.device), soc.to(model.zero), *owed_kw)

    def begin_at(self, carry: Carry, steps: int | None = None) -> Tensor:
        """Begin windows of so many steps; returns observations [B, O]."""
        self._length = steps or self.horizon
        self.place, self._began = carry.place, carry
        self._at = state = restore(self.model, carry)
        self._past = []
        self._ones = torch.ones_like(state.soc)
        self._zeros = torch.zeros_like(state.soc)
        obs, self.moves = self._observe(state)
        return obs

    @property
    def state(self) -> State | None:
        """The site at the beginning of the next step; None where no window is running."""
        if isinstance(self._at, Carry):
            self._at = restore(self.model, self._at)
        return self._at

    @property
    def steps_left(self) -> int:
        """How many steps of the running window are to be played."""
        return self._length - len(self._past) if self._at is not None else 0

    def _observe(self, state: State) -> tuple[Tensor, Moves]:
        moves = moves_of(self.observer.moves, self.model, state)
        obs = observe(self.observer, self.model, state, moves)
        return obs, moves

    def _step(self, state: State, moves: Moves | None, action: Tensor) -> tuple[State, Flows]:
        """Run one step with actions [B, A], whatever they are."""
        tables, model = self.observer.moves, self.model
        moves = moves_of(tables, model, state) if moves is None else moves
        return step(model, state, powers_of(tables, model, state, moves, action), moves.order)

    def _reward(self, state: State, flows: Flows) -> Tensor:
        return reward(self.model, state, flows, self.discount)

    def step(self, action: Tensor) -> Step:
        """Run one step with actions [B, A] in [-1, 1]; the last one of a window truncates it."""
        state = self.state
        if state is None or not self.steps_left:
            raise RuntimeError(_NO_DAY)
        following, self.flows = self._step(state, self.moves, action)
        self._at = following
        self._past.append(_past_of(self.flows))
        zeros, ones = self._zeros, self._ones
        truncated = zeros if self.steps_left else ones
        obs, self.moves = self._observe(following)
        return Step(obs, self._reward(state, self.flows), zeros, truncated, ones)

    @property
    def carry(self) -> Carry:
        """What the next step takes over from the one before.

        Raises:
            RuntimeError: No window is running.
        """
        if self._at is None:
            raise RuntimeError(_NO_DAY)
        return self._at.carry if isinstance(self._at, State) else self._at

    def advance(
        self, carry: Carry, action: Tensor, moves: Moves | None = None
    ) -> tuple[Carry, Moves, Tensor, Tensor, Tensor]:
        """Work out a step, a pure function for graphs of one or more of them.

        Args:
            carry: What it begins with.
            action: [B, A].
            moves: What they would do there, where that is known already.

        Returns:
            The next step's carry and moves, the observations [B, O], the rewards [B] and the
            step's past [2 or 3, B], for `go_on`.
        """
        state = restore(self.model, carry)
        following, flows = self._step(state, moves, action)
        observed, moves = self._observe(following)
        return following.carry, moves, observed, self._reward(state, flows), _past_of(flows)

    def go_on(self, carry: Carry, past: Tensor, moves: Moves | None = None) -> None:
        """Set the window to a carry that `advance` led to, with the past [n, ..., B] of n steps."""
        self._past += past.unbind(0)
        self._at, self.moves = carry, moves

    @torch.no_grad()
    def totals(self) -> dict[str, Tensor]:
        """Return what the windows [B] added up to so far, and the same time without control.

        `co2_kg` and `cost` are the meter's, and what is left undone at the mean intensity and
        price: the battery below where it began, and of what vehicles are owed beyond what charging
        on arrival would leave, how much more it is than where the windows began. Nothing is won by
        putting it off beyond the window's end, nor lost by what had been put off before.
        """
        if not self._past:
            raise RuntimeError("no step was made yet")
        grid_kw, unmet_kw, *misled_kw = torch.stack(self._past, dim=1)
        co2_kg, cost = metered(self.model, self.place, grid_kw)
        tables, step_h, carry = self.tables, self.site.step_h, self.carry
        undone_kwh = self._put_off_kwh(carry) - self._put_off_kwh(self._began)
        if battery := self.site.battery:
            less = (self._began.soc - carry.soc).relu()
            undone_kwh = undone_kwh + less * battery.capacity_kwh / battery.charge_efficiency
        mean_kg, mean_price = mean_per_kwh(self.site)
        return {
            "co2_kg": co2_kg.sum(0) + (undone_kwh * mean_kg).to(co2_kg),
            "cost": cost.sum(0) + (undone_kwh * mean_price).to(cost),
            "grid_import_kwh": grid_kw.relu().sum(0) * step_h,
            "curtailed_kwh": (-grid_kw).relu().sum(0) * step_h,
            "peak_import_kw": grid_kw.relu().amax(0),
            "unmet_kwh": unmet_kw.sum(0) * step_h,
            **({"misled_kwh": misled_kw[0].sum(0) * step_h} if misled_kw else {}),
            "pv_kwh": self._meanwhile(tables.pv_kwh),
            "uncontrolled_kg": self._meanwhile(tables.uncontrolled_kg),
            "uncontrolled_cost": self._meanwhile(tables.uncontrolled_cost),
        }

    def _put_off_kwh(self, carry: Carry) -> Tensor:
        """Return what vehicles are owed [B] beyond what charging on arrival would leave."""
        owed_kwh = carry.truly_owed_kw.sum(1) * self.site.step_h
        return (owed_kwh - self.tables.owed_kwh[carry.place]).relu()

    def _meanwhile(self, until: Tensor) -> Tensor:
        """Return what came about [B] since the windows began, of a sum [P + 1] from the first."""
        return (until[self.carry.place] - until[self.place]).to(self._zeros)

    def metrics(self, mean: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """Return the means of a day over the finished windows, for the logs.

        Args:
            mean: Averages a tensor over the ranks of a distributed run.
        """
        totals = self.totals()
        means = mean(torch.stack(list(totals.values())).mean(1) / self._days).tolist()
        day = dict(zip(totals, means, strict=True))
        peak_kw = day["peak_import_kw"] * self._days  # a window has one, however long it is
        site, figures = self.site, dict[str, float]()
        if site.price_per_kwh is not None:
            figures["site/cost"] = day["cost"]
            figures["site/uncontrolled_cost"] = day["uncontrolled_cost"]
        if site.objective != Objective():
            # Above 0 whatever the sign of what is paid: what is gained, in units of a day.
            gained = site.objective.of(
                day["uncontrolled_kg"] - day["co2_kg"], day["uncontrolled_cost"] - day["cost"]
            )
            figures["site/objective_vs_uncontrolled"] = 1.0 - gained / self.tables.unit
        if "misled_kwh" in day:
            figures["site/misled_kwh"] = day["misled_kwh"]
        return figures | {
            "site/co2_kg": day["co2_kg"],
            "site/uncontrolled_kg": day["uncontrolled_kg"],
            "site/co2_vs_uncontrolled": day["co2_kg"] / max(day["uncontrolled_kg"], 1e-9),
            "site/grid_import_kwh": day["grid_import_kwh"],
            "site/curtailment_kwh": day["curtailed_kwh"],
            # A battery that discharges into a surplus is curtailed too: more than there was PV.
            "site/self_consumption": max(
                0.0, 1.0 - day["curtailed_kwh"] / max(day["pv_kwh"], 1e-9)
            ),
            "site/peak_import_kw": peak_kw,
            "site/unmet_kwh": day["unmet_kwh"],
        }


_NO_DAY = "no day is running: call reset() or begin() first"


def _past_of(flows: Flows) -> Tensor:
    """Return what a window's totals are made of: grid kW, unmet kW, where drivers announce misled.

    [2, B] or [3, B].
    """
    misled_kw = [] if flows.misled_kw is None else [flows.misled_kw]
    return torch.stack([flows.grid_kw, flows.unmet_kw, *misled_kw]).detach()


def _windows(site: Site, horizon: int, hours: float) -> np.ndarray:
    """Return the days whose windows lie in the series and meet no held-out step."""
    held_out = np.concatenate([[0], (~site.training_steps).cumsum()])
    days = site.training_days
    begin, end = site.day_bounds[days], site.day_bounds[days] + horizon
    inside = end <= site.n_steps
    clear = held_out[np.minimum(end, site.n_steps)] == held_out[begin]
    if not (found := days[inside & clear]).size:
        raise UserError(
            f"--env.hours {hours:g}: no window of so many hours lies between the held-out days of "
            f"{site.name}; at least one day must begin it"
        )
    return found


def day_index(site: Site, day: str) -> int:
    """Return the index of an ISO date among the site's days."""
    if day not in site.days:
        raise UserError(
            f"day: {day} is not a day of site {site.name}; its days run from "
            f"{site.days[0]} to {site.days[-1]}, written YYYY-MM-DD"
        )
    return site.days.index(day)


def make_environment(
    site: str = "iquitos",
    num_envs: int = 64,
    hours: float = DAY_H,
    id: str | None = None,
    objective: dict[str, float] | str = "co2",
    action: Literal["powers", "moves"] = "powers",
    announced: bool = True,
) -> Environment:
    """Make the environment an agent trains in.

    Args:
        site: Name of a shipped site, or a site folder.
        num_envs: Windows simulated at once; an episode is one of each.
        hours: Length of a window, which begins where a day of the site does.
        id: A Gymnasium environment instead of a site, such as Pendulum-v1, for checking the
            algorithms; an episode is then one horizon of each of its copies.
        objective: What is to be made small: co2, cost where the site has prices, or weights of
            a kg and of a unit of its currency such as {co2: 1, cost: 0.2}.
        action: What an agent decides on a site: powers of vehicles and battery, or what each of
            their moves weighs.
        announced: Know of vehicles what drivers announce, where the sessions tell it; false: the
            truth.
    """
    if num_envs < 1:
        raise UserError(f"--env.num_envs {num_envs}: must be at least 1")
    if id is not None:
        from co2lightning.sim.foreign import GymEnvironment

        return GymEnvironment(id, num_envs)
    if not 1 <= hours <= 168:
        raise UserError(f"--env.hours {hours:g}: must be at least 1 and at most 168")
    found = load_site(site, objective=objective, announced=announced)
    return SiteDays(found, num_envs, hours=hours, action=action)
