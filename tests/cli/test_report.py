"""`report`: what it shows is what was computed, in one file that a stranger's run cannot script."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from matplotlib.image import imread

from co2lightning.agents.load import load_agent, policy_of
from co2lightning.cli import main
from co2lightning.commands.run import find_runs
from co2lightning.control import rules
from co2lightning.report.collect import compare_to_rule, soc_band
from co2lightning.report.looks import HEAT
from co2lightning.report.tables import summarize
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.settings.parser import parse_flags
from co2lightning.sim.evaluate import evaluate, summarise
from co2lightning.site.load import load_site
from co2lightning.train.fit import run_fit
from conftest import TINY, Outcome, tree
from small_site import HELD_OUT, write_site

HOSTILE = "<img src=x onerror=alert(1)>\"'&$x_1$"
DEVICE = "</script></td><script>window.pwned = 1</script>"


class Made(NamedTuple):
    """A directory with runs, and the report of them."""

    place: Path
    html: str
    data: dict[str, Any]
    outcome: Outcome


def beside_notes(err: str) -> list[str]:
    """Return the lines that are no remark on the site's own files."""
    return [line for line in err.splitlines() if ".csv: " not in line]


class Page(HTMLParser):
    """The elements of a page, the text of its cells, the content of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._inside == "script":
            self.scripts[-1] += data


def embedded(html: str) -> dict[str, Any]:
    return json.loads(Page(html).scripts[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train PPO in two sessions and A2C on another site; add a stranger's run."""
    place = tmp_path_factory.mktemp("report")
    write_site(place / "village")
    write_site(place / "other", load_kw=9.0)
    for agent, site, episodes in (
        ("PPO", "village", 2),
        ("PPO", "village", 1),
        ("A2C", "other", 1),
    ):
        words = ["--env.num_envs", "2", "--env.site", str(place / site), *TINY[agent]]
        words += ["--episodes", str(episodes), "--checkpoints.dir", str(place / "checkpoints")]
        flags = parse_flags([*words, "--logs.dir", str(place / "logs")], agent)
        run_fit({**flags, "ckpt_path": "last"}, agent=agent, echo=lambda line: None)
    copy_run(place, HOSTILE, DEVICE)
    return place


def copy_run(place: Path, name: str, device: str = "cpu", **info: Any) -> TrainingCheckpoint:
    """Save PPO's newest episode as the first of another run."""
    checkpoint = TrainingCheckpoint(place / "checkpoints" / "PPO").load_latest_checkpoint()
    assert checkpoint is not None
    run = TrainingCheckpoint(place / "checkpoints" / name)
    run.begin_session(start_episode=1, device=device, info={**checkpoint["run"], **info})
    run.save_checkpoint(checkpoint, episode=1, metrics=checkpoint["metrics"])
    run.end_session("failed")
    return run


@pytest.fixture(scope="module")
def made(place: Path) -> Made:
    """Make the report of all runs, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["report", "--output", "report.html"]) == 0
    html = (place / "report.html").read_text(encoding="utf-8")
    return Made(place, html, embedded(html), Outcome(0, "", ""))


@pytest.fixture
def report(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Return `co2lightning report`, run in the directory of the runs."""
    monkeypatch.chdir(place)

    def run(*words: str | Path) -> Outcome:
        capsys.readouterr()
        code = main(["report", *map(str, words)])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


# --- what it shows -------------------------------------------------------------------------------


