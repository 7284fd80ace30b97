"""How good a policy is: the held-out stretches, paired with the rules and the optimum.

Every policy meets the same stretches with the same battery and vehicles at their begin, so
policies are compared stretch by stretch: weeks differ by much, policies by far less. What a stretch
leaves undone is settled by what the best operation of the two days after it would still cost; what
charging on arrival would leave, the battery as it was at the begin, settles at 0.

The physics runs in float32, as in training; the optimum is computed in float64. Both see the same
stretch, so the optimum may lie above a policy by rounding only: `tolerance_kg` says how much.

Shapes: W stretches, n steps of one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from co2lightning.control.rules import Rule
from co2lightning.errors import UserError
from co2lightning.sim.kept import bounds_of
from co2lightning.sim.objective import priced_model
from co2lightning.sim.optimum import tail_kg
from co2lightning.sim.schedule import Played, Schedule, play, start_soc
from co2lightning.sim.search import rbc_c_in_words, rules_of
from co2lightning.site.model import DAY_H, Floats, Ints, Site

# All that may be among the references of a site, in their order.
TITLES = {
    "uncontrolled": "uncontrolled",
    "rbc_a": "RBC A",
    "rbc_b": "RBC B",
    "cheap": "cheap hours",
    "rbc_c": "RBC C",
    "cheap_true": "cheap hours, true carbon",
    "rbc_c_true": "RBC C, true carbon",
    "optimum": "optimum (LP)",
}

MPC_TITLE = "MPC"
"""What model predictive control is called, which only some evaluations have."""

STRETCHES_FOR_AN_INTERVAL = 8
"""With fewer, their spread says too little: each stretch is shown instead."""

_LEAST_GAP = 1e-3  # of what uncontrolled emits: below it, a share of the gap says nothing
_ROUNDING = 1e-6  # relative, of float32 powers: no excess over a limit


class Figures(NamedTuple):
    """What a policy did in each stretch; every field is [W]."""

    co2_kg: Floats  # of the import, and settled
    settlement_kg: Floats  # how much of it is what was left at the end
    unmet_kwh: Floats  # beyond what charging on arrival would also leave
    grid_import_kwh: Floats
    curtailed_kwh: Floats
    peak_import_kw: Floats
    over_limit_kwh: Floats  # imported beyond the connection: what must be charged wins


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Policies side by side on the held-out stretches of a site.

    Attributes:
        site: The site's name.
        days: Local dates (ISO) at which the stretches begin, W of them.
        n_days: How many days each has, [W].
        hours: How many hours, [W].
        pv_kwh: What the PV could give, [W].
        unavoidable_kwh: What charging on arrival leaves unserved, [W].
        turned_away_kwh: What vehicles ask for that find no socket, [W].
        clipped_kwh: What sessions ask for beyond what their stays allow, [W].
        standard_kg: What the tail takes at least of whoever leaves what charging on arrival
            leaves, and in the battery what was there at the begin, [W].
        tolerance_kg: By how much rounding may put a policy below the optimum, [W].
        policies: Per policy its figures: the agent if there is one, the rules, the optimum.
        schedules: Per policy what it did in every step of each stretch.
        rbc_c: What RBC C does, in words.
    """

    site: str
    days: tuple[str, ...]
    n_days: Ints
    hours: Floats
    pv_kwh: Floats
    unavoidable_kwh: Floats
    turned_away_kwh: Floats
    clipped_kwh: Floats
    standard_kg: Floats
    tolerance_kg: Floats
    policies: dict[str, Figures]
    schedules: dict[str, list[Schedule]] = field(default_factory=dict)
    rbc_c: str = ""


class Summary(NamedTuple):
    """A policy over all stretches: totals a day, that is, by their hours.

    Intervals are half widths; None with fewer than eight stretches. Shares are None where there is
    nothing to share.
    """

    co2_kg: float  # a day
    co2_kg_interval: float | None  # 95 % interval over stretches: +- so much
    vs_rbc_b_kg: float  # a day
    vs_rbc_b_kg_interval: float | None  # of the paired differences
    gap_closed: float | None  # share of the way from uncontrolled to the optimum
    unmet_kwh: float  # a day
    self_consumption: float | None  # share of the PV that found a use
    curtailed_kwh: float  # a day
    peak_import_kw: float  # highest of all stretches


