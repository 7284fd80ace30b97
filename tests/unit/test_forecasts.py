"""What is known before its time: known ahead, forecast by a provider, and nothing else."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import yaml

from co2lightning.control.forecast import forecast
from co2lightning.errors import UserError
from co2lightning.sim.kept import digest_of
from co2lightning.site.load import load_site
from co2lightning.site.model import Objective, Provided, Site
from hand_site import hand_site
from small_site import small_site

CONFIG: dict[str, Any] = {
    "name": "known",
    "latitude": 52.5,
    "longitude": 13.4,
    "altitude_m": 40,
    "timezone": "Europe/Berlin",
    "grid_kw": 50,
    "seed": 1,
    "pv_kwp": 20,
    "battery": {
        **dict.fromkeys(("charge_efficiency", "discharge_efficiency"), 0.9),
        **dict.fromkeys(("soc_min", "start_soc_min"), 0),
        **dict.fromkeys(("soc_max", "start_soc_max"), 1),
        "capacity_kwh": 20,
        "power_kw": 10,
    },
}
BEGIN = datetime(2025, 3, 3, tzinfo=ZoneInfo("Europe/Berlin"))
STEPS = 5 * 168  # over the night of March 30th, which has one hour less
CARBON, PRICE = "carbon_kg_per_kwh", "price_per_kwh"


class Folder:
    """A folder of five weeks of hours, which a test changes in one place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(CONFIG))
        self.begin, self.minutes, self.steps = BEGIN, 60, STEPS
        self.columns = [CARBON, "pv_kw", "load_kw", PRICE, "export_price_per_kwh"]
        self.forecasts: list[str] | None = None
        self.name = "forecasts.csv"

    def time(self, place: float) -> str:
        time = self.begin.astimezone(UTC) + timedelta(minutes=self.minutes * place)
        return time.isoformat(timespec="minutes")

    def load(self, **more: Any) -> Site:
        rng = np.random.default_rng(1)
        self.path.mkdir(exist_ok=True)
        (self.path / "site.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))
        lines = [",".join(["time", *self.columns])]
        for place in range(self.steps):
            carbon, price = rng.uniform(0.1, 0.6, 2).round(4)
            cells = dict(zip(self.columns, (carbon, 3.0, 5.0, price, -0.1), strict=False))
            lines.append(",".join([self.time(place), *map(str, cells.values())]))
        (self.path / "series.csv").write_text("\n".join(lines) + "\n")
        if self.forecasts is not None:
            text = "\n".join(self.forecasts) + "\n"
            data = text.encode()
            data = gzip.compress(data, 1) if self.name.endswith(".gz") else data
            (self.path / self.name).write_bytes(data)
        return load_site(self.path, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "site")


def message(load: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        load()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


# --- known ahead ---------------------------------------------------------------------------------


def end_known(now: datetime, since: str, zone: ZoneInfo) -> datetime:
    """Work out by the calendar until when a column is known."""
    local = now.astimezone(zone)
    days = 2 if local.strftime("%H:%M") >= since else 1
    day = local.date() + timedelta(days=days)
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)


@pytest.mark.parametrize("month", [3, 10])
def test_known_ahead_to_the_end_of_the_next_day_also_where_clocks_change(
    folder: Folder, month: int
) -> None:
    zone = ZoneInfo("Europe/Berlin")
    folder.begin = datetime(2025, month, 3, tzinfo=zone)
    folder.config["known_ahead"] = {PRICE: "13:00"}
    site, plain = folder.load(), None
    expected, price = forecast(site, PRICE), site.price_per_kwh
    plain = forecast(replace(site, known_ahead={}), PRICE)
    assert price is not None
    counted = set[int]()
    for place in range(site.n_steps - 48):
        now = site.when(place).astimezone(UTC)
        hours = round((end_known(now, "13:00", zone) - now) / timedelta(hours=1))
        leads = min(hours - 1, 48)
        assert expected[place, :leads].tolist() == price[place + 1 : place + 1 + leads].tolist()
        assert (expected[place, leads:] == plain[place, leads:]).all()
        if site.when(place).hour in (12, 13):
            counted.add(hours)
    # By calendar: 12 and 35 h, one more or less around the day on which clocks change.
    more = -1 if month == 3 else 1
    assert {12, 35, 35 + more} <= counted <= {12, 35, 35 + more, 12 + more}


def test_a_minute_decides(folder: Folder) -> None:
    folder.minutes = 15
    folder.steps = 4 * 168 * 4
    noon = 4 * 12
    for since, first in (("13:00", 4), ("12:59", 4), ("13:01", 5), ("12:46", 4), ("12:45", 3)):
        folder.config["known_ahead"] = {PRICE: since}
        site = folder.load()
        price = site.price_per_kwh
        assert price is not None
        expected = forecast(site, PRICE)
        tomorrow = np.arange(4 * 24, 8 * 24)  # of the first day
        known = [
            bool((expected[place, tomorrow[:90] - place - 1] == price[tomorrow[:90]]).all())
            for place in range(noon, noon + 8)
        ]
        assert known.index(True) == first, since
        assert all(known[first:])


def test_a_tariff_is_always_known(folder: Folder) -> None:
    folder.config["known_ahead"] = {PRICE: "always", "export_price_per_kwh": "always"}
    site = folder.load()
    expected, price = forecast(site, PRICE), site.price_per_kwh
    assert price is not None
    assert expected[0].tolist() == price[1:49].tolist()
    assert expected[-10, :9].tolist() == price[-9:].tolist()
    assert np.isfinite(expected).all()


def test_what_is_known_stays_known_when_clocks_go_back(folder: Folder) -> None:
    """Told at 02:30 on the night that has 02:30 twice: between the two it is known, too."""
    folder.begin = datetime(2025, 10, 6, tzinfo=ZoneInfo("Europe/Berlin"))
    folder.minutes, folder.steps = 30, 4 * 168 * 2
    folder.config["known_ahead"] = {PRICE: "02:30"}
    site = folder.load()
    first = next(p for p in range(site.n_steps) if site.when(p).isoformat()[:10] == "2025-10-26")
    price, expected = site.price_per_kwh, forecast(site, PRICE)
    assert price is not None
    for place, known in ((first + 4, False), (first + 5, True), (first + 6, True)):
        late = first + 60 - place - 1  # tomorrow
        assert (expected[place, late] == price[first + 60]) == known


def test_of_short_steps_a_lead_is_known_when_all_its_steps_are() -> None:
    rng = np.random.default_rng(1)
    shape = (3, 288)
    site = small_site(days=3, step_minutes=5, price=rng.random(shape), capacity_kwh=1.0)
    known = replace(site, known_ahead={PRICE: "24:00"})  # never tomorrow
    price, own, told = site.price_per_kwh, forecast(site, PRICE), forecast(known, PRICE)
    assert price is not None
    place = 288 - 8  # 23:20: of 13 leads' steps, seven of today are left
    assert told[place, :2] == pytest.approx([price[281:284].mean(), price[284:287].mean()])
    assert told[place, 2:].tolist() == own[place, 2:].tolist()


def test_a_mixed_objective_keeps_what_is_known_of_either(folder: Folder) -> None:
    folder.config["known_ahead"] = {PRICE: "13:00", "export_price_per_kwh": "13:00"}
    site = folder.load(objective={"co2": 0.5, "cost": 2.0})
    both = forecast(site, "import_price")
    parts = forecast(site, CARBON), forecast(site, PRICE)
    assert both == pytest.approx(0.5 * parts[0] + 2.0 * parts[1])
    other = replace(site, known_ahead={})
    assert not np.allclose(both[20], forecast(other, "import_price")[20])
    # A credit below 0 is none: what is known of it is that.
    assert (forecast(site, "export_credit")[20, :20] == 0.0).all()


def test_a_known_export_credit_is_in_the_objectives_unit() -> None:
    rng = np.random.default_rng(1)
    earns = rng.random((5, 96))
    site = small_site(
        days=5, price=2.0, export_price=earns, objective=Objective(1.0, 3.0), capacity_kwh=1.0
    )
    told = replace(site, known_ahead={"export_price_per_kwh": "always"})
    assert forecast(told, "export_credit")[0].tolist() == site.export_credit[1:193].tolist()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({PRICE: 780}, 'known_ahead.price_per_kwh: 780 is not a local time in quotes such as "13'),
        ({PRICE: "25:00"}, "known_ahead.price_per_kwh: 25:00 is not"),
        ({PRICE: "9:00"}, "known_ahead.price_per_kwh: 9:00 is not"),
        ({PRICE: None}, "known_ahead.price_per_kwh: is empty, not"),
        ({"price": "13:00"}, "known_ahead.price is unknown; the keys are carbon_kg_per_kwh, pv_kw"),
        ("13:00", "known_ahead: 13:00 is not a mapping"),
    ],
)
def test_what_cannot_be_known_ahead(folder: Folder, value: object, expected: str) -> None:
    folder.config["known_ahead"] = value
    assert message(folder.load).startswith(f"site.yaml: {expected}")


