"""How good a policy is: the held-out stretches, paired with the rules and the optimum.

Every policy meets the same stretches with the same battery and vehicles at their begin, so
policies are compared stretch by stretch: weeks differ by much, policies by far less. What a stretch
leaves undone is settled by what the best operation of the two days after it would still cost; what
charging on arrival would leave, the battery as it was at the begin, settles at 0.

The physics runs in float32, as in training; the optimum is computed in float64. Both see the same
stretch, so the optimum may lie above a policy by rounding only: `tolerance` says how much.

Shapes: W stretches, n steps of one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from co2lightning.control.rules import Rule, words
from co2lightning.errors import UserError
from co2lightning.sim.kept import bounds_of
from co2lightning.sim.objective import priced_model, unit_a_day, unserved_price
from co2lightning.sim.optimum import tail_objective
from co2lightning.sim.schedule import Played, Schedule, play
from co2lightning.sim.search import choice_of, rules_of
from co2lightning.site.model import DAY_H, OF_CO2, Floats, Ints, Objective, Site

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

RULE_NAMES = ("uncontrolled", "rbc_a", "rbc_b", "cheap", "rbc_c")
"""The references that all are compared with the best of: none of them knows what is to come."""

MPC_TITLE = "MPC"
"""What model predictive control is called, which only some evaluations have."""

STRETCHES_FOR_AN_INTERVAL = 8
"""With fewer, their spread says too little: each stretch is shown instead."""

_SERVED = 0.01  # kWh a stretch: what rounding leaves unserved is less
_LEAST_GAP = 1e-3  # of what uncontrolled emits: below it, a share of the gap says nothing
_ROUNDING = 1e-6  # relative, of float32 powers: no excess over a limit


class Figures(NamedTuple):
    """What a policy did in each stretch; every field is [W]."""

    settled: Floats  # the site's objective, CO2 or money: what the meter counts, and settled
    settlement: Floats  # how much of it is what was left at the end
    co2_kg: Floats  # of the import; where it is the objective, settled
    cost: Floats  # of import less export; where it is the objective, settled; 0 without prices
    unmet_kwh: Floats  # beyond what charging on arrival would also leave
    misled_kwh: Floats  # of it what is due to a wrong announcement
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
        standard: What the tail takes at least of whoever leaves what charging on arrival
            leaves, and in the battery what was there at the begin, [W].
        tolerance: By how much rounding may put a policy below the optimum, [W].
        policies: Per policy its figures: the agent if there is one, the rules, the optimum.
        objective: What is settled.
        unit: Of it what shares are of, a day without control; above 0.
        currency: Of the costs; None where the site has no prices, "" where it names none.
        schedules: Per policy what it did in every step of each stretch.
        rbc_c: What RBC C does, in words.
        dearest: The most that a kWh which is not served can save, [W]; None where policies know
            the truth of vehicles and serve all.
        unserved_price: What a kWh that is not served counts when policies are compared.
    """

    site: str
    days: tuple[str, ...]
    n_days: Ints
    hours: Floats
    pv_kwh: Floats
    unavoidable_kwh: Floats
    turned_away_kwh: Floats
    clipped_kwh: Floats
    standard: Floats
    tolerance: Floats
    policies: dict[str, Figures]
    objective: Objective = OF_CO2
    unit: float = 1.0
    currency: str | None = None
    schedules: dict[str, list[Schedule]] = field(default_factory=dict)
    rbc_c: str = ""
    dearest: Floats | None = None
    unserved_price: float = 0.0

    def compared(self, name: str) -> Floats:
        """Return what a policy is compared by [W]: nothing is won by not charging vehicles.

        What it settles at, and the energy it leaves unserved beyond the unavoidable at the mean
        price.
        """
        figures = self.policies[name]
        unserved_kwh = np.where(figures.unmet_kwh > _SERVED, figures.unmet_kwh, 0.0)
        return figures.settled + self.unserved_price * unserved_kwh

    @property
    def announced(self) -> bool:
        """Whether policies know of vehicles what drivers announce, not the truth."""
        return self.dearest is not None

    @property
    def best(self) -> str:
        """Name of the rule that is lowest in all stretches, at ties the simpler one."""
        rules = [name for name in RULE_NAMES if name in self.policies]
        return min(rules, key=lambda name: float(self.compared(name).sum()))


