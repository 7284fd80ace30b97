"""What cannot be: exit code 2, one line that says what would be right, nothing changed on disk."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from co2lightning.agents import AGENTS
from co2lightning.agents.ppo import PPO
from co2lightning.errors import UserError
from co2lightning.runs import seal
from co2lightning.settings.parser import parse_flags, unknown_settings
from conftest import TINY, Outcome, tree
from forged import unseal

Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two episodes of PPO, once."""
    from co2lightning.train.fit import run_fit

    place = tmp_path_factory.mktemp("trained")
    dirs = [f"--checkpoints.dir={place}/checkpoints", f"--logs.dir={place}/lightning_logs"]
    words = ["--env.num_envs", "4", *TINY["PPO"], "--episodes", "2", *dirs]
    run_fit(parse_flags(words, "PPO"), agent="PPO", echo=lambda line: None)
    return place


@pytest.fixture
def site(place: Path) -> Path:
    """Copy the shipped site here, to break it."""
    from co2lightning import sites

    source = Path(str(sites.__file__)).parent / "iquitos"
    return Path(shutil.copytree(source, place / "site"))


@pytest.fixture
def refused(command: Command, trained: Path, place: Path) -> Callable[..., None]:
    shutil.copytree(trained, place, dirs_exist_ok=True)

    def check(*words: str, says: tuple[str, ...], recipe: str | None = "ppo.yaml") -> None:
        before = tree(place)
        outcome = command("fit", *(("--config", recipe) if recipe else ()), *words)
        assert outcome.code == 2, outcome
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.err.startswith("error: ")
        assert len(outcome.err) < 400, outcome.err
        assert "Traceback" not in outcome.err
        for part in says:
            assert part in outcome.err
        assert tree(place) == before

    return check


STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


def stop(**options: Any) -> list[str]:
    return ["--trainer.callbacks", json.dumps({"class_path": STOPPING, "init_args": options})]


