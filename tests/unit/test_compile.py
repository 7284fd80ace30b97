"""Compiled updates: the same descent as the eager one, in one graph, kept by the run."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
from torch import Tensor
from torch._inductor.cpp_builder import cpp_compiler_search
from torch.nn.parallel import DistributedDataParallel

from co2lightning.agents import AGENTS, agent_class
from co2lightning.agents.agent import Agent
from co2lightning.agents.ppo import Samples
from co2lightning.agents.replay import ReplayBatch
from co2lightning.agents.sac import Update
from co2lightning.learn.dataset import Rollout, RolloutDataset
from co2lightning.learn.descent import Descent, worth_compiling
from co2lightning.runs import seal
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.settings.parser import complete
from co2lightning.settings.recipe import read_recipe
from co2lightning.sim.days import SiteDays
from co2lightning.site.model import Told
from conftest import TINY, Outcome
from forged import unseal
from small_site import shipped

Fit = Callable[..., Outcome]
M = 32


def minibatch(name: str, size: int, scale: float = 1.0) -> Any:
    """Return a minibatch; a `scale` of observations that is NaN makes it one of no use."""
    obs, action = scale * torch.randn(size, 3), 2.0 * torch.rand(size, 2) - 1.0
    obs[:, 0] = 0.0  # as without a battery: weights whose gradient is none
    if name == "SAC":
        batch = ReplayBatch(obs, action, torch.randn(size), torch.randn(size, 3), torch.zeros(size))
        return Update(batch, torch.randn(size, 2), torch.randn(size, 2))
    weight = (torch.rand(size) < 0.9).float()
    if name == "PPO":
        parts = torch.randn(size) - 2.0, torch.randn(size), torch.randn(size), weight
        return Samples(obs, action, *parts)
    columns = obs, action, torch.randn(size), torch.randn(size, 3), 1.0 - weight, weight, weight
    steps = (column.unflatten(0, (-1, 1)).expand(-1, 2, *column.shape[1:]) for column in columns)
    return Rollout(*steps)


def pupil(
    name: str, compiled: bool, width: int = 8
) -> tuple[Agent, Descent, torch.optim.Optimizer]:
    agent = agent_class(name)(3, 2, seed=1, hidden=(width,))
    optimizer = agent.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    max_norm = getattr(agent.settings, "max_grad_norm", None)
    return agent, Descent(agent, optimizer, max_norm=max_norm, compiled=compiled), optimizer


# A graph takes the compiler ten seconds.
TRAINED = [n for n in AGENTS if n != "APG"]  # which compiles nothing
COMPILED = [n if n == "PPO" else pytest.param(n, marks=pytest.mark.slow) for n in TRAINED]


@pytest.mark.parametrize("name", COMPILED)
def test_a_hundred_compiled_updates_are_the_eager_ones(name: str) -> None:
    """Schedules end at 0 and a smaller minibatch ends each epoch, as may be; some are no good."""
    torch.manual_seed(2)
    torch._dynamo.utils.counters.clear()
    pupils = [pupil(name, compiled=compiled) for compiled in (False, True)]
    before = [p.detach().clone() for p in pupils[0][0].parameters()]
    for number in range(100):
        scale = torch.nan if number in (0, 80, 89) else 1.0
        batch = minibatch(name, 5 if number % 10 == 9 else M, scale)
        for agent, take, _ in pupils:
            if number % 25 == 0:
                take.begin(1e-3 / (1.0 + number) if number < 75 else 0.0)
                if name == "PPO":
                    agent.clip_range.fill_(0.3 / (1.0 + number))  # pyright: ignore
            take(batch)
    assert [take.skipped_in_a_row() for _, take, _ in pupils] == [1, 1]
    eager_figures, figures = (take.end() for _, take, _ in pupils)
    assert figures["skipped_updates"] == 2
    (eager, _, eager_adam), (agent, take, adam) = pupils
    assert take.compiled, "the compiler failed"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert list(figures) == list(eager_figures)
    for key, figure in figures.items():
        assert float(figure) == pytest.approx(float(eager_figures[key]), rel=1e-4, abs=1e-4), key
    moved = 0.0
    for old, a, b in zip(before, eager.parameters(), agent.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5
        moved = max(moved, float((a.detach() - old).abs().max()))
    assert moved > 1e-2
    a, b = eager_adam.state_dict(), adam.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert list(a["state"]) == list(b["state"])
    for key in a["state"]:
        assert list(a["state"][key]) == list(b["state"][key])
        for part, value in a["state"][key].items():
            torch.testing.assert_close(b["state"][key][part], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_an_update_whose_gradient_is_not_finite_moves_nothing(name: str) -> None:
    torch.manual_seed(4)
    agent, take, adam = pupil(name, compiled=False)
    take(minibatch(name, M))
    learned = {n: p.detach().clone() for n, p in agent.named_parameters() if p.requires_grad}
    before = copy.deepcopy(adam.state_dict())
    for _ in range(11):
        take(minibatch(name, M, torch.nan))
    for key, value in learned.items():
        assert torch.equal(agent.get_parameter(key), value), key
    for key, state in adam.state_dict()["state"].items():
        for part, value in state.items():
            assert torch.equal(value, before["state"][key][part]), part
    assert all(tensor.isfinite().all() for tensor in agent.state_dict().values())  # targets too
    take(minibatch(name, M))
    assert take.skipped_in_a_row() == 11
    figures = take.end()
    assert figures["skipped_updates"] == 11
    assert all(figure.isfinite() for figure in figures.values())
    assert not torch.equal(agent.get_parameter("critic.weights.0"), learned["critic.weights.0"])


class Alone:
    """An agent without a Trainer, in an episode it is told."""

    episode = 1
    global_rank = 0


def played(agent: str, env: SiteDays, said: list[str], **settings: Any) -> RolloutDataset:
    """Return what plays episodes of a fresh agent's."""
    kind = type(agent, (Alone, agent_class(agent)), {})
    learner = kind(env.observation_dim, env.action_dim, **settings)
    learner.say = said.append
    return RolloutDataset(env, learner)


