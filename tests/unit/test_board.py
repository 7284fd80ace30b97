"""TensorBoard beside the curves: a day as a figure, reference lines, the layout, from the files."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from co2lightning.cli import main
from co2lightning.control.rules import rbc_b, uncontrolled
from co2lightning.errors import UserError
from co2lightning.report.looks import AGENTS
from co2lightning.settings.parser import complete, parse_flags
from co2lightning.sim.days import SiteDays
from co2lightning.sim.schedule import play
from co2lightning.site.load import load_site
from co2lightning.train.board import day_image, layout, write_references
from co2lightning.train.fit import run_fit
from small_site import write_site

TINY = {"env.num_envs": 4, "model.n_epochs": 2, "model.batch_size": 192, "model.hidden": (8,)}


def train(name: str, episodes: int, **flags: Any) -> None:
    """Train PPO on the site `village` in the current directory."""
    settings = {**TINY, "env.site": "village", "name": name, "episodes": episodes, **flags}
    run_fit(settings, agent="PPO", echo=lambda line: None)


@pytest.fixture
def village(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_site(tmp_path / "village")


def events(run: str) -> EventAccumulator:
    reader = EventAccumulator(f"lightning_logs/{run}", size_guidance={"images": 0, "tensors": 0})
    return reader.Reload()


def image_steps(run: str) -> list[int]:
    reader = events(run)
    return [image.step for tag in reader.Tags()["images"] for image in reader.Images(tag)]


def test_figures_come_at_absolute_episodes_and_change_nothing(village: Path) -> None:
    train("none", 3, figures_every=0)
    train("all", 1, figures_every=1)
    train("all", 2, figures_every=3, ckpt_path="last")
    assert image_steps("none") == []
    assert image_steps("all") == [1, 3]
    one, other = (
        torch.load(f"checkpoints/{name}/episode_0003.pt", weights_only=True)
        for name in ("none", "all")
    )
    for key, weight in one["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][key]), key
    assert one["run"]["config"] == other["run"]["config"], "a session's setting, not the run's"
    (image,) = events("all").Images("site/dispatch")[:1]
    assert (image.width, image.height) == (810, 720)


def test_the_figure_has_the_agents_colour(village: Path) -> None:
    flags = {"env.num_envs": 4, "env.site": "village", "episodes": 1, "figures_every": 1}
    run_fit(flags, agent="A2C", echo=lambda line: None)
    (image,) = events("A2C").Images("site/dispatch")
    drawn = imread(io.BytesIO(image.encoded_image_string), format="png")[..., :3]
    seen = {tuple(rgb) for rgb in (255 * drawn).round().astype(int).reshape(-1, 3).tolist()}
    colours = {
        a: tuple(int(pair[0][i : i + 2], 16) for i in (1, 3, 5)) for a, pair in AGENTS.items()
    }
    assert [agent for agent, colour in colours.items() if colour in seen] == ["A2C"]


def test_a_figure_that_a_resume_redraws_stands_once(village: Path) -> None:
    train("PPO", 2, figures_every=2)
    Path("checkpoints/PPO/episode_0002.pt").unlink()  # as if killed before it was saved
    train("PPO", 1, figures_every=2, ckpt_path="last")
    assert image_steps("PPO") == [2]


def test_by_default_every_tenth_episode_is_drawn() -> None:
    assert complete({}, "PPO")["figures_every"] == 10
    with pytest.raises(UserError, match="--figures_every -1: must be at least 0"):
        parse_flags(["--figures_every", "-1"], "PPO")


def test_a_figure_shows_what_the_policies_did(village: Path) -> None:
    site = load_site(village)
    model, day = SiteDays(site, 1).model, int(site.stretches[0, 0])
    rule, none = (
        play(model, policy, site, site.stretch_bounds[:1])[0].schedule
        for policy in (rbc_b, uncontrolled)
    )
    images = [
        day_image(site, day, ("a policy", "#0072b2"), own, rule) for own in (rule, none, rule)
    ]
    assert images[0].shape == (720, 810, 3)
    assert images[0].dtype == np.uint8
    assert (images[0] == images[2]).all()
    assert (images[0] != images[1]).any(axis=2).mean() > 0.02


@pytest.mark.parametrize("currency", [None, "EUR"])
def test_the_layout_stands_once_and_names_tags_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, currency: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    write_site(tmp_path / "village", currency=currency)
    train("PPO", 1, evaluate_every=1)
    train("PPO", 1, ckpt_path="last")
    assert main(["test", "PPO", "--json"]) == 0
    reader = events("PPO")
    (event,) = reader.Tensors("custom_scalars__config__")
    found = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in found.category] == list(layout(priced=True))
    tags = {tag for run in ("PPO", "PPO/test") for tag in events(run).Tags()["scalars"]}
    shown = {
        pattern.strip("^$")
        for category in found.category
        for chart in category.chart
        for pattern in chart.multiline.tag
    }
    assert shown <= tags
    assert "test/peak_import_kw" in shown
    assert {"site/cost", "test/cost"} <= shown if currency else not shown & {"site/cost"}


def test_an_environment_that_is_no_site_has_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train("PPO", 1, **{"env.id": "Pendulum-v1", "env.site": "iquitos", "figures_every": 1})
    tags = events("PPO").Tags()
    assert tags["images"] == []
    assert "custom_scalars__config__" not in tags["tensors"]


def lines(policy: str) -> dict[str, list[tuple[int, float]]]:
    reader = events(f"references/village held-out days/{policy}")
    return {
        tag: [(point.step, point.value) for point in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def test_references_are_level_lines_of_what_test_says(
    village: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("PPO", 3)
    assert main(["test", "PPO", "--json", "--ckpt_path", "checkpoints/PPO/episode_0002.pt"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    uncontrolled_kg = summary["uncontrolled"]["co2_kg"]
    for policy in ("uncontrolled", "rbc_a", "rbc_b", "cheap", "rbc_c", "optimum"):
        found, co2_kg = lines(policy), summary[policy]["co2_kg"]
        for tag, value in (
            ("test/co2_kg", co2_kg),
            ("test/gap_closed", summary[policy]["gap_closed"]),
            ("site/co2_kg", co2_kg),
            ("site/co2_vs_uncontrolled", co2_kg / uncontrolled_kg),
        ):
            assert [step for step, _ in found[tag]] == [1, 3]
            assert [v for _, v in found[tag]] == pytest.approx([value, value], rel=1e-6)
    own = events("PPO/test").Scalars("test/co2_kg")
    assert [(point.step, point.value) for point in own] == [
        (2, pytest.approx(summary["agent"]["co2_kg"]))
    ]


def test_reference_lines_never_become_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logs = tmp_path / "lightning_logs"
    for last in (1, 40, 7):
        figures = {"co2_kg": 100.0 + last, "gap_closed": None}
        write_references(logs, "village", {"uncontrolled": figures, "rbc_b": figures}, last)
    assert lines("rbc_b") == {
        "test/co2_kg": [(1, 107.0), (40, 107.0)],
        "site/co2_kg": [(1, 107.0), (40, 107.0)],
        "site/co2_vs_uncontrolled": [(1, 1.0), (40, 1.0)],
    }
    assert len(list(logs.rglob("events.*"))) == 2


def test_no_run_takes_the_references_place(village: Path) -> None:
    with pytest.raises(UserError, match="--name references"):
        train("references", 1)
