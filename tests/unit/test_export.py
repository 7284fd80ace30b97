"""`export`: the ONNX graph is the policy, and it runs where there is no torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_predict import rows_of

from co2lightning.agents import agent_class
from co2lightning.agents.agent import Agent
from co2lightning.cli import main
from co2lightning.commands.export import build_onnx, metadata
from co2lightning.commands.predict import predict
from co2lightning.control.observation import FEATURES, HIGHEST, RULE_FEATURES
from co2lightning.sim.days import SiteDays
from co2lightning.site.load import load_site
from co2lightning.site.model import Site
from small_site import write_site

pytestmark = pytest.mark.usefixtures("inside")
Run = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
HIGH = np.full(len(FEATURES), HIGHEST)
HIGH[list(RULE_FEATURES)] = 1.0
KINDS = [
    ("A2C", {"activation": "tanh"}),
    ("SAC", {"activation": "relu", "hidden": (32,)}),
    ("SAC", {"activation": "silu", "action": "correction"}),
    ("PPO", {"activation": "tanh", "hidden": (16, 8, 4)}),
    ("PPO", {"activation": "silu", "action": "correction"}),
]


def decided(name: str, **settings: Any) -> Agent:
    """Return an agent with an opinion: at its bounds often enough, in between mostly."""
    agent: Agent = agent_class(name)(SiteDays.observation_dim, 2, seed=5, **settings)
    with torch.no_grad():
        agent.get_submodule("actor").last[0].mul_(60.0)
    return agent.eval()


def session_of(agent: Agent, site: Site) -> onnxruntime.InferenceSession:
    model = build_onnx(agent, site)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


@pytest.fixture
def tight(tmp_path: Path) -> Site:
    """A site whose connection is too small for all at once: the shield has to act."""
    directory = write_site(tmp_path / "tight")
    text = (directory / "site.yaml").read_text()
    (directory / "site.yaml").write_text(text.replace("grid_kw: 100", "grid_kw: 9"))
    return load_site(directory)


@pytest.mark.parametrize(("name", "settings"), KINDS)
@pytest.mark.parametrize("batch", [1, 64])
def test_actions_are_those_of_torch(
    trained: Path,
    name: str,
    settings: dict[str, Any],
    batch: int,
) -> None:
    agent = decided(name, **settings)
    session = session_of(agent, load_site(trained / "village"))
    draws = np.random.default_rng(batch)
    reached: set[float] = set()
    for _ in range(64 // batch + 3):
        obs = (HIGH * draws.uniform(-1, 1, (batch, len(FEATURES)))).astype(np.float32)
        obs[:, :20] /= 4
        (action,) = session.run(["action"], {"observation": obs})
        expected, _ = agent.predict(obs)
        assert np.abs(action - expected).max() < 1e-5
        reached |= set(np.sign(expected[np.abs(expected) > 0.5]).ravel())
    assert reached == {-1.0, 1.0}, "both ends of the range are tried"


@pytest.mark.parametrize(("name", "settings"), KINDS)
def test_powers_are_what_the_physics_does(tight: Site, name: str, settings: dict[str, Any]) -> None:
    agent = decided(name, **settings)
    session = session_of(agent, tight)
    assert tight.battery
    found, seen = predict(agent, tight, int(tight.stretches[0, 0]))
    planned = found.schedules["agent"][0]
    action, power_kw = session.run(["action", "power_kw"], {"observation": seen.astype(np.float32)})
    done_kw = np.stack([planned.ev_kw, planned.battery_kw], axis=1)
    assert np.abs(power_kw - done_kw).max() < 1e-3
    wanted_kw = action[:, 1] * tight.battery.power_kw
    assert (np.abs(wanted_kw - done_kw[:, 1]) > 1e-3).any(), "the shield acted"


def test_the_file_says_all_that_a_caller_needs(tmp_path: Path, capsys: Run) -> None:
    file = tmp_path / "policy.onnx"
    assert main(["export", "PPO", "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"PPO after episode 2 in {file}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["policy.onnx"]
    model = onnx.load(str(file))
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert (about["agent"], about["run"], about["episode"], about["site"]) == (
        *("PPO", "PPO", "2", "village"),
    )
    assert json.loads(about["observation_names"]) == [feature.name for feature in FEATURES]
    for key in ("units", "meanings", "centre", "spread"):
        assert len(json.loads(about[f"observation_{key}"])) == len(FEATURES)
    assert about["step_minutes"] == "15"
    assert json.loads(about["action_names"]) == ["ev", "battery"]
    assert (float(about["battery_kw"]), float(about["grid_kw"])) == (20.0, 100.0)
    assert "ev_kw = " in about["action_to_kw"]
    assert [value.name for value in model.graph.output] == ["action", "power_kw"]


def test_the_formula_in_the_metadata_is_the_graph(tight: Site) -> None:
    agent = decided("PPO")
    about = metadata(agent, tight)
    _, seen = predict(agent, tight, int(tight.stretches[0, 0]))
    actions, powers_kw = session_of(agent, tight).run(None, {"observation": seen.astype("f4")})
    for obs, (ev, battery), power_kw in zip(seen, actions, powers_kw, strict=True):
        columns = zip(obs, about["observation_spread"], about["observation_centre"], strict=True)
        values = [value * spread + centre for value, spread, centre in columns]
        names: dict[str, Any] = dict(zip(about["observation_names"], values, strict=True))
        names |= {"ev": ev, "battery": battery, "battery_kw": about["battery_kw"]}
        formulas = about["action_to_kw"].split("; ")
        assert formulas.pop().startswith("of features the values in kW")
        for formula in formulas:
            name, expression = formula.split(" = ")
            names[name] = eval(expression, {"min": min, "max": max}, names)
        assert [names["ev_kw"], names["battery_kw"]] == pytest.approx(power_kw.tolist(), abs=1e-3)


def test_the_example_runs_without_torch_and_does_what_predict_says(tmp_path: Path) -> None:
    for words in (
        ["export", "PPO", "--output", tmp_path / "policy.onnx"],
        [*("predict", "PPO", "--output", tmp_path / "schedule.csv"), "--observations"]
        + [tmp_path / "seen.csv"],
    ):
        assert main([str(word) for word in words]) == 0
    # A module set to None cannot be imported: as if torch were not installed.
    without = (
        "import runpy, sys; sys.modules.update(torch=None, lightning=None, co2lightning=None); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    example = ROOT / "examples" / "control_loop.py"
    command = [sys.executable, "-c", without, str(example), str(tmp_path / "policy.onnx")]
    with open(tmp_path / "seen.csv") as seen:
        ended = subprocess.run(command, stdin=seen, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "# PPO of village, episode 2\n"
    header, times, powers_kw = rows_of(ended.stdout)
    assert header == ["time", "ev_kw", "battery_kw"]
    _, planned_times, planned = rows_of((tmp_path / "schedule.csv").read_text())
    assert times == planned_times
    assert np.abs(powers_kw - planned[:, :2]).max() < 0.006
    broken = (tmp_path / "seen.csv").read_text().splitlines()
    broken[2] = broken[2].replace(",", ",nan,", 1).rsplit(",", 1)[0]
    ended = subprocess.run(command, input="\n".join(broken), capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"{times[1]}: a sensor gave no number"


def test_the_example_is_short() -> None:
    example = (ROOT / "examples" / "control_loop.py").read_text()
    assert len(example.splitlines()) <= 45
    assert not {"torch", "co2lightning"} & {
        line.split()[1].split(".")[0] for line in example.splitlines() if line[:6] == "import"
    }


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Run) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", "PPO", "--output", str(tmp_path / "policy.onnx")]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "error: export: the package onnx is missing; pip install 'co2lightning[onnx]'"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["PPO"], "required: --output; such as: co2lightning export PPO --output policy.onnx"),
        (["PPO", "--output", "no/policy.onnx"], "there is no directory"),
        (["SAC", "--output", "policy.onnx"], "export SAC: no episode in checkpoints/SAC"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str, capsys: Run) -> None:
    assert main(["export", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert said in printed.err