def test_a_column_that_is_not_there_is_not_known(folder: Folder) -> None:
    folder.config["known_ahead"] = {"export_price_per_kwh": "always"}
    folder.columns = folder.columns[:-1]
    assert message(folder.load) == (
        "site.yaml: known_ahead.export_price_per_kwh: series.csv has no such column; add it, or "
        "remove the key"
    )


# --- a provider's file ---------------------------------------------------------------------------

HEADER = f"issued,time,{CARBON}"


def some_rows(folder: Folder) -> list[str]:
    return [HEADER, *(f"{folder.time(0)},{folder.time(p)},0.{p}" for p in range(1, 6))]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{6},{5},0.3", "row 7, column issued: {6} is after the time it is about"),
        ("{0},{5.5},0.3", "row 7, column time: {5.5} is no step of the series, which begin every"),
        ("{0},{6},high", "row 7, column carbon_kg_per_kwh: high is not a number; write one, or"),
        ("{0},{6},nan", "row 7, column carbon_kg_per_kwh: nan is not a finite number"),
        ("{0},{6},1e300", "row 7, column carbon_kg_per_kwh: 1e300 is beyond all reason"),
        ("{0},{3},0.3", "row 7, column time: is there twice from one issue, first in row 4"),
        ("yesterday,{6},0.3", "row 7, column issued: yesterday is not a time"),
        ("{0},2025-03-04T00:00,0.3", "row 7, column time: 2025-03-04T00:00 has no UTC offset"),
        ("{0},,0.3", "row 7, column time: '' is empty"),
        ("{0},{6}", "row 7 has 2 values; the header has 3"),
    ],
)
def test_a_broken_row_is_told(folder: Folder, row: str, expected: str) -> None:
    def filled(text: str) -> str:
        for place in (0, 3, 5, 5.5, 6):
            text = text.replace("{" + str(place) + "}", folder.time(place))
        return text

    folder.forecasts = [*some_rows(folder), filled(row)]
    told = message(folder.load)
    assert told.startswith(f"forecasts.csv: {filled(expected)}")
    if "begin every" in told:
        began = np.datetime64(
            datetime.fromisoformat(folder.time(0)).astimezone(UTC).replace(tzinfo=None)
        )
        assert f"min from {began.astype('datetime64[m]')}Z on" in told


