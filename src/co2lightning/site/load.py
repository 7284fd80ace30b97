"""Find a site's folder and make a `Site` of it.

A folder holds `site.yaml`, `series.csv.gz`, where vehicles charge `sessions.csv.gz`, and perhaps
`forecasts.csv.gz` (or plain `.csv`); see docs/site-format.md. Folders come from
strangers: nothing in them is run, sizes are bounded, and whatever is wrong becomes one line that
names file, row, column or key and what would be right.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from co2lightning.errors import UserError, show
from co2lightning.places import local
from co2lightning.site.calendar import (
    days,
    quietest_hour,
    remark_on_tails,
    span_share,
    stretches,
)
from co2lightning.site.equipment import read_equipment, what_if
from co2lightning.site.forecasts import read_forecasts
from co2lightning.site.model import Objective, Provided, Site
from co2lightning.site.plain_yaml import parse_yaml
from co2lightning.site.series import clock, read_series
from co2lightning.site.sessions import admit, no_sessions, read_sessions, tell
from co2lightning.site.table import MAX_BYTES

_SHIPPED = Path(__file__).parents[1] / "sites"
_MAX_YAML_BYTES = 64 * 1024

_File = tuple[str, bytes]
"""A file's name, and its content as it lies there."""


def _shipped_sites() -> list[str]:
    """List the names of the sites that come with the package."""
    return sorted(p.parent.name for p in _SHIPPED.glob("*/site.yaml"))


@contextlib.contextmanager
def named_in(file: Path | None) -> Iterator[None]:
    """Say of a site that cannot be read which run's file names it, perhaps of another machine."""
    try:
        yield
    except UserError as error:
        if file is None:  # nothing but the user's own words
            raise
        raise UserError(f"{file}: {error}; --env.site gives its place here") from None


def load_site(
    site: str | Path,
    changes: Mapping[str, float] | None = None,
    objective: str | Mapping[str, float] = "co2",
    announced: bool = True,
) -> Site:
    """Read and check a site, once a process as long as its files stay as they are.

    Args:
        site: A site folder, or the name of a shipped site such as `iquitos`. A bare name that is
            both means the shipped site; write `./iquitos` for the folder.
        changes: What if: other figures for battery.capacity_kwh, battery.power_kw, pv_kwp (scales
            the series) or grid_kw. The folder stays as it is; the site says so in its notes.
        objective: What policies are settled by: co2, cost, or weights such as
            {"co2": 1, "cost": 0.2}, of a kg and of a unit of the site's currency.
        announced: Whether controllers know of vehicles what drivers announce, where the sessions
            tell it; False: the truth, as on sites whose sessions tell nothing.

    Returns:
        The site, with the sessions already admitted to sockets; its arrays cannot be written.

    Raises:
        UserError: The folder or a file is missing, or something in it is wrong; or the objective
            is none, or needs prices that the site has not.
    """
    wanted = _objective(objective)
    directory, remarks = _locate(site)
    site_yaml = _read_file(directory / "site.yaml", _MAX_YAML_BYTES)
    stems = "series", "sessions", "forecasts"
    series, sessions, forecasts = (_read_csv(directory, stem) for stem in stems)
    if series is None:
        raise _missing("series.csv.gz", directory)
    found = _read_site(
        directory,
        tuple(remarks),
        site_yaml,
        series,
        sessions,
        forecasts,
        tuple((changes or {}).items()),
    )
    if wanted.cost and found.price_per_kwh is None:
        raise UserError(
            f"--env.objective {show(objective)}: the series of site {found.name} has no column "
            "price_per_kwh, so nobody knows what it costs; add the column, or leave it at co2"
        )
    settled = _settled_by(found, wanted)
    return settled if announced else settled.truth


def _objective(given: str | Mapping[str, float]) -> Objective:
    """Return the weights that a text or a mapping gives."""
    named = {"co2": {"co2": 1.0}, "cost": {"cost": 1.0}}
    weights = named.get(given.strip()) if isinstance(given, str) else given
    if isinstance(given, str) and weights is None:
        weights = parse_yaml(
            given.encode(), f"--env.objective {show(given)}", "{co2: 1, cost: 0.2}"
        )
    if (
        not isinstance(weights, Mapping)
        or not set(weights) <= set(Objective._fields)
        or not all(type(weight) in (int, float) for weight in weights.values())
        or not all(0 <= weight <= 1e9 for weight in weights.values())
        or not any(weights.values())
    ):
        raise UserError(
            f"--env.objective {show(given)}: must be co2, cost, or weights of 0 or more, one of "
            "them above 0, such as {co2: 1, cost: 0.2}"
        )
    return Objective(*(float(weights.get(name, 0.0)) for name in Objective._fields))


@functools.lru_cache(maxsize=8)  # what is worked out of a site is kept by which site it is
def _settled_by(site: Site, objective: Objective) -> Site:
    return site if objective == site.objective else replace(site, objective=objective)


