"""`predict`: the rows are the day that `test` evaluates, and what cannot be is one line."""

import csv
import io
import os
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from co2lightning.agents.load import load_agent, policy_of
from co2lightning.cli import main
from co2lightning.control.observation import HIGHEST, NAMES
from co2lightning.sim.evaluate import TITLES, evaluate
from co2lightning.site.load import load_site
from small_site import H, write_site

pytestmark = pytest.mark.usefixtures("inside")
Run = pytest.CaptureFixture[str]

COLUMNS = ["time", "ev_kw", "battery_kw", "grid_kw", "soc", "co2_kg", "unmet_kwh"]


def rows_of(text: str) -> tuple[list[str], list[str], np.ndarray]:
    """Return header, times and numbers [96, columns - 1] of a CSV."""
    header, *rows = csv.reader(io.StringIO(text))
    assert len(rows) == 96
    return header, [row[0] for row in rows], np.array([row[1:] for row in rows], dtype=float)


def test_the_rows_are_the_day_that_test_evaluates(trained: Path, capsys: Run) -> None:
    from co2lightning.runs.run import TrainingCheckpoint

    assert main(["predict", "PPO"]) == 0
    printed = capsys.readouterr()
    header, times, values = rows_of(printed.out)
    assert header == COLUMNS
    begin = datetime.fromisoformat("2025-03-02T00:00:00+00:00")
    assert times == [(begin + timedelta(minutes=15 * step)).isoformat() for step in range(96)]
    ev_kw, battery_kw, grid_kw, soc, co2_kg, unmet_kwh = values.T
    site = load_site(trained / "village")
    day = site.days.index("2025-03-02")
    steps = slice(*site.day_bounds[day : day + 2])
    own_kw = (site.load_kw - site.pv_kw)[steps] + ev_kw + battery_kw
    assert grid_kw == pytest.approx(own_kw, abs=1e-4)
    meter_kg = grid_kw.clip(0) * H * site.carbon_kg_per_kwh[steps]
    assert co2_kg == pytest.approx(meter_kg, abs=1e-5)
    assert grid_kw.min() < 0 < grid_kw.max()
    assert unmet_kwh == pytest.approx(0.0, abs=1e-4)
    assert soc.min() >= 0.1 - 1e-6
    assert soc.max() <= 0.9 + 1e-6
    path = Path("checkpoints/PPO/episode_0002.pt")
    agent = load_agent(TrainingCheckpoint.read(path), path)
    evaluation = evaluate(policy_of(agent, site), site)
    own = evaluation.policies["agent"]
    assert co2_kg.sum() == pytest.approx(own.co2_kg[0] - own.settlement[0], abs=1e-4)
    told = "2025-03-02: PPO after episode 2 emits {:.1f} kg CO2, what is left at the end settled; uncontrolled {:.1f}, RBC A {:.1f}, RBC B {:.1f}, cheap hours {:.1f}, RBC C {:.1f}, optimum (LP) {:.1f}"  # noqa: E501
    said = printed.err.splitlines()[-1]
    told += f"; by the meter peak {grid_kw.max():.1f} kW"
    assert said == told.format(*(f.co2_kg[0] for f in evaluation.policies.values()))


def test_costs_are_a_column_where_there_are_prices(
    priced: Path, monkeypatch: pytest.MonkeyPatch, capsys: Run
) -> None:
    monkeypatch.chdir(priced)
    assert main(["predict", "money"]) == 0
    printed = capsys.readouterr()
    header, _, values = rows_of(printed.out)
    assert header == [*COLUMNS, "cost"]
    grid_kw, cost = values[:, 2], values[:, -1]
    price = np.where(np.arange(96) >= 72, 0.1, 0.3)
    metered = (grid_kw.clip(0) * price + grid_kw.clip(max=0) * 0.05) * H
    assert cost == pytest.approx(metered, abs=1e-5)
    assert cost.min() < 0 < cost.max()
    said = printed.err.splitlines()[-1]
    assert "PPO after episode 1 costs " in said
    assert " EUR, what is left at the end settled; uncontrolled " in said
    assert f"; by the meter peak {grid_kw.max():.1f} kW, " in said
    assert said.endswith(" kg CO2")


