"""`export`: the ONNX graph is the policy, and it runs where there is no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_predict import rows_of

from co2lightning.agents import agent_class
from co2lightning.agents.agent import Agent
from co2lightning.cli import main
from co2lightning.commands.export import metadata
from co2lightning.commands.onnx_graph import build_onnx, inputs_of
from co2lightning.control.moves import MOVES, kind_of, moves_of
from co2lightning.control.observation import HIGHEST, NAMES
from co2lightning.control.state import State
from co2lightning.sim.days import SiteDays
from co2lightning.sim.objective import priced_model
from co2lightning.sim.scales import observer_of
from co2lightning.site.load import load_site
from co2lightning.site.model import Site
from small_site import random_site, write_site

pytestmark = pytest.mark.usefixtures("inside")
Run = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
A_FEW = ("could", "hour_sin", "soc", "price_mean_6_h", "must", "price_unusual", "deficit_4_h")
KINDS = [
    ("A2C", 2, {"activation": "tanh"}),
    ("SAC", 2, {"activation": "relu", "hidden": (32,)}),
    ("SAC", 10, {"activation": "silu"}),
    ("PPO", 10, {"activation": "tanh", "hidden": (16, 8, 4)}),
    ("PPO", 2, {"activation": "silu", "observation_names": A_FEW}),
    ("A2C", 10, {"activation": "relu", "observation_names": A_FEW}),
]


def decided(name: str, actions: int = 2, **settings: Any) -> Agent:
    """Return an agent with an opinion: at its bounds often enough, in between mostly."""
    names = settings.setdefault("observation_names", NAMES)
    agent: Agent = agent_class(name)(len(names), actions, seed=5, **settings)
    with torch.no_grad():
        agent.get_submodule("actor").last[0].mul_(200.0)
    return agent.eval()


def graph_of(agent: Agent, site: Site) -> Callable[..., list[np.ndarray]]:
    """Return the exported graph as a function of observations [N, O] and names of outputs."""
    model = build_onnx(agent, site)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(seen: np.ndarray, *outputs: str) -> list[np.ndarray]:
        return cast(list[np.ndarray], session.run(outputs, {"observation": seen}))

    return run


@pytest.fixture
def tight(tmp_path: Path) -> Site:
    """A site whose connection is too small for all at once: the shield has to act."""
    directory = write_site(tmp_path / "tight")
    text = (directory / "site.yaml").read_text()
    (directory / "site.yaml").write_text(text.replace("grid_kw: 100", "grid_kw: 9"))
    return load_site(directory)


@pytest.mark.parametrize(("name", "actions", "settings"), KINDS)
@pytest.mark.parametrize("batch", [1, 64])
def test_actions_are_those_of_torch(
    trained: Path,
    name: str,
    actions: int,
    settings: dict[str, Any],
    batch: int,
) -> None:
    agent = decided(name, actions, **settings)
    graph = graph_of(agent, load_site(trained / "village"))
    draws = np.random.default_rng(batch)
    reached: set[float] = set()
    for _ in range(64 // batch + 3):
        width = len(inputs_of(agent))
        obs = (HIGHEST * draws.uniform(-1, 1, (batch, width))).astype(np.float32) / 2
        (action,) = graph(obs, "action")
        expected, _ = agent.predict(obs[:, : agent.observation_dim])
        assert np.abs(action - expected).max() < 1e-5
        reached |= set(np.sign(expected[np.abs(expected) > 0.5]).ravel())
    assert reached == {-1.0, 1.0}, "both ends of the range are tried"


def test_only_the_network_sees_clamped_what_is_beyond_the_usual() -> None:
    site = random_site(7, days=2)
    agent = decided("PPO", 10)
    about = metadata(agent, site)
    obs = np.zeros((2, len(NAMES)), dtype=np.float32)
    obs[:, NAMES.index("discharge_limit")] = 1e4
    obs[:, NAMES.index("load")] = HIGHEST, 5 * HIGHEST
    action, weights, power_kw = graph_of(agent, site)(obs, "action", "weights", "power_kw")
    expected, _ = agent.predict(obs.clip(-HIGHEST, HIGHEST))
    np.testing.assert_allclose(action, expected, atol=1e-5)
    serves = weights[0, [at for at, (name, _) in enumerate(MOVES) if name in ("serve", "greedy")]]
    more_kw = 4 * HIGHEST * about["observation_spread"][NAMES.index("load")]
    assert serves.sum() > 0.01
    assert power_kw[0, 1] - power_kw[1, 1] == pytest.approx(serves.sum() * more_kw, rel=1e-3)


class Played(NamedTuple):
    """Steps of a day: what was observed, and what the simulator and the agent made of it."""

    seen: np.ndarray  # [n, O]
    action: np.ndarray  # [n, A]
    power_kw: np.ndarray  # [n, 2]
    socket_kw: np.ndarray  # [n, C]
    states: list[State]


def played(agent: Agent, site: Site) -> Played:
    env = SiteDays(site, 1, action=kind_of(agent.action_dim))
    env.show(inputs_of(agent))
    obs = env.begin(torch.tensor([1]), torch.tensor([0.5 if site.battery else 0.0]))
    rows: list[tuple[np.ndarray, ...]] = []
    states: list[State] = []
    with torch.no_grad():
        while env.steps_left:
            assert env.state is not None
            states.append(env.state)
            seen, action = obs, agent.act(obs[:, : agent.observation_dim])
            obs = env.step(action).obs
            powers = torch.stack([env.flows.ev_kw, env.flows.battery_kw], dim=1)
            parts = (seen, action, powers, env.flows.socket_kw)
            rows.append(tuple(part[0].numpy() for part in parts))
    columns = (np.stack(column) for column in zip(*rows, strict=True))
    seen, action, power_kw, socket_kw = columns
    return Played(seen, action, power_kw, socket_kw, states)


@pytest.mark.parametrize(("name", "actions", "settings"), KINDS)
def test_powers_are_what_the_physics_does(
    tight: Site, name: str, actions: int, settings: dict[str, Any]
) -> None:
    agent = decided(name, actions, **settings)
    day = played(agent, tight)
    action, power_kw = graph_of(agent, tight)(day.seen, "action", "power_kw")
    assert np.abs(action - day.action).max() < 1e-5
    assert np.abs(power_kw - day.power_kw).max() < 1e-3
    if actions == 2:
        assert tight.battery
        wanted_kw = action[:, 1] * tight.battery.power_kw
        assert (np.abs(wanted_kw - power_kw[:, 1]) > 1e-3).any(), "the shield acted"


PARTS: dict[str, dict[str, Any]] = {
    "all": {},
    "dimmed": {"import_limit_kw": 7.0},
    "surplus only": {"may_charge_from_grid": False},
    "no battery": {"capacity_kwh": None},
    "no sockets": {"sockets": 0},
    "no sun": {"pv": 0.0},
}


@pytest.mark.parametrize("part", PARTS)
def test_moves_are_those_of_the_simulator_on_every_site(part: str) -> None:
    site = random_site(7, days=3, **PARTS[part])
    agent = decided("PPO", 10)
    day = played(agent, site)
    action, weights, power_kw = graph_of(agent, site)(day.seen, "action", "weights", "power_kw")
    assert np.abs(power_kw - day.power_kw).max() < 1e-3
    np.testing.assert_allclose(weights.reshape(-1, 2, 5).sum(2), 1.0, rtol=1e-5)
    about = metadata(agent, site)
    mask = np.array(about["action_mask"])
    assert not weights[:, mask < 0].any()
    logits = np.exp(5.0 * action + mask)
    expected = logits.reshape(-1, 2, 5) / logits.reshape(-1, 2, 5).sum(2, keepdims=True)
    np.testing.assert_allclose(weights, expected.reshape(-1, 10), atol=1e-5)
    # Each vehicle's power is what the moves give it, weighed, where the connection has room.
    tables = observer_of(site).moves
    model = priced_model(site)
    for row, state in enumerate(day.states):
        each_kw = moves_of(tables, model, state).socket_kw[:, 0].numpy()
        wanted_kw = weights[row, :5] @ each_kw
        if wanted_kw.sum() <= state.supply_kw[0] - 1e-3:
            np.testing.assert_allclose(day.socket_kw[row], wanted_kw, atol=1e-3)


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
    assert json.loads(about["observation_names"]) == list(NAMES)
    for key in ("units", "meanings", "centre", "spread"):
        assert len(json.loads(about[f"observation_{key}"])) == len(NAMES)
    assert about["step_minutes"] == "15"
    assert about["action_kind"] == "moves"
    assert json.loads(about["action_names"]) == [name for name, _ in MOVES]
    assert json.loads(about["action_meanings"]) == [meaning for _, meaning in MOVES]
    for key in ("action_low", "action_high", "action_mask"):
        assert len(json.loads(about[key])) == 10
    assert "each vehicle gets w_must * must + " in about["vehicle_to_kw"]
    assert (float(about["battery_kw"]), float(about["grid_kw"])) == (20.0, 100.0)
    assert "ev_kw = " in about["action_to_kw"]
    outputs = {v.name: v.type.tensor_type.shape.dim[1].dim_value for v in model.graph.output}
    assert outputs == {"action": 10, "weights": 10, "power_kw": 2}


@pytest.mark.parametrize("actions", [2, 10])
def test_the_formula_in_the_metadata_is_the_graph(tight: Site, actions: int) -> None:
    agent = decided("PPO", actions)
    about, day = metadata(agent, tight), played(agent, tight)
    outputs = "power_kw", "action" if actions == 2 else "weights"
    powers_kw, given = graph_of(agent, tight)(day.seen, *outputs)
    prefix = "" if actions == 2 else "w_"
    for obs, numbers, power_kw in zip(day.seen, given, powers_kw, strict=True):
        columns = zip(obs, about["observation_spread"], about["observation_centre"], strict=True)
        values = [value * spread + centre for value, spread, centre in columns]
        names: dict[str, Any] = dict(zip(about["observation_names"], values, strict=True))
        named = (prefix + name for name in about["action_names"])
        names |= dict(zip(named, numbers, strict=True))
        names["battery_kw"] = about["battery_kw"]
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
