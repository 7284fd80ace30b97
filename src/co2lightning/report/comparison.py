"""Policies side by side on held-out stretches, as `test` and `site check` tell of them.

Shapes: W stretches.
"""

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np

from co2lightning.metrics import HELD_OUT, Settled
from co2lightning.report.tables import Table, comparison_table, perturbed_table, stretches_table
from co2lightning.sim.evaluate import (
    MPC_TITLE,
    STRETCHES_FOR_AN_INTERVAL,
    TITLES,
    Evaluation,
    summarise,
)
from co2lightning.sim.worlds import KNOWLEDGE, PERTURBATIONS
from co2lightning.site.model import DAY_H, Floats

_Data = Mapping[str, Any]


def evaluation_data(evaluation: Evaluation) -> dict[str, Any]:
    """Return what is settled, `stretches`, `policies`, `summary`, RBC C, as `--json` prints them.

    Numbers to 1e-6.
    """
    summaries = summarise(evaluation)
    stretches = {
        "begin": evaluation.days,
        "days": evaluation.n_days.tolist(),
        "hours": evaluation.hours.tolist(),
        "turned_away_kwh": np.round(evaluation.turned_away_kwh, 6).tolist(),
        "clipped_kwh": np.round(evaluation.clipped_kwh, 6).tolist(),
    }
    policies: dict[str, dict[str, Any]] = {}
    for name, of in summaries.items():
        told = {
            "co2_kg_per_day": of.co2_kg,
            "cost_per_day": of.cost,
            "unmet_kwh_per_day": of.unmet_kwh,
            "misled_kwh_per_day": of.misled_kwh,
            "peak_kw": of.peak_import_kw,
        }
        policies[name] = {key: round(v, 6) for key, v in told.items() if v is not None}
        figures = _figures_told(evaluation, name).items()
        # Adding 0.0 takes the sign off a zero.
        policies[name]["stretches"] = _by_row(
            {key: (np.round(column, 6) + 0.0).tolist() for key, column in figures}
        )
    summary = {
        name: {key: None if v is None else round(v, 6) for key, v in of._asdict().items()}
        for name, of in summaries.items()
    }
    return {
        "objective": evaluation.objective._asdict(),
        "currency": evaluation.currency,
        "best": evaluation.best,
        "stretches": _by_row(stretches),
        "policies": policies,
        "summary": summary,
        "rbc_c": evaluation.rbc_c,
    }


