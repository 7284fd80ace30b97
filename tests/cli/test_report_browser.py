"""The report in headless Chromium: it opens, draws, reacts, fetches nothing, fits the screen."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, embedded, made, place  # noqa: F401  (fixtures)

from co2lightning.cli import main
from co2lightning.report.looks import AGENTS, HEAT
from co2lightning.sim.evaluate import TITLES
from conftest import TINY

REFERENCES = [title for name, title in TITLES.items() if not name.endswith("_true")]
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


def test_rules_without_runs_are_drawn(chrome: Any, place: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ["rbc_b", "cheap", "--env.site", str(place / "village")]
    assert main(["report", *words, "--output", str(tmp_path / "report.html")]) == 0
    show(chrome, tmp_path, 1200)
    drawn = {
        chart: chrome.execute_script(
            f"return document.querySelector('[data-chart={chart}]').querySelectorAll('svg').length"
        )
        for chart in ("intervals", "stretches", "explorer", "heat")
    }
    assert drawn["stretches"] >= 2
    assert drawn["heat"] >= 2
    assert all(drawn.values()), drawn
    assert not chrome.execute_script("return document.querySelectorAll('[data-chart=learning]')")
    choose(chrome, "explorer", 1, "0")
    assert chrome.get_log("browser") == []


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
    kinds = ["intervals", "learning", "stretches", "explorer", "heat"]
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
    assert whole.startswith("whole day 2025-03-05")
    assert "RBC B" in whole
    page.execute_script(
        "const svg = document.querySelector('[data-chart=explorer] .panel > svg');"
        "const box = svg.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove',"
        " {clientX: box.left + box.width / 2, clientY: box.top + 20, bubbles: true}));"
    )
    times = tuple(f"time {clock}" for clock in ("11:30", "11:45", "12:00", "12:15", "12:30"))
    assert page.execute_script(told).startswith(times)


@pytest.mark.parametrize("width", [400, 1200])
def test_the_day_explorer_stays_where_it_is(page: Any, made: Any, width: int) -> None:  # noqa: F811
    """No choice of day or controller, nor the pointer, moves anything under the pointer."""
    show(page, made.place, width)
    page.execute_script(
        "document.querySelector('[data-chart=explorer] .panel > svg').scrollIntoView()"
    )
    places = (
        "return [document.documentElement.scrollHeight, ...[...document.querySelectorAll("
        "'[data-chart=explorer] :is(.panel, .controls, select)')].map(one => {"
        " const box = one.getBoundingClientRect();"
        " return [box.left, box.top, box.width, box.height]; })]"
    )
    before = page.execute_script(places)
    for day in range(3):
        for policy in range(6):
            choose(page, "explorer", 0, str(day))
            choose(page, "explorer", 1, str(policy))
            assert page.execute_script(places) == before, (day, policy)
            page.execute_script(
                "for (const svg of document.querySelectorAll('[data-chart=explorer] .panel > svg'))"
                " { const box = svg.getBoundingClientRect();"
                " svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left +"
                " box.width * 0.7, clientY: box.top + 20, bubbles: true})); }"
            )
            assert page.execute_script(places) == before, (day, policy)


def test_a_reference_beside_the_run(page: Any) -> None:
    """Whatever controller is chosen, the run that was chosen last keeps its curves."""
    names = page.execute_script(
        "return [...document.querySelectorAll('[data-chart=explorer] select')[1].options]"
        ".map(option => option.textContent)"
    )
    drawn = (
        "return [...document.querySelector('[data-chart=explorer]').querySelectorAll("
        "'.panel:nth-of-type(2) > svg .line')].map(line => line.getAttribute('class'))"
    )
    assert names[-len(REFERENCES) :] == REFERENCES
    for chosen in range(len(names)):
        choose(page, "explorer", 1, str(chosen))
        lines = page.execute_script(drawn)
        assert sum("agent-PPO" in line for line in lines) == 1, (names[chosen], lines)
        assert any("optimum" in line for line in lines)


def test_a_run_has_its_agents_colour_everywhere(page: Any, made: Any) -> None:  # noqa: F811
    """Runs of one agent differ by their line and mark."""
    drawn = (
        "return [...document.querySelectorAll('[data-chart=' + arguments[0] + ']')].map(chart =>"
        " [...chart.querySelectorAll(arguments[1])].filter(one => one.matches('[class*=agent-]'))"
        ".map(one => { const look = getComputedStyle(one); return one.matches('.line')"
        " ? [look.stroke, look.strokeDasharray] : [look.fill, one.getAttribute('d').match("
        "/[a-z]/g).join('')]; }))"
    )
    agents = [[run["look"] for run in site["runs"]] for site in made.data["sites"]]
    assert sorted(map(len, agents)) == [1, 2]
    for number, scheme in enumerate(("light", "dark")):
        show(page, made.place, 1200, scheme)
        for chart, what in (
            ("learning", "svg .line"),
            ("stretches", "svg .mark"),
            ("stretches", "li .mark"),
        ):
            for names, found in zip(agents, page.execute_script(drawn, chart, what), strict=True):
                agent = "A2C" if len(names) == 1 else "PPO"
                hexed = AGENTS[agent][number]
                rgb = f"rgb({', '.join(str(int(hexed[i : i + 2], 16)) for i in (1, 3, 5))})"
                assert {colour for colour, _ in found} == {rgb}, (chart, agent)
                assert len({form for _, form in found}) == len(names)


def test_no_mark_is_cut(page: Any) -> None:
    near = (
        "return [...document.querySelectorAll('.chart:is([data-chart=stretches],"
        " [data-chart=learning], [data-chart=intervals]) svg')].flatMap(svg => {"
        " const axis = svg.querySelector('.axis');"
        " if (!axis) return [];"
        " const low = axis.getBoundingClientRect().bottom, all = svg.getBoundingClientRect();"
        " return [...svg.querySelectorAll('.mark, .hollow')].map(mark => {"
        " const box = mark.getBoundingClientRect();"
        " return Math.min(low - box.bottom, box.top - all.top, box.left - all.left,"
        " all.right - box.right); }); })"
    )
    for value in ("", "rule"):
        choose(page, "stretches", 0, value)
        found = page.execute_script(near)
        assert len(found) > 30
        assert min(found) > 2.0
        marks = page.execute_script(
            "return [...document.querySelectorAll('[data-chart=stretches] .panel > svg')].map(svg"
            " => [...svg.querySelectorAll('.mark, .hollow')].map(mark => mark.matches('.optimum')))"
        )
        for drawn in marks:
            assert drawn == [False, False, True] * 3, "the lowest one lies on top"


@pytest.mark.parametrize("width", [400, 700, 900, 1200])
def test_no_number_is_cut(page: Any, made: Any, width: int) -> None:  # noqa: F811
    """Every cell of every table is on the screen as it opens."""
    show(page, made.place, width)
    cut = (
        "const end = document.documentElement.clientWidth;"
        "return [...document.querySelectorAll('td')].filter(cell => {"
        " const range = document.createRange(); range.selectNodeContents(cell);"
        " return [...range.getClientRects()].some(box => box.left < 0 || box.right > end); })"
        ".map(cell => cell.textContent)"
    )
    assert page.execute_script(cut) == []
    wrapped = (
        "return [...document.querySelectorAll('td:not(.text)')].filter(cell => {"
        " const range = document.createRange(); range.selectNodeContents(cell);"
        " return range.getClientRects().length > 1; }).map(cell => cell.textContent)"
    )
    assert page.execute_script(wrapped) == []


def test_the_heat_maps_are_those_of_the_figures(page: Any, made: Any) -> None:  # noqa: F811
    """Same colours, same scale for all runs of a site, grey where a run never was."""
    colours = page.execute_script(
        "return ['minus', 'same', 'plus', 'never'].map(name => getComputedStyle("
        "document.querySelector(`[data-chart=heat] .${name}`)).fill)"
    )
    wanted = [HEAT[name] for name in ("minus", "same", "plus", "never")]
    rgb = [tuple(int(hexed[i : i + 2], 16) for i in (1, 3, 5)) for hexed in wanted]
    assert colours == [f"rgb({', '.join(map(str, three))})" for three in rgb]
    site = made.data["sites"][0]
    limit = site["heat_limit_kw"]["battery_kw"]
    cells = page.execute_script(
        "return [...document.querySelector('[data-chart=heat]').querySelectorAll("
        "'.panel rect[fill-opacity]')].map(cell => [cell.textContent,"
        " +cell.getAttribute('fill-opacity')])"
    )
    assert sum(len(run["heat"]["steps"]) for run in site["runs"]) > 0
    for text, opacity in cells:
        kw = float(text.split(": ")[1].split(" kW")[0].replace("\N{MINUS SIGN}", "-"))
        assert opacity == pytest.approx(min(1.0, abs(kw) / limit), abs=0.051 / limit + 1e-3)


def test_a_click_on_a_stretch_opens_it(page: Any) -> None:
    page.execute_script(
        "document.querySelectorAll('[data-chart=stretches] .hit')[2]"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true}));"
    )
    chosen = "return document.querySelector('[data-chart=explorer] select').value"
    assert page.execute_script(chosen) == "2"


def test_other_units_draw_other_figures(page: Any) -> None:
    for chart, value in (("learning", "kg"), ("stretches", "rule"), ("heat", "ev_kw")):
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


# --- weeks of whole hours, absent parts ----------------------------------------------------------

CHARGING = "sockets: [{name: moto, count: 3, max_kw: 4}]"
STORING = """battery: {capacity_kwh: 50, power_kw: 20, charge_efficiency: 0.9,
          discharge_efficiency: 0.9, soc_min: 0.1, soc_max: 0.9, start_soc_min: 0.3,
          start_soc_max: 0.7}