def test_a_broken_file_is_told(folder: Folder) -> None:
    rows = some_rows(folder)
    for header, expected in (
        (f"issued,at,{CARBON}", "column time is missing"),
        (f"time,until,{CARBON}", "column issued is missing"),
        ("issued,time,carbon", "has none of the columns carbon_kg_per_kwh, pv_kw, load_kw, price"),
    ):
        folder.forecasts = [header, *rows[1:]]
        assert message(folder.load).startswith(f"forecasts.csv: {expected}")
    folder.forecasts = [HEADER]
    assert message(folder.load).startswith("forecasts.csv: has no rows")
    folder.forecasts, folder.name = rows, "forecasts.csv.gz"
    assert "forecasts.csv is there too" in message(folder.load)


def test_rows_about_other_times_are_counted(folder: Folder) -> None:
    before, after = (f"{folder.time(-5)},{folder.time(place)},0.3" for place in (-2, STEPS + 3))
    later = f"{folder.time(STEPS)},{folder.time(STEPS + 48)},0.3"
    folder.forecasts = [*some_rows(folder), before, after, later]
    site = folder.load()
    assert any("forecasts.csv: 3 of 8 rows" in note and "row 7" in note for note in site.notes)
    assert (site.provided[CARBON].key >> 32).tolist() == [1, 2, 3, 4, 5, STEPS + 3]