def test_the_table_is_that_of_test(made: Made) -> None:
    run = TrainingCheckpoint(made.place / "checkpoints" / "PPO")
    checkpoint = run.load_latest_checkpoint()
    assert checkpoint is not None
    site = load_site(made.place / "village")
    agent = load_agent(checkpoint, run.path(3))
    evaluation = evaluate(policy_of(agent, site), site)
    summaries = summarise(evaluation)
    rows = Page(made.html).rows
    for title, s in (("PPO", summaries["agent"]), ("optimum (LP)", summaries["optimum"])):
        (row,) = [r for r in rows if r[0] == title and r[2] == f"{s.co2_kg:.1f}"]
        assert row[3].replace("−", "-") == f"{s.vs_best:+.1f}"
        assert row[4].replace("−", "-") == f"{100 * (s.gap_closed or 0):.1f} %"
        assert row[8] == f"{s.peak_import_kw:.0f}"
    village = next(s for s in made.data["sites"] if s["runs"][-1]["key"] == "PPO")
    assert [one["days"] for one in village["stretches"]] == [[[day, 0, 96]] for day in HELD_OUT]
    shown = {one["key"]: one for one in [*village["policies"], village["runs"][-1]]}
    for key, name in (("PPO", "agent"), ("rbc_b", "rbc_b"), ("optimum", "optimum")):
        for w, plan in enumerate(evaluation.schedules[name]):
            for field, exact in (
                ("ev_kw", 0.005),
                ("battery_kw", 0.005),
                ("soc", 5e-4),
                ("co2_kg", 5e-5),
            ):
                drawn = np.array(shown[key]["schedule"][w][field])
                assert drawn == pytest.approx(getattr(plan, field), abs=1.01 * exact), (key, field)
        kg = evaluation.policies[name].co2_kg
        assert shown[key]["a_day"] == pytest.approx(kg, abs=6e-4)
    (titles,) = [row for row in rows if row[0] == "from" and "PPO" in row]
    (mine,) = [row for row in rows if row[0] == HELD_OUT[1] and len(row) == len(titles)]
    assert mine[titles.index("PPO")] == f"{evaluation.policies['agent'].co2_kg[1]:.1f}"
    assert mine[-2] == "0.0"


