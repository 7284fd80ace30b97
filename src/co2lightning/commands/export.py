"""`co2lightning export`: a policy as an ONNX file that runs without torch.

The graph holds all that lies between the features of a step and the set points: the actor with
its squashing, the clamp to [-1, 1], and the power
in kW with the shield's limits. What a caller needs to know besides stands in the metadata.

Shapes: N observations, O features, A = 2 actions.
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
from co2lightning.control.moves import kind_of
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
_ACTIONS = ("ev", "battery")


def main(argv: Sequence[str]) -> int:
    """Run `co2lightning export` and return its exit code.

    Raises:
        UserError: The package onnx is missing, there is no such run, the file cannot be written.
    """
    parser = run_parser(
        "export",
        f"Write a run's policy as an ONNX file that runs without torch. Input: the "
        f"{len(FEATURES)} features of a step, [N, {len(FEATURES)}]. Outputs: action, [N, 2] in -1 "
        "to 1, and power_kw, [N, 2]: what to give the vehicles and the battery (charging "
        "positive) in this step. Names, units and what the features are measured in are in the "
        "file's metadata.",
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


def metadata(agent: Agent, site: Site) -> dict[str, Any]:
    """Return what a caller of the graph needs to know; lists are in the order of the columns."""
    observer = observer_of(site, agent.device)
    battery_kw = site.battery.power_kw if site.battery else 0.0
    surplus = ", max(pv - load - ev_kw, 0)" if _takes_surplus_only(site) else ""
    return {
        "agent": type(agent).__name__,
        "action_kind": kind_of(agent.action_dim),
        "co2lightning_version": __version__,
        "site": site.name,
        "site_sha256": site.sha256,
        "step_minutes": site.step_minutes,
        "observation_names": list(NAMES),
        "observation_meanings": [feature.meaning for feature in FEATURES],
        "observation_units": [feature.unit for feature in FEATURES],
        "observation_centre": list(observer.centre),
        "observation_spread": list(observer.spread),
        "observation_from_value": (
            f"(value - centre) / spread, clamped to -{HIGHEST:g} to {HIGHEST:g}; 0 where spread is "
            "0"
        ),
        "action_names": list(_ACTIONS),
        "action_low": [-1.0, -1.0],
        "action_high": [1.0, 1.0],
        "action_meanings": [
            "EV power: -1 is what must be charged now, 1 what could be",
            "battery power at the AC side as a share of its rating, charging positive",
        ],
        "power_names": ["ev_kw", "battery_kw"],
        "battery_kw": battery_kw,
        "grid_kw": site.grid_kw,
        "action_to_kw": (
            "room = import_limit - load + pv; "
            "ev_kw = min(max(room + discharge_limit, must), must + (could - must) * (ev + 1) / 2); "
            f"battery_kw = min(max(min(battery * battery_kw, room - ev_kw{surplus}), "
            "-discharge_limit), charge_limit); of features the values in kW. A vehicle that would "
            "get less than its socket's least power waits"
        ),
    }


def _takes_surplus_only(site: Site) -> bool:
    return site.battery is not None and not site.battery.may_charge_from_grid


def build_onnx(agent: Agent, site: Site) -> onnx.ModelProto:
    """Return the graph of an agent's deterministic policy, `Agent.act`, and its power in kW."""
    graph = _Graph()
    mean = _mlp(graph, agent.actor, agent.settings.activation)
    mean = graph.columns(mean, 0, len(_ACTIONS))
    if agent.squashed:
        mean = graph.add("Tanh", mean)
    graph.add("Clip", mean, graph.number(-1.0), graph.number(1.0), name="action")
    _power(graph, site)
    return graph.model()


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

    def model(self) -> onnx.ModelProto:
        from onnx import TensorProto, helper

        def matrix(name: str, width: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])

        graph = helper.make_graph(
            self.nodes,
            "policy",
            [matrix("observation", len(FEATURES))],
            [matrix("action", len(_ACTIONS)), matrix("power_kw", len(_ACTIONS))],
            self.constants,
        )
        return helper.make_model(
            graph,
            producer_name="co2lightning",
            producer_version=__version__,
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
        )


def _mlp(graph: _Graph, network: MLP, activation: str) -> str:
    """Add a multilayer perceptron on the observations; mirrors `MLP.forward`."""
    output = "observation"
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


def _power(graph: _Graph, site: Site) -> None:
    """Add `power_kw`; mirrors `shield.ev_power_kw` and `shield.battery_power_kw`."""
    observer = observer_of(site)

    def kw(feature: str) -> str:
        column = NAMES.index(feature)
        spread, centre = (graph.number(of[column]) for of in (observer.spread, observer.centre))
        observed = graph.columns("observation", column, column + 1)
        return graph.add("Add", graph.add("Mul", observed, spread), centre)

    must_kw, could_kw = kw("must"), kw("could")
    charge_kw, discharge_kw = kw("charge_limit"), kw("discharge_limit")
    own_kw = graph.add("Sub", kw("load"), kw("pv"))
    room_kw = graph.add("Sub", kw("import_limit"), own_kw)

    half, one = graph.number(0.5), graph.number(1.0)
    share = graph.add("Mul", graph.add("Add", graph.columns("action", 0, 1), one), half)
    above_kw = graph.add("Mul", graph.add("Sub", could_kw, must_kw), share)
    supply_kw = graph.add("Max", graph.add("Add", room_kw, discharge_kw), must_kw)
    ev_kw = graph.add("Min", supply_kw, graph.add("Add", must_kw, above_kw))

    rating = graph.number(site.battery.power_kw if site.battery else 0.0)
    wanted_kw = graph.add("Mul", graph.columns("action", 1, 2), rating)
    wanted_kw = graph.add("Min", wanted_kw, graph.add("Sub", room_kw, ev_kw))
    if _takes_surplus_only(site):
        surplus_kw = graph.add("Neg", graph.add("Add", own_kw, ev_kw))
        wanted_kw = graph.add("Min", wanted_kw, graph.add("Max", surplus_kw, graph.number(0.0)))
    wanted_kw = graph.add("Max", wanted_kw, graph.add("Neg", discharge_kw))
    battery_kw = graph.add("Min", wanted_kw, charge_kw)
    graph.add("Concat", ev_kw, battery_kw, name="power_kw", axis=1)