def evaluate(
    policy: Rule | None,
    site: Site,
    references: Evaluation | None = None,
    device: torch.device | str = "cpu",
    keep: Path | None = None,
    foresight: bool = False,
) -> Evaluation:
    """Run a policy through the held-out stretches and put it beside the rules and the optimum.

    Args:
        policy: In the form of a rule, as "agent" in what is returned; None evaluates the
            references alone.
        site: The site.
        references: An earlier evaluation of the same site, to spare the rules and the optimum.
        device: Where the policy acts.
        keep: Directory where the optimum and RBC C are kept from one command to the next.
        foresight: Whether rules that look at what is to come are among the references also as
            they were if the carbon to come were known.
    """
    if policy is None:
        return references or _references(site, keep, foresight)
    own = play(priced_model(site, device), policy, site, site.stretch_bounds)
    for played in own:
        check_finite(played.schedule)
    references = references or _references(site, keep, foresight)
    figures = _settled(site, own, references.standard_kg, references.unavoidable_kwh)
    return replace(
        references,
        policies={"agent": figures, **references.policies},
        schedules={"agent": _schedules(own), **references.schedules},
    )


def beside(evaluation: Evaluation, site: Site, name: str, played: list[Played]) -> Evaluation:
    """Put another policy beside those of an evaluation, just before the optimum.

    Args:
        evaluation: Of the same site.
        site: The site.
        name: The policy's.
        played: How each held-out stretch has gone under it.
    """
    standard_kg, unavoidable_kwh = evaluation.standard_kg, evaluation.unavoidable_kwh
    figures = _settled(site, played, standard_kg, unavoidable_kwh)
    policies = evaluation.policies | {name: figures}
    schedules = evaluation.schedules | {name: _schedules(played)}
    policies["optimum"] = policies.pop("optimum")
    schedules["optimum"] = schedules.pop("optimum")
    return replace(evaluation, policies=policies, schedules=schedules)


def check_finite(own: Schedule) -> None:
    """Raise a UserError if an agent's actions were none: finite weights can be too large, too."""
    if not np.isfinite(own.co2_kg).all():
        raise UserError(
            "the policy's actions are no finite numbers, training diverged; give an earlier "
            "episode: --ckpt_path FILE"
        )


def _references(site: Site, keep: Path | None, foresight: bool) -> Evaluation:
    # As the physics holds it: whoever leaves the battery idle then settles at 0.
    soc = float(np.float32(start_soc(site)))
    bounds = bounds_of(site, soc * site.battery.capacity_kwh if site.battery else 0.0, keep)
    standard_kg = bounds.standard_kg
    model, places = priced_model(site), site.stretch_bounds
    own = rules_of(site, keep=keep, foresight=foresight)
    rules = {name: play(model, rule, site, places) for name, rule in own.items()}
    unavoidable_kwh = _each(lambda plan: plan.unmet_kwh.sum(), _schedules(rules["uncontrolled"]))
    policies = {
        name: _settled(site, played, standard_kg, unavoidable_kwh) for name, played in rules.items()
    }
    best = [one.schedule for one in bounds.best]
    rest_kg = np.array([one.kg - one.schedule.co2_kg.sum() for one in bounds.best])
    policies["optimum"] = _figures(site, best, rest_kg - standard_kg, unavoidable_kwh)
    starts, ends = places.T
    hours = (ends - starts) * site.step_h

    def within(values: Floats) -> Floats:
        return np.array([values[a:b].sum() for a, b in places])

    return Evaluation(
        site=site.name,
        days=tuple(site.when(int(start)).date().isoformat() for start in starts),
        n_days=np.diff(site.stretches, axis=1)[:, 0],
        hours=hours,
        pv_kwh=within(site.pv_kw) * site.step_h,
        unavoidable_kwh=unavoidable_kwh,
        turned_away_kwh=within(site.turned_away_kwh),
        clipped_kwh=within(site.clipped_kwh),
        standard_kg=standard_kg,
        tolerance_kg=_tolerance_kg(site, policies["uncontrolled"].co2_kg + standard_kg),
        policies=policies,
        schedules={name: _schedules(played) for name, played in rules.items()} | {"optimum": best},
        rbc_c=rbc_c_in_words(site, keep),
    )


def _tolerance_kg(site: Site, emitted_kg: Floats) -> Floats:
    """Return by how much rounding may put a policy below the optimum, [W].

    Each of n steps may round what the battery holds; what a vehicle is owed and what the meter
    counts goes through some 16 roundings of its own size. Measured: up to 2e-4 kg in a week of
    4,000 kg with a battery of 580 kWh, where this allows 0.03 kg.
    """
    capacity_kwh = site.battery.capacity_kwh if site.battery else 0.0
    stored_kg = [
        (end - start) / 2 * capacity_kwh * site.carbon_kg_per_kwh[start:end].max()
        for start, end in site.stretch_bounds
    ]
    rounded = float(np.finfo(np.float32).eps)
    return 1e-6 + rounded * (np.array(stored_kg) + 16.0 * emitted_kg)


