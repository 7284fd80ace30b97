"""What every evaluation of a site needs and no policy changes: its optimum, kept for the next one.

The programs of a year's weeks take seconds to minutes, and `test`, `report` and `site check` ask
for the same ones. A file holds the digest of what they were computed from, the digest of its
numbers, and the numbers; what does not fit is computed anew.

Shapes: W stretches, n steps of one.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from co2lightning import __version__
from co2lightning.runs.files import make_directory, read_file, write_atomic
from co2lightning.sim.optimum import Best, optimum, tail_kg
from co2lightning.sim.schedule import Schedule
from co2lightning.site.model import Floats, Site

_DIGEST_BYTES = 32
_FIELDS = len(Schedule._fields)


class Bounds(NamedTuple):
    """What the stretches of a site are measured against."""

    best: list[Best]
    standard_kg: Floats  # [W] what the tail takes of whoever charges on arrival, battery idle


def bounds_of(site: Site, stored_kwh: float, keep: Path | None = None) -> Bounds:
    """Return the optimum of each held-out stretch and what its tail costs at the least.

    Args:
        site: The site.
        stored_kwh: What the battery holds where a stretch begins.
        keep: Directory where they are kept. One that cannot be read or written costs time alone.
    """
    key = _digest_of(site, stored_kwh)
    file = keep / f"{key.hex()}.bounds" if keep else None
    if file and (found := _read(file, key, site)):
        return found
    places = site.stretch_bounds.tolist()
    bounds = Bounds(
        [optimum(site, a, b, stored_kwh, site.owed_on_arrival_kwh(a)) for a, b in places],
        np.array([tail_kg(site, b, stored_kwh, site.owed_on_arrival_kwh(b)) for _, b in places]),
    )
    if file:
        _write(file, key, bounds)
    return bounds


def _digest_of(site: Site, stored_kwh: float) -> bytes:
    """Return the digest of all that the programs read: a changed battery is another site."""
    digest = hashlib.sha256(repr((__version__, site.battery, site.step_minutes)).encode())
    sessions = site.sessions
    for values in (
        np.array([stored_kwh]),
        site.stretch_bounds,
        *(site.pv_kw, site.load_kw, site.carbon_kg_per_kwh, site.import_limit_kw),
        *(sessions.socket, sessions.arrival, sessions.departure),
        *(sessions.energy_kwh, sessions.max_kw),
    ):
        digest.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.digest()


def _write(file: Path, key: bytes, bounds: Bounds) -> None:
    kg = np.array([best.kg for best in bounds.best])
    numbers = [kg, bounds.standard_kg, *(np.stack(best.schedule) for best in bounds.best)]
    content = np.concatenate([part.ravel() for part in numbers]).astype("<f8").tobytes()
    with contextlib.suppress(OSError):
        make_directory(file.parent)
        write_atomic(file, key + hashlib.sha256(content).digest() + content, durable=False)


def _read(file: Path, key: bytes, site: Site) -> Bounds | None:
    lengths = np.diff(site.stretch_bounds, axis=1)[:, 0]
    count = len(lengths)
    size = 2 * _DIGEST_BYTES + 8 * int(2 * count + _FIELDS * lengths.sum())
    try:
        content = read_file(file, limit=size)
    except (OSError, ValueError):
        return None
    head, content = content[: 2 * _DIGEST_BYTES], content[2 * _DIGEST_BYTES :]
    if len(content) != size - len(head) or head != key + hashlib.sha256(content).digest():
        return None
    numbers = np.frombuffer(content, "<f8").astype(np.float64)
    if not np.isfinite(numbers).all():
        return None
    kg, standard_kg, each = np.split(numbers, [count, 2 * count])
    parts = np.split(each, np.cumsum(_FIELDS * lengths)[:-1]) if count else []
    schedules = [Schedule(*part.reshape(_FIELDS, -1)) for part in parts]
    best = [Best(float(one), plan) for one, plan in zip(kg, schedules, strict=True)]
    return Bounds(best, standard_kg)
