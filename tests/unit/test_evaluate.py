"""The paired evaluation: its statistics by hand, what stretches leave, what is kept."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from co2lightning.control.rules import Rule, rbc_b
from co2lightning.control.state import SiteModel, State
from co2lightning.errors import UserError
from co2lightning.sim import evaluate as module
from co2lightning.sim import kept
from co2lightning.sim.evaluate import Evaluation, Figures, evaluate, summarise, violations
from co2lightning.sim.objective import priced_model
from co2lightning.sim.optimum import Best, tail_objective
from co2lightning.sim.schedule import play, start_soc
from co2lightning.site.model import Objective, Site
from conftest import tree
from hand_site import battery, hand_site, random_site
from small_site import shipped


def figures(co2_kg: list[float], **columns: list[float]) -> Figures:
    zeros = np.zeros(len(co2_kg))
    given = {name: np.array(columns.get(name, zeros)) for name in Figures._fields}
    kg = np.array(co2_kg)
    return Figures(**{**given, "settled": kg, "co2_kg": kg})


def by_hand() -> Evaluation:
    """Three stretches, the last of two days."""
    none = np.zeros(3)
    return Evaluation(
        site="hand",
        days=("2025-01-01", "2025-01-02", "2025-01-03"),
        n_days=np.array([1, 1, 2]),
        hours=np.array([24.0, 24.0, 48.0]),
        pv_kwh=np.array([10.0, 20.0, 10.0]),
        unavoidable_kwh=none,
        turned_away_kwh=none,
        clipped_kwh=none,
        standard=none,
        tolerance=np.full(3, 1e-6),
        unit=200.0,
        policies={
            "agent": figures([80.0, 90.0, 190.0], curtailed_kwh=[1.0, 2.0, 3.0]),
            "uncontrolled": figures([190.0, 200.0, 410.0], peak_import_kw=[5.0, 7.0, 6.0]),
            "rbc_a": figures([150.0, 150.0, 300.0]),
            "rbc_b": figures([82.0, 94.0, 200.0]),
            "optimum": figures([60.0, 70.0, 150.0]),
        },
    )


def several(count: int) -> Evaluation:
    """So many stretches of a day."""
    one = np.ones(count)
    kg = np.arange(count, dtype=float)
    return replace(
        by_hand(),
        days=("2025-01-01",) * count,
        n_days=one.astype(np.int64),
        hours=24.0 * one,
        pv_kwh=one,
        tolerance=one,
        policies={
            "agent": figures((10.0 * kg).tolist()),
            "uncontrolled": figures((100.0 + one).tolist()),
            "rbc_b": figures((9.0 * kg).tolist()),
            "optimum": figures((0.0 * kg).tolist()),
        },
    )


# --- statistics ----------------------------------------------------------------------------------


def test_intervals_are_students_t_over_eight_stretches_or_more() -> None:
    values = np.arange(8.0)
    half_width = module.interval(values)
    # t(0.975, 7) = 2.3646; the standard error of 0 to 7 is 2.44949 / 8**0.5.
    assert half_width == pytest.approx(2.364624 * 2.449490 / 8**0.5, rel=1e-6)
    low, high = stats.t.interval(0.95, 7, loc=3.5, scale=stats.sem(values))
    assert half_width == pytest.approx((high - low) / 2)
    assert module.interval(values[:7]) is None


def test_a_summary_counts_kilograms_a_day() -> None:
    summary = summarise(by_hand())
    agent = summary["agent"]
    assert agent.co2_kg == 90.0
    assert agent.vs_best == pytest.approx(-4.0)
    assert agent.co2_kg_interval is agent.vs_best_interval is None
    assert agent.gap_closed == pytest.approx((200.0 - 90.0) / (200.0 - 70.0))
    assert agent.self_consumption == pytest.approx(1 - 6 / 40)
    assert agent.curtailed_kwh == pytest.approx(6.0 / 4)
    assert summary["uncontrolled"].peak_import_kw == 7.0
    assert summary["uncontrolled"].gap_closed == 0.0
    assert summary["optimum"].gap_closed == 1.0


def test_all_are_compared_with_the_best_rule_at_ties_the_simpler_one() -> None:
    evaluation = by_hand()
    assert evaluation.best == "rbc_b"
    better = {"rbc_c": figures([79.0, 91.0, 190.0]), "cheap": figures([80.0, 90.0, 190.0])}
    beside = {"rbc_c_true": figures([0.0] * 3), "mpc": figures([1.0] * 3)}
    found = replace(evaluation, policies={**evaluation.policies, **better, **beside})
    assert found.best == "cheap", "none of those that know what is to come, none that plans"
    summary = summarise(found)
    assert summary["agent"].vs_best == summary["rbc_c"].vs_best == 0.0
    assert summary["rbc_b"].vs_best == pytest.approx((376.0 - 360.0) / 4)


def test_costs_are_told_where_there_are_prices_and_weights_where_they_settle() -> None:
    evaluation = by_hand()
    assert summarise(evaluation)["agent"].cost is summarise(evaluation)["agent"].objective is None
    own = figures([80.0, 90.0, 190.0])._replace(cost=np.array([1.0, 2.0, 5.0]))
    policies = {**evaluation.policies, "agent": own}
    priced = replace(evaluation, currency="EUR", policies=policies)
    agent = summarise(priced)["agent"]
    assert (agent.cost, agent.cost_interval, agent.objective) == (2.0, None, None)
    assert summarise(replace(priced, objective=Objective(0.0, 1.0)))["agent"].objective is None
    assert summarise(replace(priced, objective=Objective(1.0, 0.5)))["agent"].objective == 90.0


def test_differences_are_paired() -> None:
    agent = summarise(several(8))["agent"]
    width = 2.364624 * 2.449490 / 8**0.5
    assert agent.co2_kg_interval == pytest.approx(10.0 * width, rel=1e-6)
    assert agent.vs_best_interval == pytest.approx(width, rel=1e-6)


def test_without_a_gap_or_sun_there_is_no_share() -> None:
    evaluation = by_hand()
    same = dict.fromkeys(evaluation.policies, evaluation.policies["optimum"])
    summary = summarise(replace(evaluation, policies=same, pv_kwh=np.zeros(3)))
    assert summary["agent"].gap_closed is None
    assert summary["agent"].self_consumption is None
    for kg, closed in ((199.9, None), (199.7, pytest.approx(1.0))):  # 200 a day without control
        best = figures([kg, kg, 2 * kg])
        near = {**evaluation.policies, "agent": best, "optimum": best}
        assert summarise(replace(evaluation, policies=near))["agent"].gap_closed == closed


def test_a_policy_below_the_optimum_is_named_with_its_stretch() -> None:
    evaluation = by_hand()
    assert violations(evaluation) == []
    evaluation.policies["rbc_b"].co2_kg[1] = 70.0 - 1e-7
    assert violations(evaluation) == []
    evaluation.policies["rbc_b"].co2_kg[1] = 69.0
    assert violations(evaluation) == [
        "2025-01-02: rbc_b emits 69.000000 kg, the optimum 70.000000 kg"
    ]


# --- evaluate ------------------------------------------------------------------------------------

WEEK_AND_DAY = ((2, 4), (6, 7))


def nine_days(seed: int, **kwargs: Any) -> Site:
    return random_site(seed, steps=9 * 24, stretches=WEEK_AND_DAY, **kwargs)


def test_a_stretch_is_its_meter_and_what_it_leaves() -> None:
    site = nine_days(4, battery=battery(20.0, 6.0, 0.9, 0.1, 0.9), load_kw=3.0)
    found = evaluate(rbc_b, site)
    assert found.days == ("2025-03-03", "2025-03-07")
    assert found.n_days.tolist() == [2, 1]
    assert found.hours.tolist() == [48.0, 24.0]
    names = ["uncontrolled", "rbc_a", "rbc_b", "cheap", "rbc_c", "optimum"]
    assert list(found.policies) == ["agent", *names]
    soc = start_soc(site)
    for (begin, end), own, played in zip(
        site.stretch_bounds.tolist(),
        np.stack(found.policies["agent"]).T,
        play(priced_model(site), rbc_b, site, site.stretch_bounds),
        strict=True,
    ):
        standard_kg = tail_objective(site, end, soc * 20.0, site.owed_on_arrival_kwh(end))
        left_kg = tail_objective(site, end, played.stored_kwh, played.owed_kwh)
        figure = Figures(*own)
        assert figure.settlement == pytest.approx(left_kg - standard_kg, abs=1e-5)
        assert figure.co2_kg == pytest.approx(
            played.schedule.co2_kg.sum() + left_kg - standard_kg, abs=1e-5
        )
        assert figure.grid_import_kwh == pytest.approx(played.schedule.grid_import_kw.sum())
        assert len(played.schedule.co2_kg) == end - begin
    assert [len(plan.co2_kg) for plan in found.schedules["optimum"]] == [48, 24]
    again = evaluate(rbc_b, site, references=found)
    assert again.policies["optimum"] is found.policies["optimum"]


def test_what_may_be_missing_may_all_be_missing() -> None:
    """No battery, no vehicles, no sun, a stretch that ends with the series and has no tail."""
    site = hand_site(3 * 24, load_kw=1.0, carbon=0.5, stretches=[(1, 3)])
    found = evaluate(None, site)
    assert found.standard.tolist() == [0.0]
    assert {name: own.co2_kg.tolist() for name, own in found.policies.items()} == {
        name: [pytest.approx(24.0)]
        for name in ("uncontrolled", "rbc_a", "rbc_b", "rbc_c", "optimum")
    }
    assert violations(found) == []


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_no_policy_passes_the_bound_and_uncontrolled_owes_nothing(seed: int, grid: bool) -> None:
    """Random and bang-bang actions beside the rules, on sites with some of everything or less."""
    generator = torch.Generator().manual_seed(seed)

    def anything(model: SiteModel, state: State) -> Tensor:
        action = 2.0 * torch.rand(2, 2, generator=generator) - 1.0
        return action if seed % 2 else action.sign()

    site = nine_days(seed)
    if site.battery:
        site = replace(site, battery=replace(site.battery, may_charge_from_grid=grid))
    # Both stretches have a day, so that they are played side by side.
    found = evaluate(anything, replace(site, stretches=np.array([[2, 3], [6, 7]])))
    assert violations(found) == []
    if site.grid_kw > 1e5:  # where no limit binds
        assert found.policies["uncontrolled"].settlement == pytest.approx(0.0, abs=1e-5)
    assert found.tolerance.max() < 0.01


def test_a_schedule_says_what_its_figures_say() -> None:
    own = battery(20.0, 6.0, 0.9, 0.1, 0.9)
    site = nine_days(4, battery=own, load_kw=3.0)
    found, soc = evaluate(None, site), start_soc(site)
    net_kw = site.load_kw - site.pv_kw
    for name, plans in found.schedules.items():
        for i, (begin, end) in enumerate(site.stretch_bounds.tolist()):
            plan, figures = plans[i], Figures(*np.stack(found.policies[name])[:, i])
            grid_kw = net_kw[begin:end] + plan.ev_kw + plan.battery_kw
            assert plan.grid_import_kw - plan.curtailed_kwh == pytest.approx(grid_kw, abs=1e-4)
            inside_kw = np.where(plan.battery_kw > 0, 0.9, 1 / 0.9) * plan.battery_kw
            stored_kwh = 20.0 * np.diff(plan.soc, prepend=soc)
            assert stored_kwh == pytest.approx(inside_kw, abs=1e-4), name
            meter_kg = plan.grid_import_kw @ site.carbon_kg_per_kwh[begin:end]
            assert figures.co2_kg - figures.settlement == pytest.approx(meter_kg, abs=1e-4)
            assert figures.grid_import_kwh == pytest.approx(plan.grid_import_kw.sum())
            assert figures.curtailed_kwh == pytest.approx(plan.curtailed_kwh.sum())
            assert figures.peak_import_kw == plan.grid_import_kw.max()


def at_the_end(rule: Rule, ends: list[int], steps: int, trick: tuple[float, float]) -> Rule:
    """Do as the rule does, but for the last steps of a stretch; NaN: also there."""
    instead = torch.tensor(trick)

    def tricky(model: SiteModel, state: State) -> Tensor:
        left = torch.tensor(ends) - state.place
        late = ((left <= steps) & (left > 0))[:, None] & ~instead.isnan()
        action = rule(model, state)
        assert isinstance(action, Tensor)
        return torch.where(late, instead.nan_to_num(), action)

    return tricky


@functools.cache
def tricked() -> Site:
    """Two weeks of the shipped site, which are played side by side."""
    site = shipped()
    return replace(site, stretches=site.stretches[[0, 5]])


@functools.cache
def references() -> Evaluation:
    return evaluate(None, tricked())


@pytest.mark.parametrize(
    "trick",
    [
        pytest.param((np.nan, 1.0), id="fill"),
        pytest.param((np.nan, 0.0), id="hold", marks=pytest.mark.slow),
        pytest.param((np.nan, -1.0), id="dump", marks=pytest.mark.slow),
        pytest.param((1.0, np.nan), id="charge all", marks=pytest.mark.slow),
        pytest.param((-1.0, np.nan), id="defer all"),
    ],
)
def test_a_trick_in_the_last_hours_gains_nothing(trick: tuple[float, float]) -> None:
    site = tricked()
    plain, ends = references(), site.stretch_bounds[:, 1].tolist()
    for hours in (2, 8):
        rule = at_the_end(rbc_b, ends, site.steps(hours), trick)
        own = evaluate(rule, site, references=plain)
        gain = plain.policies["rbc_b"].co2_kg - own.policies["agent"].co2_kg
        assert (gain <= 2e-4 * plain.policies["rbc_b"].co2_kg).all()


def test_unmet_is_what_charging_on_arrival_would_have_served() -> None:
    hurried = (0, 30, 32, 20.0, 5.0)  # of 20 kWh it can take 10
    found = evaluate(None, hand_site(96, sessions=[hurried], stretches=[(1, 2)]))
    assert found.unavoidable_kwh.tolist() == pytest.approx([10.0])
    for name, own in found.policies.items():
        assert own.unmet_kwh.tolist() == [0.0], name


def test_what_must_be_charged_is_counted_where_the_connection_is_too_weak() -> None:
    hurried = (0, 30, 32, 9.8, 5.0)
    site = hand_site(96, load_kw=1.0, limit_kw=4.0, sessions=[hurried], stretches=[(1, 2)])
    found = evaluate(None, site)
    assert found.policies["rbc_b"].over_limit_kwh == pytest.approx([9.8 + 2.0 - 2 * 4.0])
    roomy = replace(site, import_limit_kw=np.full(96, 6.0))
    assert not evaluate(None, roomy).policies["rbc_b"].over_limit_kwh.any()


def test_who_finds_no_socket_is_said() -> None:
    turned_away_kwh, clipped_kwh = np.zeros(96), np.zeros(96)
    turned_away_kwh[[3, 30, 47]], clipped_kwh[[24, 48]] = 5.0, 1.0
    site = hand_site(96, load_kw=1.0, stretches=[(1, 2)])
    found = evaluate(None, replace(site, turned_away_kwh=turned_away_kwh, clipped_kwh=clipped_kwh))
    assert found.turned_away_kwh.tolist() == [10.0]
    assert found.clipped_kwh.tolist() == [1.0]


def test_actions_that_are_no_numbers_are_said() -> None:
    def diverged(model: SiteModel, state: State) -> Tensor:
        return torch.full((len(state.place), 2), torch.nan)

    with pytest.raises(UserError, match="training diverged"):
        evaluate(diverged, nine_days(4, battery=battery()))


# --- what is kept --------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the beginnings of the programs that are solved."""
    solved: list[int] = []
    solve = kept.optimum

    def noted(site: Site, begin: int, *rest: Any) -> Best:
        solved.append(begin)
        return solve(site, begin, *rest)

    monkeypatch.setattr(kept, "optimum", noted)
    return solved


