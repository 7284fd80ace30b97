"""What every agent shares: episodes, seeds, schedules, metrics, acting.

Shapes: n steps of a segment, B environments, O features, A actions.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from co2lightning.agents import agent_class
from co2lightning.agents.load import agent_of, not_finite, restore_agent, stored_settings
from co2lightning.agents.networks import ACTIVATIONS, MLP
from co2lightning.agents.ranges import COUNT_OR_NONE, POSITIVE, SHARE, WIDTH, setting
from co2lightning.errors import TrainingError, UserError
from co2lightning.learn import ranks
from co2lightning.learn.dataset import Rollout, RolloutDataset
from co2lightning.learn.descent import Descent
from co2lightning.learn.seeds import episode_generator, episode_seed
from co2lightning.metrics import short_metrics
from co2lightning.runs.ledger import parse_count
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.sim.interface import NOMINAL_STEP_MINUTES, Environment

_MOST_SKIPPED = 10  # updates in a row whose gradient is not finite


class Agent(pl.LightningModule):
    """An agent that learns episode by episode under Lightning's Trainer.

    One epoch of the Trainer is one episode. Every draw comes from a generator seeded by (seed,
    episode, rank), every schedule depends on the absolute episode: a resumed agent does what the
    uninterrupted one would have done.

    Args:
        observation_dim: O; set by the environment.
        action_dim: A; set by the environment.
        seed: Seed of the run; every draw follows from (seed, episode, rank).
        step_minutes: Length of a step; set by the environment.
        observation_names: Of the features, in their order; () of what has none.
        settings: Those of `Settings`.
    """

    @dataclass(kw_only=True)
    class Settings:
        """What can be set of every agent.

        Args:
            learning_rate: Of Adam, at episode 1.
            anneal_episodes: Episodes over which the learning rate shrinks; 0 keeps it.
            anneal_to: Share of the learning rate that is left after them.
            gamma: Discount per 15 minutes, however long a step is.
            hidden: Width of each hidden layer, of actor and critic alike.
            activation: tanh, relu or silu.
            reward_scale: Factor on rewards before they reach a critic.
            start: Where a policy that weighs moves begins: corner, the best one in training weeks;
                even, all weigh alike.
            compile: Compiled updates and rollouts; auto: in runs that repay some 30 s of compiling.
        """

        learning_rate: float = setting(3e-4, POSITIVE)
        anneal_episodes: int = setting(0, COUNT_OR_NONE)
        anneal_to: float = setting(0.1, SHARE)
        gamma: float = setting(0.99, SHARE)
        hidden: tuple[int, ...] = setting((64, 64), WIDTH)
        activation: str = setting("tanh", ACTIVATIONS)
        reward_scale: float = setting(1.0, POSITIVE)
        start: Literal["corner", "even"] = "corner"
        compile: bool | Literal["auto"] = "auto"

    settings: Settings
    fixed_settings = ("hidden", "activation", "log_std_init", "start")
    """What a resume cannot change: it is in the weights."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        seed: int = 0,
        step_minutes: int = NOMINAL_STEP_MINUTES,
        observation_names: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__()
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.seed = seed
        self.step_minutes = step_minutes
        self.observation_names = tuple(observation_names)
        self.settings = self.Settings(**settings)
        self.save_hyperparameters(self.hyperparameters())  # for the loggers
        self.automatic_optimization = False
        self.env: Environment | None = None
        self.world_size = 1
        self.group_size = 1  # windows of the environment that begin alike
        self.env_steps = 0
        self.updates = 0
        self.metrics: dict[str, float] = {}
        self.say: Callable[[str], None] = print
        self.build()

    def hyperparameters(self) -> dict[str, Any]:
        """Return the constructor's arguments, which a checkpoint holds."""
        given = ("observation_dim", "action_dim", "seed", "step_minutes")
        names = {"observation_names": self.observation_names}
        return {key: getattr(self, key) for key in given} | names | vars(self.settings)

    # What settings give per 15 minutes, for the environment's step: one recipe fits every site.

    def per_step(self, share: float) -> float:
        """Return the share that is left after a step of what leaves `share` after 15 minutes."""
        return share ** (self.step_minutes / NOMINAL_STEP_MINUTES)

    def in_steps(self, count: int) -> int:
        """Return how many steps so many steps of 15 minutes are, at least one."""
        return max(1, round(count * NOMINAL_STEP_MINUTES / self.step_minutes))

    # -- what an agent defines -----------------------------------------------------------------

    def build(self) -> None:
        """Make the networks that the settings ask for."""
        raise NotImplementedError

    def segment_steps(self, horizon: int) -> int:
        """Return how many steps of the episode are collected between two updates."""
        raise NotImplementedError

    def explore(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Return the policy's output [B, A] for obs [B, O], with standard normal noise [B, A]."""
        raise NotImplementedError

    def loss(self, batch: Any, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a minibatch and its figures; a compiled update runs it too."""
        raise NotImplementedError

    def follow(self) -> None:
        """Move what follows the weights after each step of the optimizer."""

    def minibatches(self, rollout: Any, /) -> Iterator[Any]:
        """Hand out what a segment teaches, each to be descended before the next is asked for.

        By default that is the segment as it is.
        """
        yield rollout

    def updates_per_episode(self, env: Environment) -> int:
        """Return the number of updates in an episode; by default there is one a segment."""
        return -(-env.horizon // self.segment_steps(env.horizon))

    descends = Descent
    """Takes the steps."""

    # -- acting ---------------------------------------------------------------------------------

    actor: MLP
    first_action = 0.8, 0.8
    """What the two moves of a corner begin with: 0.93 of five, so that noise starts near it."""
    squashed = False
    """Whether tanh keeps the policy's output in (-1, 1)."""

    def policy_mean(self, obs: Tensor) -> Tensor:
        """Return the policy's deterministic output [..., A] for obs [..., O]: the actor's first A.

        Another agent's may not be anything else: `export` writes this down as a graph.
        """
        mean = self.actor(obs)[..., : self.action_dim]
        return mean.tanh() if self.squashed else mean

    def environment_action(self, output: Tensor) -> Tensor:
        """Return the environment's action [..., A] in [-1, 1] for a policy's output [..., A]."""
        return output.clamp(-1.0, 1.0)

    def act(self, obs: Tensor) -> Tensor:
        """Return the deterministic action [..., A] in [-1, 1] for obs [..., O]."""
        return self.environment_action(self.policy_mean(obs))

    @torch.no_grad()
    def begin_at(self, action: Sequence[float]) -> None:
        """Let a fresh policy begin with an action [A] in (-1, 1), nearly the same in all states.

        `co2lightning.fit` does so on a site whose moves are weighed, with
        `sim.search.corner_of(site).action(*agent.first_action)`.
        """
        mean = torch.tensor(action)
        bias = self.actor.last[1][: self.action_dim]
        bias.copy_(mean.atanh() if self.squashed else mean)

    @property
    def acts_in_a_graph(self) -> bool:
        """Whether `explore` may be compiled for this episode."""
        return self.settings.compile is True

    # -- episodes and seeds --------------------------------------------------------------------

    @property
    def episode(self) -> int:
        """The episode being played, from 1."""
        return self.current_epoch + 1

    def episode_seed(self, stream: str) -> int:
        """Return the seed of a stream of draws in this episode on this rank."""
        return episode_seed(self.seed, self.episode, self.global_rank, stream)

    def episode_generator(self, stream: str) -> torch.Generator:
        """Return the generator of a stream of draws in this episode on this rank."""
        return episode_generator(self.seed, self.episode, self.global_rank, stream, self.device)

    def shape_of_networks(self) -> dict[str, Any]:
        """Return what networks have in common; every rank draws the same first weights."""
        generator = episode_generator(self.seed, 0, 0, "weights", torch.device("cpu"))
        chosen = self.settings
        return {"hidden": chosen.hidden, "activation": chosen.activation, "generator": generator}

    def draw_noise(self, horizon: int, num_envs: int) -> Tensor:
        """Return the exploration noise [horizon, B, A] of this episode."""
        shape = (horizon, num_envs, self.action_dim)
        return torch.randn(shape, generator=self.episode_generator("noise"), device=self.device)

    def annealed(self, value: float) -> float:
        """Return `value` shrunk linearly with the absolute episode, per the recipe's schedule."""
        span = self.settings.anneal_episodes
        done = min(1.0, (self.episode - 1) / span) if span else 0.0
        return value * (1.0 - done * (1.0 - self.settings.anneal_to))

    # -- Lightning -----------------------------------------------------------------------------

    @property
    def replay_capacity(self) -> int | None:
        """How many transitions a replay buffer holds; None of an agent without one."""
        return None

    def restore_replay(self, pieces: list[dict[str, Any]]) -> None:
        """Take up what earlier episodes added to a replay buffer; agents without one ignore it."""

    def train_on(self, env: Environment) -> None:
        """Set the environment the next `Trainer.fit` plays."""
        if not self.observation_names:
            self.observation_names = env.observation_names
        elif env.observation_names != self.observation_names:
            env.show(self.observation_names)
        env.discount = self.per_step(self.settings.gamma)
        self.group_size = env.let_begin_alike(getattr(self.settings, "group_size", 1))
        self.env = env

    def train_dataloader(self) -> RolloutDataset:
        """Return the episode-driven dataset; Lightning takes any sized iterable."""
        if self.env is None:
            raise UserError(
                "the agent has no environment: call agent.train_on(environment) before "
                "Trainer.fit, or co2lightning.fit instead, which saves every episode too"
            )
        return RolloutDataset(self.env, self)

    def on_train_start(self) -> None:
        """Take hold of the weights and the optimizer, restored by now."""
        self.world_size = self.trainer.world_size
        self.descent = self.descends(
            self,
            self.trainer.optimizers[0],
            max_norm=getattr(self.settings, "max_grad_norm", None),
            compiled=self.settings.compile is True,
            average=ranks.average_all if self.world_size > 1 else None,
            say=self.say if self.trainer.is_global_zero else lambda line: None,
        )

    def on_train_epoch_start(self) -> None:
        """Start an episode's clock and notes and set its learning rate."""
        self._began = time.perf_counter()
        self._outcomes: list[tuple[Tensor, ...]] = []
        self._notes: dict[str, list[Tensor]] = {}
        self.update_generator = self.episode_generator("updates")
        self.descent.begin(self.annealed(self.settings.learning_rate))

    def training_step(self, episode: Iterator[Rollout], batch_idx: int) -> None:
        """Learn from one episode, segment by segment."""
        for rollout in episode:
            self.between_segments()
            self.env_steps += rollout.reward.numel() * self.world_size
            self._outcomes.append(
                (rollout.reward, rollout.terminated, rollout.truncated, rollout.valid)
            )
            for minibatch in self.minibatches(rollout):
                self.descent(minibatch)
                self.updates += 1

    def between_segments(self) -> None:
        """Do nothing; a callback may put in its place what raises, to end training."""

    def evaluated(self) -> dict[str, float]:
        """Return nothing; a run puts in its place what evaluates the policy as it is by now."""
        return {}

    def note(self, name: str, figure: Tensor) -> None:
        """Note a figure of a segment beside the loss's; the episode's is their mean."""
        self._notes.setdefault(name, []).append(figure)

    def on_train_epoch_end(self) -> None:
        """Work out the episode's metrics, means over the ranks, and write them, flushed."""
        assert self.env is not None
        mean = ranks.average if self.world_size > 1 else torch.clone
        figures = self.descent.end()
        figures |= {name: torch.stack(noted).mean() for name, noted in self._notes.items()}
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
            "train/learning_rate": self.annealed(self.settings.learning_rate),
            "time/episode_seconds": seconds,
            "time/env_steps_per_second": env_steps * self.world_size / seconds,
        }
        self._check_finite(metrics)
        if found := self.evaluated():
            self._check_finite(found)
        self.metrics = metrics | found
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
        if row >= _MOST_SKIPPED or (wrong and row):
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
        """Add the counters, and what the agent is made of as it is by now."""
        checkpoint |= {"hyper_parameters": self.hyperparameters(), "hparams_name": "kwargs"}
        checkpoint["counters"] = {"env_steps": self.env_steps, "updates": self.updates}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters."""
        self.env_steps = parse_count(checkpoint["counters"], "env_steps")
        self.updates = parse_count(checkpoint["counters"], "updates")

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
        if agent_class(agent) is not cls:
            raise UserError(f"{checkpoint_path}: trained by {agent}, not by {cls.__name__}")
        settings = {**stored_settings(content, checkpoint_path), **overrides}
        learner = restore_agent(content, checkpoint_path, settings)
        assert isinstance(learner, cls)
        return learner.to(map_location or "cpu").eval()

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
            noise = torch.randn(len(batch), self.action_dim, device=self.device)
            action = self.environment_action(self.explore(batch, noise))
        return action.reshape(*tensor.shape[:-1], -1).cpu().numpy(), None
