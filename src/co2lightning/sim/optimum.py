"""The perfect-foresight optimum: a linear program, the bound no controller can pass.

The program knows all that is to come and decides the power of every vehicle for itself. It is a
relaxation of the physics: whatever a policy does is one of its points. Where the two differ it is
the looser one: vehicles not bound to one shared budget, plugs without a least power, the battery
free to charge and discharge in one step (a small cost on throughput keeps it from doing so), a
connection as wide as its limit or as all vehicles at full power, energy thrown away at will.

A stretch is settled by what the best operation of the two days after it, its tail, costs from the
state that is left; the optimum is that of stretch and tail as one.

Shapes: T steps, of the stretch first, then of its tail; N sessions, K = sum of their steps, C
columns of sockets. Variables, in this order: grid import [T], charge [T] and discharge [T] in kW,
stored energy [T] at the end of each step in kWh, power of each vehicle in each of its steps [K] in
kW.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from co2lightning.sim.schedule import Schedule
from co2lightning.site.model import TAIL_H, Battery, Floats, Ints, Site

_THROUGHPUT_KG_PER_KWH = 1e-6
# Tighter than HiGHS's own 1e-7: the bound is compared to the last 1e-6 kg.
_TOLERANCE = 1e-9
# The simplex takes 0.4 s for nine days of 128 sockets, the interior point method 1.4 s.
_METHODS = "highs-ds", "highs-ipm"
NO_BATTERY = Battery(1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
"""One that can do nothing, for programs of sites without."""


class Best(NamedTuple):
    """The best that could have been done."""

    kg: float  # of stretch and tail
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
    best, n = _solve(site, begin, end, stored_kwh, owed_kwh), end - begin
    capacity_kwh = site.battery.capacity_kwh if site.battery else 1.0
    return Best(
        kg=float(best.co2_kg.sum()),
        schedule=Schedule(
            ev_kw=best.ev_kw[:n],
            battery_kw=best.battery_kw[:n],
            grid_import_kw=np.maximum(best.grid_kw[:n], 0.0),
            curtailed_kwh=np.maximum(-best.grid_kw[:n], 0.0) * site.step_h,
            unmet_kwh=np.zeros(n),
            soc=best.stored_kwh[:n] / capacity_kwh,
            co2_kg=best.co2_kg[:n],
        ),
    )


def tail_kg(site: Site, place: int, stored_kwh: float, owed_kwh: Floats) -> float:
    """Return what the best operation of the two days from `place` on emits.

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
    return float(_solve(site, place, place, stored_kwh, owed_kwh).co2_kg.sum())


class _Operation(NamedTuple):
    """How stretch and tail go; every field is [T]."""

    ev_kw: Floats
    battery_kw: Floats  # charging positive
    stored_kwh: Floats  # at the end of the step
    grid_kw: Floats  # import positive
    co2_kg: Floats


def _solve(site: Site, begin: int, end: int, stored_kwh: float, owed_kwh: Floats) -> _Operation:
    battery = site.battery or NO_BATTERY
    steps = slice(begin, min(end + site.steps(TAIL_H), site.n_steps))
    # What a kWh of import costs, 0 or more.
    price = site.carbon_kg_per_kwh[steps]
    net_kw = site.load_kw[steps] - site.pv_kw[steps]
    n, step_h = len(net_kw), site.step_h
    fleet = _fleet(site, steps, end, owed_kwh)
    count = len(fleet.step)
    each = np.arange(count)
    in_step = sparse.csr_matrix((np.ones(count), (fleet.step, each)), (n, count))
    of_session = sparse.csr_matrix(
        (fleet.share_h, (fleet.session, each)), (len(fleet.asked_kwh), count)
    )
    fleet_kw = in_step @ fleet.most_kw

    each_step, zeros = sparse.identity(n, format="csr"), sparse.csr_matrix((n, n))
    before = sparse.diags(np.ones(n - 1), -1, (n, n), format="csr")
    # Load - PV + vehicles + charge - discharge <= import, in every step; the rest is curtailed.
    at_most = [sparse.hstack([-each_step, each_step, -each_step, zeros, in_step])]
    bounds = [-net_kw]
    charge_kw = np.full(n, battery.power_kw)
    if not battery.may_charge_from_grid:
        # Charging takes no more than the surplus that vehicles leave. That is no convex set where
        # all together could take more than the surplus: then it is the least one around it.
        surplus_kw = np.maximum(-net_kw, 0.0)
        charge_kw = np.minimum(charge_kw, surplus_kw)
        taken = sparse.diags(surplus_kw / np.maximum(np.maximum(surplus_kw, fleet_kw), 1e-9))
        at_most.append(sparse.hstack([zeros, each_step, zeros, zeros, taken @ in_step]))
        bounds.append(surplus_kw)
    # Stored - what was stored before - charged + discharged = 0; all sessions get what they ask.
    charged, discharged = step_h * battery.charge_efficiency, step_h / battery.discharge_efficiency
    storage = [zeros, -charged * each_step, discharged * each_step, each_step - before]
    nowhere = sparse.csr_matrix((len(fleet.asked_kwh), 4 * n))
    equal = [
        sparse.hstack([*storage, sparse.csr_matrix((n, count))]),
        sparse.hstack([nowhere, of_session]),
    ]
    stored_before_kwh = np.zeros(n)
    stored_before_kwh[0] = stored_kwh

    cost = np.zeros(4 * n + count)
    cost[:n] = step_h * price
    cost[n : 3 * n] = step_h * _THROUGHPUT_KG_PER_KWH
    lower = np.zeros_like(cost)
    # A start outside the battery's band is where it may stay.
    lower[3 * n : 4 * n] = min(battery.least_soc * battery.capacity_kwh, stored_kwh)
    most_kwh = max(battery.soc_max * battery.capacity_kwh, stored_kwh)
    import_kw = np.maximum(np.maximum(site.import_limit_kw[steps], net_kw + fleet_kw), 0.0)
    upper = np.concatenate(
        [import_kw, charge_kw, np.full(n, battery.power_kw), np.full(n, most_kwh), fleet.most_kw]
    )
    best = least(
        cost,
        A_ub=sparse.vstack(at_most, format="csr"),
        b_ub=np.concatenate(bounds),
        A_eq=sparse.vstack(equal, format="csr"),
        b_eq=np.concatenate([stored_before_kwh, fleet.asked_kwh]),
        bounds=np.stack([lower, upper], axis=1),
    )
    ev_kw, battery_kw = in_step @ best[4 * n :], best[n : 2 * n] - best[2 * n : 3 * n]
    grid_kw = net_kw + ev_kw + battery_kw
    co2_kg = step_h * price * np.maximum(grid_kw, 0.0)
    return _Operation(ev_kw, battery_kw, best[3 * n : 4 * n], grid_kw, co2_kg)


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
    """The vehicles of a program, each with every step of its own: fields are [K], one is [N]."""

    session: Ints  # 0 to N - 1
    step: Ints  # 0 to T - 1
    most_kw: Floats
    share_h: Floats  # what a kW in this step adds to what the session has got
    asked_kwh: Floats  # [N]


def _fleet(site: Site, steps: slice, end: int, owed_kwh: Floats) -> _Fleet:
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
    # convex set around that is tail + share x >= min(asked, T); one kWh less is never dearer.
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
    )
