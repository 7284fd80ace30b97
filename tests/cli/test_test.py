"""`co2lightning test`: data, table and exit codes."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from co2lightning.agents.load import load_agent
from co2lightning.commands.test import main
from co2lightning.errors import UserError
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim import kept
from co2lightning.sim.evaluate import TITLES, Summary
from co2lightning.sim.optimum import Best
from co2lightning.sim.worlds import PERTURBATIONS
from conftest import tree
from small_site import HELD_OUT, write_site

pytestmark = pytest.mark.usefixtures("inside")


def said_beside_the_site(error: str) -> list[str]:
    """Return the lines on standard error that are no remark on the site's series."""
    return [line for line in error.splitlines() if not line.startswith("series.csv: ")]


def test_json_is_all_that_standard_output_gets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["PPO", "--json"]) == 0
    printed = capsys.readouterr()
    assert not said_beside_the_site(printed.err)
    data = json.loads(printed.out)
    assert {key: data[key] for key in ("site", "agent", "action", "episode")} == {
        "site": "village",
        "agent": "PPO",
        "action": "moves",
        "episode": 2,
    }
    assert [(s["begin"], s["days"]) for s in data["stretches"]] == [(day, 1) for day in HELD_OUT]
    names = ["agent", "uncontrolled", "rbc_a", "rbc_b", "cheap", "rbc_c", "optimum"]
    assert list(data["policies"]) == list(data["summary"]) == names
    for policy in data["policies"].values():
        assert {"co2_kg_per_day", "unmet_kwh_per_day", "peak_kw"} <= set(policy)
        assert len(policy["stretches"]) == 3
        for stretch in policy["stretches"]:
            assert {"co2_kg", "settlement", "unmet_kwh"} <= set(stretch)
    agent = data["policies"]["agent"]
    mean = sum(stretch["co2_kg"] for stretch in agent["stretches"]) / 3
    assert agent["co2_kg_per_day"] == pytest.approx(mean, abs=1e-5)
    assert data["summary"]["agent"]["co2_kg"] == agent["co2_kg_per_day"]
    assert set(data["summary"]["agent"]) == set(Summary._fields)


def test_the_table_names_every_policy_and_the_episode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["PPO"]) == 0
    out = capsys.readouterr().out
    for text in ("episode 2", "3 held-out days of village", "RBC A", "optimum (LP)", *HELD_OUT):
        assert text in out
    assert "±" not in out, "three days are too few for an interval"


def test_a_rule_stands_first_among_its_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rbc_b", "--env.site", "village"]
    assert main([*words, "--json", "--steps", str(tmp_path / "steps.csv")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["site"], data["rule"]) == ("village", "rbc_b")
    names = ["rbc_b", "uncontrolled", "rbc_a", "cheap", "rbc_c", "optimum"]
    assert list(data["policies"]) == list(data["summary"]) == names
    assert "agent" not in data
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["policy"] for row in rows)) == names
    assert main(["PPO", "--json"]) == 0
    beside = json.loads(capsys.readouterr().out)
    assert data["policies"]["rbc_b"] == beside["policies"]["rbc_b"]
    assert main(words) == 0
    assert "RBC B, on 3 held-out days of village" in capsys.readouterr().out


def with_prices(directory: Path) -> Path:
    """Write a site whose power has a price."""
    site = write_site(directory)
    head, *rows = (site / "series.csv").read_text().splitlines()
    priced = [f"{head},price_per_kwh", *(f"{row},0.2" for row in rows)]
    (site / "series.csv").write_text("\n".join(priced) + "\n")
    return site


def test_steps_are_all_of_all_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site, steps = with_prices(tmp_path / "priced"), tmp_path / "steps.csv"
    assert main(["PPO", "--json", "--env.site", str(site), "--steps", str(steps)]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader(steps.read_text().splitlines()))
    names = ["PPO", *list(data["policies"])[1:]]
    assert list(rows[0]) == [
        *("time", "policy", "ev_kw", "battery_kw", "grid_kw", "soc", "co2_kg"),
        *("unmet_kwh", "cost"),
    ]
    assert len(rows) == 3 * 96 * len(names)
    assert list(dict.fromkeys(row["policy"] for row in rows)) == names
    for name, policy in zip(names, data["policies"].values(), strict=True):
        own = [row for row in rows if row["policy"] == name]
        assert [row["time"] for row in own[::96]] == [f"{day}T00:00:00+00:00" for day in HELD_OUT]
        for i, stretch in enumerate(policy["stretches"]):
            of_stretch = own[96 * i : 96 * (i + 1)]
            co2_kg, cost = (
                sum(float(row[key]) for row in of_stretch) for key in ("co2_kg", "cost")
            )
            assert co2_kg == pytest.approx(stretch["co2_kg"] - stretch["settlement"], abs=1e-4)
            assert cost == pytest.approx(stretch["cost"], abs=1e-4)


