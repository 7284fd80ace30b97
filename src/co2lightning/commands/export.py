"""`co2lightning export`: a policy as an ONNX file that runs without torch.

The graph holds all that lies between the features of a step and the set points: the actor with
its squashing, the clamp to [-1, 1], what the moves of the site weigh, and the power in kW with the
shield's limits. What a caller needs to know besides stands in the metadata.

Shapes: N observations, O features, A actions: 2 powers or what 10 moves weigh.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from co2lightning import __version__
from co2lightning.agents.agent import Agent
from co2lightning.agents.networks import MLP
from co2lightning.commands.run import open_run, run_parser
from co2lightning.control.moves import MOVES, SHARPNESS, kind_of
from co2lightning.control.observation import FEATURES, HIGHEST, NAMES
from co2lightning.errors import UserError
from co2lightning.places import check_output
from co2lightning.runs.files import write_atomic
from co2lightning.sim.scales import observer_of
from co2lightning.site.model import Site
from co2lightning.terminal import say

if TYPE_CHECKING:
    import onnx


_OPSET = 17  # of 2022: every runtime of today reads it
_IR_VERSION = 8
_POWERS = (
    ("ev", "EV power: -1 is what must be charged now, 1 what could be"),
    ("battery", "battery power at the AC side as a share of its rating, charging positive"),
)
_HALF = len(MOVES) // 2  # the moves of the vehicles come first, then those of the battery
_NEEDED = ("must", "could", "charge_limit", "discharge_limit", "load", "pv", "import_limit")
_OF_VEHICLES = tuple(name for name, _ in MOVES[:_HALF])


def main(argv: Sequence[str]) -> int:
    """Run `co2lightning export` and return its exit code.

    Raises:
        UserError: The package onnx is missing, there is no such run, the file cannot be written.
    """
    parser = run_parser(
        "export",
        f"Write a run's policy as an ONNX file that runs without torch. Input: the "
        f"{len(FEATURES)} features of a step, [N, {len(FEATURES)}]. Outputs: action, [N, 2] or "
        f"[N, {len(MOVES)}] in -1 to 1, then weights, [N, {len(MOVES)}], what each move weighs, "
        "and power_kw, [N, 2]: what to give the vehicles and the battery (charging positive) in "
        "this step. Names, units and what the features are measured in are in the file's "
        "metadata.",
        "co2lightning export PPO --output policy.onnx",
    )
    parser.add_place("--output", required=True, help="where the policy goes")
    arguments = parser.parse_args(list(argv))
    try:
        import onnx
    except ImportError:
        raise UserError(
            "export: the package onnx is missing; pip install 'co2lightning[onnx]'"
        ) from None
    output = check_output("--output", arguments.output)
    assert output is not None
    agent, episode, site, _, run, _ = open_run(arguments)
    model = build_onnx(agent, site)
    facts = metadata(agent, site) | {"run": run.name, "episode": episode}
    onnx.helper.set_model_props(
        model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    )
    onnx.checker.check_model(model, full_check=True)
    write_atomic(output, model.SerializeToString())
    say(f"{type(agent).__name__} after episode {episode} in {arguments.output}")
    return 0


def inputs_of(agent: Agent) -> tuple[str, ...]:
    """Return the features that the graph takes: the policy's, then what else the power needs."""
    names = agent.observation_names or NAMES
    needed = _NEEDED + (_OF_VEHICLES if _weighs_moves(agent) else ())
    return (*names, *dict.fromkeys(name for name in needed if name not in names))


def _weighs_moves(agent: Agent) -> bool:
    return kind_of(agent.action_dim) == "moves"


def metadata(agent: Agent, site: Site) -> dict[str, Any]:
    """Return what a caller of the graph needs to know; lists are in the order of the columns."""
    observer, names = observer_of(site, agent.device), inputs_of(agent)
    columns = [NAMES.index(name) for name in names]
    moves = _weighs_moves(agent)
    actions = MOVES if moves else _POWERS
    of_moves = {
        "action_mask": observer.moves.mask.tolist(),
        "action_to_weights": (
            f"w = softmax({SHARPNESS:g} * action + mask), once over the {_HALF} moves of the "
            f"vehicles and once over those of the battery; w_{MOVES[0][0]} is that of "
            f"{MOVES[0][0]}, and so on"
        ),
        "vehicle_to_kw": _VEHICLE_TO_KW,
    }
    return {
        "agent": type(agent).__name__,
        "action_kind": kind_of(agent.action_dim),
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
            f"(value - centre) / spread, clamped to -{HIGHEST:g} to {HIGHEST:g}; 0 where spread is "
            "0"
        ),
        "action_names": [name for name, _ in actions],
        "action_low": [-1.0] * len(actions),
        "action_high": [1.0] * len(actions),
        "action_meanings": [meaning for _, meaning in actions],
        **(of_moves if moves else {}),
        "power_names": ["ev_kw", "battery_kw"],
        "battery_kw": site.battery.power_kw if site.battery else 0.0,
        "grid_kw": site.grid_kw,
        "action_to_kw": _to_kw(site, moves),
    }