class Summary(NamedTuple):
    """A policy over all stretches: totals a day, that is, by their hours.

    Intervals are half widths; None with fewer than eight stretches. Shares are None where there is
    nothing to share.
    """

    co2_kg: float  # a day
    co2_kg_interval: float | None  # 95 % interval over stretches: +- so much
    cost: float | None  # a day; None where the site has no prices
    cost_interval: float | None
    objective: float | None  # a day, where it is neither CO2 alone nor cost alone
    objective_interval: float | None
    vs_best: float  # the objective a day, less that of the best rule
    vs_best_interval: float | None  # of the paired differences
    gap_closed: float | None  # share of the way from uncontrolled to the optimum
    unmet_kwh: float  # a day
    misled_kwh: float | None  # a day, of it; None where drivers announce nothing
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
    if not all(np.isfinite(played.schedule.co2_kg).all() for played in own):
        raise UserError(  # finite weights can be too large, too
            "the policy's actions are no finite numbers, training diverged; give an earlier "
            "episode: --ckpt_path FILE"
        )
    references = references or _references(site, keep, foresight)
    figures = _settled(site, own, references.standard, references.unavoidable_kwh)
    return replace(
        references,
        policies={"agent": figures, **references.policies},
        schedules={"agent": _schedules(own), **references.schedules},
    )


def elsewhere(evaluation: Evaluation, world: Site, keep: Path | None = None) -> Evaluation:
    """Return the references in another world of a site.

    Args:
        evaluation: Of the site itself, to spare what is the same: the optimum where the same
            happens, and who does not ask what is known otherwise.
        world: As `worlds` makes it; its `fitted_on` is the site.
        keep: As for `evaluate`.
    """
    site = world.fitted_on
    if site is None or world.sessions is not site.sessions or world.pv_kw is not site.pv_kw:
        return evaluate(None, world, keep=keep)
    # Uncontrolled asks nobody; of the others only some look at a forecast.
    asks = RULE_NAMES[1 if world.told is not site.told else 3 :]
    model, places = priced_model(world), world.stretch_bounds
    standard, unavoidable_kwh = evaluation.standard, evaluation.unavoidable_kwh
    policies = {name: one for name, one in evaluation.policies.items() if name in TITLES}
    for name, rule in rules_of(world, keep=keep).items():
        if name in asks:
            played = play(model, rule, world, places)
            policies[name] = _settled(world, played, standard, unavoidable_kwh)
    dearest = _dearest(world) if world.told else None
    return replace(evaluation, policies=policies, schedules={}, dearest=dearest)


def beside(evaluation: Evaluation, site: Site, name: str, played: list[Played]) -> Evaluation:
    """Put another policy beside those of an evaluation, just before the optimum.

    Args:
        evaluation: Of the same site.
        site: The site.
        name: The policy's.
        played: How each held-out stretch has gone under it.
    """
    figures = _settled(site, played, evaluation.standard, evaluation.unavoidable_kwh)
    policies = evaluation.policies | {name: figures}
    schedules = evaluation.schedules | {name: _schedules(played)}
    policies["optimum"] = policies.pop("optimum")
    schedules["optimum"] = schedules.pop("optimum")
    return replace(evaluation, policies=policies, schedules=schedules)


