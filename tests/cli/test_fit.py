"""What `fit` promises: which episodes, which settings, which files."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from co2lightning import agents
from co2lightning.agents import AGENTS
from co2lightning.agents.agent import Agent
from co2lightning.agents.ppo import PPO, Samples
from co2lightning.errors import UserError
from co2lightning.learn.dataset import Rollout, RolloutDataset
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.settings.parser import check_settings, complete, parse_flags
from co2lightning.settings.recipe import Settings, read_recipe
from co2lightning.train.curves import Curves
from conftest import TINY, Outcome, tree
from small_site import write_site

Fit = Callable[..., Outcome]


def shipped() -> list[str]:
    """Return the agents that have a recipe."""
    names: list[str] = []
    for name in AGENTS:
        try:
            read_recipe(f"{name.lower()}.yaml")
        except UserError:
            continue
        names.append(name)
    return names


def done(agent: str = "PPO") -> int:
    return len(list(Path("checkpoints", agent).glob("episode_*.pt")))


def statuses(run: str = "checkpoints/PPO") -> list[tuple[int, int, str]]:
    history = TrainingCheckpoint(run).load_history()
    return [(s["start_episode"], s["end_episode"], s["status"]) for s in history["trainings"]]


# --- which episodes -----------------------------------------------------------------------------


@pytest.mark.parametrize("agent", shipped())
def test_a_run_leaves_what_is_documented_and_nothing_else(
    fit: Fit, place: Path, agent: str
) -> None:
    outcome = fit(agent, "--episodes", "2")
    note, training, corner, first, *_ = outcome.out.splitlines()
    assert note.startswith("sessions.csv.gz: 4472 of 118856 sessions found no free socket")
    assert training == f"Training {agent} for 2 episodes (seed 0)"
    assert corner.startswith("Starting from the corner: charge from the surplus, least laxity")
    assert first.startswith("Episode    1/2: CO2=")
    assert "kg (" in first
    assert "| reward=" in first
    assert first.endswith(" s")
    names = set(tree(place))
    expected = {
        *("checkpoints", "lightning_logs", f"lightning_logs/{agent}"),
        *(f"{base}/.{agent}.lock" for base in ("checkpoints", "lightning_logs")),
        f"checkpoints/{agent}",
        *(
            f"checkpoints/{agent}/{name}"
            for name in (
                *("episode_0001.pt", "episode_0002.pt", "start.pt"),
                *("history.json", "metadata.json"),
            )
        ),
    }
    if agent == "SAC":
        expected |= {
            f"checkpoints/SAC/replay{name}" for name in ("", "/episode_0001.pt", "/episode_0002.pt")
        }
    events = {name for name in names if "events.out.tfevents" in name}
    assert names - events == expected
    assert len(events) == 1
    content = torch.load(f"checkpoints/{agent}/episode_0002.pt", weights_only=True)
    assert content["episode"] == 2
    assert content["epoch"] == 1
    assert {"co2_kg", "reward", "time_seconds", "unmet_kwh"} <= set(content["metrics"])
    assert "T" in content["timestamp"]
    assert TrainingCheckpoint(f"checkpoints/{agent}").verify() == []


def test_episodes_are_so_many_more(fit: Fit) -> None:
    fit("PPO", "--episodes", "2")
    outcome = fit("PPO", "--episodes", "1", "--ckpt_path", "last")
    assert "Resuming PPO at episode 3 (2 episodes done)" in outcome.out
    assert done() == 3
    assert statuses() == [(1, 2, "completed"), (3, 3, "completed")]


def test_total_episodes(fit: Fit, place: Path) -> None:
    outcome = fit("PPO", "--total_episodes", "2", "--ckpt_path", "last")
    assert "No checkpoint in checkpoints/PPO: starting at episode 1" in outcome.out
    before = tree(place / "checkpoints" / "PPO")
    outcome = fit("PPO", "--total_episodes", "2", "--ckpt_path", "last")
    assert outcome.out == "PPO stands at episode 2; 2 episodes in total are done\n"
    assert {**tree(place / "checkpoints" / "PPO"), "history.json": ""} == {
        **before,
        "history.json": "",
    }
    fit("PPO", "--total_episodes", "3", "--ckpt_path", "last")
    assert done() == 3


def test_without_a_number_the_recipe_or_the_interrupted_session_decides(
    fit: Fit, command: Fit, place: Path
) -> None:
    recipe = "agent: PPO\nepisodes: 2\n"
    (place / "mine.yaml").write_text(recipe)
    words = ("fit", "--config", "mine.yaml", "--env.num_envs", "4", *TINY["PPO"])
    assert command(*words).code == 0
    assert done() == 2
    assert command(*words, "--ckpt_path", "last").code == 0
    assert done() == 4
    for episode in (3, 4):  # as if killed in a session that was to end at 4
        Path(f"checkpoints/PPO/episode_{episode:04d}.pt").unlink()
    fit("PPO", "--episodes", "3", "--ckpt_path", "last")
    assert done() == 5
    Path("checkpoints/PPO/episode_0005.pt").unlink()
    outcome = command(*words, "--ckpt_path", "last")
    assert "Resuming PPO at episode 5" in outcome.out
    assert done() == 5


# --- where it starts ----------------------------------------------------------------------------


def test_a_new_run_archives_the_old_one_and_says_how_to_go_on(fit: Fit, command: Fit) -> None:
    fit("PPO", "--episodes", "2")
    before = tree(Path("checkpoints/PPO"))
    outcome = fit("PPO", "--episodes", "1")
    line = next(line for line in outcome.out.splitlines() if "was moved to" in line)
    words = line.split("; co2lightning ")[1].removesuffix(" continues it").split()
    archived = Path(words[-1]).parent
    assert archived.parent == Path("checkpoints/archive")
    assert tree(archived) == before
    assert (Path("lightning_logs/archive") / archived.name).is_dir()
    outcome = command(*words, "--episodes", "1")
    assert "Resuming PPO at episode 3" in outcome.out
    assert statuses() == [(1, 2, "completed"), (3, 3, "completed")]
    assert sorted(scalars("PPO")["site/co2_kg"]) == [1, 2, 3]


def test_the_line_of_an_archived_run_names_its_name_and_directories(fit: Fit) -> None:
    words = ("--name", "night tariff", "--checkpoints.dir", "c", "--logs.dir", "l")
    fit("PPO", "--episodes", "1", *words)
    outcome = fit("PPO", "--episodes", "1", *words)
    assert "--name 'night tariff' --checkpoints.dir c --logs.dir l continues it" in outcome.out
    assert Path("l/night tariff").is_dir()
    assert Path("c/night tariff/episode_0001.pt").is_file()


def test_a_file_of_the_run_branches(fit: Fit, command: Fit) -> None:
    fit("PPO", "--episodes", "4")
    outcome = fit("PPO", "--episodes", "1", "--ckpt_path", "checkpoints/PPO/episode_0002.pt")
    assert "Later episodes of the old branch moved to checkpoints/archive/PPO-" in outcome.out
    assert "Resuming PPO at episode 3 (2 episodes done)" in outcome.out
    assert done() == 3
    (archived,) = Path("checkpoints/archive").iterdir()
    assert len(list(archived.glob("episode_*.pt"))) == 4
    assert sorted(scalars(f"archive/{archived.name}")["site/co2_kg"]) == [1, 2, 3, 4]
    assert sorted(scalars("PPO")["site/co2_kg"]) == [1, 2, 3]
    assert TrainingCheckpoint("checkpoints/PPO").verify() == []
    told = re.search(r"co2lightning (fit .*) continues it", outcome.out)
    assert told
    back = command(*shlex.split(told[1]), "--episodes", "1")
    assert "Resuming PPO at episode 5 (4 episodes done)" in back.out


def test_a_file_of_elsewhere_is_adopted(fit: Fit, command: Fit, place: Path) -> None:
    fit("PPO", "--episodes", "3", "--name", "first")
    before = tree(place / "checkpoints" / "first")
    outcome = command("fit", "--ckpt_path", "checkpoints/first/episode_0002.pt", "--episodes", "1")
    assert outcome.code == 0, outcome.err
    assert "Copied what came before episode 3 from checkpoints/first" in outcome.out
    assert done() == 3
    assert tree(place / "checkpoints" / "first") == before
    assert sorted(scalars("PPO")["site/co2_kg"]) == [1, 2, 3]
    shutil.copy("checkpoints/first/episode_0003.pt", place / "alone.pt")
    assert command("fit", "--ckpt_path", "alone.pt", "--episodes", "1", "--name", "b").code == 0
    assert TrainingCheckpoint("checkpoints/b").load_history()["total_episodes"] == 4
    assert TrainingCheckpoint("checkpoints/b").verify() == []
    shutil.rmtree("lightning_logs")
    words = ("--ckpt_path", "checkpoints/first/episode_0002.pt", "--episodes", "1", "--name", "c")
    assert command("fit", *words).code == 0
    assert sorted(scalars("c")["site/co2_kg"]) == [1, 2, 3]


def test_prepared_directories_are_used_and_links_stay(fit: Fit, place: Path) -> None:
    """An empty directory is no run; what is behind a link is archived, and new runs go there."""
    for base in ("checkpoints", "lightning_logs"):
        (place / "large" / base).mkdir(parents=True)
        (place / base).mkdir()
        (place / base / "PPO").symlink_to(Path("..", "large", base))
    assert "moved" not in fit("PPO", "--episodes", "2").out
    said = fit("PPO", "--episodes", "1").out
    (archived,) = Path("checkpoints/archive").iterdir()
    assert f"The run in checkpoints/PPO was moved to {archived}; co2lightning fit" in said
    assert TrainingCheckpoint(archived).episodes() == [1, 2]
    assert sorted(scalars(f"archive/{archived.name}")["site/co2_kg"]) == [1, 2]
    fit("PPO", "--episodes", "1", "--ckpt_path", str(archived / "episode_0002.pt"))
    assert sorted(scalars("PPO")["site/co2_kg"]) == [1, 2, 3]
    for path in (Path("checkpoints/PPO"), *Path("checkpoints/archive").iterdir()):
        assert TrainingCheckpoint(path).verify() == []
    for base in ("checkpoints", "lightning_logs"):
        assert Path(base, "PPO").is_symlink()
        assert any((place / "large" / base).iterdir())


# --- which settings -----------------------------------------------------------------------------


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the rate of every optimizer when a segment is learned."""
    seen: list[float] = []

    def watched(learn: Any) -> Any:
        def watch(self: Agent, rollout: Rollout) -> Any:
            seen.extend(g["lr"] for o in self.trainer.optimizers for g in o.param_groups)
            return learn(self, rollout)

        return watch

    for made in map(agents.agent_class, AGENTS):
        monkeypatch.setattr(made, "minibatches", watched(made.minibatches))
    return seen


