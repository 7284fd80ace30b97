"""Any Gymnasium environment with Box observations and Box actions, for checking the algorithms.

Shapes: B environments, O features, A actions.
"""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from torch import Tensor

from co2lightning.errors import UserError
from co2lightning.sim.interface import NOMINAL_STEP_MINUTES, Step


class GymEnvironment:
    """B copies of a Gymnasium environment as the rollouts want them.

    An episode of training is one horizon of every copy. Actions of [-1, 1] are scaled to the
    environment's bounds. A copy that ends early is reset by its next step, which counts for
    nothing (`valid` is 0).

    Args:
        id: Gymnasium's id, such as Pendulum-v1.
        num_envs: B.

    Raises:
        UserError: No such environment, spaces other than Box, or no time limit.
    """

    step_minutes = NOMINAL_STEP_MINUTES  # whatever it simulates: settings are per step as they are
    observation_names: tuple[str, ...] = ()
    may_reset = True
    discount = 1.0  # of no use here

    def __init__(self, id: str, num_envs: int) -> None:
        try:
            spec = gym.spec(id)
            self.vector = gym.make_vec(id, num_envs=num_envs, vectorization_mode="sync")
        except (gym.error.Error, ImportError) as error:
            raise UserError(f"--env.id {id}: {' '.join(str(error).split())}") from None
        observation, action = self.vector.single_observation_space, self.vector.single_action_space
        for space, name in ((observation, "observations"), (action, "actions")):
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise UserError(f"--env.id {id}: its {name} are {space}, not a flat Box")
        assert isinstance(observation, Box)
        assert isinstance(action, Box)
        if not np.isfinite(action.low).all() or not np.isfinite(action.high).all():
            raise UserError(f"--env.id {id}: its actions have no bounds; only bounded ones train")
        if spec.max_episode_steps is None:
            raise UserError(f"--env.id {id}: it has no time limit, so an episode would never end")
        if self.vector.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
            raise UserError(f"--env.id {id}: resets within a step; NEXT_STEP autoreset is needed")
        self.num_envs = num_envs
        self.horizon = spec.max_episode_steps
        self.observation_dim = int(observation.shape[0])
        self.action_dim = int(action.shape[0])
        self._centre = (action.high + action.low) / 2
        self._half_range = (action.high - action.low) / 2
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Deliver tensors on `device` from now on; the environment itself runs on the CPU."""
        self._device = device

    def show(self, names: tuple[str, ...], who: str = "the agent") -> None:
        """Do nothing: what is observed has no names here."""

    def let_begin_alike(self, size: int) -> int:
        """Return 1: every episode begins for itself."""
        return 1

    def reset(self, seed: int) -> Tensor:
        """Begin B episodes; returns observations [B, O]."""
        obs, _ = self.vector.reset(seed=seed)
        self._ended = np.zeros(self.num_envs, dtype=bool)
        return self._tensor(obs)

    def step(self, action: Tensor) -> Step:
        """Run one step with actions [B, A] in [-1, 1]."""
        scaled = self._centre + self._half_range * action.cpu().numpy()
        obs, reward, terminated, truncated, _ = self.vector.step(scaled)
        valid = ~self._ended
        self._ended = terminated | truncated
        columns = (obs, reward, terminated, truncated, valid)
        return Step(*(self._tensor(column) for column in columns))

    def metrics(self, mean: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """Return nothing: such an environment reports no CO2."""
        return {}

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self._device)