pv_kwp: 10"""


def write_weeks(directory: Path, equipment: str, **columns: float) -> Path:
    """A site of four weeks in steps of an hour; clocks skip an hour on the last day held out."""
    directory.mkdir()
    (directory / "site.yaml").write_text(
        f"name: weeks\nlatitude: 52\nlongitude: 13\naltitude_m: 0\ntimezone: Europe/Berlin\n"
        f"grid_kw: 100\nseed: 1\nday_start: 0\nheld_out: {{every_weeks: 3, first: 3}}\n"
        f"{equipment}\n"
    )
    begin = datetime(2025, 3, 9, 23, tzinfo=UTC)
    times = [begin + timedelta(hours=hour) for hour in range(28 * 24)]
    rows = [f"time,{','.join([*columns, 'carbon_kg_per_kwh'])}"]
    for i, time in enumerate(times):
        carbon = 0.3 + 0.2 * (i % 24 > 12)
        values = [value * (1 + i % 5) for value in columns.values()]
        rows.append(",".join([time.isoformat(), *(f"{value:g}" for value in [*values, carbon])]))
    (directory / "series.csv").write_text("\n".join(rows) + "\n")
    if equipment == CHARGING:
        sessions = ["session_id,socket_type,arrival,departure,energy_kwh,max_kw"]
        for day in range(27):
            arrival, departure = times[24 * day + 18], times[24 * day + 30]  # across midnight
            sessions.append(f"{day},moto,{arrival.isoformat()},{departure.isoformat()},12,4")
        (directory / "sessions.csv").write_text("\n".join(sessions) + "\n")
    return directory


@pytest.mark.parametrize(
    ("equipment", "columns", "there", "absent"),
    [
        (CHARGING, {}, "ev", "battery"),
        (STORING, {"pv_kw": 2.0, "load_kw": 3.0}, "battery", "ev"),
    ],
)
def test_a_week_day_by_day_and_only_what_is_there(
    chrome: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    equipment: str,
    columns: dict[str, float],
    there: str,
    absent: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    site = write_weeks(tmp_path / "weeks", equipment, **columns)
    words = ["--model", "PPO", "--env.site", str(site), "--env.num_envs", "2", *TINY["PPO"]]
    assert main(["fit", *words, "--episodes", "1"]) == 0
    assert main(["report", "--figures", "figures"]) == 0
    (data,) = embedded((tmp_path / "report.html").read_text(encoding="utf-8"))["sites"]
    (stretch,) = data["stretches"]
    assert (data["step_h"], stretch["from"], stretch["to"]) == (1.0, "2025-03-24", "2025-03-30")
    assert [end - begin for _, begin, end in stretch["days"]] == [24] * 6 + [23]
    assert {path.suffix for path in Path("figures").iterdir()} == {".png", ".pdf"}
    show(chrome, tmp_path, 1200)
    explorer = "document.querySelector('[data-chart=explorer]')"
    told = f"return {explorer}.querySelector('output').textContent"
    size = f"return {explorer}.getBoundingClientRect().height"
    heights = set()
    for day in range(7):
        choose(chrome, "explorer", 1, str(day))
        assert chrome.execute_script(told).startswith(f"whole day 2025-03-{24 + day}")
        assert "kg (meter)" in chrome.execute_script(told)
        heights.add(chrome.execute_script(size))
    assert len(heights) == 1
    chrome.execute_script(
        f"const svg = {explorer}.querySelector('.panel > svg'), box = svg.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 46 +"
        " (box.width - 60) * 1.5 / 23, clientY: box.top + 20, bubbles: true}));"
    )
    assert chrome.execute_script(told).startswith("time 1:00\u20133:00")
    drawn = f"return {explorer}.querySelectorAll(arguments[0]).length"
    assert chrome.execute_script(drawn, f"svg .line.{there}") == 2, "in legend and panel"
    assert chrome.execute_script(drawn, f".{absent}") == 0
    assert chrome.execute_script(drawn, ".pv, .load") == (4 if columns else 0)
    assert chrome.execute_script(drawn, ".panel > svg") == (4 if there == "battery" else 3)
    options = "return document.querySelectorAll('[data-chart=heat] option').length"
    assert chrome.execute_script(options) == 1
    bad = "return document.querySelector('main').innerHTML.match(/NaN|undefined|Infinity/g)"
    assert chrome.execute_script(bad) is None
    assert chrome.get_log("browser") == []
