"""What a report shows: runs read, checked and evaluated, grouped by their site.

Shapes: D held-out days, T = 96 steps a day, H = 24 hours, K classes of SoC.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.agents.agent import Agent
from co2lightning.agents.load import before_time_went_on, load_agent, policy_of
from co2lightning.control.rules import Rule, rbc_b
from co2lightning.control.state import SiteModel, State
from co2lightning.errors import UserError
from co2lightning.report.looks import RunLook, run_looks
from co2lightning.report.tables import summarize
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.evaluate import Evaluation, Summary, evaluate, summarise
from co2lightning.sim.objective import priced_model
from co2lightning.sim.physics import step
from co2lightning.sim.schedule import schedule
from co2lightning.site.load import load_site, named_in
from co2lightning.site.model import Battery, Floats, Site, T
from co2lightning.site.trained_days import unseen

HOURS = 24
SOC_CLASSES = 20


class _Heat(NamedTuple):
    """What an agent does other than RBC B in the very same state; every field is [H, K].

    Means over the steps that the agent itself came to, by the hour and the SoC at their beginning.
    NaN where it never was.
    """

    battery_kw: Floats  # agent - rule, at the AC side, charging positive
    ev_kw: Floats  # agent - rule
    steps: Floats  # how many


@dataclass(frozen=True, eq=False)
class RunResult:
    """A run with its newest episode on the held-out days.

    Attributes:
        row: What `history` tells of it.
        agent: The class that acts.
        action: How the agent's output is read: "direct", or "correction" of RBC B's action.
        episode: The evaluated episode.
        file: Its file.
        sha256: Of that file.
        trained_on: Name and SHA-256 of the site it was trained on.
        evaluation: The agent beside the references.
    """

    row: dict[str, Any]
    agent: str
    action: str
    episode: int
    file: Path
    sha256: str
    trained_on: tuple[str, str]
    evaluation: Evaluation
    heat: _Heat

    @property
    def name(self) -> str:
        return self.row["name"]

    @property
    def title(self) -> str:
        """The run's name; with its agent where the name does not say it."""
        agent = self.row["agent"]
        title = self.name if self.name == agent else f"{self.name} ({agent})"
        return f"{title}, correcting RBC B" if self.action == "correction" else title

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Those of every episode."""
        return [metrics for session in self.row["sessions"] for metrics in session["metrics"]]

    @property
    def summary(self) -> Summary:
        """What the run reaches on the held-out days."""
        return summarise(self.evaluation)["agent"]


@dataclass(frozen=True, eq=False)
class SiteResult:
    """A site, its references and the runs evaluated on it."""

    site: Site
    references: Evaluation
    runs: list[RunResult]

    @property
    def typical_day(self) -> int:
        """Index of the held-out day on which RBC B emits the median CO2."""
        order = np.argsort(self.references.policies["rbc_b"].co2_kg, kind="stable")
        return int(order[(len(order) - 1) // 2])

    def heat_limit_kw(self, what: str) -> float:
        """Return the end of the scale of a field of `_Heat`, the same for all runs.

        A few cells would leave the others without colour, so some lie beyond it.
        """
        sizes = np.abs(np.concatenate([getattr(run.heat, what).ravel() for run in self.runs]))
        wanted_kw = max(0.1, float(np.nanpercentile(sizes, 95)))
        power = 10.0 ** np.floor(np.log10(wanted_kw))
        steps = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
        return float(power * next(step for step in steps if step * power >= 0.999 * wanted_kw))


def looks_of(results: Sequence[SiteResult]) -> dict[str, RunLook]:
    """Return how each run is drawn, the same throughout a report."""
    return run_looks((run.name, run.agent) for result in results for run in result.runs)


def soc_band(battery: Battery) -> tuple[int, int]:
    """Return the first class of SoC that a battery's band meets, and the one after the last."""
    first = int(np.floor(battery.soc_min * SOC_CLASSES + 1e-6))
    return first, int(np.ceil(battery.soc_max * SOC_CLASSES - 1e-6))


