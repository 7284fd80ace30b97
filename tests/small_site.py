"""Sites for tests: small ones, a day of one worked out by hand, the shipped ones read once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.moves import move_tables, moves_of, powers_of
from co2lightning.control.outlook import outlook_of
from co2lightning.control.state import Carry, SiteModel, State, restore
from co2lightning.sim.objective import metered, priced_model, reward
from co2lightning.sim.physics import Flows, step
from co2lightning.site.load import load_site
from co2lightning.site.model import OF_CO2, Battery, Objective, Sessions, Site, SocketType

# Two threads on busy cores wait for each other: a year of a rule took 8 s instead of 0.1.
torch.set_num_threads(1)

H, T = 0.25, 96  # of steps of 15 minutes, what these sites have unless told otherwise
Row = tuple[int, int, int, int, float, float]
"""Day, socket, arrival and departure in steps from that day's beginning, kWh, kW."""


@functools.cache
def shipped(name: str = "iquitos") -> Site:
    """Read a shipped site, once for all tests of a process."""
    return load_site(name)


@functools.cache
def real(name: str, announced: bool = False) -> Site:
    """Read a site of tests/sites, of vehicles the truth, once for all tests of a process."""
    return load_site(Path(__file__).parent / "sites" / name, announced=announced)


def small_site(
    *,
    days: int = 1,
    step_minutes: int = 15,
    sockets: int = 1,
    sessions: Sequence[Row] = (),
    min_kw: float = 0.0,
    pv_kw: object = 0.0,
    load_kw: object = 0.0,
    carbon: object = 0.4,
    capacity_kwh: float | None = 40.0,
    power_kw: float = 10.0,
    charge_efficiency: float = 0.9,
    discharge_efficiency: float = 0.8,
    may_charge_from_grid: bool = True,
    reserve_soc: float = 0.0,
    grid_kw: float = 1e6,
    import_limit_kw: object = np.inf,
    held_out: Sequence[int] = (),
    price: object = None,
    export_price: object = None,
    objective: Objective = OF_CO2,
) -> Site:
    """A site of a few sockets; series are anything that broadcasts to [D, steps of a day].

    Args:
        sockets: How many; 0 for none.
        min_kw: Least power of every socket.
        capacity_kwh: Of the battery; None for none.
        import_limit_kw: A series, where it is below `grid_kw`.
        price: Of a kWh, a series; None for none.
        export_price: Likewise.
    """
    a_day = 24 * 60 // step_minutes
    n_steps = days * a_day
    rows = sorted(sessions, key=lambda row: row[0] * a_day + row[2])
    columns = [np.array(c) for c in zip(*rows, strict=True)] or [np.zeros(0, int)] * 6
    day, socket, arrival, departure, energy_kwh, max_kw = columns
    socket_kw = float(max(max_kw, default=1.0))
    first, local = date(2025, 3, 1), np.datetime64("2025-03-01T00:00:00", "s")
    held = np.array(sorted(held_out), dtype=np.int64)
    losses = charge_efficiency, discharge_efficiency
    limits = 0.1, 0.9, 0.3, 0.7, may_charge_from_grid, reserve_soc

    def series(values: object) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, dtype=float), (days, a_day)).flatten()

    return Site(
        name="small",
        directory=Path(),
        sha256="",
        latitude=0.0,
        longitude=0.0,
        altitude_m=0.0,
        timezone="UTC",
        pv_kwp=float(np.max(series(pv_kw))),
        grid_kw=grid_kw,
        seed=0,
        battery=None if capacity_kwh is None else Battery(capacity_kwh, power_kw, *losses, *limits),
        sockets=(SocketType("any", sockets, socket_kw, min_kw),) if sockets else (),
        step_minutes=step_minutes,
        begin_s=int(local.astype(np.int64)),
        pv_kw=series(pv_kw),
        load_kw=series(load_kw),
        carbon_kg_per_kwh=series(carbon),
        import_limit_kw=np.minimum(series(import_limit_kw), grid_kw),
        local=local + np.arange(n_steps) * np.timedelta64(step_minutes, "m"),
        day_start_h=0,
        day_bounds=a_day * np.arange(days + 1),
        days=tuple(str(first + timedelta(days=day)) for day in range(days)),
        held_out=np.isin(np.arange(days), held),
        stretches=np.stack([held, held + 1], axis=1),
        sessions=Sessions(
            socket,
            day * a_day + arrival,
            np.minimum(day * a_day + departure, n_steps),
            energy_kwh.astype(float),
            max_kw.astype(float),
            np.full(len(rows), min_kw),
        ),
        turned_away=np.zeros(n_steps, int),
        turned_away_kwh=np.zeros(n_steps),
        clipped_kwh=np.zeros(n_steps),
        sessions_read=None,
        notes=(),
        price_per_kwh=None if price is None else series(price),
        export_price_per_kwh=None if export_price is None else series(export_price),
        objective=objective,
    )


