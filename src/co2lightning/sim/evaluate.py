"""How good a policy is: the held-out days, paired with the rules and the optimum.

Every policy meets the same days with the same battery start, so policies are compared day by day:
days differ by 40-80 kg, policies by far less.

The physics runs in float32, as in training; the optimum is computed in float64. Both see the same
day, so the optimum may lie above a policy by rounding only: `tolerance_kg` says how much that is.

Shapes: D held-out days.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from co2lightning.control.rules import RULES, Rule
from co2lightning.errors import UserError
from co2lightning.sim.objective import priced_model
from co2lightning.sim.optimum import optimum_schedule
from co2lightning.sim.schedule import Schedule, schedule
from co2lightning.site.model import STEP_H, Floats, Site, T

TITLES = {
    "uncontrolled": "uncontrolled",
    "rbc_a": "RBC A",
    "rbc_b": "RBC B",
    "optimum": "optimum (LP)",
}


class Figures(NamedTuple):
    """What a policy did on each day; every field is [D]."""

    co2_kg: Floats
    unmet_kwh: Floats  # beyond what charging on arrival would also leave
    grid_import_kwh: Floats
    curtailed_kwh: Floats
    peak_import_kw: Floats


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Policies side by side on the held-out days of a site.

    Attributes:
        site: The site's name.
        days: Local dates (ISO), D of them.
        pv_kwh: What the PV could give, [D].
        unavoidable_kwh: What charging on arrival leaves unserved, [D].
        tolerance_kg: By how much rounding may put a policy below the optimum, [D].
        policies: Per policy its figures: the agent if there is one, the rules, the optimum.
        schedules: Per policy what it did in every step of these days.
    """

    site: str
    days: tuple[str, ...]
    pv_kwh: Floats
    unavoidable_kwh: Floats
    tolerance_kg: Floats
    policies: dict[str, Figures]
    schedules: dict[str, Schedule] = field(default_factory=dict)


class Summary(NamedTuple):
    """A policy over all days. Intervals are half widths; None where one day or no gap is left."""

    co2_kg: float  # mean per day
    co2_kg_interval: float | None  # 95 % interval of the mean: +- so much
    vs_rbc_b_kg: float  # mean of the paired differences
    vs_rbc_b_kg_interval: float | None
    gap_closed: float | None  # share of the way from uncontrolled to the optimum
    unmet_kwh: float  # mean per day
    self_consumption: float | None  # share of all days' PV that found a use
    curtailed_kwh: float  # mean per day
    peak_import_kw: float  # highest of all days


def evaluate(
    policy: Rule | None,
    site: Site,
    references: Evaluation | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Run a policy's held-out days and put them beside the rules' and the optimum's.

    Args:
        policy: In the form of a rule, as "agent" in what is returned; None evaluates the
            references alone.
        site: The site.
        references: An earlier evaluation of the same site, to spare the rules and the optimum.
        device: Where the policy acts.
    """
    if policy is None:
        return references or _references(site)
    own = schedule(priced_model(site, device), policy, site, site.held_out_days.tolist())
    check_finite(own)
    references = references or _references(site)
    return replace(
        references,
        policies={"agent": _figures(own, references.unavoidable_kwh), **references.policies},
        schedules={"agent": own, **references.schedules},
    )


def check_finite(own: Schedule) -> None:
    """Raise a UserError if an agent's actions were none: finite weights can be too large, too."""
    if not np.isfinite(own.co2_kg).all():
        raise UserError(
            "the policy's actions are no finite numbers, training diverged; give an earlier "
            "episode: --ckpt_path FILE"
        )


def reference_schedules(site: Site, days: list[int]) -> dict[str, Schedule]:
    """Return what the rules and the optimum do on days of a site."""
    model = priced_model(site)
    schedules = {name: schedule(model, rule, site, days) for name, rule in RULES.items()}
    return schedules | {"optimum": optimum_schedule(site, days)}


def _references(site: Site) -> Evaluation:
    days = site.held_out_days.tolist()
    schedules = reference_schedules(site, days)
    unavoidable_kwh = schedules["uncontrolled"].unmet_kwh.sum(1)
    policies = {name: _figures(s, unavoidable_kwh) for name, s in schedules.items()}
    # Each of the T steps may round what the battery holds and what the meter has counted.
    stored_kg = site.battery.capacity_kwh * site.carbon_kg_per_kwh[days].max(axis=1)
    rounding = T * float(np.finfo(np.float32).eps) / 2.0
    return Evaluation(
        site=site.name,
        days=tuple(site.days[day] for day in days),
        pv_kwh=site.pv_kw[days].sum(axis=1) * STEP_H,
        unavoidable_kwh=unavoidable_kwh,
        tolerance_kg=1e-6 + rounding * (stored_kg + policies["uncontrolled"].co2_kg),
        policies=policies,
        schedules=schedules,
    )


def _figures(schedule: Schedule, unavoidable_kwh: Floats) -> Figures:
    return Figures(
        co2_kg=schedule.co2_kg.sum(1),
        unmet_kwh=np.maximum(schedule.unmet_kwh.sum(1) - unavoidable_kwh, 0.0),
        grid_import_kwh=schedule.grid_import_kw.sum(1) * STEP_H,
        curtailed_kwh=schedule.curtailed_kwh.sum(1),
        peak_import_kw=schedule.grid_import_kw.max(1),
    )


# --- statistics ----------------------------------------------------------------------------------


def summarise(evaluation: Evaluation) -> dict[str, Summary]:
    """Return every policy's means, intervals and shares."""
    policies = evaluation.policies
    uncontrolled_kg = float(policies["uncontrolled"].co2_kg.mean())
    gap_kg = uncontrolled_kg - float(policies["optimum"].co2_kg.mean())
    pv_kwh = float(evaluation.pv_kwh.sum())
    summaries: dict[str, Summary] = {}
    for name, figures in policies.items():
        co2_kg, interval = mean_interval(figures.co2_kg)
        difference_kg, difference_interval = mean_interval(
            figures.co2_kg - policies["rbc_b"].co2_kg
        )
        summaries[name] = Summary(
            co2_kg=co2_kg,
            co2_kg_interval=interval,
            vs_rbc_b_kg=difference_kg,
            vs_rbc_b_kg_interval=difference_interval,
            gap_closed=(uncontrolled_kg - co2_kg) / gap_kg if gap_kg > 1e-6 else None,
            unmet_kwh=float(figures.unmet_kwh.mean()),
            self_consumption=max(0.0, 1.0 - float(figures.curtailed_kwh.sum()) / pv_kwh)
            if pv_kwh
            else None,
            curtailed_kwh=float(figures.curtailed_kwh.mean()),
            peak_import_kw=float(figures.peak_import_kw.max()),
        )
    return summaries


def mean_interval(values: Floats) -> tuple[float, float | None]:
    """Return the mean and the half width of its 95 % interval, Student's t over the days [D].

    One day has no spread: the half width is None.
    """
    count = len(values)
    if count < 2:
        return float(values.mean()), None
    half_width = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5
    return float(values.mean()), float(half_width)


def violations(evaluation: Evaluation) -> list[str]:
    """Name every day on which a policy is better than the optimum: each is a defect."""
    bound_kg = evaluation.policies["optimum"].co2_kg
    return [
        f"{evaluation.days[i]}: {name} emits {figures.co2_kg[i]:.6f} kg, the optimum "
        f"{bound_kg[i]:.6f} kg"
        for name, figures in evaluation.policies.items()
        for i in np.flatnonzero(figures.co2_kg < bound_kg - evaluation.tolerance_kg)
    ]
