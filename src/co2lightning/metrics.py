"""Every figure under all its names: in history.json, in TensorBoard, in tables and charts.

A new figure is one line here and the place that works it out.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """A figure and what it is called where it is shown.

    Attributes:
        key: In history.json and in what `--json` prints. Half the width of its 95 % interval,
            where it has one, is under `key` + `_interval`.
        heading: Of its column in a table, with the unit; without one it is in none.
        form: How `str.format` writes it; a text that stands left has none.
        narrow: The heading in a terminal; without one it is broken at the comma.
        tag: In TensorBoard.
        chart: Title of its chart in TensorBoard's layout, where it has one.
    """

    key: str
    heading: str = ""
    form: str = ""
    narrow: str = ""
    tag: str = ""
    chart: str = ""


def _of(group: str, *metrics: Metric) -> dict[str, Metric]:
    """Return metrics by their keys; the tag is that of the group where none is given."""
    return {m.key: m if m.tag else m._replace(tag=f"{group}/{m.key}") for m in metrics}


TRAINING = _of(
    "site",
    Metric("co2_kg", "CO2, kg", "{:.1f}", "CO2 kg", chart="CO2, kg a day"),
    Metric("uncontrolled_kg"),
    Metric(
        "co2_vs_uncontrolled",
        heading="of uncontrolled",
        form="{:.0%}",
        narrow="of uncon-\ntrolled",
        chart="CO2, share of the same days uncontrolled",
    ),
    Metric("cost", "cost", "{:.2f}", chart="cost a day"),
    Metric("uncontrolled_cost"),
    Metric("objective_vs_uncontrolled"),
    Metric("grid_import_kwh", chart="grid import, kWh a day"),
    Metric("curtailment_kwh"),
    Metric("peak_import_kw", "peak, kW", "{:.0f}", chart="peak import, kW, mean of the days"),
    Metric("self_consumption"),
    Metric("unmet_kwh", "unmet, kWh", "{:.1f}", chart="energy not served, kWh a day"),
    Metric("misled_kwh", "of it misled, kWh", "{:.1f}", "of it\nmisled"),
    Metric(
        "reward",
        tag="rollout/ep_rew_mean",
        chart="reward: saved against no control, share of the site's uncontrolled day",
    ),
    Metric(
        "eval_vs_uncontrolled",
        heading="without noise",
        form="{:.1%}",
        narrow="without\nnoise",
        tag="eval/objective_vs_uncontrolled",
        chart="training weeks without noise, share of uncontrolled",
    ),
    Metric("eval_a_day", tag="eval/objective_a_day"),
    Metric("eval_start_vs_uncontrolled", tag="eval/start_vs_uncontrolled"),
    Metric("time_seconds", tag="time/episode_seconds"),
    Metric("env_steps_per_second", tag="time/env_steps_per_second"),
)
"""Of an episode's training days, of the training weeks that `--evaluate_every` runs after it, and
of its time. Whatever else an episode has is of its agent, in TensorBoard under `train/`."""

HELD_OUT = _of(
    "test",
    Metric("co2_kg", "CO2, kg/day", "{:.1f}", chart="CO2 on held-out days, kg a day"),
    Metric("cost", "cost, {currency}/day", "{:.2f}", chart="cost a day on held-out days"),
    Metric("objective", "objective, a day", "{:.2f}", "objec-\ntive"),
    Metric("vs_best", "against {best}, {unit}/day", "{:+.1f}"),
    Metric(
        "gap_closed",
        heading="gap closed",
        form="{:.1%}",
        narrow="gap\nclosed",
        chart="gap closed, uncontrolled 0, optimum 1",
    ),
    Metric("unmet_kwh", "unmet, kWh/day", "{:.3f}"),
    Metric("misled_kwh", "of it misled, kWh/day", "{:.3f}", "of it\nmisled"),
    Metric("self_consumption", "self-consumption", "{:.1%}", "self-con-\nsumption"),
    Metric("curtailed_kwh", "curtailed, kWh/day", "{:.0f}"),
    Metric(
        "peak_import_kw",
        heading="peak import, kW",
        form="{:.0f}",
        narrow="peak\nkW",
        chart="peak import on held-out days, kW",
    ),
)
"""Of a policy on the held-out days, as `sim.evaluate.summarise` works it out."""


class Settled(NamedTuple):
    """What policies are settled by and compared with, and what that is called.

    Attributes:
        key: The figure in `HELD_OUT` that is settled: co2_kg, cost, or objective, weights of both.
        name: What it is called.
        unit: Its unit, "" where it has none or nobody names it.
        best: Title of the reference that all are compared with.
        currency: Of costs; None where the site has no prices, "" where it names none.
    """

    key: str
    name: str
    unit: str
    best: str
    currency: str | None

    @property
    def a_day(self) -> str:
        """The unit a day, such as `kg a day`."""
        return f"{self.unit} a day".strip()

    def written(self, value: float) -> str:
        """Return a figure of what is settled as tables write it."""
        return HELD_OUT[self.key].form.format(value)

    def metrics(self) -> list[Metric]:
        """Return the figures on held-out days under the names that they have here."""
        words = {"best": self.best, "unit": self.unit, "currency": self.currency or ""}
        forms = {} if self.key == "co2_kg" else {"vs_best": "{:+.2f}"}
        return [
            metric._replace(
                heading=metric.heading.format(**words).replace(", /day", ", a day"),
                form=forms.get(metric.key, metric.form),
            )
            for metric in HELD_OUT.values()
        ]


_KEYS = {metric.tag: metric.key for metric in TRAINING.values()}


def short_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return an episode's metrics under the names of history.json: `site/co2_kg` is `co2_kg`."""
    return {_KEYS.get(tag, tag.split("/")[-1]): value for tag, value in metrics.items()}


def tagged_metrics(figures: Mapping[str, float | None]) -> dict[str, float]:
    """Return an episode's figures in history.json under their tags: back from `short_metrics`."""
    return {
        TRAINING[name].tag if name in TRAINING else f"train/{name}": value
        for name, value in figures.items()
        if value is not None and name != "episode"
    }
