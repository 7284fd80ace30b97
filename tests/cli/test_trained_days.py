"""A site's `held_out` changes between sessions: a day that was trained on is never held out."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from co2lightning.errors import UserError
from co2lightning.site.load import load_site
from co2lightning.site.trained_days import unseen, with_this_session
from conftest import Outcome
from small_site import HELD_OUT, shipped, write_site

Command = Callable[..., Outcome]
Fit = Callable[..., Outcome]
FIRST, OTHER = "2025-03-04", "2025-03-01"  # held out at first, trained on at first


@pytest.fixture
def site(place: Path) -> Path:
    return write_site(place / "village")


def hold_out(site: Path, *days: str) -> None:
    text = (site / "site.yaml").read_text()
    rule = text[text.index("held_out:") :]
    (site / "site.yaml").write_text(text.replace(rule, f"held_out: [{', '.join(days)}]\n"))


def train(fit: Fit, *words: str) -> str:
    return fit("PPO", "--env.site", "village", "--episodes", "1", *words).out


def stretches_of(outcome: Outcome) -> list[str]:
    """Return where the stretches begin that `test --json` tells of."""
    return [stretch["begin"] for stretch in json.loads(outcome.out)["stretches"]]


def test_what_was_trained_on_is_left_out(fit: Fit, command: Command, site: Path) -> None:
    assert "held-out days" not in train(fit)
    assert stretches_of(command("test", "PPO", "--json")) == HELD_OUT
    before = json.loads(Path("checkpoints/PPO/metadata.json").read_text())["trained_days"]
    assert before == {
        "village": ["2025-03-01/2025-03-01", "2025-03-03/2025-03-03", "2025-03-06/2025-03-06"]
    }

    hold_out(site, OTHER, FIRST)
    remark = "The run was trained on 1 of the 2 held-out days of village; they are left out"
    tested = command("test", "PPO", "--json")
    assert stretches_of(tested) == [FIRST]
    assert remark in tested.err
    reported = command("report", "PPO")
    assert (reported.code, f"PPO: {remark}" in reported.err) == (0, True)
    predicted = command("predict", "PPO")
    assert predicted.out.splitlines()[1].startswith(FIRST)
    assert f"{OTHER} is a training day" in command("predict", "PPO", "--day", OTHER).err

    # The next session trains on what was held out, and all of it counts.
    line = "1 of the 2 held-out days of village were trained on up to episode 1"
    assert line in train(fit, "--ckpt_path", "last")
    hold_out(site, "2025-03-02", FIRST)  # the former trained on since
    assert stretches_of(command("test", "PPO", "--json")) == [FIRST]
    hold_out(site, OTHER, "2025-03-02")
    for name in ("test", "predict"):
        refused = command(name, "PPO")
        assert refused.code == 2
        assert "the run was trained on all 2 held-out days of village" in refused.err
    assert command("predict", "PPO", "--day", FIRST).code == 0
    # Back at the first episode, so is what was seen up to it.
    train(fit, "--ckpt_path", "checkpoints/PPO/episode_0001.pt")
    trained = json.loads(Path("checkpoints/PPO/metadata.json").read_text())["trained_days"]
    assert trained == {"village": sorted([*before["village"], "2025-03-04/2025-03-05"])}


def test_a_run_of_a_version_that_did_not_write_them_down(site: Path) -> None:
    """What its site says stands for them while the site's files are the same."""
    village = load_site("village")
    same = {"site": {"name": "village", "sha256": village.sha256}}
    assert unseen(same, village) == (village, None)
    days = [f"2025-03-{day:02d}/2025-03-{day:02d}" for day in (1, 3, 6)]
    assert with_this_session(same, village) == {"village": days}
    changed = {"site": {"name": "village", "sha256": "0" * 64}}
    left, remark = unseen(changed, village)
    assert left is village
    assert remark
    assert "was not written down" in remark
    assert with_this_session(changed, village) == {"village": None}
    assert unseen({"trained_days": {"village": None}}, village)[1] == remark
    town = {"site": {"name": "town", "sha256": "0" * 64}}
    assert with_this_session(town, village) == {"town": None, "village": days}
    assert unseen(town, village) == (village, None)


def test_a_week_is_unseen_if_none_of_its_days_was_trained_on() -> None:
    """Scales and forecasts come from the days that are not held out, and must not move."""
    site = shipped()
    first = site.days[site.stretches[0, 0]]
    run = {"trained_days": {site.name: ["2025-01-01/2025-01-20", f"{first}/{first}"]}}
    left, remark = unseen(run, site)
    assert left.stretches.tolist() == site.stretches[1:].tolist()
    assert left.held_out is site.held_out
    assert remark == (
        "The run was trained on days of 1 of the 8 held-out weeks of iquitos; they are left out"
    )
    run["trained_days"][site.name] = [f"{day}/{day}" for day in np.array(site.days)[site.held_out]]
    with pytest.raises(UserError, match="trained on days of all 8 held-out weeks of iquitos; name"):
        unseen(run, site)
    trained = with_this_session({}, site)[site.name]
    assert trained
    assert trained[:2] == ["2025-01-01/2025-02-04", "2025-02-12/2025-03-18"]
    assert unseen({"trained_days": {site.name: trained}}, site) == (site, None)
