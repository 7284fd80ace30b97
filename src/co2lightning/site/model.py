"""A site as data, without torch.

Shapes: T = 96 steps a day, D days.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

T = 96
STEP_H = 0.25

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Battery:
    """The battery; power is on the AC side, state of charge (SoC) between 0 and 1."""

    capacity_kwh: float
    power_kw: float
    charge_efficiency: float
    discharge_efficiency: float
    soc_min: float
    soc_max: float
    start_soc_min: float
    start_soc_max: float


@dataclass(frozen=True)
class SocketType:
    """Sockets of one kind; power is at the meter."""

    name: str
    count: int
    max_kw: float


@dataclass(frozen=True, eq=False)
class Sessions:
    """The sessions that found a socket, ordered by day and arrival; every array is [N].

    Attributes:
        day: Index into `Site.days`.
        socket: Socket index, 0 to S-1.
        arrival_step: First step in which the vehicle can charge.
        departure_step: First step in which it is gone, at most 96.
        energy_kwh: Energy asked for, at the meter.
        max_kw: The lower of the vehicle's and the socket's power, at the meter.
    """

    day: Ints
    socket: Ints
    arrival_step: Ints
    departure_step: Ints
    energy_kwh: Floats
    max_kw: Floats


@dataclass(frozen=True, eq=False)
class Site:
    """A checked site: equipment, complete local days of 96 steps, admitted sessions.

    Attributes:
        sha256: Hex digest over the three files.
        sockets: Socket types; sockets are numbered type by type in this order.
        days: Local dates (ISO), length D.
        held_out: Whether a day is kept for testing, [D].
        pv_kw: AC power the PV could give, [D, T].
        load_kw: Building load without charging, [D, T].
        carbon_kg_per_kwh: CO2 of a kWh from the grid, [D, T].
        turned_away: Vehicles that found no free socket of their type, [D].
        notes: One-line remarks on what was cut, clipped or left out.
    """

    name: str
    directory: Path
    sha256: str
    latitude: float
    longitude: float
    altitude_m: float
    timezone: str
    pv_kwp: float
    grid_kw: float
    charger_efficiency: float
    seed: int
    battery: Battery
    sockets: tuple[SocketType, ...]
    days: tuple[str, ...]
    held_out: NDArray[np.bool_]
    pv_kw: Floats
    load_kw: Floats
    carbon_kg_per_kwh: Floats
    sessions: Sessions
    turned_away: Ints
    notes: tuple[str, ...]

    @property
    def training_days(self) -> Ints:
        """Indices of the days to train on."""
        return np.flatnonzero(~self.held_out)

    @property
    def held_out_days(self) -> Ints:
        """Indices of the days kept for testing."""
        return np.flatnonzero(self.held_out)

    @property
    def n_sockets(self) -> int:
        """Number of sockets S over all types."""
        return sum(s.count for s in self.sockets)