@pytest.mark.parametrize(
    ("name", "settings", "device"),
    [
        ("PPO", {"n_steps": 40}, "cpu"),
        pytest.param(
            *("SAC", {"train_freq": 40, "learning_starts": 0}, "cpu"), marks=pytest.mark.slow
        ),
        pytest.param(  # recorded: 40 steps twice, then 16 that are not
            *("PPO", {"n_steps": 40}, "cuda"),
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
        ),
    ],
)
def test_a_compiled_rollout_is_the_eager_one(
    name: str, settings: dict[str, Any], device: str
) -> None:
    """Two episodes in segments, the weights moved in between; what the days added up to as well.

    The clock cuts them: what is seen after the last step is as real as all before.
    """
    torch._dynamo.utils.counters.clear()
    said: list[str] = []
    site = shipped()
    both = [
        played(
            *(name, SiteDays(site, 3, action="moves"), said),
            **{"hidden": (8,), **how, **settings},
        )
        for how in ({"compile": False}, {"compile": True})
    ]
    for dataset in both:
        dataset.agent.to(device)
    for episode in (1, 2):
        torch.manual_seed(episode)
        step = [0.1 * torch.randn_like(p) for p in both[0].agent.parameters()]
        segments = []
        for dataset in both:
            dataset.agent.episode = episode  # pyright: ignore[reportAttributeAccessIssue]
            with torch.no_grad():
                for parameter, by in zip(dataset.agent.parameters(), step, strict=True):
                    parameter.add_(by)
            segments.append(list(dataset.play()))
        assert [len(segment.reward) for segment in segments[1]] == [40, 40, 16]
        for eager, compiled in zip(*segments, strict=True):
            for part, a, b in zip(Rollout._fields, eager, compiled, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, msg=part)
        cut = torch.cat([segment.truncated for segment in segments[1]])
        assert cut[-1].all()
        assert not cut[:-1].any()
        assert not any(segment.terminated.any() for segment in segments[1])
        assert segments[1][-1].next_obs[-1].any()
        eager, compiled = (dataset.env.metrics() for dataset in both)
        assert compiled == pytest.approx(eager, rel=1e-5, abs=1e-5)
        assert eager["site/co2_kg"] > 100.0
    assert said == ["Compiling the rollout (some 20 s, once)"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_rollout_knows_what_is_told_and_what_is_true() -> None:
    """On a site whose drivers announce twice what they take, and to leave sooner."""
    site, said = shipped(), list[str]()
    rows = site.sessions
    told = Told(np.maximum(rows.departure - 4, rows.arrival + 2), 2.0 * rows.energy_kwh)
    site = dataclasses.replace(site, told=told)
    eager, compiled = (
        played("PPO", SiteDays(site, 3, action="moves"), said, hidden=(8,), compile=how)
        for how in (False, True)
    )
    for own, theirs in zip(compiled.play(), eager.play(), strict=True):
        for part, a, b in zip(Rollout._fields, own, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=part)
    own, theirs = (dataset.env.metrics() for dataset in (compiled, eager))
    assert own == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert "site/misled_kwh" in own
    assert said == ["Compiling the rollout (some 20 s, once)"]


def test_a_rollout_that_cannot_be_compiled_goes_on_without() -> None:
    said: list[str] = []
    dataset = played("PPO", SiteDays(shipped(), 2), said, hidden=(4,), compile=True)
    other = played("PPO", SiteDays(shipped(), 2), said, hidden=(4,), compile=False)
    explore = dataset.agent.explore

    def watched(obs: Tensor, noise: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # what one graph cannot hold
        return explore(obs, noise)

    dataset.agent.explore = watched
    for _ in range(2):
        for own, theirs in zip(dataset.play(), other.play(), strict=True):
            for a, b in zip(own, theirs, strict=True):
                assert torch.equal(a, b)
    compiling, reason = said
    assert compiling.startswith("Compiling the rollout")
    assert reason.startswith("The rollout cannot be compiled: ")
    assert reason.endswith("; training goes on without")


@pytest.mark.slow
def test_agents_of_one_process_have_their_own_graphs() -> None:
    """Graphs are not guarded: one taken for another's would go unnoticed."""
    torch.manual_seed(3)
    batches = [minibatch("PPO", M) for _ in range(3)]
    pairs = [[pupil("PPO", compiled, width) for compiled in (False, True)] for width in (8, 8, 6)]
    for batch in batches:
        for pair in pairs:
            for _, take, _ in pair:
                take(batch)
    for (eager, *_), (agent, take, _) in pairs:
        assert take.compiled
        for a, b in zip(eager.parameters(), agent.parameters(), strict=True):
            torch.testing.assert_close(b, a, rtol=0.0, atol=1e-6)


@pytest.mark.slow
def test_a_wide_network_of_a_rank_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside DistributedDataParallel torch would cut it where weights fill a bucket."""
    bucket = SimpleNamespace(bucket_bytes_cap=64)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", bucket)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 64)
    agent, _, adam = pupil("PPO", compiled=False)
    take = Descent(agent, adam, max_norm=0.5, compiled=True, average=lambda gradients: gradients)
    take(minibatch("PPO", M))
    assert take.compiled, "the compiler failed"


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_knows_its_number_of_updates(fit: Fit, name: str) -> None:
    fit(name, "--episodes", "2", "--env.num_envs", "5")
    one, two = (
        TrainingCheckpoint.read(Path(f"checkpoints/{name}/episode_{n:04d}.pt"))["counters"]
        for n in (1, 2)
    )
    agent = agent_class(name).load_from_checkpoint(f"checkpoints/{name}/episode_0002.pt")
    day: Any = SimpleNamespace(horizon=96, num_envs=5)
    assert two["updates"] - one["updates"] == agent.updates_per_episode(day)


@pytest.mark.parametrize("name", TRAINED)
def test_auto_is_for_long_runs(name: str) -> None:
    settings = complete(read_recipe(f"{name.lower()}.yaml")[1], name)
    model = {k.removeprefix("model."): v for k, v in settings.items() if k.startswith("model.")}
    agent = agent_class(name)(29, 2, **model)
    assert agent.settings.compile == "auto"
    day: Any = SimpleNamespace(horizon=96, num_envs=settings["env.num_envs"])
    updates = agent.updates_per_episode(day)
    assert not worth_compiling(10 * updates)
    assert worth_compiling(100_000 * updates)


def kept(name: str, episode: int) -> tuple[Any, Any]:
    """Return what a checkpoint says about compiling, to a resume and to who loads the agent."""
    content = TrainingCheckpoint.read(Path(f"checkpoints/{name}/episode_{episode:04d}.pt"))
    return content["run"]["config"]["model.compile"], content["hyper_parameters"]["compile"]


def long() -> tuple[str, str]:
    """Name a recipe whose episodes repay compiling."""
    Path("long.yaml").write_text("agent: PPO\nepisodes: 100000\n")
    return "--config", "long.yaml"


def test_a_short_run_stays_eager_however_it_goes_on(fit: Fit) -> None:
    fit("PPO", "--episodes", "1")
    assert kept("PPO", 1) == (False, False)
    for words in ((), ("--model.compile", "auto")):
        outcome = fit("PPO", *long(), "--ckpt_path", "last", "--episodes", "1", *words)
        assert "ompil" not in outcome.out
    assert kept("PPO", 3) == (False, False)


@pytest.mark.slow
def test_a_long_run_compiles_however_it_goes_on(fit: Fit) -> None:
    outcome = fit("PPO", *long(), "--episodes", "2")
    assert outcome.out.count("Compiling the update") == 1
    assert outcome.out.count("Compiling the rollout") == 1
    assert "cannot" not in outcome.out
    outcome = fit("PPO", "--ckpt_path", "last", "--episodes", "1")
    assert "Compiling the update" in outcome.out
    assert kept("PPO", 1) == kept("PPO", 3) == (True, True)
    outcome = fit("PPO", "--ckpt_path", "last", "--episodes", "1", "--model.compile", "false")
    assert "compile: True -> False" in outcome.out
    assert "Compiling" not in outcome.out
    assert kept("PPO", 4) == (False, False)


def test_a_checkpoint_from_before_compiling_goes_on_eagerly(fit: Fit) -> None:
    fit("PPO", "--episodes", "1")
    content, record = unseal(Path("checkpoints/PPO/episode_0001.pt"))
    path = Path("old.pt")
    del content["hyper_parameters"]["compile"], content["run"]["config"]["model.compile"]
    path.write_bytes(seal.seal_checkpoint(content, record))
    assert agent_class("PPO").load_from_checkpoint(path).settings.compile == "auto"
    outcome = fit("PPO", *long(), "--ckpt_path", "old.pt", "--episodes", "1")
    assert "Resuming PPO at episode 2" in outcome.out
    assert "ompil" not in outcome.out
    assert kept("PPO", 2) == (False, False)


def check_eager(said: str) -> None:
    """Check that the run `without` said once why it was not compiled, and equals the run PPO."""
    line = "The update cannot be compiled: no C++ compiler was found; training goes on without"
    assert said.count(line) == 1
    for episode in (1, 2):
        own, other = (
            TrainingCheckpoint.read(Path(f"checkpoints/{run}/episode_{episode:04d}.pt"))
            for run in ("PPO", "without")
        )
        for key, value in own["state_dict"].items():
            assert torch.equal(other["state_dict"][key], value), key


def test_without_a_compiler_a_run_goes_on_eagerly(
    fit: Fit, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("PPO", "--episodes", "2")
    cpp_compiler_search.cache_clear()  # torch remembers the one it found
    monkeypatch.setenv("PATH", str(place))
    words = ("--episodes", "2", "--name", "without", "--model.compile", "true")
    # What CXX named. By torch's own hand: monkeypatch would delete the setting in the end.
    with torch._inductor.config.patch({"cpp.cxx": (None, "g++")}):
        check_eager(fit("PPO", *words).out)


@pytest.mark.slow
def test_a_process_without_a_compiler_goes_on_eagerly(
    fit: Fit, place: Path, environment: dict[str, str]
) -> None:
    fit("PPO", "--episodes", "2")
    without = {k: v for k, v in environment.items() if k != "CXX"}
    without |= {"PATH": str(place), "TORCHINDUCTOR_CACHE_DIR": str(place / "cache")}
    words = ["--env.num_envs", "4", *TINY["PPO"], "--episodes", "2", "--name", "without"]
    done = subprocess.run(
        [sys.executable, "-m", "co2lightning", "fit", "--model", "PPO", *words]
        + ["--model.compile", "true"],
        env=without,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_eager(done.stdout)
