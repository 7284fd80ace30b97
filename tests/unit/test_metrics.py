"""The names of figures: one table, and what computes them keeps to it."""

from pathlib import Path

from co2lightning.metrics import HELD_OUT, TRAINING, short_metrics, tagged_metrics
from co2lightning.sim.days import SiteDays
from co2lightning.sim.evaluate import Summary
from co2lightning.site.load import load_site
from small_site import write_site


def test_names_lead_there_and_back() -> None:
    tagged = {metric.tag: 1.0 for metric in TRAINING.values()} | {"train/policy_loss": 2.0}
    short = short_metrics(tagged)
    assert short == dict.fromkeys(TRAINING, 1.0) | {"policy_loss": 2.0}
    assert tagged_metrics({"episode": 3, **short, "entropy": None}) == tagged


def test_what_is_worked_out_has_a_name(tmp_path: Path) -> None:
    env = SiteDays(load_site(write_site(tmp_path / "village")), 2)
    obs = env.reset(0)
    env.step(obs.new_zeros(2, 2))
    assert set(env.metrics()) <= {metric.tag for metric in TRAINING.values()}
    assert [name for name in Summary._fields if not name.endswith("_interval")] == list(HELD_OUT)