@pytest.mark.parametrize("agent", shipped())
def test_a_changed_flag_takes_effect_and_is_printed(
    fit: Fit, rates: list[float], agent: str
) -> None:
    keep = ("--model.anneal_episodes", "0")
    fit(agent, "--episodes", "1", "--model.learning_rate", "0.0003", *keep)
    outcome = fit(agent, "--episodes", "1", "--ckpt_path", "last")
    assert "->" not in outcome.out
    assert set(rates) == {0.0003}
    rates.clear()
    words = ("--ckpt_path", "last", "--model.learning_rate", "1e-3", "--seed_everything", "7")
    outcome = fit(agent, "--episodes", "1", *words)
    assert "\nlearning_rate: 0.0003 -> 0.001\n" in f"\n{outcome.out}"
    assert "seed_everything: 0 -> 7" in outcome.out
    assert set(rates) == {0.001}
    rates.clear()
    fit(agent, "--episodes", "1", "--ckpt_path", "last")
    assert set(rates) == {0.001}, "the run keeps what it was last changed to"


def test_a_recipe_that_differs_is_listed_with_its_flag(fit: Fit, command: Fit) -> None:
    fit("PPO", "--episodes", "1", "--model.gamma", "0.5")
    outcome = command("fit", "--config", "ppo.yaml", "--episodes", "1", "--ckpt_path", "last")
    gamma = read_recipe("ppo.yaml")[1]["model.gamma"]
    line = f"ppo.yaml has model.gamma {gamma}, the run keeps 0.5; --model.gamma {gamma} applies it"
    assert line in outcome.out
    assert "->" not in outcome.out
    outcome = fit("PPO", "--episodes", "1", "--ckpt_path", "last", "--model.gamma", str(gamma))
    assert f"gamma: 0.5 -> {gamma}" in outcome.out
    assert "the run keeps 0.5" not in outcome.out


