"""Sites for tests: small ones, a day of one worked out by hand, the shipped ones read once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.state import Carry, State, restore
from co2lightning.sim.objective import Booked, book, priced_model
from co2lightning.sim.physics import Flows, step
from co2lightning.site.load import load_site
from co2lightning.site.model import Battery, Sessions, Site, SocketType

# Two threads on busy cores wait for each other: a year of a rule took 8 s instead of 0.1.
torch.set_num_threads(1)

H, T = 0.25, 96
Row = tuple[int, int, int, int, float, float]
"""Day, socket, arrival and departure in steps of that day, kWh, kW."""


@functools.cache
def shipped(name: str = "iquitos") -> Site:
    """Read a shipped site, once for all tests of a process."""
    return load_site(name)


def small_site(
    *,
    days: int = 1,
    sockets: int = 1,
    sessions: Sequence[Row] = (),
    pv_kw: object = 0.0,
    load_kw: object = 0.0,
    carbon: object = 0.4,
    capacity_kwh: float = 40.0,
    power_kw: float = 10.0,
    charge_efficiency: float = 0.9,
    discharge_efficiency: float = 0.8,
    grid_kw: float = 1e6,
    held_out: Sequence[int] = (),
) -> Site:
    """A site of a few sockets; series are anything that broadcasts to [D, T]."""
    rows = sorted(sessions, key=lambda row: row[0] * T + row[2])
    columns = [np.array(c) for c in zip(*rows, strict=True)] or [np.zeros(0, int)] * 6
    day, socket, arrival, departure, energy_kwh, max_kw = columns
    socket_kw = float(max(max_kw, default=1.0))
    first, local = date(2025, 3, 1), np.datetime64("2025-03-01T00:00:00", "s")
    held = np.array(sorted(held_out), dtype=np.int64)

    def series(values: object) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, dtype=float), (days, T)).flatten()

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
        battery=Battery(
            capacity_kwh, power_kw, charge_efficiency, discharge_efficiency, 0.1, 0.9, 0.3, 0.7
        ),
        sockets=(SocketType("any", sockets, socket_kw),),
        step_minutes=15,
        begin_s=int(local.astype(np.int64)),
        pv_kw=series(pv_kw),
        load_kw=series(load_kw),
        carbon_kg_per_kwh=series(carbon),
        import_limit_kw=series(grid_kw),
        local=local + np.arange(days * T) * np.timedelta64(15, "m"),
        day_start_h=0,
        day_bounds=T * np.arange(days + 1),
        days=tuple(str(first + timedelta(days=day)) for day in range(days)),
        held_out=np.isin(np.arange(days), held),
        stretches=np.stack([held, held + 1], axis=1),
        sessions=Sessions(
            socket,
            day * T + arrival,
            np.minimum(day * T + departure, days * T),
            energy_kwh.astype(float),
            max_kw.astype(float),
            np.zeros(len(rows)),
        ),
        turned_away=np.zeros(days * T, int),
        turned_away_kwh=np.zeros(days * T),
        clipped_kwh=np.zeros(days * T),
        sessions_read=None,
        notes=(),
    )


def random_site(
    seed: int,
    *,
    sockets: int = 6,
    pv: float = 1.0,
    load: float = 1.0,
    most: float = 0.98,
    grid_kw: float = 1e6,
    flat: bool = False,
) -> Site:
    """A site of one random day.

    Args:
        seed: Of everything drawn.
        sockets: How many; each takes up to a few sessions after another.
        pv: Factor on the PV, 0 for none.
        load: Factor on the building's load.
        most: A session asks for at most this share of what its window allows.
        grid_kw: The connection.
        flat: Whether the intensity is constant.
    """
    rng = np.random.default_rng(seed)
    sessions: list[Row] = []
    for socket in range(sockets):
        step = int(rng.integers(0, 40))
        while step < T - 2:
            stay = int(rng.integers(2, 40))
            departure = min(step + stay, T)
            power_kw = float(rng.uniform(1.0, 4.0))
            share = float(rng.uniform(0.05, most))
            energy_kwh = share * power_kw * H * (departure - step)
            sessions.append((0, socket, step, departure, energy_kwh, power_kw))
            step = departure + int(rng.integers(0, 30))
    sun = np.maximum(np.sin((np.arange(T) / T - 0.25) * 2 * np.pi), 0.0)
    return small_site(
        sockets=sockets,
        sessions=sessions,
        pv_kw=pv * 15.0 * sun * rng.uniform(0.3, 1.0, T),
        load_kw=load * rng.uniform(1.0, 6.0, T),
        carbon=0.5 if flat else rng.uniform(0.2, 0.9, T),
        capacity_kwh=float(rng.uniform(5.0, 60.0)),
        power_kw=float(rng.uniform(2.0, 15.0)),
        charge_efficiency=float(rng.uniform(0.8, 1.0)),
        discharge_efficiency=float(rng.uniform(0.8, 1.0)),
        grid_kw=grid_kw,
    )


class Played(NamedTuple):
    """A day as it went, step by step: what it was at the beginning, what flowed, what that cost."""

    states: list[State]
    flows: list[Flows]
    booked: list[Booked]

    def each(self, name: str) -> list[Tensor]:
        """Return one of the figures of all steps, each [B]; some are derived from the flows."""
        if name == "unmet_kwh":
            return [flow.unmet_kw * H for flow in self.flows]
        if name == "grid_import_kw":
            return [flow.grid_kw.relu() for flow in self.flows]
        if name == "curtailed_kwh":
            return [(-flow.grid_kw).relu() * H for flow in self.flows]
        steps = self.booked if name in Booked._fields else self.flows
        return [getattr(step, name) for step in steps]

    def figures(self, name: str) -> np.ndarray:
        """Return a figure of all steps of a single day."""
        return np.array([value.item() for value in self.each(name)])


def play(
    site: Site, actions: Tensor, soc_start: float = 0.5, dtype: torch.dtype = torch.float64
) -> Played:
    """Run day 0 of a site with actions [T, B, 2]."""
    batch = actions.shape[1]
    model = priced_model(site, dtype=dtype)
    soc = torch.full((batch,), soc_start, dtype=dtype)
    standing_kw = model.sockets[3, 0].expand(batch, -1)
    following = restore(model, Carry(torch.zeros(batch, dtype=torch.int64), soc, standing_kw))
    played = Played([], [], [])
    for action in actions.to(dtype):
        state = following
        following, flows = step(model, state, action)
        played.states.append(state)
        played.flows.append(flows)
        played.booked.append(book(state, flows))
    return played


def day_by_hand(
    site: Site, day: int, soc_start: float, actions: np.ndarray
) -> dict[str, np.ndarray]:
    """Work out a day from site.md's words alone: per vehicle, per step, in float64.

    Nobody stands there when it begins but those that arrive then.

    Args:
        actions: [T, 2] in [-1, 1].

    Returns:
        Per step [T]: `soc` at its end, `ev_kw`, `battery_kw`, `grid_import_kw`, `curtailed_kwh`,
        `unmet_kwh` and `co2_kg`; `socket_kw` [T, C].
    """
    battery, rows = site.battery, site.sessions
    assert battery
    begin = day * T
    mine = [i for i in range(len(rows.socket)) if begin <= rows.arrival[i] < begin + T]
    owed = {i: float(rows.energy_kwh[i]) for i in mine}
    soc = soc_start
    out: dict[str, list] = {
        name: []
        for name in (
            *("soc", "ev_kw", "battery_kw", "grid_import_kw", "curtailed_kwh", "unmet_kwh"),
            *("co2_kg", "socket_kw"),
        )
    }
    for t in range(begin, begin + T):
        here = [i for i in mine if rows.arrival[i] <= t < rows.departure[i]]
        left = {i: int(rows.departure[i]) - t for i in here}
        power = {i: float(rows.max_kw[i]) for i in here}
        must = {i: min(max(0.0, owed[i] / H - power[i] * (left[i] - 1)), power[i]) for i in here}
        could = {i: min(power[i], owed[i] / H) for i in here}
        room_kw = (battery.soc_max - soc) * battery.capacity_kwh / battery.charge_efficiency / H
        store_kw = (soc - battery.soc_min) * battery.capacity_kwh * battery.discharge_efficiency / H
        most_charge = min(max(room_kw, 0.0), battery.power_kw)
        most_discharge = min(max(store_kw, 0.0), battery.power_kw)
        pv, load = site.pv_kw[t], site.load_kw[t]

        must_sum, could_sum = sum(must.values()), sum(could.values())
        wish, charge = actions[t - begin]
        budget = must_sum + (wish + 1.0) / 2.0 * (could_sum - must_sum)
        budget = min(budget, max(must_sum, site.grid_kw + pv + most_discharge - load))
        rest = budget - must_sum
        given = dict(must)
        for i in sorted(here, key=lambda i: (left[i] - owed[i] / H / power[i], rows.socket[i])):
            extra = min(rest, could[i] - must[i])
            given[i] += extra
            rest -= extra
        ev = sum(given.values())

        wanted = min(charge * battery.power_kw, most_charge, site.grid_kw + pv - load - ev)
        flow = max(wanted, -most_discharge)
        if flow >= 0:
            soc += flow * H * battery.charge_efficiency / battery.capacity_kwh
        else:
            soc += flow * H / battery.discharge_efficiency / battery.capacity_kwh
        meter = load + ev + flow - pv
        unmet = 0.0
        sockets_kw = np.zeros(max(1, len(rows.used_sockets)))
        for i in here:
            owed[i] -= given[i] * H
            sockets_kw[rows.column[i]] = given[i]
            if left[i] == 1:
                unmet += max(owed[i], 0.0)
        co2 = max(meter, 0.0) * H * site.carbon_kg_per_kwh[t]
        for name, value in (
            ("soc", soc),
            ("ev_kw", ev),
            ("battery_kw", flow),
            ("grid_import_kw", max(meter, 0.0)),
            ("curtailed_kwh", max(-meter, 0.0) * H),
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


def write_site(directory: Path, load_kw: float = 5.0) -> Path:
    """A site of six days, each a little sunnier than the one before."""
    directory.mkdir()
    (directory / "site.yaml").write_text(SITE)
    series, sessions = ["time,pv_kw,load_kw,carbon_kg_per_kwh"], []
    for day in range(1, 7):
        date = f"2025-03-{day:02d}"
        for t in range(96):
            time = f"{date}T{t // 4:02d}:{t % 4 * 15:02d}:00+00:00"
            pv_kw = (20 + day) * max(0.0, 1 - abs(t - 48) / 24)
            carbon = 0.6 if t >= 72 else 0.4
            series.append(f"{time},{pv_kw:.3f},{load_kw},{carbon}")
        for i, (arrival, departure) in enumerate([(3, 9), (8, 15), (17, 22)]):
            sessions.append(
                f"{day}-{i},moto,{date}T{arrival:02d}:00:00+00:00,"
                f"{date}T{departure:02d}:00:00+00:00,{6 + i},4"
            )
    header = "session_id,socket_type,arrival,departure,energy_kwh,max_kw"
    (directory / "series.csv").write_text("\n".join(series) + "\n")
    (directory / "sessions.csv").write_text("\n".join([header, *sessions]) + "\n")
    return directory