def test_what_the_site_has_not_is_left_out(folder: Folder) -> None:
    folder.columns = folder.columns[:1]
    del folder.config["pv_kwp"]
    rows = some_rows(folder)
    folder.forecasts = [f"{rows[0]},{PRICE},pv_kw,hint", *(f"{row},0.2,1,no" for row in rows[1:])]
    site = folder.load()
    assert list(site.provided) == [CARBON]
    for words in ("column hint is not read", "column price_per_kwh is not", "column pv_kw is not"):
        assert any(words in note for note in site.notes), words


def test_empty_cells_say_nothing(folder: Folder) -> None:
    folder.forecasts = [
        f"{HEADER},load_kw,{PRICE}",
        f"{folder.time(0)},{folder.time(2)},0.3,,",
        f"{folder.time(1)},{folder.time(2)},,7,",
    ]
    site = folder.load()
    assert {name: said.value.tolist() for name, said in site.provided.items()} == {
        CARBON: [pytest.approx(0.3)],
        "load_kw": [7.0],
    }


def test_the_file_is_part_of_the_site_and_what_if_scales_its_sun(folder: Folder) -> None:
    digests = {folder.load().sha256}
    folder.forecasts = [
        "issued,time,pv_kw",
        *(f"{folder.time(p - 1)},{folder.time(p)},4" for p in range(1, 9)),
    ]
    digests.add((site := folder.load()).sha256)
    assert set(site.provided["pv_kw"].value.tolist()) == {4.0}
    what_if = folder.load(changes={"pv_kwp": 50})
    assert set(what_if.provided["pv_kw"].value.tolist()) == {10.0}
    folder.forecasts[-1] = folder.forecasts[-1][:-1] + "5"
    digests.add(folder.load().sha256)
    assert len(digests) == 3


def test_a_long_file_is_read_in_pieces(folder: Folder) -> None:
    """Of more than one piece: what is wrong late in it is told with its row."""
    times = [folder.time(place) for place in range(STEPS)]
    issues = [
        (datetime.fromisoformat(times[0]) - timedelta(minutes=m)).isoformat(timespec="minutes")
        for m in range(250)
    ]
    rows = [f"{issued},{time},0.25" for issued in issues for time in times]
    folder.forecasts, folder.name = [HEADER, *rows], "forecasts.csv.gz"
    assert sum(map(len, rows)) > 8 * 1024**2
    site = folder.load()
    assert len(site.provided[CARBON].key) == len(rows)
    said = site.provided[CARBON].newest(np.array([700]), np.array([site.begin_s - 5 * 60]))
    assert (said[0].tolist(), said[1].tolist()) == ([0.25], [0.0])
    folder.forecasts[-1] = folder.forecasts[-1][:-4] + "much"
    expected = f"forecasts.csv.gz: row {len(rows) + 1}, column carbon_kg_per_kwh: much is not"
    assert message(folder.load).startswith(expected)
    folder.forecasts[-1] = folder.forecasts[5]
    assert f"row {len(rows) + 1}, column time: is there twice" in message(folder.load)


def test_what_is_known_is_part_of_what_results_are_kept_under() -> None:
    site = weeks()
    told = with_rows(site, truth(site))
    own = told.provided[CARBON]
    other = Provided(own.key, own.value + np.float32(0.01))
    sites = [
        *(site, told, replace(site, provided={CARBON: other})),
        *(replace(site, known_ahead={CARBON: since}) for since in ("13:00", "always")),
    ]
    assert len({digest_of(one) for one in sites}) == len(sites)


# --- a provider's word ---------------------------------------------------------------------------


def weeks(step_minutes: int = 60) -> Site:
    """Nine weeks, the third and sixth held out, of a carbon that one cannot forecast."""
    rng = np.random.default_rng(7)
    steps = 9 * 168 * 60 // step_minutes
    return hand_site(
        steps,
        step_minutes=step_minutes,
        carbon=rng.uniform(0.1, 0.6, steps),
        stretches=[(14, 21), (35, 42)],
    )


