"""The perfect-foresight optimum of a day: a linear program, the bound no controller can pass.

The program knows the whole day beforehand and decides the power of every vehicle for itself. It
is a relaxation of the physics: whatever a policy does on that day is one of its points, so its
optimum is at most the policy's CO2. Where the two differ it is the looser one: no limit at the
grid connection, vehicles not bound to one shared budget, the battery free to charge and discharge
in one step (a small cost on throughput keeps it from doing so), energy thrown away at will.

Shapes: T = 96 steps a day, N sessions of the day, K = sum of their windows in steps.
Variables, in this order: grid import [T], charge [T], discharge [T], curtailment [T] in kW,
stored energy [T] at the end of each step in kWh, energy missing at midnight [1] in kWh, power of
each vehicle in each step of its window [K] in kW.
"""

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from co2lightning.sim.objective import refill_kg_per_kwh
from co2lightning.sim.schedule import Schedule, evaluation_soc
from co2lightning.site.model import STEP_H, Site, T

_THROUGHPUT_KG_PER_KWH = 1e-6
# Tighter than HiGHS's own 1e-7: the bound is compared to the last 1e-6 kg.
_TOLERANCE = 1e-9


def optimum_schedule(site: Site, days: list[int]) -> Schedule:
    """Return the perfect-foresight optimum of days [D] as evaluation starts them."""
    soc_start = evaluation_soc(site).tolist()
    best = [optimum(site, day, soc_start[day]) for day in days]
    return Schedule(*map(np.stack, zip(*best, strict=True)))


def optimum(site: Site, day: int, soc_start: float) -> Schedule:
    """Solve one day; return the best that could have been done, every field [T].

    Args:
        site: The site.
        day: Index into `site.days`.
        soc_start: State of charge at midnight, 0-1.

    Raises:
        RuntimeError: HiGHS found no optimum. Every day of a checked site has one.
    """
    battery, sessions = site.battery, site.sessions
    carbon = site.carbon_kg_per_kwh[day]
    stored_start_kwh = soc_start * battery.capacity_kwh
    own = np.flatnonzero(sessions.day == day)
    window = sessions.departure_step[own] - sessions.arrival_step[own]
    session = np.repeat(np.arange(len(own)), window)
    first = np.repeat(np.cumsum(window) - window, window)
    step = sessions.arrival_step[own][session] + np.arange(len(session)) - first
    max_kw = sessions.max_kw[own]
    # What charging on arrival could not deliver either is nobody's debt.
    energy_kwh = np.minimum(sessions.energy_kwh[own], window * max_kw * STEP_H)

    each_step, zeros = sparse.identity(T, format="csr"), sparse.csr_matrix((T, T))
    nothing = sparse.csr_matrix((T, 1))
    in_step = sparse.csr_matrix((np.ones(len(step)), (step, np.arange(len(step)))), (T, len(step)))
    of_session = sparse.csr_matrix(
        (np.full(len(step), STEP_H), (session, np.arange(len(step)))), (len(own), len(step))
    )
    no_vehicles = sparse.csr_matrix((T, len(step)))
    before = sparse.diags(np.ones(T - 1), -1, (T, T), format="csr")
    charge_kwh = STEP_H * battery.charge_efficiency
    discharge_kwh = STEP_H / battery.discharge_efficiency
    # Import + discharge - charge - curtailment - vehicles = load - PV, in every step.
    balance = [each_step, -each_step, each_step, -each_step, zeros, nothing, -in_step]
    # Stored energy - that of the step before - what is charged + what is discharged = 0.
    storage = [zeros, -charge_kwh * each_step, discharge_kwh * each_step, zeros]
    storage += [each_step - before, nothing, no_vehicles]
    served = sparse.hstack([sparse.csr_matrix((len(own), 5 * T + 1)), of_session])
    stored_before_kwh = np.zeros(T)
    stored_before_kwh[0] = stored_start_kwh
    # Missing energy >= (stored at the start - stored at the end) / charge efficiency.
    missing = sparse.csr_matrix(
        ([-1.0 / battery.charge_efficiency, -1.0], ([0, 0], [5 * T - 1, 5 * T])),
        (1, 5 * T + 1 + len(step)),
    )

    cost = np.zeros(5 * T + 1 + len(step))
    cost[:T] = STEP_H * carbon
    cost[T : 3 * T] = STEP_H * _THROUGHPUT_KG_PER_KWH
    cost[5 * T] = refill_kg_per_kwh(carbon)
    lower, upper = np.zeros_like(cost), np.full_like(cost, np.inf)
    upper[T : 3 * T] = battery.power_kw
    lower[4 * T : 5 * T] = battery.soc_min * battery.capacity_kwh
    upper[4 * T : 5 * T] = battery.soc_max * battery.capacity_kwh
    upper[5 * T + 1 :] = max_kw[session]

    result = linprog(
        cost,
        A_ub=missing,
        b_ub=[-stored_start_kwh / battery.charge_efficiency],
        A_eq=sparse.vstack([sparse.hstack(balance), sparse.hstack(storage), served], format="csr"),
        b_eq=np.concatenate([site.load_kw[day] - site.pv_kw[day], stored_before_kwh, energy_kwh]),
        bounds=np.stack([lower, upper], axis=1),
        method="highs",
        options={
            "primal_feasibility_tolerance": _TOLERANCE,
            "dual_feasibility_tolerance": _TOLERANCE,
        },
    )
    if result.status != 0:
        raise RuntimeError(f"the optimum of {site.days[day]} was not found: {result.message}")
    grid_kw, charge_kw, discharge_kw, curtailed_kw, stored_kwh = result.x[: 5 * T].reshape(5, T)
    co2_kg = STEP_H * grid_kw * carbon
    co2_kg[-1] += STEP_H * grid_kw @ carbon + cost[5 * T] * result.x[5 * T] - co2_kg.sum()
    return Schedule(
        ev_kw=in_step @ result.x[5 * T + 1 :],
        battery_kw=charge_kw - discharge_kw,
        grid_import_kw=grid_kw,
        curtailed_kwh=STEP_H * curtailed_kw,
        unmet_kwh=np.zeros(T),
        soc=stored_kwh / battery.capacity_kwh,
        co2_kg=co2_kg,
    )
