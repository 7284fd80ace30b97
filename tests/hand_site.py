"""Sites of a few steps, made by hand: what is not given is not there."""

from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from co2lightning.site.model import Battery, Sessions, Site, SocketType

Row = tuple[int, int, int, float, float]
"""Socket, arrival, departure, kWh, kW."""


def battery(
    capacity_kwh: float = 10.0,
    power_kw: float = 5.0,
    efficiency: float = 1.0,
    soc_min: float = 0.0,
    soc_max: float = 1.0,
    **other: float,
) -> Battery:
    """A battery that loses `1 - efficiency` each way."""
    losses = (efficiency, efficiency)
    return Battery(capacity_kwh, power_kw, *losses, soc_min, soc_max, soc_min, soc_max, **other)  # pyright: ignore[reportArgumentType]


def hand_site(
    steps: int,
    *,
    step_minutes: int = 60,
    carbon: object = 0.5,
    load_kw: object = 0.0,
    pv_kw: object = 0.0,
    sessions: Sequence[Row] = (),
    battery: Battery | None = None,
    limit_kw: object = 1e6,
    stretches: Sequence[tuple[int, int]] = (),
) -> Site:
    """A site of P steps that begins on a Saturday at midnight UTC.

    Args:
        steps: P.
        step_minutes: Their length.
        carbon: Anything that broadcasts to [P], like the next three.
        load_kw: The building's load.
        pv_kw: What the PV could give.
        sessions: In order of arrival.
        battery: If there is one.
        limit_kw: The connection.
        stretches: Which days are held out, first and the one after the last.
    """
    rows = np.array(sessions, dtype=float).reshape(-1, 5)
    whole, each = rows[:, :3].astype(np.int64), rows[:, 3:]
    days = steps * step_minutes // (24 * 60)
    held_out = np.zeros(days, dtype=np.bool_)
    for first, last in stretches:
        held_out[first:last] = True

    def series(values: object) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, dtype=float), (steps,)).copy()

    begin = np.datetime64("2025-03-01", "m")
    sockets = int(whole[:, 0].max(initial=-1)) + 1
    return Site(
        name="hand",
        directory=Path("hand"),
        sha256="0" * 64,
        latitude=0.0,
        longitude=0.0,
        altitude_m=0.0,
        timezone="UTC",
        pv_kwp=float(series(pv_kw).max()),
        grid_kw=float(series(limit_kw).max()),
        seed=0,
        battery=battery,
        sockets=(SocketType("any", sockets, each[:, 1].max()),) if sockets else (),
        step_minutes=step_minutes,
        begin_s=int(begin.astype("datetime64[s]").astype(np.int64)),
        pv_kw=series(pv_kw),
        load_kw=series(load_kw),
        carbon_kg_per_kwh=series(carbon),
        import_limit_kw=series(limit_kw),
        local=begin + np.arange(steps) * np.timedelta64(step_minutes, "m"),
        day_start_h=0,
        day_bounds=np.arange(days + 1) * (24 * 60 // step_minutes),
        days=tuple(str(date(2025, 3, 1) + timedelta(days=day)) for day in range(days)),
        held_out=held_out,
        stretches=np.array(stretches, dtype=np.int64).reshape(-1, 2),
        sessions=Sessions(
            *(whole[:, 0], whole[:, 1], whole[:, 2]), each[:, 0], each[:, 1], np.zeros(len(rows))
        ),
        turned_away=np.zeros(steps, dtype=np.int64),
        turned_away_kwh=np.zeros(steps),
        clipped_kwh=np.zeros(steps),
        sessions_read=None,
        notes=(),
    )


def random_site(seed: int, *, steps: int, step_minutes: int = 60, **kwargs: object) -> Site:
    """A site with some of everything, or less: what is drawn may be left out.

    Args:
        seed: Of everything drawn.
        steps: P.
        step_minutes: Their length.
        kwargs: What `hand_site` takes, instead of what would be drawn.
    """
    rng = np.random.default_rng(seed)
    sessions: list[Row] = []
    for socket in range(int(rng.integers(0, 4))):
        arrival = int(rng.integers(0, 6))
        while arrival < steps - 2:
            departure = min(arrival + int(rng.integers(2, 14)), steps)
            power_kw = float(rng.uniform(1.0, 6.0))
            most_kwh = 0.98 * power_kw * (departure - arrival) * step_minutes / 60
            sessions.append(
                (socket, arrival, departure, float(rng.uniform(0.05, 1.0)) * most_kwh, power_kw)
            )
            arrival = departure + int(rng.integers(0, 5))
    sessions.sort(key=lambda row: row[1])
    efficiency = float(rng.uniform(0.7, 1.0))
    own = battery(
        float(rng.uniform(2.0, 40.0)), float(rng.uniform(1.0, 15.0)), efficiency, 0.1, 0.9
    )
    given: dict[str, object] = {
        "carbon": rng.uniform(0.05, 0.9, steps),
        "load_kw": rng.uniform(0.0, 8.0, steps) * rng.integers(0, 2),
        "pv_kw": np.maximum(rng.uniform(-15.0, 15.0, steps), 0.0) * rng.integers(0, 2),
        "sessions": sessions,
        "battery": own if rng.integers(0, 3) else None,
        "limit_kw": float(rng.choice([8.0, 1e6])),
    }
    return hand_site(steps, step_minutes=step_minutes, **(given | kwargs))  # pyright: ignore[reportArgumentType]
