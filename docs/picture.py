"""Draw the house: its folders, their files, and which imports which.

    python docs/picture.py    # or make picture

Reads the imports of src/co2lightning and writes docs/architecture.svg. Each floor stands on those
below it; a line leads from a folder down to one that it imports from, behind what lies between.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HOUSE = Path(__file__).parents[1] / "src" / "co2lightning"
PICTURE = Path(__file__).with_name("architecture.svg")
FLOORS = (
    ("commands", "sites"),
    ("train",),
    ("report",),
    ("settings",),
    ("agents",),
    ("learn",),
    ("sim",),
    ("control",),
    ("site", "runs"),
)
WIDTH, HEIGHT, GAP = 10.0, 0.8, 0.4  # of the house, of a floor, between two floors


def files_of(folder: str) -> list[str]:
    """Return the names of a folder's Python files, without `__init__`."""
    return sorted(path.stem for path in (HOUSE / folder).glob("*.py") if path.stem != "__init__")


def imports_of(folder: str) -> set[str]:
    """Return the other folders that the files of a folder import from."""
    found: set[str] = set()
    for path in (HOUSE / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.startswith("co2lightning."):
                found.add(module.split(".")[1])
    return found - {folder}


def places() -> dict[str, tuple[float, float, float]]:
    """Return of each folder where its box stands: left edge, lower edge, width."""
    found: dict[str, tuple[float, float, float]] = {}
    for number, floor in enumerate(reversed(FLOORS)):
        width = (WIDTH - GAP * (len(floor) - 1)) / len(floor)
        for column, folder in enumerate(floor):
            found[folder] = (column * (width + GAP), (number + 1) * (HEIGHT + GAP), width)
    return found


def draw_box(axes: Axes, box: tuple[float, float, float], title: str, files: list[str]) -> None:
    """Draw one folder, or the ground, with the names of its files."""
    left, low, width = box
    look = {"boxstyle": "round,pad=0,rounding_size=0.1", "facecolor": "#eef3f8"}
    axes.add_patch(FancyBboxPatch((left, low), width, HEIGHT, edgecolor="#456", **look))
    axes.text(left + 0.15, low + HEIGHT - 0.12, title, weight="bold", va="top", size=11)
    names = textwrap.fill(" · ".join(files), int(width * 12))
    axes.text(left + 0.15, low + HEIGHT - 0.4, names, va="top", size=8.5)


def draw() -> Figure:
    """Return the picture of the house as it stands."""
    boxes = places()
    figure = Figure(figsize=(9, 11), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    for folder, box in boxes.items():
        draw_box(axes, box, f"{folder}/", files_of(folder))
    ground = sorted(path.stem for path in HOUSE.glob("*.py") if not path.stem.startswith("__"))
    draw_box(axes, (0.0, 0.0, WIDTH), "on the ground, for all; cli starts a command", ground)
    for folder, (left, low, width) in boxes.items():
        below = sorted(imports_of(folder) & boxes.keys(), key=lambda name: boxes[name][0])
        for number, target in enumerate(below, 1):
            start = left + width * number / (len(below) + 1), low
            to_left, to_low, to_width = boxes[target]
            share = min(max((start[0] - to_left) / to_width, 0.05), 0.95)
            end = to_left + to_width * share, to_low + HEIGHT
            axes.add_patch(
                FancyArrowPatch(
                    start, end, arrowstyle="-|>", mutation_scale=9, color="#8a2f2f88", zorder=0
                )
            )
    axes.set_xlim(-0.1, WIDTH + 0.1)
    axes.set_ylim(-0.1, (len(FLOORS) + 1) * (HEIGHT + GAP))
    return figure


def main() -> None:
    """Write the picture."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "co2lightning"}
    draw().savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
