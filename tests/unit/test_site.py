"""The site reader: what a good folder becomes, and the one line a bad one gives."""

from __future__ import annotations

import dataclasses
import gzip
import os
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from co2lightning.errors import UserError
from co2lightning.site.load import load_site
from co2lightning.site.model import Battery, Sessions, Site

REAL = Path(__file__).parents[1] / "sites"
CONFIG: dict[str, Any] = {
    "name": "mine",
    "latitude": -3.75,
    "longitude": -73.25,
    "altitude_m": 104,
    "timezone": "America/Lima",
    "pv_kwp": 100,
    "grid_kw": 50,
    "seed": 7,
    "battery": {
        "capacity_kwh": 100,
        "power_kw": 25,
        "charge_efficiency": 0.95,
        "discharge_efficiency": 0.95,
        "soc_min": 0.1,
        "soc_max": 0.95,
        "start_soc_min": 0.3,
        "start_soc_max": 0.7,
    },
    "sockets": [
        {"name": "moto", "count": 2, "max_kw": 2.0},
        {"name": "mototaxi", "count": 1, "max_kw": 3.0},
    ],
    "held_out": {"every": 3, "first": 3},
}
SERIES_HEADER = "time,pv_kw,load_kw,carbon_kg_per_kwh"
SESSIONS_HEADER = "session_id,socket_type,arrival,departure,energy_kwh,max_kw"


LIMA = ZoneInfo("America/Lima")


def clock_times(
    start: str, n: int, zone: str = "America/Lima", minutes: int = 15, shown: str = ""
) -> list[str]:
    """Write `n` times of elapsed time, from a local time without offset, in the zone `shown`."""
    first = datetime.fromisoformat(start).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
    steps = (first + timedelta(minutes=minutes * i) for i in range(n))
    return [t.astimezone(ZoneInfo(shown or zone)).isoformat(timespec="minutes") for t in steps]


class Folder:
    """A small valid site folder that a test spoils in one place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(CONFIG))
        self.set_times(clock_times("2025-03-01T00:00", 3 * 96))
        self.sessions: list[str] | None = [
            SESSIONS_HEADER,
            "a,moto,2025-03-01T08:05-05:00,2025-03-01T10:10-05:00,2.5,2",
            "b,mototaxi,2025-03-02T09:00-05:00,2025-03-02T12:00-05:00,6,2.5",
        ]

    def set_times(self, times: list[str]) -> None:
        self.series = [SERIES_HEADER] + [f"{t},1.5,30,0.45" for t in times]

    def add(self, *rows: str) -> None:
        assert self.sessions
        self.sessions += rows

    def set_column(self, column: str, values: Iterable[object]) -> None:
        """Add a column to the series, or replace one."""
        names = self.series[0].split(",")
        rows = [row.split(",") for row in self.series[1:]]
        if column not in names:
            names.append(column)
            rows = [[*row, ""] for row in rows]
        for row, value in zip(rows, values, strict=True):
            row[names.index(column)] = str(value)
        self.series = [",".join(row) for row in (names, *rows)]

    def drop(self, *columns: str) -> None:
        """Take columns out of the series."""
        rows = [row.split(",") for row in self.series]
        kept = [i for i, name in enumerate(rows[0]) if name not in columns]
        self.series = [",".join(row[i] for i in kept) for row in rows]

    def load(self, changes: Mapping[str, float] | None = None) -> Site:
        self.path.mkdir(exist_ok=True)
        text = yaml.safe_dump(self.config, sort_keys=False)
        (self.path / "site.yaml").write_text(text, encoding="utf-8")
        for name, lines in (("series", self.series), ("sessions", self.sessions)):
            file = self.path / f"{name}.csv.gz"
            if lines is None:
                file.unlink(missing_ok=True)
                continue
            data = "".join(f"{line}\n" for line in lines).encode()
            file.write_bytes(gzip.compress(data, 1))
        return load_site(self.path, changes)


def week_folder(path: Path, weeks: int, zone: str = "America/Lima") -> Folder:
    """A folder of whole weeks from Monday 2025-01-06, hour by hour, with one vehicle."""
    folder = Folder(path)
    folder.config["timezone"] = zone
    del folder.config["held_out"]
    folder.set_times(clock_times("2025-01-06T00:00", weeks * 168, zone, 60))
    first, last = clock_times("2025-01-06T09:00", 2, zone, 60)
    folder.sessions = [SESSIONS_HEADER, f"a,moto,{first},{last},1,2"]
    return folder


def dates(site: Site, stretches: bool = False) -> list[str]:
    """Return the held-out days, or the first of each stretch."""
    if stretches:
        return [site.days[first] for first, _ in site.stretches]
    return [day for day, held_out in zip(site.days, site.held_out, strict=True) if held_out]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "site")


def message(load: Callable[[], object]) -> str:
    """Return the error's text, which must be a single line of bearable length."""
    with pytest.raises(UserError) as caught:
        load()
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    assert len(text) < 400
    return text


# --- good folders --------------------------------------------------------------------------------


def test_folder_becomes_site(folder: Folder) -> None:
    folder.series[1 + 96 + 5] = folder.series[1 + 96 + 5].replace("1.5,30,0.45", "99,31,0.5")
    site = folder.load()
    assert (site.name, site.timezone, site.pv_kwp, site.seed) == ("mine", "America/Lima", 100.0, 7)
    assert site.directory == folder.path.resolve()
    assert (site.step_minutes, site.n_steps, site.day_start_h) == (15, 3 * 96, 0)
    assert site.days == ("2025-03-01", "2025-03-02", "2025-03-03")
    assert site.day_bounds.tolist() == [0, 96, 192, 288]
    assert site.when(97).isoformat() == "2025-03-02T00:15:00-05:00"
    assert str(site.local[97]) == "2025-03-02T00:15:00"
    assert site.battery
    assert (site.battery.soc_max, site.battery.reserve_soc) == (0.95, 0.1)
    assert site.battery.may_charge_from_grid
    assert [(s.name, s.min_kw) for s in site.sockets] == [("moto", 0.0), ("mototaxi", 0.0)]
    assert site.n_sockets == 3
    at = 96 + 5
    assert (site.pv_kw[at], site.load_kw[at], site.carbon_kg_per_kwh[at]) == (99, 31, 0.5)
    assert site.pv_kw.sum() == pytest.approx(99 + 1.5 * (3 * 96 - 1))
    assert set(site.import_limit_kw) == {50.0}
    assert site.training_days.tolist() == [0, 1]
    assert dates(site) == ["2025-03-03"]
    assert site.stretches.tolist() == [[2, 3]]
    assert site.notes == (
        "series.csv.gz: the held-out stretch from 2025-03-03 ends with the series: what its end "
        "state is worth is not counted",
    )
    s = site.sessions
    assert s.socket.tolist() == [0, 2]
    assert s.arrival.tolist() == [32, 96 + 36]  # 08:05 down to 08:00
    assert s.departure.tolist() == [41, 96 + 48]  # 10:10 up to 10:15
    assert s.energy_kwh.tolist() == [2.5, 6.0]
    assert s.max_kw.tolist() == [2.0, 2.5]  # the lower of vehicle and socket
    assert s.min_kw.tolist() == [0.0, 0.0]
    for array in (site.turned_away, site.turned_away_kwh, site.clipped_kwh):
        assert array.shape == (3 * 96,)
        assert not array.any()
    read = site.sessions_read
    assert read
    assert (read.rows, read.dropped, read.clipped, read.turned_away) == (2, 0, 0, 0)
    assert (read.energy_kwh, read.dropped_kwh) == (8.5, 0.0)
    kinds = {f.name: getattr(s, f.name).dtype for f in dataclasses.fields(Sessions)}
    assert {k for k, v in kinds.items() if v == np.int64} == {"socket", "arrival", "departure"}


def test_shipped_sites_are_found_by_name() -> None:
    merit, flat = (load_site(name) for name in ("iquitos", "iquitos-flat"))
    assert (merit.name, flat.name) == ("iquitos", "iquitos-flat")
    assert merit.battery
    assert flat.battery
    assert (merit.pv_kwp, merit.battery.capacity_kwh) == (660, 580)
    assert (flat.pv_kwp, flat.battery.capacity_kwh) == (700, 700)
    assert merit.sha256 != flat.sha256
    for site in (merit, flat):
        assert (len(site.days), site.day_start_h, site.step_minutes) == (365, 0, 15)
        turned_away = int(site.turned_away.sum())
        assert site.notes == (
            f"sessions.csv.gz: {turned_away} of {turned_away + len(site.sessions.socket)} sessions "
            "found no free socket of their type and were turned away (the first: row 418)",
        )
        assert site.n_sockets == 128
        assert site.stretches.tolist() == [[7 * week, 7 * week + 7] for week in range(5, 52, 6)]
        assert site.held_out.sum() == 8 * 7
        assert site.carbon_kg_per_kwh.mean() == pytest.approx(0.4521, abs=1e-6)
        assert len(site.sessions.socket) / 365 == pytest.approx(314, abs=2)
        assert turned_away / 365 == pytest.approx(13, abs=1.5)
        assert site.sessions.energy_kwh.sum() / 365 == pytest.approx(970, rel=0.01)
        assert site.sessions_read
        assert site.sessions_read.span_share[0] < 1e-9  # all are drawn within their day
    assert np.ptp(flat.carbon_kg_per_kwh) == 0
    assert merit.carbon_kg_per_kwh[:96].argmax() in range(73, 89)  # the evening peak


