"""The built wheel works anywhere: recipes and sites come out of it, not out of the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command to its good end and return its standard output."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind: str, source: Path, output: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", output, cwd=source)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """An empty directory to train in."""
    directory = tmp_path / "empty"
    directory.mkdir()
    return directory


def check_trained(output: str, directory: Path) -> None:
    assert "Training PPO for 1 episode" in output
    assert sorted(path.name for path in directory.glob("checkpoints/PPO/*")) == [
        "episode_0001.pt",
        "history.json",
        "metadata.json",
        "start.pt",
    ]
    assert list(directory.glob("lightning_logs/PPO/events.out.tfevents.*"))


def test_wheel_holds_code_recipes_sites_and_licence_only(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name.removeprefix("co2lightning/") for name in names}
    assert {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= package
    for site in ("iquitos", "iquitos-flat"):
        files = ("site.yaml", "series.csv.gz", "sessions.csv.gz")
        assert {f"sites/{site}/{file}" for file in files} <= package
    assert {"py.typed", "cli.py"} <= package
    page = ("template.html", "report.css", "charts.js", "report.js")
    assert {f"report/{file}" for file in page} <= package
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"co2lightning"}
    assert not [name for name in names if name.endswith((".pyc", ".pt"))]


def test_source_distribution_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = build("wheel", source, tmp_path / "again")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_wheel_trains_in_an_empty_directory(wheel: Path, tmp_path: Path, empty: Path) -> None:
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    where = "import co2lightning; print(co2lightning.__file__)"
    found = run(sys.executable, "-c", where, cwd=empty, PYTHONPATH=str(target))
    assert Path(found.strip()).is_relative_to(target)
    fit = [sys.executable, "-m", "co2lightning", "fit", "--config", "ppo.yaml", "--episodes", "1"]
    check_trained(run(*fit, cwd=empty, PYTHONPATH=str(target)), empty)


@pytest.mark.slow
def test_wheel_trains_in_a_new_environment(wheel: Path, tmp_path: Path, empty: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    constraints = ROOT / "constraints.txt"
    pip = [programs / "python", "-m", "pip", "install", "--quiet"]
    run(*pip, "-c", constraints, wheel, cwd=empty)
    fit = [programs / "co2lightning", "fit", "--config", "ppo.yaml", "--episodes", "1"]
    check_trained(run(*fit, cwd=empty), empty)
