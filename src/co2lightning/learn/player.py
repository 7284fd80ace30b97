"""Several steps at once: an agent acts in an environment, eagerly or as compiled graphs.

Shapes: n steps, B environments, O features, A actions.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from co2lightning.control.moves import Moves
from co2lightning.control.state import Carry
from co2lightning.learn.graphs import NO_COMPILER, as_graph, as_recording, why_not
from co2lightning.sim.days import SiteDays
from co2lightning.sim.interface import Environment, Step


class Actor(Protocol):
    """What a rollout needs of an agent; its methods are documented where agents are."""

    say: Callable[[str], None]

    @property
    def device(self) -> torch.device: ...
    @property
    def acts_in_a_graph(self) -> bool: ...
    def episode_seed(self, stream: str) -> int: ...
    def draw_noise(self, horizon: int, num_envs: int) -> Tensor: ...
    def segment_steps(self, horizon: int) -> int: ...
    def explore(self, obs: Tensor, noise: Tensor) -> Tensor: ...
    def environment_action(self, output: Tensor) -> Tensor: ...


_Play = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Step]]
"""From observations [B, O] and noise [n, B, A] to the observations after n steps, the policy's
outputs [n, B, A] and what the environment made of them, each part of it [n, ...]."""


class Player:
    """Plays an environment with an agent.

    Args:
        env: The environment, B copies in lockstep.
        agent: Acts.
    """

    def __init__(self, env: Environment, agent: Actor) -> None:
        self.env = env
        self.agent = agent
        self._compiled: _Play | None = None

    def begin(self, obs: Tensor, noise: Tensor) -> _Play:
        """Return what plays the episode that begins with `obs`, by as many steps as `noise` has."""
        if not (self.agent.acts_in_a_graph and isinstance(self.env, SiteDays)):
            return self._one_by_one
        self._compiled = self._compiled or self._compile(self.env, obs, noise)
        return self._compiled

    def _policy(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        output = self.agent.explore(obs, noise)
        return output, self.agent.environment_action(output)

    def _one_by_one(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Step]:
        """Play one operation after the other."""
        outputs: list[Tensor] = []
        results: list[Step] = []
        with torch.inference_mode():
            for draw in noise.unbind(0):
                output, action = self._policy(obs, draw)
                outputs.append(output)
                results.append(self.env.step(action))
                obs = results[-1].obs
        # What inference_mode made cannot be trained on; what is stacked outside of it can.
        steps = Step(*(torch.stack(column) for column in zip(*results, strict=True)))
        return obs, torch.stack(outputs), steps

    def _compile(self, env: SiteDays, obs: Tensor, noise: Tensor) -> _Play:
        """Return what plays policy and environment as one graph, or eagerly if that fails."""
        self.agent.say("Compiling the rollout (some 20 s, once)")
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                return self._in_graphs(env, obs, noise)
        except Exception as error:
            if (why := why_not(error)) != NO_COMPILER:  # which the update will say
                self.agent.say(f"The rollout cannot be compiled: {why}; training goes on without")
            return self._one_by_one

    def _in_graphs(self, env: SiteDays, obs: Tensor, noise: Tensor) -> _Play:
        """Compile a step; a window ends by the clock alone, of which a graph need not know.

        On a GPU the graphs of as many steps as `noise` has are recorded, and replayed as one.
        """

        parts = len(env.carry.parts)

        def at() -> tuple[Tensor, ...]:
            """Return where the windows stand: the parts of a carry, then of what moves would do."""
            return *env.carry.parts, *(env.moves or ())

        def apart(at: Sequence[Tensor]) -> tuple[Carry, Moves]:
            return Carry(*at[:parts]), Moves(*at[parts:])

        def advance(at: tuple[Tensor, ...], obs: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            output, action = self._policy(obs, noise)
            carry, moves = apart(at)
            following, then, *made = env.advance(carry, action, moves)
            return *following.parts, *then, *made, output

        def run(*start: Tensor) -> tuple[Tensor, ...]:
            *at, obs, noise = start
            columns: list[tuple[Tensor, ...]] = []
            with torch.inference_mode(quick):
                for draw in noise.unbind(0):
                    *at, obs, reward, past, output = graph(tuple(at), obs, draw)
                    columns.append((obs, reward, past, output))
            return *at, obs, *(torch.stack(column) for column in zip(*columns, strict=True))

        graph = as_graph(advance, self.agent.device)
        quick = self.agent.device.type == "cpu"  # a recording shall not hold such tensors
        with torch.inference_mode(quick):
            graph(at(), obs, noise[0])
        replay, recorded = as_recording(run, (*at(), obs, noise)), len(noise)

        def play(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Step]:
            whole = replay if len(noise) == recorded else run
            *then, obs, following, reward, past, output = whole(*at(), obs, noise)
            carry, moves = apart(then)
            env.go_on(carry, past, moves)
            no, yes = torch.zeros_like(reward), torch.ones_like(reward)
            cut = no if env.steps_left else torch.cat([no[1:], yes[:1]])
            return obs, output, Step(following, reward, no, cut, yes)

        return play
