"""Which episode is the best: evaluated without noise, kept, handed out; else the start."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from processes import fork
from test_exact import check_history, curves, digest, state
from test_kills import killed

import co2lightning
from co2lightning.cli import main
from co2lightning.control.rules import rbc_b, uncontrolled
from co2lightning.errors import UserError
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.evaluate import evaluate
from co2lightning.sim.weeks import of_uncontrolled, settled_a_day, training_weeks
from conftest import TINY, Outcome
from small_site import real, small_site, write_site

Command = Callable[..., Outcome]
FIT = ["fit", "--model", "PPO", "--env.site", "village", "--env.num_envs", "4", *TINY["PPO"]]
EVAL = ["--evaluate_every", "2", "--model.learning_rate", "0.03", "--model.start", "even"]
RUN = "checkpoints/PPO"


@pytest.fixture
def village(place: Path) -> Path:
    return write_site(place / "village")


def figures(run: str = RUN) -> dict[int, float]:
    history = TrainingCheckpoint(run).load_history()
    rows = [row for session in history["trainings"] for row in session["metrics"]]
    return {row["episode"]: row["eval_vs_uncontrolled"] for row in rows if "eval_a_day" in row}


# --- what is measured ----------------------------------------------------------------------------


@pytest.mark.slow  # the search for RBC C
def test_a_policy_is_settled_in_training_weeks_as_test_settles_it_in_held_out_ones() -> None:
    pv_kw = np.maximum(0.0, 12.0 - np.abs(np.arange(96) - 48) / 2)
    carbon = np.where(np.arange(96) < 60, 0.3, 0.6)
    plugged = [(day, 0, 30 + day % 5, 90, 10.0 + day, 7.0) for day in range(24)]
    stays = [(day, 1, 80, 130, 12.0, 4.0) for day in range(23)]  # over midnight
    series = {"pv_kw": pv_kw, "load_kw": 3.0, "carbon": carbon}
    site = small_site(days=24, sockets=2, sessions=[*plugged, *stays], held_out=[23], **series)
    bounds = training_weeks(site)
    assert bounds.tolist() == [[0, 672], [672, 1344], [1344, 2016]]
    days = np.searchsorted(site.day_bounds, bounds)
    assert not any(site.held_out[a:b].any() for a, b in days)
    evaluation = evaluate(None, replace(site, stretches=days))
    for name, rule in (("rbc_b", rbc_b), ("uncontrolled", uncontrolled)):
        expected = evaluation.policies[name].settled.sum() / 21
        assert settled_a_day(rule, site) == pytest.approx(expected, rel=1e-6)
        share = expected / (evaluation.policies["uncontrolled"].settled.sum() / 21)
        assert of_uncontrolled(settled_a_day(rule, site), site) == pytest.approx(share, rel=1e-5)


def test_nothing_that_is_held_out_is_looked_at() -> None:
    """Where the days after a week are held out, what is left is priced at the training mean."""
    site = real("caltech-2019")
    ends = training_weeks(site)[:, 1]
    assert not site.training_steps[ends].any()
    another = site.carbon_kg_per_kwh.copy()
    another[~site.training_steps] *= 3.0
    other = replace(site, carbon_kg_per_kwh=another)
    assert settled_a_day(rbc_b, other) == pytest.approx(settled_a_day(rbc_b, site), rel=1e-9)


# --- exact resume --------------------------------------------------------------------------------


@pytest.fixture
def straight(village: Path, command: Command) -> dict[str, Any]:
    outcome = command(*FIT, *EVAL, "--episodes", "7", "--name", "straight")
    assert outcome.code == 0, outcome.err
    found = state("checkpoints/straight", 7)
    assert sorted(figures("checkpoints/straight")) == [2, 4, 6]
    return found | {"start": started("checkpoints/straight")}


def started(run: str) -> dict[str, str]:
    content = TrainingCheckpoint.read(f"{run}/start.pt")
    assert content["episode"] == 0
    return {key: digest(content[key]) for key in ("state_dict", "counters", "hyper_parameters")}


@pytest.mark.parametrize("cut", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow), 5])
def test_a_cut_run_has_the_same_best(straight: dict[str, Any], command: Command, cut: int) -> None:
    assert command(*FIT, *EVAL, "--episodes", str(cut)).code == 0
    whole = [*FIT[:3], "--ckpt_path", "last", "--total_episodes", "7"]
    outcome = command(*whole)  # the run knows how often
    assert outcome.code == 0, outcome.err
    assert state(RUN, 7) | {"start": started(RUN)} == straight
    assert (
        TrainingCheckpoint(RUN).best_evaluated()
        == TrainingCheckpoint("checkpoints/straight").best_evaluated()
    )
    (own,) = [c for tag, c in curves("PPO").items() if tag == "eval/objective_vs_uncontrolled"]
    assert own == pytest.approx(figures(), rel=1e-6)
    assert curves("PPO") == curves("straight")
    for name in ("history.json", "metadata.json"):
        Path(RUN, name).unlink()
    assert TrainingCheckpoint(RUN).best_evaluated() is not None, "the files tell it, too"
    best = TrainingCheckpoint(RUN).load_best_checkpoint()[1]
    assert best.name == TrainingCheckpoint("checkpoints/straight").load_best_checkpoint()[1].name


def die_at_every_call(place: str) -> None:
    """Kill `fit` at every so many file calls, and in the midst of an evaluation."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(Path(place, "before"))

    def train(copy: Path) -> None:
        os.chdir(copy)
        assert main([*FIT, *EVAL, "--episodes", "5"]) == 0

    for call in itertools.count(step=13):
        copy = shutil.copytree(Path(place, "before"), Path(place, f"{call}"))
        if not killed(train, copy, call):
            break
    from co2lightning.train import evaluation

    measured = evaluation.settled_a_day
    asked = 0

    def measure_and_die(*arguments: Any) -> float:
        nonlocal asked
        asked += 1
        if asked == 4:  # of the policy and the start at episode 2, the policy at 4; resumed: 4
            os.kill(os.getpid(), signal.SIGKILL)
        return measured(*arguments)

    evaluation.settled_a_day = measure_and_die
    copy = shutil.copytree(Path(place, "before"), Path(place, "measuring"))
    child = os.fork()
    if not child:
        os.chdir(copy)
        main([*FIT, *EVAL, "--episodes", "7"])
        os._exit(0)
    os._exit(0 if os.waitpid(child, 0)[1] == signal.SIGKILL else 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork")
def test_a_killed_run_has_the_same_best(
    straight: dict[str, Any], place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "killed" / "before").mkdir(parents=True)
    shutil.copytree("village", place / "killed" / "before" / "village")
    process = fork(die_at_every_call, str(place / "killed"))
    process.join()
    assert process.exitcode == 0
    copies = set((place / "killed").iterdir()) - {place / "killed" / "before"}
    assert len(copies) > 5
    for copy in copies:
        monkeypatch.chdir(copy)
        if copy.name == "measuring":
            assert TrainingCheckpoint(RUN).episodes() == [1, 2, 3, 4, 5]
        outcome = command(*FIT, *EVAL, "--ckpt_path", "last", "--total_episodes", "7")
        assert outcome.code == 0, outcome.err
        assert state(RUN, 7) | {"start": started(RUN)} == straight
        check_history(RUN, 7)


# --- the best, and the start ---------------------------------------------------------------------


class Tell(pl.Callback):
    """Tells what Lightning's users ask for."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        saving: Any = trainer.checkpoint_callback
        print("best", saving.best_model_path, float(saving.best_model_score))


def test_the_best_is_handed_out(village: Path, command: Command) -> None:
    words = ["--trainer.callbacks", '[{"class_path": "test_best.Tell"}]']
    outcome = command(*FIT, *EVAL, "--episodes", "6", *words)
    found = figures()
    best = min(found, key=lambda n: (found[n], n))
    start = TrainingCheckpoint.read(f"{RUN}/episode_0002.pt")["metrics"][
        "eval_start_vs_uncontrolled"
    ]
    assert found[best] < start, "it learns"
    name = f"episode_{best:04d}.pt"
    line = f"Best: episode {best}, {100 * found[best]:.1f} % of uncontrolled in training weeks"
    assert f"{line}; --ckpt_path best takes it" in outcome.out
    told = next(line for line in outcome.out.splitlines() if line.startswith("best "))
    assert told.split()[1] == f"{RUN}/{name}"
    assert float(told.split()[2]) == pytest.approx(found[best])
    assert f"best {best}" in command("history").out
    assert command("verify").out.startswith("PPO: ok, 6 checkpoints")

    agent = TrainingCheckpoint(RUN)
    weights = digest(agent.read(agent.path(best))["state_dict"])
    assert digest(agent.load_best_checkpoint()[0]["state_dict"]) == weights
    outcome = command("test", "PPO", "--ckpt_path", "best", "--json")
    assert f'"episode": {best}' in outcome.out
    outcome = command("predict", "PPO", "--ckpt_path", "best", "--output", "day.csv")
    assert f"PPO after episode {best}" in outcome.err

    agent.path(best).write_bytes(agent.path(best).read_bytes()[:-9])
    following = min((n for n in found if n != best), key=lambda n: (found[n], n))
    _, path, remarks = agent.load_best_checkpoint()
    assert path == agent.path(following if found[following] < start else 0)
    assert f"{name} is damaged" in remarks[0]
    assert "the next best one is taken" in remarks[0]


def test_training_goes_on_from_the_best_as_from_its_file(village: Path, command: Command) -> None:
    assert command(*FIT, *EVAL, "--episodes", "5").code == 0
    before = state(RUN, 5)
    best = TrainingCheckpoint(RUN).best_evaluated()
    assert best is not None
    assert best[1] in (2, 4)
    outcome = command("fit", "--model", "PPO", "--ckpt_path", "best", "--total_episodes", "5")
    assert f"Resuming PPO at episode {best[1] + 1}" in outcome.out
    assert "Later episodes of the old branch moved to checkpoints/archive/" in outcome.out
    assert state(RUN, 5) == before
    (archived,) = Path("checkpoints/archive").iterdir()
    assert started(str(archived)) == started(RUN)
    # From there into a new run, which takes the start along.
    file = str(archived / f"episode_{best[1]:04d}.pt")
    assert command("fit", "--ckpt_path", file, "--name", "new", "--episodes", "1").code == 0
    assert started("checkpoints/new") == started(RUN)


def test_a_run_that_learned_nothing_hands_out_what_it_started_from(
    village: Path, command: Command
) -> None:
    nothing = ["--evaluate_every", "1", "--model.learning_rate", "1e-30"]
    outcome = command(*FIT, *nothing, "--episodes", "2")
    assert "No evaluated episode is better than what it started from, start.pt" in outcome.out
    assert "best start" in command("history").out
    said = "PPO: no evaluated episode is better than what it started from: start.pt"
    outcome = command("test", "PPO", "--ckpt_path", "best", "--json")
    assert outcome.err.splitlines()[0] == said
    assert '"episode": 0' in outcome.out
    outcome = command("report", "PPO", "rbc_b", "--ckpt_path", "best")
    assert (outcome.code, outcome.err.splitlines()[0]) == (0, said)
    assert "PPO: episode 0 there" in outcome.out
    assert "start.pt" in Path("report.html").read_text(encoding="utf-8")
    agent = co2lightning.PPO.load_from_checkpoint(f"{RUN}/start.pt")
    first = co2lightning.PPO.load_from_checkpoint(f"{RUN}/episode_0001.pt")
    obs = np.zeros((1, agent.observation_dim), dtype=np.float32)
    assert agent.predict(obs)[0] == pytest.approx(first.predict(obs)[0], abs=1e-6)

    # To go on from it is to begin anew, with the run's settings, and moves the run away.
    before = started(RUN)
    outcome = command("fit", "--model", "PPO", "--ckpt_path", "best", "--episodes", "2")
    assert outcome.code == 0, outcome.err
    assert said in outcome.out
    assert f"Training PPO for 2 episodes (seed 0) from {RUN}/start.pt" in outcome.out
    (archived,) = Path("checkpoints/archive").iterdir()
    assert started(str(archived)) == started(RUN) == before
    assert state(RUN, 2) == state(str(archived), 2)
    check_history(RUN, 2)


def test_the_best_is_never_pruned(tmp_path: Path) -> None:
    """Evaluated ones are the best, whatever the figures of training days."""
    run = TrainingCheckpoint(tmp_path / "PPO", keep_last=2)
    run.begin_session(start_episode=1, device="cpu", info={"agent": "PPO"})
    run.save_start({"weights": torch.zeros(3)})
    evaluated = {2: 0.7, 4: 0.5, 6: 0.5, 8: 0.6}
    for episode in range(1, 10):
        own = {"co2_vs_uncontrolled": 0.1 if episode == 1 else 0.9, "reward": 0.0}
        if episode in evaluated:
            own |= {"eval_vs_uncontrolled": evaluated[episode], "eval_start_vs_uncontrolled": 0.8}
        run.save_checkpoint({"weights": torch.zeros(3)}, episode=episode, metrics=own)
        assert run.episodes()[0] == {1: 1, 2: 1, 3: 2, 4: 3}.get(episode, 4)
    run.end_session("completed")
    assert run.episodes() == [4, 8, 9]
    assert run.load_best_checkpoint()[1] == run.path(4)
    assert run.load_metadata()["best_episode"]["episode"] == 4
    assert run.verify() == []
    run.path(4).unlink()
    assert run.load_best_checkpoint()[1] == run.path(8)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def link(file: Path) -> None:
    file.rename("elsewhere.pt")
    file.symlink_to(Path("elsewhere.pt").resolve())


def exchange(file: Path) -> None:
    shutil.copy(file.parent / "episode_0001.pt", file)


@pytest.mark.parametrize("damage", [cut_off, link, exchange])
def test_a_damaged_start_is_found_and_moved_aside(
    village: Path, command: Command, damage: Callable[[Path], None]
) -> None:
    assert command(*FIT, *EVAL, "--episodes", "1").code == 0
    damage(Path(RUN, "start.pt"))
    outcome = command("verify")
    assert outcome.code == 1
    assert "PPO: start.pt is damaged" in outcome.out
    outcome = command(*FIT, *EVAL, "--ckpt_path", "last", "--episodes", "1")
    assert "start.pt is damaged" in outcome.out
    assert command("verify").code == 0
    found = TrainingCheckpoint.read(f"{RUN}/episode_0002.pt")["metrics"]
    assert "eval_start_vs_uncontrolled" not in found
    assert sorted(figures()) == [2], "it goes on without"
    assert TrainingCheckpoint(RUN).load_best_checkpoint()[1].name == "episode_0002.pt"


@pytest.mark.slow
def test_ranks_evaluate_together(place: Path) -> None:
    from test_ranks import kept, train

    words = ["--evaluate_every", "2", "--env.site", str(write_site(place / "village"))]
    train(place, "PPO", *words, "--episodes", "2", "--name", "straight")
    train(place, "PPO", *words, "--episodes", "1", "--name", "cut")
    train(place, "PPO", *words, "--ckpt_path", "last", "--episodes", "1", "--name", "cut")
    assert state("checkpoints/cut", 2) == state("checkpoints/straight", 2)
    ranks = [kept(place, "straight", number) for number in (0, 1)]
    assert "eval/objective_vs_uncontrolled" in ranks[0]["metrics"]
    assert ranks[0]["metrics"] == ranks[1]["metrics"]


# --- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_is_one_line(village: Path, command: Command) -> None:
    assert command(*FIT, "--evaluate_every", "0", "--episodes", "1").code == 0
    for words in ("test PPO", "predict PPO", "report PPO", "fit --model PPO"):
        outcome = command(*words.split(), "--ckpt_path", "best")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert "no episode in checkpoints/PPO was evaluated; fit on a site with" in outcome.err
        assert "--evaluate_every 10" in outcome.err
    with pytest.raises(UserError, match="was evaluated"):
        TrainingCheckpoint(RUN).load_best_checkpoint()
    for words, said in (
        (
            ["test", "NONE", "--ckpt_path", "best"],
            "no episode in checkpoints/NONE; runs there: PPO",
        ),
        ([*FIT, "--evaluate_every", "-1"], "--evaluate_every -1"),
        ([*FIT, "--evaluate_every", "often"], "--evaluate_every often"),
        (
            ["fit", "--model", "PPO", "--env.id", "Pendulum-v1", "--evaluate_every", "5"],
            "for sites",
        ),
        (["fit-all", "--ckpt_path", "best"], "--ckpt_path best: fit-all takes last only"),
    ):
        outcome = command(*words)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert said in outcome.err
    assert len(TrainingCheckpoint(RUN).episodes()) == 1
