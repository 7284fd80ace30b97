"""Do the agents learn as well as Stable-Baselines3's? Environment steps are counted, not seconds.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/stable_baselines.py --seeds 3 --output stable-baselines.json

Counted are the steps until the deterministic policy's mean return over 50 fixed starts of
Pendulum-v1 reaches -200. Both are evaluated by the same code after every 200 steps (SAC) or about
4,000 (PPO), with the settings that rl-zoo3 has for PPO and SAC there, PPO's without gSDE.

Ours train with `co2lightning fit`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

import co2lightning
from co2lightning.settings.parser import complete
from co2lightning.settings.recipe import Settings
from sites import machine, versions

try:
    import stable_baselines3 as sb3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecEnv
except ImportError:
    sys.exit("Stable-Baselines3 is missing: pip install -c constraints.txt -e '.[bench]'")

PENDULUM: dict[str, Settings] = {
    "SAC": {
        "env.id": "Pendulum-v1",
        "env.num_envs": 1,
        "model.train_freq": 1,
        "model.gradient_steps": 1,
        "model.learning_starts": 100,
        "model.buffer_size": 1_000_000,
        "model.batch_size": 256,
        "model.learning_rate": 1e-3,
        "model.gamma": 0.99,
        "model.tau": 0.005,
        "model.ent_coef_init": 1.0,
        "model.target_entropy": None,
        "model.hidden": (256, 256),
        "model.activation": "relu",
    },
    "PPO": {
        "env.id": "Pendulum-v1",
        "env.num_envs": 20,
        "model.n_steps": 0,
        "model.n_epochs": 10,
        "model.batch_size": 64,
        "model.learning_rate": 1e-3,
        "model.gamma": 0.9,
        "model.gae_lambda": 0.95,
        "model.normalize_advantage": True,
        "model.clip_range": 0.2,
        "model.ent_coef": 0.0,
        "model.vf_coef": 0.5,
        "model.max_grad_norm": 0.5,
        "model.hidden": (64, 64),
        "model.activation": "tanh",
        "model.log_std_init": 0.0,
    },
}
SOLVED = -200.0
HORIZON = 200  # of Pendulum-v1
GIVE_UP = {"SAC": 20_000, "PPO": 200_000}  # environment steps
ZOO = {"num_envs": 4, "n_steps": 1024}  # rl-zoo3's rollout, nearly as large as ours

SAME_NAME = {
    "A2C": ("gae_lambda", "normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm"),
    "SAC": (
        *("train_freq", "gradient_steps", "learning_starts", "buffer_size", "batch_size", "tau"),
    ),
}
SAME_NAME["PPO"] = (*SAME_NAME["A2C"], "n_epochs", "batch_size")
ACTIVATION = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}

Predict = Callable[[np.ndarray], np.ndarray]
Stages = Generator[tuple[int, Predict], None, None]  # environment steps so far, the policy


def main() -> None:
    """Train all, write the results, print the tables."""
    parser = argparse.ArgumentParser(description="Learning beside Stable-Baselines3's.")
    parser.add_argument("--agents", default=",".join(PENDULUM), help="comma separated")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each: seeds 0, 1, ...")
    parser.add_argument("--output", type=Path, help="results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    agents, seeds = arguments.agents.split(","), range(arguments.seeds)
    results: dict[str, Any] = {
        "command": f"python benchmarks/stable_baselines.py --agents {arguments.agents} --seeds "
        f"{arguments.seeds}",
        "machine": machine(),
        "versions": {**versions(), "stable-baselines3": version("stable-baselines3")},
    }
    results["pendulum"] = pendulum([agent for agent in agents if agent in PENDULUM], seeds)
    print(pendulum_table(results["pendulum"]), end="\n\n")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def stable_baselines(
    agent: str, settings: Settings, env: VecEnv, n_steps: int, seed: int, horizon: int
) -> Any:
    """Return Stable-Baselines3's agent with our settings.

    Args:
        agent: A2C, SAC or PPO.
        settings: Complete settings of ours.
        env: Its environment.
        n_steps: Length of a rollout of A2C and PPO.
        seed: Of the agent.
        horizon: Steps of an episode.
    """
    prefix = "model."
    given = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    take = given.pop
    span, share_left = take("anneal_episodes"), take("anneal_to")

    def annealed(value: float) -> Callable[[float], float] | float:
        def at(_: float) -> float:
            done = min(1.0, max(0, model.num_timesteps - 1) // (horizon * env.num_envs) / span)
            return value * (1.0 - done * (1.0 - share_left))

        return at if span else value

    model: Any = argparse.Namespace(num_timesteps=0)  # until there is one
    policy = {"net_arch": list(take("hidden")), "activation_fn": ACTIVATION[take("activation")]}
    options = {name: take(name) for name in ("gamma", *SAME_NAME[agent])}
    options["learning_rate"] = annealed(take("learning_rate"))
    if agent == "SAC":
        options["train_freq"] = (options["train_freq"], "step")
        options["ent_coef"] = f"auto_{take('ent_coef_init')}"
        target_entropy = take("target_entropy")
        options["target_entropy"] = "auto" if target_entropy is None else target_entropy
    else:
        take("n_steps")
        options["n_steps"] = n_steps
        policy["log_std_init"] = take("log_std_init")
    if agent == "PPO":
        options["clip_range"] = annealed(take("clip_range"))
    if agent == "A2C":
        options["use_rms_prop"] = False  # Adam, as ours
    take("reward_scale")  # the environment's
    take("compile")  # how fast, not what
    make_model = getattr(sb3, agent)
    model = make_model(
        "MlpPolicy", env, policy_kwargs=policy, seed=seed, device="cpu", verbose=0, **options
    )
    return model


# --- Pendulum ------------------------------------------------------------------------------------


def pendulum(agents: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Return, per agent and library, the steps each seed needed and its curve."""
    starts = gym.make_vec("Pendulum-v1", num_envs=50, vectorization_mode="sync")
    results: dict[str, Any] = {}
    for agent in agents:
        results[agent] = {"settings": PENDULUM[agent]}
        for library, play in (
            ("Stable-Baselines3", their_pendulum),
            ("co2lightning", our_pendulum),
        ):
            runs: list[dict[str, Any]] = []
            for seed in seeds:
                with contextlib.closing(play(agent, seed)) as stages:
                    runs.append({"seed": seed, **until_solved(stages, starts, GIVE_UP[agent])})
                print(f"{library} {agent} {seed}: {runs[-1]['steps']} steps", file=sys.stderr)
            results[agent][library] = runs
    return results