FLAGS = [
    (["--episode", "3"], "--episode is not a flag of fit; did you mean --episodes?"),
    (["--model.learing_rate", "1"], "did you mean --model.learning_rate?"),
    (["--learning_rate", "1"], "did you mean --model.learning_rate?"),
    (["stray"], "stray is not a flag"),
    (["--trainer", "gpu"], "--trainer is a group of flags, such as --trainer."),
    (["--episodes"], "--episodes needs a value: a whole number"),
    (["--model.learning_rate", "fast"], "--model.learning_rate fast: must be a number"),
    (["--env.num_envs", "2.5"], "--env.num_envs 2.5: must be a whole number"),
    (["--model.hidden", "64"], "must be a list of whole numbers, such as [64, 64]"),
    (["--episodes", "0"], "--episodes 0: must be at least 1"),
    (["--episodes", "-3"], "--episodes -3: must be at least 1"),
    (["--episodes", "1000000"], "at least 1"),
    (["--total_episodes", "0"], "--total_episodes 0: must be at least 1"),
    (["--seed_everything", "-1"], "--seed_everything -1: must be at least 0"),
    (["--threads", "0"], "--threads 0: must be at least 1"),
    (["--checkpoints.keep_last", "0"], "--checkpoints.keep_last 0: must be at least 1"),
    (["--env.num_envs", "0"], "--env.num_envs 0: must be at least 1"),
    (["--model.learning_rate", "-1"], "--model.learning_rate -1.0: must be above 0"),
    (["--model.learning_rate", ".nan"], "--model.learning_rate nan: must be a finite number"),
    (["--model.reward_scale", ".inf"], "--model.reward_scale inf: must be a finite number"),
    (["--episodes", "1" * 401], "--episodes 1111"),
    (["--model.gamma", "1" * 401], "--model.gamma 1111"),
    (["--model.gamma=" + "1" * 401], "--model.gamma=1111"),
    (["--model.gamma", "2"], "--model.gamma 2.0: must be at least 0 and at most 1"),
    (["--model.batch_size", "0"], "--model.batch_size 0: must be at least 1"),
    (["--model.hidden", "[]"], "--model.hidden []: must be 1 to 16 widths, such as [64, 64]"),
    (["--model.hidden", "[64, 0]"], "--model.hidden [64, 0]: must be 1 to 16 widths"),
    (["--model.hidden", "[100000000]"], "at most 16,384"),
    (["--model.activation", "gelu"], "--model.activation gelu: must be one of tanh, relu, silu"),
    (["--trainer.max_epochs", "3"], "use --episodes or --total_episodes"),
    (["--trainer.max_steps=3"], "use --episodes or --total_episodes"),
    (["--trainer.devices", "0"], "--trainer.devices 0"),
    (
        ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy=ddp_spawn"],
        "--trainer.strategy ddp",
    ),
    (["--trainer.accelerator", "abacus"], "abacus"),
    (["--trainer.accelerator", "tpu"], "--trainer.accelerator tpu"),
    (["--seed", "3"], "--seed is not a flag of fit: use --seed_everything"),
    (["--model.lr", "1"], "--model.lr is not a flag of fit: use --model.learning_rate"),
    (stop(), f"{STOPPING}': the following arguments are required: monitor"),
    (stop(x=1), f"{STOPPING}': Option 'x' is not accepted"),
    (
        stop(monitor="x", mode="y"),
        f'--trainer.callbacks {{"class_path":"{STOPPING}","init_args":{{"monitor":"x","mode":"y"}}'
        "}: `mode` can be min, max, got y",
    ),
    (["--trainer.precision", "16-mixed"], "--trainer.precision 16-mixed: must be one of 32-true"),
    (["--trainer.precision", "7"], "--trainer.precision 7: must be"),
    (["--name", "../x"], "--name ../x: a plain directory name, such as night-tariff"),
    (["--name", "archive"], "--name archive"),
    (["--name", ""], "--name"),
    (["--name", "caf\udce9"], "caf\\udce9: is no UTF-8 text, as TensorBoard needs; give another"),
    (["--episodes", "3", "--total_episodes", "4"], "--episodes and --total_episodes: give one"),
    (["--ckpt_path", "nowhere.pt"], "--ckpt_path nowhere.pt: no such file; give last, best, or"),
    (["--ckpt_path", "https://example.org/a.pt"], "only local files"),
    (["--ckpt_path", "checkpoints/PPO"], "give a file in it, such as checkpoints/PPO/episode_0002"),
    (["--ckpt_path", "checkpoints"], "such as checkpoints/episode_0001.pt"),
    (["--checkpoints.dir", "runs", "--logs.dir", "runs"], "would be in runs/PPO, its curves in"),
    (["--checkpoints.dir", "runs", "--logs.dir", "a/../runs"], "give two directories apart"),
    (["--logs.dir", "checkpoints/PPO"], "--logs.dir checkpoints/PPO"),
    (["--checkpoints.dir", "lightning_logs/PPO"], "give two directories apart"),
    (["--name", "x" * 201], "x: 201 bytes; at most 200 leave room"),
    (["--ckpt_path"], "--ckpt_path needs a value, such as last"),
    (["--model", "DQN"], "--model DQN: no such agent; choose one of"),
    (["--config", "ppo.yaml"], "--config: given twice"),
    (["--env.site", "nowhere"], "nowhere: no such folder and no shipped site"),
    (["--checkpoints.dir", "checkpoints/PPO/history.json"], "history.json is not a directory"),
    (["--checkpoints.dir", "checkpoints/PPO/history.json/x"], "history.json is not a directory"),
    (["--logs.dir", "checkpoints/PPO/history.json/x"], "--logs.dir"),
    (["--ckpt_path", "last", "--model.hidden", "[16]"], "--model.hidden [16]: the checkpoint was"),
]


@pytest.mark.parametrize(("words", "says"), FLAGS, ids=lambda value: str(value)[:60])
def test_a_flag_that_cannot_be(refused: Callable[..., None], words: list[str], says: str) -> None:
    refused(*words, says=(says,))


