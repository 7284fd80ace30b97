"""The paired evaluation: its statistics by hand, the command's data, table and exit codes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from co2lightning.agents.load import load_agent, policy_of
from co2lightning.agents.ppo import PPO
from co2lightning.commands.test import main
from co2lightning.control.rules import rbc_b
from co2lightning.errors import UserError
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim import evaluate as module
from co2lightning.sim import optimum
from co2lightning.sim.days import SiteDays
from co2lightning.sim.evaluate import Evaluation, Figures, evaluate, summarise, violations
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import Schedule, evaluation_soc, run_days, schedule
from co2lightning.site.load import load_site
from co2lightning.train.fit import run_fit
from conftest import tree
from small_site import HELD_OUT, small_site, write_site


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a site `village` and a run PPO of two episodes on it."""
    place = tmp_path_factory.mktemp("evaluate")
    write_site(place / "village")
    flags: dict[str, Any] = {
        "episodes": 2,
        "env.site": str(place / "village"),
        "env.num_envs": 4,
        "checkpoints.dir": str(place / "checkpoints"),
        "logs.dir": str(place / "lightning_logs"),
    }
    run_fit(flags, agent="PPO", echo=lambda line: None)
    return place


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def figures(co2_kg: list[float], **columns: list[float]) -> Figures:
    zeros = np.zeros(len(co2_kg))
    given = {name: np.array(columns.get(name, zeros)) for name in Figures._fields}
    return Figures(**{**given, "co2_kg": np.array(co2_kg)})


def by_hand() -> Evaluation:
    return Evaluation(
        site="hand",
        days=("2025-01-01", "2025-01-02", "2025-01-03"),
        pv_kwh=np.array([10.0, 20.0, 10.0]),
        unavoidable_kwh=np.zeros(3),
        tolerance_kg=np.full(3, 1e-6),
        policies={
            "agent": figures([80.0, 90.0, 100.0], curtailed_kwh=[1.0, 2.0, 3.0]),
            "uncontrolled": figures([190.0, 200.0, 210.0], peak_import_kw=[5.0, 7.0, 6.0]),
            "rbc_a": figures([150.0, 150.0, 150.0]),
            "rbc_b": figures([82.0, 94.0, 106.0]),
            "optimum": figures([60.0, 70.0, 80.0]),
        },
    )


# --- statistics ----------------------------------------------------------------------------------


def test_intervals_are_students_t_over_days() -> None:
    mean, half_width = module.mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    # t(0.975, 3) = 3.1824; the standard error of 1, 2, 3, 4 is 1.29099 / 2.
    assert half_width == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-5)
    low, high = stats.t.interval(0.95, 3, loc=2.5, scale=stats.sem([1.0, 2.0, 3.0, 4.0]))
    assert half_width == pytest.approx((high - low) / 2)
    assert module.mean_interval(np.array([7.0])) == (7.0, None)


def test_summary_by_hand() -> None:
    summary = summarise(by_hand())
    agent = summary["agent"]
    assert agent.co2_kg == 90.0
    assert agent.vs_rbc_b_kg == pytest.approx(-4.0)
    # Paired: the differences are -2, -4, -6, their spread 2, not the days' spread of 10.
    assert agent.vs_rbc_b_kg_interval == pytest.approx(4.302653 * 2.0 / 3**0.5, rel=1e-5)
    assert agent.co2_kg_interval == pytest.approx(4.302653 * 10.0 / 3**0.5, rel=1e-5)
    assert agent.gap_closed == pytest.approx((200.0 - 90.0) / (200.0 - 70.0))
    assert agent.self_consumption == pytest.approx(1 - 6 / 40)
    assert agent.curtailed_kwh == pytest.approx(2.0)
    assert summary["uncontrolled"].peak_import_kw == 7.0
    assert summary["uncontrolled"].gap_closed == 0.0
    assert summary["optimum"].gap_closed == 1.0


def test_without_a_gap_or_sun_there_is_no_share() -> None:
    evaluation = by_hand()
    same = dict.fromkeys(evaluation.policies, evaluation.policies["optimum"])
    summary = summarise(replace(evaluation, policies=same, pv_kwh=np.zeros(3)))
    assert summary["agent"].gap_closed is None
    assert summary["agent"].self_consumption is None


