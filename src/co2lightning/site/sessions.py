"""Read the charging sessions: checked, clipped, admitted to sockets; they stay whole.

Shapes: N rows of the file, later those that are in the series. Steps are places on the line of the
series, 0 to P; times are whole seconds since 1970 UTC.
"""

import heapq
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from co2lightning.errors import UserError, show
from co2lightning.site.model import (
    Announcements,
    Floats,
    Ints,
    Sessions,
    SessionsRead,
    SocketType,
    Told,
)
from co2lightning.site.series import Clock, Line
from co2lightning.site.table import Table

_COLUMNS = ("session_id", "socket_type", "arrival", "departure", "energy_kwh", "max_kw")
_ANNOUNCED = ("announced_departure", "announced_energy_kwh")
_MAX_STAY_DAYS = 7
_MIN_WINDOW_S = 1800
_WINDOW_SHARE = 0.98  # the largest share of what its window allows that a session may ask for
_IMPLAUSIBLE_SHARE = 10.0  # beyond this the unit is wrong, not the stay short


class Rows(NamedTuple):
    """The rows of the file as they are, except for the power; every array is [N]."""

    kind: Ints  # index of the socket type
    arrival_s: Ints
    departure_s: Ints
    energy_kwh: Floats
    max_kw: Floats  # the lower of the vehicle's and the socket's
    announced: tuple[Floats, Floats] | None  # departure in s, kWh; NaN where not told


class Admitted(NamedTuple):
    """What became of the sessions, by the names of a `Site`'s attributes."""

    sessions: Sessions
    turned_away: Ints
    turned_away_kwh: Floats
    clipped_kwh: Floats
    sessions_read: SessionsRead | None


def no_sessions(line: Line) -> Admitted:
    """Return what a site without vehicles has of them."""
    steps, none = np.zeros(line.n_steps), np.zeros(0)
    number = np.zeros(0, dtype=np.int64)
    sessions = Sessions(number, number, number, none, none, none)
    return Admitted(sessions, steps.astype(np.int64), steps, steps.copy(), None)


def read_sessions(
    name: str,
    data: bytes,
    sockets: tuple[SocketType, ...],
    clock: Clock,
    line: Line,
    notes: list[str],
) -> Rows:
    """Read and check the rows of the file.

    Raises:
        UserError: Something in it is wrong.
    """
    table = Table(name, data, _COLUMNS, _ANNOUNCED)
    notes += table.remarks
    kind = _check_ids_and_types(table, sockets)
    arrives, departs = table.read("arrival", clock), table.read("departure", clock)
    stay_s = departs - arrives
    announced = _read_announced(table, clock, arrives)
    table.check(stay_s <= 0, "departure", "is not after the arrival; the vehicle must stay")
    table.check(
        stay_s > _MAX_STAY_DAYS * 86_400,
        "departure",
        f"is more than {_MAX_STAY_DAYS} days after the arrival; one row is one stay",
    )
    energy_kwh, own_kw = table.read("energy_kwh"), table.read("max_kw")
    table.check(energy_kwh <= 0, "energy_kwh", "is not above 0 kWh; leave out who needs nothing")
    max_kw = np.minimum(own_kw, np.array([s.max_kw for s in sockets])[kind])
    begin, end = _window(arrives, departs, line)
    stay_kwh = max_kw * (end - begin) * (line.step_s / 3600)
    table.check(
        (energy_kwh > _IMPLAUSIBLE_SHARE * stay_kwh) & (stay_s > 0) & (max_kw > 0) & (kind >= 0),
        "energy_kwh",
        lambda i: (
            f"cannot be charged in this stay, which allows {stay_kwh[i]:.1f} kWh at "
            f"{max_kw[i]:g} kW; energy is in kWh, not Wh"
        ),
    )
    table.check(own_kw <= 0, "max_kw", "is not above 0 kW")
    table.check(own_kw > 1000, "max_kw", "is more than 1000 kW; charging power is in kW, not W")
    table.check(
        (own_kw < np.array([s.min_kw for s in sockets])[kind]) & (own_kw > 0) & (kind >= 0),
        "max_kw",
        lambda i: (
            f"is below min_kw of {sockets[kind[i]].name} in site.yaml, "
            f"{sockets[kind[i]].min_kw:g} kW: this vehicle could not charge there"
        ),
    )
    table.finish()
    arrival_s, departure_s = arrives.astype(np.int64), departs.astype(np.int64)
    return Rows(kind, arrival_s, departure_s, energy_kwh, max_kw, announced)


