"""What drivers announce: read, filled in, known to controllers alone, and told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import co2lightning  # noqa: F401 (registers the environment)
from co2lightning.control.rules import RULES
from co2lightning.errors import UserError
from co2lightning.sim.evaluate import evaluate, summarise, violations
from co2lightning.sim.mpc import mpc
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import play, run, start
from co2lightning.site.load import load_site
from co2lightning.site.model import Site
from conftest import Outcome
from small_site import real, write_site

CALTECH = Path(__file__).parents[1] / "sites" / "caltech-2019"
DAY = "2025-03-01T"


def announced_site(folder: Path, *rows: str, columns: str = "both") -> Path:
    """The village, where drivers announce; a row has session, type, times, kWh, kW and these."""
    path = write_site(folder)
    file = path / "sessions.csv"
    names = {"both": "announced_departure,announced_energy_kwh"}.get(columns, columns)
    lines = [f"{line}," + "," * names.count(",") for line in file.read_text().splitlines()]
    lines[0] = f"{lines[0].rstrip(',')},{names}"
    for row in rows:
        number, *cells = row.split("|")
        old = lines[int(number) - 1].split(",")
        old[-len(cells) :] = cells
        lines[int(number) - 1] = ",".join(old)
    file.write_text("\n".join(lines) + "\n")
    return path


def told(site: Site, session: int) -> tuple[int, float]:
    """First step after the stay, and kWh, as they are told."""
    assert site.told is not None
    return int(site.told.departure[session]), float(site.told.energy_kwh[session])


def test_what_is_said_is_known_and_what_is_not_is_usual(tmp_path: Path) -> None:
    site = load_site(announced_site(tmp_path / "v", f"2|{DAY}07:20:00Z|9.5", f"3|{DAY}09:00:00Z|"))
    assert told(site, 0) == (30, 9.5)  # up to a step
    # 8 to 9 o'clock at 4 kW: no more than 98 % of it, of the 7 kWh that are usual at 8 o'clock.
    assert told(site, 1) == (36, pytest.approx(0.98 * 4.0))
    assert told(site, 2) == (88, 8.0)
    truth = load_site(site.directory, announced=False)
    assert truth.told is None
    assert truth is site.truth
    np.testing.assert_array_equal(truth.stretch_bounds, site.stretch_bounds)
    assert truth.sessions.energy_kwh[0] == 6.0


def test_the_usual_is_of_training_days_that_hour_and_type_alone(tmp_path: Path) -> None:
    path = announced_site(tmp_path / "v")
    own = load_site(path)
    file = path / "sessions.csv"
    lines = file.read_text().splitlines()
    # Another stay at 3 o'clock on held-out days teaches nothing, on training days it does.
    poisoned = [
        line.replace("T09:00", "T05:00").replace(",6,", ",2,") if line[:4] == "2-0," else line
        for line in lines
    ]
    file.write_text("\n".join(poisoned) + "\n")
    assert told(load_site(path), 3) == told(own, 3) == (96 + 36, 6.0)
    poisoned = [
        line.replace("T09:00", "T05:00").replace(",6,", ",2,") if line[1:4] == "-0," else line
        for line in lines
    ]
    file.write_text("\n".join(poisoned) + "\n")
    assert told(load_site(path), 0) == (20, 2.0)


def test_a_column_alone_leaves_the_other_at_what_is_usual(tmp_path: Path) -> None:
    site = load_site(
        announced_site(tmp_path / "v", f"2|{DAY}07:00:00Z", columns="announced_departure")
    )
    assert told(site, 0) == (28, 6.0)
    site = load_site(announced_site(tmp_path / "w", "2|1.5", columns="announced_energy_kwh"))
    assert told(site, 0) == (36, 1.5)


@pytest.mark.parametrize(
    ("cells", "column", "says"),
    [
        (f"{DAY}03:00:00Z|2", "announced_departure", "is not after the arrival"),
        ("2025-03-09T03:00:00Z|2", "announced_departure", "is more than 7 days after the arrival"),
        ("at nine|2", "announced_departure", "2025"),
        (f"{DAY}09:00:00Z|much", "announced_energy_kwh", "is not a number"),
        (f"{DAY}09:00:00Z|0", "announced_energy_kwh", "is not above 0 kWh"),
        (f"{DAY}09:00:00Z|-3", "announced_energy_kwh", "is not above 0 kWh"),
        (f"{DAY}09:00:00Z|nan", "announced_energy_kwh", "is not a finite number"),
    ],
)
def test_what_is_wrong_is_told_with_its_row(
    tmp_path: Path, cells: str, column: str, says: str
) -> None:
    path = announced_site(tmp_path / "v", f"2|{cells}")
    with pytest.raises(UserError) as error:
        load_site(path)
    assert str(error.value).startswith(f"sessions.csv: row 2, column {column}: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def powers(site: Site, name: str) -> np.ndarray:
    """What vehicles took on the first day, [96, C]."""
    model, rule, taken = priced_model(site, dtype=torch.float64), RULES[name], []

    def watched(model: object, state: object) -> object:
        taken.append(state)
        return rule(model, state)

    run(model, watched, start(model, site, np.array([0]), 0.5), 96)
    return np.stack([state.owed_kw[0].numpy() for state in taken])


def test_one_who_stays_longer_than_said_by_hand(tmp_path: Path) -> None:
    """It says 4:00 and 4 kWh, stays until 9:00 and wants 6."""
    site = load_site(announced_site(tmp_path / "v", f"2|{DAY}04:00:00Z|4"))
    model = priced_model(site, dtype=torch.float64)
    trace, _ = run(model, RULES["rbc_b"], start(model, site, np.array([0]), 0.5), 96)
    ev_kwh = trace.ev_kw[:, 0].numpy() * 0.25
    # Before sunrise, by 4:00, it gets what it has said, and the rest of its 6 kWh never.
    assert ev_kwh[12:16].sum() == pytest.approx(0.98 * 4.0)
    unmet_kwh, misled_kwh = (x[:, 0].numpy() * 0.25 for x in (trace.unmet_kw, trace.misled_kw))
    assert unmet_kwh[35] == pytest.approx(6.0 - 0.98 * 4.0)
    np.testing.assert_allclose(misled_kwh, unmet_kwh, atol=1e-9)
    owed = powers(site, "rbc_b") * 0.25
    assert owed[15].max() == pytest.approx(1.0)
    assert not owed[16:32].any()


def test_who_refuses_power_is_full(tmp_path: Path) -> None:
    """It asks for 20 of its 6 kWh; charged at once it takes 6, and is owed nothing from then on."""
    site = load_site(announced_site(tmp_path / "v", f"2|{DAY}09:00:00Z|20"))
    model = priced_model(site, dtype=torch.float64)
    trace, _ = run(model, RULES["rbc_a"], start(model, site, np.array([0]), 0.5), 32)
    assert trace.ev_kw[:, 0].sum() * 0.25 == pytest.approx(6.0)
    owed_kwh = trace.owed_kw[:, 0].numpy() * 0.25
    assert owed_kwh[12] == 20.0
    assert owed_kwh[18] == pytest.approx(14.0)  # it took 1 kWh a step and has not yet refused
    assert not owed_kwh[19:32].any()
    # Who stands there when a run begins has done so already.
    begun = start(model, site, np.array([20]), 0.5)
    assert not begun.owed_kw.any()
    begun = start(model, site, np.array([15]), 0.5)
    assert begun.true_kw is not None
    assert (begun.owed_kw.max() * 0.25, begun.true_kw.max() * 0.25) == (17.0, 3.0)


@pytest.fixture(scope="module")
def garage() -> Site:
    return load_site(CALTECH)


def test_uncontrolled_and_the_optimum_are_those_of_the_truth(garage: Site) -> None:
    lied, true = evaluate(None, garage), evaluate(None, real("caltech-2019"))
    for name in ("uncontrolled", "optimum"):
        np.testing.assert_allclose(
            lied.policies[name].settled, true.policies[name].settled, rtol=1e-6
        )
    summaries, truly = summarise(lied), summarise(true)
    assert truly["cheap"].misled_kwh is None
    assert truly["cheap"].unmet_kwh < 1e-3
    for name in ("rbc_a", "rbc_b", "cheap", "rbc_c"):
        assert summaries[name].unmet_kwh > 1.0
        assert summaries[name].misled_kwh == pytest.approx(summaries[name].unmet_kwh, rel=1e-3)
    assert summaries["uncontrolled"].unmet_kwh == summaries["optimum"].unmet_kwh == 0.0
    assert violations(lied) == []


def test_plans_look_at_what_is_said_alone(garage: Site) -> None:
    """Model predictive control, for the hours of a morning: another truth to come changes none."""
    begin = int(garage.stretch_bounds[0, 0]) + garage.steps(3.0)
    stretch = np.array([[begin, begin + garage.steps(6.0)]])
    (played,) = play(priced_model(garage), mpc(garage), garage, stretch)
    assert played.schedule.unmet_kwh.sum() >= played.schedule.misled_kwh.sum() - 1e-6
    assert np.isfinite(played.schedule.co2_kg).all()


def test_the_environment_tells_or_knows_the_truth() -> None:
    keys = {"co2_kg", "grid_import_kwh", "curtailed_kwh", "unmet_kwh"}
    for announced, more in ((True, {"misled_kwh"}), (False, set[str]())):
        env = gym.make("co2lightning/ChargingSite-v0", site=str(CALTECH), announced=announced)
        env.reset(seed=1)
        for _ in range(96):
            _, _, _, truncated, info = env.step(np.array([-1.0, 0.0], dtype=np.float32))
        assert truncated
        assert set(info) == keys | more


def test_site_check_says_how_good_they_are(command: Callable[..., Outcome], tmp_path: Path) -> None:
    rows = (f"2|{DAY}10:00:00Z|12", f"3|{DAY}14:00:00Z|7", f"4|{DAY}20:00:00Z|")
    path = str(announced_site(tmp_path / "v", *rows))
    outcome = command("site", "check", path, "--json")
    found = json.loads(outcome.out)
    assert found["sessions"]["announcements"] == {
        "known": True,
        "departures": 3,
        "departure_off_h": 1.0,
        "departure_late_share": pytest.approx(1 / 3, abs=1e-6),
        "energies": 2,
        "energy_ratio": 1.5,
    }
    assert "misled_kwh_per_day" in found["policies"]["rbc_b"]
    outcome = command("site", "check", path, "--json", "--env.announced", "false")
    found = json.loads(outcome.out)
    assert found["sessions"]["announcements"]["known"] is False
    assert "misled_kwh_per_day" not in found["policies"]["rbc_b"]
    told = " ".join(command("site", "check", path).out.split())
    assert "3 departures, 2 energies of 18 rows; departures 1 h off in the median" in told
    outcome = command("site", "check", path, "--env.announced", "perhaps")
    assert outcome.code == 2
    assert "must be true or false" in outcome.err


def test_nothing_is_won_by_leaving_vehicles_short() -> None:
    """Compared are policies with what they leave unserved, at the mean price."""
    site = real("caltech-2019", announced=True)
    found = evaluate(None, site)
    price = float(site.carbon_kg_per_kwh[site.training_steps].mean())
    for name in ("rbc_b", "cheap"):
        figures = found.policies[name]
        assert figures.unmet_kwh.sum() > 100.0
        expected = figures.settled + price * figures.unmet_kwh
        np.testing.assert_allclose(found.compared(name), expected, atol=0.02 * price)
    served = found.policies["uncontrolled"]
    np.testing.assert_array_equal(found.compared("uncontrolled"), served.settled)
