"""Compute a site's figures a second time: from its raw files, by the written definitions alone.

Nothing here imports the package, and nothing was copied from it: what both compute alike is then
no mistake of one of them. Left out, as no site that is compared has them: `min_kw`,
`may_charge_from_grid`, `reserve_soc`, `import_limit_kw`, held-out days and lists of dates.

Shapes: N steps of the series, K admitted sessions, S sockets. A "place" is a step's index; the
figures of a stretch are those of the steps begin .. end - 1.
"""

import csv
import gzip
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
RULES = ("uncontrolled", "rbc_a", "rbc_b")
TAIL_H = 48
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Battery:
    """Hold a battery's limits; all are zero where a site has none."""

    capacity_kwh: float = 0.0
    power_kw: float = 0.0
    charge_efficiency: float = 1.0
    discharge_efficiency: float = 1.0
    soc_min: float = 0.0
    soc_max: float = 0.0

    def can(self, kwh: float, step_h: float) -> tuple[float, float]:
        """Return the most it can give and take in one step, kW at the AC side, both >= 0."""
        low, high = self.band_kwh
        give = (kwh - low) * self.discharge_efficiency / step_h
        take = (high - kwh) / self.charge_efficiency / step_h
        return min(self.power_kw, max(0.0, give)), min(self.power_kw, max(0.0, take))

    @property
    def band_kwh(self) -> tuple[float, float]:
        """Return the least and the most it may hold."""
        return self.soc_min * self.capacity_kwh, self.soc_max * self.capacity_kwh


@dataclass(frozen=True)
class Sessions:
    """Hold the admitted sessions [K] in their order of arrival, and how many rows were not."""

    socket: Ints
    arrival: Ints  # place
    departure: Ints  # place, exclusive
    kw: Floats
    kwh: Floats
    dropped: int
    capped: int
    turned_away: int

    def owed_on_arrival_kwh(self, place: int, step_h: float) -> dict[int, float]:
        """Return what charging on arrival has left at `place`, by session that came before it."""
        standing = np.flatnonzero((self.arrival < place) & (self.departure > place))
        since_h = (place - self.arrival[standing]) * step_h
        left = np.maximum(0.0, self.kwh[standing] - self.kw[standing] * since_h)
        return dict(zip(standing.tolist(), left.tolist(), strict=True))


@dataclass(frozen=True)
class Site:
    """Hold a folder's site as the definitions read it."""

    step_h: float
    net_kw: Floats  # load - PV [N]
    carbon: Floats  # kg/kWh [N]
    grid_kw: float
    battery: Battery
    sockets: int
    sessions: Sessions
    day_start: int
    days: list[tuple[int, int]]
    stretches: list[tuple[int, int]]
    training_days: list[int]  # indices of `days`


class Run(NamedTuple):
    """Give what a rule did in a stretch and what it left."""

    kg: float
    unmet_kwh: float
    kwh: float  # stored at the end
    owed_kwh: dict[int, float]  # by session that stands at the end and came before it
    stored_kwh: Floats  # at the beginning of each step


def read(folder: Path, held_out: dict | None = None) -> Site:
    """Read a site's folder; `held_out` takes the place of the file's key."""
    config = yaml.safe_load((folder / "site.yaml").read_text())
    rows = _rows(folder / "series.csv.gz")
    times = np.array([_seconds(row["time"]) for row in rows])
    step_s = int(times[1] - times[0])
    assert (np.diff(times) == step_s).all(), "the steps differ"
    count = len(rows)
    pv, load, carbon = (
        np.array([float(row.get(name) or 0.0) for row in rows])
        for name in ("pv_kw", "load_kw", "carbon_kg_per_kwh")
    )
    zone = ZoneInfo(config["timezone"])
    battery, kinds = config.get("battery", {}), config.get("sockets", [])
    stays = _rows(folder / "sessions.csv.gz") if kinds else []
    day_start = config.get("day_start", _day_start(stays, zone))
    days = _days(int(times[0]), step_s, count, zone, day_start)
    stretches, training = _weeks(days, held_out or config.get("held_out"))
    return Site(
        step_h=step_s / 3600,
        net_kw=load - pv,
        carbon=carbon,
        grid_kw=float(config["grid_kw"]),
        battery=Battery(**{k: v for k, v in battery.items() if hasattr(Battery, k)}),
        sockets=sum(kind["count"] for kind in kinds),
        sessions=_admit(stays, kinds, int(times[0]), step_s, count),
        day_start=day_start,
        days=days,
        stretches=stretches,
        training_days=training,
    )