@pytest.mark.parametrize(
    ("name", "start", "days", "first", "weeks", "kwh", "dropped"),
    [
        ("caltech-2019", 5, 244, "2019-05-01", 11, 57_507, 1),
        ("citylearn-5", 0, 364, "2016-08-01", 8, None, None),
    ],
)
def test_real_sites(
    name: str,
    start: int,
    days: int,
    first: str,
    weeks: int,
    kwh: float | None,
    dropped: int | None,
) -> None:
    site = load_site(REAL / name)
    assert (site.day_start_h, len(site.days), site.days[0]) == (start, days, first)
    assert str(site.local[site.day_bounds[0]]) == f"{first}T{start:02d}:00:00"
    assert len(site.stretches) == weeks
    if kwh is None:
        assert site.sessions_read is None
        assert (len(site.sessions.socket), site.n_sockets) == (0, 0)
    else:
        assert site.sessions_read
        assert site.sessions_read.energy_kwh == pytest.approx(kwh, abs=1)
        assert site.sessions_read.dropped == dropped
        assert site.battery is None
        assert not site.load_kw.any()
        assert not site.pv_kw.any()
        assert site.told is not None


def test_a_site_is_read_once_until_a_file_changes(folder: Folder) -> None:
    first = folder.load()
    assert load_site(folder.path) is first
    stat = (folder.path / "series.csv.gz").stat()
    folder.series[7] = folder.series[7].replace("30,0.45", "31,0.45")
    second = folder.load()
    os.utime(folder.path / "series.csv.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_site(folder.path) is second
    assert (first.load_kw[6], second.load_kw[6]) == (30, 31)
    arrays = [*vars(first).values(), *vars(first.sessions).values()]
    for array in (array for array in arrays if isinstance(array, np.ndarray)):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_sha256_follows_every_file(folder: Folder) -> None:
    first = folder.load().sha256
    assert folder.load().sha256 == first
    assert folder.sessions
    folder.sessions[1] = folder.sessions[1].replace("2.5,2", "2.4,2")
    second = folder.load().sha256
    folder.config["seed"] = 8
    assert len({first, second, folder.load().sha256}) == 3


def test_plain_csv_bom_crlf_and_column_order(folder: Folder) -> None:
    expected = folder.load()
    for name, lines in (("series", folder.series), ("sessions", folder.sessions)):
        assert lines
        (folder.path / f"{name}.csv.gz").unlink()
        cells = [line.split(",")[::-1] for line in lines]
        text = "\ufeff" + "\r\n".join(",".join(row) for row in cells) + "\r\n\r\n"
        (folder.path / f"{name}.csv").write_text(text, encoding="utf-8", newline="")
    site = load_site(str(folder.path))
    assert np.array_equal(site.pv_kw, expected.pv_kw)
    assert site.sessions.energy_kwh.tolist() == [2.5, 6.0]


@pytest.mark.parametrize("example", [0, 1, 2])
def test_examples_in_the_documentation_are_accepted(tmp_path: Path, example: int) -> None:
    page = Path(__file__).parents[2] / "docs" / "site-format.md"
    blocks = re.findall(r"```(?:yaml|csv)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    begins = [i for i, block in enumerate(blocks) if block.startswith("name:")]
    assert len(begins) == 3
    config, series, *sessions = blocks[begins[example] : [*begins, len(blocks)][example + 1]]
    header, first, second = (line.split(",") for line in series.splitlines())
    begin, then = (datetime.fromisoformat(row[0]) for row in (first, second))
    folder = Folder(tmp_path / "site")
    folder.config = yaml.safe_load(config)
    times = [begin + i * (then - begin) for i in range(46 * 96)]
    rows = [first, second, *([time.isoformat(), *second[1:]] for time in times[2:])]
    folder.series = [",".join(row) for row in (header, *rows)]
    folder.sessions = sessions[0].splitlines() if sessions else None
    site = folder.load()
    assert site.step_minutes == (then - begin) // timedelta(minutes=1)
    assert site.carbon_kg_per_kwh[1] == float(second[header.index("carbon_kg_per_kwh")])
    assert len(site.sessions.socket) == (len(folder.sessions) - 1 if folder.sessions else 0)
    assert len(site.stretches) >= 1
    assert all(note.endswith("belong to none") for note in site.notes)


# --- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [5, 10, 15, 20, 30, 60])
def test_the_step_is_the_series_own(folder: Folder, minutes: int) -> None:
    per_day = 1440 // minutes
    folder.set_times(clock_times("2025-03-01T00:00", 3 * per_day, minutes=minutes))
    site = folder.load()
    assert (site.step_minutes, site.step_h, site.n_steps) == (minutes, minutes / 60, 3 * per_day)
    assert site.day_bounds.tolist() == [0, per_day, 2 * per_day, 3 * per_day]
    s = site.sessions
    for minute, places in ((8 * 60 + 5, s.arrival), (10 * 60 + 10, s.departure)):
        place = minute // minutes if places is s.arrival else -(-minute // minutes)
        assert places[0] == place
    assert s.energy_kwh.tolist() == [2.5, 6.0]


@pytest.mark.parametrize("minutes", [5, 20, 60])
def test_a_window_of_half_an_hour_is_rounded_up_to_steps(folder: Folder, minutes: int) -> None:
    folder.set_times(clock_times("2025-03-01T00:00", 3 * 1440 // minutes, minutes=minutes))
    folder.add(
        "c,moto,2025-03-02T20:00-05:00,2025-03-02T20:01-05:00,0.3,2",
        "d,moto,2025-03-03T23:58-05:00,2025-03-03T23:59-05:00,0.1,2",
    )
    s = folder.load().sessions
    steps = {5: 6, 20: 2, 60: 1}[minutes]
    assert (s.departure - s.arrival).tolist()[2:] == [steps, 1]  # the series ends
    assert s.departure[-1] == 3 * 1440 // minutes
    # 98 % of what two minutes before the end allow.
    assert s.energy_kwh[-1] == pytest.approx(min(0.1, 0.98 * 2 * minutes / 60))


def test_a_day_has_the_same_energies_in_steps_of_any_length(tmp_path: Path) -> None:
    zone, rng = "Europe/Oslo", np.random.default_rng(3)
    n = 4 * (23 + 24 + 24)
    fine = {name: rng.integers(0, 1000, n) / 8 for name in ("pv_kw", "load_kw")}
    energies = {}
    for minutes in (15, 30, 60):
        folder = Folder(tmp_path / str(minutes))
        folder.config |= {"timezone": zone, "held_out": ["2025-03-31"]}
        folder.set_times(clock_times("2025-03-30T00:00", n * 15 // minutes, zone, minutes))
        for name, values in fine.items():
            folder.set_column(name, values.reshape(-1, minutes // 15).mean(1))
        folder.sessions = [
            SESSIONS_HEADER,
            "a,moto,2025-03-30T08:00+02:00,2025-03-30T10:00+02:00,1,2",
        ]
        site = folder.load()
        energies[minutes] = [
            np.add.reduceat(kw, site.day_bounds[:-1]) * site.step_h
            for kw in (site.pv_kw, site.load_kw)
        ]
    assert np.shape(energies[15]) == (2, 3)
    for minutes in (30, 60):
        np.testing.assert_allclose(energies[minutes], energies[15], rtol=1e-12)


@pytest.mark.parametrize("shown", ["UTC", "Etc/GMT+3", "Asia/Kathmandu"])
def test_stamps_of_any_offset_are_the_same_instants(
    folder: Folder, tmp_path: Path, shown: str
) -> None:
    local = folder.load()
    other = Folder(tmp_path / "other")
    other.set_times(clock_times("2025-03-01T00:00", 3 * 96, shown=shown))
    assert other.sessions
    other.sessions = [
        re.sub(
            r"2025[^,]*",
            lambda stamp: datetime.fromisoformat(stamp[0]).astimezone(ZoneInfo(shown)).isoformat(),
            row,
        )
        for row in other.sessions
    ]
    other.series = [row.replace("+00:00", "Z") for row in other.series]
    site = other.load()
    assert (site.begin_s, site.days, site.notes) == (local.begin_s, local.days, local.notes)
    assert np.array_equal(site.local, local.local)
    assert np.array_equal(site.sessions.arrival, local.sessions.arrival)
    assert np.array_equal(site.sessions.departure, local.sessions.departure)
    assert site.when(0).isoformat() == "2025-03-01T00:00:00-05:00"


@pytest.mark.parametrize(
    ("begin", "day_start", "first", "at"),
    [
        ("2025-03-01T05:30", 0, "2025-03-02", "2025-03-02T00:30:00"),  # 00:00 UTC
        ("2025-03-01T05:30", 5, "2025-03-01", "2025-03-01T05:30:00"),
        ("2025-03-01T00:00", 0, "2025-03-01", "2025-03-01T00:00:00"),  # 18:30 UTC
    ],
)
def test_hours_of_india_in_utc_or_local_time(
    folder: Folder, begin: str, day_start: int, first: str, at: str
) -> None:
    """Full hours of UTC are half past there: a day begins with the first step after its hour."""
    zone = "Asia/Kolkata"
    folder.config |= {
        "timezone": zone,
        "day_start": day_start,
        "held_out": {"every": 2, "first": 2},
    }
    folder.set_times(clock_times(begin, 4 * 24, zone, 60, shown="UTC"))
    folder.sessions = [SESSIONS_HEADER, "a,moto,2025-03-03T08:00+05:30,2025-03-03T10:00+05:30,1,2"]
    site = folder.load()
    assert site.days[0] == first
    assert str(site.local[site.day_bounds[0]]) == at
    assert set(np.diff(site.day_bounds)) == {24}


@pytest.mark.parametrize("minutes", [5, 20, 60])
@pytest.mark.parametrize(
    ("zone", "first", "day_start", "hours"),
    [
        ("Europe/Oslo", "2025-03-29", 0, [24, 23, 24]),
        ("Europe/Oslo", "2025-03-29", 2, [24, 23, 24]),  # no 02:00: the first step after it
        ("Europe/Oslo", "2025-03-29", 5, [23, 24, 24]),
        ("Europe/Oslo", "2025-10-25", 0, [24, 25, 24]),
        ("Europe/Oslo", "2025-10-25", 2, [24, 25, 24]),  # 02:00 twice: the first counts
        ("Europe/Oslo", "2025-10-25", 3, [25, 24, 24]),
        ("America/Los_Angeles", "2025-03-08", 5, [23, 24, 24]),
        ("America/Los_Angeles", "2025-11-01", 1, [24, 25, 24]),
        ("America/Los_Angeles", "2025-11-01", 2, [25, 24, 24]),
        ("America/Havana", "2025-03-08", 0, [24, 23, 24]),  # no 00:00 on 9 March
        ("Pacific/Apia", "2011-12-28", 0, [24, 24, 24]),  # no 30 December
    ],
)
def test_days_of_23_and_25_hours_are_days(
    folder: Folder, zone: str, first: str, day_start: int, hours: list[int], minutes: int
) -> None:
    folder.config |= {
        "timezone": zone,
        "day_start": day_start,
        "held_out": {"every": 2, "first": 2},
    }
    folder.set_times(clock_times(f"{first}T00:00", 5 * 1440 // minutes, zone, minutes))
    begin, end = clock_times(f"{first}T08:00", 2, zone, 60)
    folder.sessions = [SESSIONS_HEADER, f"a,moto,{begin},{end},1,2"]
    site = folder.load()
    assert (np.diff(site.day_bounds) * site.step_h).tolist()[:3] == hours
    assert site.days[0] == first
    assert (site.days[2] == "2011-12-31") == (zone == "Pacific/Apia")
    for day, place in zip(site.days, site.day_bounds[:-1], strict=True):
        hour = day_start + (
            day in ("2025-03-30", "2025-03-09")
            and day_start in (0, 2)
            and {"Europe/Oslo": 2, "America/Havana": 0}.get(zone) == day_start
        )
        assert str(site.local[place]) == f"{day}T{hour:02d}:00:00"


def test_the_hour_that_comes_twice_is_told_by_its_offset(folder: Folder) -> None:
    zone = "Europe/Oslo"
    folder.config |= {"timezone": zone, "held_out": ["2025-10-25"]}
    folder.set_times(clock_times("2025-10-25T00:00", 96 + 100 + 96, zone))
    shown = [row.split(",")[0] for row in folder.series]
    assert {"2025-10-26T02:15+02:00", "2025-10-26T02:15+01:00"} <= set(shown)
    folder.sessions = [
        SESSIONS_HEADER,
        "a,moto,2025-10-26T02:15+02:00,2025-10-26T02:15+01:00,1,2",
        "b,mototaxi,2025-10-26T02:15+01:00,2025-10-26T03:15+01:00,1,2",
    ]
    s = folder.load().sessions
    assert s.arrival.tolist() == [96 + 9, 96 + 13]
    assert s.departure.tolist() == [96 + 13, 96 + 17]


@settings(max_examples=40, deadline=None)
@given(
    zone=st.sampled_from(
        ["Europe/Oslo", "America/Los_Angeles", "America/Santiago", "Asia/Kolkata", "UTC",
         "Australia/Lord_Howe", "Africa/Casablanca", "Asia/Kathmandu"]
    ),
    minutes=st.sampled_from([5, 15, 20, 60]),
    day_start=st.integers(0, 23),
    begin_h=st.integers(0, 365 * 24),
    steps=st.integers(200, 600),
)  # fmt: skip
def test_days_follow_each_other_and_begin_at_their_hour(
    tmp_path_factory: pytest.TempPathFactory,
    zone: str,
    minutes: int,
    day_start: int,
    begin_h: int,
    steps: int,
) -> None:
    folder = Folder(tmp_path_factory.mktemp("site") / "s")
    folder.config |= {
        "timezone": zone,
        "day_start": day_start,
        "held_out": {"every": 2, "first": 1},
    }
    del folder.config["sockets"]
    folder.sessions = None
    begin = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(hours=begin_h)
    steps = max(steps, 4 * 1440 // minutes)
    times = (begin + timedelta(minutes=minutes * i) for i in range(steps))
    folder.set_times([time.isoformat() for time in times])
    site = folder.load()
    shown = [site.when(place).replace(tzinfo=None) for place in range(steps)]
    assert shown == site.local.tolist()
    bounds = site.day_bounds
    assert ((np.diff(bounds) * site.step_h >= 22.5) & (np.diff(bounds) * site.step_h <= 25.5)).all()
    assert bounds[0] * site.step_h < 26
    assert (steps - bounds[-1]) * site.step_h < 26
    for day, place in zip(site.days, bounds[:-1], strict=True):
        hour = datetime.fromisoformat(day) + timedelta(hours=day_start)
        assert shown[place] >= hour
        assert place == 0 or shown[place - 1] < hour


def test_what_the_series_cuts_is_no_day(folder: Folder) -> None:
    folder.set_times(clock_times("2025-02-28T12:00", 3 * 96 + 61))
    site = folder.load()
    assert site.days == ("2025-03-01", "2025-03-02", "2025-03-03")
    assert site.day_bounds.tolist() == [48, 144, 240, 336]
    assert site.notes[0] == (
        "series.csv.gz: 12 h before 2025-03-01 00:00 and 3.25 h after 2025-03-04 00:00 are no "
        "whole day and belong to none"
    )


# --- day boundary --------------------------------------------------------------------------------


def test_days_begin_at_the_hour_that_the_least_energy_spans(folder: Folder) -> None:
    """By hand: 8 kWh from 15 to 4 h, 2 from 5 to 14 h, one more at 6 h; 12 kWh in all."""
    folder.sessions = [
        SESSIONS_HEADER,
        "a,moto,2025-03-01T14:30-05:00,2025-03-02T05:00-05:00,8,2",  # ends at 5:00
        "b,moto,2025-03-02T04:30-05:00,2025-03-02T14:30-05:00,2,2",
        "c,mototaxi,2025-03-02T05:00-05:00,2025-03-02T05:59-05:00,1,2",  # begins at 5:00
        "d,mototaxi,2025-03-02T06:00-05:00,2025-03-02T07:00-05:00,0.5,2",  # spans nothing
        "e,mototaxi,2025-03-03T05:30-05:00,2025-03-03T07:00-05:00,0.5,2",
    ]
    folder.config["held_out"] = ["2025-03-02"]
    site = folder.load()
    assert site.sessions_read
    expected = np.where((np.arange(24) >= 5) & (np.arange(24) < 15), 2.0, 8.0)
    expected[6] += 0.5
    np.testing.assert_allclose(site.sessions_read.span_share, expected / 12)
    assert site.day_start_h == 5
    assert site.days == ("2025-03-01", "2025-03-02")
    assert site.day_bounds.tolist() == [20, 116, 212]
    folder.config["day_start"] = 0
    assert folder.load().day_bounds.tolist() == [0, 96, 192, 288]


def test_no_share_is_below_nothing(folder: Folder) -> None:
    """Though 0.7 + 0.1 - 0.7 - 0.1 is."""
    folder.config["held_out"] = ["2025-03-02"]
    folder.sessions = [
        SESSIONS_HEADER,
        "a,moto,2025-03-02T10:30-05:00,2025-03-02T15:00-05:00,0.7,2",
        "b,moto,2025-03-02T11:30-05:00,2025-03-02T17:00-05:00,0.1,2",
    ]
    site = folder.load()
    assert site.sessions_read
    assert not np.signbit(site.sessions_read.span_share).any()
    assert site.sessions_read.span_share[20] == 0


def test_all_rows_count_for_the_boundary_as_they_are(folder: Folder) -> None:
    """Also those outside the series and turned away, with all they ask for; long ones once."""
    folder.config["held_out"] = ["2025-03-02"]
    folder.sessions = [
        SESSIONS_HEADER,
        "a,mototaxi,2025-03-01T10:30-05:00,2025-03-02T20:30-05:00,1,2",  # all hours, some twice
        "b,mototaxi,2025-03-01T11:00-05:00,2025-03-01T13:00-05:00,2,2",  # no socket left: 12
        "c,moto,2024-03-01T23:30-05:00,2024-03-02T02:30-05:00,4,2",  # long before: 0, 1, 2
        "d,moto,2025-03-01T03:55-05:00,2025-03-01T04:05-05:00,5,2",  # clipped: 4
    ]
    site = folder.load()
    assert site.sessions_read
    expected = np.ones(24)
    expected[[0, 1, 2]] += 4
    expected[4] += 5
    expected[12] += 2
    np.testing.assert_allclose(site.sessions_read.span_share, expected / 12)
    assert site.day_start_h == 3


@pytest.mark.parametrize(("kwh", "hour"), [(1.0000001, 0), (1.1, 12)])
def test_of_equal_hours_the_lowest_is_taken(folder: Folder, kwh: float, hour: int) -> None:
    folder.config["held_out"] = ["2025-03-02"]
    folder.sessions = [
        SESSIONS_HEADER,
        f"a,moto,2025-03-01T23:30-05:00,2025-03-02T11:30-05:00,{kwh},2",
        "b,moto,2025-03-02T11:30-05:00,2025-03-02T23:30-05:00,1,2",
    ]
    assert folder.load().day_start_h == hour


# --- weeks and stretches -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weeks", "rule", "held"),
    [
        (3, None, [3]),
        (35, None, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33]),
        (36, None, [6, 12, 18, 24, 30, 36]),
        (8, {"every_weeks": 2, "first": 1}, [1, 3, 5, 7]),
        (8, {"every_weeks": 6, "first": 6}, [6]),
    ],
)
def test_whole_weeks_are_held_out(
    tmp_path: Path, weeks: int, rule: dict[str, int] | None, held: list[int]
) -> None:
    folder = week_folder(tmp_path / "site", weeks)
    if rule:
        folder.config["held_out"] = rule
    site = folder.load()
    assert site.stretches.tolist() == [[7 * week - 7, 7 * week] for week in held]
    assert site.stretch_bounds.tolist() == [[168 * week - 168, 168 * week] for week in held]
    assert site.held_out.sum() == 7 * len(held)
    assert not site.training_steps[site.stretch_bounds[0, 0]]
    assert site.training_steps.sum() == site.n_steps - 168 * len(held)


def test_weeks_count_from_the_first_complete_day_and_the_rest_trains(tmp_path: Path) -> None:
    folder = week_folder(tmp_path / "site", 4)
    folder.config |= {"day_start": 5, "held_out": {"every_weeks": 2, "first": 2}}
    site = folder.load()
    assert len(site.days) == 27  # the last one is cut
    assert dates(site, stretches=True) == ["2025-01-13"]
    assert str(site.local[site.stretch_bounds[0, 0]]) == "2025-01-13T05:00:00"
    assert site.training_days.tolist() == [*range(7), *range(14, 27)]


def test_a_week_in_which_clocks_change_is_an_hour_shorter(tmp_path: Path) -> None:
    site = week_folder(tmp_path / "site", 13, "Europe/Oslo").load()
    assert dates(site, stretches=True)[-1] == "2025-03-24"
    assert np.diff(site.stretch_bounds).ravel().tolist() == [168, 168, 168, 167]


def test_days_that_are_held_out_are_stretches_each(tmp_path: Path) -> None:
    folder = week_folder(tmp_path / "site", 1)
    folder.config["held_out"] = {"every": 3, "first": 2}
    assert folder.load().stretches.tolist() == [[1, 2], [4, 5]]
    folder.config["held_out"] = ["2025-01-08", "2025-01-06", "2025-01-07", "2025-01-06"]
    site = folder.load()
    assert site.stretches.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert dates(site) == ["2025-01-06", "2025-01-07", "2025-01-08"]


@pytest.mark.parametrize("weeks", [1, 2])
def test_too_short_for_weeks(tmp_path: Path, weeks: int) -> None:
    days = 7 * weeks
    assert message(week_folder(tmp_path / "site", weeks).load) == (
        f"site.yaml: held_out: is not there, and every third week selects 0 of the {days} days; at "
        "least one day to test on and one to train on are needed. The series has "
        f"{days} days in {weeks} whole week{'s' * (weeks > 1)}; name days, such as "
        f"held_out: [2025-01-{days + 5:02d}] or {{every: 3, first: 3}}"
    )


def test_a_single_day_is_too_few(folder: Folder) -> None:
    folder.series = folder.series[:97]
    folder.sessions = folder.sessions and folder.sessions[:2]
    folder.config["held_out"] = ["2025-03-01"]
    assert message(folder.load).endswith("has 1 day in 0 whole weeks; give a longer one")


@pytest.mark.parametrize(
    ("rule", "remark"),
    [
        ({"every": 7, "first": 5}, None),  # two days follow
        (
            {"every": 7, "first": 6},
            "the held-out stretch from 2025-01-11 ends less than two days before the series: its "
            "end state is settled over what is left",
        ),
        (
            {"every": 7, "first": 7},
            "the held-out stretch from 2025-01-12 ends with the series: what its end state is "
            "worth is not counted",
        ),
    ],
)
def test_a_stretch_without_two_days_after_it_is_remarked_on(
    tmp_path: Path, rule: dict[str, int], remark: str | None
) -> None:
    folder = week_folder(tmp_path / "site", 1)
    folder.config["held_out"] = rule
    assert folder.load().notes == ((f"series.csv.gz: {remark}",) if remark else ())


# --- parts that may be absent --------------------------------------------------------------------


def test_vehicles_alone(folder: Folder) -> None:
    for key in ("battery", "pv_kwp"):
        del folder.config[key]
    folder.drop("pv_kw", "load_kw")
    site = folder.load()
    assert (site.battery, site.pv_kwp) == (None, 0.0)
    assert site.pv_kw.tolist() == site.load_kw.tolist() == [0.0] * 3 * 96
    assert len(site.sessions.socket) == 2


def test_a_battery_alone(folder: Folder) -> None:
    for key in ("sockets", "pv_kwp"):
        del folder.config[key]
    folder.drop("pv_kw", "load_kw")
    folder.sessions = None
    site = folder.load()
    assert (site.sockets, site.n_sockets, site.sessions_read) == ((), 0, None)
    assert site.day_start_h == 0
    assert len(site.sessions.energy_kwh) == len(site.sessions.used_sockets) == 0
    assert site.owed_on_arrival_kwh(5).tolist() == []
    for array in (site.turned_away, site.turned_away_kwh, site.clipped_kwh):
        assert array.tolist() == [0] * 3 * 96


def test_a_site_without_pv_as_the_first_version_wrote_it(folder: Folder) -> None:
    folder.config |= {"pv_kwp": 0, "charger_efficiency": 0.92}
    folder.set_column("pv_kw", [0.0] * 3 * 96)
    assert folder.load().pv_kwp == 0.0


def test_a_net_meter(folder: Folder) -> None:
    folder.set_column("load_kw", [-40.0, *[30.0] * (3 * 96 - 1)])
    assert "row 2, column load_kw: -40.0 is negative; the building" in message(folder.load)
    del folder.config["pv_kwp"]
    folder.drop("pv_kw")
    assert folder.load().load_kw[0] == -40.0
    folder.set_column("load_kw", [-40_000.0, *[30.0] * (3 * 96 - 1)])
    assert message(folder.load) == (
        "series.csv.gz: row 2, column load_kw: -40000.0 exports more than ten times what grid_kw "
        "and the battery give together, 75 kW; the load is in kW, not W"
    )


def test_an_import_limit(folder: Folder) -> None:
    folder.set_column("import_limit_kw", [10, 50, 70.5] * 96)
    site = folder.load()
    assert site.import_limit_kw.tolist() == [10.0, 50.0, 50.0] * 96
    more = folder.load({"grid_kw": 60})
    assert more.import_limit_kw.tolist() == [10.0, 50.0, 60.0] * 96
    folder.set_column("import_limit_kw", [-1] * 288)
    assert message(folder.load).startswith(
        "series.csv.gz: row 2, column import_limit_kw: -1 is negative; what may be imported is "
        "0 kW or more"
    )


def test_least_power_of_a_socket(folder: Folder) -> None:
    folder.config["sockets"][0]["min_kw"] = 1.4
    assert folder.load().sessions.min_kw.tolist() == [1.4, 0.0]
    folder.add("c,moto,2025-03-01T12:00-05:00,2025-03-01T14:00-05:00,1,1.3")
    assert message(folder.load) == (
        "sessions.csv.gz: row 4, column max_kw: 1.3 is below min_kw of moto in site.yaml, 1.4 kW: "
        "this vehicle could not charge there"
    )


def test_battery_options(folder: Folder) -> None:
    folder.config["battery"] |= {"reserve_soc": 0.4, "may_charge_from_grid": False}
    battery = folder.load().battery
    assert battery
    assert (battery.least_soc, battery.may_charge_from_grid) == (0.4, False)


def test_parts_that_do_not_fit_together(folder: Folder) -> None:
    sessions, folder.sessions = folder.sessions, None
    text = message(folder.load)
    assert text.startswith("sessions.csv.gz: is missing in ")
    assert text.endswith("and, where site.yaml has sockets, sessions.csv.gz")
    sockets = folder.config.pop("sockets")
    folder.sessions = sessions
    assert message(folder.load).startswith(
        "sessions.csv.gz: site.yaml has no sockets for these vehicles; add them, such as sockets: ["
    )
    folder.sessions = None
    del folder.config["battery"]
    assert message(folder.load) == (
        "site.yaml: has neither battery nor sockets: nothing can be controlled; add what the site "
        "has of them"
    )
    folder.config |= {"sockets": sockets}
    folder.sessions = sessions
    folder.load()
    folder.drop("pv_kw")
    assert message(folder.load) == (
        "series.csv.gz: column pv_kw is missing, and site.yaml has pv_kwp: 100; add the column, or "
        "remove pv_kwp from a site without PV"
    )
    folder.set_column("pv_kw", [0, 1] * 144)
    del folder.config["pv_kwp"]
    assert message(folder.load).startswith(
        "series.csv.gz: row 3, column pv_kw: 1 is PV power, and site.yaml has no pv_kwp; write"
    )


def test_columns_that_nobody_knows_are_left_out(folder: Folder) -> None:
    folder.set_column("humidity", ["dear"] * 288)
    assert folder.load().notes[0] == "series.csv.gz: column humidity is not read"
    for i in range(6):
        folder.set_column(f"x{i}", [i] * 288)
    assert folder.load().notes[0] == (
        "series.csv.gz: columns humidity, x0, x1, x2, x3 and 2 more are not read"
    )
    folder.drop(*[f"x{i}" for i in range(6)], "humidity", "load_kw")
    folder.set_column("load_kW", [5] * 288)
    assert message(folder.load) == ("series.csv.gz: column load_kW is unknown; write load_kw")


# --- what if -------------------------------------------------------------------------------------


def test_what_if_the_site_had_other_figures(folder: Folder) -> None:
    site = folder.load()
    other = folder.load(
        {"battery.capacity_kwh": 200, "battery.power_kw": 40, "pv_kwp": 50, "grid_kw": 80}
    )
    assert other.battery
    assert (other.battery.capacity_kwh, other.battery.power_kw) == (200.0, 40.0)
    assert other.battery.soc_max == 0.95
    assert (other.pv_kwp, other.grid_kw) == (50.0, 80.0)
    assert other.pv_kw.tolist() == (site.pv_kw / 2).tolist()
    assert set(other.import_limit_kw) == {80.0}
    assert other.notes == (
        *site.notes,
        "as if battery.capacity_kwh were 200, not 100",
        "as if battery.power_kw were 40, not 25",
        "as if pv_kwp were 50, not 100",
        "as if grid_kw were 80, not 50",
    )
    assert other.sha256 != site.sha256
    assert folder.load() is site


def test_what_if_there_was_a_battery(folder: Folder) -> None:
    del folder.config["battery"]
    del folder.config["sockets"]
    folder.sessions = None
    assert "nothing can be controlled" in message(folder.load)
    battery = folder.load({"battery.capacity_kwh": 200, "battery.power_kw": 40}).battery
    assert battery == Battery(200, 40, 0.95, 0.95, 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"battery.power_kw": 40}, "--battery.power_kw: the site has no battery; give --battery."),
        ({"pv_kwp": 5}, "--pv_kwp: the site has no PV whose power could be scaled; give site.yaml"),
        ({"grid_kw": -1}, "--grid_kw: -1 is not a number above 0 up to 1e+06 kW"),
        ({"battery.capacity_kwh": 0, "battery.power_kw": 1}, "--battery.capacity_kwh: 0 is not a "),
        ({"seed": 5}, "--seed: is not a figure to change; battery.capacity_kwh, battery.power_kw"),
    ],
)
def test_what_cannot_be(folder: Folder, changes: dict[str, float], expected: str) -> None:
    for key in ("battery", "pv_kwp"):
        del folder.config[key]
    folder.drop("pv_kw")
    assert message(lambda: folder.load(changes)).startswith(expected)


# --- sessions ------------------------------------------------------------------------------------


def test_a_session_over_midnight_stays_whole(folder: Folder) -> None:
    folder.add("c,moto,2025-03-01T22:00-05:00,2025-03-03T06:00-05:00,8,2")
    site = folder.load()
    s = site.sessions
    assert list(zip(s.arrival, s.departure, s.energy_kwh, strict=True)) == [
        (32, 41, 2.5),
        (88, 216, 8.0),
        (132, 144, 6.0),
    ]
    assert not [note for note in site.notes if note.startswith("sessions")]
    assert s.standing(100).tolist() == [1]
    # Three hours of charging on arrival at 2 kW have gone by at 01:00.
    assert site.owed_on_arrival_kwh(100).tolist() == [8.0 - 6.0, 0.0]


def test_short_windows_are_half_an_hour_and_end_with_the_series(folder: Folder) -> None:
    folder.add(
        "c,moto,2025-03-01T09:03-05:00,2025-03-01T09:04:30-05:00,0.3,2",
        "d,moto,2025-03-01T23:50-05:00,2025-03-01T23:55-05:00,0.3,2",
        "e,moto,2025-03-03T23:50-05:00,2025-03-03T23:55-05:00,0.3,2",
    )
    site = folder.load()
    assert site.sessions.arrival.tolist() == [32, 36, 95, 132, 287]
    assert site.sessions.departure.tolist() == [41, 38, 97, 144, 288]


def test_energy_is_clipped_to_what_the_window_allows(folder: Folder) -> None:
    folder.add(
        "c,moto,2025-03-01T12:00-05:00,2025-03-01T13:00-05:00,2,9",
        "d,moto,2025-03-02T12:00-05:00,2025-03-02T13:00-05:00,1.96,9",
    )
    site = folder.load()
    assert site.sessions.energy_kwh.tolist() == pytest.approx([2.5, 0.98 * 2, 6, 1.96])
    assert site.notes[0] == (
        "sessions.csv.gz: 1 of 4 sessions ask for more than 98 % of what their stay allows and "
        "were clipped to that (the first: row 4)"
    )
    assert np.flatnonzero(site.clipped_kwh).tolist() == [48]
    assert site.clipped_kwh[48] == pytest.approx(0.04)
    assert site.sessions_read
    assert site.sessions_read.clipped == 1


def test_sessions_outside_the_series_are_dropped_whole(folder: Folder) -> None:
    folder.config["day_start"] = 0
    folder.add(
        "c,moto,2025-02-27T22:00-05:00,2025-03-01T02:00-05:00,1,2",
        "d,moto,2025-03-03T22:00-05:00,2025-03-04T02:00-05:00,2,2",
        "e,moto,2024-03-03T22:00-05:00,2024-03-03T23:00-05:00,1,2",
        "f,moto,2026-03-03T22:00-05:00,2026-03-03T23:00-05:00,1,2",
        "g,moto,2025-03-01T00:00-05:00,2025-03-01T01:00-05:00,1,2",
        "h,moto,2025-03-03T23:00-05:00,2025-03-04T00:00-05:00,1,2",
    )
    site = folder.load()
    assert site.sessions.arrival.tolist() == [0, 32, 132, 284]
    assert site.sessions.departure.tolist() == [4, 41, 144, 288]
    assert site.notes[0] == (
        "sessions.csv.gz: 4 of 8 sessions arrive before the series begins or depart after it ends "
        "and were dropped (the first: row 4)"
    )
    read = site.sessions_read
    assert read
    assert (read.rows, read.dropped, read.energy_kwh, read.dropped_kwh) == (8, 4, 15.5, 5.0)


def test_socket_holds_one_vehicle_until_its_departure_step(folder: Folder) -> None:
    day = "2025-03-03T"
    folder.sessions = [SESSIONS_HEADER] + [
        f"{name},{kind},{day}{start}-05:00,{day}{end}-05:00,{kwh},2"
        for name, kind, start, end, kwh in (
            ("late", "moto", "12:01", "14:00", 0.2),  # the file need not be sorted
            ("a", "moto", "08:00", "10:01", 0.2),  # socket 0 until 10:15
            ("b", "moto", "08:00", "12:00", 0.2),  # socket 1
            ("c", "moto", "08:10", "09:00", 1.9),  # no socket left
            ("d", "moto", "10:10", "11:00", 0.3),  # socket 0 is free from 10:15 only
            ("e", "moto", "10:15", "11:00", 0.2),  # socket 0
            ("f", "mototaxi", "08:00", "09:00", 0.2),  # socket 2
            ("g", "mototaxi", "08:50", "09:30", 0.4),  # motos' free sockets are no help
        )
    ]
    site = folder.load()
    assert site.sessions.socket.tolist() == [0, 1, 2, 0, 0]
    assert (site.sessions.arrival - 192).tolist() == [32, 32, 32, 41, 48]
    assert (np.flatnonzero(site.turned_away) - 192).tolist() == [32, 35, 40]
    assert site.turned_away_kwh[[224, 227, 232]].tolist() == [1.9, 0.4, 0.3]  # as asked for
    assert site.notes[0] == (
        "sessions.csv.gz: 3 of 8 sessions found no free socket of their type and were turned away "
        "(the first: row 5)"
    )
    assert "most vehicles" not in " ".join(site.notes)


def test_in_order_of_the_second_then_of_the_row(folder: Folder) -> None:
    """Two arrive in one step: who comes first gets the socket, whatever the order of rows."""
    folder.sessions = [
        SESSIONS_HEADER,
        "a,mototaxi,2025-03-01T08:00:02-05:00,2025-03-01T09:00-05:00,0.3,2",
        "b,mototaxi,2025-03-01T08:00:01-05:00,2025-03-01T09:00-05:00,0.2,2",
        "c,moto,2025-03-01T08:00-05:00,2025-03-01T09:00-05:00,0.4,2",
        "d,moto,2025-03-01T08:00-05:00,2025-03-01T09:00-05:00,0.5,2",
    ]
    s = folder.load().sessions
    assert (s.socket.tolist(), s.energy_kwh.tolist()) == ([0, 1, 2], [0.4, 0.5, 0.2])


def test_sockets_that_are_never_taken_have_no_column(folder: Folder) -> None:
    folder.config["sockets"][0]["count"] = 90_000
    site = folder.load()
    assert site.sessions.socket.tolist() == [0, 90_000]
    assert site.sessions.column.tolist() == [0, 1]
    assert site.sessions.used_sockets.tolist() == [0, 90_000]


def test_a_site_where_most_are_turned_away_is_called_so(folder: Folder) -> None:
    folder.sessions = [SESSIONS_HEADER] + [
        f"{i},mototaxi,2025-03-01T0{i}:05-05:00,2025-03-02T10:10-05:00,2.5,2" for i in range(5)
    ]
    assert folder.load().notes[1] == (
        "site.yaml: sockets: most vehicles are turned away, 4 of 5: what is said of this site is "
        "said of the few that find a socket; count the sockets again"
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(-1500, 4 * 1440), st.integers(1, 3000), st.floats(0.01, 3), st.booleans()
        ),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([5, 15, 20, 60]),
)
def test_any_sessions_keep_the_promises(
    tmp_path_factory: pytest.TempPathFactory,
    stays: list[tuple[int, int, float, bool]],
    minutes: int,
) -> None:
    folder = Folder(tmp_path_factory.mktemp("site") / "s")
    folder.config |= {"day_start": 0}
    steps = 3 * 1440 // minutes
    folder.set_times(clock_times("2025-03-01T00:00", steps, minutes=minutes))
    origin = datetime(2025, 3, 1, tzinfo=LIMA)
    for i, (start, stay, energy, taxi) in enumerate(stays):
        a = origin + timedelta(minutes=start)
        d = a + timedelta(minutes=stay)
        kind = "mototaxi" if taxi else "moto"
        folder.add(f"s{i},{kind},{a.isoformat()},{d.isoformat()},{energy:.6f},2.2")
    site = folder.load()
    s, read = site.sessions, site.sessions_read
    assert read
    assert np.all(np.diff(s.arrival) >= 0)
    assert np.all((s.arrival >= 0) & (s.arrival < s.departure) & (s.departure <= steps))
    window = s.departure - s.arrival
    assert np.all((window * minutes >= 30) | (s.departure == steps))
    assert np.all((s.socket >= 0) & (s.socket < 3))
    assert np.all((s.energy_kwh > 0) & (s.energy_kwh <= 0.98 * s.max_kw * window * site.step_h))
    held = np.zeros((3, steps), dtype=int)
    for k, a, b in zip(s.socket, s.arrival, s.departure, strict=True):
        held[k, a:b] += 1
    assert held.max() <= 1
    # Every row and every kWh is somewhere.
    assert read.rows == len(stays) + 2
    assert read.rows == read.dropped + read.turned_away + len(s.socket)
    assert site.turned_away.sum() == read.turned_away
    total_kwh = read.dropped_kwh + s.energy_kwh.sum()
    total_kwh += site.turned_away_kwh.sum() + site.clipped_kwh.sum()
    assert total_kwh == pytest.approx(read.energy_kwh)


# --- what is refused: files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", " ", "nowhere", "../iquitos", "iquitos/../../x", "a\0b", "a\nb", "x" * 5000]
)
def test_unknown_site(name: str) -> None:
    text = message(lambda: load_site(name))
    assert "no such folder and no shipped site" in text
    assert text.endswith("or one of iquitos, iquitos-flat")


def test_shipped_name_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Folder(tmp_path / "iquitos").load()
    for path in ("./iquitos", Path("iquitos")):
        assert load_site(path).name == "mine"
        assert load_site(path).notes[0] == (
            f"site {path}: read the folder, not the shipped site iquitos"
        )
    site = load_site("iquitos")
    assert site.name == "iquitos"
    assert site.notes[0] == (
        "site iquitos: read the shipped site; write ./iquitos for the folder here"
    )
    assert (
        load_site("iquitos-flat").notes == load_site(site.directory.parent / "iquitos-flat").notes
    )


@pytest.mark.parametrize("name", ["site.yaml", "series.csv.gz", "sessions.csv.gz"])
def test_missing_or_odd_file(folder: Folder, name: str) -> None:
    folder.load()
    (folder.path / name).unlink()
    text = message(lambda: load_site(folder.path))
    assert text.startswith(f"{name}: is missing in ")
    assert "a site folder holds site.yaml, series.csv.gz and, where site.yaml has sock" in text
    (folder.path / name).mkdir()
    assert f"{name}: is not a regular file" in message(lambda: load_site(folder.path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_fifo_does_not_hang(folder: Folder) -> None:
    folder.load()
    (folder.path / "sessions.csv.gz").unlink()
    os.mkfifo(folder.path / "sessions.csv.gz")
    assert "is not a regular file" in message(lambda: load_site(folder.path))


def test_both_plain_and_packed(folder: Folder) -> None:
    folder.load()
    (folder.path / "series.csv").write_text("x")
    assert message(lambda: load_site(folder.path)) == (
        "series.csv.gz: series.csv is there too; keep only one of them"
    )


def test_broken_gzip(folder: Folder) -> None:
    folder.load()
    path = folder.path / "series.csv.gz"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    assert message(lambda: load_site(folder.path)) == (
        "series.csv.gz: is cut off in the middle; copy or compress it again"
    )
    for bad in (b"time,pv_kw\n", good[:20] + b"\xff" * 40 + good[60:], good[:-8] + b"\0" * 8):
        path.write_bytes(bad)
        assert message(lambda: load_site(folder.path)) == (
            "series.csv.gz: is not a sound gzip file; compress it again, or give plain series.csv"
        )


def test_sizes_are_bounded(folder: Folder) -> None:
    folder.load()
    series = folder.path / "series.csv.gz"
    series.write_bytes(gzip.compress(bytes(2**20)) * 257)
    assert "unpacks to more than 256 MiB, the most that is read" in message(
        lambda: load_site(folder.path)
    )
    os.truncate(series, 256 * 2**20 + 1)
    assert "series.csv.gz: is larger than 262144 KiB" in message(lambda: load_site(folder.path))
    (folder.path / "site.yaml").write_bytes(b"#" * 300_000)
    assert "site.yaml: is larger than 64 KiB" in message(lambda: load_site(folder.path))


def test_rows_are_bounded(folder: Folder) -> None:
    folder.load()
    rows = gzip.compress(b"0,0,0,0\n" * 200_000, 1) * 11
    (folder.path / "series.csv.gz").write_bytes(gzip.compress(f"{SERIES_HEADER}\n".encode()) + rows)
    assert message(lambda: load_site(folder.path)) == (
        "series.csv.gz: has over 2000000 rows, the most that is read"
    )


def test_text_encoding(folder: Folder) -> None:
    folder.load()
    assert folder.sessions
    data = "\n".join([*folder.sessions, "ñ,moto"]).encode("latin-1")
    (folder.path / "sessions.csv.gz").write_bytes(gzip.compress(data))
    assert message(lambda: load_site(folder.path)) == (
        "sessions.csv.gz: row 4 is not UTF-8 text; save the file as UTF-8"
    )
    (folder.path / "site.yaml").write_bytes("name: ñ".encode("latin-1"))
    assert message(lambda: load_site(folder.path)) == (
        "site.yaml: is not UTF-8 text; save the file as UTF-8"
    )


# --- what is refused: site.yaml ------------------------------------------------------------------

SHARE = "a number from 0.5 to 1 (a share, not per cent)"
BAD_VALUES = [
    ("latitude", 91, "latitude: 91 is not a number from -90 to 90 degrees"),
    ("longitude", "west", "longitude: west is not a number from -180 to 180 degrees"),
    ("altitude_m", float("nan"), "altitude_m: nan is not a number from -500 to 9000 m"),
    ("pv_kwp", -1, "pv_kwp: -1 is not a number from 0 to 1e+06 kWp"),
    ("pv_kwp", float("inf"), "pv_kwp: inf is not a number from 0 to 1e+06 kWp"),
    ("pv_kwp", 10**400, "is not a number from 0 to 1e+06 kWp"),
    ("pv_kwp", True, "pv_kwp: True is not a number from 0 to 1e+06 kWp"),
    ("pv_kwp", None, "pv_kwp: is empty, not a number from 0 to 1e+06 kWp"),
    ("grid_kw", 0, "grid_kw: 0 is not a number above 0 up to 1e+06 kW"),
    ("grid_kw", [500], "grid_kw: [500] is not a number above 0 up to 1e+06 kW"),
    ("charger_efficiency", 92, f"charger_efficiency: 92 is not {SHARE}"),
    ("seed", 1.5, "seed: 1.5 is not a whole number from 0 to 4294967295"),
    ("seed", True, "seed: True is not a whole number from 0 to 4294967295"),
    ("seed", -1, "seed: -1 is not a whole number from 0 to 4294967295"),
    ("name", 5, "name: 5 is not text of at most 64 letters, digits, spaces, . _ - "),
    ("name", "../x", "name: ../x is not text of at most 64 letters"),
    ("name", "a\nb", "name: 'a\\nb' is not text of at most 64 letters"),
    ("timezone", "Iquitos", "timezone: Iquitos is not a time zone name such as America/Lima"),
    ("timezone", "America", "timezone: America is not a time zone name such as America/Lima"),
    ("timezone", "../etc/passwd", "is not a time zone name such as America/Lima"),
    ("timezone", -5, "timezone: -5 is not a time zone name such as America/Lima"),
    ("battery", 5, "battery: 5 is not a mapping; the keys are capacity_kwh, power_kw, "),
    ("battery.capacity_kwh", 0, "battery.capacity_kwh: 0 is not a number above 0 up to 1e+06 kWh"),
    ("battery.power_kw", "fast", "battery.power_kw: fast is not a number above 0 up to 1e+06 kW"),
    ("battery.charge_efficiency", 0.1, f"battery.charge_efficiency: 0.1 is not {SHARE}"),
    ("battery.discharge_efficiency", 1.1, f"battery.discharge_efficiency: 1.1 is not {SHARE}"),
    ("battery.soc_max", 95, "battery.soc_max: 95 is not a number from 0 to 1 (a share"),
    ("battery.soc_max", 0.1, "battery.soc_max: 0.1 is below battery.soc_min 0.1; right is "),
    ("battery.start_soc_min", 0.05, "battery.start_soc_min: 0.05 is below battery.soc_min 0.1"),
    ("battery.start_soc_max", 0.2, "battery.start_soc_max: 0.2 is below battery.start_soc_min"),
    ("battery.start_soc_max", 0.99, "battery.soc_max: 0.95 is below battery.start_soc_max 0.99"),
    ("sockets", [], "sockets: [] is not a list such as [{name: moto, count: 112, max_kw: 2.0}]"),
    ("sockets", {"moto": 3}, "sockets: {'moto': 3} is not a list such as"),
    ("sockets.1", "moto", "sockets[1]: moto is not a mapping; the keys are name, count, max_kw"),
    ("sockets.0.count", 10**9, "sockets[0].count: 1000000000 is not a whole number from 1 to"),
    ("sockets.0.count", 2.5, "sockets[0].count: 2.5 is not a whole number from 1 to 100000"),
    ("sockets.0.count", 100_000, "sockets: 100001 sockets in all; at most 100000 are read"),
    ("sockets.0.max_kw", 2000, "sockets[0].max_kw: 2000 is not a number above 0 up to 1000 kW"),
    ("sockets.1.name", "moto", "sockets[1].name: moto is there twice; names differ"),
    ("held_out", 6, "held_out: 6 is not {every_weeks: 6, first: 6}, {every: 6, first: 6} or a"),
    ("held_out", [], "held_out: [] is not {every_weeks: 6, first: 6}, {every: 6, first: 6} or a"),
    ("held_out", date(2025, 3, 1), "held_out: 2025-03-01 is not {every_weeks: 6, first: 6}, "),
    ("battery", None, "battery: is empty, not a mapping; the keys are capacity_kwh, "),
    ("held_out", ["sixth"], "held_out[0]: sixth is not a date such as 2025-01-06"),
    ("held_out", [5], "held_out[0]: 5 is not a date such as 2025-01-06"),
    (
        "held_out",
        ["2025-03-01", "2025-04-01"],
        "held_out[1]: 2025-04-01 is not a complete day of series.csv.gz, which has 2025-03-01 to "
        "2025-03-03",
    ),
    ("held_out.every", 1, "held_out.every: 1 is not a whole number from 2 to 10000"),
    ("held_out", {"every_weeks": 1, "first": 1}, "held_out.every_weeks: 1 is not a whole number"),
    ("held_out", {"every_weeks": 6}, "held_out.first is missing; the keys are every_weeks, first"),
    ("held_out", {"first": 6}, "held_out.every_weeks is missing; the keys are every_weeks, first"),
    ("held_out", {"every_weeks": 6, "first": 6}, "held_out: selects 0 of the 3 days; at least one"),
    ("held_out", {"every_weeks": 6, "every": 6, "first": 6}, "held_out.every_weeks is unknown;"),
    ("day_start", 24, "day_start: 24 is not a whole number from 0 to 23"),
    ("day_start", "05:00", "day_start: 05:00 is not a whole number from 0 to 23"),
    ("battery.reserve_soc", 0.05, "battery.reserve_soc: 0.05 is below battery.soc_min 0.1; right"),
    ("battery.reserve_soc", 0.99, "battery.soc_max: 0.95 is below battery.reserve_soc 0.99; right"),
    ("battery.may_charge_from_grid", 1, "battery.may_charge_from_grid: 1 is not true or false"),
    ("sockets.0.min_kw", -1, "sockets[0].min_kw: -1 is not a number from 0 to 1000 kW"),
    ("sockets.1.min_kw", 4, "sockets[1].min_kw: 4 is above max_kw 3; it is the least power at"),
    ("held_out.first", 4, "held_out: selects 0 of the 3 days; at least one day to test on and"),
    (
        "held_out",
        ["2025-03-01", "2025-03-02", "2025-03-03"],
        "held_out: selects 3 of the 3 days; at least one day to test on and one to train on",
    ),
]


def put(config: Any, path: str, value: object) -> None:
    *parents, last = path.split(".")
    for key in parents:
        config = config[int(key) if isinstance(config, list) else key]
    config[int(last) if isinstance(config, list) else last] = value


@pytest.mark.parametrize(("path", "value", "expected"), BAD_VALUES)
def test_bad_yaml_value(folder: Folder, path: str, value: object, expected: str) -> None:
    put(folder.config, path, value)
    text = message(folder.load)
    assert text.startswith("site.yaml: ")
    assert expected in text


def test_missing_and_unknown_keys(folder: Folder) -> None:
    del folder.config["battery"]["power_kw"]
    assert message(folder.load).startswith(
        "site.yaml: battery.power_kw is missing; the keys are capacity_kwh, power_kw, "
    )
    folder.config["battery"]["power_kW"] = 5
    assert "site.yaml: battery.power_kW is unknown; the keys are" in message(folder.load)
    folder.config = {}
    assert "site.yaml: name is missing; the keys are name, latitude" in message(folder.load)
    folder.config["sockets"] = None
    assert "site.yaml: name is missing" in message(folder.load)


HOSTILE = [
    ("", "site.yaml: is empty, not a mapping; the keys are name, "),
    ("- a\n", "site.yaml: ['a'] is not a mapping"),
    ("name: [", "site.yaml: line 1: is not plain YAML (expected the node content"),
    ("name: a\n\tseed: 1\n", "site.yaml: line 2: is not plain YAML ("),
    ("name: a\n---\nname: b\n", "is not plain YAML (but found another document)"),
    ("x: !!python/object/apply:os.system ['touch PWNED']\n", "site.yaml: line 1: is not plain"),
    ("x: !!python/name:os.system\n", "site.yaml: line 1: is not plain YAML (could not determine"),
    ("a: &a [1]\nb: *a\n", "site.yaml: line 2: aliases (*name) are not read; write the value"),
    ("a: &a {b: *a}\n", "site.yaml: line 1: aliases (*name) are not read"),
    ("[" * 5000, "site.yaml: line 1: is nested too deep"),
    ("a: " + "{b: " * 5000, "site.yaml: line 1: is nested too deep"),
    ("a:\n" + "".join(" " * i + "b:\n" for i in range(1, 300)), "is nested too deep"),
    (
        "name: a\nname: b\n",
        "site.yaml: line 2: the key name is there twice, first in line 1; keep one",
    ),
    ("seed: " + "9" * 10_000, "is not plain YAML (Exceeds the limit"),
    ("? 0x" + "f" * 20_000 + "\n: 1", "site.yaml: a huge int is unknown"),
    ("held_out: [2025-02-31]", "is not plain YAML (day is out of range for month"),
    ("x: !!int ''", "is not plain YAML (string index out of range)"),
    ("x: !!bool maybe", "is not plain YAML ('maybe')"),
    ("{[1]: 2}", "is not plain YAML (found unhashable key)"),
    ("a\0b", "site.yaml: is not plain YAML ("),
    ("'a\\nb': 1", "site.yaml: a\\nb is unknown"),
    ('"a\\nb": 1', "site.yaml: 'a\\nb' is unknown"),
]


@pytest.mark.parametrize(("text", "expected"), HOSTILE)
def test_hostile_yaml(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    folder.load()
    monkeypatch.chdir(folder.path)
    (folder.path / "site.yaml").write_text(text, newline="")
    assert expected in message(lambda: load_site(folder.path))
    assert not (folder.path / "PWNED").exists()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_yaml_gives_one_line(
    tmp_path_factory: pytest.TempPathFactory, junk: str | bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk"
    path.mkdir(exist_ok=True)
    data = junk.encode("utf-8", "surrogatepass") if isinstance(junk, str) else junk
    (path / "site.yaml").write_bytes(data)
    for name in ("series.csv", "sessions.csv"):
        (path / name).write_text("")
    message(lambda: load_site(path))


# --- what is refused: CSV in general -------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "series.csv.gz: has no rows; line 1 is the header time,carbon_kg_per_kwh"),
        ([SERIES_HEADER], "series.csv.gz: has no rows; line 1 is the header time,carbon_kg"),
        (["time,pv_kw,load_kw"], "series.csv.gz: column carbon_kg_per_kwh is missing; the header"),
        (["time;pv_kw", "a;1"], "series.csv.gz: row 1 is not separated by commas; the header is"),
        ([SERIES_HEADER + ",Time"], "series.csv.gz: column Time is unknown; write time"),
        ([SERIES_HEADER + ",time"], "series.csv.gz: column time is there twice; the header is"),
        ([SERIES_HEADER, "a,1,2"], "series.csv.gz: row 2 has 3 values; the header has 4"),
        ([SERIES_HEADER, "a,1,2,3,4"], "series.csv.gz: row 2 has 5 values; the header has 4"),
        ([SERIES_HEADER, "", "a,1,2,3"], "series.csv.gz: row 2 is empty; remove it"),
        ([SERIES_HEADER, 'a,"1,2,3'], "series.csv.gz: row 2 is not valid CSV ("),
        ([SERIES_HEADER, "a," + "1" * 200_000], "series.csv.gz: row 2 is not valid CSV (field la"),
        (['"' + "t" * 200_000], "series.csv.gz: row 1 is not valid CSV (field larger"),
    ],
)
def test_bad_csv(folder: Folder, lines: list[str], expected: str) -> None:
    folder.series = lines
    assert message(folder.load).startswith(expected)


@pytest.mark.parametrize("column", [1, 2, 3])
@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("", "'' is empty; every cell needs a number"),
        ("abc", "abc is not a number; every cell needs one"),
        ('"1,5"', "1,5 is not a number; write the decimal point as a point"),
        ("nan", "nan is not a finite number; every cell needs one"),
        ("-inf", "-inf is not a finite number; every cell needs one"),
        ("1e999", "1e999 is not a finite number; every cell needs one"),
        ("1_0", "1_0 is not a number; write it without _"),
    ],
)
def test_bad_number(folder: Folder, column: int, cell: str, problem: str) -> None:
    cells = folder.series[49].split(",")
    cells[column] = cell
    folder.series[49] = ",".join(cells)
    name = SERIES_HEADER.split(",")[column]
    assert message(folder.load) == f"series.csv.gz: row 50, column {name}: {problem}"


# --- what is refused: series ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("-3.0,30,0.4", "column pv_kw: -3.0 is negative; PV power is 0 kW or more"),
        (
            "1500,30,0.4",
            "column pv_kw: 1500 is more than 1.5 x pv_kwp = 150 kW; PV power is in kW, not W",
        ),
        (
            "1,-1,0.4",
            "column load_kw: -1 is negative; the building load is 0 kW or more (below it only in a "
            "site without pv_kw, whose meter counts both)",
        ),
        (
            "1,30000,0.4",
            "column load_kw: 30000 is more than grid_kw, pv_kwp and the battery give together, "
            "175 kW; the load is in kW, not W",
        ),
        (
            "1,30,-0.4",
            "column carbon_kg_per_kwh: -0.4 is negative; carbon intensity is 0 to 2 kg/kWh",
        ),
        (
            "1,30,900",
            "column carbon_kg_per_kwh: 900 is more than 2 kg/kWh; divide g/kWh or kg/MWh by 1000, "
            "multiply lb/MWh by 0.000454",
        ),
    ],
)
def test_implausible_series(folder: Folder, values: str, expected: str) -> None:
    folder.series[96] = folder.series[96].replace("1.5,30,0.45", values)
    assert message(folder.load) == f"series.csv.gz: row 97, {expected}"


TIME = "series.csv.gz: row 6, column time: "


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("", "'' is empty; write 2025-01-31T06:15-05:00"),
        ("01/03/2025 01:00", "01/03/2025 01:00 is not a time; write 2025-01-31T06:15-05:00"),
        ("2025-02-31T01:00-05:00", "is not a time; write 2025-01-31T06:15-05:00"),
        ("0001-03-01T01:00-05:00", "is not between the years 1990 and 2100"),
        ("9999-12-31T23:59-05:00", "is not between the years 1990 and 2100"),
        ("2025-03-01T01:00", "2025-03-01T01:00 has no UTC offset; write 2025-03-01T01:00-05:00"),
        (
            "2025-03-01T01:05-05:00",
            "is not on the 15-min grid (:00, :15, :30, :45; by local time or UTC)",
        ),
        (
            "2025-03-01T02:00-05:00",
            "2025-03-01T02:00-05:00 comes after a gap: 4 rows are missing after "
            "2025-03-01T00:45-05:00",
        ),
        ("2025-03-01T00:45-05:00", "is there twice; keep one row for each 15 min"),
        (
            "2025-03-01T00:15-05:00",
            "2025-03-01T00:15-05:00 is earlier than the row before (2025-03-01T00:45-05:00); sort "
            "the rows by time",
        ),
    ],
)
def test_bad_series_time(folder: Folder, time: str, expected: str) -> None:
    folder.series[5] = f"{time},1,2,0.4"
    text = message(folder.load)
    assert text.startswith(TIME)
    assert text.endswith(expected)