@functools.lru_cache(maxsize=4)
def _read_site(
    directory: Path,
    remarks: tuple[str, ...],
    site_yaml: _File,
    series: _File,
    sessions: _File | None,
    forecasts: _File | None,
    changes: tuple[tuple[str, float], ...],
) -> Site:
    """Make a site of the content of its files."""
    notes = list(remarks)
    equipment = read_equipment(site_yaml[1])
    equipped, whats = what_if(equipment, dict(changes))
    sockets = equipment["sockets"]
    _check_parts(equipped, sessions, directory)
    zone = ZoneInfo(equipment["timezone"])
    reads = clock(zone)
    line, columns, prices = read_series(*series, equipment, reads, notes)
    rows, row = None, np.zeros(0, dtype=np.int64)
    if sessions is None:
        admitted, share = no_sessions(line), np.zeros(24)
    else:
        rows = read_sessions(*sessions, sockets, reads, line, notes)
        share = span_share(rows.arrival_s, rows.departure_s, rows.energy_kwh, zone)
        admitted, row = admit(sessions[0], rows, sockets, line, share, notes)
    provided: dict[str, Provided] = {}
    if forecasts is not None:
        there = {name for name, values in columns.items() if values.any()} | set(prices)
        provided = read_forecasts(*forecasts, there | {"carbon_kg_per_kwh"}, reads, line, notes)
    day_start_h = equipped.pop("day_start")
    if day_start_h is None:
        day_start_h = quietest_hour(share)
    local, bounds, dates = days(series[0], line, zone, day_start_h, notes)
    held_out, found = stretches(equipped.pop("held_out"), dates, series[0])
    notes += remark_on_tails(series[0], found, bounds, dates, line)
    del equipped["charger_efficiency"]  # of version 0.1.0, whose physics did not use it either
    if equipment["pv_kwp"]:
        scale = equipped["pv_kwp"] / equipment["pv_kwp"]
        columns["pv_kw"] = columns["pv_kw"] * scale
        if scale != 1.0 and (sun := provided.get("pv_kw")):
            provided["pv_kw"] = Provided(sun.key, sun.value * np.float32(scale))
    columns["import_limit_kw"] = np.minimum(columns["import_limit_kw"], equipped["grid_kw"])
    digest = hashlib.sha256(site_yaml[1] + series[1] + (sessions[1] if sessions else b""))
    digest.update(forecasts[1] if forecasts else b"")
    digest.update("".join(whats).encode())
    site = Site(
        **equipped,
        **columns,
        **prices,
        **admitted._asdict(),
        directory=directory,
        sha256=digest.hexdigest(),
        step_minutes=line.step_s // 60,
        begin_s=line.begin_s,
        local=local,
        day_start_h=day_start_h,
        day_bounds=bounds,
        days=dates,
        held_out=held_out,
        stretches=found,
        notes=(*notes, *whats),
        provided=provided,
    )
    if rows is not None:
        hour = local.astype("datetime64[h]").astype(np.int64) % 24
        site = replace(site, told=tell(rows, row, line, hour, site.training_steps))
    arrays = [*vars(site).values(), *vars(site.sessions).values(), *(site.told or ()), share]
    arrays += [array for said in provided.values() for array in vars(said).values()]
    for part in arrays:
        if isinstance(part, np.ndarray):
            part.setflags(write=False)  # everybody who loads the site shares it
    return site


def _check_parts(equipment: Mapping[str, Any], sessions: _File | None, directory: Path) -> None:
    """Refuse sockets that nobody comes to, vehicles without sockets, and nothing to control."""
    sockets = equipment["sockets"]
    if sockets and sessions is None:
        raise _missing("sessions.csv.gz", directory)
    if sessions is not None and not sockets:
        raise UserError(
            f"{sessions[0]}: site.yaml has no sockets for these vehicles; add them, such as "
            "sockets: [{name: moto, count: 112, max_kw: 2.0}], or remove the file"
        )
    if not sockets and equipment["battery"] is None:
        raise UserError(
            "site.yaml: has neither battery nor sockets: nothing can be controlled; add what "
            "the site has of them"
        )


def _locate(site: str | Path) -> tuple[Path, list[str]]:
    """Return the folder, and a remark where the name could have meant another."""
    text, shipped = str(site), _shipped_sites()
    if isinstance(site, str) and site in shipped:
        other = f"site {site}: read the shipped site; write ./{site} for the folder here"
        return _SHIPPED / site, [other] if Path(site).is_dir() else []
    directory = Path(local("site", site))
    try:
        found = bool(text.strip()) and directory.is_dir()
    except (OSError, ValueError):  # too long, or a NUL byte
        found = False
    if not found:
        raise UserError(
            f"site {show(text)}: no such folder and no shipped site; give a folder with "
            f"site.yaml and series.csv.gz, or one of {', '.join(shipped)}"
        )
    directory = directory.resolve()
    other = f"site {show(text)}: read the folder, not the shipped site {directory.name}"
    taken = directory.name in shipped and directory.parent != _SHIPPED.resolve()
    return directory, [other] if taken else []


def _missing(name: str, directory: Path) -> UserError:
    return UserError(
        f"{name}: is missing in {show(str(directory))}; a site folder holds site.yaml, "
        "series.csv.gz and, where site.yaml has sockets, sessions.csv.gz"
    )


def _read_file(path: Path, limit: int) -> _File:
    """Read a regular file of at most `limit` bytes."""
    try:
        if not path.exists():
            raise _missing(path.name, path.parent)
        if not path.is_file():
            raise UserError(f"{path.name}: is not a regular file in {show(str(path.parent))}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise UserError(f"{path.name}: is larger than {limit // 1024} KiB, the most that is read")
    return path.name, data


def _read_csv(directory: Path, stem: str) -> _File | None:
    """Read `stem.csv.gz` or `stem.csv`, whichever is there; None if neither is."""
    packed, plain = directory / f"{stem}.csv.gz", directory / f"{stem}.csv"
    if packed.exists() and plain.exists():
        raise UserError(f"{packed.name}: {plain.name} is there too; keep only one of them")
    found = plain if plain.exists() else packed
    return _read_file(found, MAX_BYTES) if found.exists() else None
