"""`co2lightning export`: a policy or a rule as an ONNX file that runs without torch.

What a caller needs to know besides the graph stands in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from co2lightning import __version__
from co2lightning.agents.agent import Agent
from co2lightning.commands.onnx_graph import (
    OF_VEHICLES,
    build_onnx,
    inputs_of,
    takes_surplus_only,
    weighs_moves,
    windows_of,
)
from co2lightning.commands.run import is_rule, open_run, run_parser, site_of_rules
from co2lightning.control.moves import MOVES, SHARPNESS, kind_of
from co2lightning.control.observation import FEATURES, NAMES
from co2lightning.control.rules import Choice, words
from co2lightning.errors import UserError
from co2lightning.places import check_output
from co2lightning.runs.files import write_atomic
from co2lightning.sim.evaluate import TITLES
from co2lightning.sim.objective import priced_model
from co2lightning.sim.scales import observer_of
from co2lightning.sim.search import choice_of
from co2lightning.site.model import Site
from co2lightning.terminal import say

_POWERS = (
    ("ev", "EV power: -1 is what must be charged now, 1 what could be"),
    ("battery", "battery power at the AC side as a share of its rating, charging positive"),
)


def main(argv: Sequence[str]) -> int:
    """Run `co2lightning export` and return its exit code.

    Raises:
        UserError: The package onnx is missing, there is no such run, the file cannot be written.
    """
    parser = run_parser(
        "export",
        f"Write a run's policy, or a rule, as an ONNX file that runs without torch. Input: of the "
        f"{len(FEATURES)} features of a step those it needs, [N, how many]. Outputs of a policy: "
        f"action, [N, 2] or [N, {len(MOVES)}] in -1 to 1, then weights, [N, {len(MOVES)}], what "
        "each move weighs; of both: power_kw, [N, 2], what to give the vehicles and the battery "
        "(charging positive) in this step. Names, units and what the features are measured in are "
        "in the file's metadata, and in words what a rule does.",
        "co2lightning export PPO --output policy.onnx",
    )
    parser.add_place("--output", required=True, help="where the file goes")
    arguments = parser.parse_args(list(argv))
    try:
        import onnx
    except ImportError:
        raise UserError(
            "export: the package onnx is missing; pip install 'co2lightning[onnx]'"
        ) from None
    output = check_output("--output", arguments.output)
    assert output is not None
    name = arguments.name
    if is_rule(name, arguments):
        site = site_of_rules([name], arguments)
        policy = _choice(name, site, Path(arguments.directory) / "references")
        own = {"rule": name, "in_words": words(policy, site)}
        if name == "uncontrolled" and site.told:
            own["vehicle_to_kw"] = _WHATEVER_ANNOUNCED
        said = f"{TITLES[name]} of {site.name} in {arguments.output}: {own['in_words']}"
    else:
        policy, episode, site, _, run, _ = open_run(arguments)
        own = {"run": run.name, "episode": episode}
        said = f"{type(policy).__name__} after episode {episode} in {arguments.output}"
    model = build_onnx(policy, site)
    facts = metadata(policy, site) | own
    onnx.helper.set_model_props(
        model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    )
    onnx.checker.check_model(model, full_check=True)
    write_atomic(output, model.SerializeToString())
    say(said)
    return 0


def _choice(name: str, site: Site, keep: Path) -> Choice:
    """Return a rule as the choice that does the same; RBC C's is searched, and kept."""
    if name == "rbc_c":
        return choice_of(site, keep)
    return {
        "uncontrolled": Choice(),
        "rbc_a": Choice(greedy=True),
        "rbc_b": Choice("solar", greedy=True),
        "cheap": Choice("cheap", greedy=True),
    }[name]


def metadata(policy: Agent | Choice, site: Site) -> dict[str, Any]:
    """Return what a caller of the graph needs to know; lists are in the order of the columns."""
    observer, names = observer_of(site), inputs_of(policy)
    columns = [NAMES.index(name) for name in names]
    own = _of_rule(policy, site) if isinstance(policy, Choice) else _of_agent(policy, site)
    return {
        "co2lightning_version": __version__,
        "site": site.name,
        "site_sha256": site.sha256,
        "step_minutes": site.step_minutes,
        "observation_names": list(names),
        "observation_meanings": [FEATURES[column].meaning for column in columns],
        "observation_units": [FEATURES[column].unit for column in columns],
        "observation_centre": [observer.centre[column] for column in columns],
        "observation_spread": [observer.spread[column] for column in columns],
        "observation_from_value": (
            "(value - centre) / spread; 0 where spread is 0; hour_sin and the like are those of "
            "the middle of the step"
        ),
        **own,
        "power_names": ["ev_kw", "battery_kw"],
        "battery_kw": site.battery.power_kw if site.battery else 0.0,
        "grid_kw": site.grid_kw,
    }