def test_the_checkpoint_alone_is_enough(fit: Fit, command: Fit) -> None:
    fit("PPO", "--episodes", "1", "--seed_everything", "3")
    words = ("fit", "--ckpt_path", "checkpoints/PPO/episode_0001.pt", "--episodes", "1")
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    assert "Resuming PPO at episode 2" in outcome.out
    assert TrainingCheckpoint("checkpoints/PPO").load_metadata()["seed"] == 3


def test_an_older_checkpoint_loads(
    fit: Fit, command: Fit, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_bad_input import reseal

    fit("PPO", "--episodes", "1")
    source = place / "checkpoints" / "PPO" / "episode_0001.pt"
    run = torch.load(source, weights_only=True)["run"]
    stored = {k: v for k, v in run["config"].items() if k != "model.gae_lambda"}
    stored["model.momentum"] = 0.5
    reseal(source, place / "old.pt", run={**run, "config": stored})
    outcome = command("fit", "--ckpt_path", "old.pt", "--episodes", "1", "--name", "old")
    assert outcome.code == 0, outcome.err
    assert "old.pt: this version has no model.momentum; its 0.5 is ignored" in outcome.out
    told = read_recipe("ppo.yaml")[1]["model.n_epochs"]
    assert f"ppo.yaml has model.n_epochs {told}, the run keeps 2" in outcome.out


def test_changed_site_data_are_told(fit: Fit, place: Path) -> None:
    write_site(place / "site")
    fit("PPO", "--episodes", "1", "--env.site", "site")
    file = place / "site" / "site.yaml"
    file.write_text(file.read_text() + "\n# changed\n")
    outcome = fit("PPO", "--episodes", "1", "--ckpt_path", "last")
    assert "training goes on with these" in outcome.out


def test_from_python(place: Path) -> None:
    from co2lightning.train.fit import fit

    tiny = {"env.num_envs": 4, "model": {"n_epochs": 1, "hidden": [8]}}
    result = fit({"config": "ppo.yaml", "episodes": 2, **tiny})
    assert (result["agent"], result["first_episode"], result["last_episode"]) == ("PPO", 1, 2)
    assert result["checkpoint"] == str(Path("checkpoints/PPO/episode_0002.pt"))
    assert result["metrics"]["site/co2_kg"] > 0
    result = fit({"ckpt_path": "last", "model.n_epochs": 2, "agent": "PPO", "episodes": 1})
    assert (result["first_episode"], result["last_episode"]) == (3, 3)


def test_help(command: Fit) -> None:
    for words in (["--help"], ["fit", "--help"]):
        outcome = command(*words)
        assert outcome.code == 0
        assert max(map(len, outcome.out.splitlines())) <= 100
        assert "co2lightning fit --config ppo.yaml --ckpt_path last" in outcome.out
    for text in ("--model.learning_rate", "--env.site", "--trainer.accelerator", "--total_epis"):
        assert text in outcome.out
    assert "lightning.pytorch" not in outcome.out


def test_help_shows_the_recipes_values(fit: Fit, command: Fit) -> None:
    def default(name: str, *words: str) -> str:
        text = " ".join(command("fit", *words, "--help").out.split())
        (value,) = re.findall(rf"--{name} .*?\(default: (.*?)\)", text)
        return value

    told = read_recipe("sac.yaml")[1]["model.tau"]
    assert default("model.tau", "--config", "sac.yaml") == str(told) != "0.005"
    assert default("model.tau", "--model", "SAC") == str(told)
    Path("mine.yaml").write_text("agent: SAC\nmodel: {tau: 0.25}\n")
    assert default("model.tau", "--config", "mine.yaml") == "0.25"
    assert default("env.num_envs", "--config", "mine.yaml") == "64"
    shown = command("fit", "--config=mine.yaml", "-h").out
    assert "They are those of mine.yaml" in " ".join(shown.split())
    Path("mine.yaml").write_text("agent: SAC\nmodel: {taw: 0.25}\n")
    assert command("fit", "--config", "mine.yaml", "--help").code == 2
    assert default("env.num_envs") == "64"


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        *((f"{name.lower()}.yaml", []) for name in shipped()),
        ("long.yaml", []),
        ("ppo.yaml", ["--episodes", "9000"]),  # is not compiled, as a recipe with 9000 would be
        (
            "a2c.yaml",
            [
                *("--name", "007", "--logs.dir", "here: #1", "--threads", "2"),
                *("--model.hidden", "[8]", "--model.learning_rate", "1e-05"),
                *("--trainer.callbacks", '[{"class_path": "lightning.pytorch.callbacks.Timer"}]'),
                *("--total_episodes", "3", "--trainer.devices", "1"),
            ],
        ),
    ],
    ids=str,
)
def test_printed_settings_are_a_recipe_for_the_same(
    command: Fit, recipe: str, flags: list[str]
) -> None:
    Path("long.yaml").write_text("agent: PPO\nepisodes: 9000\n")
    printed = command("fit", "--config", recipe, *flags, "--print_config")
    assert (printed.code, printed.err) == (0, "")
    Path("mine.yaml").write_text(printed.out)
    agent, wanted = settings_of(recipe)
    wanted |= parse_flags(flags, agent)
    wanted.pop("total_episodes", None)
    wanted["model.compile"] = recipe == "long.yaml"  # what auto comes to
    assert settings_of("mine.yaml") == (agent, complete(wanted, agent))
    assert command("fit", "--config", "mine.yaml", "--print_config").out == printed.out
    assert sorted(path.name for path in Path().iterdir()) == ["long.yaml", "mine.yaml"]