def _to_kw(site: Site, moves: bool) -> str:
    """Return how powers follow from an action or weights, in words that can be worked out."""
    surplus = ", max(pv - load - ev_kw, 0)" if _takes_surplus_only(site) else ""
    ev_kw, wanted_kw = "must + (could - must) * (ev + 1) / 2", "wanted_kw = battery * battery_kw"
    if moves:
        ev_kw = " + ".join(f"w_{name} * {name}" for name in _OF_VEHICLES)
        wanted_kw = (
            "surplus = min(max(pv - load - ev_kw, -discharge_limit), charge_limit); "
            "wanted_kw = (w_store + w_greedy) * max(surplus, 0) - (w_serve + w_greedy) * "
            "max(-surplus, 0) + w_fill * charge_limit"
        )
    return (
        "room = import_limit - load + pv; "
        f"ev_kw = min(max(room + discharge_limit, must), {ev_kw}); {wanted_kw}; "
        f"battery_kw = min(max(min(wanted_kw, room - ev_kw{surplus}), -discharge_limit), "
        "charge_limit); of features the values in kW. A vehicle that would get less than its "
        "socket's least power waits: of that ev_kw knows nothing"
    )


_VEHICLE_TO_KW = (
    "each vehicle gets w_must * must + w_solar * solar + w_cheap * cheap + w_could * could + "
    "w_cheap_price * cheap_price of its own: with owed what would finish it in this step, power "
    "its full power, later the steps after this one in its stay, could is min(owed, power); must "
    "is min(max(owed - power * later, 0), could), where above 0 its socket's least power at least; "
    "cheap is owed - power * (how many of those later steps are expected to cost less than this "
    "one, a step with a surplus what its export earns), within must and could; cheap_price the "
    "same without sun; solar is must, and what pv - load has beyond the sum of must goes to those "
    "of least laxity (later + 1 - owed / power) first. Where the connection has too little for the "
    "sum, those of most laxity go without first, down to must"
)


def _takes_surplus_only(site: Site) -> bool:
    return site.battery is not None and not site.battery.may_charge_from_grid


def build_onnx(agent: Agent, site: Site) -> onnx.ModelProto:
    """Return the graph of an agent's deterministic policy, `Agent.act`, and its power in kW."""
    names, observed = inputs_of(agent), "observation"
    graph = _Graph()
    if len(names) > agent.observation_dim:
        observed = graph.columns(observed, 0, agent.observation_dim)
    mean = _mlp(graph, observed, agent.actor, agent.settings.activation)
    mean = graph.columns(mean, 0, agent.action_dim)
    if agent.squashed:
        mean = graph.add("Tanh", mean)
    graph.add("Clip", mean, graph.number(-1.0), graph.number(1.0), name="action")
    widths = {"action": agent.action_dim, "power_kw": len(_POWERS)}
    if _weighs_moves(agent):
        _weights(graph, site)
        widths = {"action": agent.action_dim, "weights": len(MOVES), "power_kw": len(_POWERS)}
    _power(graph, site, names, _weighs_moves(agent))
    return graph.model(len(names), widths)


