"""`co2lightning predict`: what a policy does on one day, step by step, as CSV.

Shapes: T = 96 steps, O features.
"""

from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import torch
from torch import Tensor

from co2lightning.agents.agent import Agent
from co2lightning.commands.run import open_run, run_parser, unseen
from co2lightning.control.observation import FEATURES, build_observer, observe
from co2lightning.control.state import SiteModel, State
from co2lightning.errors import UserError
from co2lightning.places import check_output
from co2lightning.runs.files import write_atomic
from co2lightning.sim.days import day_index
from co2lightning.sim.evaluate import TITLES, check_finite, reference_schedules
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import Schedule, schedule
from co2lightning.site import trained_days
from co2lightning.site.model import STEP_H, Floats, Site, T
from co2lightning.terminal import say

_COLUMNS = ("time", "ev_kw", "battery_kw", "grid_kw", "soc", "co2_kg")


def main(argv: Sequence[str]) -> int:
    """Run `co2lightning predict` and return its exit code.

    Raises:
        UserError: There is no such run or day, or a file cannot be written.
    """
    parser = run_parser(
        "predict",
        "Write a day as a run's policy controls it: a header and 96 rows, one for each 15 min. "
        "time: local, the beginning of the step. ev_kw, battery_kw (charging positive), grid_kw "
        "(at the meter, import positive; what is negative finds no use): means over the step. "
        "soc: 0-1, at its end. co2_kg: of the import; in the last row also of a battery left "
        "emptier than at midnight.",
        "co2lightning predict PPO --day 2025-01-06 --output schedule.csv",
    )
    parser.add_argument(
        "--day", metavar="YYYY-MM-DD", help="a day of the site [default: the first held-out one]"
    )
    parser.add_place("--output", help="where the CSV goes [default: standard output]")
    parser.add_place(
        "--observations",
        help="what the policy saw in these 96 steps, as CSV too: the input of an exported policy",
    )
    arguments = parser.parse_args(list(argv))
    output = check_output("--output", arguments.output)
    observations = check_output("--observations", arguments.observations)
    agent, episode, site, _, _, facts = open_run(arguments)
    if arguments.day:
        try:
            day = day_index(site, arguments.day)
        except UserError as error:
            raise UserError(f"--{error}") from None
    else:
        day = int(unseen(facts, site).held_out_days[0])
    trained = trained_days.seen(facts, site)
    if not site.held_out[day] or (trained is not None and trained[day]):
        say(f"{site.days[day]} is a training day of {site.name}", err=True)
    planned, seen = day_schedule(agent, site, day)
    grid_kw = planned.grid_import_kw - planned.curtailed_kwh / STEP_H
    columns = [planned.ev_kw, planned.battery_kw, grid_kw, planned.soc, planned.co2_kg]
    text = _csv(site, day, _COLUMNS[1:], np.concatenate(columns).T)
    if output is None:
        say(*text.splitlines())
    else:
        write_atomic(output, text.encode())
    if observations is not None:
        write_atomic(observations, _csv(site, day, [f.name for f in FEATURES], seen).encode())
    others = reference_schedules(site, [day])
    told = ", ".join(f"{TITLES[name]} {other.co2_kg.sum():.1f}" for name, other in others.items())
    say(
        f"{site.days[day]}: {type(agent).__name__} after episode {episode} emits "
        f"{planned.co2_kg.sum():.1f} kg CO2; {told}",
        err=True,
    )
    return 0


def day_schedule(agent: Agent, site: Site, day: int) -> tuple[Schedule, Floats]:
    """Run a policy through one day.

    Returns:
        The schedule, its fields [1, T], and what the policy saw [T, O].
    """
    observer = build_observer(site, agent.device)
    seen: list[Tensor] = []

    def policy(model: SiteModel, state: State) -> Tensor:
        seen.append(observe(observer, model, state))
        return agent.act(seen[-1])

    planned = schedule(priced_model(site, agent.device), policy, site, [day])
    check_finite(planned)
    return planned, torch.cat(seen).double().cpu().numpy()


def _csv(site: Site, day: int, names: Sequence[str], values: Floats) -> str:
    """Return the rows of a day: the time, then a row of values [T, columns] for each step."""
    midnight = datetime.combine(date.fromisoformat(site.days[day]), time(), ZoneInfo(site.timezone))
    rows = [",".join(["time", *names])]
    for step in range(T):
        begin = midnight + timedelta(hours=step * STEP_H)
        # Adding 0.0 takes the sign off a zero.
        numbers = (f"{value + 0.0:.9g}" for value in np.round(values[step], 9))
        rows.append(",".join([begin.isoformat(), *numbers]))
    return "\n".join(rows) + "\n"