def settings_of(recipe: str) -> tuple[str, Settings]:
    agent, settings = read_recipe(recipe)
    return agent, complete(check_settings(settings, agent, recipe), agent)


def test_printed_settings_of_a_resume_are_the_runs(fit: Fit, command: Fit) -> None:
    fit("PPO", "--episodes", "1", "--model.gamma", "0.5", "--seed_everything", "7")
    words = ("fit", "--config", "ppo.yaml", "--ckpt_path", "last", "--print_config")
    out = command(*words, "--model.gae_lambda", "0.25").out
    for line in ("  gamma: 0.5", "  gae_lambda: 0.25", "seed_everything: 7", "  num_envs: 4"):
        assert f"{line}\n" in out
    assert done() == 1


# --- how it learns ------------------------------------------------------------------------------


def scalars(run: str) -> dict[str, dict[int, float]]:
    """Read the curves back as TensorBoard does; a step that stands twice fails."""
    reader = EventAccumulator(str(Path("lightning_logs", run)), size_guidance={"scalars": 0})
    reader.Reload()
    curves: dict[str, dict[int, float]] = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        curves[tag] = {event.step: event.value for event in events}
        assert len(curves[tag]) == len(events), f"{tag}: a step stands twice"
        assert list(curves[tag]) == sorted(curves[tag])
    return curves


