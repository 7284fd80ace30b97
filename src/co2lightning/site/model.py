"""A site as data, without torch.

Time is one line of P steps; a step is known by its place on that line, 0 to P-1. Energies and
powers are at the meter. Shapes: P steps, D days, W stretches, N sessions, C sockets
that are ever taken.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_Amount = TypeVar("_Amount")

DAY_H = 24.0
REACH_H = 48.0
"""How far a forecast looks."""
TAIL_H = 48.0
"""How far beyond a stretch's end the operation is looked at that settles it."""


class Objective(NamedTuple):
    """What is to be made small: so much for a kg of CO2, so much for a unit of the currency."""

    co2: float = 1.0
    cost: float = 0.0

    def of(self, co2_kg: _Amount, cost: _Amount) -> _Amount:
        """Return what kilograms and money are together, arrays or tensors of one shape."""
        return self.co2 * co2_kg + self.cost * cost  # pyright: ignore


OF_CO2 = Objective()


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
    may_charge_from_grid: bool = True
    reserve_soc: float = 0.0  # kept for outages; never below soc_min once a site is read

    @property
    def least_soc(self) -> float:
        """What operation may discharge to."""
        return max(self.soc_min, self.reserve_soc)


@dataclass(frozen=True)
class SocketType:
    """Sockets of one kind; power is at the meter: 0, or between `min_kw` and `max_kw`."""

    name: str
    count: int
    max_kw: float
    min_kw: float = 0.0


@dataclass(frozen=True, eq=False)
class Sessions:
    """The sessions that found a socket, ordered by arrival; every array is [N].

    Attributes:
        socket: Socket index, 0 to S-1.
        arrival: First step in which the vehicle can charge.
        departure: First step in which it is gone, at most P.
        energy_kwh: Energy asked for.
        max_kw: The lower of the vehicle's and the socket's power.
        min_kw: The socket's least power.
    """

    socket: Ints
    arrival: Ints
    departure: Ints
    energy_kwh: Floats
    max_kw: Floats
    min_kw: Floats

    @functools.cached_property
    def used_sockets(self) -> Ints:
        """The sockets that are ever taken, [C] ascending; tables have a column for each."""
        return np.unique(self.socket)

    @functools.cached_property
    def column(self) -> Ints:
        """Where each session's socket stands among those that are ever taken, [N]."""
        return np.searchsorted(self.used_sockets, self.socket)

    def standing(self, place: int) -> Ints:
        """Return which sessions stand there in the step at `place`, its arrivals included."""
        return np.flatnonzero((self.arrival <= place) & (place < self.departure))


class Told(NamedTuple):
    """What is said of each session when it arrives, or usual where nothing is; every array is [N].

    A vehicle takes what it truly takes and leaves when it truly leaves, whatever was said.
    """

    departure: Ints  # first step in which it is to be gone
    energy_kwh: Floats


class Announcements(NamedTuple):
    """How good the announcements of a sessions file are; None where none is told."""

    departures: int  # rows that tell one
    departure_off_h: float | None  # median of how far it lies off, either way
    departure_late_share: float | None  # of those that lie after the true departure
    energies: int
    energy_ratio: float | None  # median of energy told to energy taken


@dataclass(frozen=True, eq=False)
class SessionsRead:
    """What became of the rows of the sessions file.

    Attributes:
        rows: How many there are.
        dropped: How many arrive before the series begins or depart after it ends.
        clipped: How many asked for more than 98 % of what their stay allows.
        turned_away: How many found no free socket of their type.
        energy_kwh: What all rows ask for.
        dropped_kwh: What the dropped ones ask for.
        span_share: Share of the energy whose stay spans each full hour of the day, [24].
        announcements: How good they are; None where the file has no column for them.
    """

    rows: int
    dropped: int
    clipped: int
    turned_away: int
    energy_kwh: float
    dropped_kwh: float
    span_share: Floats
    announcements: Announcements | None = None


