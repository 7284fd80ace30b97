"""The house: which part may import which."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from xml.etree import ElementTree

import pytest

import co2lightning

HOUSE = Path(co2lightning.__file__).parent
# From the ground up; a part imports from below it and from its own folder.
FLOORS = (
    ("terminal",),
    ("errors",),
    ("places", "metrics"),
    ("site", "runs"),
    ("control",),
    ("sim",),
    ("learn",),
    ("agents",),
    ("settings",),
    ("report",),
    ("train",),
    ("commands", "sites"),
    ("cli", "__init__"),
    ("__main__",),
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and module below the package of every import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "co2lightning":
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("co2lightning."):
            yield node.lineno, str(node.module).removeprefix("co2lightning.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("co2lightning"):
                    yield node.lineno, alias.name.removeprefix("co2lightning.")


def test_imports_only_go_down() -> None:
    up: list[str] = []
    for path in sorted(HOUSE.rglob("*.py")):
        name = path.relative_to(HOUSE)
        part = name.parts[0].removesuffix(".py")
        up += [
            f"{name}:{line} imports {module}"
            for line, module in imports(path)
            if module != "__version__"
            and (target := module.split(".")[0]) != part
            and FLOOR[target] >= FLOOR[part]
        ]
    assert not up


def test_imports_make_no_circle() -> None:
    files = {
        path.relative_to(HOUSE).with_suffix("").as_posix().replace("/", "."): path
        for path in HOUSE.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {
        name: {module for _, module in imports(path) if module in files}
        for name, path in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_the_picture_shows_every_file() -> None:
    """`make picture` draws it anew."""
    docs = HOUSE.parents[1] / "docs"
    svg = ElementTree.parse(docs / "architecture.svg").getroot()
    words = {word for element in svg.iter() if element.text for word in element.text.split()}
    folders = {path.parent.name + "/" for path in HOUSE.glob("*/*.py")}
    files = {path.stem for path in HOUSE.rglob("*.py") if not path.stem.startswith("__")}
    assert folders | files <= words
    assert {word for word in words if word.endswith("/") and ":" not in word} == folders
