"""What every evaluation of a site needs and no policy changes, kept for the next one.

The programs of a year's weeks take seconds to minutes, the search for a rule some seconds, and
`test`, `report` and `site check` ask for the same ones. A file holds the digest of what they were
computed from, the digest of its numbers, and the numbers; what does not fit is computed anew.

Shapes: W stretches, n steps of one.
"""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from co2lightning import __version__
from co2lightning.runs.files import make_directory, read_file, write_atomic
from co2lightning.sim.optimum import Best, optimum, tail_objective
from co2lightning.sim.schedule import Schedule, start_kwh
from co2lightning.site.model import Floats, Site

_FIELDS = len(Schedule._fields)


def bounds_of(site: Site, keep: Path | None = None) -> tuple[list[Best], Floats]:
    """Return the optimum of each held-out stretch, and what the tail takes at least [W].

    At least: of whoever charges on arrival and leaves the battery idle.

    Args:
        site: The site.
        keep: Directory where they are kept. One that cannot be read or written costs time alone.
    """
    places, stored_kwh = site.stretch_bounds.tolist(), start_kwh(site)

    def compute() -> Floats:
        best = [optimum(site, a, b, stored_kwh, site.owed_on_arrival_kwh(a)) for a, b in places]
        tails = [
            tail_objective(site, b, stored_kwh, site.owed_on_arrival_kwh(b)) for _, b in places
        ]
        numbers = [np.array([one.settled for one in best]), np.array(tails)]
        numbers += [np.stack(one.schedule).ravel() for one in best]
        return np.concatenate(numbers)

    lengths, count = np.diff(site.stretch_bounds, axis=1)[:, 0], len(places)
    key = digest_of(site.truth, np.array([stored_kwh]), site.stretch_bounds)
    size = int(2 * count + _FIELDS * lengths.sum())
    numbers = recall(keep, "bounds", key, size, compute)
    settled, standard, each = np.split(numbers, [count, 2 * count])
    parts = np.split(each, np.cumsum(_FIELDS * lengths)[:-1]) if count else []
    schedules = [Schedule(*part.reshape(_FIELDS, -1)) for part in parts]
    best = [Best(float(one), plan) for one, plan in zip(settled, schedules, strict=True)]
    return best, standard


def digest_of(site: Site, *more: NDArray[Any]) -> bytes:
    """Return the digest of a site's equipment, series, sessions and forecasts, and of more arrays.

    Whatever is read of a site must be in it: a changed battery is another site.
    """
    digest = hashlib.sha256(repr((__version__, site.battery, site.step_minutes)).encode())
    if site.known_ahead or site.provided:
        digest.update(repr((sorted(site.known_ahead.items()), sorted(site.provided))).encode())
    sessions = site.sessions
    said = [array for _, one in sorted(site.provided.items()) for array in (one.key, one.value)]
    for values in (
        *(site.pv_kw, site.load_kw, site.carbon_kg_per_kwh, site.import_limit_kw),
        *(site.money_per_kwh, np.array(site.objective)),
        *(sessions.socket, sessions.arrival, sessions.departure),
        *(sessions.energy_kwh, sessions.max_kw, sessions.min_kw),
        *said,
        *(site.told or ()),
        *more,
    ):
        digest.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.digest()


def recall(
    keep: Path | None, kind: str, key: bytes, count: int, compute: Callable[[], Floats]
) -> Floats:
    """Return numbers [count] as they were computed before, or compute and keep them.

    Args:
        keep: Directory of the files, made where the one it lies in is there; None keeps nothing.
        kind: What their names end in.
        key: Digest of all that the numbers follow from.
        count: How many they are.
        compute: Computes them.
    """
    found = find(keep, kind, key, count)
    if found is None:
        store(keep, kind, key, found := compute())
    return found


def find(keep: Path | None, kind: str, key: bytes, count: int) -> Floats | None:
    """Return numbers [count] that were kept; None if they are not there, or not as they were."""
    if keep is None:
        return None
    head_bytes = 2 * len(key)
    size = head_bytes + 8 * count
    try:
        content = read_file(keep / f"{key.hex()}.{kind}", limit=size)
    except (OSError, ValueError):
        return None
    head, content = content[:head_bytes], content[head_bytes:]
    if len(content) != 8 * count or head != key + hashlib.sha256(content).digest():
        return None
    numbers = np.frombuffer(content, "<f8").astype(np.float64)
    return numbers if np.isfinite(numbers).all() else None


def store(keep: Path | None, kind: str, key: bytes, numbers: Floats) -> None:
    """Keep numbers for `find`, if the disk lets us."""
    if keep and keep.parent.is_dir():
        content = numbers.astype("<f8").tobytes()
        with contextlib.suppress(OSError):
            make_directory(keep)
            file = keep / f"{key.hex()}.{kind}"
            write_atomic(file, key + hashlib.sha256(content).digest() + content, durable=False)