def test_a_policy_below_the_optimum_is_named_with_its_day() -> None:
    evaluation = by_hand()
    assert violations(evaluation) == []
    evaluation.policies["rbc_b"].co2_kg[1] = 70.0 - 1e-7
    assert violations(evaluation) == []
    evaluation.policies["rbc_b"].co2_kg[1] = 69.0
    assert violations(evaluation) == [
        "2025-01-02: rbc_b emits 69.000000 kg, the optimum 70.000000 kg"
    ]


# --- evaluate ------------------------------------------------------------------------------------


def test_references_are_the_held_out_days_and_respect_the_bound(place: Path) -> None:
    site = load_site(place / "village")
    evaluation = evaluate(None, site)
    assert list(evaluation.days) == HELD_OUT
    assert list(evaluation.policies) == ["uncontrolled", "rbc_a", "rbc_b", "optimum"]
    assert violations(evaluation) == []
    days = torch.as_tensor(site.held_out_days)
    trace = run_days(priced_model(site), rbc_b, days, evaluation_soc(site)[days])
    expected = trace.total("co2_kg").double().numpy()
    assert evaluation.policies["rbc_b"].co2_kg == pytest.approx(expected)
    assert evaluation.pv_kwh == pytest.approx([(20 + day) * 6 for day in (2, 4, 5)])
    assert (evaluation.tolerance_kg < 1e-3).all()


def test_an_agent_that_acts_as_the_rule_is_the_rule(place: Path) -> None:
    class Imitator(PPO):
        def act(self, obs: torch.Tensor) -> torch.Tensor:
            return obs[:, list(SiteDays.rule_features)]

    site = load_site(place / "village")
    agent = Imitator(SiteDays.observation_dim, SiteDays.action_dim)
    policy = policy_of(agent, site)
    evaluation = evaluate(policy, site)
    assert next(iter(evaluation.policies)) == "agent"
    for own, rule in zip(evaluation.policies["agent"], evaluation.policies["rbc_b"], strict=True):
        assert own == pytest.approx(rule, abs=1e-4)
    spared = evaluate(policy, site, references=evaluation)
    assert spared.policies["optimum"] is evaluation.policies["optimum"]


def test_many_days_are_run_in_parts() -> None:
    site = load_site("iquitos")
    model, days = priced_model(site), list(range(70))
    parts = [schedule(model, rbc_b, site, some) for some in (days[:20], days[20:])]
    for whole, *columns in zip(schedule(model, rbc_b, site, days), *parts, strict=True):
        assert np.concatenate(columns) == pytest.approx(whole, abs=1e-5)


def test_unmet_is_what_charging_on_arrival_would_have_served() -> None:
    hurried = (0, 0, 40, 42, 20.0, 10.0)  # of 20 kWh it can take 5
    found = evaluate(None, small_site(sessions=[hurried], held_out=[0]))
    assert found.unavoidable_kwh.tolist() == pytest.approx([15.0])
    assert not found.policies["uncontrolled"].unmet_kwh.any()
    for name, own in found.schedules.items():
        beyond = np.maximum(own.unmet_kwh.sum(1) - found.unavoidable_kwh, 0.0)
        assert found.policies[name].unmet_kwh == pytest.approx(beyond)


# --- the command ---------------------------------------------------------------------------------


def test_json_is_all_that_standard_output_gets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["PPO", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    data = json.loads(printed.out)
    assert {key: data[key] for key in ("site", "agent", "action", "episode", "days")} == {
        "site": "village",
        "agent": "PPO",
        "action": "direct",
        "episode": 2,
        "days": HELD_OUT,
    }
    names = ["agent", "uncontrolled", "rbc_a", "rbc_b", "optimum"]
    assert list(data["policies"]) == list(data["summary"]) == names
    for columns in data["policies"].values():
        assert {"co2_kg", "unmet_kwh"} <= set(columns)
        assert all(len(column) == 3 for column in columns.values())
    mean = sum(data["policies"]["agent"]["co2_kg"]) / 3
    assert data["summary"]["agent"]["co2_kg"] == pytest.approx(mean, abs=1e-5)
    assert set(data["summary"]["agent"]) == set(module.Summary._fields)


def test_the_table_names_every_policy_and_the_episode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["PPO"]) == 0
    out = capsys.readouterr().out
    for text in ("episode 2", "3 held-out days of village", "RBC A", "optimum (LP)", "±"):
        assert text in out
    assert "correction" not in out


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


