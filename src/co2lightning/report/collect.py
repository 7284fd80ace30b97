"""What a report shows: runs read, checked and evaluated, grouped by their site.

Shapes: W held-out stretches, H = 24 hours, K classes of SoC, one where there is no battery.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.agents.agent import Agent
from co2lightning.agents.load import load_agent, outdated_on_site, policy_of
from co2lightning.control.rules import Rule, rbc_b
from co2lightning.control.state import Powers, SiteModel, State
from co2lightning.errors import UserError
from co2lightning.metrics import Settled
from co2lightning.report.comparison import count_text, evaluation_data, knowledge_data, settled_in
from co2lightning.report.looks import Look, rule_look, run_looks
from co2lightning.report.tables import summarize
from co2lightning.runs.files import read_file
from co2lightning.runs.reading import hash_row
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.evaluate import TITLES, Evaluation, Summary, elsewhere, evaluate, summarise
from co2lightning.sim.objective import priced_model
from co2lightning.sim.physics import step
from co2lightning.sim.schedule import Schedule, play
from co2lightning.sim.search import rules_of
from co2lightning.sim.worlds import knowing
from co2lightning.site.load import load_site, named_in
from co2lightning.site.model import DAY_H, Battery, Floats, Objective, Site
from co2lightning.site.trained_days import unseen
from co2lightning.terminal import say

HOURS = 24
SOC_CLASSES = 20


class _Heat(NamedTuple):
    """What an agent does other than RBC B in the very same state; every field is [H, K].

    Means over the steps that the agent itself came to, by the hour of the local clock and the SoC
    at their beginning. NaN where it never was.
    """

    battery_kw: Floats  # agent - rule, at the AC side, charging positive
    ev_kw: Floats  # agent - rule
    steps: Floats  # how many


class HeldOutDay(NamedTuple):
    """A day of a held-out stretch."""

    date: str
    stretch: int
    begin: int  # its first step, counted from the stretch's
    end: int  # the step after its last

    def of(self, schedule: Schedule) -> Schedule:
        """Return this day of what was done in its stretch."""
        return Schedule._make(field[self.begin : self.end] for field in schedule)


@dataclass(frozen=True, eq=False)
class Shown:
    """A rule, or a run, that is looked at closely.

    Attributes:
        name: The rule's or the run's.
        policy: Its name in the evaluation.
        evaluation: The references, with the agent beside them where it is a run.
    """

    name: str
    title: str
    policy: str
    evaluation: Evaluation
    heat: _Heat

    @property
    def summary(self) -> Summary:
        """What it reaches on the held-out stretches."""
        return summarise(self.evaluation)[self.policy]


@dataclass(frozen=True, eq=False)
class RunResult(Shown):
    """A run with its newest episode on the held-out stretches.

    Attributes:
        row: What `history` tells of it.
        agent: The class that acts.
        episode: The evaluated episode.
        file: Its file.
        sha256: Of that file.
        trained_on: Name and SHA-256 of the site it was trained on.
        knowing: Its evaluation where more is known, by the names of `worlds.KNOWLEDGE`.
    """

    row: dict[str, Any]
    agent: str
    episode: int
    file: Path
    sha256: str
    trained_on: tuple[str, str]
    knowing: dict[str, Evaluation]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Those of every episode."""
        return [metrics for session in self.row["sessions"] for metrics in session["metrics"]]