TAGS = {
    *("rollout/ep_rew_mean", "site/co2_kg", "site/co2_vs_uncontrolled", "site/grid_import_kwh"),
    *("site/curtailment_kwh", "site/self_consumption", "site/unmet_kwh", "time/episode_seconds"),
    *("time/env_steps_per_second", "train/loss", "train/learning_rate"),
}
OWN_TAGS = {
    "APG": {"train/left_at_end", "train/costate_loss"},
    "A2C": {"train/value_loss", "train/policy_loss", "train/entropy", "train/explained_variance"},
    "SAC": {"train/actor_loss", "train/critic_loss", "train/ent_coef"},
    "PPO": {
        *("train/value_loss", "train/policy_loss", "train/entropy", "train/explained_variance"),
        *("train/approx_kl", "train/clip_fraction"),
    },
}


@pytest.mark.parametrize("agent", shipped())
def test_every_documented_tag_has_a_value_per_episode(fit: Fit, agent: str) -> None:
    fit(agent, "--episodes", "2")
    curves = scalars(agent)
    assert TAGS | OWN_TAGS[agent] <= set(curves)
    assert not any("step" in tag.split("/") for tag in curves)
    for tag in TAGS:
        assert list(curves[tag]) == [1, 2] or tag == "train/loss"
    reader = EventAccumulator(f"lightning_logs/{agent}")
    reader.Reload()
    assert "_hparams_/session_start_info" in reader.summary_metadata


@pytest.mark.parametrize("agent", shipped())
def test_curves_that_are_gone_are_drawn_again(fit: Fit, agent: str) -> None:
    """As in a run that was copied without its logs; what the history knows has its place."""
    fit(agent, "--episodes", "3")
    before = scalars(agent)
    shutil.rmtree("lightning_logs")
    fit(agent, "--episodes", "1", "--ckpt_path", "last")
    after = scalars(agent)
    assert {
        tag: {n: v for n, v in curve.items() if n < 4} for tag, curve in after.items()
    } == before
    assert all(4 in curve for curve in after.values())
    reader = EventAccumulator(f"lightning_logs/{agent}")
    reader.Reload()
    assert "_hparams_/session_start_info" in reader.summary_metadata


