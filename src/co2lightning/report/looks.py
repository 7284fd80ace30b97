"""The colours and lines of all that is drawn: page, figures, TensorBoard, pictures of docs/.

A colour belongs to an agent, wherever and beside whatever it is drawn; runs of one agent differ by
their lines and marks. Okabe and Ito's colours, darkened for paper. Imports nothing.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

AGENTS = {
    "PPO": ("#0072b2", "#56b4e9"),
    "SAC": ("#c2500a", "#ff9a4d"),
    "A2C": ("#008060", "#3ecf9f"),
    "APG": ("#b3123c", "#ff8095"),
}
"""Agent -> its colour on white and on black."""
OTHER = ("#8a6d00", "#e6cf52")
"""That of an agent without one."""
FLOWS = {
    "ev": ("#5b4db7", "#b3a7ff"),
    "battery": ("#a8327d", "#ee94cb"),
    "grid": ("#1b1f24", "#ffffff"),
    "load": ("#7a828b", "#98a1ab"),
    "pv": ("#f3d98a", "#6b5a1e"),
    "carbon": ("#57606a", "#a5adb6"),
}
"""What flows on a site -> colour on white and on black; the PV's is that of an area."""
HEAT = {"minus": "#0069b4", "same": "#f4f4f2", "plus": "#c2500a", "never": "#b4bac1"}
"""A heat map's colours below, at and above nothing, evenly between them, and of what is not there;
the same on white and on black."""
# References are greys told apart by dashes; report.css has them as classes of these names.
LOOKS: dict[str, dict[str, Any]] = {
    "uncontrolled": {"color": "#57606a", "ls": (0, (1, 2))},
    "rbc_a": {"color": "#57606a", "ls": (0, (4, 3))},
    "rbc_b": {"color": "#1b1f24", "ls": "-"},
    "cheap": {"color": "#57606a", "ls": (0, (6, 2, 1, 2))},
    "rbc_c": {"color": "#1b1f24", "ls": (0, (5, 1.5))},
    "cheap_true": {"color": "#98a1ab", "ls": (0, (6, 2, 1, 2))},
    "rbc_c_true": {"color": "#98a1ab", "ls": (0, (5, 1.5))},
    "optimum": {"color": "#1b1f24", "ls": (0, (7, 2, 2, 2))},
}
DASHES = ((), (8.0, 3.0), (3.0, 2.0), (12.0, 3.0, 3.0, 3.0))
"""Lines of an agent's first run, its second, ..., in widths of 1; none is a whole line."""
MARKS = (("dot", "o"), ("square", "s"), ("triangle", "^"))
"""Marks likewise, as the page and as matplotlib name them."""


class RunLook(NamedTuple):
    """How a run is drawn: whose colour, and the place of its line and mark."""

    agent: str
    place: int

    @property
    def colour(self) -> str:
        """The colour on white."""
        return agent_colour(self.agent)

    @property
    def line(self) -> dict[str, Any]:
        """Colour and dashes, for matplotlib."""
        dashes = DASHES[self.place % len(DASHES)]
        return {"color": self.colour, "ls": (0, dashes) if dashes else "-"}

    @property
    def marker(self) -> str:
        """The mark's name in matplotlib."""
        return MARKS[self.place % len(MARKS)][1]

    @property
    def classes(self) -> str:
        """The classes of its elements in the page."""
        agent = self.agent if self.agent in AGENTS else "other"
        return f"agent-{agent} line-{self.place % len(DASHES)}"

    @property
    def mark(self) -> str:
        """The mark's name in the page."""
        return MARKS[self.place % len(MARKS)][0]


class RuleLook(NamedTuple):
    """How a rule is drawn that a report looks at as at a run; as `RunLook`."""

    name: str

    @property
    def colour(self) -> str:
        return LOOKS[self.name]["color"]

    @property
    def line(self) -> dict[str, Any]:
        return LOOKS[self.name]

    @property
    def marker(self) -> str:
        return "D"

    @property
    def classes(self) -> str:
        return self.name

    @property
    def mark(self) -> str:
        return "square"


def agent_colour(agent: str) -> str:
    """Return an agent's colour on white."""
    return AGENTS.get(agent, OTHER)[0]


def run_looks(runs: Iterable[tuple[str, str]]) -> dict[str, RunLook]:
    """Return each run's look, by its name, from names and agents in any order."""
    looks: dict[str, RunLook] = {}
    for name, agent in sorted(runs):
        place = sum(look.agent == agent for look in looks.values())
        looks[name] = RunLook(agent, place)
    return looks


def style() -> str:
    """Return the page's rules for these colours and lines, in both schemes."""
    colours = {
        **{f"agent-{agent}": pair for agent, pair in AGENTS.items()},
        "agent-other": OTHER,
        **FLOWS,
    }
    rules = [
        f":root {{ {''.join(f'--{name}: {pair[0]}; ' for name, pair in colours.items())}}}",
        "@media screen and (prefers-color-scheme: dark) { :root { "
        + "".join(f"--{name}: {pair[1]}; " for name, pair in colours.items())
        + "} }",
        *(f".{name} {{ --ink: var(--{name}); }}" for name in colours),
        *(f".{name} {{ fill: {colour}; }}" for name, colour in HEAT.items()),
        *(
            f".line.line-{i} {{ stroke-dasharray: {' '.join(str(2 * d) for d in dashes)}; }}"
            for i, dashes in enumerate(DASHES)
            if dashes
        ),
    ]
    return "\n".join(rules) + "\n"
