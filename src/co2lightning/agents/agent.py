"""What every agent shares: episodes, seeds, schedules, metrics, acting.

Shapes: n steps of a segment, B environments, O features, A actions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from co2lightning.control.observation import RULE_FEATURES
from co2lightning.errors import TrainingError, UserError
from co2lightning.learn import ranks
from co2lightning.learn.descent import Descent
from co2lightning.learn.rollout import Rollout, RolloutDataset
from co2lightning.learn.seeds import episode_generator, episode_seed
from co2lightning.metrics import short_metrics
from co2lightning.runs.ledger import MAX_EPISODES, parse_count
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.settings.config import check_agent, check_stored
from co2lightning.sim.interface import Environment

SIZES = {
    "observation_dim": "observations",
    "hindsight_dim": "features of hindsight",
    "action_dim": "actions",
}
"""The hyperparameters that an environment sets, and what they count."""


def agent_of(content: dict[str, Any], origin: str | Path) -> str:
    """Return the name of the agent whose episode a checkpoint's content is.

    Raises:
        UserError: It is not that of an episode of this project; `origin` names its file.
    """
    kinds = dict.fromkeys(("run", "state_dict", "hyper_parameters", "counters", "loops"), dict)
    try:
        parse_count(content, "episode", least=1, most=MAX_EPISODES)
        for key, kind in {**kinds, "optimizer_states": list}.items():
            if not isinstance(content.get(key), kind):
                raise ValueError(f"{key} is no {kind.__name__}")
        run = content["run"]
        if not isinstance(run.get("config"), dict):
            raise ValueError("its run has no config")
    except ValueError as error:
        raise UserError(
            f"{origin}: not an episode of co2lightning ({error}); give one such as episode_0004.pt"
        ) from None
    return check_agent(run.get("agent"), f"{origin}: agent")


def check_sizes(
    content: dict[str, Any], origin: str | Path, sizes: dict[str, int], place: str
) -> None:
    """Raise a UserError if an episode was trained on other `sizes` than `place` has."""
    for key, size in sizes.items():
        trained = content["hyper_parameters"].get(key, 0)
        if type(trained) is int and trained != size:
            raise UserError(
                f"{origin}: trained on {trained} {SIZES[key]}, {place} has {size}; a run keeps its "
                "environment, start a new one for another"
            )


MOST_SKIPPED = 10  # updates in a row whose gradient is not finite


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds a number which is not finite."""
    return next((name for name, each in tensors.items() if not each.isfinite().all()), None)


