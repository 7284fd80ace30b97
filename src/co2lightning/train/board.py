"""What TensorBoard shows of a run beside its curves: a layout of charts, and a day as a figure.

Shapes: n steps of the day; a schedule's fields are [n].
"""

import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray

from co2lightning.agents.agent import Agent
from co2lightning.control.observation import as_rule
from co2lightning.control.rules import Rule, rbc_b
from co2lightning.metrics import HELD_OUT, TRAINING
from co2lightning.report.day import STYLE, Drawn, draw_day
from co2lightning.report.looks import LOOKS, agent_colour
from co2lightning.runs.files import make_directory, write_atomic
from co2lightning.sim.days import SiteDays
from co2lightning.sim.schedule import Schedule, play, start_soc
from co2lightning.site.model import Site
from co2lightning.train.curves import encode

REFERENCES = "references"
"""The directory of the reference lines, beside those of the runs."""


def layout(priced: bool) -> dict[str, dict[str, list[Any]]]:
    """Return the charts of all runs: category -> chart -> tags, as regular expressions.

    Args:
        priced: Whether the site has prices; where it has none no chart of costs stands empty.
    """
    return {
        category: {
            m.chart: ["Multiline", [f"^{m.tag}$"]]
            for m in metrics.values()
            if m.chart and (priced or m.key != "cost")
        }
        for category, metrics in (
            ("all runs side by side, an episode's training days", TRAINING),
            ("all runs side by side, held-out days (co2lightning test)", HELD_OUT),
        )
    }


def write_references(
    logs: Path, site: str, policies: Mapping[str, Mapping[str, float | None]], last_episode: int
) -> None:
    """Write what the rules and the optimum reach on a site's held-out days as level lines.

    Each policy is a run of its own, with the tags `test/*` and, to be seen beside the curves of
    training, `site/co2_kg`, `site/cost` where there are prices, and `site/co2_vs_uncontrolled`.

    Args:
        logs: Of all runs.
        site: The site's name.
        policies: Name -> figure -> value; "uncontrolled" among them.
        last_episode: How far the lines reach at least; they never become shorter.
    """
    uncontrolled_kg = policies["uncontrolled"]["co2_kg"]
    for name, figures in policies.items():
        directory = logs / REFERENCES / f"{site} held-out days" / name
        values = {f"test/{key}": value for key, value in figures.items()}
        co2_kg = values["site/co2_kg"] = figures["co2_kg"]
        values["site/cost"] = figures.get("cost")
        if co2_kg is not None and uncontrolled_kg:
            values["site/co2_vs_uncontrolled"] = co2_kg / uncontrolled_kg
        for place in (logs / REFERENCES, directory.parent):
            make_directory(place)
        reached = [_last_step(path) for path in directory.glob("*.episode_*")]
        replace_scalars(directory, values, (1, max([last_episode, *reached])), "*")


def _last_step(path: Path) -> int:
    """Return the episode at the end of an event file's name, 0 where it is of somebody else."""
    match = re.fullmatch(r".*\.episode_([0-9]{4,6})", path.name)
    return int(match[1]) if match else 0


def replace_scalars(
    directory: Path, values: Mapping[str, float | None], steps: Iterable[int], earlier: str
) -> None:
    """Write scalars, each at all `steps`, in place of an earlier file.

    TensorBoard reads the newest file of a directory and never returns to an older one, so it must
    not be half of one, as torch's own writer, a thread, leaves it on a full disk.

    Args:
        directory: Where the event file goes.
        values: Tag -> value; what is None is left out.
        steps: Ascending episodes; the last one stands at the end of the file's name.
        earlier: Which files it replaces, by the episode at the end of their names.

    Raises:
        OSError: It cannot be written, such as where a link is in the place of `directory`; the
            earlier file is untouched.
    """
    steps = sorted(set(steps))
    points = {tag: value for tag, value in values.items() if value is not None}
    made = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
    path = directory / f"events.out.tfevents.{made}.episode_{steps[-1]:04d}"
    make_directory(directory)
    replaced = [p for p in directory.glob(f"*.episode_{earlier}") if not p.is_dir() and p != path]
    write_atomic(path, encode(dict.fromkeys(steps, points)), durable=False)
    for old in replaced:
        old.unlink(missing_ok=True)


class DispatchFigure:
    """Draws one held-out day as the agent controls it now, every so many episodes.

    The day begins as a held-out stretch does. Nothing is drawn at random and nothing of the
    training is touched, so whether and how often it draws changes no result.

    Args:
        env: The site's environment; the day is its first held-out one.
        every: Draw after the episodes that this number divides.
        logger: The run's.
    """

    def __init__(self, env: SiteDays, every: int, logger: TensorBoardLogger) -> None:
        self.env = env
        self.every = every
        self.logger = logger
        self.day = int(env.site.stretches[0, 0])
        self._rule: Schedule | None = None

    def show(self, agent: Agent) -> None:
        """Draw the day if the episode an agent has just finished is one of those to be drawn."""
        if agent.episode % self.every:
            return
        env = self.env
        own = self._play(as_rule(env.observer, agent.act))
        if self._rule is None:
            self._rule = self._play(rbc_b)
        name = f"{type(agent).__name__} after episode {agent.episode}"
        colour = agent_colour(type(agent).__name__)
        image = day_image(env.site, self.day, (name, colour), own, self._rule)
        writer = self.logger.experiment
        writer.add_image("site/dispatch", image, agent.episode, dataformats="HWC")
        writer.flush()

    def _play(self, rule: Rule) -> Schedule:
        bounds = self.env.site.day_bounds[None, self.day : self.day + 2]
        (played,) = play(self.env.model, rule, self.env.site, bounds)
        return played.schedule


def day_image(
    site: Site, day: int, policy: tuple[str, str], own: Schedule, rule: Schedule
) -> NDArray[np.uint8]:
    """Return an image, RGB [height, width, 3], of what a policy and RBC B did on a day.

    Args:
        site: The site.
        day: Index into its days; it began as a stretch does.
        policy: Its name and its colour.
        own: What it did.
        rule: What RBC B did.
    """
    from matplotlib import rc_context  # a second that start-up is spared
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    name, colour = policy
    soc = start_soc(site)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 8.0), dpi=90)
        canvas = FigureCanvasAgg(figure)
        policies = [
            Drawn("RBC B", rule, soc, LOOKS["rbc_b"]),
            Drawn(name, own, soc, {"color": colour}),
        ]
        begin, end = site.day_bounds[day : day + 2].tolist()
        draw_day(figure, site, begin, end, policies)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
