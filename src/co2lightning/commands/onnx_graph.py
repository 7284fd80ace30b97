"""What a policy or a rule does in a step, as an ONNX graph.

The graph holds all that lies between the features of a step and the set points: of a policy the
actor with its squashing, the clamp to [-1, 1] and what the moves of the site weigh; of a rule its
windows by the clock on the wall; of both the power in kW with the shield's limits. Powers are
worked out of the features as they are given, only the network sees them clamped: so a load beyond
what was ever seen is still its own.

Shapes: N observations, O features, A actions: 2 powers or what 10 moves weigh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from co2lightning import __version__
from co2lightning.agents.agent import Agent
from co2lightning.agents.networks import MLP
from co2lightning.control.moves import MOVES, SHARPNESS, kind_of
from co2lightning.control.observation import HIGHEST, NAMES
from co2lightning.control.rules import Choice, Window
from co2lightning.sim.objective import priced_model
from co2lightning.sim.scales import observer_of
from co2lightning.site.model import DAY_H, Site

if TYPE_CHECKING:
    import onnx

    Wish = Callable[[str], str]
    """Adds the battery's wish in kW, given what PV - load - vehicles are."""

_OPSET = 17  # of 2022: every runtime of today reads it
_IR_VERSION = 8
_HALF = len(MOVES) // 2  # the moves of the vehicles come first, then those of the battery
_NEEDED = ("must", "could", "charge_limit", "discharge_limit", "load", "pv", "import_limit")
_CHARGING = {"arrival": "could", "solar": "solar", "cheap": "cheap_price", "solar_cheap": "cheap"}
OF_VEHICLES = tuple(name for name, _ in MOVES[:_HALF])


def inputs_of(policy: Agent | Choice) -> tuple[str, ...]:
    """Return the features that the graph takes: the policy's, then what else the power needs."""
    if isinstance(policy, Choice):
        windows = windows_of(policy)
        names, more = (), (_CHARGING[policy.vehicles],)
        more += ("hour_sin", "hour_cos") if windows else ()
        more += ("soc",) if "fill" in windows else ()
    else:
        names = policy.observation_names or NAMES
        more = OF_VEHICLES if weighs_moves(policy) else ()
    return tuple(dict.fromkeys((*names, *_NEEDED, *more)))


def weighs_moves(agent: Agent) -> bool:
    """Return whether an agent's action is what moves weigh."""
    return kind_of(agent.action_dim) == "moves"


def windows_of(choice: Choice) -> dict[str, Window]:
    """Return the times of day that a rule goes by: some of charge, fill and hold."""
    windows = {"charge": choice.charge, "fill": choice.fill, "hold": choice.hold}
    if choice.vehicles == "arrival":  # they charge at any time
        del windows["charge"]
    return {name: window for name, window in windows.items() if window.steps}


def takes_surplus_only(site: Site) -> bool:
    """Return whether a site's battery may not charge from the grid."""
    return site.battery is not None and not site.battery.may_charge_from_grid


def build_onnx(policy: Agent | Choice, site: Site) -> onnx.ModelProto:
    """Return the graph of a deterministic policy, `Agent.act`, or of a rule, and its power in kW.

    Powers are the simulator's up to rounding; only the simulator lets a vehicle wait that would get
    less than its socket's least power.
    """
    graph = _Graph(site, inputs_of(policy))
    if isinstance(policy, Choice):
        _power(graph, *_by_rule(graph, policy))
        return graph.model({"power_kw": 2})
    mean = _mlp(graph, policy)
    if policy.squashed:
        mean = graph.add("Tanh", mean)
    graph.add("Clip", mean, graph.number(-1.0), graph.number(1.0), name="action")
    if weighs_moves(policy):
        _weights(graph)
        _power(graph, *_weighed(graph))
        return graph.model({"action": policy.action_dim, "weights": len(MOVES), "power_kw": 2})
    _power(graph, *_as_said(graph))
    return graph.model({"action": policy.action_dim, "power_kw": 2})