class _Loaded(NamedTuple):
    run: TrainingCheckpoint
    agent: Agent
    episode: int
    facts: dict[str, Any]  # what the checkpoint says of the run
    site: str
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
    site: str | None,
    echo: Callable[[str], None],
    warn: Callable[[str], None],
) -> list[SiteResult]:
    """Read and evaluate runs; what is wrong with any of them comes out before the long part.

    Args:
        runs: The run directories.
        site: Evaluate all runs on this site, not on their own.
        echo: Gets a line for each step of the work.
        warn: Gets a line for whatever a site's reader left out, and for each run that is left out
            or evaluated on another site.

    Raises:
        UserError: A run is damaged, a site cannot be read, no run is left to show.
    """
    loaded = [one for run in runs if (one := _load(run, site, warn))]
    if not loaded:
        raise UserError("no run with an episode on a site; co2lightning fit trains one")
    sites: dict[str, Site] = {}
    groups: dict[tuple[str, bytes], tuple[Site, list[_Loaded]]] = {}
    for one in loaded:
        if one.site not in sites:
            with named_in(None if site else one.path):
                sites[one.site] = load_site(one.site)
            for note in sites[one.site].notes:
                warn(f"{sites[one.site].name}: {note}")
        found = sites[one.site]
        name, sha256 = one.trained_on
        if sha256 != found.sha256:
            warn(
                f"{one.run.name}: evaluated on {found.name} (sha256 {found.sha256[:12]}), trained "
                f"on {name} (sha256 {sha256[:12]})"
            )
        try:
            found, remark = unseen(one.facts, found)
        except UserError as error:
            raise UserError(f"{one.run.name}: {error}") from None
        if remark:
            warn(f"{one.run.name}: {remark}")
        key = found.sha256, found.held_out.tobytes()
        groups.setdefault(key, (found, []))[1].append(one)
    results: list[SiteResult] = []
    for found, members in groups.values():
        count = len(found.held_out_days)
        echo(f"{found.name}: the rules and the optimum on {count} held-out days")
        results.append(SiteResult(found, evaluate(None, found), []))
        for one in members:
            echo(f"{one.run.name}: episode {one.episode} on these days")
            results[-1].runs.append(_evaluated(one, found, results[-1].references))
    return results


def _load(run: TrainingCheckpoint, site: str | None, warn: Callable[[str], None]) -> _Loaded | None:
    """Read a run's newest episode, None where it has nothing to show."""
    episodes = run.episodes()
    checkpoint = run.load_latest_checkpoint()
    if checkpoint is None:
        warn(f"{run.name}: has no episode yet, left out")
        return None
    if checkpoint["episode"] < episodes[-1]:
        raise UserError(
            f"{run.path(episodes[-1])} is damaged; co2lightning verify {run.name} says how, the "
            "next resume puts it aside, and naming the other runs leaves this one out"
        )
    path = run.path(checkpoint["episode"])
    described = checkpoint.get("run")
    if isinstance(described, dict) and described.get("agent") and not described.get("site"):
        warn(f"{run.name}: was not trained on a site, which alone has CO2, left out")
        return None
    if isinstance(described, dict) and (version := before_time_went_on(described)):
        warn(f"{run.name}: trained by version {version} on days that stand alone, left out")
        return None
    agent = load_agent(checkpoint, path)
    wanted = site or checkpoint["run"].get("config", {}).get("env.site")
    if not isinstance(wanted, str) or not isinstance(checkpoint["run"]["site"], dict):
        raise UserError(f"{path}: does not say which site it was trained on")
    return _Loaded(run, agent, checkpoint["episode"], checkpoint["run"], wanted, path)


def _evaluated(one: _Loaded, site: Site, references: Evaluation) -> RunResult:
    policy, device = policy_of(one.agent, site), one.agent.device
    files = {row["file"]: row["sha256"] for row in one.run.load_history()["checkpoints"]}
    return RunResult(
        row=summarize(one.run),
        agent=type(one.agent).__name__,
        action=one.agent.settings.action,
        episode=one.episode,
        file=one.path,
        sha256=files[one.path.name],
        trained_on=one.trained_on,
        evaluation=evaluate(policy, site, references, device),
        heat=compare_to_rule(policy, site, device),
    )


def compare_to_rule(policy: Rule, site: Site, device: torch.device | str = "cpu") -> _Heat:
    """Return what a policy does on held-out days other than RBC B in the same states."""
    seen: list[Tensor] = []  # of each step [3, B]: SoC and what the rule would do

    def watched(model: SiteModel, state: State) -> Tensor:
        _, flows = step(model, state, rbc_b(model, state))
        seen.append(torch.stack([state.soc, flows.battery_kw, flows.ev_kw]))
        return policy(model, state)

    own = schedule(priced_model(site, device), watched, site, site.held_out_days.tolist())
    # The steps came T by T, for some days after others.
    parts = [torch.stack(seen[i : i + T], 2) for i in range(0, len(seen), T)]
    soc, rule_battery_kw, rule_ev_kw = torch.cat(parts, 1).double().cpu().numpy()
    # Rounding may put an empty battery a hair below its band.
    first, end = soc_band(site.battery)
    of_day = np.clip(soc * SOC_CLASSES, first, end - 1).astype(int)
    hours = np.broadcast_to(np.arange(T) * HOURS // T, of_day.shape)
    cell = (hours * SOC_CLASSES + of_day).ravel()

    def total(values: Floats) -> Floats:
        sums = np.bincount(cell, values.ravel(), HOURS * SOC_CLASSES)
        return sums.reshape(HOURS, SOC_CLASSES).astype(float)

    steps = total(np.ones_like(own.soc))
    visited = np.where(steps > 0, steps, np.nan)
    return _Heat(
        battery_kw=total(own.battery_kw - rule_battery_kw) / visited,
        ev_kw=total(own.ev_kw - rule_ev_kw) / visited,
        steps=steps,
    )