def until_solved(stages: Stages, starts: gym.vector.VectorEnv, give_up: int) -> dict[str, Any]:
    """Train until solved; return the steps that took (None: gave up) and (steps, return) so far."""
    curve: list[tuple[int, float]] = []
    for steps, predict in stages:
        curve.append((steps, round(mean_return(predict, starts), 1)))
        if curve[-1][1] >= SOLVED:
            return {"steps": steps, "curve": curve}
        if steps >= give_up:
            break
    return {"steps": None, "curve": curve}


def mean_return(predict: Predict, starts: gym.vector.VectorEnv) -> float:
    """Return the mean return over one horizon from the fixed starts."""
    obs, _ = starts.reset(seed=12345)
    total = 0.0
    for _ in range(HORIZON):
        obs, reward, *_ = starts.step(predict(obs))
        total += float(reward.mean())
    return total


def our_pendulum(agent: str, seed: int) -> Stages:
    """Train an episode at a time; yield the environment steps so far and the policy."""
    # All settings, so that nothing of the site's recipe is left.
    everything = complete(PENDULUM[agent], agent)
    wanted = PENDULUM[agent]
    settings = {k: v for k, v in everything.items() if k.startswith("model.") or k in wanted}
    agent_class = getattr(co2lightning, agent)
    with tempfile.TemporaryDirectory() as place:
        flags = {
            **settings,
            "model": agent,
            "seed_everything": seed,
            "trainer.accelerator": "cpu",
            "checkpoints.dir": f"{place}/checkpoints",
            "logs.dir": f"{place}/logs",
            "episodes": 1,
            "ckpt_path": "last",
        }
        while True:
            with contextlib.redirect_stdout(io.StringIO()):
                result = co2lightning.fit(flags)
            learner = agent_class.load_from_checkpoint(result["checkpoint"])
            # The agent's actions are shares of the largest torque, which is 2.
            yield (
                result["last_episode"] * HORIZON * settings["env.num_envs"],
                lambda obs, learner=learner: 2.0 * learner.predict(obs)[0],
            )


def their_pendulum(agent: str, seed: int) -> Stages:
    """Train a rollout (PPO) or 200 steps (SAC) at a time; yield as `our_pendulum` does."""
    num_envs, n_steps = (1, HORIZON) if agent == "SAC" else (ZOO["num_envs"], ZOO["n_steps"])
    env = make_vec_env("Pendulum-v1", n_envs=num_envs, seed=seed)
    settings = complete(PENDULUM[agent], agent)
    model = stable_baselines(agent, settings, env, n_steps, seed, HORIZON)
    while True:
        model.learn(num_envs * n_steps, reset_num_timesteps=False)
        yield model.num_timesteps, lambda obs: model.predict(obs, deterministic=True)[0]


def pendulum_table(results: dict[str, Any]) -> str:
    """Return the steps to -200 as a Markdown table."""
    lines = [
        f"Environment steps until Pendulum-v1 is at {SOLVED:.0f}, mean of 50 fixed starts:",
        "",
        "| agent | library | median | by seed |",
        "|---|---|---:|---|",
    ]
    for agent, entry in results.items():
        for library in ("Stable-Baselines3", "co2lightning"):
            steps = [run["steps"] or math.inf for run in entry[library]]
            shown = [
                "never" if n == math.inf else f"{n:,}" for n in [statistics.median(steps), *steps]
            ]
            lines.append(f"| {agent} | {library} | {shown[0]} | {', '.join(shown[1:])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
