"""`co2lightning.evaluate`: the figures of `test` for any policy, of whatever library.

Shapes: B stretches at once, O features, A = 2 actions.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.moves import ACTIONS
from co2lightning.control.observation import as_rule
from co2lightning.control.rules import Rule
from co2lightning.errors import UserError
from co2lightning.places import local
from co2lightning.report.comparison import comparison_tables, evaluation_data
from co2lightning.report.tables import in_terminal
from co2lightning.sim import evaluate as held_out
from co2lightning.sim.scales import observer_of
from co2lightning.site.load import load_site
from co2lightning.site.model import Site
from co2lightning.terminal import as_text


class Comparison(dict[str, Any]):
    """What `co2lightning test --json` prints, as a dict; printed itself it is the table."""

    table = ""

    def __repr__(self) -> str:
        return self.table


def evaluate(
    policy: Any,
    site: str | Path | Site = "iquitos",
    objective: str | Mapping[str, float] | None = None,
    *,
    vectorized: bool = True,
    name: str = "policy",
    keep: str | Path | None = None,
) -> Comparison:
    """Run any policy on a site's held-out stretches, beside the rules and the optimum.

    Args:
        policy: An agent of this package, a model of Stable-Baselines3 or whatever else has a
            `predict`, which is asked for its deterministic actions; or a callable. It gets
            observations [B, O] float32, as the Gymnasium environment gives them, and returns
            actions [B, A] in [-1, 1], or a tuple that begins with them. B is how many stretches
            are run side by side, so a policy that remembers must do so for each row.
        site: A site folder, the name of a shipped site, or a site as `load_site` returns it.
        objective: What is settled, as `gym.make` and `load_site` take it: co2, cost or weights. A
            site that is loaded already has its own.
        vectorized: Whether the policy takes all B at once; otherwise it is asked row by row, with
            observations [O] for actions [A].
        name: What the policy is called in the table.
        keep: A directory in which what is worked out for the site alone is kept for the next
            process, such as `checkpoints/references`; in one process it is worked out once.

    Returns:
        What `co2lightning test --json` has of stretches, policies and their summary, the policy
        as "agent"; `print` shows the table.

    Raises:
        UserError: The site cannot be read, or what the policy returns are no such actions.
    """
    where = None if keep is None else Path(local("keep", keep))
    if not isinstance(site, Site):
        site = load_site(site, objective="co2" if objective is None else objective)
    elif objective is not None:
        raise UserError("objective: a site that is loaded has its own; give it to load_site")
    rule = _as_rule(_acting(policy), site, vectorized)
    found = held_out.evaluate(rule, site, _references(site, where))
    compared = Comparison(evaluation_data(found))
    tables, below = comparison_tables(compared, site.name, name, name)
    below += [f"The optimum is no bound, a defect: {which}" for which in held_out.violations(found)]
    compared.table = as_text(*map(in_terminal, tables), below=below, width=110)
    return compared


@functools.lru_cache(maxsize=4)  # seconds to minutes, and a policy may be looked at often
def _references(site: Site, keep: Path | None) -> held_out.Evaluation:
    return held_out.evaluate(None, site, keep=keep)


def _acting(policy: Any) -> Callable[[np.ndarray], Any]:
    """Return what gives a policy's actions."""
    predict = getattr(policy, "predict", None)
    if predict is None:
        if not callable(policy):
            raise UserError(
                f"policy: {type(policy).__name__} is neither callable nor has it a predict; give "
                "a function of observations that returns actions"
            )
        return cast("Callable[[np.ndarray], Any]", policy)
    if "deterministic" in inspect.signature(predict).parameters:
        return lambda observation: predict(observation, deterministic=True)
    return predict


def _as_rule(act: Callable[[np.ndarray], Any], site: Site, vectorized: bool) -> Rule:
    observer = observer_of(site)

    def answer(observed: Tensor) -> Tensor:
        observations = np.array(observed.numpy(), order="C")
        if vectorized:
            actions = _actions(act(observations), observations)
        else:
            actions = np.stack([_actions(act(row), row) for row in observations])
        return torch.from_numpy(actions)

    return as_rule(observer, answer)


def _actions(answer: Any, observed: np.ndarray) -> np.ndarray:
    """Return what a policy has answered to observations [..., O], as actions [..., A].

    Raises:
        UserError: It is none.
    """
    # A predict returns the state of a recurrent policy, too.
    first: Any = answer[0] if isinstance(answer, tuple) and answer else answer
    answer = first if isinstance(first, Tensor) or np.ndim(first) else answer
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu().numpy()
    try:
        actions = np.array(answer, dtype=np.float32)
    except (TypeError, ValueError):
        actions = None
    wanted = [(*observed.shape[:-1], width) for width in ACTIONS.values()]
    if actions is None or actions.shape not in wanted:
        shape = [] if actions is None else list(actions.shape)
        got = f"shape {shape}" if shape else type(answer).__name__
        one_by_one = "; vectorized=False gives it one observation at a time"
        raise UserError(
            f"policy: returned {got} for observations {list(observed.shape)}, must be actions "
            f"{' or '.join(str(list(one)) for one in wanted)}"
            f"{one_by_one if observed.ndim > 1 else ''}"
        )
    if not np.isfinite(actions).all():
        raise UserError("policy: returned actions that are no finite numbers; give -1 to 1")
    return actions