@dataclass(frozen=True, eq=False)
class Provided:
    """What a provider forecast of one series, by step and then by time of issue; both are [R].

    Attributes:
        key: The step it is about, perhaps beyond the series, times 2^32, plus when it was issued
            in seconds since 1970 UTC. Ascending, none twice.
        value: What was expected.
    """

    key: Ints
    value: NDArray[np.float32]

    def newest(self, about: Ints, now_s: Ints) -> tuple[Floats, Floats]:
        """Return what the newest issue says of some steps, and its age in h; NaN where none does.

        Args:
            about: The steps, [N] ascending.
            now_s: For each the instant; what is issued later does not count.
        """
        row = np.searchsorted(self.key, about << 32 | now_s, side="right") - 1
        there = (row >= 0) & (self.key[row] >> 32 == about)
        issued_s = self.key[row] & (1 << 32) - 1
        found = self.value[row].astype(np.float64), (now_s - issued_s) / 3600.0
        return np.where(there, found[0], np.nan), np.where(there, found[1], np.nan)


@dataclass(frozen=True, eq=False)
class Site:
    """A checked site: equipment, the series, complete local days, admitted sessions.

    What a site has not is there as nothing: zeros in the series, no sockets, no sessions.

    Attributes:
        sha256: Hex digest over its files.
        sockets: Socket types; sockets are numbered type by type in this order.
        step_minutes: Length of a step: 5, 10, 15, 20, 30 or 60.
        begin_s: When the series begins, in seconds since 1970 UTC.
        pv_kw: AC power the PV could give, [P].
        load_kw: Building load without charging, [P]; below 0 where a net meter exports.
        carbon_kg_per_kwh: CO2 of a kWh from the grid, [P].
        import_limit_kw: What may be imported: `grid_kw`, or less where the file says so, [P].
        local: Wall clock at the beginning of each step, [P].
        day_start_h: The hour at which days begin, 0 to 23.
        day_bounds: Where each day begins, and where the last one ends, [D + 1]; the days that the
            series cuts are none.
        days: Local dates (ISO) at which they begin, length D.
        held_out: Whether a day is kept from every fit, [D].
        stretches: First day and the day after the last of what is evaluated in one go, [W, 2].
        turned_away: Vehicles turned away that arrive in a step, [P].
        turned_away_kwh: What they ask for, [P].
        clipped_kwh: What admitted sessions that arrive in a step ask for beyond 98 % of what
            their stay allows, [P].
        sessions_read: What became of the sessions file; None where there is none.
        notes: One-line remarks on what was cut, clipped or left out.
        price_per_kwh: What a kWh from the grid costs, [P], perhaps below 0; None where it is not
            known.
        export_price_per_kwh: What a kWh into the grid earns, [P]; where it is below 0 a surplus is
            curtailed. None: nothing.
        currency: Of the prices; "" where the file names none.
        objective: What policies are settled by.
        known_ahead: Columns of the series that are known to the end of the next calendar day from
            a local time such as "13:00" on, before it to the end of this one; or "always". In
            another world perhaps "usual": nothing but what is usual at that time of day.
        provided: What a provider forecast, by the name of the series.
        told: What controllers know of the sessions; None where that is the truth.
        fitted_on: Where this is another world of a site: the site itself. What is fitted or chosen,
            the scales of observations and how stretches begin are the site's own.
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
    seed: int
    battery: Battery | None
    sockets: tuple[SocketType, ...]
    step_minutes: int
    begin_s: int
    pv_kw: Floats
    load_kw: Floats
    carbon_kg_per_kwh: Floats
    import_limit_kw: Floats
    local: NDArray[np.datetime64]
    day_start_h: int
    day_bounds: Ints
    days: tuple[str, ...]
    held_out: NDArray[np.bool_]
    stretches: Ints
    sessions: Sessions
    turned_away: Ints
    turned_away_kwh: Floats
    clipped_kwh: Floats
    sessions_read: SessionsRead | None
    notes: tuple[str, ...]
    price_per_kwh: Floats | None = None
    export_price_per_kwh: Floats | None = None
    currency: str = ""
    objective: Objective = OF_CO2
    known_ahead: Mapping[str, str] = field(default_factory=dict)
    provided: Mapping[str, Provided] = field(default_factory=dict)
    told: Told | None = None
    fitted_on: "Site | None" = None

    @functools.cached_property
    def truth(self) -> "Site":
        """The same site, where controllers know the truth of the sessions; perhaps itself."""
        return self if self.told is None else replace(self, told=None)

    @functools.cached_property
    def sessions_told(self) -> Sessions:
        """The sessions as controllers are told of them."""
        return self.sessions if self.told is None else replace(self.sessions, **self.told._asdict())

    @property
    def n_steps(self) -> int:
        """Number of steps P."""
        return len(self.carbon_kg_per_kwh)

    @property
    def step_h(self) -> float:
        return self.step_minutes / 60

    @functools.cached_property
    def money_per_kwh(self) -> Floats:
        """What an imported kWh costs and an exported one earns, [2, P]; 0 without prices."""
        money = np.zeros((2, self.n_steps))
        if self.price_per_kwh is not None:
            money[0] = self.price_per_kwh
        if self.export_price_per_kwh is not None:
            money[1] = np.maximum(self.export_price_per_kwh, 0.0)
        return money

    @functools.cached_property
    def import_price(self) -> Floats:
        """What an imported kWh adds to the objective, [P], perhaps below 0."""
        return self.objective.of(self.carbon_kg_per_kwh, self.money_per_kwh[0])

    @functools.cached_property
    def export_credit(self) -> Floats:
        """What an exported kWh takes off it, [P]: 0 or more, and no more than the price or 0."""
        return self.objective.of(np.zeros(self.n_steps), self.money_per_kwh[1])

    def steps(self, hours: float) -> int:
        """Return how many steps these hours are, at least one."""
        return max(1, round(hours / self.step_h))

    @property
    def training_days(self) -> Ints:
        """Indices of the days to train on."""
        return np.flatnonzero(~self.held_out)

    @property
    def training_steps(self) -> NDArray[np.bool_]:
        """Whether a step lies in no held-out day, [P]; steps before and after all days do."""
        held_out = np.zeros(self.n_steps, dtype=np.bool_)
        for day in np.flatnonzero(self.held_out):
            held_out[self.day_bounds[day] : self.day_bounds[day + 1]] = True
        return ~held_out

    @property
    def stretch_bounds(self) -> Ints:
        """The places [W, 2] of each stretch's first step and of the step after its last."""
        return self.day_bounds[self.stretches]

    @property
    def n_sockets(self) -> int:
        """Number of sockets over all types."""
        return sum(s.count for s in self.sockets)

    def owed_on_arrival_kwh(self, place: int) -> Floats:
        """Return what charging on arrival has left to do at `place`, arrivals whole, [C]."""
        return self._left_kwh(self.sessions.energy_kwh, place)

    def told_on_arrival_kwh(self, place: int) -> Floats:
        """Return what it has left by what controllers are told; nothing of who is full, [C]."""
        left_kwh = self._left_kwh(self.sessions_told.energy_kwh, place)
        return np.where(self.owed_on_arrival_kwh(place) > 0.0, left_kwh, 0.0)

    def _left_kwh(self, energy_kwh: Floats, place: int) -> Floats:
        """Return what full power from arrival on has left of energies [N] that stand there, [C]."""
        sessions, own = self.sessions, self.sessions.standing(place)
        charged_kwh = sessions.max_kw[own] * self.step_h * (place - sessions.arrival[own])
        left_kwh = np.zeros(len(sessions.used_sockets))
        left_kwh[sessions.column[own]] = np.maximum(energy_kwh[own] - charged_kwh, 0.0)
        return left_kwh

    def when(self, place: int) -> datetime:
        """Return the local time at which the step at `place` begins."""
        second = self.begin_s + place * self.step_minutes * 60
        return datetime.fromtimestamp(second, ZoneInfo(self.timezone))
