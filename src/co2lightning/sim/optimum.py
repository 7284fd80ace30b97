"""The perfect-foresight optimum: a linear program, the bound no controller can pass.

The program knows all that is to come and decides the power of every vehicle for itself. It is a
relaxation of the physics: whatever a policy does is one of its points. Where the two differ it is
the looser one: vehicles not bound to one shared budget, plugs without a least power, the battery
free to charge and discharge in one step (a small cost on throughput keeps it from doing so), a
connection as wide as its limit or as all vehicles at full power, energy thrown away at will.

A stretch is settled by what the best operation of the two days after it, its tail, costs from the
state that is left; the optimum is that of stretch and tail as one. What it costs is the site's
objective, CO2 or money.

Where import is paid for, as negative prices do, what the meter counts is no longer convex in what
flows. There import is bounded by what the site can use, and by the straight line from the least the
meter can show to the most; the battery charges or discharges, or each for a part of the step; a
session that the tail's end cuts gets all that a policy could give it.

Shapes: T steps, of the stretch first, then of its tail; N sessions, K = sum of their steps, C
columns of sockets. Variables, in this order: grid import [T], charge [T] and discharge [T] in kW,
stored energy [T] at the end of each step in kWh, power of each vehicle in each of its steps [K] in
kW; export [T] in kW where it earns something.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from co2lightning.sim.schedule import Schedule
from co2lightning.site.model import TAIL_H, Battery, Floats, Ints, Site

_THROUGHPUT_PER_KWH = 1e-6
_HIGHEST_INTENSITY = 2.0
# Tighter than HiGHS's own 1e-7: the bound is compared to the last 1e-6 kg.
_TOLERANCE = 1e-9
# The simplex takes 0.4 s for nine days of 128 sockets, the interior point method 1.4 s.
_METHODS = "highs-ds", "highs-ipm"
NO_BATTERY = Battery(1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
"""One that can do nothing, for programs of sites without."""


class Best(NamedTuple):
    """The best that could have been done."""

    settled: float  # the objective of stretch and tail
    schedule: Schedule  # of the stretch


def optimum(site: Site, begin: int, end: int, stored_kwh: float, owed_kwh: Floats) -> Best:
    """Return the optimum of the stretch from `begin` to `end` and its tail.

    Args:
        site: The site.
        begin: Place of the stretch's first step.
        end: The place after its last.
        stored_kwh: What the battery holds at its begin.
        owed_kwh: [C] what vehicles that stand there then are owed, arrivals whole.

    Raises:
        RuntimeError: HiGHS found no optimum. Every stretch of a checked site has one.
    """
    objective, schedule = _solve(site, begin, end, stored_kwh, owed_kwh)
    return Best(float(objective.sum()), Schedule(*(field[: end - begin] for field in schedule)))


def tail_objective(site: Site, place: int, stored_kwh: float, owed_kwh: Floats) -> float:
    """Return what the best operation of the two days from `place` on comes to, in CO2 or money.

    Fewer where the series ends earlier, nothing where it ends there. Sessions that go on beyond
    them count as far as they can be charged within; what is stored in the end is worth nothing.

    Args:
        site: The site.
        place: Where a stretch has ended.
        stored_kwh: What it leaves in the battery.
        owed_kwh: [C] what it leaves to be charged by vehicles that stand there, arrivals whole.

    Raises:
        RuntimeError: HiGHS found no optimum.
    """
    if place >= site.n_steps:
        return 0.0
    objective, _ = _solve(site, place, place, stored_kwh, owed_kwh)
    return float(objective.sum())


def _solve(
    site: Site, begin: int, end: int, stored_kwh: float, owed_kwh: Floats
) -> tuple[Floats, Schedule]:
    """Return the objective of each step [T], and how stretch and tail go."""
    battery = site.battery or NO_BATTERY
    steps = slice(begin, min(end + site.steps(TAIL_H), site.n_steps))
    # What a kWh of import costs and one of export earns, and in which steps import is paid for.
    price, credit = site.import_price[steps], site.export_credit[steps]
    paid, earns = price < 0.0, bool((credit > 0.0).any())
    net_kw = site.load_kw[steps] - site.pv_kw[steps]
    n, step_h = len(net_kw), site.step_h
    fleet = _fleet(site, steps, end, owed_kwh, bool(paid.any()))
    count = len(fleet.step)
    each = np.arange(count)
    in_step = sparse.csr_matrix((np.ones(count), (fleet.step, each)), (n, count))
    of_session = sparse.csr_matrix(
        (fleet.share_h, (fleet.session, each)), (len(fleet.asked_kwh), count)
    )
    fleet_kw = in_step @ fleet.most_kw

    one, zeros = sparse.csr_matrix(sparse.identity(n)), sparse.csr_matrix((n, n))
    import_kw = np.maximum(np.maximum(site.import_limit_kw[steps], net_kw + fleet_kw), 0.0)
    before = sparse.diags(np.ones(n - 1), -1, (n, n), format="csr")
    # Rows of a block for each kind of variable, in their order; None is of no account.
    # Load - PV + vehicles + charge - discharge <= import, in every step; the rest is curtailed.
    at_most = [[-one, one, -one, zeros, in_step]]
    bounds = [-net_kw]
    charge_kw = np.full(n, battery.power_kw)
    if not battery.may_charge_from_grid:
        # Charging takes no more than the surplus that vehicles leave. That is no convex set where
        # all together could take more than the surplus: then it is the least one around it.
        surplus_kw = np.maximum(-net_kw, 0.0)
        charge_kw = np.minimum(charge_kw, surplus_kw)
        taken = sparse.diags(surplus_kw / np.maximum(np.maximum(surplus_kw, fleet_kw), 1e-9))
        at_most.append([None, one, None, None, taken @ in_step])
        bounds.append(surplus_kw)
    if paid.any():
        own, vehicles = one[paid], in_step[paid]
        # Import <= load + vehicles + charge, as far as PV does not serve the load.
        at_most.append([own, -own, None, None, -vehicles])
        bounds.append(np.maximum(net_kw[paid], 0.0))
        # Import <= slope x (what the meter shows - the least it can show, at most 0).
        least_kw = np.minimum(net_kw - battery.power_kw, 0.0)
        most_kw = np.maximum(net_kw + fleet_kw + battery.power_kw, 0.0)
        slope = most_kw / np.maximum(most_kw - least_kw, 1e-9)
        steep = sparse.diags(slope[paid])
        at_most.append([own, -steep @ own, steep @ own, None, -steep @ vehicles])
        bounds.append((slope * (net_kw - least_kw))[paid])
        at_most.append([None, own, own, None, None])
        bounds.append(np.full(int(paid.sum()), battery.power_kw))
    if fleet.freely.any():  # a session that the tail's end cuts gets at most what it asks for
        whole_h = sparse.csr_matrix(
            (np.full(count, step_h), (fleet.session, each)), (len(fleet.asked_kwh), count)
        )
        at_most.append([None, None, None, None, whole_h[fleet.freely]])
        bounds.append(fleet.most_kwh[fleet.freely])
        at_most.append([None, None, None, None, -of_session[fleet.freely]])
        bounds.append(-fleet.asked_kwh[fleet.freely])
        of_session = of_session[~fleet.freely]
    asked_kwh = fleet.asked_kwh[~fleet.freely]
    # Stored - what was stored before - charged + discharged = 0; all sessions get what they ask.
    charged, discharged = step_h * battery.charge_efficiency, step_h / battery.discharge_efficiency
    equal = [
        [zeros, -charged * one, discharged * one, one - before, None],
        [None, None, None, None, of_session],
    ]
    if earns:  # import less export serves what is used
        for rows, first in ((at_most, one), (equal, zeros)):
            for row in rows:
                row.append(first if row is rows[0] else None)
    stored_before_kwh = np.zeros(n)
    stored_before_kwh[0] = stored_kwh

    # As HiGHS's tolerances would have it, prices are of the size of intensities.
    unit = highest if (highest := float(np.abs(price).max())) > _HIGHEST_INTENSITY else 1.0
    cost = np.zeros(4 * n + count)
    cost[:n] = step_h * price / unit
    cost[n : 3 * n] = step_h * _THROUGHPUT_PER_KWH
    lower = np.zeros_like(cost)
    # A start outside the battery's band is where it may stay.
    lower[3 * n : 4 * n] = min(battery.least_soc * battery.capacity_kwh, stored_kwh)
    most_kwh = max(battery.soc_max * battery.capacity_kwh, stored_kwh)
    upper = np.concatenate(
        [import_kw, charge_kw, np.full(n, battery.power_kw), np.full(n, most_kwh), fleet.most_kw]
    )
    if earns:
        cost = np.concatenate([cost, -step_h * credit / unit])
        export_kw = np.where(credit > 0.0, np.maximum(-net_kw, 0.0) + battery.power_kw, 0.0)
        lower, upper = np.pad(lower, (0, n)), np.concatenate([upper, export_kw])
    best = least(
        cost,
        A_ub=sparse.bmat(at_most, format="csr"),
        b_ub=np.concatenate(bounds),
        A_eq=sparse.bmat(equal, format="csr"),
        b_eq=np.concatenate([stored_before_kwh, asked_kwh]),
        bounds=np.stack([lower, upper], axis=1),
    )
    ev_kw = in_step @ best[4 * n : 4 * n + count]
    battery_kw = best[n : 2 * n] - best[2 * n : 3 * n]
    grid_kw = net_kw + ev_kw + battery_kw
    # Import that is paid for may be more than the meter would count: it is a bound.
    imported_kw = np.where(paid, np.maximum(best[:n], grid_kw), np.maximum(grid_kw, 0.0))
    surplus_kw = np.where(paid, imported_kw - grid_kw, np.maximum(-grid_kw, 0.0))
    objective = step_h * price * imported_kw - step_h * credit * surplus_kw
    costs, earned = site.money_per_kwh[:, steps]
    return objective, Schedule(
        ev_kw=ev_kw,
        battery_kw=battery_kw,
        grid_import_kw=imported_kw,
        curtailed_kwh=surplus_kw * step_h,
        unmet_kwh=np.zeros(n),
        misled_kwh=np.zeros(n),
        soc=best[3 * n : 4 * n] / (site.battery.capacity_kwh if site.battery else 1.0),
        co2_kg=step_h * site.carbon_kg_per_kwh[steps] * imported_kw,
        cost=step_h * (costs * imported_kw - earned * surplus_kw),
    )


def least(cost: Floats, **problem: Any) -> Floats:
    """Return the best point of a program that `linprog` takes.

    Raises:
        RuntimeError: HiGHS found none.
    """
    message = ""
    for method in _METHODS:
        options = {
            "primal_feasibility_tolerance": _TOLERANCE,
            "dual_feasibility_tolerance": _TOLERANCE,
        }
        result = linprog(cost, **problem, method=method, options=options)
        if result.status == 0:
            return result.x
        message = result.message
    raise RuntimeError(f"an optimum was not found: {message}")


class _Fleet(NamedTuple):
    """The vehicles of a program, each with every step of its own: fields are [K], some are [N]."""

    session: Ints  # 0 to N - 1
    step: Ints  # 0 to T - 1
    most_kw: Floats
    share_h: Floats  # what a kW in this step adds to what the session has got
    asked_kwh: Floats  # [N]
    most_kwh: Floats  # [N]
    freely: NDArray[np.bool_]  # [N] whether it may get more than `asked_kwh`, up to `most_kwh`


def _fleet(site: Site, steps: slice, end: int, owed_kwh: Floats, paid: bool) -> _Fleet:
    sessions, begin, until = site.sessions, steps.start, steps.stop
    own = np.flatnonzero((sessions.arrival < until) & (sessions.departure > begin))
    stands = sessions.arrival[own] <= begin
    asked_kwh = sessions.energy_kwh[own]
    asked_kwh[stands] = owed_kwh[sessions.column[own[stands]]]
    arrival = np.maximum(sessions.arrival[own], begin)
    departure = np.minimum(sessions.departure[own], until)
    step_kwh = sessions.max_kw[own] * site.step_h
    asked_kwh = np.clip(asked_kwh, 0.0, step_kwh * (departure - arrival))
    # A session that goes on beyond the tail is cut to what the tail can give, T, whatever x it got
    # in the stretch, up to X: min(asked - x, T) is what a policy's end is charged for. The least
    # convex set around that is tail + share x >= min(asked, T); one kWh less is never dearer unless
    # import is paid for: then tail + x <= asked is its other side.
    in_stretch = np.maximum(end - arrival, 0)
    cut = (sessions.departure[own] > until) & (in_stretch > 0)
    tail_kwh = np.where(cut, step_kwh * (until - np.maximum(arrival, end)), np.inf)
    beyond_kwh = np.maximum(asked_kwh - tail_kwh, 0.0)
    before_kwh = np.minimum(asked_kwh, step_kwh * in_stretch)
    share = np.maximum(1.0 - beyond_kwh / np.maximum(before_kwh, 1e-9), 0.0)
    window = departure - arrival
    session = np.repeat(np.arange(len(own)), window)
    first = np.repeat(np.cumsum(window) - window, window)
    step = arrival[session] + np.arange(len(session)) - first
    return _Fleet(
        session=session,
        step=step - begin,
        most_kw=sessions.max_kw[own][session],
        share_h=site.step_h * np.where(step < end, share[session], 1.0),
        asked_kwh=np.minimum(asked_kwh, tail_kwh),
        most_kwh=asked_kwh,
        freely=cut & (share < 1.0) if paid else np.zeros(len(own), dtype=np.bool_),
    )
