"""The lines that README and the project's contract show to Python users run as they stand."""

import ast
import inspect
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import pytest
import torch

import co2lightning
from co2lightning.cli import main
from conftest import TINY
from small_site import write_site

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(SHOWN,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
CONTRACT = """\
import gymnasium as gym, co2lightning
env  = gym.make("co2lightning/ChargingSite-v0", site="iquitos")
envs = gym.make_vec("co2lightning/ChargingSite-v0", num_envs=64, site="iquitos")
agent = co2lightning.PPO.load_from_checkpoint("checkpoints/PPO/episode_0010.pt")
action, _ = agent.predict(obs, deterministic=True)
result = co2lightning.fit({"config": "ppo.yaml", "episodes": 5})      # what the command does
runs = co2lightning.TrainingCheckpoint("checkpoints/PPO")   # load_metadata, save_checkpoint, ...
"""


@pytest.fixture
def small(place: Path) -> None:
    """Give the recipe of the lines a small one in the directory they run in."""
    flags = [word.removeprefix("--model.") for word in TINY["PPO"]]
    settings = [f"  {key}: {value}" for key, value in zip(flags[::2], flags[1::2], strict=True)]
    env = ["env:", "  num_envs: 4", "  action: moves"]
    text = ["agent: PPO", "episodes: 10", *env, "model:", *settings]
    (place / "ppo.yaml").write_text("\n".join(text) + "\n")


def test_the_lines_of_the_readme_then_of_the_contract(
    small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    write_site(Path("village"))
    quick = SHOWN.replace('evaluate(agent, "iquitos")', 'evaluate(agent, "village")')
    assert quick != SHOWN, "the optimum of a year takes a minute"
    exec(quick, names)
    assert names["result"]["last_episode"] == 10
    assert names["run"].get_next_episode() == 11
    assert capsys.readouterr().out.splitlines()[-1].endswith(" 11")
    check_use(names)
    shown = set(re.findall(r"co2lightning\.\w+", SHOWN))
    assert shown >= set(re.findall(r"co2lightning\.[A-Z]\w+", CONTRACT)), "README shows them all"

    done = {ast.dump(line) for line in ast.parse(SHOWN).body}
    for line in ast.parse(CONTRACT).body:
        if ast.dump(line) not in done:  # what README shows too has run
            exec(ast.unparse(line), names)
    assert (names["result"]["first_episode"], names["result"]["last_episode"]) == (1, 5)
    assert names["runs"].get_next_episode() == 6
    assert names["runs"].load_metadata()["last_episode"] == 5


def check_use(names: dict[str, Any]) -> None:
    env, envs, action = names["env"], names["envs"], names["action"]
    assert isinstance(names["agent"], co2lightning.PPO)
    assert action.shape == env.action_space.shape
    assert env.action_space.contains(action)
    env.reset(seed=0)
    _, _, _, _, info = env.step(action)
    kinds = {"co2_kg", "grid_import_kwh", "curtailed_kwh", "unmet_kwh"}
    assert kinds <= set(info)
    obs, _ = envs.reset(seed=0)
    actions, _ = names["agent"].predict(obs)
    assert actions.shape == (64, 10)
    _, reward, *_, info = envs.step(actions)
    assert reward.shape == (64,)
    assert isinstance(info["co2_kg"], np.ndarray)


def by_hand(obs: np.ndarray) -> np.ndarray:
    """Charge all at once and leave the battery: what the rule `uncontrolled` does."""
    return np.stack([np.ones(len(obs)), np.zeros(len(obs))], axis=1)


def test_any_callable_is_evaluated_as_test_does(inside: None) -> None:
    found = co2lightning.evaluate(by_hand, "village", name="by hand")
    own, rule = (found["policies"][name] for name in ("agent", "uncontrolled"))
    assert own == rule
    assert {"objective", "stretches", "policies", "summary", "rbc_c"} <= set(found)
    for text in ("by hand", "RBC C", "optimum (LP)", "3 held-out days of village", "2025-03-04"):
        assert text in str(found)
    assert "\x1b" not in str(found)


def test_an_agent_is_evaluated_as_the_command_does(
    inside: None, command_in: Callable[..., str]
) -> None:
    agent = co2lightning.PPO.load_from_checkpoint("checkpoints/PPO/episode_0002.pt")
    found = co2lightning.evaluate(agent, co2lightning.load_site("village"))
    told = json.loads(command_in("test", "PPO", "--json"))
    own, of_command = found["policies"].pop("agent"), told["policies"].pop("agent")
    assert own["co2_kg_per_day"] == pytest.approx(of_command["co2_kg_per_day"], abs=1e-4)
    assert told["policies"] == found["policies"]
    assert told["stretches"] == json.loads(json.dumps(found["stretches"]))


def one_by_one(obs: np.ndarray) -> tuple[float, float]:
    assert obs.shape == (63,)
    return 1.0, 0.0


class Model:
    """Predicts as Stable-Baselines3's do: actions and a state."""

    def predict(self, obs: np.ndarray, deterministic: bool = False) -> tuple[np.ndarray, None]:
        assert obs.dtype == np.float32
        assert deterministic
        return by_hand(obs), None


@pytest.mark.parametrize(
    ("policy", "vectorized"),
    [
        (one_by_one, False),
        (Model(), True),
        (lambda obs: Model().predict(obs, True), True),
        (lambda obs: torch.tensor(by_hand(obs), requires_grad=True), True),
        (lambda obs: by_hand(obs).tolist(), True),
    ],
)
def test_what_may_be_a_policy(inside: None, policy: object, vectorized: bool) -> None:
    found = co2lightning.evaluate(policy, "village", vectorized=vectorized)
    assert found["policies"]["agent"] == found["policies"]["uncontrolled"]


@pytest.mark.parametrize(
    ("policy", "options", "said"),
    [
        (
            lambda obs: [1.0, 0.0],
            {},
            r"shape \[2\] for observations \[3, 63\], must be actions "
            r"\[3, 2\] or \[3, 10\]; vectorized=False gives",
        ),
        (
            lambda obs: obs,
            {"vectorized": False},
            r"shape \[63\] for .* must be actions \[2\] or \[10\]$",
        ),
        (lambda obs: None, {}, "policy: returned NoneType for"),
        (lambda obs: by_hand(obs) * np.nan, {}, "no finite numbers"),
        (0.5, {}, "float is neither callable"),
        (by_hand, {"objective": "cost"}, "price_per_kwh"),
    ],
)
def test_what_is_no_policy_is_one_line(
    inside: None, policy: object, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(co2lightning.UserError, match=said):
        co2lightning.evaluate(policy, "village", **options)


@pytest.fixture
def command_in(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return the command line as a function: words in, standard output out."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 0
        return capsys.readouterr().out

    return run


class SignalInTheSecondEpisode(pl.Callback):
    """Sends this process the signal `signum`."""

    signum = signal.SIGINT

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            signal.raise_signal(self.signum)


@pytest.mark.parametrize(
    ("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signals_and_threads_are_the_callers(
    small: None, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, raised: type
) -> None:
    """SIGINT as Python has it; SIGTERM as a caller may."""
    monkeypatch.setattr(SignalInTheSecondEpisode, "signum", signum)
    callback = {"class_path": f"{__name__}.SignalInTheSecondEpisode"}
    before = signal.getsignal(signum), torch.get_num_threads()
    mine = signal.default_int_handler if raised is KeyboardInterrupt else lambda *_: sys.exit(143)
    signal.signal(signum, mine)
    torch.set_num_threads(3)
    try:
        with pytest.raises(raised) as caught:
            co2lightning.fit({"config": "ppo.yaml", "trainer.callbacks": [callback]})
        assert (signal.getsignal(signum), torch.get_num_threads()) == (mine, 3)
    finally:
        signal.signal(signum, before[0])
        torch.set_num_threads(before[1])
    assert getattr(caught.value, "code", 143) == 143
    (session,) = co2lightning.TrainingCheckpoint("checkpoints/PPO").load_history()["trainings"]
    assert (session["end_episode"], session["status"]) == (1, "interrupted")


class PolicyPredictor:
    """What Stable-Baselines3's `evaluate_policy` takes, its type alias of this name."""

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        raise NotImplementedError


def test_an_agent_predicts_as_models_of_stable_baselines3_do() -> None:
    theirs = inspect.signature(PolicyPredictor.predict).parameters
    own = inspect.signature(co2lightning.PPO.predict).parameters
    assert [(p.name, p.kind) for p in own.values()] == [(p.name, p.kind) for p in theirs.values()]
    agent = co2lightning.PPO(29, 2, seed=1)
    seen = np.zeros((3, 29), np.float32)
    told = {"state": None, "episode_start": np.ones(3, bool), "deterministic": True}
    action, state = agent.predict(seen, **told)
    assert np.array_equal(action, agent.predict(seen)[0])
    assert state is None


def test_stable_baselines3_evaluates_an_agent() -> None:
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    aliases = pytest.importorskip("stable_baselines3.common.type_aliases")
    copied = inspect.signature(PolicyPredictor.predict).parameters
    assert list(copied) == list(inspect.signature(aliases.PolicyPredictor.predict).parameters)
    env = gym.make("co2lightning/ChargingSite-v0")
    mean, _ = evaluation.evaluate_policy(co2lightning.PPO(29, 2), env, 2, warn=False)
    assert np.isfinite(mean)


def test_what_a_type_checker_needs_is_there() -> None:
    """Public functions say what they take and give; `py.typed` tells checkers to believe it."""
    assert Path(co2lightning.__file__).with_name("py.typed").is_file()
    names = [name for name in dir(co2lightning) if name[0] != "_"]
    things = [getattr(co2lightning, name) for name in names]
    own = [each for each in things if getattr(each, "__module__", "").startswith("co2lightning.")]
    assert len(own) >= 10
    for thing in own:
        public = (
            [member for key, member in vars(thing).items() if key[0] != "_"]
            if inspect.isclass(thing)
            else [thing]
        )
        for function in filter(inspect.isfunction, public):
            signature = inspect.signature(function)
            assert signature.return_annotation is not inspect.Signature.empty, function
            given = [p for key, p in signature.parameters.items() if key not in ("self", "cls")]
            assert all(p.annotation is not inspect.Parameter.empty for p in given), function
