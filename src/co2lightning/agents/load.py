"""An agent from a checkpoint, checked before any of it is believed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from co2lightning.agents import agent_class
from co2lightning.control.observation import build_observer, observe
from co2lightning.control.rules import Rule
from co2lightning.sim.days import SiteDays
from co2lightning.site.model import Site

if TYPE_CHECKING:
    from co2lightning.agents.agent import Agent


def policy_of(agent: Agent, site: Site) -> Rule:
    """Return an agent's deterministic policy in the form of a rule."""
    observer = build_observer(site, agent.device)
    return lambda model, state: agent.act(observe(observer, model, state))


def load_agent(checkpoint: dict[str, Any], origin: Path) -> Agent:
    """Make the agent that a checkpoint of a run on a site holds, ready to act.

    Raises:
        UserError: It is no such checkpoint; `origin` names its file.
    """
    from co2lightning.agents.agent import agent_of, check_sizes

    made = agent_class(agent_of(checkpoint, origin))
    sizes = {"observation_dim": SiteDays.observation_dim, "action_dim": SiteDays.action_dim}
    check_sizes(checkpoint, origin, sizes, "a site")
    return made.restore(checkpoint, origin, made.stored_settings(checkpoint, origin)).eval()
