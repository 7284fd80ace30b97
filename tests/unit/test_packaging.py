"""What is shipped agrees with itself: versions, bounds, recipes, README, public names."""

import ast
import importlib.metadata
import json
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import co2lightning
from co2lightning import cli
from co2lightning.agents import AGENTS
from co2lightning.commands import fit_all
from co2lightning.settings import parser
from co2lightning.settings.recipe import read_recipe
from conftest import COMMANDS

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPANISH = (ROOT / "README.es.md").read_text(encoding="utf-8")
LISTS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
REQUIREMENTS = [Requirement(line) for lines in LISTS for line in lines]


def constraints(file: str = "constraints.txt") -> dict[str, Requirement]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


CONSTRAINTS = constraints()


def pinned(name: str) -> Version:
    (specifier,) = CONSTRAINTS[canonicalize_name(name)].specifier
    return Version(specifier.version)


def code_blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def readme_commands(page: str = README) -> list[list[str]]:
    """Return the words of every command line of a page, comments taken off."""
    text = "".join(code_blocks("bash", page)).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def readme_arguments(program: str) -> list[list[str]]:
    """Return the arguments of every call of a program in README.md and README.es.md, each once."""
    commands = [*readme_commands(), *readme_commands(SPANISH)]
    return [
        list(words) for words in dict.fromkeys(tuple(c[1:]) for c in commands if c[0] == program)
    ]


def test_version_is_the_same_everywhere() -> None:
    assert co2lightning.__version__ == PROJECT["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[({re.escape(PROJECT['version'])}|Unreleased)\]", changelog, re.M)


def test_constraints_are_exact_and_for_every_platform() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    for name, requirement in CONSTRAINTS.items():
        assert [s.operator for s in requirement.specifier] == ["=="], name
        assert "+" not in str(requirement), name
        assert not name.startswith(("nvidia", "triton", "cuda")), name


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_constraints_satisfy_the_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pinned(requirement.name))


def test_the_lowest_versions_that_are_tested_are_the_bounds() -> None:
    """But for what no test imports: the linter, the type checker, what only benchmarks need."""
    lowest = constraints("constraints-lowest.txt")
    others = {"tzdata", "pyright", "ruff", "stable-baselines3", "sbx-rl"}
    bounds: dict[str, set[Version]] = {}
    for requirement in [*REQUIREMENTS, *map(Requirement, PYPROJECT["build-system"]["requires"])]:
        (low,) = [s.version for s in requirement.specifier if s.operator == ">="]
        bounds.setdefault(canonicalize_name(requirement.name), set()).add(Version(low))
    assert lowest.pop("pyparsing")
    assert bounds.keys() == lowest.keys() | others
    for name, requirement in lowest.items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert bounds[name] == {Version(pin.version)}, name


def test_constraints_name_all_that_gets_installed() -> None:
    """A dependency's dependency that is not pinned would differ from one day to the next."""
    missing: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    # What only the benchmarks need is pinned too, but not installed for the tests.
    bench = {Requirement(line) for line in PROJECT["optional-dependencies"]["bench"]}
    queue = [r for r in REQUIREMENTS if r not in bench and "platform" not in str(r.marker)]
    while queue:
        requirement = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        if key[0] not in CONSTRAINTS:
            missing.add(key[0])
            continue
        for line in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            of_a_platform = "platform" in str(needed.marker)
            if not of_a_platform and (
                needed.marker is None or any(needed.marker.evaluate(e) for e in extras)
            ):
                queue.append(needed)
    assert not missing


def test_the_versions_we_rely_on() -> None:
    assert pinned("torch") == Version("2.13.0")
    (lightning,) = [r for r in REQUIREMENTS if r.name == "lightning"]
    assert set(str(lightning.specifier).split(",")) == {">=2.6.6", "<2.7"}
    for malicious in ("2.6.2", "2.6.3"):
        assert not lightning.specifier.contains(malicious)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_is_valid(recipe: Path) -> None:
    agent, settings = read_recipe(str(recipe))
    assert recipe.stem.split("-")[0] == agent.lower()
    parser.check_settings(settings, agent, recipe.name)


