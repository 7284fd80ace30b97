"""TensorBoard's own server and a browser: one curve for each agent, charts, figures, no overlap."""

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY

pytestmark = pytest.mark.slow
AGENTS = ("A2C", "PPO", "SAC")
REFERENCES = [
    f"references/iquitos held-out days/{name}"
    for name in ("cheap", "optimum", "rbc_a", "rbc_b", "rbc_c", "uncontrolled")
]
# TensorBoard's pages nest shadow trees; a selector sees only one of them.
DEEP = """
const found = [];
(function walk(node) {
  for (const element of node.querySelectorAll('*')) {
    if (element.matches(arguments_[0])) found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  }
})(document);
return found"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three agents in two sessions each, and test them."""
    from co2lightning.cli import main

    place = tmp_path_factory.mktemp("tensorboard")
    dirs = (f"--checkpoints.dir={place}/checkpoints", f"--logs.dir={place}/lightning_logs")
    for agent in AGENTS:
        fit = ["fit", "--model", agent, "--env.num_envs", "4", *TINY[agent], *dirs]
        fit += ["--figures_every", "2"]
        assert main([*fit, "--episodes", "3"]) == 0
        # Back to episode 2, as after a kill: TensorBoard must forget the third.
        Path(place, f"checkpoints/{agent}/episode_0003.pt").unlink()
        assert main([*fit, "--episodes", "4", "--ckpt_path", "last"]) == 0
        assert main(["test", agent, *dirs]) == 0
    return place / "lightning_logs"


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[str]:
    """Serve the logs as README says and yield the address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", "0"]
    with open(logs.parent / "server.txt", "w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            yield _address(process, logs.parent / "server.txt")
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], said: Path) -> str:
    """Return the server's address once it knows all runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        words = said.read_text().split()
        address = next((word.rstrip("/") for word in words if word.startswith("http://")), None)
        if address and set(REFERENCES) <= set(_get(address, "scalars/tags")):
            return address
        time.sleep(0.3)
    raise AssertionError(said.read_text())


def _get(address: str, path: str, **query: str) -> Any:
    url = f"{address}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def test_the_server_has_one_point_for_each_episode(server: str) -> None:
    tags = _get(server, "scalars/tags")
    assert sorted(tags) == sorted([*AGENTS, *(f"{agent}/test" for agent in AGENTS), *REFERENCES])
    for agent in AGENTS:
        for tag in tags[agent]:
            points = _get(server, "scalars/scalars", run=agent, tag=tag)
            steps = [step for _, step, _ in points]
            first = steps[0]  # SAC's losses begin when its buffer holds enough
            assert steps == list(range(first, 7)), (agent, tag)
            assert first == 1 or agent == "SAC"
        (tested,) = _get(server, "scalars/scalars", run=f"{agent}/test", tag="test/co2_kg")
        assert tested[1] == 6
        images = _get(server, "images/images", run=agent, tag="site/dispatch", sample="0")
        assert [image["step"] for image in images] == [2, 4, 6]
    for reference in REFERENCES:
        points = _get(server, "scalars/scalars", run=reference, tag="site/co2_kg")
        assert [step for _, step, _ in points] == [1, 6]
        assert points[0][2] == points[1][2]


def test_the_layout_of_three_runs_is_one(server: str) -> None:
    categories = _get(server, "custom_scalars/layout")["category"]
    titles = [chart["title"] for category in categories for chart in category["chart"]]
    assert len(categories) == 2
    assert len(titles) == len(set(titles))
    (co2,) = [c for c in categories[0]["chart"] if c["title"] == "CO2, kg a day"]
    (tag,) = co2["multiline"]["tag"]
    for run in (*AGENTS, *REFERENCES):
        found = _get(server, "custom_scalars/scalars", run=run, tag=tag)
        assert found["regex_valid"]
        assert list(found["tag_to_events"]) == ["site/co2_kg"]


@pytest.fixture
def see(chrome: Any, server: str) -> Callable[..., list[Any]]:
    """Open a page of TensorBoard; return what `script` makes of the elements of a selector."""

    chrome.set_window_size(1500, 2600)

    def see(page: str, selector: str, script: str, ready: Callable[[list[Any]], bool]) -> list[Any]:
        chrome.get("about:blank")
        chrome.get(f"{server}/#{page}")
        found: list[Any] = []
        for _ in range(100):
            code = f"const arguments_ = arguments;{DEEP}.map({script});"
            found = chrome.execute_script(code, selector)
            if ready(found):
                return found
            time.sleep(0.3)
        raise AssertionError(f"{page}: {found}")

    return see


def test_the_curves_are_there_one_for_each_agent(see: Callable[..., list[Any]]) -> None:
    # The tables below the charts: a row for each curve, with the episode it has reached.
    def ready(tables: list[list[str]]) -> bool:
        wanted = {(run, "6") for run in (*AGENTS, *REFERENCES)}
        return any(
            {(run, "6") for run in AGENTS} <= _rows(table) and _rows(table) == wanted
            for table in tables
        )

    text = "e => e.innerText.split(/\\s*\\n\\s*/)"
    see("timeseries", "scalar-card-data-table", text, ready)


def _rows(table: list[str]) -> set[tuple[str, str]]:
    """Return run and step of the rows: run, smoothed, value, step, relative time."""
    cells = [cell for cell in table if cell]
    runs = [i for i, cell in enumerate(cells) if cell in (*AGENTS, *REFERENCES)]
    return {(cells[i], cells[i + 3]) for i in runs if i + 3 < len(cells)}


def test_agents_stand_side_by_side(see: Callable[..., list[Any]]) -> None:
    def ready(cards: list[str]) -> bool:  # three agents, three rules, the optimum in the CO2 charts
        return len(cards) == 7 and all("Matches (7)" in card for card in (cards[0], cards[5]))

    text = "e => e.shadowRoot.textContent.replace(/\\s+/g, ' ')"
    see("custom_scalars", "tf-custom-scalar-multi-line-chart-card", text, ready)


def test_the_day_is_drawn_for_each_agent(see: Callable[..., list[Any]]) -> None:
    size = "e => [e.naturalWidth, e.naturalHeight]"
    inside = "tf-image-loader img, #main-image-container img"
    see("images", inside, size, lambda images: images == [[810, 720]] * 3)
