"""The Lightning Trainer that episodes run under, made from the user's `--trainer` flags."""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.strategies import DDPStrategy

from co2lightning.errors import UserError
from co2lightning.settings.parser import given_trainer_flags, instantiate_trainer_settings
from co2lightning.settings.recipe import Settings

# What Lightning raises where its arguments do not go together.
_REFUSALS = (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError, KeyError)
# What is Lightning's by default; ours, where there is any, comes when a session begins.
_BARE: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


def make_trainer(settings: Settings, agent: str) -> pl.Trainer:
    """Make the Trainer that the settings of an agent ask for, with the user's callbacks alone.

    Raises:
        UserError: They cannot be, such as a GPU that is not there.
    """
    flags = given_trainer_flags(settings, agent)
    given = instantiate_trainer_settings(settings, agent)
    callbacks = given.pop("callbacks", None) or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    for callback in callbacks:
        if isinstance(callback, Checkpoint):
            raise UserError(
                f"--trainer.callbacks: {type(callback).__name__} cannot work here: every episode "
                "is saved anyway, as a whole"
            )
    try:
        with quiet():
            cluster = _cluster(given)
            trainer = pl.Trainer(
                **given,
                **_BARE,
                plugins=[*cluster],
                callbacks=callbacks,
                num_sanity_val_steps=0,
                log_every_n_steps=1,
            )
    except _REFUSALS as error:
        raise UserError(f"{flags}: {' '.join(str(error).split())}") from None
    # Until here what a variable said when it was imported.
    rank_zero_only.rank = trainer.global_rank  # pyright: ignore[reportFunctionMemberAccess]
    strategy = trainer.strategy
    if trainer.world_size > 1 and not (
        isinstance(strategy, DDPStrategy) and strategy._start_method == "popen"
    ):
        raise UserError(
            f"{flags}: several processes train by ddp; give --trainer.strategy ddp, or one "
            "device: --trainer.devices 1"
        )
    if trainer.global_rank >= trainer.world_size:
        raise UserError(
            f"{flags}: is for {processes(trainer.world_size)}, but LOCAL_RANK and NODE_RANK make "
            f"this number {trainer.global_rank}; unset them"
        )
    return trainer


def _cluster(given: dict[str, Any]) -> list[ClusterEnvironment]:
    """Return what tells the processes of a run apart; nothing where Lightning finds it.

    Devices and nodes alone say how many processes there are. A launcher counts where it has
    started just as many: its variables reach tasks that share a job, and stay behind in shells.

    Raises:
        ValueError: A launcher has started another number.
    """
    probe = pl.Trainer(
        **{key: given[key] for key in ("accelerator", "devices", "num_nodes")},
        **_BARE,
        plugins=LightningEnvironment(),
    )
    devices, nodes = probe.num_devices, probe.num_nodes
    if devices * nodes == 1:
        if given["strategy"] == "ddp":  # which is for several
            given["strategy"] = "auto"
        return [LightningEnvironment()]
    if TorchElasticEnvironment.detect():
        cluster = TorchElasticEnvironment()
    elif SLURMEnvironment.detect():
        if nodes == 1 and os.environ["SLURM_NTASKS"] == "1":
            return [LightningEnvironment()]  # one task, which starts the others itself
        # Requeuing would save in the middle of an episode; --ckpt_path last needs no such file.
        cluster = SLURMEnvironment(auto_requeue=False)
    elif "LOCAL_RANK" in os.environ and "MASTER_PORT" not in os.environ:
        raise ValueError("LOCAL_RANK is set, as by a launcher, and MASTER_PORT is not; unset it")
    else:
        return []
    cluster.validate_settings(devices, nodes)
    if cluster.world_size() != devices * nodes:
        asked, started = processes(devices * nodes), cluster.world_size()
        raise ValueError(f"is for {asked}, but the launcher has started {started}")
    return [cluster]


def users_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks that are none of this folder's."""
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]
    ours = __name__.rpartition(".")[0]
    return [each for each in callbacks if type(each).__module__.rpartition(".")[0] != ours]


def who_stopped(trainer: pl.Trainer) -> tuple[str, str]:
    """Return which callback has ended training, and why where that is known: EarlyStopping's."""
    brought = users_callbacks(trainer)
    for callback in brought:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            reason = callback.stopping_reason_message.removesuffix("Signaling Trainer to stop.")
            return type(callback).__name__, reason.strip(" .")
    return type(brought[0]).__name__ if len(brought) == 1 else "a callback", ""


def processes(count: int) -> str:
    """Say how many processes."""
    return "1 process" if count == 1 else f"{count} processes"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advertisements and its own deprecations off the screen.

    Nor does the thread that writes TensorBoard's files print a traceback on a full disk: its
    error is raised where the next figures are written, too.
    """
    with warnings.catch_warnings(), contextlib.ExitStack() as after:
        # Lightning 2.6 with torch 2.13, harmless.
        warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
        # Said in a line of ours.
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
        for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric")):
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        hook = threading.excepthook
        after.callback(setattr, threading, "excepthook", hook)
        threading.excepthook = lambda a: None if isinstance(a.exc_value, OSError) else hook(a)
        yield