def _references(site: Site, keep: Path | None, foresight: bool) -> Evaluation:
    bounds, standard = bounds_of(site, keep)
    model, places = priced_model(site), site.stretch_bounds
    own = rules_of(site, keep=keep, foresight=foresight)
    rules = {name: play(model, rule, site, places) for name, rule in own.items()}
    unavoidable_kwh = _each(lambda plan: plan.unmet_kwh.sum(), _schedules(rules["uncontrolled"]))
    policies = {
        name: _settled(site, played, standard, unavoidable_kwh) for name, played in rules.items()
    }
    best = [one.schedule for one in bounds]
    rest = np.array([one.settled for one in bounds]) - _each(_meter(site), best)
    policies["optimum"] = _figures(site, best, rest - standard, unavoidable_kwh)
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
        standard=standard,
        tolerance=_tolerance(site, _schedules(rules["uncontrolled"]), standard),
        objective=site.objective,
        unit=unit_a_day(
            site, float(policies["uncontrolled"].settled.sum() / (hours.sum() / DAY_H))
        ),
        currency=None if site.price_per_kwh is None else site.currency,
        unserved_price=unserved_price(site),
        policies=policies,
        schedules={name: _schedules(played) for name, played in rules.items()} | {"optimum": best},
        rbc_c=words(choice_of(site, keep), site),
        dearest=_dearest(site) if site.told else None,
    )


def _tolerance(site: Site, uncontrolled: list[Schedule], standard: Floats) -> Floats:
    """Return by how much rounding may put a policy below the optimum, [W].

    Each of n steps may round what the battery holds; what a vehicle is owed and what the meter
    counts goes through some 16 roundings of its own size. Measured: up to 2e-4 kg in a week of
    4,000 kg with a battery of 580 kWh, where this allows 0.03 kg.
    """
    capacity_kwh = site.battery.capacity_kwh if site.battery else 0.0
    price, credit = site.import_price, site.export_credit
    highest, rounded = np.abs(price).max(), float(np.finfo(np.float32).eps)
    allowed: list[float] = []
    for (start, end), plan, tail in zip(site.stretch_bounds, uncontrolled, standard, strict=True):
        stored = (end - start) / 2 * capacity_kwh * np.abs(price[start:end]).max()
        imported = (np.abs(price[start:end]) * plan.grid_import_kw).sum() * site.step_h
        exported = (credit[start:end] * plan.curtailed_kwh).sum()
        allowed.append(rounded * (stored + 16.0 * (imported + exported + abs(tail))))
    return 1e-6 * max(1.0, highest) + np.array(allowed)


def _dearest(site: Site) -> Floats:
    price = np.abs(site.import_price)
    return np.array([price[begin:end].max() for begin, end in site.stretch_bounds])


def _schedules(played: list[Played]) -> list[Schedule]:
    return [one.schedule for one in played]


def _each(figure: Callable[[Schedule], float], schedules: list[Schedule]) -> Floats:
    return np.array([figure(plan) for plan in schedules], dtype=np.float64)


def _settled(
    site: Site, played: list[Played], standard: Floats, unavoidable_kwh: Floats
) -> Figures:
    ends = zip(site.stretch_bounds[:, 1].tolist(), played, strict=True)
    left = [tail_objective(site, end, one.stored_kwh, one.owed_kwh) for end, one in ends]
    return _figures(site, _schedules(played), np.array(left) - standard, unavoidable_kwh)