@dataclass(frozen=True, eq=False)
class SiteResult:
    """A site and an objective, its references, the runs evaluated on it and rules beside them.

    Attributes:
        knowing: The references where more is known, by the names of `worlds.KNOWLEDGE`.
    """

    site: Site
    references: Evaluation
    knowing: dict[str, Evaluation]
    runs: list[RunResult]
    rules: list[Shown]

    @property
    def shown(self) -> list[Shown]:
        """What is looked at closely."""
        return [*self.runs, *self.rules]

    @property
    def data(self) -> dict[str, Any]:
        """As `test --json` has it, with a policy for each run, by its title."""
        data = evaluation_data(self.references)
        data["knowledge"] = knowledge_data(data, self.knowing)
        for run in self.runs:
            own = evaluation_data(run.evaluation)
            for key in ("policies", "summary"):
                data[key][run.title] = own[key]["agent"]
            for world, told in knowledge_data(own, run.knowing).items():
                data["knowledge"].setdefault(world, {})[run.title] = told["agent"]
        return data

    @functools.cached_property
    def settled(self) -> Settled:
        """What its policies are settled by and compared with, in words."""
        return settled_in(evaluation_data(self.references))

    @property
    def share_key(self) -> str:
        """The figure of an episode that says how its days compare with the same uncontrolled."""
        of_co2 = self.settled.key == "co2_kg"
        return "co2_vs_uncontrolled" if of_co2 else "objective_vs_uncontrolled"

    @functools.cached_property
    def shares(self) -> dict[str, float]:
        """What each policy settles at, as a share of uncontrolled: by its name, a run by its title.

        Other than CO2, uncontrolled may be nothing or less, so it is what is gained in units of a
        day, as the episodes of training tell it.
        """
        key, found = self.settled.key, summarise(self.references)
        figures = {name: getattr(summary, key) for name, summary in found.items()}
        figures |= {run.title: getattr(run.summary, key) for run in self.runs}
        uncontrolled = figures["uncontrolled"]
        if key == "co2_kg":
            return {name: kg / max(uncontrolled, 1e-9) for name, kg in figures.items()}
        unit = self.references.unit
        return {name: 1.0 - (uncontrolled - own) / unit for name, own in figures.items()}

    @property
    def held_out_days(self) -> list[HeldOutDay]:
        """The days of all stretches."""
        bounds = self.site.day_bounds
        return [
            HeldOutDay(self.site.days[day], w, *(bounds[day : day + 2] - bounds[first]).tolist())
            for w, (first, end) in enumerate(self.site.stretches.tolist())
            for day in range(first, end)
        ]

    @property
    def typical_day(self) -> HeldOutDay:
        """The held-out day whose import emits the median CO2 under RBC B."""
        plans = self.references.schedules["rbc_b"]
        days = self.held_out_days
        days.sort(key=lambda day: float(day.of(plans[day.stretch]).co2_kg.sum()))
        return days[(len(days) - 1) // 2]

    def a_day(self, values: Floats) -> Floats:
        """Return figures of whole stretches [W] a day."""
        return values / self.references.hours * DAY_H

    @property
    def looks(self) -> dict[str, Look]:
        """How each of those that are shown is drawn, by its name."""
        looks = run_looks((run.name, run.agent) for run in self.runs)
        return looks | {rule.name: rule_look(rule.name) for rule in self.rules}

    @property
    def paired(self) -> list[str]:
        """The references that are drawn by their difference to the best of them.

        Uncontrolled is none where all others would shrink to a point beside it.
        """
        found = summarise(self.references)
        others = [found[name].vs_best for name in found if name != "uncontrolled"]
        others += [run.summary.vs_best for run in self.runs]
        near = abs(found["uncontrolled"].vs_best) <= 3 * max(abs(value) for value in others)
        best = self.references.best
        return [n for n in found if n != best and (near or n != "uncontrolled")]

    @property
    def compared(self) -> list[str]:
        """The fields of `_Heat` that the site has something for."""
        battery = ["battery_kw"] if self.site.battery else []
        return [*battery, *(["ev_kw"] if self.site.n_sockets else [])]

    def heat_limit_kw(self, what: str) -> float:
        """Return the end of the scale of a field of `_Heat`, the same for all that are shown.

        A few cells would leave the others without colour, so some lie beyond it.
        """
        sizes = np.abs(np.concatenate([getattr(one.heat, what).ravel() for one in self.shown]))
        wanted_kw = max(0.1, float(np.nanpercentile(sizes, 95)))
        power = 10.0 ** np.floor(np.log10(wanted_kw))
        steps = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
        return float(power * next(step for step in steps if step * power >= 0.999 * wanted_kw))


def soc_band(battery: Battery | None) -> tuple[int, int]:
    """Return the first class of SoC that a battery's band meets, and the one after the last."""
    if battery is None:
        return 0, 1
    first = int(np.floor(battery.soc_min * SOC_CLASSES + 1e-6))
    return first, int(np.ceil(battery.soc_max * SOC_CLASSES - 1e-6))


class _Loaded(NamedTuple):
    run: TrainingCheckpoint
    agent: Agent
    episode: int
    facts: dict[str, Any]  # what the checkpoint says of the run
    site: str
    objective: Any  # what it was trained on: text or weights
    announced: bool  # whether of vehicles what drivers announce is known
    path: Path

    @property
    def trained_on(self) -> tuple[str, str]:
        """Name and SHA-256 of a site; what may not be printed, of somebody's file, is "?"."""
        told = [self.facts["site"].get(key) for key in ("name", "sha256")]
        good = [isinstance(t, str) and t.isprintable() and len(t) < 80 for t in told]
        name, sha256 = (text if fine else "?" for text, fine in zip(told, good, strict=True))
        return name, sha256


def collect(
    runs: Sequence[TrainingCheckpoint],
    rules: Sequence[str],
    site: str | Site | None,
    announced: bool | None,
    keep: Path,
    best: bool,
) -> list[SiteResult]:
    """Read and evaluate runs; what is wrong with any of them comes out before the long part.

    Prints a line for each step of the work; on standard error whatever a site's reader left out,
    and each run that is left out or evaluated on another site.

    Args:
        runs: The run directories.
        rules: Names of rules to be looked at on the same sites.
        site: Evaluate all runs on this site, not on their own; where there are none, the rules' as
            it is loaded.
        announced: Whether of vehicles what drivers announce is known; None: as each run has it.
        keep: Directory where the optimum is kept from one command to the next.
        best: Show of each run the best evaluated episode, not the newest.

    Raises:
        UserError: A run is damaged, or was never evaluated where `best` is asked for, a site cannot
            be read, no run is left to show.
    """
    alone, named = (site, None) if isinstance(site, Site) else (None, site)
    loaded = [one for run in runs if (one := _load(run, named, announced, best))]
    if not loaded and alone is None:
        raise UserError("no run with an episode on a site; co2lightning fit trains one")
    sites: dict[tuple[str, str, bool], Site] = {}
    groups: dict[tuple[str, Objective, bytes, bool], tuple[Site, list[_Loaded]]] = {}
    for one in loaded:
        wanted = one.site, str(one.objective), one.announced
        if wanted not in sites:
            with named_in(None if named else one.path):
                sites[wanted] = load_site(
                    one.site, objective=one.objective, announced=one.announced
                )
            if one.site not in [known for known, *_ in list(sites)[:-1]]:
                say(*(f"{sites[wanted].name}: {note}" for note in sites[wanted].notes), err=True)
        found = sites[wanted]
        name, sha256 = one.trained_on
        if sha256 != found.sha256:
            say(
                f"{one.run.name}: evaluated on {found.name} (sha256 {found.sha256[:12]}), trained "
                f"on {name} (sha256 {sha256[:12]})",
                err=True,
            )
        try:
            found, remark = unseen(one.facts, found)
        except UserError as error:
            raise UserError(f"{one.run.name}: {error}") from None
        if remark:
            say(f"{one.run.name}: {remark}", err=True)
        stretches, told = found.stretches.tobytes(), found.told is not None
        key = found.sha256, found.objective, stretches, told
        groups.setdefault(key, (found, []))[1].append(one)
    results: list[SiteResult] = []
    for found, members in [(alone, [])] if alone else groups.values():
        held_out = count_text([{"days": end - begin} for begin, end in found.stretches.tolist()])
        say(f"{found.name}: the rules and the optimum in {held_out}")
        references = evaluate(None, found, keep=keep)
        worlds = knowing(found)
        told = {name: elsewhere(references, world, keep) for name, world in worlds.items()}
        results.append(SiteResult(found, references, told, [], []))
        own = rules_of(found, keep=keep)
        for name in rules:
            if name not in own:
                say(
                    f"{name}: no vehicle comes to {found.name} for it to charge, left out", err=True
                )
                continue
            heat = compare_to_rule(own[name], found)
            results[-1].rules.append(Shown(name, TITLES[name], name, references, heat))
        for one in members:
            say(f"{one.run.name}: episode {one.episode} there")
            results[-1].runs.append(_evaluated(one, results[-1], worlds))
    return results


def _load(
    run: TrainingCheckpoint, site: str | None, announced: bool | None, best: bool
) -> _Loaded | None:
    """Read a run's newest or best episode, None where it has nothing to show."""
    episodes = run.episodes()
    checkpoint = run.load_latest_checkpoint()
    if checkpoint is None:
        say(f"{run.name}: has no episode yet, left out", err=True)
        return None
    if checkpoint["episode"] < episodes[-1]:
        raise UserError(
            f"{run.path(episodes[-1])} is damaged; co2lightning verify {run.name} says how, the "
            "next resume puts it aside, and naming the other runs leaves this one out"
        )
    path = run.path(checkpoint["episode"])
    if best:
        checkpoint, path, remarks = run.load_best_checkpoint()
        say(*remarks, err=True)
    facts = checkpoint.get("run")
    if isinstance(facts, dict) and facts.get("agent") and not facts.get("site"):
        say(f"{run.name}: was not trained on a site, which alone has CO2, left out", err=True)
        return None
    if isinstance(facts, dict) and (outdated := outdated_on_site(facts)):
        say(f"{run.name}: {outdated.trained}, left out", err=True)
        return None
    agent, facts = load_agent(checkpoint, path), checkpoint["run"]
    config = facts["config"]
    wanted = site or config.get("env.site")
    if not isinstance(wanted, str) or not isinstance(facts["site"], dict):
        raise UserError(f"{path}: does not say which site it was trained on")
    objective = config.get("env.objective", "co2")
    known = config.get("env.announced") is not False if announced is None else announced
    return _Loaded(run, agent, checkpoint["episode"], facts, wanted, objective, known, path)


def _evaluated(one: _Loaded, result: SiteResult, worlds: Mapping[str, Site]) -> RunResult:
    site, device = result.site, one.agent.device
    policy, row = policy_of(one.agent, site), summarize(one.run)
    name, agent = row["name"], row["agent"]
    files = {row["file"]: row["sha256"] for row in one.run.load_history()["checkpoints"]}
    return RunResult(
        name=name,
        title=name if name == agent else f"{name} ({agent})",
        policy="agent",
        row=row,
        agent=type(one.agent).__name__,
        episode=one.episode,
        file=one.path,
        sha256=files.get(one.path.name) or hash_row(read_file(one.path))["sha256"],
        trained_on=one.trained_on,
        evaluation=evaluate(policy, site, result.references, device),
        heat=compare_to_rule(policy, site, device),
        knowing={
            name: evaluate(policy_of(one.agent, world), world, result.knowing[name], device)
            for name, world in worlds.items()
        },
    )


def compare_to_rule(policy: Rule, site: Site, device: torch.device | str = "cpu") -> _Heat:
    """Return what a policy does in held-out stretches other than RBC B in the same states."""
    seen: list[Tensor] = []  # of each step [4, B]: place, SoC, what is other than the rule's

    def watched(model: SiteModel, state: State) -> Tensor | Powers:
        action = policy(model, state)
        _, own = step(model, state, action)
        _, rule = step(model, state, rbc_b(model, state))
        battery_kw, ev_kw = own.battery_kw - rule.battery_kw, own.ev_kw - rule.ev_kw
        place = state.place.double()  # beyond 2**24 no float32 is exact
        seen.append(torch.stack([place, *(x.double() for x in (state.soc, battery_kw, ev_kw))]))
        return action

    play(priced_model(site, device), watched, site, site.stretch_bounds)
    place, soc, battery_kw, ev_kw = torch.cat(seen, 1).cpu().numpy()
    # Rounding may put an empty battery a hair below its band.
    first, end = soc_band(site.battery)
    level = np.clip(soc * SOC_CLASSES, first, end - 1).astype(int)
    clock = site.local[place.astype(int)]
    hour = clock.astype("datetime64[h]").astype(int) % HOURS
    classes = SOC_CLASSES if site.battery else 1
    cell = hour * classes + level

    def total(values: Floats) -> Floats:
        sums = np.bincount(cell, values, HOURS * classes)
        return sums.reshape(HOURS, classes).astype(float)

    steps = total(np.ones_like(soc))
    visited = np.where(steps > 0, steps, np.nan)
    return _Heat(total(battery_kw) / visited, total(ev_kw) / visited, steps)