def _of_agent(agent: Agent, site: Site) -> dict[str, Any]:
    ev_kw, wanted_kw = "must + (could - must) * (ev + 1) / 2", "wanted_kw = battery * battery_kw"
    actions, of_moves = _POWERS, dict[str, Any]()
    if weighs_moves(agent):
        actions = MOVES
        half = len(OF_VEHICLES)
        of_moves = {
            "action_mask": observer_of(site).moves.mask.tolist(),
            "action_to_weights": (
                f"w = softmax({SHARPNESS:g} * action + mask), once over the {half} moves of the "
                f"vehicles and once over those of the battery; w_{MOVES[0][0]} is that of "
                f"{MOVES[0][0]}, and so on"
            ),
            "vehicle_to_kw": (
                "each vehicle gets w_must * must + w_solar * solar + w_cheap * cheap + w_could * "
                f"could + w_cheap_price * cheap_price of its own: {_OF_A_VEHICLE}"
            ),
        }
        ev_kw = " + ".join(f"w_{name} * {name}" for name in OF_VEHICLES)
        wanted_kw = (
            "surplus = min(max(pv - load - ev_kw, -discharge_limit), charge_limit); "
            "wanted_kw = (w_store + w_greedy) * max(surplus, 0) - (w_serve + w_greedy) * "
            "max(-surplus, 0) + w_fill * charge_limit"
        )
    return {
        "agent": type(agent).__name__,
        "action_kind": kind_of(agent.action_dim),
        "action_names": [name for name, _ in actions],
        "action_low": [-1.0] * len(actions),
        "action_high": [1.0] * len(actions),
        "action_meanings": [meaning for _, meaning in actions],
        **of_moves,
        "action_to_kw": _to_kw(site, ev_kw, wanted_kw),
    }


def _of_rule(choice: Choice, site: Site) -> dict[str, Any]:
    windows = windows_of(choice)
    ev_kw, of_vehicle = {
        "arrival": ("could", "could of its own"),
        "solar": ("solar", "solar of its own"),
        "cheap": ("cheap_price", "cheap_price of its own"),
        "solar_cheap": (
            "min(max(pv - load, cheap), could)",
            "cheap of its own, and what pv - load has beyond the sum of cheap goes to those of "
            "least laxity first, up to could",
        ),
    }[choice.vehicles]
    if "charge" in windows:
        ev_kw = f"(could if charge else {ev_kw})"
        of_vehicle = f"could of its own where charge is 1, otherwise {of_vehicle}"
    wanted = [f"wanted_kw = {'pv - load - ev_kw' if choice.greedy else 0}"]
    if "hold" in windows:
        wanted.append("wanted_kw = max(wanted_kw, 0) if hold else wanted_kw")
    if "fill" in windows:
        each = priced_model(site).kw_per_soc.flatten().tolist()
        levels = (f"({float(choice.fill_soc):g} - soc) * {kw:.9g}" for kw in each)
        wanted.append(f"wanted_kw = max(wanted_kw, {', '.join(levels)}) if fill else wanted_kw")
    minutes = {
        name: [int(of.begin) * site.step_minutes, int(of.steps) * site.step_minutes]
        for name, of in windows.items()
    }
    meaning = (
        "name: [first minute of the day on the wall clock, how many minutes, past midnight too]; "
        "it is 1 in the steps that begin in them, otherwise 0"
    )
    return {
        "vehicle_to_kw": f"each vehicle gets {of_vehicle}: {_OF_A_VEHICLE}",
        **({"windows": minutes, "windows_meaning": meaning} if minutes else {}),
        "observation_to_kw": _to_kw(site, ev_kw, "; ".join(wanted)),
    }


def _to_kw(site: Site, ev_kw: str, wanted_kw: str) -> str:
    """Return how powers follow from what is asked for, in words that can be worked out."""
    surplus = ", max(pv - load - ev_kw, 0)" if takes_surplus_only(site) else ""
    return (
        "room = import_limit - load + pv; "
        f"ev_kw = min(max(room + discharge_limit, must), {ev_kw}); {wanted_kw}; "
        f"battery_kw = min(max(min(wanted_kw, room - ev_kw{surplus}), -discharge_limit), "
        "charge_limit); of features the values in kW. A vehicle that would get less than its "
        "socket's least power waits: of that ev_kw knows nothing"
    )


_WHATEVER_ANNOUNCED = (
    "each vehicle charges at its full power until it is full, whatever its driver announced; could "
    "and ev_kw are worked out from what was announced, so vehicles may take another sum"
)
_OF_A_VEHICLE = (
    "with owed what would finish it in this step, power its full power, later the steps after this "
    "one in its stay, could is min(owed, power); must is min(max(owed - power * later, 0), could), "
    "where above 0 its socket's least power at least; cheap is owed - power * (how many of those "
    "later steps are expected to cost less than this one, a step with a surplus what its export "
    "earns), within must and could; cheap_price the same without sun; solar is must, and what pv - "
    "load has beyond the sum of must goes to those of least laxity (later + 1 - owed / power) "
    "first. Where the connection has too little for the sum, those of most laxity go without "
    "first, down to must"
)