def start_soc(site: Site) -> float:
    """Return the mean SoC of RBC B where training days begin, in one run of the whole series."""
    if not site.battery.capacity_kwh:
        return 0.0
    run = play(site, "rbc_b", 0, len(site.net_kw), site.battery.band_kwh[0], {})
    begins = [site.days[day][0] for day in site.training_days]
    return round(float(run.stored_kwh[begins].mean()) / site.battery.capacity_kwh, 2)


def play(
    site: Site, rule: str, begin: int, end: int, stored_kwh: float, owed_kwh: dict[int, float]
) -> Run:
    """Play one rule through the steps begin .. end - 1.

    Args:
        stored_kwh: in the battery at the beginning.
        owed_kwh: by session that stands there at the beginning and came before it.
    """
    h, battery, sessions = site.step_h, site.battery, site.sessions
    owed, power = np.zeros(site.sockets), np.zeros(site.sockets)
    leaves = np.full(site.sockets, np.iinfo(np.int64).max)
    holds = np.full(site.sockets, -1)  # the session at each socket

    def arrive(session: int, kwh: float) -> None:
        socket = sessions.socket[session]
        assert holds[socket] < 0, "two vehicles at one socket"
        owed[socket], power[socket] = kwh, sessions.kw[session]
        leaves[socket], holds[socket] = sessions.departure[session], session

    for session, kwh in owed_kwh.items():
        arrive(session, kwh)
    coming: dict[int, list[int]] = {}
    for session in np.flatnonzero((sessions.arrival >= begin) & (sessions.arrival < end)).tolist():
        coming.setdefault(int(sessions.arrival[session]), []).append(session)
    stored, kg, unmet, trace = stored_kwh, 0.0, 0.0, np.empty(end - begin)

    def leave(place: int) -> float:
        gone = leaves <= place
        left = float(owed[gone].sum())
        owed[gone], power[gone], holds[gone] = 0.0, 0.0, -1
        leaves[gone] = np.iinfo(np.int64).max
        return left

    for place in range(begin, end):
        trace[place - begin] = stored
        if site.sockets:
            unmet += leave(place)
            for session in coming.get(place, ()):
                arrive(session, sessions.kwh[session])
        net, limit = float(site.net_kw[place]), site.grid_kw
        could = np.minimum(owed / h, power)
        later = power * np.where(holds >= 0, leaves - place - 1, 0)
        must = np.clip(owed / h - later, 0.0, could)
        could_kw, must_kw = float(could.sum()), float(must.sum())
        wish = could_kw
        if rule == "rbc_b":
            wish = min(could_kw, max(must_kw, -net))
        give, take = battery.can(stored, h)
        ev_kw = max(must_kw, min(wish, limit - net + give))
        if site.sockets:
            laxity = leaves - place - owed / np.maximum(power * h, 1e-9)
            owed -= _dispatch(ev_kw, must, could, laxity) * h
            owed[owed < 1e-12] = 0.0
        wish = 0.0 if rule == "uncontrolled" else -(net + ev_kw)
        battery_kw = min(max(min(wish, limit - net - ev_kw), -give), take)
        if battery_kw > 0:
            stored += battery_kw * battery.charge_efficiency * h
        else:
            stored += battery_kw / battery.discharge_efficiency * h
        kg += max(0.0, net + ev_kw + battery_kw) * h * float(site.carbon[place])
    unmet += leave(end)
    left = {int(holds[s]): float(owed[s]) for s in np.flatnonzero(holds >= 0)}
    return Run(kg, unmet, stored, left, trace)