def test_the_first_sentence_compares_with_the_best_reference(
    report: Callable[..., Outcome], place: Path, tmp_path: Path
) -> None:
    """Without sun RBC B waits for the evening, whose intensity is higher: nothing beats that."""
    dark = write_site(tmp_path / "dark")
    series = [row.split(",") for row in (dark / "series.csv").read_text().splitlines()]
    rows = [series[0], *([time, "0", *rest] for time, _, *rest in series[1:])]
    (dark / "series.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    assert report("PPO", "--env.site", dark, "--output", tmp_path / "r.html").code == 0
    run = TrainingCheckpoint(place / "checkpoints" / "PPO")
    agent = load_agent(TrainingCheckpoint.read(run.path(3)), run.path(3))
    site = load_site(dark)
    policies = evaluate(policy_of(agent, site), site).policies
    kg = {name: figures.co2_kg.mean() for name, figures in policies.items()}
    assert kg["rbc_c"] < kg["uncontrolled"] < kg["rbc_b"]
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    more = kg["agent"] - kg["rbc_c"]
    assert more > 0
    first = html.partition("<p>")[2].partition("</b>")[0]
    assert first.startswith("<b>Use RBC C: it is simpler, and PPO emits less in 0 of 3")
    assert first.endswith(f", {more:.1f} kg a day more in the mean.")
    assert "Of the site's data: turned away 0.0 and clipped 0.0 kWh a day." in html


def test_each_site_has_its_own_part(made: Made) -> None:
    runs = [[run["key"] for run in site["runs"]] for site in made.data["sites"]]
    assert sorted(runs) == sorted([[HOSTILE, "PPO"], ["A2C"]])
    assert made.html.count("<h2>Site village</h2>") == 2
    for directory in ("village", "other"):
        assert load_site(made.place / directory).sha256[:12] in made.html


def test_curve_sessions_and_convergence_are_those_of_the_history(made: Made) -> None:
    (run,) = find_runs("PPO", made.place / "checkpoints")
    sessions = summarize(run)["sessions"]
    metrics = [m for s in sessions for m in s["metrics"]]
    (drawn,) = [r for s in made.data["sites"] for r in s["runs"] if r["key"] == "PPO"]
    assert [row[0] for row in drawn["curve"]] == [1, 2, 3]
    assert [row[1] for row in drawn["curve"]] == pytest.approx(
        [m["co2_kg"] for m in metrics], abs=0.006
    )
    rows = Page(made.html).rows
    first, second = ((m[0]["co2_kg"] + m[-1]["co2_kg"]) / 2 for m in (metrics[:2], metrics[2:]))
    assert ["PPO", "1-2", f"{first:.1f}"] in [r[:3] for r in rows]
    change = f"{second - first:+.1f}".replace("-", "−")
    assert ["PPO", "3-3", f"{second:.1f}", change] in [r[:4] for r in rows]
    begun = sessions[0]["session_timestamp"]
    assert ["PPO", begun, "1-2", "2"] in [r[:4] for r in rows]


def test_each_run_is_judged_by_its_own_objective(
    priced: Path, report: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(priced)
    outcome = report("money", "air", "both", "--output", tmp_path / "r.html")
    assert outcome.code == 0
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    shown = {site["runs"][0]["key"]: site for site in embedded(html)["sites"]}
    assert {name: site["settled"]["name"] for name, site in shown.items()} == {
        "money": "cost",
        "air": "CO2",
        "both": "objective",
    }
    assert shown["money"]["settled"]["a_day"] == "EUR a day"
    assert set(shown["money"]["stretches"][0]["price"]) == {0.1, 0.3}
    assert "price" not in shown["air"]["stretches"][0]
    rows = Page(html).rows
    for name, objective in (
        ("money", "cost"),
        ("air", "co2"),
        ("both", {"co2": 1.0, "cost": 0.5}),
    ):
        run = TrainingCheckpoint(priced / "checkpoints" / name)
        agent = load_agent(TrainingCheckpoint.read(run.path(1)), run.path(1))
        site = load_site(priced / "shop", objective=objective)
        found = evaluate(policy_of(agent, site), site)
        own, (drawn,) = summarise(found)["agent"], shown[name]["runs"]
        assert drawn["a_day"] == pytest.approx(found.policies["agent"].settled, abs=6e-4)
        if name == "money":
            (plan, *_), (costs, *_) = found.schedules["agent"], drawn["schedule"]
            assert costs["cost"] == pytest.approx(plan.cost, abs=6e-5)
        assert drawn["vs_best"] == pytest.approx(own.vs_best, abs=6e-4)
        idle = next(one for one in shown[name]["policies"] if one["key"] == "uncontrolled")
        assert idle["share"] == 1.0
        (metrics,) = summarize(run)["sessions"][0]["metrics"]
        trained_on = site.objective.of(metrics["co2_kg"], metrics["cost"])
        assert drawn["curve"][0][1] == pytest.approx(trained_on, abs=0.006)
        (row,) = [r for r in rows if r[0] == f"{name} (PPO)" and len(r) > 8]
        assert row[2:4] == [f"{own.co2_kg:.1f}", f"{own.cost:.2f}"]
    text = html.replace("\u2212", "-")
    cost, difference = (shown["money"]["runs"][0][key] for key in ("mean", "vs_best"))
    assert f"costs {cost:.2f} EUR a day" in text
    assert f"{abs(difference):.2f} EUR a day" in text
    assert "Cost of each held-out stretch" in html


def test_each_number_has_its_source(made: Made) -> None:
    for run in ("PPO", "A2C"):
        assert f"co2lightning test {run}" in made.html
    (row,) = [
        row
        for row in TrainingCheckpoint(made.place / "checkpoints/PPO").load_history()["checkpoints"]
        if row["file"] == "episode_0003.pt"
    ]
    assert f"episode_0003.pt (sha256 {row['sha256'][:12]})" in made.html
    assert "<code>co2lightning report --output report.html</code>" in made.html
    from co2lightning import __version__

    assert f"by co2lightning {__version__}" in made.html


def test_the_file_needs_nothing_else(made: Made) -> None:
    page = Page(made.html)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", made.html)
    links = {"src", "href", "srcset", "action", "data"}
    assert not [tag for tag, attributes in page.elements if links & attributes.keys()]
    assert not re.search(r"@import|url\(", made.html)


@pytest.mark.slow
def test_figures_for_papers(report: Callable[..., Outcome], tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    outcome = report(HOSTILE, "--figures", figures, "--output", tmp_path / "r.html")
    assert (outcome.code, beside_notes(outcome.err)) == (0, [])
    assert f"{figures}: 5 figures, each as PNG and as PDF" in outcome.out
    files = {path.name: path.read_bytes() for path in figures.iterdir()}
    name = re.sub(r"[^\w.-]", "_", HOSTILE)
    stems = [
        "learning_curves",
        "held_out",
        f"stretches_{name}",
        f"difference_{name}",
        f"day_{name}",
    ]
    assert files.keys() == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    heat = (255 * imread(figures / f"difference_{name}.png")[..., :3]).round().astype(int)
    seen = {tuple(rgb) for rgb in heat.reshape(-1, 3).tolist()}
    for look in ("never", "minus", "plus"):
        assert tuple(int(HEAT[look][i : i + 2], 16) for i in (1, 3, 5)) in seen, look
    for file, content in files.items():
        assert content.startswith(b"%PDF-" if file.endswith("pdf") else b"\x89PNG")


@pytest.mark.slow
def test_figures_of_two_sites_do_not_overwrite_each_other(
    report: Callable[..., Outcome], place: Path, tmp_path: Path
) -> None:
    outcome = report("PPO", "A2C", "--figures", tmp_path / "f", "--output", tmp_path / "r.html")
    assert (outcome.code, beside_notes(outcome.err)) == (0, [])
    names = {path.stem for path in (tmp_path / "f").iterdir()}
    assert len(names) == 2 * 5
    for run, directory in (("PPO", "village"), ("A2C", "other")):
        site = f"village-{load_site(place / directory).sha256[:6]}"
        assert {f"day_{run}-{site}", f"learning_curves-{site}"} <= names


def test_the_rule_differs_from_itself_nowhere(place: Path) -> None:
    site = load_site(place / "village")
    steps = len(HELD_OUT) * 96
    same = compare_to_rule(rules.rbc_b, site)
    assert same.steps.sum() == steps
    assert np.nanmax(np.abs(same.battery_kw)) == 0.0
    assert np.nanmax(np.abs(same.ev_kw)) == 0.0
    assert (np.isnan(same.battery_kw) == (same.steps == 0)).all()
    # An idle battery stays at the SoC it began with; at noon RBC B would charge it.
    idle = compare_to_rule(rules.uncontrolled, site)
    visited = np.flatnonzero(idle.steps.sum(0))
    assert idle.steps.sum() == steps
    assert (idle.steps.sum(1) == steps / 24).all()
    assert len(visited) <= len(HELD_OUT)
    assert (idle.battery_kw[12, visited] < -5.0).all()


def test_the_heat_map_shows_an_empty_battery(tmp_path: Path) -> None:
    """Its SoC is that of the band's lower end, or a rounding below it."""
    low = write_site(tmp_path / "low")
    text = (low / "site.yaml").read_text()
    (low / "site.yaml").write_text(
        text.replace("soc_min: 0.1", "soc_min: 0.35").replace("soc_min: 0.3,", "soc_min: 0.4,")
    )
    site = load_site(low)
    heat = compare_to_rule(rules.rbc_b, site)
    first, end = soc_band(site.battery)
    assert (first, end) == (7, 18)
    assert heat.steps[:, first].sum() > 0
    assert heat.steps[:, first:end].sum() == heat.steps.sum()


# --- what it refuses to run ----------------------------------------------------------------------


def test_a_strangers_text_stays_text(made: Made) -> None:
    page = Page(made.html)
    assert [a for tag, a in page.elements if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    assert "img" not in {tag for tag, _ in page.elements}
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert any(row[0] == HOSTILE and row[5] == DEVICE for row in page.rows if len(row) == 7)
    keys = [run["key"] for site in made.data["sites"] for run in site["runs"]]
    assert HOSTILE in keys
    (policy,) = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


# --- fewer runs, other sites ---------------------------------------------------------------------


def test_rules_alone_are_shown_as_runs_are_without_learning(
    report: Callable[..., Outcome], place: Path, tmp_path: Path
) -> None:
    output, figures = tmp_path / "rules.html", tmp_path / "figures"
    words = ["rbc_b", "cheap", "--env.site", "village", "--output", output, "--figures", figures]
    outcome = report(*words)
    assert outcome.code == 0
    assert f"{output}: 2 rules, " in outcome.out
    assert {file.stem for file in figures.iterdir()} == {
        "held_out",
        *(f"{what}_{name}" for what in ("stretches", "difference", "day") for name in words[:2]),
    }
    html = output.read_text(encoding="utf-8")
    assert "<h3>Learning curves" not in html
    assert "<h2>Training" not in html
    assert "co2lightning test cheap --env.site village" in html
    (site,) = embedded(html)["sites"]
    assert not site["runs"]
    first, second = site["rules"]
    assert [first["title"], second["title"]] == ["RBC B", "cheap hours"]
    assert np.nanmax(np.abs(np.array(first["heat"]["ev_kw"], dtype=float))) == 0.0
    assert np.nanmax(np.abs(np.array(second["heat"]["ev_kw"], dtype=float))) > 0.0
    (reference,) = (one for one in site["policies"] if one["key"] == "cheap")
    for key in ("a_day", "mean", "vs_best", "share", "schedule"):
        assert second[key] == reference[key]


def test_a_rule_stands_beside_runs_on_each_of_their_sites(
    report: Callable[..., Outcome], tmp_path: Path
) -> None:
    output = tmp_path / "both.html"
    outcome = report("PPO", "A2C", "rbc_a", "--output", output)
    assert outcome.code == 0
    assert "2 runs, 1 rule, " in outcome.out
    html = output.read_text(encoding="utf-8")
    sites = embedded(html)["sites"]
    assert [[one["key"] for one in site["rules"]] for site in sites] == [["rbc_a"]] * 2
    assert [[one["key"] for one in site["runs"]] for site in sites] == [["PPO"], ["A2C"]]
    assert "co2lightning test PPO; co2lightning test rbc_a --env.site village" in html


def test_one_run_alone(report: Callable[..., Outcome], tmp_path: Path) -> None:
    output = tmp_path / "one.html"
    outcome = report("PPO", "PPO", "--output", output)
    assert (outcome.code, beside_notes(outcome.err)) == (0, [])
    assert outcome.out.splitlines()[-1].startswith(f"{output}: 1 run, ")
    data = embedded(output.read_text(encoding="utf-8"))
    assert [[r["key"] for r in s["runs"]] for s in data["sites"]] == [["PPO"]]
    assert tree(tmp_path).keys() == {"one.html"}


def test_another_site_is_told(report: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = report("PPO", "--env.site", "other", "--output", tmp_path / "r.html")
    assert outcome.code == 0
    (line,) = beside_notes(outcome.err)
    assert line.startswith("PPO: evaluated on village")
    assert "PPO was trained on village" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["test", "predict", "report"])
def test_what_a_sites_reader_left_out_is_told_once(
    report: Callable[..., Outcome],
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The page shows it too, beside the figures."""
    torn = write_site(tmp_path / "torn")
    series = (torn / "series.csv").read_text().splitlines()
    (torn / "series.csv").write_text("\n".join(series[:-1]) + "\n")
    (torn / "site.yaml").write_text((torn / "site.yaml").read_text().replace("name: v", "name: V"))
    with (torn / "sessions.csv").open("a") as file:
        for i in range(4):
            file.write(f"night-{i},moto,2025-03-02T23:00:00Z,2025-03-03T01:00:00Z,16,4\n")
    words = ["--output", str(tmp_path / "report.html")] if command == "report" else []
    assert main([command, "PPO", "--env.site", str(torn), *words]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if ".csv: " in line]
    notes = load_site(torn).notes
    assert [sum(word in note for note in notes) for word in ("clipped", "turned away")] == [1, 1]
    prefix = "Village: " if command == "report" else ""  # which may show several sites
    assert told == [prefix + note for note in notes]
    if command == "report":
        html = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert all(note in html for note in notes)
        assert "are turned away, for want of a free socket" in html


def test_runs_without_co2_are_left_out_with_a_line(
    report: Callable[..., Outcome], place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "checkpoints" / "PPO", tmp_path / "checkpoints" / "PPO")
    copy_run(tmp_path, "pendulum", site=None)
    begun = TrainingCheckpoint(tmp_path / "checkpoints" / "begun")
    begun.begin_session(start_episode=1, device="cpu", info={"agent": "PPO"})
    begun.end_session("interrupted")
    words = ("--checkpoints.dir", tmp_path / "checkpoints", "--output", tmp_path / "r.html")
    outcome = report(*words)
    assert outcome.code == 0
    assert beside_notes(outcome.err) == [
        "begun: has no episode yet, left out",
        "pendulum: was not trained on a site, which alone has CO2, left out",
    ]
    assert report("pendulum", *words).code == 2


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["SAC"], "SAC: no such run in checkpoints; there are: "),
        (["--checkpoints.dir", "nowhere"], "no runs in nowhere; co2lightning fit"),
        (["--env.site", "nowhere"], "nowhere: no such folder and no shipped site"),
        (["--output", "no/such/report.html"], "--output no/such/report.html: there is no directo"),
        (["--output", "village"], "--output village: is a directory"),
        (["--output", ""], "is a directory"),
        (["--output", "village/site.yaml/r.html"], "Not a directory"),
        (["--output", os.devnull], "is no regular file"),
        (["--output", "\x00"], "--output"),
        (["--figures", "village/site.yaml"], "--figures village/site.yaml: is not a directory"),
        (["--figures", "no/such"], "--figures no/such: there is no directory"),
        (["--figure", "x"], "report: unrecognized arguments"),
        (["--output"], "report: argument --output: expected one argument"),
    ],
)
def test_what_cannot_be(
    report: Callable[..., Outcome], place: Path, words: list[str], says: str
) -> None:
    before = tree(place)
    outcome = report(*words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert says in outcome.err
    assert tree(place) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_place_that_cannot_be_written(report: Callable[..., Outcome]) -> None:
    for words in (("--output", "/proc/report.html"), ("--figures", "/proc/figures")):
        outcome = report(*words)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
        assert "/proc cannot be written" in outcome.err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_a_disk_that_fails_leaves_the_old_report(
    report: Callable[..., Outcome], tmp_path: Path
) -> None:
    import resource

    (tmp_path / "r.html").write_text("old")
    before = tree(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        outcome = report("PPO", "--output", tmp_path / "r.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 1
    said = f"error: {tmp_path / 'r.html'}: File too large; nothing half written"
    assert beside_notes(outcome.err) == [said]
    assert tree(tmp_path) == before


def test_a_damaged_run_is_named(
    report: Callable[..., Outcome], place: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "checkpoints"
    for name in ("A2C", "PPO"):
        shutil.copytree(place / "checkpoints" / name, runs / name)
    newest = runs / "PPO" / "episode_0003.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    before = tree(tmp_path)
    words = ("--checkpoints.dir", runs, "--output", tmp_path / "r.html")
    for names in ((), ("PPO",)):
        outcome = report(*names, *words)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
        assert outcome.err.startswith(f"error: {newest} is damaged; co2lightning verify PPO says")
        assert tree(tmp_path) == before
    assert report("A2C", *words).code == 0
    for path in (runs / "PPO").glob("episode_*.pt"):
        path.write_bytes(b"")
    assert "3 checkpoints, none of them good" in report("PPO", *words).err


def test_a_diverged_run_is_named(
    report: Callable[..., Outcome], place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "checkpoints" / "PPO", tmp_path / "checkpoints" / "PPO")
    run = TrainingCheckpoint(tmp_path / "checkpoints" / "PPO")
    checkpoint = run.load_latest_checkpoint()
    assert checkpoint is not None
    for weights in checkpoint["state_dict"].values():
        weights.fill_(float("nan"))
    run.begin_session(start_episode=4, device="cpu", info=checkpoint["run"])
    run.save_checkpoint(checkpoint, episode=4, metrics={"co2_kg": float("nan")})
    run.end_session("failed")
    output = tmp_path / "r.html"
    outcome = report("--checkpoints.dir", tmp_path / "checkpoints", "--output", output)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "episode_0004.pt: its weights log_std are no finite numbers" in outcome.err
    assert not output.exists()
