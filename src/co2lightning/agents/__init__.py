"""The agents: one LightningModule and one loss each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from co2lightning.errors import UserError, show

if TYPE_CHECKING:
    from co2lightning.agents.agent import Agent

AGENTS = ("A2C", "SAC", "PPO", "APG")
"""The fixed set of names; a checkpoint or a recipe can ask for no other class."""


def agent_class(name: str) -> type[Agent]:
    """Return the class of one of `AGENTS`, importing torch and Lightning only now."""
    assert name in AGENTS
    return getattr(import_module(f"co2lightning.agents.{name.lower()}"), name)


def check_agent(name: object, where: str) -> str:
    """Return the agent's name if there is such an agent."""
    if name not in AGENTS:
        raise UserError(f"{where} {show(name)}: no such agent; choose one of {', '.join(AGENTS)}")
    return str(name)
