"""Find a site's folder and make a `Site` of it.

A folder holds `site.yaml`, `series.csv.gz` and `sessions.csv.gz` (or plain `.csv`); see
docs/site-format.md. Folders come from strangers: nothing in them is run, sizes are bounded, and
whatever is wrong becomes one line that names file, row, column or key and what would be right.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np

from co2lightning.errors import UserError, show
from co2lightning.places import local
from co2lightning.site.equipment import held_out_days, read_equipment
from co2lightning.site.model import Site
from co2lightning.site.series import local_clock, read_series
from co2lightning.site.sessions import read_sessions
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


def load_site(site: str | Path) -> Site:
    """Read and check a site, once a process as long as its files stay as they are.

    Args:
        site: A site folder, or the name of a shipped site such as `iquitos`. A bare name that is
            both means the shipped site; write `./iquitos` for the folder.

    Returns:
        The site, with the sessions already admitted to sockets; its arrays cannot be written.

    Raises:
        UserError: The folder or a file is missing, or something in it is wrong.
    """
    directory, remarks = _locate(site)
    return _read_site(
        directory,
        tuple(remarks),
        _read_file(directory / "site.yaml", _MAX_YAML_BYTES),
        _read_csv(directory, "series"),
        _read_csv(directory, "sessions"),
    )


@functools.lru_cache(maxsize=4)
def _read_site(
    directory: Path, remarks: tuple[str, ...], site_yaml: _File, series: _File, sessions: _File
) -> Site:
    """Make a site of the content of its three files."""
    notes = list(remarks)
    equipment = read_equipment(site_yaml[1])
    held_out = equipment.pop("held_out")
    clock = local_clock(ZoneInfo(equipment["timezone"]))
    calendar, columns = read_series(*series, equipment, clock, notes)
    days = tuple(calendar.dates[i].isoformat() for i in calendar.complete)
    admitted, turned_away = read_sessions(*sessions, equipment["sockets"], clock, calendar, notes)
    site = Site(
        **equipment,
        directory=directory,
        sha256=hashlib.sha256(site_yaml[1] + series[1] + sessions[1]).hexdigest(),
        days=days,
        held_out=held_out_days(held_out, days, series[0]),
        pv_kw=columns["pv_kw"],
        load_kw=columns["load_kw"],
        carbon_kg_per_kwh=columns["carbon_kg_per_kwh"],
        sessions=admitted,
        turned_away=turned_away,
        notes=tuple(notes),
    )
    for part in (*vars(site).values(), *vars(admitted).values()):
        if isinstance(part, np.ndarray):
            part.setflags(write=False)  # everybody who loads the site shares it
    return site


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
            f"site.yaml, series.csv.gz and sessions.csv.gz, or one of {', '.join(shipped)}"
        )
    directory = directory.resolve()
    other = f"site {show(text)}: read the folder, not the shipped site {directory.name}"
    taken = directory.name in shipped and directory.parent != _SHIPPED.resolve()
    return directory, [other] if taken else []


def _read_file(path: Path, limit: int) -> _File:
    """Read a regular file of at most `limit` bytes."""
    try:
        if not path.is_file():
            what = "is not a regular file" if path.exists() else "is missing"
            raise UserError(
                f"{path.name}: {what} in {show(str(path.parent))}; a site folder holds "
                "site.yaml, series.csv.gz and sessions.csv.gz"
            )
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise UserError(f"{path.name}: is larger than {limit // 1024} KiB, the most that is read")
    return path.name, data


def _read_csv(directory: Path, stem: str) -> _File:
    """Read `stem.csv.gz` or `stem.csv`, whichever is there."""
    packed, plain = directory / f"{stem}.csv.gz", directory / f"{stem}.csv"
    if packed.exists() and plain.exists():
        raise UserError(f"{packed.name}: {plain.name} is there too; keep only one of them")
    return _read_file(plain if plain.exists() else packed, MAX_BYTES)
