"""How fast the agents train, beside Stable-Baselines3 (torch) and SBX (JAX).

    pip install -c constraints.txt -e ".[bench]"
    OMP_NUM_THREADS=1 python benchmarks/peers.py

Same environment, sizes, number of updates and one thread for all. One Lightning Trainer runs our
agent; after each of its stretches every peer has one of as many environment steps, in turns, so
that a busy minute hits all alike. Times are seconds of the process, not of the clock. Ratios are
medians over the rounds, in brackets the lowest and the highest; compiling, first calls and filling
a replay buffer lie before the first round. Nobody writes logs or checkpoints.

`native`: an environment of 20 observations and 2 actions that costs next to nothing, so that the
trainer itself is measured. PPO: 16 environments x 128 steps, minibatches of 256, 10 epochs, two
layers of 64. A2C: 16 x 5 steps. SAC: 1 environment, an update of 256 after each step, two layers
of 256. `site`: 64 days of the shipped site at once, updates of the same sizes and counts; SAC's
comes after each step of the 64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from co2lightning.agents import agent_class
from co2lightning.settings.parser import complete
from co2lightning.settings.recipe import Settings
from co2lightning.sim.days import SiteDays
from co2lightning.sim.interface import NOMINAL_STEP_MINUTES, Environment, Step
from co2lightning.site.load import load_site
from sites import machine, versions
from stable_baselines import Lockstep, VecEnv, stable_baselines

SMALL = {"model.hidden": (64, 64), "model.activation": "tanh"}
SIZES: dict[str, Settings] = {
    "PPO": SMALL | {"env.num_envs": 16, "model.n_steps": 0, "model.batch_size": 256},
    "A2C": SMALL | {"env.num_envs": 16, "model.n_steps": 5},
    "SAC": {
        "env.num_envs": 1,
        "model.train_freq": 1,
        "model.gradient_steps": 1,
        "model.learning_starts": 256,
        "model.batch_size": 256,
        "model.buffer_size": 100_000,
        "model.hidden": (256, 256),
    },
}
HORIZON = {"PPO": 128, "A2C": 100, "SAC": 100}  # of the native environment
EPISODES = {("native", "PPO"): 8, ("native", "A2C"): 10, ("native", "SAC"): 2}  # of a stretch
WARM_UP = 4  # stretches


class Native:
    """B copies of an environment without content: observations decay, actions push two of them."""

    observation_dim, action_dim = 20, 2
    step_minutes = NOMINAL_STEP_MINUTES
    observation_names: tuple[str, ...] = ()
    may_reset = False
    discount = 1.0

    def __init__(self, num_envs: int, horizon: int) -> None:
        self.num_envs = num_envs
        self.horizon = horizon
        self._zeros, self._ones = torch.zeros(num_envs), torch.ones(num_envs)
        self._noise = torch.randn(horizon + 1, num_envs, 20)

    def to(self, device: torch.device) -> None: ...

    def show(self, names: tuple[str, ...], who: str = "the agent") -> None: ...

    def let_begin_alike(self, size: int) -> int:
        return 1

    def reset(self, seed: int) -> Tensor:
        self._step = 0
        self._obs = self._noise[0]
        return self._obs

    def step(self, action: Tensor) -> Step:
        self._step += 1
        self._obs = torch.lerp(self._noise[self._step], self._obs, 0.9)
        reward = action[:, 0] * self._obs[:, 0] - action[:, 1]
        ended = self._ones if self._step == self.horizon else self._zeros
        return Step(self._obs, reward, ended, self._zeros, self._ones)

    def metrics(self, mean: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        return {}


class Vectorized(Lockstep):
    """One of our environments as Stable-Baselines3 and SBX want it."""

    def __init__(self, env: Environment, reward_scale: float) -> None:
        self.inner = env
        self.reward_scale = reward_scale
        self.seeds = iter(range(10**9))
        box = gym.spaces.Box(-np.inf, np.inf, (env.observation_dim,), np.float32)
        super().__init__(env.num_envs, box, gym.spaces.Box(-1.0, 1.0, (env.action_dim,)))

    def reset(self) -> np.ndarray:
        with torch.inference_mode():
            return self.inner.reset(next(self.seeds)).numpy()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = torch.from_numpy(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        with torch.inference_mode():
            result = self.inner.step(self.actions)
        obs, cut = result.obs.numpy(), result.truncated.numpy() > 0.5
        done = cut | (result.terminated.numpy() > 0.5)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if done.all():
            known = zip(obs, cut.tolist(), strict=True)
            infos = [{"terminal_observation": o, "TimeLimit.truncated": c} for o, c in known]
            obs = self.reset()
        return obs, self.reward_scale * result.reward.numpy(), done, infos


def sbx(agent: str, settings: Settings, env: VecEnv, n_steps: int) -> Any:
    """Return SBX's agent with our settings, as far as they cost time."""
    import flax.linen
    import sbx as library

    policy: dict[str, Any] = {"net_arch": list(settings["model.hidden"])}
    if agent == "SAC":
        options = {
            "train_freq": (settings["model.train_freq"], "step"),
            "gradient_steps": settings["model.gradient_steps"],
            "learning_starts": settings["model.learning_starts"],
            "buffer_size": settings["model.buffer_size"],
        }
    else:
        policy["activation_fn"] = flax.linen.tanh
        options = {"n_steps": n_steps, "n_epochs": settings["model.n_epochs"]}
    make = getattr(library, agent)
    options["batch_size"] = settings["model.batch_size"]
    return make("MlpPolicy", env, policy_kwargs=policy, seed=0, verbose=0, **options)