def test_the_optimum_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved, keep = counted(monkeypatch), tmp_path / "references"
    site = nine_days(4, battery=battery(20.0))
    first = evaluate(None, site, keep=keep)
    assert len(solved) == 2
    again = evaluate(None, nine_days(4, battery=battery(20.0)), keep=keep)
    assert len(solved) == 2
    for name in first.policies:
        assert np.array_equal(first.policies[name], again.policies[name])
    for one, other in zip(first.schedules["optimum"], again.schedules["optimum"], strict=True):
        assert np.array_equal(one, other)
    assert not [name for name in tree(keep) if name.endswith(".tmp")]
    # Another battery, other stretches: another question.
    evaluate(None, nine_days(4, battery=battery(21.0)), keep=keep)
    evaluate(None, replace(site, stretches=np.array([[2, 4]])), keep=keep)
    assert len(solved) == 5
    assert len(list(keep.glob("*.bounds"))) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-8],
        lambda data: data + b"more",
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        lambda data: bytes(32) + data[32:],
    ],
    ids=["empty", "short", "long", "a bit", "foreign"],
)
def test_what_is_damaged_is_computed_anew(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved, site = counted(monkeypatch), nine_days(4)
    first = evaluate(None, site, keep=tmp_path)
    (file,) = tmp_path.glob("*.bounds")
    good = file.read_bytes()
    file.write_bytes(damage(good))
    again = evaluate(None, site, keep=tmp_path)
    assert len(solved) == 4
    assert np.array_equal(first.policies["optimum"], again.policies["optimum"])
    assert file.read_bytes() == good


def test_a_place_that_cannot_be_written_costs_the_keeping_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    site = nine_days(4)
    assert violations(evaluate(None, site, keep=tmp_path / "file")) == []
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    assert violations(evaluate(None, site, keep=tmp_path / "link")) == []
    assert not list((tmp_path / "elsewhere").iterdir())
