"""Read the charging sessions: checked, cut at midnight, clipped, admitted to sockets.

Shapes: N rows of the file, then one each for the pieces of them that lie on days in use. Steps are
those of the day, 0 to 96; times are whole seconds since 1970 UTC.
"""

import heapq

import numpy as np

from co2lightning.errors import UserError, show
from co2lightning.site.model import STEP_H, Floats, Ints, Sessions, SocketType, T
from co2lightning.site.series import STEP_S, Calendar, Clock
from co2lightning.site.table import Table

_COLUMNS = ("session_id", "socket_type", "arrival", "departure", "energy_kwh", "max_kw")
_MAX_STAY_DAYS = 7
_MIN_WINDOW_STEPS = 2
_WINDOW_SHARE = 0.98  # the largest share of what its window allows that a session may ask for
_IMPLAUSIBLE_SHARE = 10.0  # beyond this the unit is wrong, not the stay short


def read_sessions(
    name: str,
    data: bytes,
    sockets: tuple[SocketType, ...],
    clock: Clock,
    calendar: Calendar,
    notes: list[str],
) -> tuple[Sessions, Ints]:
    """Read and check the sessions, cut them at midnight and admit them to sockets.

    Returns:
        The admitted sessions, and the number of vehicles turned away on each day in use.
    """
    table = Table(name, data, _COLUMNS)

    def note(rows: Ints, words: str) -> None:
        """Remark on what became of these rows, if there are any."""
        if len(rows := np.unique(rows)):
            notes.append(
                f"{name}: {len(rows)} of {table.n_rows} sessions {words} (the first: row "
                f"{rows[0] + 2})"
            )

    kind, arrival_s, departure_s, energy_kwh, max_kw = _read_columns(table, sockets, clock)
    row, day = _cut_at_midnight(arrival_s, departure_s, calendar)
    if crossing := int((np.bincount(row) > 1).sum()):
        notes.append(
            f"{name}: {crossing} of {table.n_rows} sessions cross midnight and were cut there, "
            "their energy split by time"
        )
    used = np.isin(day, calendar.complete)
    if not used.any():
        raise UserError(
            f"{name}: none of the {table.n_rows} sessions lies on a complete day of the series; "
            f"row 2 arrives {show(table.columns['arrival'][0])}"
        )
    note(
        row[~used],
        "lie wholly or partly outside the series or on a day left out; that part was dropped",
    )
    row, day = row[used], day[used]

    start_s = calendar.midnights_s[day]
    from_s = np.maximum(arrival_s[row], start_s)
    to_s = np.minimum(departure_s[row], calendar.midnights_s[day + 1])
    order = np.lexsort((row, from_s))
    row, start_s, from_s, to_s = row[order], start_s[order], from_s[order], to_s[order]
    day = np.searchsorted(calendar.complete, day[order])
    arrival_step = (from_s - start_s) // STEP_S
    departure_step = -(-(to_s - start_s) // STEP_S)
    departure_step = np.minimum(np.maximum(departure_step, arrival_step + _MIN_WINDOW_STEPS), T)
    piece_kwh = energy_kwh[row] * (to_s - from_s) / (departure_s - arrival_s)[row]
    most_kwh = _WINDOW_SHARE * max_kw[row] * STEP_H * (departure_step - arrival_step)
    note(
        row[piece_kwh > most_kwh],
        "ask for more than 98 % of what their stay allows and were clipped to that",
    )

    socket = _admit(kind[row], day * T + arrival_step, day * T + departure_step, sockets)
    admitted = socket >= 0
    note(row[~admitted], "found no free socket of their type and were turned away")
    sessions = Sessions(
        day=day[admitted],
        socket=socket[admitted],
        arrival_step=arrival_step[admitted],
        departure_step=departure_step[admitted],
        energy_kwh=np.minimum(piece_kwh, most_kwh)[admitted],
        max_kw=max_kw[row][admitted],
    )
    return sessions, np.bincount(day[~admitted], minlength=len(calendar.complete))


def _read_columns(
    table: Table, sockets: tuple[SocketType, ...], clock: Clock
) -> tuple[Ints, Ints, Ints, Floats, Floats]:
    """Return of each row socket type, arrival and departure in seconds, kWh and kW, [N]."""
    kind = _check_ids_and_types(table, sockets)
    arrives, departs = table.read("arrival", clock), table.read("departure", clock)
    stay_s = departs - arrives
    table.check(stay_s <= 0, "departure", "is not after the arrival; the vehicle must stay")
    table.check(
        stay_s > _MAX_STAY_DAYS * 86_400,
        "departure",
        f"is more than {_MAX_STAY_DAYS} days after the arrival; one row is one stay",
    )
    energy_kwh, own_kw = table.read("energy_kwh"), table.read("max_kw")
    table.check(energy_kwh <= 0, "energy_kwh", "is not above 0 kWh; leave out who needs nothing")
    max_kw = np.minimum(own_kw, np.array([s.max_kw for s in sockets])[kind])
    stay_steps = -(-departs // STEP_S) - arrives // STEP_S
    stay_kwh = max_kw * STEP_H * np.maximum(stay_steps, _MIN_WINDOW_STEPS)
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
    table.finish()
    return kind, arrives.astype(np.int64), departs.astype(np.int64), energy_kwh, max_kw


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


def _cut_at_midnight(arrival_s: Ints, departure_s: Ints, calendar: Calendar) -> tuple[Ints, Ints]:
    """Return row and day of every piece, one for each calendar day that a stay touches.

    Before the days of the calendar it is day -1, after them the day after the last.
    """
    first = np.searchsorted(calendar.midnights_s, arrival_s, "right") - 1
    last = np.searchsorted(calendar.midnights_s, departure_s, "left") - 1
    pieces = last - first + 1
    row = np.repeat(np.arange(len(pieces)), pieces)
    return row, first[row] + np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)


def _admit(kind: Ints, arrival: Ints, departure: Ints, sockets: tuple[SocketType, ...]) -> Ints:
    """Give each vehicle, in order of arrival, the lowest free socket of its type, or -1.

    Args:
        kind: Index of the socket type, [N].
        arrival: First step in which the vehicle holds a socket, [N]; steps go on over the days.
        departure: First step in which it is gone, [N].
        sockets: The socket types.
    """
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