def _schedules(played: list[Played]) -> list[Schedule]:
    return [one.schedule for one in played]


def _each(figure: Callable[[Schedule], float], schedules: list[Schedule]) -> Floats:
    return np.array([figure(plan) for plan in schedules], dtype=np.float64)


def _settled(
    site: Site, played: list[Played], standard_kg: Floats, unavoidable_kwh: Floats
) -> Figures:
    ends = zip(site.stretch_bounds[:, 1].tolist(), played, strict=True)
    left_kg = np.array([tail_kg(site, end, one.stored_kwh, one.owed_kwh) for end, one in ends])
    return _figures(site, _schedules(played), left_kg - standard_kg, unavoidable_kwh)


def _figures(
    site: Site, schedules: list[Schedule], settlement_kg: Floats, unavoidable_kwh: Floats
) -> Figures:
    step_h = site.step_h
    over_kwh = [
        _over_kw(plan, site.import_limit_kw[a:b]).sum() * step_h
        for plan, (a, b) in zip(schedules, site.stretch_bounds, strict=True)
    ]
    unmet_kwh = _each(lambda plan: plan.unmet_kwh.sum(), schedules)
    return Figures(
        co2_kg=_each(lambda plan: plan.co2_kg.sum(), schedules) + settlement_kg,
        settlement_kg=settlement_kg,
        unmet_kwh=np.maximum(unmet_kwh - unavoidable_kwh, 0.0),
        grid_import_kwh=_each(lambda plan: plan.grid_import_kw.sum() * step_h, schedules),
        curtailed_kwh=_each(lambda plan: plan.curtailed_kwh.sum(), schedules),
        peak_import_kw=_each(lambda plan: plan.grid_import_kw.max(), schedules),
        over_limit_kwh=np.array(over_kwh),
    )


def _over_kw(plan: Schedule, limit_kw: Floats) -> Floats:
    over_kw = plan.grid_import_kw - limit_kw
    return np.where(over_kw > _ROUNDING * plan.grid_import_kw, over_kw, 0.0)


# --- statistics ----------------------------------------------------------------------------------


def summarise(evaluation: Evaluation) -> dict[str, Summary]:
    """Return every policy's totals a day, intervals and shares."""
    policies, days = evaluation.policies, evaluation.hours / DAY_H
    pv_kwh = float(evaluation.pv_kwh.sum())

    def a_day(values: Floats) -> float:
        return float(values.sum() / days.sum())

    uncontrolled_kg = a_day(policies["uncontrolled"].co2_kg)
    gap_kg = uncontrolled_kg - a_day(policies["optimum"].co2_kg)
    summaries: dict[str, Summary] = {}
    for name, figures in policies.items():
        co2_kg, difference_kg = a_day(figures.co2_kg), figures.co2_kg - policies["rbc_b"].co2_kg
        summaries[name] = Summary(
            co2_kg=co2_kg,
            co2_kg_interval=mean_interval(figures.co2_kg / days)[1],
            vs_rbc_b_kg=a_day(difference_kg),
            vs_rbc_b_kg_interval=mean_interval(difference_kg / days)[1],
            gap_closed=(uncontrolled_kg - co2_kg) / gap_kg
            if gap_kg > _LEAST_GAP * abs(uncontrolled_kg)
            else None,
            unmet_kwh=a_day(figures.unmet_kwh),
            self_consumption=max(0.0, 1.0 - float(figures.curtailed_kwh.sum()) / pv_kwh)
            if pv_kwh
            else None,
            curtailed_kwh=a_day(figures.curtailed_kwh),
            peak_import_kw=float(figures.peak_import_kw.max()),
        )
    return summaries


def mean_interval(values: Floats) -> tuple[float, float | None]:
    """Return the mean and the half width of its 95 % interval, Student's t over stretches [W].

    Fewer than eight have none.
    """
    count = len(values)
    if count < STRETCHES_FOR_AN_INTERVAL:
        return float(values.mean()), None
    half_width = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5
    return float(values.mean()), float(half_width)


def violations(evaluation: Evaluation) -> list[str]:
    """Name every stretch in which a policy is better than the optimum: each is a defect."""
    bound_kg = evaluation.policies["optimum"].co2_kg
    return [
        f"{evaluation.days[i]}: {name} emits {figures.co2_kg[i]:.6f} kg, the optimum "
        f"{bound_kg[i]:.6f} kg"
        for name, figures in evaluation.policies.items()
        for i in np.flatnonzero(figures.co2_kg < bound_kg - evaluation.tolerance_kg)
    ]
