"""`co2lightning site check`: a folder told, and what it is worth without training."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn
from zoneinfo import ZoneInfo

import pytest

from co2lightning.sim import kept
from co2lightning.sim.optimum import Best
from conftest import Outcome, tree
from small_site import HELD_OUT, write_site

Command = Callable[..., Outcome]
SITES = Path(__file__).parents[1] / "sites"
# Kilograms a day of the held-out weeks, as published with the definitions.
KG_A_DAY = {
    "citylearn-5": {
        "uncontrolled": 10.66,
        "rbc_a": 7.42,
        "rbc_b": 7.42,
        "rbc_c": 7.42,
        "optimum": 6.98,
    },
    "caltech-2019": {
        "uncontrolled": 54.66,
        "rbc_a": 54.66,
        "rbc_b": 69.92,
        "cheap": 50.57,
        "rbc_c": 50.57,
        "cheap_true": 45.35,
        "rbc_c_true": 45.35,
        "optimum": 45.35,
    },
}


@pytest.fixture
def village(place: Path) -> Path:
    return write_site(place / "village")


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return what stands on standard output, which must be one JSON object without NaN."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is no JSON")

    assert (outcome.code, len(outcome.out.splitlines())) == (0, 1), outcome.err
    return json.loads(outcome.out, parse_constant=refuse)


def write_folder(
    directory: Path, *, zone: str, begin: str, hours: int, equipment: str, pv: bool = False
) -> Path:
    """Write a site of steps of an hour, dirtier by night, from a local time on."""
    directory.mkdir()
    (directory / "site.yaml").write_text(
        f"name: {directory.name}\nlatitude: 0\nlongitude: 0\naltitude_m: 0\n"
        f"timezone: {zone}\ngrid_kw: 100\nseed: 1\n{equipment}"
    )
    first = datetime.fromisoformat(begin).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
    rows = ["time,carbon_kg_per_kwh,load_kw" + ",pv_kw" * pv]
    for hour in range(hours):
        time = (first + timedelta(hours=hour)).astimezone(ZoneInfo(zone))
        dark = not 7 <= time.hour < 19
        rows.append(f"{time.isoformat()},{0.6 if dark else 0.3},4" + f",{0 if dark else 8}" * pv)
    (directory / "series.csv").write_text("\n".join(rows) + "\n")
    return directory


BATTERY = (
    "battery: {capacity_kwh: 20, power_kw: 10, charge_efficiency: 0.9, discharge_efficiency: 0.9, "
    "soc_min: 0, soc_max: 1, start_soc_min: 0, start_soc_max: 1}\n"
)


@pytest.mark.parametrize("name", KG_A_DAY)
def test_the_published_figures_come_out(command: Command, place: Path, name: str) -> None:
    """Without what a provider forecast, which changes the rules that look ahead."""
    shutil.copytree(SITES / name, place / name)
    (place / name / "forecasts.csv.gz").unlink(missing_ok=True)
    true = ("--env.announced", "false")
    told = as_json(command("site", "check", name, "--json", *true))
    assert (told["known_ahead"], told["provider"]) == ({}, {})
    policies = told["policies"]
    assert list(policies) == list(KG_A_DAY[name])
    kg = {policy: own["co2_kg_per_day"] for policy, own in policies.items()}
    assert kg == pytest.approx(KG_A_DAY[name], rel=1e-3)
    hours = sum(stretch["hours"] for stretch in told["stretches"])
    for policy in policies.values():
        total_kg = sum(stretch["co2_kg"] for stretch in policy["stretches"])
        assert total_kg / hours * 24 == pytest.approx(policy["co2_kg_per_day"], abs=1e-4)
        assert policy["unmet_kwh_per_day"] == pytest.approx(0.0, abs=1e-3)
        for own, best in zip(policy["stretches"], policies["optimum"]["stretches"], strict=True):
            assert own["co2_kg"] >= best["co2_kg"] - 1e-3
    settled_kg = [stretch["settlement"] for stretch in policies["uncontrolled"]["stretches"]]
    assert settled_kg == pytest.approx([0.0] * len(settled_kg), abs=1e-3)
    assert told["summary"]["optimum"]["gap_closed"] == 1.0
    assert told["what_if"] == {}


def test_what_a_workplace_holds(command: Command) -> None:
    """Counted by the second calculation from the raw files, which shares no code with this."""
    told = as_json(command("site", "check", str(SITES / "caltech-2019"), "--json"))
    assert (told["site"], told["step_minutes"], told["days"]) == ("caltech-2019", 15, 244)
    assert (told["begin"], told["end"]) == ("2019-05-01T00:00-07:00", "2020-01-01T00:00-08:00")
    assert (told["day_start"], told["days_by_hours"]) == (5, {"24": 243, "25": 1})
    assert len(told["stretches"]) == 11
    # Of the site's own regression and of persistence, by lead.
    (carbon,) = told["forecasts"].values()
    off = [(row["lead_h"], row["own"], row["persistence"]) for row in carbon]
    assert off[:2] == [
        pytest.approx(row, rel=0.03) for row in ((0.25, 0.035, 0.039), (1, 0.053, 0.062))
    ]
    assert [row[0] for row in off] == [0.25, 1.0, 6.0, 24.0]
    # The provider reaches 165 min; at its word it is worse than the site's own, beside it it helps.
    rows = {row["lead_h"]: row for row in told["provider"]["carbon_kg_per_kwh"]}
    assert list(rows) == [0.25, 1.0, 2.0]
    for lead, word, alone in ((0.25, 0.054, 0.035), (1.0, 0.068, 0.053)):
        row = rows[lead]
        assert (row["provider"], row["own"]) == pytest.approx((word, alone), rel=0.03)
        assert row["both"] < row["own"] < min(row["persistence"], row["provider"])
        assert row["share"] == 1.0
    first = told["stretches"][0]
    assert (first["begin"], first["days"], first["hours"]) == ("2019-05-15", 7, 168)
    assert (told["battery"], told["pv"], told["load"]) == (None, None, None)
    assert told["sockets"] == [{"name": "evse", "count": 54, "max_kw": 6.656, "min_kw": 0.0}]
    sessions = told["sessions"]
    counts = [sessions[key] for key in ("rows", "dropped", "clipped", "turned_away", "admitted")]
    assert counts == [6704, 1, 17, 0, 6703]
    parts = ("admitted_kwh", "clipped_kwh", "dropped_kwh", "turned_away_kwh")
    assert sum(sessions[key] for key in parts) == pytest.approx(sessions["kwh"], abs=1e-3)
    assert sessions["share_across_day_start"] < sessions["share_across_midnight"] < 0.1
    carbon = told["carbon"]
    by_hour = carbon["by_hour_kg_per_kwh"]
    assert by_hour[carbon["lowest_hour"]] == min(by_hour) < carbon["mean_kg_per_kwh"] < max(by_hour)
    assert any("98 %" in remark for remark in told["remarks"])


def test_the_same_in_words(command: Command, village: Path) -> None:
    outcome = command("site", "check", "village")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].rstrip() == "site village"
    text = " ".join(outcome.out.split())
    for words in (
        "2025-03-01 00:00 to 2025-03-07 00:00, UTC",
        "576 of 15 min",
        "6 from 00:00 to 00:00; 0 whole weeks",
        f"3 held-out days from {', '.join(HELD_OUT)}",
        "50 kWh, 20 kW, SoC 0.1 to 0.9",
        "3 moto of 4 kW",
        "40 kWp, 141.0 kWh a day, at most 26.0 kW",
        "120.0 kWh a day, 5.0 to 5.0 kW",
        "0.450 kg/kWh in the mean; least from 00:00, 0.400, most from 18:00, 0.600",
        "18 rows, 126.0 kWh",
        "18, 126.0 kWh; 3.0 a day, at most 2 at once",
        "Without training, on 3 held-out days of village (2025-03-02 to 2025-03-05)",
    ):
        assert words in text
    # Too few for an interval: each is shown.
    assert "±" not in outcome.out
    for day in HELD_OUT:
        assert sum(day in line for line in lines) >= 2


def test_costs_stand_beside_co2_and_what_is_settled_is_named(command: Command, place: Path) -> None:
    write_site(place / "shop", currency="EUR")
    by_cost = ("--env.objective", "cost")
    of_cost, of_co2 = (
        as_json(command("site", "check", "shop", "--json", *words)) for words in (by_cost, ())
    )
    assert of_cost["summary"]["optimum"]["cost"] < of_co2["summary"]["optimum"]["cost"]
    assert of_cost["summary"]["optimum"]["co2_kg"] > of_co2["summary"]["optimum"]["co2_kg"]
    for words, against in ((by_cost, "EUR/day"), ((), "kg/day")):
        lines = command("site", "check", "shop", *words).out.splitlines()
        at = next(i for i, line in enumerate(lines) if "against RBC C" in line)
        cells = [cell.strip() for cell in lines[at + 1].split("┃")][2:5]
        assert cells == ["kg/day", "EUR/day", against]
    outcome = command("site", "check", "shop", *by_cost, "--figures", "drawn")
    assert outcome.code == 0
    price = of_cost["price"]
    assert (price["currency"], price["lowest_hour"], price["highest_hour"]) == ("EUR", 18, 0)
    told = (
        "0.25 EUR/kWh in the mean, 0.1 to 0.3; least from 18:00, 0.1, most from 00:00, 0.3; export"
    )
    assert told in " ".join(outcome.out.split())


def test_what_is_known_before_its_time_is_told(command: Command, place: Path) -> None:
    folder = write_site(place / "shop", currency="EUR")
    plain = as_json(command("site", "check", "shop", "--json"))
    with (folder / "site.yaml").open("a") as file:
        file.write('known_ahead: {price_per_kwh: "13:00"}\n')
    rows = [
        f"2025-03-0{day}T00:00Z,2025-03-0{day}T{hour:02d}:{minute}Z,{hour}"
        for day in range(1, 7)
        for hour in range(24)
        for minute in ("00", "15", "30", "45")
    ]
    (folder / "forecasts.csv").write_text("\n".join(["issued,time,pv_kw", *rows]) + "\n")
    told = as_json(command("site", "check", "shop", "--json"))
    assert told["known_ahead"] == {"price_per_kwh": "13:00"}
    assert [row["lead_h"] for row in told["provider"]["pv_kw"]] == [0.25, 1.0, 2.0, 6.0]
    price = {row["lead_h"]: row["own"] for row in told["forecasts"]["price_per_kwh"]}
    assert (
        price[0.25] < 0.01 * max(row["own"] for row in plain["forecasts"]["price_per_kwh"]) + 0.01
    )
    shown = " ".join(command("site", "check", "shop").out.split())
    assert "known ahead price_per_kwh of tomorrow from 13:00 on" in shown
    assert "at its word" in shown
    (folder / "forecasts.csv").write_text(
        "issued,time,pv_kw\n2025-03-02T00:00Z,2025-03-01T00:00Z,1"
    )
    outcome = command("site", "check", "shop")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(
        "error: forecasts.csv: row 2, column issued: 2025-03-02T00:00Z is after"
    )
    assert len(outcome.err.splitlines()) == 1


def test_carbon_that_never_changes_has_no_cleanest_hour(command: Command, village: Path) -> None:
    series = village / "series.csv"
    header, *rows = series.read_text().splitlines()
    at = header.split(",").index("carbon_kg_per_kwh")
    cells = [row.split(",") for row in rows]
    constant = [",".join([*row[:at], "0.4", *row[at + 1 :]]) for row in cells]
    series.write_text("\n".join([header, *constant]))
    outcome = command("site", "check", "village")
    assert outcome.code == 0
    assert "0.400 kg/kWh at every hour" in outcome.out


def test_what_if_touches_no_file(command: Command, village: Path) -> None:
    before = tree(village)
    plain = as_json(command("site", "check", "village", "--json"))
    words = ("--battery.capacity_kwh", "100", "--pv_kwp", "80", "--grid_kw", "60")
    changed = as_json(command("site", "check", "village", "--json", *words))
    assert tree(village) == before
    assert changed["what_if"] == {"battery.capacity_kwh": 100, "pv_kwp": 80, "grid_kw": 60}
    assert changed["battery"] == {**plain["battery"], "capacity_kwh": 100}
    assert changed["pv"]["kwh_per_day"] == pytest.approx(2 * plain["pv"]["kwh_per_day"])
    for policy in ("uncontrolled", "optimum"):
        kg = [told["policies"][policy]["co2_kg_per_day"] for told in (changed, plain)]
        assert kg[0] < kg[1]
    shown = command("site", "check", "village", *words).out
    for remark in ("battery.capacity_kwh", "pv_kwp", "grid_kw"):
        assert f"as if {remark} were" in shown


def test_a_site_that_turns_most_vehicles_away_is_called_so(command: Command, village: Path) -> None:
    site = (village / "site.yaml").read_text()
    (village / "site.yaml").write_text(site.replace("count: 3", "count: 1"))
    header, *rows = (village / "sessions.csv").read_text().splitlines()
    twins = [f"{i}-{row}" for row in rows for i in range(4)]
    (village / "sessions.csv").write_text("\n".join([header, *twins]) + "\n")
    told = as_json(command("site", "check", "village", "--json"))
    sessions = told["sessions"]
    assert sessions["turned_away"] > sessions["admitted"]
    assert all(stretch["turned_away_kwh"] > 0 for stretch in told["stretches"])
    shown = " ".join(command("site", "check", "village").out.split())
    assert "most vehicles are turned away" in shown
    assert "kWh/day are turned away, for want of a free socket" in shown


def test_parts_that_are_absent_and_days_that_clocks_cut(command: Command, place: Path) -> None:
    """A battery by itself, an hour a step, over the last Sunday of March."""
    equipment = f"{BATTERY}held_out: {{every: 3, first: 2}}\n"
    begin = "2025-03-28"
    site = write_folder(
        place / "cellar", zone="Europe/Berlin", begin=begin, hours=24 * 8 - 1, equipment=equipment
    )
    told = as_json(command("site", "check", site.name, "--json"))
    assert (told["step_minutes"], told["days_by_hours"]) == (60, {"23": 1, "24": 7})
    assert (told["sessions"], told["sockets"], told["pv"]) == (None, [], None)
    assert told["summary"]["rbc_b"]["self_consumption"] is None
    assert told["load"]["kwh_per_day"] == pytest.approx(96)
    text = command("site", "check", site.name).out
    assert "8 from 00:00 to 00:00, of them 1 of 23 h; 1 whole week" in text
    assert "self-con" not in text


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_figures(command: Command, village: Path, words: tuple[str, ...]) -> None:
    outcome = command("site", "check", "village", "--figures", "drawn", *words)
    assert outcome.code == 0
    names = [
        f"{stem}.{kind}" for stem in ("site_day", "site_references") for kind in ("png", "pdf")
    ]
    assert sorted(path.name for path in Path("drawn").iterdir()) == sorted(names)
    for name in names:
        content = (Path("drawn") / name).read_bytes()
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"%PDF")
        assert len(content) > 5000
        assert f"drawn/{name}" in (outcome.err if words else outcome.out)
    if words:
        as_json(outcome)


def test_figures_leave_out_what_a_site_has_not(command: Command, place: Path) -> None:
    """Load and carbon alone make a lower figure than with PV."""
    heights: list[int] = []
    for name, pv in (("dark", False), ("light", True)):
        equipment = f"{BATTERY}{'pv_kwp: 10' if pv else ''}\nheld_out: [2025-06-02]\n"
        write_folder(
            place / name, zone="UTC", begin="2025-06-01", hours=96, equipment=equipment, pv=pv
        )
        assert command("site", "check", name, "--figures", f"{name}-drawn").code == 0
        header = Path(f"{name}-drawn/site_day.png").read_bytes()[:24]
        heights.append(int.from_bytes(header[20:24]))
    assert heights[0] < heights[1]


def test_a_bound_that_is_none_is_a_defect(
    command: Command, village: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = kept.optimum

    def worse(*arguments: Any) -> Best:
        best = solve(*arguments)
        return best._replace(settled=best.settled + 1000.0)

    monkeypatch.setattr(kept, "optimum", worse)
    outcome = command("site", "check", "village", "--json")
    assert outcome.code == 1
    assert "error: the optimum is no bound, a defect: 2025-03-02: uncontrolled" in outcome.err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("check", "nowhere"), "nowhere: no such folder and no shipped site"),
        (("check",), "DIR"),
        (("look", "village"), "site: argument COMMAND: invalid choice: 'look'"),
        (("check", "village", "--pv_kwp", "much"), "--pv_kwp: invalid float value: 'much'"),
        (("check", "village", "--pv_kwp", "nan"), "--pv_kwp: nan is not a number from 0"),
        (("check", "village", "--grid_kw", "0"), "--grid_kw: 0.0 is not a number above 0"),
        (("check", "village", "--soc", "1"), "unrecognized arguments: --soc"),
        (("check", "village", "--figures", "village/site.yaml"), "is not a directory"),
        (("check", "village", "--figures", "no/where"), "make it first"),
        (("check", "village", "--figures", "s3://bucket/x"), "only local files and directories"),
        ((), "site: the following arguments are required: COMMAND"),
        (("check", "dark", "--pv_kwp", "5"), "the site has no PV"),
    ],
)
def test_what_cannot_be_is_one_line(
    command: Command, village: Path, words: tuple[str, ...], why: str
) -> None:
    write_folder(
        village.parent / "dark", zone="UTC", begin="2025-06-01", hours=48, equipment=BATTERY
    )
    before = tree(village.parent)
    outcome = command("site", *words)
    assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (2, "", 1)
    assert outcome.err.startswith("error: ")
    assert why in outcome.err
    assert tree(village.parent) == before


def test_a_damaged_folder_is_refused(command: Command, village: Path) -> None:
    shutil.copytree(village, "torn")
    text = Path("torn/series.csv").read_text().replace("0.4\n", "-0.4\n", 1)
    Path("torn/series.csv").write_text(text)
    outcome = command("site", "check", "torn")
    assert (outcome.code, outcome.out) == (2, "")
    assert "series.csv: row 2, column carbon_kg_per_kwh" in outcome.err


def test_help_says_what_changes(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command("site", "check", "--help")
    assert not end.value.code
    text = capsys.readouterr().out
    for flag in ("--json", "--figures DIR", "--battery.capacity_kwh KWH", "--pv_kwp KWP"):
        assert flag in text
    assert "example: co2lightning site check iquitos --battery.capacity_kwh 200" in text