class Agent(pl.LightningModule):
    """An agent that learns episode by episode under Lightning's Trainer.

    One epoch of the Trainer is one episode. Every draw comes from a generator seeded by (seed,
    episode, rank), every schedule depends on the absolute episode: a resumed agent does what the
    uninterrupted one would have done.
    """

    fixed_settings = ("hidden", "activation", "log_std_init")
    """What a resume cannot change: it is in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.env: Environment | None = None
        self.world_size = 1
        self.env_steps = 0
        self.updates = 0
        self.metrics: dict[str, float] = {}
        self.say: Callable[[str], None] = print

    # -- what an agent defines -----------------------------------------------------------------

    def segment_steps(self, horizon: int) -> int:
        """Return how many steps of the episode are collected between two updates."""
        raise NotImplementedError

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Return the policy's output [B, A] for obs [B, O], with standard normal noise [B, A]."""
        raise NotImplementedError

    def policy_mean(self, obs: Tensor) -> Tensor:
        """Return the policy's deterministic output [..., A] for obs [..., O]."""
        raise NotImplementedError

    def loss(self, batch: Any, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a minibatch and its figures; a compiled update runs it too."""
        raise NotImplementedError

    def follow(self) -> None:
        """Move what follows the weights after each step of the optimizer."""

    def learn(self, rollout: Rollout) -> dict[str, Tensor]:
        """Run all updates of one segment; return its figures beside the loss's, on the device."""
        raise NotImplementedError

    def updates_per_episode(self, env: Environment) -> int:
        """Return the number of updates in an episode."""
        raise NotImplementedError

    # -- acting ---------------------------------------------------------------------------------

    def policy_obs(self, obs: Tensor) -> Tensor:
        """Return what the policy sees [..., O] of obs [..., O + K]; the rest is for critics."""
        return obs[..., : self.hparams["observation_dim"]]

    def environment_action(self, obs: Tensor, output: Tensor) -> Tensor:
        """Return the environment's action [..., A] in [-1, 1] for a policy's output [..., A].

        "direct" takes the output as it is. "correction" adds it to what the rule RBC B would do,
        which the observation holds: residual policy learning, Johannink et al. 2019.
        """
        if self.hparams["action"] == "correction":
            assert RULE_FEATURES[1] == RULE_FEATURES[0] + 1
            output = output + obs[..., RULE_FEATURES[0] : RULE_FEATURES[1] + 1]
        return output.clamp(-1.0, 1.0)

    def act(self, obs: Tensor) -> Tensor:
        """Return the deterministic action [..., A] in [-1, 1] for obs [..., O]."""
        return self.environment_action(obs, self.policy_mean(obs))

    @property
    def acts_in_a_graph(self) -> bool:
        """Whether `explore` may be compiled for this episode."""
        return self.hparams["compile"] is True

    # -- episodes and seeds --------------------------------------------------------------------

    @property
    def episode(self) -> int:
        """The episode being played, from 1."""
        return self.current_epoch + 1

    def episode_seed(self, stream: str) -> int:
        """Return the seed of a stream of draws in this episode on this rank."""
        return episode_seed(self.hparams["seed"], self.episode, self.global_rank, stream)

    def episode_generator(self, stream: str) -> torch.Generator:
        """Return the generator of a stream of draws in this episode on this rank."""
        return episode_generator(
            self.hparams["seed"], self.episode, self.global_rank, stream, self.device
        )

    def weights_generator(self) -> torch.Generator:
        """Return the generator the first weights are drawn from, the same on every rank."""
        return episode_generator(self.hparams["seed"], 0, 0, "weights", torch.device("cpu"))

    def draw_noise(self, horizon: int, num_envs: int) -> Tensor:
        """Return the exploration noise [horizon, B, A] of this episode."""
        shape = (horizon, num_envs, self.hparams["action_dim"])
        return torch.randn(shape, generator=self.episode_generator("noise"), device=self.device)

    def annealed(self, value: float) -> float:
        """Return `value` shrunk linearly with the absolute episode, per the recipe's schedule."""
        span = self.hparams["anneal_episodes"]
        done = min(1.0, (self.episode - 1) / span) if span else 0.0
        return value * (1.0 - done * (1.0 - self.hparams["anneal_to"]))

    # -- Lightning -----------------------------------------------------------------------------

    def restore_replay(self, pieces: list[dict[str, Any]]) -> None:
        """Take up what earlier episodes added to a replay buffer; agents without one ignore it."""

    def train_on(self, env: Environment) -> None:
        """Set the environment the next `Trainer.fit` plays.

        Raises:
            UserError: The action is a correction of a rule that this environment does not have.
        """
        if self.hparams["action"] == "correction" and not env.rule_features:
            raise UserError("--model.action correction: only a site has the rule it corrects")
        self.env = env

    def train_dataloader(self) -> RolloutDataset:
        """Return the episode-driven dataset; Lightning takes any sized iterable."""
        if self.env is None:
            raise UserError(
                "the agent has no environment: call agent.train_on(environment) before "
                "Trainer.fit, or co2lightning.fit instead, which saves every episode too"
            )
        return RolloutDataset(self.env, self)

    def transfer_batch_to_device(
        self, batch: Iterator[Rollout], device: torch.device, dataloader_idx: int
    ) -> Iterator[Rollout]:
        """Leave an episode where the agent acts, on its own device."""
        return batch

    def on_train_start(self) -> None:
        """Take hold of the weights and the optimizer, restored by now."""
        self.world_size = self.trainer.world_size
        self.descent = Descent(
            self,
            self.trainer.optimizers[0],
            max_norm=self.hparams.get("max_grad_norm"),
            compiled=self.hparams["compile"] is True,
            average=self._average() if self.world_size > 1 else None,
            say=self.say if self.trainer.is_global_zero else lambda line: None,
        )

    def _average(self) -> Callable[[list[Tensor]], list[Tensor]]:
        """Return what averages gradients over the ranks."""
        lines = None
        if self.device.type == "cpu" and self.trainer.num_nodes == 1:
            lines = ranks.Lines.open()
        return lines.average_all if lines else ranks.average_all

    def on_train_epoch_start(self) -> None:
        """Start an episode's clock and notes and set its learning rate."""
        self._began = time.perf_counter()
        self._outcomes: list[tuple[Tensor, ...]] = []
        self._learned: list[dict[str, Tensor]] = []
        self.update_generator = self.episode_generator("updates")
        self.descent.begin(self.annealed(self.hparams["learning_rate"]))

    def training_step(self, episode: Iterator[Rollout], batch_idx: int) -> None:
        """Learn from one episode, segment by segment."""
        for rollout in episode:
            self.between_segments()
            self.take_in(rollout)

    def between_segments(self) -> None:
        """Do nothing; a callback may put in its place what raises, to end training."""

    def take_in(self, rollout: Rollout) -> None:
        """Count a segment and learn from it."""
        self.env_steps += rollout.reward.numel() * self.world_size
        self._outcomes.append(
            (rollout.reward, rollout.terminated, rollout.truncated, rollout.valid)
        )
        self._learned.append(self.learn(rollout))

    def on_train_epoch_end(self) -> None:
        """Work out the episode's metrics, means over the ranks, and write them, flushed."""
        assert self.env is not None
        mean = ranks.average if self.world_size > 1 else torch.clone
        learned = [figures for figures in self._learned if figures]
        figures = self.descent.end()
        for name in learned[0] if learned else ():
            figures[name] = torch.stack([segment[name] for segment in learned]).mean()
        columns = zip(*self._outcomes, strict=True)
        reward, terminated, truncated, valid = (torch.cat(column) for column in columns)
        ended = (terminated + truncated).clamp(max=1.0)
        totals = [(reward * valid).sum(), ended.sum(), valid.sum()]
        known = mean(torch.stack([*totals, *figures.values()])).tolist()
        total_reward, episodes, env_steps = known[:3]
        site = self.env.metrics(mean)
        seconds = time.perf_counter() - self._began
        metrics = {
            "rollout/ep_rew_mean": total_reward / max(episodes, self.env.num_envs),
            **site,
            **{f"train/{name}": value for name, value in zip(figures, known[3:], strict=True)},
            "train/learning_rate": self.annealed(self.hparams["learning_rate"]),
            "time/episode_seconds": seconds,
            "time/env_steps_per_second": env_steps * self.world_size / seconds,
        }
        self._check_finite(metrics)
        self.metrics = metrics
        for logger in self.loggers:
            logger.log_metrics(self.metrics, step=self.episode)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        # For callbacks such as EarlyStopping; `log_dict` does the same in 5 ms instead of 50 us.
        named = {**self.metrics, **short_metrics(self.metrics)}
        tensors = {name: torch.tensor(value) for name, value in named.items()}
        self.trainer.callback_metrics.update(tensors)

    def _check_finite(self, metrics: dict[str, float]) -> None:
        """Raise a TrainingError if an episode's figures or weights are not worth saving."""
        wrong = [f"{tag} is {value}" for tag, value in metrics.items() if not math.isfinite(value)]
        del wrong[1:]  # the others follow from it
        row = self.descent.skipped_in_a_row() if metrics.get("train/skipped_updates") else 0
        if row >= MOST_SKIPPED or (wrong and row):
            wrong.append(f"updates in a row without a finite gradient: {row}")
        if name := not_finite(self.state_dict()):
            wrong.append(f"the weights {name} are not finite")
        if wrong:
            raise TrainingError(
                f"episode {self.episode}: {', '.join(wrong)}; it is not saved, what was saved "
                "before stands: --ckpt_path last continues, perhaps with a lower "
                "--model.learning_rate",
                self.global_rank,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters."""
        checkpoint["counters"] = {"env_steps": self.env_steps, "updates": self.updates}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters."""
        self.env_steps = parse_count(checkpoint["counters"], "env_steps")
        self.updates = parse_count(checkpoint["counters"], "updates")

    def descend(self, batch: Any) -> None:
        """Take one gradient step on a minibatch."""
        self.descent(batch)
        self.updates += 1

    @classmethod
    def load_from_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        **overrides: Any,
    ) -> Self:
        """Load an agent from an episode's file, verified, and without running anything in it.

        Args:
            checkpoint_path: A local file such as `checkpoints/PPO/episode_0010.pt`.
            map_location: Where the weights go; the CPU by default.
            overrides: Hyperparameters to replace.

        Raises:
            UserError: No such file, a damaged one, or one of another agent.
        """
        content = TrainingCheckpoint.read(checkpoint_path)
        agent = agent_of(content, checkpoint_path)
        if agent != cls.__name__:
            raise UserError(f"{checkpoint_path}: trained by {agent}, not by {cls.__name__}")
        settings = {**cls.stored_settings(content, checkpoint_path), **overrides}
        return cls.restore(content, checkpoint_path, settings).to(map_location or "cpu").eval()

    @classmethod
    def stored_settings(cls, content: dict[str, Any], origin: str | Path) -> dict[str, Any]:
        """Return the hyperparameters that an episode's content holds, checked.

        Raises:
            UserError: They are not such; `origin` names the file.
        """
        stored = content["hyper_parameters"]
        settings = {f"model.{key}": value for key, value in stored.items() if key not in SIZES}
        settings["seed_everything"] = settings.pop("model.seed", 0)
        checked = check_stored(settings, cls.__name__, str(origin))
        try:
            sizes = {key: parse_count(stored, key, 0) for key in SIZES}
        except ValueError as error:
            raise UserError(f"{origin}: {error}") from None
        seed = checked.pop("seed_everything")
        return sizes | {"seed": seed} | {k.removeprefix("model."): v for k, v in checked.items()}

    @classmethod
    def restore(cls, content: dict[str, Any], origin: str | Path, settings: dict[str, Any]) -> Self:
        """Make an agent with the weights and counters that an episode's content holds.

        Args:
            content: That of an episode, see `agent_of`.
            origin: Its file, for messages.
            settings: The hyperparameters.

        Raises:
            UserError: The weights are not those of such an agent, then none were made, or not
                finite.
        """
        state = content["state_dict"]
        try:
            with torch.device("meta"):  # weights without numbers, however many would be asked for
                wanted = cls(**settings).state_dict()
            for name in {**wanted, **state}:
                if kind_of(state.get(name)) != kind_of(wanted.get(name)):
                    raise ValueError(f"{name} is not as its settings say")
            learner = cls(**settings)
            learner.load_state_dict(state)
            learner.on_load_checkpoint(content)
        except Exception as error:  # whatever a foreign file provokes
            reason = " ".join(str(error).split())[:120]
            message = f"{origin}: not of this version's {cls.__name__} ({reason})"
            raise UserError(message) from None
        if name := not_finite(state):
            raise UserError(
                f"{origin}: its weights {name} are no finite numbers, training diverged; an "
                "earlier episode may be good"
            )
        return learner

    # -- use -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(
        self,
        observation: np.ndarray,
        state: object = None,
        episode_start: object = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, None]:
        """Return the action for an observation, as Stable-Baselines3's models do.

        Args:
            observation: [O] or [B, O], as the environment gives it.
            state: Of no use: no policy here is recurrent.
            episode_start: Of no use either.
            deterministic: The policy's mean action; otherwise one drawn from torch's generator.

        Returns:
            Actions [A] or [B, A] in [-1, 1] and None (no recurrent state).
        """
        tensor = torch.as_tensor(np.asarray(observation), dtype=torch.float32, device=self.device)
        batch = tensor.reshape(-1, tensor.shape[-1])
        if deterministic:
            action = self.act(batch)
        else:
            noise = torch.randn(len(batch), self.hparams["action_dim"], device=self.device)
            action = self.environment_action(batch, self.explore(batch, noise))
        return action.reshape(*tensor.shape[:-1], -1).cpu().numpy(), None


def kind_of(value: object) -> tuple[torch.Size, torch.dtype] | None:
    """Return a tensor's shape and its type of numbers, None of anything else."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None