def knowledge_data(data: _Data, found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return what policies come to if they know more, as `knowledge` in what `--json` prints.

    Args:
        data: Of the site as it is, as `evaluation_data` returns it.
        found: Per world of `worlds.KNOWLEDGE` the policies there. One in which nobody does
            otherwise is left out.
    """
    worlds = {name: _of_world(data, evaluation) for name, evaluation in found.items()}
    own = {name: _in_short(data, summary) for name, summary in data["summary"].items()}
    return {
        name: told
        for name, told in worlds.items()
        if any(figures != own[policy] for policy, figures in told.items())
    }


def perturbed_data(data: _Data, found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return what policies come to in perturbed worlds, as `perturbed` in what `--json` prints.

    Args:
        data: Of the site as it is, as `evaluation_data` returns it.
        found: Per world of `worlds.PERTURBATIONS` the policies there.
    """
    worlds = {name: _of_world(data, evaluation) for name, evaluation in found.items()}
    for told in worlds.values():
        for policy, figures in told.items():
            share, before = figures["gap_closed"], data["summary"][policy]["gap_closed"]
            left = None if share is None or not before or before < 0.0 else share / before
            figures["gain_left"] = None if left is None else round(left, 6)
    return worlds


def _of_world(data: _Data, evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    summaries = {name: of._asdict() for name, of in summarise(evaluation).items()}
    return {name: _in_short(data, summaries[name]) for name in data["summary"] if name in summaries}


def _in_short(data: _Data, summary: _Data) -> dict[str, float | None]:
    """Return of a policy's summary what is settled, the share of the gap and what is unmet."""
    keys = settled_in(data).key, "gap_closed", "unmet_kwh"
    return {key: None if summary[key] is None else round(summary[key], 6) + 0.0 for key in keys}


def _figures_told(evaluation: Evaluation, name: str) -> dict[str, Floats]:
    """Return what is told of a policy in each stretch: no cost where there are no prices."""
    figures = evaluation.policies[name]
    told = figures._asdict() | {"compared": evaluation.compared(name)}
    if evaluation.currency is None:
        del told["cost"]
    if not evaluation.announced:
        del told["misled_kwh"]
    if not evaluation.objective.cost:
        told["settlement_kg"] = figures.settlement
    return told


def settled_in(data: _Data) -> Settled:
    """Return what the policies in what `evaluation_data` returns are settled by, in words."""
    weights, currency = data["objective"], data["currency"]
    known = {(1.0, 0.0): ("co2_kg", "CO2", "kg"), (0.0, 1.0): ("cost", "cost", currency or "")}
    key, name, unit = known.get((weights["co2"], weights["cost"]), ("objective", "objective", ""))
    return Settled(key, name, unit, TITLES[data["best"]], currency)


def _by_row(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def count_text(stretches: Sequence[_Data]) -> str:
    """Return how much is held out: `8 held-out weeks`, `1 held-out day`."""
    lengths = {stretch["days"] for stretch in stretches}
    one, many = "stretch", "stretches"
    if len(lengths) == 1 and (named := {7: "week", 1: "day"}.get(stretches[0]["days"])):
        one, many = named, f"{named}s"
    return f"{len(stretches)} held-out {one if len(stretches) == 1 else many}"


def comparison_tables(
    data: _Data, site: str, who: str, agent: str = ""
) -> tuple[list[Table], list[str]]:
    """Return policies side by side, each stretch where there are few, and lines to put below.

    Args:
        data: As `evaluation_data` returns it.
        site: Its name.
        who: The beginning of the title, such as `PPO, episode 3`.
        agent: What the agent is called, if there is one.
    """
    stretches, titles = data["stretches"], {"agent": agent, "mpc": MPC_TITLE, **TITLES}
    last = stretches[-1]
    end = date.fromisoformat(last["begin"]) + timedelta(days=last["days"] - 1)
    title = f"{who}, on {count_text(stretches)} of {site} ({stretches[0]['begin']} to {end})"
    rows = [
        {"name": name, "policy": titles[name], **summary}
        for name, summary in data["summary"].items()
    ]
    settled = settled_in(data)
    tables = [comparison_table(rows, settled, title)]
    if len(stretches) < STRETCHES_FOR_AN_INTERVAL:
        each = {
            titles[name]: policy["stretches"]
            for name, policy in data["policies"].items()
            if not name.endswith("_true")  # one line of them is enough
        }
        tables.append(stretches_table(stretches, each, settled, "each"))
    if "perturbed" in data:
        first = next(iter(data["summary"]))
        shown = {name: titles[name] for name in dict.fromkeys((first, data["best"], "rbc_b"))}
        worlds = {"as it is": data["summary"]}
        price = {"co2_kg": "carbon", "cost": "price"}.get(settled.key, "carbon and price")
        for name, told in data["perturbed"].items():
            worlds[PERTURBATIONS[name].format(price=price)] = told
        tables.append(perturbed_table(worlds, shown, settled))
    found = [f"RBC C: {data['rbc_c']}"] if data["rbc_c"] else []
    found += knowledge_lines(data, titles)
    return tables, [*found, *remarks(stretches, data["policies"], titles)]


def verdict(data: _Data, name: str, title: str) -> str:
    """Return what to do, in a sentence: take this policy, or the best rule.

    Args:
        data: As `evaluation_data` returns it.
        name: The policy's in it.
        title: What it is called.
    """
    settled, own, best = settled_in(data), data["summary"][name], data["best"]
    use_rule = "Leave it uncontrolled" if best == "uncontrolled" else f"Use {settled.best}"
    less = f"less than the best simple rule, {settled.best}"
    if data["summary"]["optimum"]["gap_closed"] is None:
        return "Nothing is to be gained: the optimum is less than 0.1 % below uncontrolled."
    if name == best:
        return f"{use_rule}: no other rule does better here."
    verb = {"co2_kg": "emits", "cost": "costs"}.get(settled.key, "comes to")
    difference, half = own["vs_best"], own["vs_best_interval"]
    amount, sign = settled.written(abs(difference)), "less" if difference < 0 else "more"
    if half is not None:
        told = f"{amount} \N{PLUS-MINUS SIGN} {settled.written(half)} {settled.a_day}"
        if difference < -half:
            said = f"Use {title}: it {verb} {told} {less}"
        elif difference > half:
            said = f"{use_rule}: {title} {verb} {told} more"
        else:
            said = f"{use_rule}: it is as good and simpler; {title} {verb} {told} {sign}"
    else:
        rows = (data["policies"][which]["stretches"] for which in (name, best))
        lower = [a["compared"] < b["compared"] - 1e-6 for a, b in zip(*rows, strict=True)]
        told = f"{amount} {settled.a_day} {sign} in the mean"
        held_out = count_text(data["stretches"])
        if all(lower):
            said = f"Use {title}: it {verb} {less}, in each of {held_out}, {told}"
        else:
            which = f"{sum(lower)} of {held_out}"
            said = f"{use_rule}: it is simpler, and {title} {verb} less in {which}, {told}"
    unmet_kwh = own["unmet_kwh"] - data["summary"][best]["unmet_kwh"]
    more = f"; {title} leaves {unmet_kwh:.2f} kWh a day more unmet, which is counted"
    return f"{said}{more if unmet_kwh >= 0.005 else ''}."


def knowledge_lines(data: _Data, titles: Mapping[str, str]) -> list[str]:
    """Return what those would come to, who then do otherwise, in a line for each that is known.

    Args:
        data: As `evaluation_data` returns it, with `knowledge`.
        titles: Of the policies.
    """
    settled, lines = settled_in(data), list[str]()
    for world, told in data.get("knowledge", {}).items():
        others = {
            policy: figures
            for policy, figures in told.items()
            if figures != _in_short(data, data["summary"][policy])
        }
        key, what = "gap_closed", "gap closed"
        if any(figures[key] is None for figures in others.values()):
            key, what = settled.key, settled.a_day
        form = HELD_OUT[key].form
        known = [f"{titles[policy]} {form.format(of[key])}" for policy, of in others.items()]
        lines.append(f"With {KNOWLEDGE[world]}, {what}: {', '.join(known)}")
    return lines


def remarks(stretches: Sequence[_Data], policies: _Data, titles: Mapping[str, str]) -> list[str]:
    """Return what these figures leave out, and who imports more than the connection gives."""
    days = sum(stretch["hours"] for stretch in stretches) / DAY_H

    def a_day(rows: Sequence[_Data], key: str) -> float:
        return sum(row[key] for row in rows) / days

    lines = []
    for key, words in (
        ("turned_away_kwh", "kWh/day are turned away, for want of a free socket"),
        ("clipped_kwh", "kWh/day are clipped, more than 98 % of what stays allow"),
    ):
        if kwh := a_day(stretches, key):
            lines.append(f"Served by nobody and in no figure above: {kwh:.2f} {words}")
    short = [
        f"{titles[name]} {policy['unmet_kwh_per_day']:.2f}"
        for name, policy in policies.items()
        if policy.get("misled_kwh_per_day") and policy["unmet_kwh_per_day"] >= 0.005
    ]
    if short:
        lines.append(
            "Drivers do other than they announce, so vehicles leave without so many kWh/day: "
            f"{', '.join(short)}; nothing is emitted for them, so where policies are compared they "
            "count at the mean price"
        )
    for name, policy in policies.items():
        if kwh := a_day(policy["stretches"], "over_limit_kwh"):
            lines.append(f"{titles[name]} imports {kwh:.2f} kWh/day beyond the connection's limit")
    return lines
