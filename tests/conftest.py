"""What the tests of the command share: a working directory, the command in this process."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

COMMANDS = (
    *("fit", "fit-all", "test", "report", "history", "verify", "predict", "export"),
    "site",
)

# An agent trained for a moment: what is tested is what happens around the learning.
TINY: dict[str, list[str]] = {
    "A2C": ["--model.n_steps", "48", "--model.hidden", "[8]"],
    "SAC": [
        *("--model.learning_starts", "384", "--model.gradient_steps", "1", "--model.train_freq"),
        *("24", "--model.batch_size", "16", "--model.buffer_size", "1000", "--model.hidden", "[8]"),
    ],
    "APG": ["--model.hidden", "[8]"],
    "PPO": ["--model.n_epochs", "2", "--model.batch_size", "192", "--model.hidden", "[8]"],
}


class Outcome(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


def tree(place: Path) -> dict[str, str]:
    """Return every file and directory below `place` with its content's hash."""
    found: dict[str, str] = {}
    for path in sorted(place.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        found[str(path.relative_to(place))] = content
    return found


def pruned(run: Any) -> list[int]:
    """Return the episodes whose files `keep_last` or somebody deleted."""
    rows = run.load_history()["checkpoints"]
    return [number for number, row in enumerate(rows, 1) if row.get("pruned")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of resuming, whose warm process and runs one worker then makes alone."""
    items.sort(key=lambda item: item.path.parent.name != "resume")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], place: Path) -> Callable[..., Outcome]:
    """Return the command line as a function: words in, exit code and output out."""
    from co2lightning.cli import main

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def fit(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Return `co2lightning fit` on an agent's own recipe, tiny; it must succeed."""

    def run(agent: str, *words: str) -> Outcome:
        outcome = command("fit", "--model", agent, "--env.num_envs", "4", *TINY[agent], *words)
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        return outcome

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """Return the variables for a command in a process of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    """Start Chromium without a display; skip where there is none, except in CI."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        why = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a site `village` and a run PPO of two episodes on it."""
    from co2lightning.train.fit import run_fit
    from small_site import write_site

    place = tmp_path_factory.mktemp("village")
    write_site(place / "village")
    flags: dict[str, Any] = {
        "episodes": 2,
        "env.site": str(place / "village"),
        "env.num_envs": 4,
        "checkpoints.dir": str(place / "checkpoints"),
        "logs.dir": str(place / "lightning_logs"),
    }
    run_fit(flags, agent="PPO", echo=lambda line: None)
    return place


@pytest.fixture(scope="session")
def priced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a site `shop` that has prices, and runs on it for cost, CO2 and both."""
    from co2lightning.train.fit import run_fit
    from small_site import write_site

    place = tmp_path_factory.mktemp("priced")
    write_site(place / "shop", currency="EUR")
    for name, objective in (
        ("money", "cost"),
        ("air", "co2"),
        ("both", {"co2": 1.0, "cost": 0.5}),
    ):
        flags: dict[str, Any] = {
            "episodes": 1,
            "env.site": str(place / "shop"),
            "env.num_envs": 2,
            "env.objective": objective,
            "name": name,
            "checkpoints.dir": str(place / "checkpoints"),
            "logs.dir": str(place / "lightning_logs"),
        }
        run_fit(flags, agent="PPO", echo=lambda line: None)
    return place


@pytest.fixture
def inside(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in that directory."""
    monkeypatch.chdir(trained)