class _Graph:
    """Nodes and constants, each result under a name of its own.

    Args:
        site: The site that its features are measured on.
        names: Of the features it takes, in their order.
    """

    def __init__(self, site: Site, names: tuple[str, ...]) -> None:
        self.site = site
        self.names = names
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._values: dict[str, str] = {}

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

    def value(self, feature: str) -> str:
        """Return a feature in its own unit, [N, 1]."""
        if feature not in self._values:
            observer = observer_of(self.site)
            column, number = self.names.index(feature), NAMES.index(feature)
            spread, centre = (self.number(of[number]) for of in (observer.spread, observer.centre))
            observed = self.columns("observation", column, column + 1)
            self._values[feature] = self.add("Add", self.add("Mul", observed, spread), centre)
        return self._values[feature]

    def surplus(self, *ev_kw: str) -> str:
        """Return PV - load [N, 1] in kW, less what vehicles take if that is given."""
        own_kw = self.add("Sub", self.value("pv"), self.value("load"))
        return self.add("Sub", own_kw, *ev_kw) if ev_kw else own_kw

    def model(self, widths: dict[str, int]) -> onnx.ModelProto:
        """Return the graph from the features to outputs of these widths."""
        from onnx import TensorProto, helper

        def matrix(name: str, width: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])

        graph = helper.make_graph(
            self.nodes,
            "policy",
            [matrix("observation", len(self.names))],
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


def _mlp(graph: _Graph, agent: Agent) -> str:
    """Add the actor on what it observes; mirrors `MLP.forward`."""
    network: MLP = agent.actor
    bounds = graph.number(-HIGHEST), graph.number(HIGHEST)
    output = graph.columns("observation", 0, agent.observation_dim)
    output = graph.add("Clip", output, *bounds)
    for weight, bias in network.layers:
        linear = _linear(graph, output, weight, bias)
        output = _activation(graph, agent.settings.activation, linear)
    return graph.columns(_linear(graph, output, *network.last), 0, agent.action_dim)


def _linear(graph: _Graph, source: str, weight: Tensor, bias: Tensor) -> str:
    constants = [graph.constant(tensor.detach().cpu().numpy()) for tensor in (weight, bias)]
    return graph.add("Gemm", source, *constants, transB=1)


def _activation(graph: _Graph, name: str, source: str) -> str:
    if name == "silu":
        return graph.add("Mul", source, graph.add("Sigmoid", source))
    return graph.add({"tanh": "Tanh", "relu": "Relu"}[name], source)


def _weights(graph: _Graph) -> None:
    """Add `weights`; mirrors the softmax of `moves.powers_of`."""
    mask = graph.constant(observer_of(graph.site).moves.mask.cpu().numpy())
    logits = graph.add("Mul", "action", graph.number(SHARPNESS))
    logits = graph.add("Add", logits, mask)
    halves = [graph.columns(logits, first, first + _HALF) for first in (0, _HALF)]
    weights = [graph.add("Softmax", half, axis=1) for half in halves]
    graph.add("Concat", *weights, name="weights", axis=1)


# --- what is asked for: the vehicles' power [N, 1], and the battery's when theirs is known --------


def _as_said(graph: _Graph) -> tuple[str, Wish]:
    """Add what an action of two powers asks for; mirrors `shield.ev_power_kw`."""
    must_kw, half, one = graph.value("must"), graph.number(0.5), graph.number(1.0)
    share = graph.add("Mul", graph.add("Add", graph.columns("action", 0, 1), one), half)
    spread_kw = graph.add("Sub", graph.value("could"), must_kw)
    asked_kw = graph.add("Add", must_kw, graph.add("Mul", spread_kw, share))

    def wish(_: str) -> str:
        battery = graph.site.battery
        rating = graph.number(battery.power_kw if battery else 0.0)
        return graph.add("Mul", graph.columns("action", 1, 2), rating)

    return asked_kw, wish


def _weighed(graph: _Graph) -> tuple[str, Wish]:
    """Add what moves ask for by their weights; mirrors `moves.powers_of`."""
    each = graph.add("Concat", *(graph.value(name) for name in OF_VEHICLES), axis=1)
    mixed = graph.add("Mul", graph.columns("weights", 0, _HALF), each)
    asked_kw = graph.add("ReduceSum", mixed, graph.constant(np.array([1], dtype=np.int64)))

    def weight(*of: str) -> str:
        at = [next(i for i, (name, _) in enumerate(MOVES) if name == one) for one in of]
        parts = [graph.columns("weights", i, i + 1) for i in at]
        return graph.add("Sum", *parts)

    def wish(surplus_kw: str) -> str:
        charge_kw, least_kw = graph.value("charge_limit"), _least_kw(graph)
        spare_kw = graph.add("Min", graph.add("Max", surplus_kw, least_kw), charge_kw)
        stored_kw = graph.add("Mul", weight("store", "greedy"), graph.add("Relu", spare_kw))
        lacking_kw = graph.add("Relu", graph.add("Neg", spare_kw))
        given_kw = graph.add("Mul", weight("serve", "greedy"), lacking_kw)
        filled_kw = graph.add("Mul", weight("fill"), charge_kw)
        return graph.add("Add", graph.add("Sub", stored_kw, given_kw), filled_kw)

    return asked_kw, wish


def _by_rule(graph: _Graph, choice: Choice) -> tuple[str, Wish]:
    """Add what a rule asks for; mirrors `rules.rbc_c`."""
    inside = _inside(graph, windows_of(choice))
    asked_kw = graph.value(_CHARGING[choice.vehicles])
    if choice.vehicles == "solar_cheap":
        asked_kw = graph.add("Max", graph.surplus(), asked_kw)
        asked_kw = graph.add("Min", asked_kw, graph.value("could"))
    if "charge" in inside:
        asked_kw = graph.add("Where", inside["charge"], graph.value("could"), asked_kw)

    def wish(surplus_kw: str) -> str:
        wanted_kw = surplus_kw if choice.greedy else graph.number(0.0)
        if "hold" in inside:
            taken_kw = graph.add("Max", wanted_kw, graph.number(0.0))
            wanted_kw = graph.add("Where", inside["hold"], taken_kw, wanted_kw)
        if "fill" in inside:
            lacks = graph.add("Sub", graph.number(float(choice.fill_soc)), graph.value("soc"))
            kw_per_soc = priced_model(graph.site).kw_per_soc.flatten().tolist()
            level_kw = [graph.add("Mul", lacks, graph.number(each)) for each in kw_per_soc]
            filled_kw = graph.add("Max", wanted_kw, *level_kw)
            wanted_kw = graph.add("Where", inside["fill"], filled_kw, wanted_kw)
        return wanted_kw

    return asked_kw, wish


def _inside(graph: _Graph, windows: dict[str, Window]) -> dict[str, str]:
    """Add whether a step lies in each of the windows, [N, 1].

    The features hold sine and cosine of the middle of a step on the wall clock, also on days on
    which clocks change. Of all times at which steps of the site begin, none of which is less than
    minutes from the next, the one whose sine and cosine point nearest to them is the step's: what
    an arc tangent would find, without its cases, and exact where steps begin at half past.
    """
    if not windows:
        return {}
    site, slots, local = graph.site, graph.site.steps(DAY_H), graph.site.local
    begins = np.unique((local - local.astype("datetime64[D]")).astype("timedelta64[m]"))
    minutes = begins.astype(np.int64)
    angle = 2 * np.pi * (minutes / 60 + site.step_h / 2) / DAY_H
    points = graph.constant(np.stack([np.sin(angle), np.cos(angle)]).astype(np.float32))
    hour = graph.add("Concat", graph.value("hour_sin"), graph.value("hour_cos"), axis=1)
    nearest = graph.add("ArgMax", graph.add("MatMul", hour, points), axis=1, keepdims=1)
    slot = minutes // site.step_minutes
    return {
        name: graph.add(
            "Gather", graph.constant((slot - int(of.begin)) % slots < int(of.steps)), nearest
        )
        for name, of in windows.items()
    }


# --- what becomes of it --------------------------------------------------------------------------


def _least_kw(graph: _Graph) -> str:
    return graph.add("Neg", graph.value("discharge_limit"))


def _power(graph: _Graph, asked_kw: str, wish: Wish) -> None:
    """Add `power_kw`; mirrors `shield`."""
    room_kw = graph.add("Add", graph.value("import_limit"), graph.surplus())
    supply_kw = graph.add("Add", room_kw, graph.value("discharge_limit"))
    supply_kw = graph.add("Max", supply_kw, graph.value("must"))
    ev_kw = graph.add("Min", supply_kw, asked_kw)
    surplus_kw = graph.surplus(ev_kw)
    wanted_kw = graph.add("Min", wish(surplus_kw), graph.add("Sub", room_kw, ev_kw))
    if takes_surplus_only(graph.site):
        wanted_kw = graph.add("Min", wanted_kw, graph.add("Relu", surplus_kw))
    most_kw = graph.value("charge_limit")
    battery_kw = graph.add("Min", graph.add("Max", wanted_kw, _least_kw(graph)), most_kw)
    graph.add("Concat", ev_kw, battery_kw, name="power_kw", axis=1)