def _figures(
    site: Site, schedules: list[Schedule], settlement: Floats, unavoidable_kwh: Floats
) -> Figures:
    step_h = site.step_h
    over_kwh = [
        _over_kw(plan, site.import_limit_kw[a:b]).sum() * step_h
        for plan, (a, b) in zip(schedules, site.stretch_bounds, strict=True)
    ]
    unmet_kwh = _each(lambda plan: plan.unmet_kwh.sum(), schedules)
    unmet_kwh = np.maximum(unmet_kwh - unavoidable_kwh, 0.0)
    misled_kwh = _each(lambda plan: plan.misled_kwh.sum(), schedules)
    settled = _each(_meter(site), schedules) + settlement
    co2_kg = _each(lambda plan: plan.co2_kg.sum(), schedules)
    cost = _each(lambda plan: plan.cost.sum(), schedules)
    return Figures(
        settled=settled,
        settlement=settlement,
        co2_kg=settled if site.objective == Objective(1.0, 0.0) else co2_kg,
        cost=settled if site.objective == Objective(0.0, 1.0) else cost,
        unmet_kwh=unmet_kwh,
        misled_kwh=np.minimum(misled_kwh, unmet_kwh),
        grid_import_kwh=_each(lambda plan: plan.grid_import_kw.sum() * step_h, schedules),
        curtailed_kwh=_each(lambda plan: plan.curtailed_kwh.sum(), schedules),
        peak_import_kw=_each(lambda plan: plan.grid_import_kw.max(), schedules),
        over_limit_kwh=np.array(over_kwh),
    )


def _meter(site: Site) -> Callable[[Schedule], float]:
    """Return what works out a schedule's objective as the meter counts it."""
    return lambda plan: float(site.objective.of(plan.co2_kg, plan.cost).sum())


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

    uncontrolled = a_day(policies["uncontrolled"].settled)
    gap = uncontrolled - a_day(policies["optimum"].settled)
    best = evaluation.compared(evaluation.best)
    priced = evaluation.currency is not None
    mixed = evaluation.objective not in (Objective(1.0, 0.0), Objective(0.0, 1.0))
    summaries: dict[str, Summary] = {}
    for name, figures in policies.items():
        compared = evaluation.compared(name)
        difference = compared - best
        summaries[name] = Summary(
            co2_kg=a_day(figures.co2_kg),
            co2_kg_interval=interval(figures.co2_kg / days),
            cost=a_day(figures.cost) if priced else None,
            cost_interval=interval(figures.cost / days) if priced else None,
            objective=a_day(figures.settled) if mixed else None,
            objective_interval=interval(figures.settled / days) if mixed else None,
            vs_best=a_day(difference),
            vs_best_interval=interval(difference / days),
            gap_closed=(uncontrolled - a_day(compared)) / gap
            if gap > _LEAST_GAP * evaluation.unit
            else None,
            unmet_kwh=a_day(figures.unmet_kwh),
            misled_kwh=a_day(figures.misled_kwh) if evaluation.announced else None,
            self_consumption=max(0.0, 1.0 - float(figures.curtailed_kwh.sum()) / pv_kwh)
            if pv_kwh
            else None,
            curtailed_kwh=a_day(figures.curtailed_kwh),
            peak_import_kw=float(figures.peak_import_kw.max()),
        )
    return summaries


def interval(values: Floats) -> float | None:
    """Return the half width of a mean's 95 % interval, Student's t over stretches [W].

    Fewer than eight have none.
    """
    count = len(values)
    if count < STRETCHES_FOR_AN_INTERVAL:
        return None
    return float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5)


def violations(evaluation: Evaluation) -> list[str]:
    """Name every stretch in which a policy is better than the optimum: each is a defect."""
    bound, of_co2 = evaluation.policies["optimum"].settled, evaluation.objective == Objective()
    # Who serves less than all may come to less, by no more than the dearest kWh each.
    dearest = 0.0 if evaluation.dearest is None else evaluation.dearest
    unit = "kg" if of_co2 else evaluation.currency if not evaluation.objective.co2 else ""
    verb, unit = "emits" if of_co2 else "costs", f" {unit}" if unit else ""
    return [
        f"{evaluation.days[i]}: {name} {verb} {figures.settled[i]:.6f}{unit}, the optimum "
        f"{bound[i]:.6f}{unit}"
        for name, figures in evaluation.policies.items()
        for i in np.flatnonzero(
            figures.settled < bound - evaluation.tolerance - dearest * figures.unmet_kwh
        )
    ]
