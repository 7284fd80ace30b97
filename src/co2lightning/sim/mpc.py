"""Model predictive control: in every step the best plan of the next day; its first step is done.

A plan is a linear program over what is known now, each vehicle that stands there by itself, and
over what is expected: carbon, load and PV by the site's own forecast, arrivals by the clock. It
learns nothing from trying: a reference that a learned policy must beat. What it plans goes through
the shield like any controller's wish.

A surplus is sold at what export earns. Where import is paid for, as negative prices do, it is
bounded by what the site can use, as in `optimum`.

Shapes: G spans of a plan, single steps at first and longer ones later; B sites at once, C columns
of sockets, N vehicles of a plan, those that stand there first; K = the sum of the spans in which
they do. Variables, in this order: grid import, import beyond the limit, power sold or curtailed,
charge, discharge in kW, stored energy at the end of a span in kWh, each [G]; what each vehicle
leaves for after the plan [N] in kWh; its power in each of its spans [K] in kW.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from co2lightning.control.forecast import forecast, steps_per_lead, usual
from co2lightning.control.rules import Rule
from co2lightning.control.state import Powers, SiteModel, State
from co2lightning.sim.optimum import NO_BATTERY, least
from co2lightning.site.model import DAY_H, Floats, Ints, Site

_SINGLE_H, _SPAN_H = 2.0, 1.0  # how far steps are planned one by one, and by what after that
# In units of the mean absolute price, per kWh. What is the same now or later is done later, while
# less is known of it: buying, and giving power away. All fall to nothing at the plan's end. Of
# 0.01, 0.1, 0.15 and 0.2 (twice for curtailing) the best in sum on training weeks of two sites.
_BUY_NOW = 0.1
_CURTAIL_NOW = 0.2
_THROUGHPUT = 0.1  # of the battery, each way; enough that it never burns what is curtailed
_STORED = 0.8  # of the mean price: what a kWh in the battery is worth at the end, once it is given
_LEFT = 0.8  # of the mean price: what a kWh costs that a vehicle leaves for after the plan
_BEYOND_LIMIT = 100.0
_NOTHING_KW = 1e-6
_HIGHEST_UNIT = 2.0  # above it costs are in units, for the sake of HiGHS's tolerances


def mpc(site: Site) -> Rule:
    """Return model predictive control of a site in the form of a rule.

    It looks at the state, and at the site for what is measured now, for forecasts and for who
    arrives on training days at what time; at nothing that comes after the step.

    Raises:
        RuntimeError: By the rule: HiGHS found no plan. Every state has one.
    """
    planner = _Planner(site)

    def rule(model: SiteModel, state: State) -> Powers:
        socket_kw, battery_kw = torch.zeros_like(state.owed_kw), torch.zeros_like(state.soc)
        columns = state.owed_kw, state.power_kw, state.later_kw
        owed_kw, power_kw, later_kw = (column.double().cpu().numpy() for column in columns)
        for row, (place, soc) in enumerate(
            zip(state.place.tolist(), state.soc.tolist(), strict=True)
        ):
            own = np.flatnonzero(owed_kw[row] > _NOTHING_KW)
            steps = np.round(later_kw[row, own] / power_kw[row, own]) + 1.0
            vehicles = _Vehicles(
                begin=np.zeros(len(own)),
                end=steps,
                most_kw=power_kw[row, own],
                asked_kwh=owed_kw[row, own] * site.step_h,
            )
            planned_kw, battery_kw[row] = planner.now(place, soc, vehicles)
            socket_kw[row, own] = torch.as_tensor(planned_kw).to(socket_kw)
        if model.floor_kw is not None:  # what a socket cannot give: the nearer of its least and 0
            rounded_kw = model.floor_kw * (socket_kw / model.floor_kw.clamp(min=1e-6)).round()
            socket_kw = torch.where(socket_kw < model.floor_kw, rounded_kw, socket_kw)
        return Powers(socket_kw, battery_kw)

    return rule


class _Vehicles(NamedTuple):
    """Vehicles of a plan, each [N]; steps are counted from now and need not be whole."""

    begin: Floats  # first step
    end: Floats  # the one after the last
    most_kw: Floats
    asked_kwh: Floats


class _Planner:
    """Plans for any place of a site, from what is worked out of it once."""

    def __init__(self, site: Site) -> None:
        self.site, self.battery = site, site.battery or NO_BATTERY
        self.reach, step_h = site.steps(DAY_H), site.step_h
        single = site.steps(_SINGLE_H)
        later = np.arange(single, self.reach, site.steps(_SPAN_H))
        self.edges = np.unique(np.concatenate([np.arange(single), later, [self.reach]]))
        widths = np.diff(self.edges)
        self.widths, self.hours = widths, widths * step_h
        known = site.import_price[site.training_steps]
        self.mean_price, self.unit = float(known.mean()), float(np.abs(known).mean()) or 1.0
        self.least_price = float(known.min(initial=0.0))  # so little may be expected
        # Which lead tells of each step after this one.
        self.lead = (np.arange(1, self.reach) - 1) // steps_per_lead(site)
        self.arriving = _arriving(site, self.reach)

        n, hours, battery = len(widths), sparse.diags(self.hours), self.battery
        each, zeros = sparse.identity(n), sparse.csc_matrix((n, n))
        before = sparse.diags(np.ones(n - 1), -1, (n, n))
        # Import + discharge - charge - curtailed - vehicles = load - PV;
        # stored - what was stored before - charged + discharged = 0.
        meter = [each, each, -each, -each, each, zeros]
        charged = battery.charge_efficiency * hours
        discharged = hours / battery.discharge_efficiency
        storage = [zeros, zeros, zeros, -charged, discharged, each - before]
        self.fixed = sparse.csc_matrix(sparse.bmat([meter, storage]))
        self.sooner = self.hours * (1.0 - (self.edges[:-1] + self.edges[1:]) / 2 / self.reach)

    def now(self, place: int, soc: float, standing: _Vehicles) -> tuple[Floats, float]:
        """Return what each vehicle that stands there, and the battery, shall take in this step."""
        n, battery, unit, mean_price = len(self.hours), self.battery, self.unit, self.mean_price
        price = self._ahead(place, "import_price")
        price = np.maximum(price, min(self.least_price, price[0]))
        credit = np.zeros(n)
        if self.site.export_credit.any():  # never more than the price, or who buys sells at once
            credit = np.clip(self._ahead(place, "export_credit"), 0.0, np.maximum(price, 0.0))
        net_kw = self._ahead(place, "load_kw") - np.maximum(self._ahead(place, "pv_kw"), 0.0)
        expected = self._expected(place)
        fleet = _Vehicles(*map(np.concatenate, zip(standing, expected, strict=True)))
        there = np.minimum(fleet.end[:, None], self.edges[1:])
        there = np.maximum(there - np.maximum(fleet.begin[:, None], self.edges[:-1]), 0.0)
        vehicle, span = np.nonzero(there > 1e-9)
        most_kw = fleet.most_kw[vehicle] * there[vehicle, span] / self.widths[span]
        step_kwh = fleet.most_kw * self.site.step_h
        left_kwh = step_kwh * np.maximum(fleet.end - np.maximum(fleet.begin, self.reach), 0.0)
        # A little less than a vehicle can take: rounding must not make a plan impossible.
        asked_kwh = np.minimum(fleet.asked_kwh, (1.0 - 1e-9) * (step_kwh * there.sum(1) + left_kwh))

        count, k, first = len(left_kwh), len(vehicle), 6 * n + len(left_kwh)
        own = np.arange(count)
        entries = np.stack([np.full(k, -1.0), self.hours[span]], axis=1)
        rows = np.stack([span, 2 * n + vehicle], axis=1)
        fixed = self.fixed
        ends = np.concatenate([own + 1, count + 2 * np.arange(1, k + 1)])
        equal = sparse.csc_matrix(
            (
                np.concatenate([fixed.data, np.ones(count), entries.ravel()]),
                np.concatenate([fixed.indices, 2 * n + own, rows.ravel()]),
                np.concatenate([fixed.indptr, fixed.indptr[-1] + ends]),
            ),
            (2 * n + count, first + k),
        )
        stored_kwh = soc * battery.capacity_kwh
        cost = np.zeros(first + k)
        cost[:n] = self.hours * price + self.sooner * _BUY_NOW * unit
        cost[n : 2 * n] = self.hours * (np.maximum(price, 0.0) + _BEYOND_LIMIT * unit)
        cost[2 * n : 3 * n] = self.sooner * np.maximum(_CURTAIL_NOW * unit - credit, 0.0)
        cost[2 * n : 3 * n] -= self.hours * credit
        cost[3 * n : 5 * n] = np.tile(self.hours * _THROUGHPUT * unit, 2)
        cost[6 * n - 1] = -_STORED * mean_price * battery.discharge_efficiency
        cost[6 * n : first] = _LEFT * mean_price
        upper = np.full(first + k, np.inf)
        upper[:n] = self.site.import_limit_kw[place]
        surplus_kw, fleet_kw = np.maximum(-net_kw, 0.0), np.zeros(n)
        np.add.at(fleet_kw, span, most_kw)
        upper[2 * n : 3 * n][credit > 0.0] = (surplus_kw + battery.power_kw)[credit > 0.0]
        upper[3 * n : 5 * n] = battery.power_kw
        # A state outside the battery's band is where it may stay.
        upper[5 * n : 6 * n] = max(battery.soc_max * battery.capacity_kwh, stored_kwh)
        upper[6 * n : first], upper[first:] = left_kwh, most_kw
        lower = np.zeros(first + k)
        lower[5 * n : 6 * n] = min(battery.least_soc * battery.capacity_kwh, stored_kwh)
        at_most: list[sparse.csr_matrix] = []
        bounds: list[Floats] = []
        if not battery.may_charge_from_grid:
            # Charging takes what vehicles leave of the surplus, as in `optimum`.
            taken = surplus_kw / np.maximum(np.maximum(surplus_kw, fleet_kw), 1e-9)
            places = np.concatenate([np.arange(n), span]), np.arange(3 * n, 4 * n + k)
            places[1][n:] += first - 4 * n
            shares = np.concatenate([np.ones(n), taken[span]])
            at_most.append(sparse.csr_matrix((shares, places), (n, first + k)))
            bounds.append(surplus_kw)
        if (price < 0.0).any():
            rows, most = self._paid(np.flatnonzero(price < 0.0), net_kw, fleet_kw)
            rows.resize(len(most), first + k)
            at_most.append(rows)
            bounds.append(most)
        some = {"A_ub": sparse.vstack(at_most), "b_ub": np.concatenate(bounds)} if bounds else {}
        plan = least(
            cost / unit if unit > _HIGHEST_UNIT else cost,
            A_eq=equal,
            b_eq=np.concatenate([net_kw, [stored_kwh], np.zeros(n - 1), asked_kwh]),
            bounds=np.stack([lower, upper], axis=1),
            **some,
        )
        mine = (span == 0) & (vehicle < len(standing.end))
        socket_kw = np.zeros(len(standing.end))
        socket_kw[vehicle[mine]] = plan[first:][mine]
        return socket_kw, float(plan[3 * n] - plan[4 * n])

    def _paid(
        self, spans: Ints, net_kw: Floats, fleet_kw: Floats
    ) -> tuple[sparse.csr_matrix, Floats]:
        """Return what holds in spans whose import is paid for, as rows [3 len(spans), 6 G] <= most.

        What is curtailed comes from PV and battery, import and curtailing share a span by the
        straight line from the least the meter can show to the most, charging and discharging by
        the battery's power.
        """
        n, power_kw = len(self.hours), self.battery.power_kw
        least_kw = np.minimum(net_kw - power_kw, 0.0)[spans]
        most_kw = np.maximum(net_kw + fleet_kw + power_kw, 0.0)[spans]
        slope = most_kw / np.maximum(most_kw - least_kw, 1e-9)
        one, none = sparse.csr_matrix(sparse.identity(n))[spans], sparse.csr_matrix((len(spans), n))
        bought, thrown = sparse.diags(1.0 - slope) @ one, sparse.diags(slope) @ one
        rows = [
            [none, none, one, none, -one, none],
            [bought, bought, thrown, none, none, none],
            [none, none, none, one, one, none],
        ]
        most = [np.maximum(-net_kw, 0.0)[spans], -slope * least_kw, np.full(len(spans), power_kw)]
        return sparse.csr_matrix(sparse.bmat(rows)), np.concatenate(most)

    def _ahead(self, place: int, signal: str) -> Floats:
        """Return a signal [G], measured for this step and expected for all others."""
        expected = forecast(self.site, signal)[place, self.lead]
        return self._sum(getattr(self.site, signal)[place], expected) / self.widths

    def _sum(self, now: float, later: Floats) -> Floats:
        return np.add.reduceat(np.concatenate([[now], later]), self.edges[:-1])

    def _expected(self, place: int) -> _Vehicles:
        """Return who is expected to arrive after this step: all of a span as one."""
        steps = slice(place + 1, place + self.reach)
        kwh, kw, stay_kw = self.arriving[:, steps]
        since = np.arange(1, self.reach)
        asked_kwh, most_kw, stay, begin = (
            self._sum(0.0, each) for each in (kwh, kw, stay_kw, kw * since)
        )
        some = asked_kwh > 0.0
        most_kw = most_kw[some]
        begin = begin[some] / most_kw
        return _Vehicles(begin, begin + stay[some] / most_kw, most_kw, asked_kwh[some])


def _arriving(site: Site, steps_more: int) -> Floats:
    """Return what arrives in a step on the average of the training days at that time of the week.

    Returns:
        [3, P + steps_more]: kWh that are asked for, kW of the vehicles, kW times steps that they
        stay.
    """
    sessions = site.sessions_told
    stay: Ints = sessions.departure - sessions.arrival
    columns = sessions.energy_kwh, sessions.max_kw, sessions.max_kw * stay
    series = [np.bincount(sessions.arrival, of, site.n_steps).astype(float) for of in columns]
    means = [usual(site, each, weekends=True, steps_more=steps_more) for each in series]
    return np.nan_to_num(np.stack(means))