@pytest.mark.parametrize(
    ("minutes", "right"),
    [
        (1, "average them over 5 min"),
        (3, "average them over 15 min"),
        (7, "average or repeat them"),
        (12, "average them over 60 min"),
        (45, "average or repeat them"),
        (180, "repeat each row until there is one for each hour or less"),
    ],
)
def test_a_step_that_is_not_read(folder: Folder, minutes: int, right: str) -> None:
    folder.set_times(clock_times("2025-03-01T00:00", 300, minutes=minutes))
    assert message(folder.load) == (
        f"series.csv.gz: column time: the rows come every {minutes} min; 5, 10, 15, 20, 30 or 60 "
        f"min are read: {right}"
    )


def test_a_series_beside_its_grid(folder: Folder) -> None:
    folder.set_times(clock_times("2025-03-01T00:07", 300))
    assert message(folder.load) == (
        "series.csv.gz: row 2, column time: 2025-03-01T00:07-05:00 is not on the 15-min grid (:00, "
        ":15, :30, :45; by local time or UTC) (300 such rows: 2, 3, 4, ...)"
    )


def test_a_gap_after_the_first_row(folder: Folder) -> None:
    del folder.series[2]
    assert message(folder.load) == (
        "series.csv.gz: row 3, column time: 2025-03-01T00:30-05:00 comes after a gap: 1 row is "
        "missing after 2025-03-01T00:00-05:00"
    )


