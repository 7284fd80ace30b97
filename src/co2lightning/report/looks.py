"""The colours and lines of all that is drawn: page, figures, TensorBoard, pictures of docs/.

A colour belongs to an agent, wherever and beside whatever it is drawn; runs of one agent differ by
their lines and marks. Okabe and Ito's colours, darkened for paper. Imports nothing.
"""

from collections import Counter
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


class Look(NamedTuple):
    """How a run or a rule is drawn."""

    colour: str  # on white
    line: dict[str, Any]  # colour and dashes, for matplotlib
    marker: str  # the mark's name in matplotlib
    mark: str  # in the page
    classes: str  # of its elements in the page


def agent_colour(agent: str) -> str:
    """Return an agent's colour on white."""
    return AGENTS.get(agent, OTHER)[0]


def run_looks(runs: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """Return each run's look, by its name, from names and agents in any order."""
    looks: dict[str, Look] = {}
    places = Counter[str]()
    for name, agent in sorted(runs):
        colour, number = agent_colour(agent), places[agent] % len(DASHES)
        line = {"color": colour, "ls": (0, DASHES[number]) if DASHES[number] else "-"}
        mark, marker = MARKS[places[agent] % len(MARKS)]
        classes = f"agent-{agent if agent in AGENTS else 'other'} line-{number}"
        looks[name] = Look(colour, line, marker, mark, classes)
        places[agent] += 1
    return looks


def rule_look(name: str) -> Look:
    """Return the look of a rule that a report looks at as at a run."""
    return Look(LOOKS[name]["color"], LOOKS[name], "D", "square", name)


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
