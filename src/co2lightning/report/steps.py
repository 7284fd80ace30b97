"""What policies did, step by step, as CSV.

Shapes: n steps of a stretch.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from co2lightning.sim.evaluate import Evaluation
from co2lightning.sim.schedule import Schedule
from co2lightning.site.model import Floats, Site


def columns_of(site: Site, plan: Schedule) -> dict[str, Floats]:
    """Return what a stretch's steps are told by, each [n]; `cost` where the site has prices."""
    columns = {
        "ev_kw": plan.ev_kw,
        "battery_kw": plan.battery_kw,
        "grid_kw": plan.grid_import_kw - plan.curtailed_kwh / site.step_h,
        "soc": plan.soc.clip(0.0, 1.0),  # single precision leaves a little below nothing
        "co2_kg": plan.co2_kg,
        "unmet_kwh": plan.unmet_kwh,
        **({"misled_kwh": plan.misled_kwh} if site.told else {}),
    }
    return columns if site.price_per_kwh is None else columns | {"cost": plan.cost}


def rows_of(site: Site, begin: int, columns: Mapping[str, Floats], who: str = "") -> Iterator[str]:
    """Yield a row for each step of a stretch: the time it begins, who did it, the numbers.

    Args:
        site: The site.
        begin: Place of the first step.
        columns: Each [n].
        who: A word between time and numbers, if any.
    """
    for step, row in enumerate(np.round(np.stack(list(columns.values()), axis=1), 9).tolist()):
        # Adding 0.0 takes the sign off a zero.
        numbers = (f"{value + 0.0:.9g}" for value in row)
        time = site.when(begin + step).isoformat()
        yield ",".join([time, *([who] if who else []), *numbers])


def steps_of(site: Site, evaluation: Evaluation, agent: str) -> str:
    """Return all steps of all policies on the held-out stretches, one stretch after another.

    Args:
        site: The evaluation's.
        evaluation: What is told.
        agent: What the policy "agent" is called.
    """
    lines: list[str] = []
    for number, begin in enumerate(site.stretch_bounds[:, 0].tolist()):
        for name, plans in evaluation.schedules.items():
            columns = columns_of(site, plans[number])
            if not lines:
                lines.append(",".join(["time", "policy", *columns]))
            lines += rows_of(site, begin, columns, agent if name == "agent" else name)
    return "\n".join(lines) + "\n"
