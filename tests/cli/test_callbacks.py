"""Callbacks that users bring end training, raise or cannot work here: one line says which."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest

import co2lightning
from co2lightning.runs.run import TrainingCheckpoint
from conftest import TINY, Outcome, tree

Command = Callable[..., Outcome]
LIGHTNING = "lightning.pytorch.callbacks"


class Raises(pl.Callback):
    """Raises in a hook, from the second episode on."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, trainer: pl.Trainer, *rest: Any, **options: Any) -> None:
        if trainer.current_epoch or trainer.fit_loop.epoch_progress.current.ready == 0:
            raise OSError(28, "of no use\nhere")


class RaisesAgain(Raises):
    def on_exception(self, *arguments: Any) -> None:
        raise RuntimeError("of no use here")


class OutOfTime(pl.Callback):
    """Ends training after each episode, and does not say why."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True


class Foreign(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"loss": np.float64(1.0)}


class SavesHalf(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        trainer.save_checkpoint("half.ckpt")


def brought(name: str, **options: Any) -> list[str]:
    path = f"{LIGHTNING}.{name}" if hasattr(pl.callbacks, name) else f"{__name__}.{name}"
    return ["--trainer.callbacks", json.dumps([{"class_path": path, "init_args": options}])]


@pytest.fixture
def train(command: Command) -> Command:
    """Return `fit` of a tiny PPO; whatever comes of it is no traceback."""

    def run(*words: str) -> Outcome:
        outcome = command("fit", "--model", "PPO", "--env.num_envs", "4", *TINY["PPO"], *words)
        assert outcome.err.count("\n") == (outcome.code != 0), outcome.err
        return outcome

    return run


def run() -> TrainingCheckpoint:
    return TrainingCheckpoint("checkpoints/PPO")


def status() -> str:
    return run().load_history()["trainings"][-1]["status"]


def test_what_early_stopping_has_ended_stays_ended(train: Command) -> None:
    """It monitors a figure by the history's own name."""
    stop = brought("EarlyStopping", monitor="co2_kg", patience=1, min_delta=1e6)
    said = train("--episodes", "5", *stop).out
    why = "EarlyStopping (Monitored metric co2_kg did not improve in the last 1 records. Best"
    assert f"Ended at episode 2 of 5 by {why}" in said
    assert status() == "completed"
    before = tree(run().directory)
    for words in (stop, [], ["--total_episodes", "5"]):
        outcome = train("--ckpt_path", "last", *words)
        assert outcome.code == 0
        assert outcome.out.startswith(f"PPO was ended at episode 2 by {why}")
        assert outcome.out.endswith("; --episodes N trains on\n")
    assert tree(run().directory) == before
    # What is asked for by number or beyond what was ended is trained; its patience is still at end.
    said = train("--ckpt_path", "last", "--episodes", "2", *stop).out
    assert "Ended at episode 3 of 4" in said
    said = train("--ckpt_path", "last", "--total_episodes", "6").out
    assert "Without the callback EarlyStopping{'monitor': 'co2_kg', 'mode': 'min'}" in said
    assert run().get_next_episode() == 7


def test_a_callback_that_ran_out_of_time(train: Command) -> None:
    """It did not say that more training is of no use: a restart loop with a total goes on."""
    loop = ["--ckpt_path", "last", *brought("OutOfTime")]
    assert "Ended at episode 1 of 4 by OutOfTime\n" in train(*loop, "--episodes", "4").out
    said = train(*loop).out
    assert said == "PPO was ended at episode 1 by OutOfTime; --episodes N trains on\n"
    for episode in (2, 3):
        assert f"Ended at episode {episode} of 3" in train(*loop, "--total_episodes", "3").out
    assert "was ended at episode 3" in train(*loop, "--total_episodes", "3").out


@pytest.mark.parametrize(
    ("callback", "hook", "saved", "closed"),
    [
        ("Raises", "on_train_epoch_start", 1, "failed"),
        ("Raises", "on_train_batch_end", 1, "failed"),
        ("Raises", "on_save_checkpoint", 1, "failed"),
        ("Raises", "on_train_end", 3, "failed"),
        ("Raises", "on_fit_end", 3, "completed"),
        ("RaisesAgain", "on_train_epoch_end", 1, "failed"),
    ],
)
def test_a_callback_raises(
    train: Command, callback: str, hook: str, saved: int, closed: str
) -> None:
    outcome = train("--episodes", "3", *brought(callback, hook=hook))
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: --trainer.callbacks: {callback} raised ")
    assert "of no use here; " in outcome.err
    assert f"; {saved} episode" in outcome.err
    assert (run().episodes()[-1], status()) == (saved, closed)
    assert run().verify() == []


def test_from_python_the_error_of_a_callback_is_kept(place: Path) -> None:
    options = {"model": "PPO", "env.num_envs": 4, "model.hidden": [8], "episodes": 2}
    callback = {"class_path": f"{__name__}.Raises", "init_args": {"hook": "on_train_epoch_start"}}
    with pytest.raises(co2lightning.TrainingError, match="Raises raised OSError") as caught:
        co2lightning.fit({**options, "trainer.callbacks": [callback]})
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("callback", "options", "said"),
    [
        ("Raises", {"hook": "setup"}, "cannot work here: "),
        ("Raises", {"hook": "on_train_start"}, "cannot work here: "),
        ("ModelCheckpoint", {}, "cannot work here: every episode is saved anyway"),
        ("OnExceptionCheckpoint", {"dirpath": "."}, "cannot work here: every episode is saved"),
        ("GradientAccumulationScheduler", {"scheduling": {0: 2}}, "not supported for manual"),
        ("BatchSizeFinder", {}, "cannot work here: "),
    ],
)
def test_a_callback_that_cannot_work_here(
    train: Command, callback: str, options: dict[str, Any], said: str
) -> None:
    outcome = train("--episodes", "2", *brought(callback, **options))
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: --trainer.callbacks: {callback} cannot work here: ")
    assert said in outcome.err
    assert not run().directory.exists()


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        ("SavesHalf", "SavesHalf raised UserError: half.ckpt: only whole episodes are saved"),
        ("Foreign", "the state of Foreign cannot be saved"),
    ],
)
def test_nothing_but_whole_episodes_of_plain_data_is_saved(
    train: Command, callback: str, said: str
) -> None:
    outcome = train("--episodes", "2", *brought(callback))
    assert outcome.code == 1
    assert said in outcome.err
    assert (run().episodes(), status()) == ([], "failed")