def test_a_single_row(folder: Folder) -> None:
    del folder.series[2:]
    assert message(folder.load) == (
        "series.csv.gz: has one row; the step is the time from row to row, 5, 10, 15, 20, 30 or 60 "
        "min"
    )


def test_all_mistakes_of_a_series_come_at_once(folder: Folder) -> None:
    for row in (20, 30, 40, 50):
        folder.series[row] = folder.series[row].replace(",1.5,", ",-0.1,")
    folder.series[5] = "," + folder.series[5].partition(",")[2]
    assert message(folder.load) == (
        "series.csv.gz: row 6, column time: '' is empty; write 2025-01-31T06:15-05:00 | row 21, "
        "column pv_kw: -0.1 is negative; PV power is 0 kW or more (4 such rows: 21, 31, 41, ...)"
    )


def test_no_complete_day(folder: Folder) -> None:
    folder.set_times(clock_times("2025-03-01T00:15", 150))
    assert message(folder.load) == (
        "series.csv.gz: holds no complete day; at least one day from 00:00 to 00:00 in "
        "America/Lima is needed, 24 hours"
    )


# --- what is refused: sessions -------------------------------------------------------------------

GOOD = {
    "session_id": "c",
    "socket_type": "moto",
    "arrival": "2025-03-01T12:00-05:00",
    "departure": "2025-03-01T14:00-05:00",
    "energy_kwh": "1",
    "max_kw": "2",
}


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        ("session_id", "", "'' is empty; every session has its own id"),
        ("session_id", "a", "a is already in row 2; ids differ"),
        (
            "socket_type",
            "car",
            "car is not a socket type of site.yaml; right is one of moto, mototaxi",
        ),
        ("arrival", "noon", "noon is not a time; write 2025-01-31T06:15-05:00"),
        (
            "arrival",
            "2025-03-01 12:00",
            "2025-03-01 12:00 has no UTC offset; write 2025-03-01T12:00-05:00",
        ),
        (
            "departure",
            "2025-03-01T12:00-05:00",
            "2025-03-01T12:00-05:00 is not after the arrival; the vehicle must stay",
        ),
        (
            "departure",
            "2026-03-01T12:00-05:00",
            "2026-03-01T12:00-05:00 is more than 7 days after the arrival; one row is one stay",
        ),
        ("departure", "", "'' is empty; write 2025-01-31T06:15-05:00"),
        ("departure", " ", "' ' is empty; write 2025-01-31T06:15-05:00"),
        ("energy_kwh", "0", "0 is not above 0 kWh; leave out who needs nothing"),
        ("energy_kwh", "-2", "-2 is not above 0 kWh; leave out who needs nothing"),
        ("energy_kwh", "NaN", "NaN is not a finite number; every cell needs one"),
        (
            "energy_kwh",
            "1200",
            "1200 cannot be charged in this stay, which allows 4.0 kWh at 2 kW; energy is in kWh, "
            "not Wh",
        ),
        ("max_kw", "0", "0 is not above 0 kW"),
        ("max_kw", "2000", "2000 is more than 1000 kW; charging power is in kW, not W"),
        ("max_kw", "fast", "fast is not a number; every cell needs one"),
    ],
)
def test_bad_session(folder: Folder, column: str, cell: str, expected: str) -> None:
    folder.add(",".join((GOOD | {column: cell}).values()))
    assert message(folder.load) == f"sessions.csv.gz: row 4, column {column}: {expected}"