def test_the_table_says_that_actions_are_corrections(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = another_run(tmp_path, {"hyper_parameters": {"action": "correction"}})
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "PPO as a correction of RBC B, episode 1" in out
    assert "PPO, correction of RBC B" in out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["action"] == "correction"


def test_an_older_episode_and_its_scalars(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = place / "lightning_logs" / "PPO"
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
    readable: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is there, so nothing has failed; a line says what is not kept."""
    logs = tmp_path / "logs"
    shutil.copytree(place / "lightning_logs", logs)
    shutil.rmtree(logs / readable, ignore_errors=True)
    (logs / readable).symlink_to("/sys/kernel")
    assert main(["PPO", "--logs.dir", str(logs)]) == 0
    printed = capsys.readouterr()
    assert "optimum (LP)" in printed.out
    (line,) = printed.err.splitlines()
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
    assert len(printed.err.splitlines()) == 1
    assert "is not the one PPO was trained on" in printed.err


def test_a_bound_that_is_none_is_a_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    solve = optimum.optimum

    def worse(*arguments: Any) -> Schedule:
        best = solve(*arguments)
        return best._replace(co2_kg=best.co2_kg + 1000.0)

    monkeypatch.setattr(optimum, "optimum", worse)
    assert main(["PPO"]) == 1
    error = capsys.readouterr().err
    assert "2025-03-02: agent emits" in error
    assert "and 11 more" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["SAC"], "no episode in checkpoints/SAC; runs there: PPO"),
        ([], "such as: co2lightning test PPO"),
        (["PPO", "--jsn"], "--jsn"),
        (["PPO", "--ckpt_path", "none.pt"], "none.pt"),
        (["PPO", "--env.site", "nowhere"], "nowhere"),
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
        ({"hyper_parameters": {"observation_dim": 3, "action_dim": 1}}, "trained on 3 observ"),
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


def test_a_schedule_says_what_its_figures_say(place: Path) -> None:
    site = load_site(place / "village")
    evaluation = evaluate(None, site)
    battery, days = site.battery, site.held_out_days
    for name, plan in evaluation.schedules.items():
        exact = 1e-6 if name == "optimum" else 1e-3
        own_kw = plan.ev_kw + plan.battery_kw + (site.load_kw - site.pv_kw)[days]
        grid_kw = plan.grid_import_kw - plan.curtailed_kwh / 0.25
        assert grid_kw == pytest.approx(own_kw, abs=exact), name
        charged_kw = np.where(plan.battery_kw > 0, plan.battery_kw * battery.charge_efficiency, 0.0)
        given_kw = np.where(
            plan.battery_kw < 0, plan.battery_kw / battery.discharge_efficiency, 0.0
        )
        soc = np.concatenate([evaluation_soc(site)[days].numpy()[:, None], plan.soc], axis=1)
        stored_kwh = np.diff(soc, axis=1) * battery.capacity_kwh
        assert stored_kwh == pytest.approx((charged_kw + given_kw) * 0.25, abs=exact), name
        meter_kg = plan.grid_import_kw * site.carbon_kg_per_kwh[days] * 0.25
        settlement_kg = (soc[:, 0] - soc[:, -1]).clip(0) * battery.capacity_kwh
        settlement_kg *= site.carbon_kg_per_kwh[days].mean(1) / battery.charge_efficiency
        assert plan.co2_kg.sum(1) == pytest.approx(meter_kg.sum(1) + settlement_kg, abs=exact)
        assert plan.co2_kg[:, :-1] == pytest.approx(meter_kg[:, :-1], abs=exact), name