@pytest.mark.parametrize("agent", AGENTS)
def test_what_fit_does_not_take_from_lightning_has_a_reason(agent: str) -> None:
    """And whatever flag the reason names is there."""
    parameters = [key for key in inspect.signature(Trainer).parameters if key != "self"]
    offered = [key for key in parameters if not unknown_settings([f"trainer.{key}"], agent)]
    assert len(offered) == 10
    for key in (*set(parameters).difference(offered), "seed", "lr", "num_workers", "resume"):
        for flag in (f"--{key}", f"--trainer.{key}"):
            with pytest.raises(UserError) as refusal:
                parse_flags([flag, "1"], agent)
            said, reason = str(refusal.value).split(": ", 1)
            assert said == f"{flag} is not a flag of fit"
            for named in re.findall(r"--([\w.]+)", reason):
                if (agent, named) != ("SAC", "model.max_grad_norm"):  # it clips nothing
                    assert named == "ckpt_path" or not unknown_settings([named], agent), reason


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_a_launchers_variable_that_is_no_number(
    refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "")
    refused(says=(f"{name} '': a launcher sets a number; unset it",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refused: Callable[..., None]) -> None:
    refused("--trainer.accelerator", "gpu", says=("--trainer.accelerator gpu", "backend"))


def test_no_recipe_and_no_agent(refused: Callable[..., None]) -> None:
    refused(recipe=None, says=("--config ppo.yaml",))
    refused("--ckpt_path", "last", recipe=None, says=("--config ppo.yaml",))


RECIPES = [
    (None, "no such file, here, in configs/ or among the packaged ones"),
    ("agent: [", "mine.yaml: line 1: is not plain YAML ("),
    ("\x00", "mine.yaml: is not plain YAML ("),
    ("agent: !!python/name:os.system\n", "mine.yaml: line 1: is not plain YAML ("),
    ("agent: " + "[" * 5000, "mine.yaml: line 1: is nested too deep"),
    ("agent: PPO\nmodel: {hidden: &a [8]}\nenv: *a\n", "line 3: aliases (*name) are not read"),
    (
        "agent: PPO\nmodel: {gamma: 0.5}\nepisodes: 1\nmodel: {gae_lambda: 0.5}\n",
        "mine.yaml: line 4: the key model is there twice, first in line 2; keep one",
    ),
    ("agent: PPO\nmodel: {gamma: 0.5, gamma: 0.6}\n", "line 2: the key gamma is there twice;"),
    (
        "agent: PPO\ntrainer:\n  callbacks:\n  - class_path: a\n    class_path: b\n",
        "line 5: the key class_path is there twice, first in line 4",
    ),
    ("agent: PPO\nmodel: {gamma: 0.5}\nmodel.gamma: 0.6\n", "model.gamma: is there twice; keep"),
    ("- a\n- b\n", "mine.yaml: a recipe holds keys such as"),
    ("episodes: 3\n", "mine.yaml: agent is missing; name one of"),
    ("agent: DQN\n", "mine.yaml: agent DQN: no such agent"),
    ("agent: PPO\nepisoods: 3\n", "mine.yaml: episoods is not a setting of PPO; did you mean"),
    ("agent: PPO\nmodel: {gama: 1}\n", "mine.yaml: model.gama is not a setting of PPO"),
    ("agent: PPO\nmodel: {gamma: 2}\n", "mine.yaml: model.gamma 2.0: must be at least 0"),
    ("agent: PPO\nmodel: {gamma: high}\n", "mine.yaml: model.gamma high: must be a number"),
    ("agent: PPO\nmodel: {gamma: null}\n", "mine.yaml: model.gamma null: must be a number"),
    ("agent: PPO\nmodel: 3\n", "mine.yaml: model 3: must be a group of settings"),
    ("model: SAC\n", "mine.yaml: agent is missing; name one of"),
    ("agent: SAC\nmodel: SAC\n", "model SAC: must be a group of settings; agent: PPO names"),
    ("agent: PPO\nmodel:\nenv: {num_envs: 0}\n", "mine.yaml: env.num_envs 0: must be at least"),
    ("agent: PPO\ntrainer: {max_epochs: 3}\n", "mine.yaml: trainer.max_epochs"),
    ("agent: PPO\nckpt_path: last\n", "ckpt_path is for the command line"),
    ("agent: PPO\nprint_config: true\n", "print_config is for the command line"),
]


@pytest.mark.parametrize(("text", "says"), RECIPES, ids=lambda value: str(value)[:40])
def test_a_recipe_that_cannot_be(
    refused: Callable[..., None], place: Path, text: str | None, says: str
) -> None:
    if text is not None:
        (place / "mine.yaml").write_text(text)
    refused(recipe="mine.yaml", says=("mine.yaml", says))


@pytest.mark.parametrize("file", ["site.yaml", "series.csv.gz", "sessions.csv.gz"])
def test_a_site_that_is_broken(refused: Callable[..., None], site: Path, file: str) -> None:
    (site / file).write_bytes(b"nothing of use")
    refused("--env.site", "site", says=(file,))
    (site / file).unlink()
    refused("--env.site", "site", says=(file,))


def test_another_agents_recipe(refused: Callable[..., None]) -> None:
    refused("--model", "SAC", says=("--model SAC: ppo.yaml is a recipe of PPO",))
    Path("sac.yaml").write_text("agent: PPO\nepisodes: 5\n")
    refused("--model", "SAC", recipe=None, says=("--model SAC: sac.yaml is a recipe of PPO",))


def reseal(source: Path, target: Path, **changes: Any) -> None:
    """Write a copy of an episode whose content differs, with a good seal."""
    content, record = unseal(source)
    for key, value in changes.items():
        content[key] = value
    target.write_bytes(seal.seal_checkpoint(content, record))


def test_a_checkpoint_of_another_agent(refused: Callable[..., None], place: Path) -> None:
    source = place / "checkpoints" / "PPO" / "episode_0002.pt"
    run = torch.load(source, weights_only=True)["run"]
    reseal(source, place / "other.pt", run={**run, "agent": "SAC"})
    refused("--ckpt_path", "other.pt", says=("other.pt: a checkpoint of SAC", "sac.yaml"))
    reseal(source, place / "other.pt", run={**run, "agent": "os.system"})
    refused("--ckpt_path", "other.pt", says=("other.pt: agent os.system: no such agent",))
    refused("--ckpt_path", "other.pt", recipe=None, says=("other.pt: agent os.system",))


def test_a_checkpoint_of_another_observation(refused: Callable[..., None], place: Path) -> None:
    source = place / "checkpoints" / "PPO" / "episode_0002.pt"
    stored = torch.load(source, weights_only=True)["hyper_parameters"]
    reseal(source, place / "other.pt", hyper_parameters={**stored, "observation_dim": 28})
    refused("--ckpt_path", "other.pt", says=("trained on 28 observations, the environment has",))


CONTENTS: list[dict[str, Any]] = [
    {"state_dict": {}},
    {"state_dict": {"actor.0.weight": torch.zeros(3)}},
    {"state_dict": 3},
    {"optimizer_states": []},
    {"optimizer_states": [3]},
    {"episode": "2"},
    {"episode": 7},
    {"epoch": None},
    {"loops": None},
    {"run": None},
    {"run": {"agent": "PPO", "config": 3}},
    {"run": {"agent": "PPO", "config": {"env.num_envs": "__import__('os')"}}},
    {"run": {"agent": "PPO", "config": {"model.hidden": [10**9]}}},
]


@pytest.mark.parametrize("changes", CONTENTS, ids=lambda value: str(value)[:50])
def test_a_checkpoint_of_odd_content(
    refused: Callable[..., None], place: Path, changes: dict[str, Any]
) -> None:
    reseal(place / "checkpoints" / "PPO" / "episode_0002.pt", place / "odd.pt", **changes)
    refused("--ckpt_path", "odd.pt", says=("odd.pt",))


def test_a_foreign_file(refused: Callable[..., None], place: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, place / "foreign.pt")
    refused("--ckpt_path", "foreign.pt", says=("foreign.pt is damaged", "not written by"))
    (place / "text.pt").write_text("no checkpoint at all")
    refused("--ckpt_path", "text.pt", says=("text.pt is damaged",))
    refused("--ckpt_path", "text.pt", recipe=None, says=("text.pt is damaged",))


def test_a_copy_within_the_run(refused: Callable[..., None], place: Path) -> None:
    run = place / "checkpoints" / "PPO"
    shutil.copy(run / "episode_0001.pt", run / "mine.pt")
    refused("--ckpt_path", "checkpoints/PPO/mine.pt", says=("a copy within the run",))


def test_a_command_that_is_not_there(command: Command) -> None:
    outcome = command("train")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith("error: train: no such command; choose one of fit, ")


def test_from_python(place: Path) -> None:
    from co2lightning.train.fit import fit

    refused: list[tuple[Any, str]] = [
        ({"config": "ppo.yaml", "episods": 5}, "fit: episods is not a setting of PPO; did you"),
        ({"config": "ppo.yaml", "episodes": 0}, "fit: episodes 0: must be at least 1"),
        ({"model": "PPO", "model.gamma": 10**400}, "fit: model.gamma 1000.*must be a finite"),
        ({"model": "PPO", "model.gamma": 10**5000}, "fit: model.gamma a huge int: must be"),
        ({"model": "DQN"}, "DQN: no such agent"),
        ({}, "--config"),
        ({"config": "ppo.yaml", "trainer": {"lr": 1}}, "trainer.lr is not a setting of PPO: use"),
        ({"config": {"agent": "PPO"}}, "fit: config .* must be the name of a recipe"),
        (["ppo.yaml"], "fit takes its settings as a dict"),
        ({"model": "PPO", "trainer.callbacks": [{"class_path": STOPPING}]}, "required: monitor"),
        (
            {"model": "PPO", "trainer": {"accelerator": "tpu", "callbacks": [Callback()]}},
            "--trainer.accelerator tpu --trainer.callbacks",
        ),
        ({"model": "SAC", "agent": "PPO"}, "fit: model SAC: must be a group of settings; agent"),
        ({"model": {"gamma": 0.5}, "model.gamma": 0.6}, "fit: model.gamma: is there twice"),
    ]
    for options, says in refused:
        with pytest.raises(UserError, match=says):
            fit(options)
    with pytest.raises(UserError, match=r"call agent.train_on\(environment\) before Trainer.fit"):
        Trainer(logger=False, enable_checkpointing=False, max_epochs=1).fit(PPO(29, 2))
    assert tree(place) == {}


def test_in_a_process_of_its_own(place: Path, environment: dict[str, str]) -> None:
    """One that refuses before it imports torch; test_fit_all.py has one that refuses after."""
    words = [sys.executable, "-m", "co2lightning", "train"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: train: no such command; choose one of fit, ")
    assert ended.stderr.count("\n") == 1
    assert tree(place) == {}