class Rounds(pl.Callback):
    """Times stretches of our episodes and has the peers train as many steps in between."""

    def __init__(self, episodes: int, steps: int, peers: dict[str, Any]) -> None:
        self.episodes = episodes
        self.steps = steps
        self.peers = peers
        self.seconds: dict[str, list[float]] = {name: [] for name in ("co2lightning", *peers)}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch % self.episodes == 0:
            self.began = time.process_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.episodes:
            return
        self.seconds["co2lightning"].append(time.process_time() - self.began)
        for name, model in self.peers.items():
            began = time.process_time()
            model.learn(self.steps, reset_num_timesteps=False)
            self.seconds[name].append(time.process_time() - began)


def compare(
    place: str, agent: str, compiled: bool, libraries: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Train one agent of ours with its peers in between; return microseconds a step of each."""
    settings = complete(SIZES[agent] | ({"env.num_envs": 64} if place == "site" else {}), agent)
    num_envs = settings["env.num_envs"]

    def make() -> Environment:
        if place == "native":
            return Native(num_envs, HORIZON[agent])
        return SiteDays(site, num_envs)

    site = load_site("iquitos")
    env = make()
    n_steps = settings.get("model.n_steps") or env.horizon
    episodes = EPISODES.get((place, agent), 1)
    steps = episodes * env.horizon * num_envs
    peers: dict[str, Any] = {}
    for library in libraries:
        vectorized = Vectorized(make(), settings["model.reward_scale"])
        if library == "SBX":
            peers[library] = sbx(agent, settings, vectorized, n_steps)
        else:
            peers[library] = stable_baselines(agent, settings, vectorized, n_steps, 0, env.horizon)
    settings["model.compile"] = compiled
    options = {k.removeprefix("model."): v for k, v in settings.items() if k.startswith("model.")}
    make_agent: Any = agent_class(agent)
    learner = make_agent(env.observation_dim, env.action_dim, **options)
    learner.say = lambda line: None
    learner.train_on(env)
    clock = Rounds(episodes, steps, peers)
    pl.Trainer(
        accelerator="cpu",
        max_epochs=(WARM_UP + rounds) * episodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    ).fit(learner)
    return {
        "place": place,
        "agent": agent,
        "update": "compiled" if compiled else "eager",
        "us_per_step": {
            name: [round(1e6 * s / steps, 2) for s in seconds[WARM_UP:]]
            for name, seconds in clock.seconds.items()
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return what a step costs and the ratios as a Markdown table."""
    lines = [
        "| environment | agent | our update | us a step | peer | us a step | ratio |",
        "|---|---|---|---:|---|---:|---|",
    ]
    for row in rows:
        ours, *peers = row["us_per_step"].items()
        for peer, theirs in peers:
            ratios = [b / a for a, b in zip(ours[1], theirs, strict=True)]
            lines.append(
                f"| {row['place']} | {row['agent']} | {row['update']} | "
                f"{statistics.median(ours[1]):.1f} | {peer} | {statistics.median(theirs):.1f} | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Speed of training beside other libraries.")
    parser.add_argument("--places", default="native,site", help="comma separated")
    parser.add_argument("--agents", default="PPO,A2C,SAC", help="comma separated")
    parser.add_argument("--updates", default="eager,compiled", help="of ours, comma separated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for place in arguments.places.split(","):
        for agent in arguments.agents.split(","):
            for update in arguments.updates.split(","):
                libraries = ["Stable-Baselines3"]
                if place == "native" and agent != "A2C":  # SBX has none
                    libraries.append("SBX")
                compiled = update == "compiled"
                rows.append(compare(place, agent, compiled, libraries, arguments.rounds))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(table(rows))
    if arguments.output:
        results = {
            "command": f"python benchmarks/peers.py --places {arguments.places} "
            f"--agents {arguments.agents} --updates {arguments.updates} "
            f"--rounds {arguments.rounds}",
            "machine": machine(),
            "versions": versions()
            | {name: version(name) for name in ("stable-baselines3", "sbx-rl", "jax")},
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
