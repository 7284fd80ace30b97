"""`co2lightning predict`: what a policy does on one day or several, step by step, as CSV.

Shapes: n steps, O features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from co2lightning.agents.agent import Agent
from co2lightning.commands.run import (
    check_bound,
    is_rule,
    open_run,
    run_parser,
    site_of_rules,
    unseen,
)
from co2lightning.control.moves import moves_of
from co2lightning.control.observation import NAMES, as_rule, give, observe
from co2lightning.control.state import Powers, SiteModel, State
from co2lightning.errors import UserError
from co2lightning.places import check_output
from co2lightning.report.comparison import evaluation_data, settled_in
from co2lightning.report.steps import columns_of, rows_of
from co2lightning.runs.files import write_atomic
from co2lightning.sim.days import day_index
from co2lightning.sim.evaluate import TITLES, Evaluation, evaluate, violations
from co2lightning.sim.scales import observer_of
from co2lightning.sim.search import rules_of
from co2lightning.site import trained_days
from co2lightning.site.model import Floats, Site
from co2lightning.terminal import say


def main(argv: Sequence[str]) -> int:
    """Run `co2lightning predict` and return its exit code.

    Raises:
        UserError: There is no such run or day, or a file cannot be written.
    """
    parser = run_parser(
        "predict",
        "Write a day as a run's policy, or a rule, controls it: a header and a row for each step. "
        "time: local, the beginning of the step. ev_kw, battery_kw (charging positive), grid_kw "
        "(at the meter, import positive; what is negative finds no use): means over the step. "
        "soc: 0-1, at its end. co2_kg: of the import. unmet_kwh: owed to vehicles that then leave. "
        "misled_kwh, where drivers announce: of it what is due to that. "
        "cost, where the site has prices: of the import less the export, in its currency.",
        "co2lightning predict PPO --day 2025-02-05 --output schedule.csv",
    )
    parser.add_argument(
        "--day", metavar="YYYY-MM-DD", help="a day of the site [default: the first held-out one]"
    )
    parser.add_argument(
        "--days", type=int, default=1, metavar="N", help="so many in one go [default: 1]"
    )
    parser.add_place("--output", help="where the CSV goes [default: standard output]")
    parser.add_place(
        "--observations",
        help="what the policy saw in these steps, as CSV too: the input of an exported policy",
    )
    arguments = parser.parse_args(list(argv))
    output = check_output("--output", arguments.output)
    observations = check_output("--observations", arguments.observations)
    policy: Agent | str = arguments.name
    facts: dict[str, Any] = {}  # what the checkpoint says of a run
    if is_rule(arguments.name, arguments):
        site, who = site_of_rules([arguments.name], arguments), TITLES[arguments.name]
    else:
        policy, episode, site, _, _, facts = open_run(arguments)
        who = f"{type(policy).__name__} after episode {episode}"
    if arguments.day:
        try:
            day = day_index(site, arguments.day)
        except UserError as error:
            raise UserError(f"--{error}") from None
    else:
        day = int(unseen(facts, site).stretches[0, 0])
    most = len(site.days) - day
    if not 1 <= arguments.days <= most:
        raise UserError(
            f"--days {arguments.days}: is not from 1 to {most}; {site.name} has so many days from "
            f"{site.days[day]} on"
        )
    chosen = slice(day, day + arguments.days)
    trained = trained_days.seen(facts, site)
    known = ~site.held_out[chosen] | (False if trained is None else trained[chosen])
    if known.any():
        which = site.days[day + int(np.flatnonzero(known)[0])]
        say(f"{which} is a training day of {site.name}", err=True)
    keep = Path(arguments.directory) / "references"
    found, seen = predict(policy, site, day, arguments.days, keep)
    begin = int(site.day_bounds[day])
    text = _csv(site, begin, columns_of(site, found.schedules["agent"][0]))
    if output is None:
        say(*text.splitlines())
    else:
        write_atomic(output, text.encode())
    if observations is not None:
        names = NAMES if isinstance(policy, str) else policy.observation_names
        features = {name: seen[:, i] for i, name in enumerate(names)}
        write_atomic(observations, _csv(site, begin, features).encode())
    settled = settled_in(evaluation_data(found))
    came_to = {name: settled.written(of.settled[0]) for name, of in found.policies.items()}
    told = ", ".join(f"{TITLES[name]} {came_to[name]}" for name in TITLES if name in came_to)
    unit = f" {settled.unit}" if settled.unit else ""
    own_words = {
        "co2_kg": f"emits {came_to['agent']} kg CO2",
        "cost": f"costs {came_to['agent']}{unit}",
        "objective": f"has an objective of {came_to['agent']}",
    }[settled.key]
    own = found.policies["agent"]
    beside = [f"peak {own.peak_import_kw[0]:.1f} kW"]
    if settled.key != "cost" and found.currency is not None:
        beside.append(f"cost {own.cost[0]:.2f} {found.currency}".strip())
    if settled.key != "co2_kg":
        beside.append(f"{own.co2_kg[0]:.1f} kg CO2")
    until = f" to {site.days[day + arguments.days - 1]}" if arguments.days > 1 else ""
    say(
        f"{site.days[day]}{until}: {who} {own_words}, what is left at the end settled; {told}; "
        f"by the meter {', '.join(beside)}",
        err=True,
    )
    return check_bound(violations(found))


def predict(
    policy: Agent | str, site: Site, day: int, count: int = 1, keep: Path | None = None
) -> tuple[Evaluation, Floats]:
    """Run a policy through days in one go, as evaluation begins them.

    Args:
        policy: An agent, or the name of one of the site's rules.
        site: The site.
        day: Index of the first day.
        count: How many days.
        keep: Directory where what is computed for the site alone is kept.

    Returns:
        The policy as "agent" beside the rules and the optimum in this one stretch, and what it saw
        or could have seen [n, O].
    """
    stretch = replace(site, stretches=np.array([[day, day + count]]))
    device = torch.device("cpu") if isinstance(policy, str) else policy.device
    observer = observer_of(site, device)
    if isinstance(policy, str):
        rule = rules_of(stretch, keep=keep)[policy]
    else:
        observer = give(observer, policy.observation_names, type(policy).__name__)
        rule = as_rule(observer, policy.act)
    seen: list[Tensor] = []

    def watched(model: SiteModel, state: State) -> Tensor | Powers:
        # As an exported file takes them: only a network's are clamped.
        free = observer._replace(high=torch.full_like(observer.high, torch.inf))
        seen.append(observe(free, model, state, moves_of(observer.moves, model, state)))
        return rule(model, state)

    found = evaluate(watched, stretch, device=device, keep=keep)
    return found, torch.cat(seen).double().cpu().numpy()


def _csv(site: Site, begin: int, columns: Mapping[str, Floats]) -> str:
    """Return a stretch as CSV: the time and each column's number [n], a row for each step."""
    return "\n".join([",".join(["time", *columns]), *rows_of(site, begin, columns)]) + "\n"