def _read_announced(table: Table, clock: Clock, arrives: Floats) -> tuple[Floats, Floats] | None:
    """Read and check what drivers say; None where the file has no column for it."""
    if not set(_ANNOUNCED) & set(table.columns):
        return None
    departs, energy_kwh = np.full(len(arrives), np.nan), np.full(len(arrives), np.nan)
    departure, energy = _ANNOUNCED
    empty = "leave the cell empty where nothing was said"
    if departure in table.columns:
        departs = table.read(departure, clock, may_be_empty=True)
        table.check(departs <= arrives, departure, f"is not after the arrival; {empty}")
        table.check(
            departs - arrives > _MAX_STAY_DAYS * 86_400,
            departure,
            f"is more than {_MAX_STAY_DAYS} days after the arrival; {empty}",
        )
    if energy in table.columns:
        energy_kwh = table.read(energy, may_be_empty=True)
        table.check(energy_kwh <= 0, energy, f"is not above 0 kWh; {empty}")
    return departs, energy_kwh


def admit(
    name: str,
    rows: Rows,
    sockets: tuple[SocketType, ...],
    line: Line,
    span_share: Floats,
    notes: list[str],
) -> tuple[Admitted, Ints]:
    """Put the rows that lie in the series on the line of steps and give each a socket, or none.

    Returns:
        What became of them, and the row of each session that was admitted, [N].

    Args:
        name: Of the file, for remarks.
        rows: What it holds.
        sockets: The socket types.
        line: The line of steps.
        span_share: Share of the energy whose stay spans each full hour, [24]; passed on.
        notes: Remarks are added here.

    Raises:
        UserError: No row lies in the series.
    """
    count = len(rows.kind)

    def note(numbers: Ints, words: str) -> None:
        """Remark on what became of these rows, if there are any."""
        if len(numbers):
            notes.append(
                f"{name}: {len(numbers)} of {count} sessions {words} (the first: row "
                f"{numbers.min() + 2})"
            )

    inside = (rows.arrival_s >= line.begin_s) & (rows.departure_s <= line.end_s)
    if not inside.any():
        raise UserError(
            f"{name}: none of the {count} sessions lies in the series; row 2 arrives "
            f"{np.datetime64(int(rows.arrival_s[0]), 's')} UTC, the series goes from "
            f"{np.datetime64(line.begin_s, 's')} to {np.datetime64(line.end_s, 's')} UTC"
        )
    note(
        np.flatnonzero(~inside),
        "arrive before the series begins or depart after it ends and were dropped",
    )
    row = np.flatnonzero(inside)
    row = row[np.argsort(rows.arrival_s[row], kind="stable")]
    kind, asked_kwh, max_kw = rows.kind[row], rows.energy_kwh[row], rows.max_kw[row]
    begin, end = _window(rows.arrival_s[row], rows.departure_s[row], line)
    end = np.minimum(end, line.n_steps)
    most_kwh = _WINDOW_SHARE * max_kw * (end - begin) * (line.step_s / 3600)
    clipped = asked_kwh > most_kwh
    note(
        row[clipped],
        "ask for more than 98 % of what their stay allows and were clipped to that",
    )
    socket = _give_sockets(kind, begin, end, sockets)
    admitted = socket >= 0
    note(row[~admitted], "found no free socket of their type and were turned away")
    if (away := int((~admitted).sum())) * 2 > len(row):
        notes.append(
            f"site.yaml: sockets: most vehicles are turned away, {away} of {len(row)}: what is "
            "said of this site is said of the few that find a socket; count the sockets again"
        )

    def by_step(chosen: NDArray[np.bool_], kwh: Floats) -> Floats:
        kwh_in = np.zeros(line.n_steps)
        np.add.at(kwh_in, begin[chosen], kwh[chosen])
        return kwh_in

    found = Admitted(
        Sessions(
            socket=socket[admitted],
            arrival=begin[admitted],
            departure=end[admitted],
            energy_kwh=np.minimum(asked_kwh, most_kwh)[admitted],
            max_kw=max_kw[admitted],
            min_kw=np.array([s.min_kw for s in sockets])[kind][admitted],
        ),
        turned_away=np.bincount(begin[~admitted], minlength=line.n_steps),
        turned_away_kwh=by_step(~admitted, asked_kwh),
        clipped_kwh=by_step(admitted & clipped, asked_kwh - most_kwh),
        sessions_read=SessionsRead(
            rows=count,
            dropped=count - len(row),
            clipped=int(clipped.sum()),
            turned_away=away,
            energy_kwh=float(rows.energy_kwh.sum()),
            dropped_kwh=float(rows.energy_kwh[~inside].sum()),
            span_share=span_share,
            announcements=_how_good(rows),
        ),
    )
    return found, row[admitted]