def test_steps_that_cannot_be_written_are_refused_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match=r"--steps no/where.csv: there is no directory"):
        main(["PPO", "--steps", "no/where.csv"])
    assert capsys.readouterr().out == ""


def another_run(directory: Path, change: dict[str, Any]) -> list[str]:
    """Save PPO's newest episode, changed, as the first of another run; return how it is named."""
    checkpoint = TrainingCheckpoint.read("checkpoints/PPO/episode_0002.pt")
    for key, value in change.items():
        checkpoint[key] |= value
    run = TrainingCheckpoint(directory / "night")
    run.begin_session(start_episode=1, device="cpu", info=checkpoint["run"])
    run.save_checkpoint(checkpoint, episode=1, metrics={})
    run.end_session("completed")
    return ["night", "--checkpoints.dir", str(directory)]


def test_an_older_episode_and_its_scalars(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained / "lightning_logs" / "PPO"
    before = sorted(p.name for p in run.iterdir() if p.is_file())
    for _ in range(2):
        assert main(["PPO", "--json", "--ckpt_path", "checkpoints/PPO/episode_0001.pt"]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert data["episode"] == 1
    assert sorted(p.name for p in run.iterdir() if p.is_file()) == before
    assert len(list((run / "test").glob("*.episode_0001"))) == 1
    events = EventAccumulator(str(run / "test")).Reload()
    points = events.Scalars("test/co2_kg")
    assert [p.value for p in points if p.step == 1] == pytest.approx(
        [data["summary"]["agent"]["co2_kg"]], rel=1e-6
    )


def test_without_logs_none_are_made(tmp_path: Path) -> None:
    assert main(["PPO", "--json", "--logs.dir", str(tmp_path / "elsewhere")]) == 0
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a place where root may only read")
@pytest.mark.parametrize("readable", ["PPO", "references"])
def test_where_only_reading_is_allowed(
    readable: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is there, so nothing has failed; a line says what is not kept."""
    logs = tmp_path / "logs"
    shutil.copytree(trained / "lightning_logs", logs)
    shutil.rmtree(logs / readable, ignore_errors=True)
    (logs / readable).symlink_to("/sys/kernel")
    assert main(["PPO", "--logs.dir", str(logs)]) == 0
    printed = capsys.readouterr()
    assert "optimum (LP)" in printed.out
    (line,) = said_beside_the_site(printed.err)
    assert line.startswith(f"{logs}: ")
    assert line.endswith("; TensorBoard does not get these figures")
    assert not [name for name in tree(logs) if name.endswith(".tmp")]


def test_another_site_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_site(tmp_path / "village", load_kw=9.0)
    assert main(["PPO", "--json", "--env.site", str(other)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["site"] == "village"
    (line,) = said_beside_the_site(printed.err)
    assert "is not the one PPO was trained on" in line


def test_the_optimum_is_kept_beside_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Best:
        raise AssertionError("was solved before")

    assert main(["PPO"]) == 0
    assert list(Path("checkpoints/references").iterdir())
    monkeypatch.setattr(kept, "optimum", never)
    assert main(["PPO"]) == 0


def test_a_bound_that_is_none_is_a_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("checkpoints/PPO", tmp_path / "PPO")  # where nothing is kept yet
    solve = kept.optimum

    def worse(*arguments: Any) -> Best:
        best = solve(*arguments)
        return best._replace(settled=best.settled + 1000.0)

    monkeypatch.setattr(kept, "optimum", worse)
    assert main(["PPO", "--checkpoints.dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "2025-03-02: agent emits" in error
    assert "and 17 more" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["SAC"], "no episode in checkpoints/SAC; runs there: PPO"),
        ([], "such as: co2lightning test PPO"),
        (["PPO", "--jsn"], "--jsn"),
        (["PPO", "--ckpt_path", "none.pt"], "none.pt"),
        (["PPO", "--env.site", "nowhere"], "nowhere"),
        (["rbc_c"], "test rbc_c: a rule needs a site, such as --env.site iquitos"),
        (["PPO", "--env.objective", "cost"], "PPO is settled by what it was trained for"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": None}, "not an episode"),
        ({"run": {"agent": "os.system"}}, "not an episode"),
        ({"hyper_parameters": {"observation_dim": 3, "action_dim": 1}}, "not of this version's"),
        ({"state_dict": {}}, "not of this version's PPO"),
    ],
)
def test_a_strange_checkpoint_is_refused(change: dict[str, Any], said: str) -> None:
    path = Path("checkpoints/PPO/episode_0002.pt")
    with pytest.raises(UserError, match=said):
        load_agent({**TrainingCheckpoint.read(path), **change}, path)


def test_a_run_without_a_site_has_no_co2(tmp_path: Path) -> None:
    words = another_run(tmp_path, {"run": {"site": None}})
    with pytest.raises(UserError, match="was not trained on a site"):
        main(words)


@pytest.mark.parametrize(
    ("run", "heading", "key", "metered"),
    [
        ("money", "EUR/day", "cost", "CO2 is the meter's alone"),
        ("air", "kg/day", "co2_kg", "Cost is the meter's alone"),
        ("both", "a day", "objective", "CO2 and cost are the meter's alone"),
    ],
)
def test_what_is_settled_has_its_name_and_its_unit(
    run: str,
    heading: str,
    key: str,
    metered: str,
    priced: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(priced)
    assert main([run, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    best, summary = data["best"], data["summary"]
    rules = {name: own for name, own in summary.items() if name not in ("agent", "optimum")}
    assert best == min(rules, key=lambda name: rules[name][key])
    assert summary["agent"]["vs_best"] == pytest.approx(
        summary["agent"][key] - summary[best][key], abs=2e-6
    )
    hours = sum(stretch["hours"] for stretch in data["stretches"])
    for name, policy in data["policies"].items():
        settled = sum(stretch["settled"] for stretch in policy["stretches"])
        assert summary[name][key] == pytest.approx(settled / hours * 24, abs=1e-5)
        assert policy["cost_per_day"] == summary[name]["cost"]
    assert data["currency"] == "EUR"
    assert main([run]) == 0
    out = capsys.readouterr().out
    headings, units = out.splitlines()[2:4]
    assert "EUR/day" in units
    assert f"against {TITLES[best]}" in headings
    assert units.count(heading) >= (1 if key == "objective" else 2)
    assert metered in " ".join(out.split())
    assert f"Settled {'CO2' if key == 'co2_kg' else key} of each policy" in out


def test_costs_are_scalars_for_tensorboard(
    priced: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(priced)
    assert main(["money", "--json"]) == 0
    own = json.loads(capsys.readouterr().out)["summary"]["agent"]
    events = EventAccumulator("lightning_logs/money/test").Reload()
    for key in ("cost", "vs_best", "co2_kg"):
        (point,) = events.Scalars(f"test/{key}")
        assert point.value == pytest.approx(own[key], rel=1e-6)
    assert "test/objective" not in events.Tags()["scalars"]


def test_without_prices_nothing_is_said_of_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["PPO"]) == 0
    out = capsys.readouterr().out
    assert "against RBC C" in out
    assert "meter's alone" not in out
    assert "cost\n" not in out
    assert "cost ┃" not in out


def test_mpc_stands_beside_the_rules_and_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["PPO", "--mpc", "--json"]) == 0
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if line.startswith("MPC")]
    assert told == [f"MPC: {i} of 3 stretches" for i in (1, 2, 3)]
    data = json.loads(printed.out)
    assert list(data["policies"])[-2:] == ["mpc", "optimum"]
    best, own, rule = (data["summary"][name]["co2_kg"] for name in ("optimum", "mpc", "rbc_b"))
    assert best <= own < rule
    assert main(["PPO", "--mpc"]) == 0
    printed = capsys.readouterr()
    assert "MPC" not in printed.err
    assert "MPC" in printed.out


def test_what_knowledge_is_worth_and_what_is_left_when_perturbed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["PPO", "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert "perturbed" not in before
    assert main(["PPO", "--json", "--perturb"]) == 0
    data = json.loads(capsys.readouterr().out)
    perturbed = data.pop("perturbed")
    assert data == before
    assert set(data["knowledge"]) <= {"forecast"}, "nothing is announced in the village"
    assert list(perturbed) == list(PERTURBATIONS)
    for told in perturbed.values():
        assert list(told) == list(data["summary"])
        for policy, figures in told.items():
            share = data["summary"][policy]["gap_closed"]
            left = figures["gain_left"]
            assert (left is None) == (share <= 0.0)
            assert left is None or left == pytest.approx(figures["gap_closed"] / share, abs=1e-4)
        assert told["optimum"]["gap_closed"] == 1.0
    usual, own = perturbed["usual_price"], data["summary"]
    assert usual["rbc_b"]["gap_closed"] == own["rbc_b"]["gap_closed"]
    assert main(["PPO", "--perturb"]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("as it is", "PV 20 % lower", "carbon expected as usual"))
    assert out.count("With a perfect forecast, gap closed: PPO") == len(data["knowledge"])
