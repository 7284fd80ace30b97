"""`export` of a rule: the ONNX graph gives what the rule does, and says so in words."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_predict import rows_of

from co2lightning.cli import main
from co2lightning.commands.export import metadata
from co2lightning.commands.onnx_graph import build_onnx, inputs_of
from co2lightning.control.moves import moves_of
from co2lightning.control.observation import NAMES, observe
from co2lightning.control.outlook import outlook_of
from co2lightning.control.rules import RULES, VEHICLES, Choice, Rule, Window, rbc_c
from co2lightning.control.state import Powers, SiteModel, State
from co2lightning.sim.evaluate import RULE_NAMES
from co2lightning.sim.objective import priced_model
from co2lightning.sim.scales import observer_of
from co2lightning.sim.schedule import play
from co2lightning.sim.search import rules_of
from co2lightning.site.model import Site
from small_site import random_site, real, shipped

pytestmark = pytest.mark.usefixtures("inside")
Run = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
SITES = ROOT / "tests" / "sites"


class Seen(NamedTuple):
    """A stretch: what was measured in each step, in scales, and what the simulator did."""

    features: np.ndarray  # [n, O], not clamped
    power_kw: np.ndarray  # [n, 2]

    def of(self, names: Any) -> np.ndarray:
        """Return the features of these names [n, how many]."""
        return self.features[:, [NAMES.index(name) for name in names]]


def played(site: Site, rule: Rule, bounds: tuple[int, int]) -> Seen:
    model, observer = priced_model(site), observer_of(site)
    observer = observer._replace(high=torch.full_like(observer.high, torch.inf))
    seen: list[torch.Tensor] = []

    def watched(model: SiteModel, state: State) -> torch.Tensor | Powers:
        seen.append(observe(observer, model, state, moves_of(observer.moves, model, state)))
        return rule(model, state)

    (course,) = play(model, watched, site, np.array([bounds]))
    powers = np.stack([course.schedule.ev_kw, course.schedule.battery_kw], axis=1)
    return Seen(torch.cat(seen).numpy(), powers)


def rule_of(name: str, site: Site) -> Rule:
    """Return a rule of a site; only for RBC C anything is searched."""
    if name == "rbc_c":
        return rules_of(site, keep=Path("checkpoints/references"))[name]
    cheap = Choice("cheap", greedy=site.battery is not None)
    return RULES.get(name) or functools.partial(rbc_c, cheap, outlook_of(site))


def powers_kw(model: onnx.ModelProto | Path, seen: np.ndarray) -> np.ndarray:
    """Run a graph on features [n, O]."""
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return cast(np.ndarray, session.run(["power_kw"], {"observation": seen})[0])


WEEKS = [
    *(("iquitos", name) for name in ("uncontrolled", "rbc_a", "rbc_b", "cheap")),
    *(("caltech-2019", name) for name in RULE_NAMES),
    *(("citylearn-5", name) for name in ("uncontrolled", "rbc_a", "rbc_b", "rbc_c")),
]


@pytest.mark.parametrize(("where", "name"), WEEKS)
def test_whole_weeks_are_those_of_the_simulator(where: str, name: str, tmp_path: Path) -> None:
    """Of vehicles the truth is known, or who is full refuses what a set point gives."""
    own = where == "iquitos"
    site, folder = (shipped(), where) if own else (real(where), str(SITES / where))
    file = tmp_path / "rule.onnx"
    words = ["--env.site", folder, "--env.announced", "false", "--output", str(file)]
    assert main(["export", name, *words]) == 0
    about = {prop.key: prop.value for prop in onnx.load(str(file)).metadata_props}
    rule = rule_of(name, site)
    for begin, end in site.stretch_bounds[:2].tolist():
        assert (end - begin) * site.step_h >= 7 * 24
        week = played(site, rule, (begin, end))
        seen = week.of(json.loads(about["observation_names"]))
        off_kw = np.abs(powers_kw(file, seen) - week.power_kw).max(axis=1)
        assert off_kw.max() < 2e-3


PARTS: dict[str, dict[str, Any]] = {
    "all": {},
    "dimmed": {"import_limit_kw": 7.0},
    "surplus only": {"may_charge_from_grid": False},
    "no battery": {"capacity_kwh": None},
    "no sockets": {"sockets": 0},
    "no sun": {"pv": 0.0},
    "5 minutes": {"step_minutes": 5, "days": 1},
    "20 minutes": {"step_minutes": 20},
}


def choices_of(site: Site) -> list[Choice]:
    """Return rules with all windows, across midnight too, and with none."""
    slots, hour = site.steps(24.0), site.steps(1.0)
    windows: dict[str, Any] = {
        "charge": Window(22 * hour, 5 * hour),
        "greedy": True,
        "fill": Window(5 * hour - 1, 4 * hour),
        "fill_soc": 0.65,
        "hold": Window(slots - 1, 7 * hour),
    }
    plain = [Choice(way, greedy=way != "cheap") for way in VEHICLES]
    return [*plain, *(Choice(way, **windows) for way in VEHICLES)]


def check(site: Site) -> None:
    for choice in choices_of(site):
        rule = functools.partial(rbc_c, choice, outlook_of(site))
        seen = played(site, rule, (0, site.n_steps))
        found_kw = powers_kw(build_onnx(choice, site), seen.of(inputs_of(choice)))
        assert np.abs(found_kw - seen.power_kw).max() < 1e-3, choice


@pytest.mark.parametrize("part", PARTS)
def test_every_choice_is_that_of_the_simulator_on_every_site(part: str) -> None:
    check(random_site(7, **{"days": 2, **PARTS[part]}))


def test_windows_go_by_the_clock_on_the_wall() -> None:
    """Clocks go back an hour on the second day; and steps of an hour that begin at half past."""
    site = random_site(7, days=3, step_minutes=60)
    back = np.where(np.arange(site.n_steps) > 26, np.timedelta64(60, "m"), np.timedelta64(0, "m"))
    check(replace(site, local=site.local - back))
    check(replace(site, local=site.local + np.timedelta64(30, "m")))
    check(replace(site, local=site.local - back // 2))


@pytest.mark.parametrize("part", ["all", "dimmed", "surplus only"])
def test_the_formula_in_the_metadata_is_the_graph(part: str) -> None:
    site = random_site(7, **{"days": 1, **PARTS[part]})
    local = site.local - site.local.astype("datetime64[D]")
    minute = local.astype("timedelta64[m]").astype(int)
    for choice in choices_of(site):
        about, names = metadata(choice, site), inputs_of(choice)
        rule = functools.partial(rbc_c, choice, outlook_of(site))
        seen = played(site, rule, (0, site.n_steps)).of(names)
        values = seen * np.array(about["observation_spread"]) + about["observation_centre"]
        *formulas, last = about["observation_to_kw"].split("; ")
        assert last.startswith("of features the values in kW")
        for row, power_kw in enumerate(powers_kw(build_onnx(choice, site), seen)):
            known: dict[str, Any] = dict(zip(names, values[row], strict=True))
            for name, (first, minutes) in about.get("windows", {}).items():
                known[name] = (minute[row] - first) % 1440 < minutes
            for formula in formulas:
                name, expression = formula.split(" = ")
                known[name] = eval(expression, {"min": min, "max": max}, known)
            assert [known["ev_kw"], known["battery_kw"]] == pytest.approx(power_kw, abs=1e-3)


def test_the_file_says_all_that_a_caller_needs(tmp_path: Path, capsys: Run) -> None:
    file = tmp_path / "rule.onnx"
    assert main(["export", "rbc_b", "--env.site", "village", "--output", str(file)]) == 0
    in_words = "charge from the sun; battery: store surplus and serve the load"
    assert capsys.readouterr().out == f"RBC B of village in {file}: {in_words}\n"
    model = onnx.load(str(file))
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert (about["rule"], about["in_words"], about["site"]) == ("rbc_b", in_words, "village")
    assert not {"agent", "run", "episode", "action_names", "windows"} & set(about)
    names = json.loads(about["observation_names"])
    assert set(names) < set(NAMES)
    for key in ("units", "meanings", "centre", "spread"):
        assert len(json.loads(about[f"observation_{key}"])) == len(names)
    assert json.loads(about["power_names"]) == ["ev_kw", "battery_kw"]
    assert (float(about["battery_kw"]), float(about["grid_kw"])) == (20.0, 100.0)
    assert (about["step_minutes"], len(about["site_sha256"])) == ("15", 64)
    assert about["vehicle_to_kw"].startswith("each vehicle gets solar of its own: with owed ")
    outputs = {v.name: v.type.tensor_type.shape.dim[1].dim_value for v in model.graph.output}
    assert outputs == {"power_kw": 2}


def test_uncontrolled_vehicles_ask_nobody(tmp_path: Path) -> None:
    """Where drivers announce, what is said is not what vehicles take."""
    file = tmp_path / "rule.onnx"
    words = ["--env.site", str(SITES / "caltech-2019"), "--output", str(file)]
    assert main(["export", "uncontrolled", *words]) == 0
    about = {prop.key: prop.value for prop in onnx.load(str(file)).metadata_props}
    assert "until it is full, whatever its driver announced" in about["vehicle_to_kw"]


def test_the_example_runs_a_rule_and_does_what_predict_says(tmp_path: Path) -> None:
    for words in (
        ["export", "rbc_c", "--output", tmp_path / "rule.onnx"],
        [*("predict", "rbc_c", "--output", tmp_path / "schedule.csv"), "--observations"]
        + [tmp_path / "seen.csv"],
    ):
        assert main([*map(str, words), "--env.site", "village"]) == 0
    example = ROOT / "examples" / "control_loop.py"
    with open(tmp_path / "seen.csv") as seen:
        command = [sys.executable, str(example), str(tmp_path / "rule.onnx")]
        ended = subprocess.run(command, stdin=seen, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("# rbc_c of village: charge ")
    planned = rows_of((tmp_path / "schedule.csv").read_text())[2]
    assert np.abs(rows_of(ended.stdout)[2] - planned[:, :2]).max() < 0.006


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rbc_d"], "export rbc_d: no episode in checkpoints/rbc_d; runs there: PPO; rules: unco"),
        (["rbc_c"], "export rbc_c: a rule needs a site, such as --env.site iquitos"),
        (["rbc_c", "--env.site", "nowhere"], "site nowhere: no such folder"),
        (["rbc_c", "--env.site", "village", "--env.objective", "cost"], "price_per_kwh"),
        (["cheap", "--env.site", str(SITES / "citylearn-5")], "no vehicle comes to citylearn-5"),
        (["PPO", "--env.objective", "co2"], "--env.objective: PPO is settled by what it was"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str, capsys: Run) -> None:
    assert main(["export", *arguments, "--output", "rule.onnx"]) == 2
    *remarks, error = capsys.readouterr().err.splitlines()
    assert all(remark.startswith("series.csv") for remark in remarks)
    assert said in error
    assert not Path("rule.onnx").exists()