class _Graph:
    """Nodes and constants, each result under a name of its own."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, name: str | None = None, **options: Any) -> str:
        """Add a node and return the name of its output."""
        from onnx import helper

        output = name or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **options))
        return output

    def constant(self, values: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float32))

    def columns(self, source: str, first: int, end: int) -> str:
        """Return columns `first` to before `end` of a matrix."""
        bounds = [self.constant(np.array([n], dtype=np.int64)) for n in (first, end, 1)]
        return self.add("Slice", source, *bounds)

    def model(self, observed: int, widths: dict[str, int]) -> onnx.ModelProto:
        """Return the graph from so many features to outputs of these widths."""
        from onnx import TensorProto, helper

        def matrix(name: str, width: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])

        graph = helper.make_graph(
            self.nodes,
            "policy",
            [matrix("observation", observed)],
            [matrix(name, width) for name, width in widths.items()],
            self.constants,
        )
        return helper.make_model(
            graph,
            producer_name="co2lightning",
            producer_version=__version__,
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
        )


def _mlp(graph: _Graph, output: str, network: MLP, activation: str) -> str:
    """Add a multilayer perceptron on what the policy observes; mirrors `MLP.forward`."""
    for weight, bias in network.layers:
        output = _activation(graph, activation, _linear(graph, output, weight, bias))
    return _linear(graph, output, *network.last)


def _linear(graph: _Graph, source: str, weight: Tensor, bias: Tensor) -> str:
    constants = [graph.constant(tensor.detach().cpu().numpy()) for tensor in (weight, bias)]
    return graph.add("Gemm", source, *constants, transB=1)


def _activation(graph: _Graph, name: str, source: str) -> str:
    if name == "silu":
        return graph.add("Mul", source, graph.add("Sigmoid", source))
    return graph.add({"tanh": "Tanh", "relu": "Relu"}[name], source)


def _weights(graph: _Graph, site: Site) -> None:
    """Add `weights`; mirrors the softmax of `moves.powers_of`."""
    mask = graph.constant(observer_of(site).moves.mask.cpu().numpy())
    logits = graph.add("Mul", "action", graph.number(SHARPNESS))
    logits = graph.add("Add", logits, mask)
    halves = [graph.columns(logits, first, first + _HALF) for first in (0, _HALF)]
    weights = [graph.add("Softmax", half, axis=1) for half in halves]
    graph.add("Concat", *weights, name="weights", axis=1)


def _power(graph: _Graph, site: Site, names: Sequence[str], moves: bool) -> None:
    """Add `power_kw`; mirrors `shield` and, of moves, `moves.powers_of`."""
    observer = observer_of(site)

    def kw(feature: str) -> str:
        column, number = names.index(feature), NAMES.index(feature)
        spread, centre = (graph.number(of[number]) for of in (observer.spread, observer.centre))
        observed = graph.columns("observation", column, column + 1)
        return graph.add("Add", graph.add("Mul", observed, spread), centre)

    must_kw, could_kw = kw("must"), kw("could")
    charge_kw, discharge_kw = kw("charge_limit"), kw("discharge_limit")
    own_kw = graph.add("Sub", kw("load"), kw("pv"))
    room_kw = graph.add("Sub", kw("import_limit"), own_kw)
    supply_kw = graph.add("Max", graph.add("Add", room_kw, discharge_kw), must_kw)
    least_kw = graph.add("Neg", discharge_kw)

    def surplus(ev_kw: str) -> str:
        return graph.add("Neg", graph.add("Add", own_kw, ev_kw))

    if moves:
        each = graph.add("Concat", *(kw(name) for name in _OF_VEHICLES), axis=1)
        mixed = graph.add("Mul", graph.columns("weights", 0, _HALF), each)
        axis = graph.constant(np.array([1], dtype=np.int64))
        ev_kw = graph.add("Min", supply_kw, graph.add("ReduceSum", mixed, axis))

        def weight(*of: str) -> str:
            at = [next(i for i, (name, _) in enumerate(MOVES) if name == one) for one in of]
            parts = [graph.columns("weights", i, i + 1) for i in at]
            return graph.add("Sum", *parts)

        spare_kw = graph.add("Min", graph.add("Max", surplus(ev_kw), least_kw), charge_kw)
        stored_kw = graph.add("Mul", weight("store", "greedy"), graph.add("Relu", spare_kw))
        lacking_kw = graph.add("Relu", graph.add("Neg", spare_kw))
        given_kw = graph.add("Mul", weight("serve", "greedy"), lacking_kw)
        filled_kw = graph.add("Mul", weight("fill"), charge_kw)
        wanted_kw = graph.add("Add", graph.add("Sub", stored_kw, given_kw), filled_kw)
    else:
        half, one = graph.number(0.5), graph.number(1.0)
        share = graph.add("Mul", graph.add("Add", graph.columns("action", 0, 1), one), half)
        above_kw = graph.add("Mul", graph.add("Sub", could_kw, must_kw), share)
        ev_kw = graph.add("Min", supply_kw, graph.add("Add", must_kw, above_kw))
        rating = graph.number(site.battery.power_kw if site.battery else 0.0)
        wanted_kw = graph.add("Mul", graph.columns("action", 1, 2), rating)

    wanted_kw = graph.add("Min", wanted_kw, graph.add("Sub", room_kw, ev_kw))
    if _takes_surplus_only(site):
        free_kw = graph.add("Max", surplus(ev_kw), graph.number(0.0))
        wanted_kw = graph.add("Min", wanted_kw, free_kw)
    battery_kw = graph.add("Min", graph.add("Max", wanted_kw, least_kw), charge_kw)
    graph.add("Concat", ev_kw, battery_kw, name="power_kw", axis=1)