def test_files_and_a_training_day(tmp_path: Path, capsys: Run) -> None:
    output, seen = tmp_path / "schedule.csv", tmp_path / "seen.csv"
    output.write_text("an older one, longer than nothing")
    words = ["--day", "2025-03-03", "--output", str(output), "--observations", str(seen)]
    assert main(["predict", "PPO", *words]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "2025-03-03 is a training day of village\n" in printed.err
    header, times, _ = rows_of(output.read_text())
    assert header == COLUMNS
    assert times[0] == "2025-03-03T00:00:00+00:00"
    header, _, values = rows_of(seen.read_text())
    assert header == ["time", *NAMES]
    assert np.abs(values).max() <= HIGHEST
    assert values.std(axis=0).max() > 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["schedule.csv", "seen.csv"]


def test_times_are_the_sites_own(tmp_path: Path, capsys: Run) -> None:
    other = write_site(tmp_path / "lima")
    for name in ("site.yaml", "series.csv", "sessions.csv"):
        text = (other / name).read_text().replace("timezone: UTC", "timezone: America/Lima")
        (other / name).write_text(text.replace("+00:00", "-05:00"))
    assert main(["predict", "PPO", "--env.site", str(other)]) == 0
    printed = capsys.readouterr()
    assert rows_of(printed.out)[1][95] == "2025-03-02T23:45:00-05:00"
    assert "is not the one PPO was trained on" in printed.err


def test_an_older_episode(capsys: Run) -> None:
    assert main(["predict", "PPO", "--ckpt_path", "checkpoints/PPO/episode_0001.pt"]) == 0
    assert "PPO after episode 1 emits" in capsys.readouterr().err


def test_an_older_episode_because_the_newest_is_damaged(capsys: Run) -> None:
    newest = Path("checkpoints/PPO/episode_0002.pt")
    content = newest.read_bytes()
    try:
        newest.write_bytes(content[:3000])
        assert main(["predict", "PPO"]) == 0
    finally:
        newest.write_bytes(content)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == f"{newest} is damaged: this is episode 1"
    assert "PPO after episode 1 emits" in last


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "predict: the following arguments are required: NAME; such as: co2lightning predict"),
        (["SAC"], "predict SAC: no episode in checkpoints/SAC; runs there: PPO"),
        (["rbc_c"], "predict rbc_c: a rule needs a site, such as --env.site iquitos"),
        (["rbc_c", "--env.site", "nowhere"], "site nowhere: no such folder"),
        (["rbc_c", "--env.site", "village", "--env.objective", "cost"], "price_per_kwh"),
        (["PPO", "--env.objective", "co2"], "--env.objective: PPO is settled by what it was"),
        (["PPO", "--day", "2025-04-01"], "--day: 2025-04-01 is not a day of site village; its"),
        (["PPO", "--day", "today"], "today is not a day"),
        (
            ["PPO", "--day", "2025-03-05", "--days", "3"],
            "--days 3: is not from 1 to 2; village has so many",
        ),
        (["PPO", "--days", "0"], "--days 0: is not from 1 to 5; village has so many"),
        (["PPO", "--output", "no/where.csv"], "--output no/where.csv: there is no directory"),
        (["PPO", "--output", "."], "--output .: is a directory"),
        (["PPO", "--observations", "village"], "--observations village: is a directory"),
        (["PPO", "--output", os.devnull], "is no regular file"),
        (["PPO", "--ckpt_path", "village/site.yaml"], "site.yaml is damaged"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str, capsys: Run) -> None:
    assert main(["predict", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *remarks, error = printed.err.splitlines()
    assert all(line.startswith("series.csv: ") for line in remarks)
    assert error.startswith("error: ")
    assert said in error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: Run) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    assert main(["predict", "PPO", "--output", str(closed / "a.csv")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_several_days_in_one_go(trained: Path, capsys: Run) -> None:
    """The battery goes on over midnight, and what comes out is what evaluation plays."""
    assert main(["predict", "PPO", "--day", "2025-03-03", "--days", "2"]) == 0
    printed = capsys.readouterr()
    header, *rows = csv.reader(io.StringIO(printed.out))
    assert len(rows) == 192
    soc = np.array([float(row[header.index("soc")]) for row in rows])
    assert np.abs(np.diff(soc)).max() <= 20 * H / 0.9 / 50 + 1e-6
    assert "2025-03-03 to 2025-03-04: PPO after episode 2 emits" in printed.err


def test_steps_are_those_of_the_series(tmp_path: Path, capsys: Run) -> None:
    other = write_site(tmp_path / "hourly")
    head, *rows = (other / "series.csv").read_text().splitlines()
    (other / "series.csv").write_text("\n".join([head, *rows[::4]]) + "\n")
    assert main(["predict", "PPO", "--env.site", str(other)]) == 0
    _, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert [row[0][11:16] for row in rows] == [f"{hour:02d}:00" for hour in range(24)]


@pytest.mark.parametrize("action", ["powers", "moves"])
def test_the_tables_are_those_of_the_environment(trained: Path, action: str) -> None:
    """What `predict` writes as seen is what an environment would have shown."""
    from co2lightning.agents.ppo import PPO
    from co2lightning.commands.predict import predict
    from co2lightning.sim.days import SiteDays
    from co2lightning.sim.schedule import start_soc

    site = load_site(trained / "village")
    env = SiteDays(site, 1, action=action)
    names = NAMES[::-1] if action == "moves" else NAMES[3:]
    env.show(names)
    agent = PPO(len(names), env.action_dim, seed=3, observation_names=names)
    day = int(site.stretches[1, 0])
    found, seen = predict(agent, site, day)
    obs = env.begin(torch.tensor([day]), torch.tensor([start_soc(site)]))
    for step in range(96):
        assert obs[0].tolist() == pytest.approx(seen[step].tolist(), abs=1e-5)
        obs = env.step(agent.act(obs).detach()).obs
        planned = found.schedules["agent"][0].ev_kw[step]
        assert float(env.flows.ev_kw) == pytest.approx(planned, abs=1e-3)


@pytest.mark.parametrize("name", ["uncontrolled", "rbc_a", "rbc_b", "cheap", "rbc_c"])
def test_a_rule_is_written_as_evaluation_plays_it(trained: Path, name: str, capsys: Run) -> None:
    assert main(["predict", name, "--env.site", "village"]) == 0
    printed = capsys.readouterr()
    header, _, values = rows_of(printed.out)
    assert header == COLUMNS
    evaluation = evaluate(None, load_site(trained / "village"))
    plan, own = evaluation.schedules[name][0], evaluation.policies[name]
    assert values[:, 0] == pytest.approx(plan.ev_kw, abs=1e-6)
    assert values[:, 1] == pytest.approx(plan.battery_kw, abs=1e-6)
    told = f"2025-03-02: {TITLES[name]} emits {own.co2_kg[0]:.1f} kg CO2, what is left at the end"
    assert printed.err.splitlines()[-1].startswith(told)


def test_a_rule_follows_what_is_to_be_made_small(tmp_path: Path, capsys: Run) -> None:
    other = write_site(tmp_path / "priced")
    head, *rows = (other / "series.csv").read_text().splitlines()
    priced = [f"{head},price_per_kwh", *(f"{row},0.2" for row in rows)]
    (other / "series.csv").write_text("\n".join(priced) + "\n")
    words = ["--env.site", str(other), "--env.objective", "cost"]
    assert main(["predict", "rbc_c", *words]) == 0
    printed = capsys.readouterr()
    assert rows_of(printed.out)[0] == [*COLUMNS, "cost"]
    assert "RBC C costs" in printed.err.splitlines()[-1]