def test_all_mistakes_of_sessions_come_at_once(folder: Folder) -> None:
    """Each kind once, with its first rows and their number; no mistake provokes another."""
    for i, (column, cell) in enumerate(
        [
            *[("departure", "")] * 4,
            *[("energy_kwh", "0")] * 2,
            ("arrival", "noon"),
            ("max_kw", "0"),
            *[("max_kw", "fast")] * 2,
        ]
    ):
        folder.add(",".join((GOOD | {"session_id": f"s{i}", column: cell}).values()))
    both = {"session_id": "a", "socket_type": "car", "departure": "2025-03-01T11:00-05:00"}
    folder.add(",".join((GOOD | both).values()))
    with pytest.raises(UserError) as caught:
        folder.load()
    assert str(caught.value).split(" | ") == [
        "sessions.csv.gz: row 14, column session_id: a is already in row 2; ids differ",
        "row 14, column socket_type: car is not a socket type of site.yaml; right is one of moto, "
        "mototaxi",
        "row 10, column arrival: noon is not a time; write 2025-01-31T06:15-05:00",
        "4 x departure is empty",
        "1 x departure is not after the arrival",
        "2 x max_kw is not a number",
        "2 x energy_kwh is not above 0 kWh",
        "1 x max_kw is not above 0 kW",
    ]


