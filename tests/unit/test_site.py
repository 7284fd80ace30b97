"""The site reader: what a good folder becomes, and the one line a bad one gives."""

from __future__ import annotations

import dataclasses
import gzip
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
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
from co2lightning.site.model import Sessions, Site

CONFIG: dict[str, Any] = {
    "name": "mine",
    "latitude": -3.75,
    "longitude": -73.25,
    "altitude_m": 104,
    "timezone": "America/Lima",
    "pv_kwp": 100,
    "grid_kw": 50,
    "charger_efficiency": 0.92,
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


def clock_times(start: str, n: int, zone: str = "America/Lima") -> list[str]:
    """Write `n` local times every 15 min of elapsed time, from a local time without offset."""
    first = datetime.fromisoformat(start).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
    steps = (first + timedelta(minutes=15 * i) for i in range(n))
    return [t.astimezone(ZoneInfo(zone)).isoformat(timespec="minutes") for t in steps]


class Folder:
    """A small valid site folder that a test spoils in one place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(CONFIG))
        self.set_times(clock_times("2025-03-01T00:00", 3 * 96))
        self.sessions = [
            SESSIONS_HEADER,
            "a,moto,2025-03-01T08:05-05:00,2025-03-01T10:10-05:00,2.5,2",
            "b,mototaxi,2025-03-02T09:00-05:00,2025-03-02T12:00-05:00,6,2.5",
        ]

    def set_times(self, times: list[str]) -> None:
        self.series = [SERIES_HEADER] + [f"{t},1.5,30,0.45" for t in times]

    def add(self, *rows: str) -> None:
        self.sessions += rows

    def load(self) -> Site:
        self.path.mkdir(exist_ok=True)
        text = yaml.safe_dump(self.config, sort_keys=False)
        (self.path / "site.yaml").write_text(text, encoding="utf-8")
        for name, lines in (("series", self.series), ("sessions", self.sessions)):
            data = "".join(f"{line}\n" for line in lines).encode()
            (self.path / f"{name}.csv.gz").write_bytes(gzip.compress(data, 1))
        return load_site(self.path)


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
    assert site.days == ("2025-03-01", "2025-03-02", "2025-03-03")
    assert site.battery.soc_max == 0.95
    assert [s.name for s in site.sockets] == ["moto", "mototaxi"]
    assert site.n_sockets == 3
    assert site.pv_kw.shape == site.load_kw.shape == site.carbon_kg_per_kwh.shape == (3, 96)
    assert (site.pv_kw[1, 5], site.load_kw[1, 5], site.carbon_kg_per_kwh[1, 5]) == (99, 31, 0.5)
    assert site.pv_kw.sum() == pytest.approx(99 + 1.5 * (3 * 96 - 1))
    assert site.training_days.tolist() == [0, 1]
    assert site.held_out_days.tolist() == [2]
    assert site.notes == ()
    s = site.sessions
    assert s.day.tolist() == [0, 1]
    assert s.socket.tolist() == [0, 2]
    assert s.arrival_step.tolist() == [32, 36]  # 08:05 down to 08:00
    assert s.departure_step.tolist() == [41, 48]  # 10:10 up to 10:15
    assert s.energy_kwh.tolist() == [2.5, 6.0]
    assert s.max_kw.tolist() == [2.0, 2.5]  # the lower of vehicle and socket
    assert site.turned_away.tolist() == [0, 0, 0]
    kinds = {f.name: getattr(s, f.name).dtype for f in dataclasses.fields(Sessions)}
    assert {k for k, v in kinds.items() if v == np.int64} == {
        "day",
        "socket",
        "arrival_step",
        "departure_step",
    }


def test_shipped_sites_are_found_by_name() -> None:
    merit, flat = (load_site(name) for name in ("iquitos", "iquitos-flat"))
    assert (merit.name, flat.name) == ("iquitos", "iquitos-flat")
    assert (merit.pv_kwp, merit.battery.capacity_kwh) == (660, 580)
    assert (flat.pv_kwp, flat.battery.capacity_kwh) == (700, 700)
    assert merit.sha256 != flat.sha256
    for site in (merit, flat):
        assert len(site.days) == 365
        turned_away = int(site.turned_away.sum())
        assert site.notes == (
            f"sessions.csv.gz: {turned_away} of {turned_away + len(site.sessions.day)} sessions "
            "found no free socket of their type and were turned away (the first: row 418)",
        )
        assert site.n_sockets == 128
        assert site.held_out_days.tolist() == list(range(5, 365, 6))
        assert site.carbon_kg_per_kwh.mean() == pytest.approx(0.4521, abs=1e-6)
        assert len(site.sessions.day) / 365 == pytest.approx(314, abs=2)
        assert site.turned_away.mean() == pytest.approx(13, abs=1.5)
        assert site.sessions.energy_kwh.sum() / 365 == pytest.approx(970, rel=0.01)
    assert np.ptp(flat.carbon_kg_per_kwh) == 0
    assert merit.carbon_kg_per_kwh[0].argmax() in range(73, 89)  # the evening peak


def test_a_site_is_read_once_until_a_file_changes(folder: Folder) -> None:
    first = folder.load()
    assert load_site(folder.path) is first
    stat = (folder.path / "series.csv.gz").stat()
    folder.series[7] = folder.series[7].replace("30,0.45", "31,0.45")
    second = folder.load()
    os.utime(folder.path / "series.csv.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_site(folder.path) is second
    assert (first.load_kw[0, 6], second.load_kw[0, 6]) == (30, 31)
    for array in (first.pv_kw, first.held_out, first.turned_away, first.sessions.energy_kwh):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_sha256_follows_every_file(folder: Folder) -> None:
    first = folder.load().sha256
    assert folder.load().sha256 == first
    folder.sessions[1] = folder.sessions[1].replace("2.5,2", "2.4,2")
    second = folder.load().sha256
    folder.config["seed"] = 8
    assert len({first, second, folder.load().sha256}) == 3


def test_plain_csv_bom_crlf_and_column_order(folder: Folder) -> None:
    expected = folder.load()
    for name, lines in (("series", folder.series), ("sessions", folder.sessions)):
        (folder.path / f"{name}.csv.gz").unlink()
        cells = [line.split(",")[::-1] for line in lines]
        text = "\ufeff" + "\r\n".join(",".join(row) for row in cells) + "\r\n\r\n"
        (folder.path / f"{name}.csv").write_text(text, encoding="utf-8", newline="")
    site = load_site(str(folder.path))
    assert np.array_equal(site.pv_kw, expected.pv_kw)
    assert site.sessions.energy_kwh.tolist() == [2.5, 6.0]


def test_partial_days_are_left_out(folder: Folder) -> None:
    folder.set_times(clock_times("2025-02-28T12:00", 3 * 96 + 60))
    site = folder.load()
    assert site.days == ("2025-03-01", "2025-03-02", "2025-03-03")
    assert site.notes == (
        "series.csv.gz: 2 of 5 days left out because they do not have 96 steps (the first: "
        "2025-02-28)",
    )


@pytest.mark.parametrize(("day", "steps"), [("2025-03-30", 92), ("2025-10-26", 100)])
def test_days_with_daylight_saving_change_are_left_out(
    folder: Folder, day: str, steps: int
) -> None:
    zone = "Europe/Madrid"
    before = datetime.fromisoformat(day) - timedelta(days=1)
    folder.config |= {"timezone": zone, "held_out": {"every": 2, "first": 2}}
    folder.set_times(clock_times(before.isoformat(), 96 + steps + 96, zone))
    after = (before + timedelta(days=2)).date().isoformat()
    t = dict(
        zip(
            ("eve", "on", "after"),
            (clock_times(f"{d}T22:00", 9, zone) for d in (before.date().isoformat(), day, after)),
            strict=True,
        )
    )
    folder.sessions = [
        SESSIONS_HEADER,
        f"cross,moto,{t['eve'][0]},{t['on'][0]},3,2",  # 22:00 of the eve to 22:00 of the day
        f"within,moto,{t['on'][0]},{t['on'][4]},1,2",
        f"later,moto,{t['after'][0]},{t['after'][4]},1,2",
    ]
    site = folder.load()
    assert site.days == (before.date().isoformat(), after)
    assert site.pv_kw.shape == (2, 96)
    assert site.sessions.day.tolist() == [0, 1]
    assert site.sessions.arrival_step.tolist() == [88, 88]
    hours = {92: 23, 100: 25}[steps]  # elapsed time from 22:00 to 22:00
    assert site.sessions.energy_kwh.tolist() == pytest.approx([3 * 2 / hours, 1])
    assert site.notes == (
        f"series.csv.gz: 1 of 3 days left out because they do not have 96 steps (the first: {day})",
        "sessions.csv.gz: 1 of 3 sessions cross midnight and were cut there, their energy split "
        "by time",
        "sessions.csv.gz: 2 of 3 sessions lie wholly or partly outside the series or on a day "
        "left out; that part was dropped (the first: row 2)",
    )


def test_series_times_repeat_in_the_local_hour_that_comes_twice(folder: Folder) -> None:
    """The clock shows 02:15 twice that day; the offset tells the two apart."""
    zone = "Europe/Madrid"
    folder.config |= {"timezone": zone, "held_out": ["2025-10-27"]}
    folder.set_times(clock_times("2025-10-25T00:00", 96 + 100 + 96, zone))
    shown = [row.split(",")[0] for row in folder.series]
    assert {"2025-10-26T02:15+02:00", "2025-10-26T02:15+01:00"} <= set(shown)
    folder.sessions = [
        SESSIONS_HEADER,
        "a,moto,2025-10-25T08:00+02:00,2025-10-25T10:00+02:00,1,2",
    ]
    assert folder.load().days == ("2025-10-25", "2025-10-27")


@pytest.mark.parametrize(
    ("zone", "days"),
    [
        ("Asia/Kathmandu", ("2025-03-08", "2025-03-09", "2025-03-10")),  # offset +05:45
        ("America/Havana", ("2025-03-08", "2025-03-10")),  # 00:00 on 9 March does not exist
    ],
)
def test_odd_zones(folder: Folder, zone: str, days: tuple[str, ...]) -> None:
    folder.config |= {"timezone": zone, "held_out": {"every": 2, "first": 1}}
    folder.set_times(clock_times("2025-03-08T00:00", 4 * 96 - 5, zone))
    times = clock_times("2025-03-08T08:00", 9, zone)
    folder.sessions = [SESSIONS_HEADER, f"a,moto,{times[0]},{times[8]},2,2"]
    site = folder.load()
    assert site.days == days
    assert site.sessions.arrival_step.tolist() == [32]


def test_held_out_dates(folder: Folder) -> None:
    folder.config["held_out"] = ["2025-03-03", "2025-03-01"]
    assert folder.load().held_out_days.tolist() == [0, 2]


def test_example_in_the_documentation_is_accepted(folder: Folder) -> None:
    page = Path(__file__).parents[2] / "docs" / "site-format.md"
    text = page.read_text(encoding="utf-8")
    config, series, sessions = re.findall(r"```(?:yaml|csv)\n(.*?)```", text, re.DOTALL)
    folder.config = yaml.safe_load(config)
    folder.set_times(clock_times("2025-01-01T00:00", 7 * 96))
    folder.series[: len(series.splitlines())] = series.splitlines()
    folder.sessions = sessions.splitlines()
    site = folder.load()
    assert site.held_out_days.tolist() == [5]
    assert site.load_kw[0, 1] == float(series.splitlines()[2].split(",")[2])
    assert len(site.sessions.day) == len(sessions.splitlines()) - 1
    assert site.notes == ()


# --- sessions ------------------------------------------------------------------------------------


def test_midnight_splits_a_session_by_time(folder: Folder) -> None:
    folder.add("c,moto,2025-03-01T22:00-05:00,2025-03-02T06:00-05:00,8,2")
    site = folder.load()
    s = site.sessions
    assert list(zip(s.day, s.arrival_step, s.departure_step, s.energy_kwh, strict=True)) == [
        (0, 32, 41, 2.5),
        (0, 88, 96, 2.0),
        (1, 0, 24, 6.0),
        (1, 36, 48, 6.0),
    ]
    assert site.notes == (
        "sessions.csv.gz: 1 of 3 sessions cross midnight and were cut there, their energy split "
        "by time",
    )


def test_leaving_at_midnight_does_not_cross_it(folder: Folder) -> None:
    folder.add("c,moto,2025-03-01T23:00-05:00,2025-03-02T00:00-05:00,1,2")
    site = folder.load()
    assert site.notes == ()
    assert site.sessions.departure_step.tolist() == [41, 96, 48]


def test_window_is_two_steps_and_ends_at_midnight(folder: Folder) -> None:
    folder.add(
        "c,moto,2025-03-01T09:03-05:00,2025-03-01T09:04:30-05:00,0.3,2",
        "d,moto,2025-03-01T23:50-05:00,2025-03-01T23:55-05:00,0.3,2",
    )
    site = folder.load()
    assert site.sessions.arrival_step.tolist() == [32, 36, 95, 36]
    assert site.sessions.departure_step.tolist() == [41, 38, 96, 48]
    assert site.notes == ()


def test_energy_is_clipped_to_what_the_window_allows(folder: Folder) -> None:
    folder.add(
        "c,moto,2025-03-01T12:00-05:00,2025-03-01T13:00-05:00,2,9",
        "d,moto,2025-03-02T12:00-05:00,2025-03-02T13:00-05:00,1.96,9",
    )
    site = folder.load()
    assert site.sessions.energy_kwh.tolist() == pytest.approx([2.5, 0.98 * 2, 6, 1.96])
    assert site.notes == (
        "sessions.csv.gz: 1 of 4 sessions ask for more than 98 % of what their stay allows and "
        "were clipped to that (the first: row 4)",
    )


def test_sessions_outside_the_series_are_dropped(folder: Folder) -> None:
    folder.add(
        "c,moto,2025-02-27T22:00-05:00,2025-03-01T02:00-05:00,1,2",
        "d,moto,2025-03-03T22:00-05:00,2025-03-04T02:00-05:00,2,2",
        "e,moto,2024-03-03T22:00-05:00,2024-03-03T23:00-05:00,1,2",
        "f,moto,2026-03-03T22:00-05:00,2026-03-03T23:00-05:00,1,2",
    )
    site = folder.load()
    assert site.sessions.day.tolist() == [0, 0, 1, 2]
    assert site.sessions.arrival_step.tolist() == [0, 32, 36, 88]
    assert site.sessions.energy_kwh.tolist() == pytest.approx([1 * 2 / 28, 2.5, 6, 1])
    assert "4 of 6 sessions lie wholly or partly outside the series" in site.notes[-1]
    assert "row 4" in site.notes[-1]


def test_socket_holds_one_vehicle_until_its_departure_step(folder: Folder) -> None:
    day = "2025-03-03T"
    folder.sessions = [SESSIONS_HEADER] + [
        f"{name},{kind},{day}{start}-05:00,{day}{end}-05:00,0.2,2"
        for name, kind, start, end in (
            ("late", "moto", "12:01", "14:00"),  # the file need not be sorted
            ("a", "moto", "08:00", "10:01"),  # socket 0 until 10:15
            ("b", "moto", "08:00", "12:00"),  # socket 1
            ("c", "moto", "08:10", "09:00"),  # no socket left
            ("d", "moto", "10:10", "11:00"),  # socket 0 is free from 10:15 only
            ("e", "moto", "10:15", "11:00"),  # socket 0
            ("f", "mototaxi", "08:00", "09:00"),  # socket 2
            ("g", "mototaxi", "08:50", "09:30"),  # motos' free sockets are no help
        )
    ]
    site = folder.load()
    assert site.sessions.socket.tolist() == [0, 1, 2, 0, 0]
    assert site.sessions.arrival_step.tolist() == [32, 32, 32, 41, 48]
    assert site.turned_away.tolist() == [0, 0, 3]
    assert site.notes == (
        "sessions.csv.gz: 3 of 8 sessions found no free socket of their type and were turned away "
        "(the first: row 5)",
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(-1500, 4 * 1440), st.integers(1, 3000), st.floats(0.01, 3), st.booleans()
        ),
        min_size=1,
        max_size=30,
    )
)
def test_any_sessions_keep_the_promises(
    tmp_path_factory: pytest.TempPathFactory, stays: list[tuple[int, int, float, bool]]
) -> None:
    folder = Folder(tmp_path_factory.mktemp("site") / "s")
    origin = datetime(2025, 3, 1, tzinfo=ZoneInfo("America/Lima"))
    for i, (start, minutes, energy, taxi) in enumerate(stays):
        a = origin + timedelta(minutes=start)
        d = a + timedelta(minutes=minutes)
        kind = "mototaxi" if taxi else "moto"
        folder.add(f"s{i},{kind},{a.isoformat()},{d.isoformat()},{energy:.6f},2.2")
    site = folder.load()
    s = site.sessions
    assert np.all(np.lexsort((s.arrival_step, s.day)) == np.arange(len(s.day)))
    assert np.all((s.arrival_step >= 0) & (s.arrival_step < s.departure_step))
    assert np.all(s.departure_step <= 96)
    assert np.all((s.socket >= 0) & (s.socket < 3) & (s.day >= 0) & (s.day < 3))
    window_kwh = s.max_kw * 0.25 * (s.departure_step - s.arrival_step)
    assert np.all((s.energy_kwh > 0) & (s.energy_kwh <= 0.98 * window_kwh + 1e-12))
    held = np.zeros((3, 3, 96), dtype=int)
    for d, k, a, b in zip(s.day, s.socket, s.arrival_step, s.departure_step, strict=True):
        held[d, k, a:b] += 1
    assert held.max() <= 1
    total = 8.5 + sum(energy for _, _, energy, _ in stays)
    assert s.energy_kwh.sum() <= total + 1e-4


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
        assert load_site(path).notes == (
            f"site {path}: read the folder, not the shipped site iquitos",
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
    assert "a site folder holds site.yaml, series.csv.gz and sessions.csv.gz" in text
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
    ("pv_kwp", None, "pv_kwp: None is not a number from 0 to 1e+06 kWp"),
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
    ("held_out", 6, "held_out: 6 is not {every: 6, first: 6} or a list of dates such as"),
    ("held_out", [], "held_out: [] is not {every: 6, first: 6} or a list of dates such as"),
    ("held_out", ["sixth"], "held_out[0]: sixth is not a date such as 2025-01-06"),
    ("held_out", [5], "held_out[0]: 5 is not a date such as 2025-01-06"),
    (
        "held_out",
        ["2025-03-01", "2025-04-01"],
        "held_out[1]: 2025-04-01 is not a complete day of series.csv.gz, which has 2025-03-01 to "
        "2025-03-03",
    ),
    ("held_out.every", 1, "held_out.every: 1 is not a whole number from 2 to 10000"),
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
    ("", "site.yaml: None is not a mapping; the keys are name, "),
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
        ([], "series.csv.gz: has no rows; line 1 is the header time,pv_kw,load_kw,carbon_kg_"),
        ([SERIES_HEADER], "series.csv.gz: has no rows; line 1 is the header time,pv_kw"),
        (["time,pv_kw,load_kw"], "series.csv.gz: column carbon_kg_per_kwh is missing; the header"),
        (["time;pv_kw", "a;1"], "series.csv.gz: row 1 is not separated by commas; the header is"),
        ([SERIES_HEADER + ",price"], "series.csv.gz: column price is unknown; the header is time"),
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
        ("", "'' is empty; write 12.5"),
        ("abc", "abc is not a number; write 12.5"),
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
        ("1,-1,0.4", "column load_kw: -1 is negative; the building load is 0 kW or more"),
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
            "2025-03-01T06:00Z",
            "2025-03-01T06:00Z is not local time of America/Lima (timezone in site.yaml); the same "
            "instant there is 2025-03-01T01:00-05:00",
        ),
        ("2025-03-01T01:05-05:00", "is not on the 15-min grid (:00, :15, :30, :45)"),
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
    ("minutes", "expected"),
    [
        (
            60,
            "row 3, column time: 2025-03-01T01:00-05:00 comes after a gap: 3 rows are missing "
            "after 2025-03-01T00:00-05:00; the data are hourly: repeat each row until there is one "
            "every 15 min (287 such rows: 3, 4, 5, ...)",
        ),
        (
            30,
            "row 3, column time: 2025-03-01T00:30-05:00 comes after a gap: 1 rows are missing "
            "after 2025-03-01T00:00-05:00; the data are every 30 min: repeat each row until there "
            "is one every 15 min (287 such rows: 3, 4, 5, ...)",
        ),
        (
            5,
            "row 3, column time: 2025-03-01T00:05-05:00 is not on the 15-min grid (:00, :15, :30, "
            ":45); the data are every 5 min: average them over 15 min (192 such rows: 3, 4, 6, "
            "...)",
        ),
    ],
)
def test_a_series_of_another_step_is_called_that(
    folder: Folder, minutes: int, expected: str
) -> None:
    first = datetime.fromisoformat("2025-03-01T00:00-05:00")
    steps = (first + timedelta(minutes=minutes * i) for i in range(3 * 96))
    folder.set_times([step.isoformat(timespec="minutes") for step in steps])
    assert message(folder.load) == f"series.csv.gz: {expected}"


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
        "series.csv.gz: holds no complete day; at least one day from 00:00 to 24:00 in "
        "America/Lima is needed, 96 rows of 15 min"
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
            "2025-03-01T15:00-04:00",
            "2025-03-01T15:00-04:00 is not local time of America/Lima (timezone in site.yaml); "
            "the same instant there is 2025-03-01T14:00-05:00",
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
        ("max_kw", "fast", "fast is not a number; write 12.5"),
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
    folder.sessions = [row.replace("2025-", "2024-") for row in folder.sessions]
    assert message(folder.load) == (
        "sessions.csv.gz: none of the 2 sessions lies on a complete day of the series; row 2 "
        "arrives 2024-03-01T08:05-05:00"
    )