def test_every_agent_has_a_recipe() -> None:
    assert {agent.lower() for agent in AGENTS} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("arguments", readme_arguments("co2lightning"), ids=" ".join)
def test_readme_command_exists(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments[0].startswith("-"):
        assert arguments[0] in ("--help", "--version")
        return
    assert arguments[0] in COMMANDS
    if arguments[0] == "fit" and "--help" not in arguments:
        given, rest = parser.split_arguments(arguments[1:])
        agent = given.get("agent", "PPO")
        if "config" in given:
            agent, settings = read_recipe(given["config"])
            parser.check_settings(settings, agent, given["config"])
        parser.parse_flags(rest, agent)
    elif arguments[0] == "fit-all":
        options, rest = fit_all.parse(arguments[1:])
        for agent in options.agents:
            parser.parse_flags(rest, agent)
    elif arguments[0] != "fit":  # where nothing was trained yet they get no further than this
        monkeypatch.chdir(tmp_path)
        code = cli.main(arguments)
        said = "".join(capsys.readouterr())
        ends = r"no episode in checkpoints|no such run in checkpoints|[Nn]o runs|no such folder"
        assert re.search(ends, said)
        assert code in (0, 2)


def test_readme_shows_the_two_commands_first() -> None:
    assert [words for words in readme_commands() if words[0] == "make"][:2] == [
        ["make", "train"],
        ["make", "test"],
    ]


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in readme_arguments("make"):
        assert re.search(rf"^{re.escape(words[0])}:", makefile, re.MULTILINE), words


def test_after_make_train_one_is_told_how_to_go_on() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    (train,) = re.findall(r"^train:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    activate = "source .venv/bin/activate"
    assert activate in train.splitlines()[-1]
    for page in (README, SPANISH):
        begin = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[0]
        assert re.search(rf"^make train.*^{activate}", begin, re.MULTILINE | re.DOTALL)


def test_scripts_of_the_readme_exist() -> None:
    for words in readme_arguments("python"):
        assert (ROOT / words[0]).is_file() or words[0].startswith("-"), words


@pytest.mark.parametrize("block", [*code_blocks("python"), *code_blocks("python", SPANISH)])
def test_readme_python_names_exist(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "co2lightning" or hasattr(co2lightning, node.attr), node.attr


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda p: p.name
)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sources = [source.as_posix() for source in SOURCES]
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        assert (ROOT / path).exists() or any(s.endswith(f"/{path}") for s in sources), path
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_two_pages_lead_to_each_other_and_show_the_same_first_steps() -> None:
    assert "](README.es.md)" in README
    assert "](README.md)" in SPANISH
    assert (
        readme_commands(SPANISH)[:2]
        == readme_commands()[:2]
        == [["make", "train"], ["make", "test"]]
    )
    shown = [words[1:] for words in readme_commands(SPANISH) if words[0] == "co2lightning"]
    for words in readme_commands():
        if words[0] == "co2lightning" and words[1] in ("test", "history", "verify", "predict"):
            assert any(words[1] == other[0] for other in shown), words


def test_the_readmes_results_are_the_committed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is what the command beside it prints of them; README.es.md has its references."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = json.loads((ROOT / "docs/sites.json").read_text(encoding="utf-8"))
    (shown,) = [words for words in readme_commands() if "benchmarks/sites.py" in words]
    places = shown[shown.index("--sites") + 1].split(",")
    shown[shown.index("--sites") + 1] = ",".join(place.rpartition("/")[2] for place in places)
    assert results["command"].partition(" --jobs")[0] in " ".join(shown)
    assert import_module("sites").table(results) in README
    references = results["sites"]["iquitos"]["references"]
    kg = {name: f"{row['a_day']:.1f}" for name, row in references.items()}
    said = (
        "sin control {uncontrolled}, RBC A {rbc_a}, RBC B {rbc_b}, RBC C {rbc_c}, óptimo {optimum}"
    )
    assert said.format(**kg) in SPANISH
    closed = {name: f"{100 * references[name]['gap_closed']:.1f} %" for name in ("rbc_b", "rbc_c")}
    assert "closes {rbc_b} of the gap on `iquitos`, RBC C {rbc_c}".format(**closed) in README


def test_the_functions_that_the_equations_name_exist() -> None:
    text = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    sources = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    found = re.findall(r"`([A-Za-z]\w*)\.([A-Za-z]\w*)`", text)
    assert len(found) > 20
    for owner, name in found:
        if owner == "env":  # a setting
            continue
        home = [s for p, s in sources.items() if p.stem == owner or f"\nclass {owner}" in s]
        assert re.search(rf"(def|class) {name}\b|^    {name}: ", "".join(home), re.M), (owner, name)


@pytest.mark.parametrize("file", ["stable-baselines", "stable-baselines-sac"])
def test_the_learning_logs_tables_beside_another_library_are_the_committed_ones(file: str) -> None:
    page = (ROOT / "docs/learning.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / f"docs/{file}.json").read_text(encoding="utf-8"))
    assert results["command"] in page
    for agent, entry in results["pendulum"].items():
        for library in ("Stable-Baselines3", "co2lightning"):
            steps = [run["steps"] for run in entry[library]]
            seeds = ", ".join(f"{n:,}" for n in steps)
            assert f"| {agent} | {library} | {statistics.median(steps):,} | {seeds} |" in page


def homes() -> dict[str, str]:
    """Return each public name and its module, as type checkers see them."""
    tree = ast.parse((ROOT / "src/co2lightning/__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.asname: (node.module or "").removeprefix("co2lightning.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("name", sorted(homes()))
def test_public_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(co2lightning), name, raising=False)  # as before its first use
    assert name in dir(co2lightning)
    value = getattr(co2lightning, name)
    assert callable(value)
    assert value.__name__ == name
    assert vars(co2lightning)[name] is value


def test_what_is_no_public_name_is_named() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = co2lightning.no_such_name


def test_no_module_hides_a_public_name() -> None:
    """Importing `co2lightning.x` would put the module where the public name x was."""
    modules = {path.stem for path in (ROOT / "src/co2lightning").iterdir()}
    assert not modules & set(homes())


def test_public_names_are_what_type_checkers_take_them_for() -> None:
    for name, home in homes().items():
        module = import_module(f"co2lightning.{home}")
        assert getattr(co2lightning, name) is getattr(module, name)


def test_import_is_cheap_and_registers_the_environment() -> None:
    code = (
        "import sys, co2lightning, gymnasium\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
        "spec = gymnasium.spec('co2lightning/ChargingSite-v0')\n"
        "assert spec.entry_point == 'co2lightning.sim.gymnasium:ChargingSiteEnv'\n"
        "assert spec.vector_entry_point == 'co2lightning.sim.gymnasium:ChargingSiteVectorEnv'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_no_code_comes_out_of_a_file(path: Path) -> None:
    """Nothing unpickles: whoever sends a checkpoint cannot run code here."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        else:
            imported = []
        unsafe = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
        assert not unsafe & {name.split(".")[0] for name in imported}
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in ("weights_only", "allow_pickle"):
                    value = getattr(keyword.value, "value", None)
                    assert value is not (keyword.arg == "allow_pickle")


def test_the_package_is_typed() -> None:
    assert (ROOT / "src/co2lightning/py.typed").is_file()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_what_training_writes_stays_out_of_git() -> None:
    written = [
        "checkpoints/PPO/episode_0001.pt",
        "checkpoints/PPO/history.json",
        "checkpoints/.PPO.lock",
        "checkpoints/archive/PPO-20260101T000000Z/metadata.json",
        "lightning_logs/PPO/events.out.tfevents.1",
        "lightning_logs/.PPO.lock",
        ".venv/bin/python",
        "dist/co2lightning-0.1.0-py3-none-any.whl",
    ]
    kept = ["checkpoints/.gitkeep", "lightning_logs/.gitkeep", "configs/ppo.yaml"]
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *written, *kept],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ignored.stdout.splitlines() == written