def with_rows(site: Site, said: np.ndarray, every: int = 1, reach: int = 24) -> Site:
    """The site with a forecast each so many steps, of the next `reach` ones; said is [P, P + r]."""
    issue = np.repeat(np.arange(0, site.n_steps, every), reach)
    about = issue + np.tile(np.arange(1, reach + 1), len(issue) // reach)
    return rows_of(site, issue, about, said[issue, about - issue])


def rows_of(site: Site, issue: np.ndarray, about: np.ndarray, said: np.ndarray) -> Site:
    key = about << 32 | (site.begin_s + issue * site.step_minutes * 60)
    order = np.argsort(key)
    own = Provided(key[order], said[order].astype(np.float32))
    return replace(site, provided={CARBON: own})


def truth(site: Site, reach: int = 24) -> np.ndarray:
    """What comes so many steps later, [P, reach + 1]."""
    padded = np.append(site.carbon_kg_per_kwh, np.full(reach, 0.35))
    return np.stack([padded[k : k + site.n_steps] for k in range(reach + 1)], axis=1)


def off(site: Site, expected: np.ndarray, lead: int) -> float:
    """Mean absolute error on held-out steps."""
    held_out = ~site.training_steps[lead:]
    error = np.abs(expected[:-lead, lead - 1] - site.carbon_kg_per_kwh[lead:])
    return float(error[held_out].mean())


def test_a_good_provider_is_believed_and_a_bad_one_is_not() -> None:
    site, rng = weeks(), np.random.default_rng(1)
    own, says = forecast(site, CARBON), truth(site)
    noise = rng.uniform(-0.3, 0.3, says.shape)
    for said, lowest, highest in (
        (says, 0.0, 0.02),
        (1000.0 * says - 5.0, 0.0, 0.1),  # in other units
        (0.7 - says, 0.0, 0.2),  # the other way round
        (says + noise, 0.3, 0.8),
        (0.35 + noise, 0.99, 1.03),  # knows nothing
    ):
        told = forecast(with_rows(site, said), CARBON)
        for lead in (1, 6, 24):
            assert lowest <= off(site, told, lead) / off(site, own, lead) <= highest
        assert (told[:, 24:] == own[:, 24:]).all()  # of which it says nothing


def test_where_issues_are_rare_their_age_counts() -> None:
    """Each day's forecast gets worse by the hour: an old one is believed less."""
    site, rng = weeks(), np.random.default_rng(1)
    said = truth(site, 48) + rng.normal(0.0, 0.012 * np.arange(49), (site.n_steps, 49))
    told = with_rows(site, said, every=24, reach=48)
    expected = forecast(told, CARBON)
    held_out = ~site.training_steps[1:]
    error = np.abs(expected[:-1, 0] - site.carbon_kg_per_kwh[1:])
    age = np.arange(site.n_steps - 1) % 24
    fresh, old = (float(error[held_out & some].mean()) for some in (age < 4, age >= 20))
    assert fresh < 0.5 * old
    own = forecast(site, CARBON)
    usual = np.abs(own[:-1, 0] - site.carbon_kg_per_kwh[1:])
    assert old < 0.95 * usual[held_out & (age >= 20)].mean()


def test_an_issue_older_than_any_on_training_days_is_not_believed() -> None:
    """Issued each hour, but for half a day of a held-out week."""
    site = weeks()
    begin = int(site.stretch_bounds[0, 0]) + 30
    issue = np.repeat(np.arange(site.n_steps), 24)
    about = issue + np.tile(np.arange(1, 25), site.n_steps)
    there = (issue < begin) | (issue >= begin + 12)
    told = rows_of(site, issue[there], about[there], truth(site)[issue, about - issue][there])
    own, expected = forecast(site, CARBON), forecast(told, CARBON)
    assert (expected[begin : begin + 12] == own[begin : begin + 12]).all()
    assert (expected[begin + 12, :24] != own[begin + 12, :24]).all()


def test_too_few_rows_to_judge_are_not_believed() -> None:
    site = weeks()
    issue = np.arange(30, 90)
    few = rows_of(site, issue, issue + 1, truth(site)[issue, 1])
    assert (forecast(few, CARBON) == forecast(site, CARBON)).all()


def test_the_newest_row_that_is_issued_by_now_counts() -> None:
    site = weeks()
    said, lead = truth(site), 3
    told = with_rows(site, said)
    base = forecast(told, CARBON)
    place = int(site.stretch_bounds[0, 0]) + 60
    about, own = place + lead, told.provided[CARBON]
    for issued, seen in ((0, True), (1, False), (-1, False)):
        changed = own.value.copy()
        second = site.begin_s + (place + issued) * 3600
        changed[own.key == (about << 32 | second)] = 9.0
        other = forecast(replace(told, provided={CARBON: Provided(own.key, changed)}), CARBON)
        assert (other[place, lead - 1] != base[place, lead - 1]) == seen
        # Nobody else's forecast follows from it, whenever it was issued: it is held out.
        assert (np.delete(other, place + issued, 0) == np.delete(base, place + issued, 0)).all()


def test_nothing_after_now_and_nothing_held_out_for_the_fit() -> None:
    site = weeks()
    told = with_rows(site, truth(site) + np.random.default_rng(1).normal(0, 0.1, (1512, 25)))
    begin, end = site.stretch_bounds[0].tolist()
    base, own = forecast(told, CARBON), told.provided[CARBON]
    place, carbon = begin + 50, site.carbon_kg_per_kwh.copy()
    issued_s, about = own.key & (1 << 32) - 1, own.key >> 32
    issued = (issued_s - site.begin_s) // 3600
    carbon[place + 1 : end] = 5.0
    value = own.value.copy()
    # Whatever is said later, or of held-out steps, or in them of later ones.
    later = (issued > place) & (issued < end) | (issued > place) & (about >= place) & (about < end)
    value[later] = 5.0
    poisoned = replace(told, carbon_kg_per_kwh=carbon, provided={CARBON: Provided(own.key, value)})
    other = forecast(poisoned, CARBON)
    assert other[: place + 1] == pytest.approx(base[: place + 1], abs=1e-8)  # sums round otherwise
    assert (other[place + 1] != base[place + 1]).all()
    # What training steps tell is the same, so all is again as before a week later.
    assert other[end + 169 + 24 :] == pytest.approx(base[end + 169 + 24 :], abs=1e-8)
    # It can fail: training rows are looked at.
    value = own.value.copy()
    value[(issued > end + 200) & (issued < end + 300)] = 0.0
    fitted = forecast(replace(told, provided={CARBON: Provided(own.key, value)}), CARBON)
    assert not np.isclose(fitted[place], base[place]).all()


def test_a_provider_counts_beside_a_known_price() -> None:
    site = weeks()
    rng = np.random.default_rng(1)
    told = with_rows(site, truth(site))
    mixed = replace(
        told,
        price_per_kwh=rng.random(site.n_steps),
        known_ahead={PRICE: "always"},
        objective=Objective(1.0, 0.5),
    )
    expected = forecast(mixed, "import_price")
    held_out = np.flatnonzero(~site.training_steps)[:100]
    for lead in (1, 12):
        wanted = mixed.import_price[held_out + lead]
        assert expected[held_out, lead - 1] == pytest.approx(wanted, abs=2e-2)


def test_a_provider_of_longer_steps_speaks_of_the_lead() -> None:
    """Steps of 5 min, a row for each quarter of an hour: the last one within the lead counts."""
    site = weeks(5)
    values = site.carbon_kg_per_kwh.reshape(-1, 3)
    values[:] = values[:, :1]  # the same for a quarter of an hour
    issue = np.arange(0, site.n_steps - 6, 3)
    told = rows_of(site, issue, issue + 3, site.carbon_kg_per_kwh[issue + 3])
    expected = forecast(told, CARBON)
    place = int(site.stretch_bounds[0, 0]) + 30
    assert place % 3 == 0
    assert expected[place, 0] == pytest.approx(site.carbon_kg_per_kwh[place + 3], abs=2e-2)
    assert np.isfinite(expected).all()