def least_kg(
    site: Site,
    begin: int,
    end: int,
    stored_kwh: float,
    owed_kwh: dict[int, float],
    method: str = "highs",
) -> float:
    """Return the least kg of the steps begin .. end - 1, everything foreseen: one LP.

    Its columns: import, charge, discharge (kW) and the energy stored after each step, then the
    power of each session in each step of its stay. Rows: balance, storage, each session's kWh.
    """
    n, h, battery, sessions = end - begin, site.step_h, site.battery, site.sessions
    if n <= 0:
        return 0.0
    there = np.flatnonzero((sessions.arrival >= begin) & (sessions.arrival < end))
    who = np.concatenate([np.array(list(owed_kwh), dtype=int), there])
    need = np.concatenate([np.array(list(owed_kwh.values())), sessions.kwh[there]])
    first = np.maximum(sessions.arrival[who], begin) - begin
    last = np.minimum(sessions.departure[who], end) - begin
    width, kw = last - first, sessions.kw[who]
    need = np.minimum(need, kw * width * h)
    wanted = need > 0
    standing_kw = np.zeros(n)
    for a, b, p in zip(first, last, kw, strict=True):
        standing_kw[a:b] += p
    who, need, first, width, kw = (x[wanted] for x in (who, need, first, width, kw))
    row_of = np.repeat(np.arange(len(who)), width)
    step_of = np.arange(width.sum()) - np.repeat(np.cumsum(width) - width, width)
    step_of += np.repeat(first, width)

    steps, ones = np.arange(n), np.ones(n)
    ev = 4 * n + np.arange(len(row_of))
    net = site.net_kw[begin:end]
    # -import + charge - discharge + vehicles <= -net
    upper = _sparse(
        (steps, steps, -ones),
        (steps, n + steps, ones),
        (steps, 2 * n + steps, -ones),
        (step_of, ev, np.ones(len(ev))),
        shape=(n, 4 * n + len(ev)),
    )
    equal = _sparse(
        (steps, 3 * n + steps, ones),
        (steps[1:], 3 * n + steps[:-1], -ones[1:]),
        (steps, n + steps, -ones * battery.charge_efficiency * h),
        (steps, 2 * n + steps, ones / battery.discharge_efficiency * h),
        (n + row_of, ev, np.full(len(ev), h)),
        shape=(n + len(who), 4 * n + len(ev)),
    )
    low_kwh, high_kwh = battery.band_kwh
    before = np.zeros(n)
    before[0] = min(max(stored_kwh, low_kwh), high_kwh)
    most_kw = np.maximum(0.0, np.maximum(site.grid_kw, net + standing_kw))
    low = np.zeros(4 * n + len(ev))
    low[3 * n : 4 * n] = low_kwh
    high = np.concatenate(
        [most_kw, np.full(2 * n, battery.power_kw), np.full(n, high_kwh), kw[row_of]]
    )
    cost = np.zeros(4 * n + len(ev))
    cost[:n] = site.carbon[begin:end] * h
    found = linprog(
        cost,
        A_ub=upper,
        b_ub=-net,
        A_eq=equal,
        b_eq=np.concatenate([before, need]),
        bounds=np.stack([low, high], axis=1),
        method=method,
        options={
            "primal_feasibility_tolerance": TOLERANCE,
            "dual_feasibility_tolerance": TOLERANCE,
        },
    )
    assert found.status == 0, found.message
    return float(found.fun)


def tail_end(site: Site, end: int) -> int:
    """Return the place at which the tail of a stretch that ends at `end` ends."""
    return min(end + round(TAIL_H / site.step_h), len(site.net_kw))


def tail_kg(
    site: Site, end: int, stored_kwh: float, owed_kwh: dict[int, float] | None = None
) -> float:
    """Return J: the least kg of the two days after `end`; owed is what charging on arrival left."""
    if owed_kwh is None:
        owed_kwh = site.sessions.owed_on_arrival_kwh(end, site.step_h)
    return least_kg(site, end, tail_end(site, end), stored_kwh, owed_kwh)


def settled_kg(site: Site, begin: int, end: int, stored_kwh: float) -> dict[str, float]:
    """Return the kg of one stretch by each rule and by the optimum, settled by the tail."""
    owed = site.sessions.owed_on_arrival_kwh(begin, site.step_h)
    standard = tail_kg(site, end, stored_kwh)
    kg = {}
    for rule in RULES:
        run = play(site, rule, begin, end, stored_kwh, owed)
        kg[rule] = run.kg + tail_kg(site, end, run.kwh, run.owed_kwh) - standard
    best = least_kg(site, begin, tail_end(site, end), stored_kwh, owed)
    kg["optimum"] = best - standard
    return kg


def kg_a_day(site: Site, stretch_kg: list[float]) -> float:
    """Return the kg of all stretches by their hours, times 24."""
    hours = sum(end - begin for begin, end in site.stretches) * site.step_h
    return sum(stretch_kg) / hours * 24


def _dispatch(ev_kw: float, must: Floats, could: Floats, laxity: Floats) -> Floats:
    """Share a power among sockets [S]: what must be first, then by least laxity."""
    spare = ev_kw - float(must.sum())
    if spare <= 0:
        return must
    if ev_kw >= could.sum():
        return could
    order = np.argsort(laxity, kind="stable")
    room = (could - must)[order]
    out = must.copy()
    out[order] += np.clip(spare - (np.cumsum(room) - room), 0.0, room)
    return out