def tell(
    rows: Rows,
    row: Ints,
    line: Line,
    hour: Ints,
    training: NDArray[np.bool_],
) -> Told | None:
    """Return what is said of the admitted sessions; None where the file has no column for it.

    Where nothing is said it is the median stay, the median energy of the sessions of that socket
    type that arrive in that hour of the day, by training days; where there are none, of the type;
    then of all. As true ones, a stay said is at least 30 minutes and ends with the series, and an
    energy said at most 98 % of what it allows.

    Args:
        rows: What the file holds.
        row: That of each admitted session, [N].
        line: The line of steps.
        hour: Of the day, at each step, [P].
        training: Whether a step is in no held-out day, [P].
    """
    if rows.announced is None:
        return None
    inside = (rows.arrival_s >= line.begin_s) & (rows.departure_s <= line.end_s)
    place = np.clip((rows.arrival_s - line.begin_s) // line.step_s, 0, line.n_steps - 1)
    of_training, at_hour = inside & training[place], hour[place]

    def filled(said: Floats, true: NDArray[Any]) -> Floats:
        """Return what is said of each row, what is usual where nothing is."""
        known = said.copy()
        missing = np.isnan(said) & inside
        pairs = np.unique(np.stack([rows.kind[missing], at_hour[missing]]), axis=1)
        for kind, at in pairs.T.tolist():
            of_kind = of_training & (rows.kind == kind)
            alike = next(
                some
                for some in (of_kind & (at_hour == at), of_kind, of_training, inside)
                if some.any()
            )
            own = missing & (rows.kind == kind) & (at_hour == at)
            known[own] = np.median(true[alike])
        return known

    departs_s, said_kwh = rows.announced
    stay_s = filled(departs_s - rows.arrival_s, rows.departure_s - rows.arrival_s)[row]
    begin, end = _window(rows.arrival_s[row], rows.arrival_s[row] + stay_s, line)
    end = np.minimum(end.astype(np.int64), line.n_steps)
    most_kwh = _WINDOW_SHARE * rows.max_kw[row] * (end - begin) * (line.step_s / 3600)
    return Told(end, np.minimum(filled(said_kwh, rows.energy_kwh)[row], most_kwh))


def _how_good(rows: Rows) -> Announcements | None:
    if rows.announced is None:
        return None
    departs_s, said_kwh = rows.announced
    off_s = (departs_s - rows.departure_s)[~np.isnan(departs_s)]
    ratio = (said_kwh / rows.energy_kwh)[~np.isnan(said_kwh)]
    return Announcements(
        departures=len(off_s),
        departure_off_h=float(np.median(np.abs(off_s))) / 3600 if len(off_s) else None,
        departure_late_share=float((off_s > 0).mean()) if len(off_s) else None,
        energies=len(ratio),
        energy_ratio=float(np.median(ratio)) if len(ratio) else None,
    )


def _window(arrival_s: NDArray[Any], departure_s: NDArray[Any], line: Line) -> Any:
    """Return the first step of each stay and the first after it, [N] each, as far as it may go."""
    begin = (arrival_s - line.begin_s) // line.step_s
    end = -(-(departure_s - line.begin_s) // line.step_s)
    return begin, np.maximum(end, begin - (-_MIN_WINDOW_S // line.step_s))


def _check_ids_and_types(table: Table, sockets: tuple[SocketType, ...]) -> Ints:
    """Check session ids and return the socket type index of each row, -1 if there is no such."""
    ids, types = table.columns["session_id"], table.columns["socket_type"]
    empty = [not session_id.strip() for session_id in ids]
    table.check(empty, "session_id", "is empty; every session has its own id")
    first: dict[str, int] = {}
    again = [first.setdefault(session_id, i) != i for i, session_id in enumerate(ids)]
    table.check(
        np.array(again) & ~np.array(empty),
        "session_id",
        lambda i: f"is already in row {first[ids[i]] + 2}; ids differ",
    )
    known = {s.name: k for k, s in enumerate(sockets)}
    kind = np.array([known.get(name, -1) for name in types], dtype=np.int64)
    right = show(", ".join(known))
    table.check(
        kind < 0, "socket_type", f"is not a socket type of site.yaml; right is one of {right}"
    )
    return kind


def _give_sockets(
    kind: Ints, arrival: Ints, departure: Ints, sockets: tuple[SocketType, ...]
) -> Ints:
    """Give each vehicle, in order of arrival, the lowest free socket of its type, or -1, [N]."""
    offsets = np.cumsum([0] + [s.count for s in sockets]).tolist()
    given = np.full(len(kind), -1, dtype=np.int64)
    free: list[list[int]] = [[] for _ in sockets]  # per type: returned sockets, a heap
    busy: list[list[tuple[int, int]]] = [[] for _ in sockets]  # (departure, socket), a heap
    fresh: list[int] = offsets[:-1]  # per type: the lowest socket not used yet
    columns = zip(kind.tolist(), arrival.tolist(), departure.tolist(), strict=True)
    for i, (k, begin, end) in enumerate(columns):
        while busy[k] and busy[k][0][0] <= begin:
            heapq.heappush(free[k], heapq.heappop(busy[k])[1])
        if free[k]:
            socket = heapq.heappop(free[k])
        elif fresh[k] < offsets[k + 1]:
            socket, fresh[k] = fresh[k], fresh[k] + 1
        else:
            continue
        given[i] = socket
        heapq.heappush(busy[k], (end, socket))
    return given