def test_no_session_in_the_series(folder: Folder) -> None:
    assert folder.sessions
    folder.sessions = [row.replace("2025-", "2024-") for row in folder.sessions]
    assert message(folder.load) == (
        "sessions.csv.gz: none of the 2 sessions lies in the series; row 2 arrives "
        "2024-03-01T13:05:00 UTC, the series goes from 2025-03-01T05:00:00 to 2025-03-04T05:00:00 "
        "UTC"
    )


# --- prices --------------------------------------------------------------------------------------


def test_prices_are_read_and_may_be_negative(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "mine")
    folder.set_column("price_per_kwh", [-0.05, 0.3] * 144)
    folder.set_column("export_price_per_kwh", [-0.1, 0.1] * 144)
    folder.config["currency"] = "EUR"
    site = folder.load()
    assert site.price_per_kwh is not None
    assert site.price_per_kwh[:2].tolist() == [-0.05, 0.3]
    assert site.money_per_kwh[:, :2].tolist() == [[-0.05, 0.3], [0.0, 0.1]]
    assert site.currency == "EUR"
    assert site.import_price[:2].tolist() == [0.45, 0.45]
    of_cost = load_site(folder.path, objective="cost")
    assert of_cost is load_site(folder.path, objective={"cost": 1})
    assert of_cost.import_price[:2].tolist() == [-0.05, 0.3]
    both = load_site(folder.path, objective="{co2: 1, cost: 0.2}")
    assert both.import_price[:2].tolist() == pytest.approx([0.44, 0.51])
    assert both.export_credit[:2].tolist() == pytest.approx([0.0, 0.02])