def _admit(stays: list[dict], kinds: list[dict], start: int, step_s: int, count: int) -> Sessions:
    """Turn the file's rows into sessions at sockets, in order of arrival."""
    limits, ranges, offset = {}, {}, 0
    for kind in kinds:
        limits[kind["name"]] = float(kind["max_kw"])
        ranges[kind["name"]] = range(offset, offset + kind["count"])
        offset += kind["count"]
    free_at = [0] * offset
    shortest = -(-1800 // step_s)
    dropped = capped = turned_away = 0
    taken = []
    arrivals = [_seconds(row["arrival"]) - start for row in stays]
    # A stable sort: rows of the same second keep their order.
    for index in sorted(range(len(stays)), key=arrivals.__getitem__):
        row, arrives = stays[index], arrivals[index]
        name = row["socket_type"]
        kw = min(float(row.get("max_kw") or limits[name]), limits[name])
        departs = _seconds(row["departure"]) - start
        if arrives < 0 or departs > count * step_s:
            dropped += 1
            continue
        arrival = arrives // step_s
        departure = min(max(-(-departs // step_s), arrival + shortest), count)
        most = 0.98 * kw * (departure - arrival) * step_s / 3600
        kwh = float(row["energy_kwh"])
        capped += kwh > most
        socket = next((s for s in ranges[name] if free_at[s] <= arrival), None)
        if socket is None:
            turned_away += 1
            continue
        free_at[socket] = departure
        taken.append((socket, arrival, departure, kw, min(kwh, most)))
    columns = np.array(taken, dtype=float).reshape(-1, 5).T
    socket, arrival, departure = columns[:3].astype(np.int64)
    return Sessions(
        socket, arrival, departure, columns[3], columns[4], dropped, capped, turned_away
    )


def _day_start(stays: list[dict], zone: ZoneInfo) -> int:
    """Return the full hour that the stays of the least session energy span."""
    if not stays:
        return 0
    begins, crossed, kwh = [], [], []
    for row in stays:
        arrival, departure = (
            datetime.fromisoformat(row[name]).astimezone(zone).replace(tzinfo=None)
            for name in ("arrival", "departure")
        )
        hour = arrival.replace(minute=0, second=0, microsecond=0)
        begins.append(hour.hour)
        # A stay that begins or ends at a full hour does not span it.
        crossed.append(-((hour - departure) // timedelta(hours=1)) - 1)
        kwh.append(float(row["energy_kwh"]))
    begin, count, energy = np.array(begins), np.array(crossed), np.array(kwh)
    spanned = np.zeros(24)
    for after in range(1, 25):
        hits = count >= after
        spanned += np.bincount((begin[hits] + after) % 24, energy[hits], minlength=24)
    return int(np.argmin(np.round(spanned / energy.sum(), 6)))


def _days(
    start: int, step_s: int, count: int, zone: ZoneInfo, day_start: int
) -> list[tuple[int, int]]:
    """Return the places of the complete days, from `day_start` to the next one, local time."""
    date = datetime.fromtimestamp(start, zone).date() - timedelta(days=1)
    bounds = []
    while not bounds or bounds[-1] <= count:
        # zoneinfo reads a time that clocks skip with the offset before: the first moment after it.
        moment = datetime(date.year, date.month, date.day, day_start, tzinfo=zone)
        bounds.append(-int((start - moment.timestamp()) // step_s))
        date += timedelta(days=1)
    return [(a, b) for a, b in pairwise(bounds) if a >= 0 and b <= count]


def _weeks(
    days: list[tuple[int, int]], held_out: dict | None
) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the held-out stretches and the days that are left to train on."""
    weeks = len(days) // 7
    every = 6 if weeks >= 36 else 3
    rule = held_out or {"every_weeks": every, "first": every}
    held = range(rule["first"] - 1, weeks, rule["every_weeks"])
    stretches = [(days[7 * week][0], days[7 * week + 6][1]) for week in held]
    return stretches, [day for day in range(len(days)) if day // 7 not in held]


def _sparse(*blocks: tuple[Floats, Floats, Floats], shape: tuple[int, int]):
    rows, columns, values = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return coo_array((values, (rows, columns)), shape=shape).tocsc()


def _rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _seconds(stamp: str) -> int:
    return round(datetime.fromisoformat(stamp).timestamp())
