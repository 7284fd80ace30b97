"""What to do, in one sentence: by the interval, or week by week, and never by unmet energy."""

from typing import Any

import pytest

from co2lightning.report.comparison import verdict


def data(
    difference: float,
    half: float | None,
    own: list[float],
    *,
    best: str = "rbc_c",
    unmet: float = 0.0,
    gap: float | None = 1.0,
) -> dict[str, Any]:
    """Return what `evaluation_data` would of an agent, and of a rule that settles at 10 a week."""
    rows = {"agent": own, best: [10.0] * len(own)}
    summary = {
        "agent": {"vs_best": difference, "vs_best_interval": half, "unmet_kwh": unmet},
        best: {"vs_best": 0.0, "vs_best_interval": None, "unmet_kwh": 0.0},
        "optimum": {"gap_closed": gap},
    }
    return {
        "objective": {"co2": 1.0, "cost": 0.0},
        "currency": None,
        "best": best,
        "stretches": [{"days": 7}] * len(own),
        "policies": {
            name: {"stretches": [{"compared": value} for value in settled]}
            for name, settled in rows.items()
        },
        "summary": summary,
    }


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            data(-3.24, 1.1, [9.0] * 8),
            "Use PPO: it emits 3.2 ± 1.1 kg a day less than the best simple rule, RBC C.",
        ),
        (
            data(-0.31, 1.1, [9.9] * 8),
            "Use RBC C: it is as good and simpler; PPO emits 0.3 ± 1.1 kg a day less.",
        ),
        (data(5.0, 1.1, [15.0] * 8), "Use RBC C: PPO emits 5.0 ± 1.1 kg a day more."),
        (
            data(5.0, 1.1, [15.0] * 8, best="uncontrolled"),
            "Leave it uncontrolled: PPO emits 5.0 ± 1.1 kg a day more.",
        ),
        (
            data(-1.0, None, [9.0] * 3),
            "Use PPO: it emits less than the best simple rule, RBC C, in each of 3 held-out "
            "weeks, 1.0 kg a day less in the mean.",
        ),
        (
            data(-0.5, None, [9.0, 11.0, 8.5]),
            "Use RBC C: it is simpler, and PPO emits less in 2 of 3 held-out weeks, 0.5 kg a day "
            "less in the mean.",
        ),
        (
            data(-3.24, 1.1, [9.0] * 8, unmet=0.25),
            "Use PPO: it emits 3.2 ± 1.1 kg a day less than the best simple rule, RBC C; PPO "
            "leaves 0.25 kWh a day more unmet, which is counted.",
        ),
        (
            data(0.0, 0.1, [10.0] * 8, gap=None),
            "Nothing is to be gained: the optimum is less than 0.1 % below uncontrolled.",
        ),
    ],
)
def test_the_sentence_follows_from_the_figures(found: dict[str, Any], said: str) -> None:
    assert verdict(found, "agent", "PPO") == said


def test_the_best_rule_is_to_be_used() -> None:
    assert verdict(data(0.0, 0.1, [10.0] * 8), "rbc_c", "RBC C").startswith("Use RBC C: no other")