@pytest.mark.parametrize("lost", [{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}], ids=str)
def test_gaps_in_the_curves_are_filled(lost: set[int], place: Path, sessions: Path) -> None:
    shutil.copytree(sessions, place, dirs_exist_ok=True)
    before = scalars("PPO")
    files = sorted(Path("lightning_logs/PPO").glob("*tfevents*"))
    assert len(files) == 3
    for number in lost:
        files[number].unlink()
    for _ in range(2):  # what was added is in place the next time, too
        Curves("lightning_logs", "PPO", 6, history=figures("PPO")).finalize("success")
        assert scalars("PPO") == before


def figures(name: str) -> list[dict[str, float]]:
    sessions = TrainingCheckpoint(f"checkpoints/{name}").load_history()["trainings"]
    return [row for session in sessions for row in session["metrics"]]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three sessions of two episodes, once."""
    from co2lightning.settings.parser import parse_flags
    from co2lightning.train.fit import run_fit

    place = tmp_path_factory.mktemp("sessions")
    dirs = [f"--checkpoints.dir={place}/checkpoints", f"--logs.dir={place}/lightning_logs"]
    words = ["--env.num_envs", "4", *TINY["PPO"], "--episodes", "2", *dirs]
    for _ in range(3):
        flags = {**parse_flags(words, "PPO"), "ckpt_path": "last"}
        run_fit(flags, agent="PPO", echo=lambda line: None)
    return place


@pytest.mark.parametrize("agent", ["A2C", "PPO"])
def test_the_ratio_is_exactly_one_before_the_first_step(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, agent: str
) -> None:
    """Each segment is played by the policy that is about to learn from it."""
    played: list[int] = []
    learned: list[bool] = []
    made = agents.agent_class(agent)
    play, learn = RolloutDataset.play, made.minibatches

    def watch_play(self: RolloutDataset) -> Any:
        for rollout in play(self):
            played.append(len(learned))
            yield rollout

    def watch_learn(self: Agent, rollout: Rollout) -> Any:
        noise = self.draw_noise(96, rollout.obs.shape[1])[24 * (len(learned) % 4) :]
        with torch.inference_mode():
            now = [self.explore(*each) for each in zip(rollout.obs, noise, strict=False)]
        learned.append(torch.allclose(torch.stack(now), rollout.action, rtol=0.0, atol=2e-6))
        return learn(self, rollout)

    monkeypatch.setattr(RolloutDataset, "play", watch_play)
    monkeypatch.setattr(made, "minibatches", watch_learn)
    first_ratios: list[float] = []
    if agent == "PPO":
        loss = PPO.loss

        def watch_loss(self: PPO, samples: Samples) -> Any:
            if len(first_ratios) < len(learned):
                with torch.no_grad():
                    now = self.log_prob(samples.obs, samples.action)
                    log_ratio = now - samples.log_prob
                first_ratios.append(float(log_ratio.abs().max()))
            return loss(self, samples)

        monkeypatch.setattr(PPO, "loss", watch_loss)
    fit(agent, "--episodes", "2", "--model.n_steps", "24")
    fit(agent, "--episodes", "1", "--model.n_steps", "24", "--ckpt_path", "last")
    assert learned == [True] * 12
    # Only a matrix product's rounding lies between a minibatch and the whole.
    assert all(log_ratio < 1e-5 for log_ratio in first_ratios)
    assert len(first_ratios) == (12 if agent == "PPO" else 0)
    assert played == list(range(12)), "a segment was played before the last one was learned"


# APG plays in its loss.
@pytest.mark.parametrize("agent", [name for name in shipped() if name != "APG"])
def test_an_episode_without_a_gradient_step_is_saved_too(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, agent: str
) -> None:
    monkeypatch.setattr(agents.agent_class(agent), "minibatches", lambda self, rollout: ())
    fit(agent, "--episodes", "2")
    assert done(agent) == 2


def test_a_profiler_says_where_the_time_went(fit: Fit) -> None:
    said = fit("PPO", "--episodes", "1", "--trainer.profiler", "simple").out
    assert "FIT Profiler Report" in said
    assert re.search(r"PPO.on_train_epoch_end +\| +[\d.e-]+ +\|", said)


def test_a_callback_may_end_training_early(fit: Fit, place: Path) -> None:
    """It sees an episode's figures; what is said and kept is what was trained."""
    stop = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "site/unmet_kwh", "stopping_threshold": 1.0},
    }
    said = fit("PPO", "--episodes", "4", "--trainer.callbacks", json.dumps([stop])).out
    assert "1 episode in checkpoints/PPO" in said
    run = TrainingCheckpoint("checkpoints/PPO")
    assert run.episodes() == [1]
    assert run.load_metadata()["status"] == "completed"
