"""The site as an environment for Gymnasium: numpy around the one simulator, `days.SiteDays`.

The single environment is the B = 1 case of the vector one.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from co2lightning.control.moves import ACTIONS, MOVES
from co2lightning.control.observation import FEATURES
from co2lightning.errors import UserError, show
from co2lightning.sim.days import SiteDays, day_index
from co2lightning.sim.objective import metered
from co2lightning.sim.schedule import start_soc
from co2lightning.site.load import load_site
from co2lightning.site.model import DAY_H, Ints, Site

_WEEKS = "training", "held_out"


class ChargingSiteVectorEnv(gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """B windows of a charging site at once, for Gymnasium.

    One episode is a window of a day, in steps of the site's own length, and is truncated at its
    end: time goes on. The action is two numbers in [-1, 1]: the EV
    charging power between what must and what could be charged now, and the battery's power as a
    share of its rating, charging positive. With `action="moves"` it is ten numbers in [-1, 1]:
    what each move weighs, by a softmax of 5 x the number over the moves of the vehicles, and over
    those of the battery; what a site cannot do weighs nothing:

    MOVES_TABLE

    A shield charges first what a vehicle's departure
    demands, so no policy leaves energy unserved that charging on arrival would have served. The
    reward is the CO2, or what else the objective is, that is saved against no control at the same
    step, in units of what the site emits on a day without it (see `co2lightning.sim.objective`).

    `info` carries `co2_kg`, `grid_import_kwh`, `curtailed_kwh` and `unmet_kwh` of the step, and
    `cost` where the site has prices, `misled_kwh` where drivers announce: what of the unmet is due
    to that; that of a reset `day`, the dates. After a window's last step the next call of `step`
    ignores its actions and begins new days (NEXT_STEP autoreset).

    Windows are of training days. They begin with what a simple rule, which charges vehicles in the
    cheap hours and the battery from the sun, has left there; half of the batteries, drawn by
    chance, begin anywhere in the site's start range. `options={"day": "2025-03-01"}` begins a
    window on any day, as evaluation would begin it.

    With `weeks="held_out"` an episode is a whole held-out stretch in one go, begun as evaluation
    begins it and truncated at its end, whatever `hours` is; every reset takes the next ones, B at
    once, a seed begins with the first again. Those that run side by side are of one length: a week
    in which clocks change is a round of its own, and who is left over in a round begins its
    stretches again. The dates at which they begin are `env.unwrapped.held_out`;
    `reset(options={"stretch": "2025-02-05"})` plays that one. What is left at its end only
    `co2lightning.evaluate` settles.

    Observation, float32 of shape [B, N_FEATURES], each feature less its mean and in units of its
    spread on this site, at most 10 of them either way. What belongs to a part that the site has
    not is 0:

    OBSERVATION_TABLE

    Args:
        num_envs: B, windows at once.
        site: Name of a shipped site, or a site folder.
        hours: Length of a window.
        objective: What is to be made small, as `load_site` takes it: co2, cost or weights.
        action: "powers", or "moves": what each of the site's moves weighs.
        weeks: What is played: "training" or "held_out".
        announced: Know of vehicles what drivers announce, where the sessions tell it; False: the
            truth.
        render_mode: Only None; the report draws the days.

    Raises:
        UserError: The site cannot be read, the message names file, row and column; or nothing is
            held out there.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        site: str | Path = "iquitos",
        render_mode: str | None = None,
        hours: float = DAY_H,
        objective: str | Mapping[str, float] = "co2",
        action: Literal["powers", "moves"] = "powers",
        weeks: Literal["training", "held_out"] = "training",
        announced: bool = True,
    ) -> None:
        if action not in ACTIONS:
            raise UserError(f"action {show(action)}: must be {' or '.join(ACTIONS)}")
        if weeks not in _WEEKS:
            raise UserError(f"weeks {show(weeks)}: must be {' or '.join(_WEEKS)}")
        found = load_site(site, objective=objective, announced=announced)
        self.days = SiteDays(found, num_envs, hours=hours, action=action)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self._streams: list[np.random.Generator] = []  # that draw days: one for all, or B
        highest = self.days.observer.high[:, 0].numpy()
        self.single_observation_space = gym.spaces.Box(-highest, highest)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (self.days.action_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.held_out = _held_out(self.days.site)
        # Held-out stretches [B] of each reset, and which comes next; None: training days are drawn.
        self._rounds = _rounds(self.days.site, num_envs) if weeks == "held_out" else None
        self._next = 0

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin B training days, or the next held-out stretches, or what `options` name.

        Args:
            seed: One for all days, no two of which are the same; or B of them, each of which gives
                the days that the single environment has with it. None goes on as before. Any
                begins with the first held-out stretches, of which none is drawn.
            options: `{"day": "2025-03-01"}` begins that day, all B of it; `{"stretch":
                "2025-02-05"}` the held-out stretch that begins on that day, as evaluation does.

        Raises:
            UserError: There is no such day, or no held-out stretch begins on it.
        """
        if seed is None or isinstance(seed, int):
            super().reset(seed=seed)
            if seed is not None or not self._streams:
                self._streams = [self.np_random]
        else:
            self._streams = self._streams_of(seed)
        if seed is not None:
            self._next = 0
        site, count, given = self.days.site, self.num_envs, options or {}
        soc, steps, stretches, drawn = torch.full((count,), start_soc(site)), None, None, False
        if "stretch" in given:
            stretches = np.full(count, _stretch(site, str(given["stretch"])))
        elif self._rounds and "day" not in given:
            stretches = self._rounds[self._next % len(self._rounds)]
            self._next += 1
        if stretches is not None:
            days = torch.as_tensor(site.stretches[stretches, 0])
            begin, end = site.stretch_bounds[stretches[0]].tolist()
            steps = end - begin
        elif "day" in given:
            days = torch.full((count,), day_index(site, str(given["day"])))
        else:
            each, drawn = count // len(self._streams), True
            starts = [self.days.draw(int(s.integers(2**31)), each) for s in self._streams]
            days, soc = (torch.cat(parts) for parts in zip(*starts, strict=True))
        obs = self.days.begin(days, soc, steps, recorded=drawn)
        return obs.numpy(), {"day": np.array([site.days[day] for day in days.tolist()])}

    def _streams_of(self, seeds: Sequence[int | None]) -> list[np.random.Generator]:
        if len(seeds) != self.num_envs:
            raise UserError(
                f"seed: {len(seeds)} seeds for {self.num_envs} environments; give one for each, "
                "or one number for all"
            )
        own = self._streams
        if len(own) != self.num_envs:
            own = [np_random()[0] for _ in seeds]
        return [
            stream if seed is None else np_random(int(seed))[0]
            for seed, stream in zip(seeds, own, strict=True)
        ]

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Run one step; after the window's last one the next call begins new days."""
        never = np.zeros(self.num_envs, dtype=bool)
        if not self.days.steps_left:
            obs, info = self.reset()
            return obs, np.zeros(self.num_envs), never, never, info
        with torch.no_grad():
            action = torch.from_numpy(np.asarray(actions, dtype=np.float32))
            result = self.days.step(action)
        flows, step_h = self.days.flows, self.days.site.step_h
        model, place = self.days.model, self.days.carry.place - 1
        co2_kg, cost = metered(model, place, flows.grid_kw.unsqueeze(0))
        info = {
            "co2_kg": co2_kg[0].numpy(),
            "grid_import_kwh": flows.grid_kw.relu().numpy() * step_h,
            "curtailed_kwh": (-flows.grid_kw).relu().numpy() * step_h,
            "unmet_kwh": flows.unmet_kw.numpy() * step_h,
        }
        if flows.misled_kw is not None:
            info["misled_kwh"] = flows.misled_kw.numpy() * step_h
        if self.days.site.price_per_kwh is not None:
            info["cost"] = cost[0].numpy()
        reward = result.reward.double().numpy()
        return result.obs.numpy(), reward, never, result.truncated.numpy() > 0.5, info


class ChargingSiteEnv(gym.Env[np.ndarray, np.ndarray]):
    """One window of a charging site: the B = 1 case of `ChargingSiteVectorEnv`, which see.

    Args:
        site: Name of a shipped site, or a site folder.
        render_mode: Only None; the report draws the days.
        hours: Length of a window.
        objective: What is to be made small, as `load_site` takes it.
        action: "powers" or "moves".
        weeks: What is played: "training" or "held_out".
        announced: Know of vehicles what drivers announce, where the sessions tell it.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        site: str | Path = "iquitos",
        render_mode: str | None = None,
        hours: float = DAY_H,
        objective: str | Mapping[str, float] = "co2",
        action: Literal["powers", "moves"] = "powers",
        weeks: Literal["training", "held_out"] = "training",
        announced: bool = True,
    ) -> None:
        self._vector = ChargingSiteVectorEnv(
            1, site, None, hours, objective, action, weeks, announced
        )
        self.render_mode = render_mode
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space
        self.held_out = self._vector.held_out

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a training day or the next held-out stretch, or what `options` name."""
        super().reset(seed=seed)
        obs, info = self._vector.reset(seed=seed, options=options)
        return obs[0], _first(info)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Run one step."""
        obs, reward, _, truncated, info = self._vector.step(np.asarray(action)[None])
        return obs[0], float(reward[0]), False, bool(truncated[0]), _first(info)


def _stretch(site: Site, day: str) -> int:
    """Return the number of the held-out stretch that begins on a date.

    Raises:
        UserError: None does.
    """
    if day not in (dates := _held_out(site)):
        raise UserError(
            f"stretch: no held-out stretch of {site.name} begins on {day}; they begin on "
            f"{', '.join(dates)}"
        )
    return dates.index(day)


def _rounds(site: Site, count: int) -> list[Ints]:
    """Return which held-out stretches [count] run side by side, those of one length, in order.

    Raises:
        UserError: None is held out.
    """
    lengths = np.diff(site.stretch_bounds, axis=1)[:, 0]
    if not len(lengths):
        raise UserError(f"weeks: nothing is held out of {site.name}; 'training' plays its days")
    alike = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    rounds = [
        own[(np.arange(count) + first) % len(own)]
        for own in alike
        for first in range(0, len(own), count)
    ]
    return sorted(rounds, key=lambda stretches: stretches[0])


def _held_out(site: Site) -> tuple[str, ...]:
    return tuple(site.days[day] for day in site.stretches[:, 0].tolist())


def _first(info: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: values.tolist()[0] for name, values in info.items()}


def _observation_table() -> str:
    header = f"{'#':>2}  {'name':<18} {'unit':<8} meaning"
    rows = [f"{i:>2}  {f.name:<18} {f.unit:<8} {f.meaning}" for i, f in enumerate(FEATURES)]
    return "\n".join(f"    {line}".rstrip() for line in [header, *rows])


def _moves_table() -> str:
    rows = [f"{i:>2}  {name:<12} {meaning}" for i, (name, meaning) in enumerate(MOVES)]
    return "\n".join(f"    {row}" for row in rows)


if ChargingSiteVectorEnv.__doc__:
    ChargingSiteVectorEnv.__doc__ = (
        inspect.cleandoc(ChargingSiteVectorEnv.__doc__)
        .replace("OBSERVATION_TABLE", _observation_table())
        .replace("MOVES_TABLE", _moves_table())
        .replace("N_FEATURES", str(len(FEATURES)))
    )
