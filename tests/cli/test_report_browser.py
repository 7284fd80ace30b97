"""The report in headless Chromium: it opens, draws, reacts, fetches nothing, fits the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, made, place  # noqa: F401  (fixtures)

CHARTS = "return [...document.querySelectorAll('.chart')]"
PATHS = (
    "return [...document.querySelectorAll('[data-chart=explorer]')[0].querySelectorAll('svg path')]"
    ".map(path => path.getAttribute('d'))"
)


@pytest.fixture
def page(chrome: Any, made: Any) -> Any:  # noqa: F811
    """Open the report at the width of a desk, in light colours; no word on the console after."""
    show(chrome, made.place, 1200)
    yield chrome
    assert chrome.get_log("browser") == []


def show(chrome: Any, place: Path, width: int, scheme: str = "light") -> None:  # noqa: F811
    chrome.get_log("performance")
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    chrome.get((place / "report.html").as_uri())


def choose(page: Any, chart: str, select: int, value: str) -> None:
    page.execute_script(
        "const select = document.querySelector(`[data-chart=${arguments[0]}]`)"
        ".querySelectorAll('select')[arguments[1]];"
        "select.value = arguments[2]; select.dispatchEvent(new Event('change'));",
        *(chart, select, value),
    )


def test_every_chart_is_drawn_and_nothing_is_fetched(page: Any) -> None:
    messages = [json.loads(row["message"])["message"] for row in page.get_log("performance")]
    fetched = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert len(fetched) == 1, fetched
    assert fetched[0].endswith("/report.html")
    drawn = page.execute_script(
        CHARTS + ".map(chart => [chart.dataset.chart, chart.querySelectorAll('svg').length])"
    )
    kinds = ["intervals", "learning", "days", "explorer", "heat"]
    assert [kind for kind, _ in drawn] == [*kinds * 2, "sessions"]
    assert all(count > 0 for _, count in drawn)
    bad = "return document.querySelector('main').innerHTML.match(/NaN|undefined|Infinity/g)"
    assert page.execute_script(bad) is None


def test_a_strangers_text_runs_nothing(page: Any) -> None:
    assert page.execute_script("return window.pwned") is None
    assert page.execute_script("return document.images.length") == 0
    titles = "return [...document.querySelectorAll('h4')].map(title => title.textContent)"
    assert any(title.startswith(HOSTILE) for title in page.execute_script(titles))


def test_the_day_explorer_changes_the_figure(page: Any) -> None:
    seen = [page.execute_script(PATHS)]
    for select, value in ((0, "0"), (0, "2"), (1, "2"), (1, "4")):
        choose(page, "explorer", select, value)
        seen.append(page.execute_script(PATHS))
    assert len({json.dumps(paths) for paths in seen}) == len(seen)
    told = "return document.querySelector('[data-chart=explorer] output').textContent"
    whole = page.execute_script(told)
    assert whole.startswith("2025-03-05: RBC B ")
    page.execute_script(
        "const svg = document.querySelector('[data-chart=explorer] .panel > svg');"
        "const box = svg.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove',"
        " {clientX: box.left + box.width / 2, clientY: box.top + 20, bubbles: true}));"
    )
    assert page.execute_script(told).startswith(("11:30", "11:45", "12:00", "12:15", "12:30"))


def test_a_click_on_a_day_opens_it(page: Any) -> None:
    page.execute_script(
        "document.querySelectorAll('[data-chart=days] .hit')[2]"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true}));"
    )
    chosen = "return document.querySelector('[data-chart=explorer] select').value"
    assert page.execute_script(chosen) == "2"


def test_other_units_draw_other_figures(page: Any) -> None:
    for chart, value in (("learning", "kg"), ("days", "rule"), ("heat", "ev_kw")):
        drawn = f"return document.querySelector('[data-chart={chart}]').innerHTML"
        before = page.execute_script(drawn)
        choose(page, chart, 0, value)
        assert page.execute_script(drawn) != before


@pytest.mark.parametrize("width", [390, 768, 1200])
def test_light_and_dark_on_every_screen(page: Any, made: Any, width: int) -> None:  # noqa: F811
    brightness = []
    for scheme in ("light", "dark"):
        show(page, made.place, width, scheme)
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.execute_script(wide) == 0
        out = (
            "return [...document.querySelectorAll('svg text')].filter(text => {"
            " const own = text.getBoundingClientRect();"
            " const all = text.ownerSVGElement.getBoundingClientRect();"
            " return own.width && (own.left < all.left - 1 || own.right > all.right + 1);"
            "}).map(text => text.textContent)"
        )
        assert page.execute_script(out) == []
        colours = (
            "const look = getComputedStyle(document.body); return [look.color, look.background"
        )
        for colour in page.execute_script(colours + "Color]"):
            brightness.append(sum(int(n) for n in colour[4:-1].split(",")))
    text, ground, dark_text, dark_ground = brightness
    assert text + 400 < ground
    assert dark_ground + 400 < dark_text