def random_site(
    seed: int,
    *,
    days: int = 1,
    step_minutes: int = 15,
    sockets: int = 6,
    pv: float = 1.0,
    load: float = 1.0,
    most: float = 0.98,
    flat: bool = False,
    **other: Any,
) -> Site:
    """A site of random days, whose vehicles stay across midnight.

    Args:
        seed: Of everything drawn.
        days: How many.
        step_minutes: Length of a step.
        sockets: How many; each takes up to a few sessions after another.
        pv: Factor on the PV, 0 for none.
        load: Factor on the building's load.
        most: A session asks for at most this share of what its window allows.
        flat: Whether the intensity is constant.
        other: What `small_site` takes, instead of what is drawn.
    """
    rng = np.random.default_rng(seed)
    step_h, n_steps = step_minutes / 60, days * 24 * 60 // step_minutes
    an_hour = 1.0 / step_h
    sessions: list[Row] = []
    for socket in range(sockets):
        arrival = int(rng.uniform(0.0, 10.0) * an_hour)
        while arrival < n_steps - 2:
            stay = max(1, int(rng.uniform(0.5, 10.0) * an_hour))
            departure = min(arrival + stay, n_steps)
            power_kw = float(rng.uniform(1.0, 4.0))
            share = float(rng.uniform(0.05, most))
            energy_kwh = share * power_kw * step_h * (departure - arrival)
            sessions.append((0, socket, arrival, departure, energy_kwh, power_kw))
            arrival = departure + int(rng.uniform(0.0, 8.0) * an_hour)
    shape, hours = (days, n_steps // days), np.arange(n_steps) * step_h
    sun = np.maximum(np.sin((hours / 24 - 0.25) * 2 * np.pi), 0.0).reshape(shape)
    drawn = {
        "pv_kw": pv * 15.0 * sun * rng.uniform(0.3, 1.0, shape),
        "load_kw": load * rng.uniform(1.0, 6.0, shape),
        "carbon": 0.5 if flat else rng.uniform(0.2, 0.9, shape),
        "capacity_kwh": float(rng.uniform(5.0, 60.0)),
        "power_kw": float(rng.uniform(2.0, 15.0)),
        "charge_efficiency": float(rng.uniform(0.8, 1.0)),
        "discharge_efficiency": float(rng.uniform(0.8, 1.0)),
    }
    own = {"days": days, "step_minutes": step_minutes, "sockets": sockets, "sessions": sessions}
    return small_site(**(drawn | own | other))


class Booked(NamedTuple):
    """What a step cost and earned; every field is [B]."""

    co2_kg: Tensor
    cost: Tensor
    reward: Tensor


class Played(NamedTuple):
    """Steps as they went: what was at the beginning of each, what flowed, what that cost."""

    states: list[State]
    flows: list[Flows]
    booked: list[Booked]
    step_h: float

    def each(self, name: str) -> list[Tensor]:
        """Return one of the figures of all steps, each [B]; some are derived from the flows."""
        if name == "unmet_kwh":
            return [flow.unmet_kw * self.step_h for flow in self.flows]
        if name == "grid_import_kw":
            return [flow.grid_kw.relu() for flow in self.flows]
        if name == "curtailed_kwh":
            return [(-flow.grid_kw).relu() * self.step_h for flow in self.flows]
        steps = self.booked if name in Booked._fields else self.flows
        return [getattr(step, name) for step in steps]

    def figures(self, name: str) -> np.ndarray:
        """Return a figure of all steps of a single run."""
        return np.array([value.item() for value in self.each(name)])


def begin(model: SiteModel, soc: float = 0.5, batch: int = 1) -> State:
    """Return the state [B] at the first step of the series, its arrivals included."""
    places = torch.zeros(batch, dtype=torch.int64, device=model.device)
    owed_kw = model.sockets[3, 0].expand(batch, -1)
    true_kw = None if model.truth is None else model.truth[1, 0].expand(batch, -1)
    return restore(model, Carry(places, torch.full_like(owed_kw[:, 0], soc), owed_kw, true_kw))


def play(
    site: Site, actions: Tensor, soc_start: float = 0.5, dtype: torch.dtype = torch.float64
) -> Played:
    """Run the first n steps of a site with actions [n, B, A], powers or what moves weigh."""
    model = priced_model(site, dtype=dtype)
    tables = move_tables(site, model, outlook_of(site))
    following = begin(model, soc_start if site.battery else 0.0, actions.shape[1])
    played = Played([], [], [], site.step_h)
    for action in actions.to(dtype):
        state = following
        decided = powers_of(tables, model, state, moves_of(tables, model, state), action)
        following, flows = step(model, state, decided)
        of_step = (of[0] for of in metered(model, state.place, flows.grid_kw.unsqueeze(0)))
        booked = Booked(*of_step, reward(model, state, flows))
        for column, one in zip(played, (state, flows, booked), strict=False):
            column.append(one)
    return played


def by_hand(site: Site, begin: int, soc_start: float, actions: np.ndarray) -> dict[str, np.ndarray]:
    """Work out some steps from the site model's words alone: per vehicle, per step, in float64.

    Who stands there at the beginning owes what charging on arrival has left.

    Args:
        site: The site.
        begin: Place of the first step.
        soc_start: State of charge before it.
        actions: [n, 2] in [-1, 1].

    Returns:
        Per step [n]: `soc` at its end, `ev_kw`, `battery_kw`, `grid_import_kw`, `curtailed_kwh`,
        `unmet_kwh` and `co2_kg`; `socket_kw` [n, C].
    """
    rows, h = site.sessions, site.step_h
    # No battery is one that can do nothing.
    battery = site.battery or Battery(1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    least_soc = max(battery.soc_min, battery.reserve_soc)
    in_time = (rows.departure > begin) & (rows.arrival < begin + len(actions))
    mine = np.flatnonzero(in_time).tolist()
    owed = {i: float(rows.energy_kwh[i]) for i in mine}
    for i in mine:
        charged_kwh = float(rows.max_kw[i]) * h * max(0, begin - int(rows.arrival[i]))
        owed[i] = max(0.0, owed[i] - charged_kwh)
    soc = soc_start
    out: dict[str, list] = {
        name: []
        for name in (
            *("soc", "ev_kw", "battery_kw", "grid_import_kw", "curtailed_kwh", "unmet_kwh"),
            *("co2_kg", "socket_kw"),
        )
    }
    for t in range(begin, begin + len(actions)):
        here = [i for i in mine if rows.arrival[i] <= t < rows.departure[i]]
        left = {i: int(rows.departure[i]) - t for i in here}
        power = {i: float(rows.max_kw[i]) for i in here}
        could = {i: min(power[i], owed[i] / h) for i in here}
        least = {i: min(could[i], float(rows.min_kw[i])) for i in here}
        must = {i: min(max(0.0, owed[i] / h - power[i] * (left[i] - 1)), could[i]) for i in here}
        must = {i: max(must[i], least[i]) if must[i] > 0.0 else 0.0 for i in here}
        charge_kw = (battery.soc_max - soc) * battery.capacity_kwh / battery.charge_efficiency / h
        give_kw = (soc - least_soc) * battery.capacity_kwh * battery.discharge_efficiency / h
        most_charge = min(max(charge_kw, 0.0), battery.power_kw)
        most_discharge = min(max(give_kw, 0.0), battery.power_kw)
        net, limit = site.load_kw[t] - site.pv_kw[t], site.import_limit_kw[t]

        must_sum, could_sum = sum(must.values()), sum(could.values())
        wish, charge = actions[t - begin]
        budget = must_sum + (wish + 1.0) / 2.0 * (could_sum - must_sum)
        budget = min(budget, max(must_sum, limit - net + most_discharge))
        rest = budget - must_sum
        given = dict(must)
        for i in sorted(here, key=lambda i: (left[i] - owed[i] / h / power[i], rows.socket[i])):
            extra = min(rest, could[i] - must[i])
            rest -= extra
            if given[i] + extra >= least[i] - 1e-6:
                given[i] += extra
        ev = sum(given.values())

        wanted = min(charge * battery.power_kw, most_charge, limit - net - ev)
        if not battery.may_charge_from_grid:
            wanted = min(wanted, max(0.0, -net - ev))
        flow = max(wanted, -most_discharge)
        if flow >= 0:
            soc += flow * h * battery.charge_efficiency / battery.capacity_kwh
        else:
            soc += flow * h / battery.discharge_efficiency / battery.capacity_kwh
        meter = net + ev + flow
        unmet = 0.0
        sockets_kw = np.zeros(max(1, len(rows.used_sockets)))
        for i in here:
            owed[i] -= given[i] * h
            sockets_kw[rows.column[i]] = given[i]
            if left[i] == 1:
                unmet += max(owed[i], 0.0)
        co2 = max(meter, 0.0) * h * site.carbon_kg_per_kwh[t]
        for name, value in (
            ("soc", soc),
            ("ev_kw", ev),
            ("battery_kw", flow),
            ("grid_import_kw", max(meter, 0.0)),
            ("curtailed_kwh", max(-meter, 0.0) * h),
            ("unmet_kwh", unmet),
            ("co2_kg", co2),
            ("socket_kw", sockets_kw),
        ):
            out[name].append(value)
    return {name: np.array(values) for name, values in out.items()}


SITE = """\
name: village
latitude: 0
longitude: 0
altitude_m: 0
timezone: UTC
pv_kwp: 40
grid_kw: 100
seed: 1
battery: {capacity_kwh: 50, power_kw: 20, charge_efficiency: 0.9, discharge_efficiency: 0.9,
          soc_min: 0.1, soc_max: 0.9, start_soc_min: 0.3, start_soc_max: 0.7}
sockets: [{name: moto, count: 3, max_kw: 4}]
held_out: [2025-03-02, 2025-03-04, 2025-03-05]
"""
HELD_OUT = ["2025-03-02", "2025-03-04", "2025-03-05"]


def write_site(directory: Path, load_kw: float = 5.0, currency: str | None = None) -> Path:
    """A site of six days, each a little sunnier than the one before.

    With a currency it has prices, low where carbon is high; what is sent out earns a little.
    """
    directory.mkdir()
    (directory / "site.yaml").write_text(SITE + (f"currency: {currency}\n" if currency else ""))
    priced = currency is not None
    money = ",price_per_kwh,export_price_per_kwh" if priced else ""
    series, sessions = [f"time,pv_kw,load_kw,carbon_kg_per_kwh{money}"], []
    for day in range(1, 7):
        date = f"2025-03-{day:02d}"
        for t in range(96):
            time = f"{date}T{t // 4:02d}:{t % 4 * 15:02d}:00+00:00"
            pv_kw = (20 + day) * max(0.0, 1 - abs(t - 48) / 24)
            carbon = 0.6 if t >= 72 else 0.4
            money = f",{0.1 if t >= 72 else 0.3},0.05" if priced else ""
            series.append(f"{time},{pv_kw:.3f},{load_kw},{carbon}{money}")
        for i, (arrival, departure) in enumerate([(3, 9), (8, 15), (17, 22)]):
            sessions.append(
                f"{day}-{i},moto,{date}T{arrival:02d}:00:00+00:00,"
                f"{date}T{departure:02d}:00:00+00:00,{6 + i},4"
            )
    header = "session_id,socket_type,arrival,departure,energy_kwh,max_kw"
    (directory / "series.csv").write_text("\n".join(series) + "\n")
    (directory / "sessions.csv").write_text("\n".join([header, *sessions]) + "\n")
    return directory