def test_without_prices_nothing_costs_anything(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "mine")
    site = folder.load()
    assert site.price_per_kwh is site.export_price_per_kwh is None
    assert site.currency == ""
    assert not site.money_per_kwh.any()
    with pytest.raises(UserError, match=r"--env.objective cost: .* has no column price_per_kwh"):
        load_site(folder.path, objective="cost")


@pytest.mark.parametrize(
    "objective",
    ["money", "", "{co2: -1}", "{co2: 0}", "{co2: .nan}", "{so2: 1}", "[1]", "{co2: x}"],
)
def test_what_is_no_objective_is_told_in_a_line(tmp_path: Path, objective: str) -> None:
    folder = Folder(tmp_path / "mine")
    folder.set_column("price_per_kwh", [0.3] * 288)
    folder.load()
    with pytest.raises(UserError, match=r"--env.objective .*co2: 1, cost: 0.2") as told:
        load_site(folder.path, objective=objective)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("price", "export", "told"),
    [
        (0.1, 0.2, "row 7, column export_price_per_kwh: '0.2' is above price_per_kwh 0.1"),
        (-0.1, 0.05, "row 7, column export_price_per_kwh: '0.05' is above price_per_kwh -0.1"),
        (None, 0.1, "column price_per_kwh is missing, and there is export_price_per_kwh"),
        ("much", None, "row 7, column price_per_kwh: 'much' is not a number"),
    ],
)
def test_prices_that_cannot_be_are_refused(
    tmp_path: Path, price: object, export: object, told: str
) -> None:
    folder = Folder(tmp_path / "mine")
    for column, value in (("price_per_kwh", price), ("export_price_per_kwh", export)):
        if value is not None:
            usual = [0.3 if column == "price_per_kwh" else 0.1] * 288
            folder.set_column(column, [*usual[:5], value, *usual[6:]])
    with pytest.raises(UserError, match="series") as error:
        folder.load()
    assert told.replace("'", "") in str(error.value).replace("'", "")


@pytest.mark.parametrize("currency", [3, "", "a b", "x" * 13])
def test_a_currency_is_a_short_name(tmp_path: Path, currency: object) -> None:
    folder = Folder(tmp_path / "mine")
    folder.config["currency"] = currency
    with pytest.raises(UserError, match=r"site.yaml: currency: .* three letters such as EUR"):
        folder.load()
