"""The environment as Gymnasium and as the agents see it."""

import dataclasses
import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import co2lightning  # noqa: F401  registers the id
from co2lightning.control.observation import FEATURES
from co2lightning.control.outlook import outlook_of
from co2lightning.control.rules import Choice, Rule, rbc_b, rbc_c, uncontrolled
from co2lightning.errors import UserError
from co2lightning.sim.days import SiteDays, make_environment
from co2lightning.sim.evaluate import evaluate
from co2lightning.sim.gymnasium import ChargingSiteEnv, ChargingSiteVectorEnv
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import run, start, start_soc, through
from co2lightning.site.model import Site
from small_site import T, random_site, real, shipped, small_site

ID = "co2lightning/ChargingSite-v0"
NAMES = [feature.name for feature in FEATURES]
CLOCK = ("hour_sin", "hour_cos", "half_day_sin", "half_day_cos", "weekend")


@functools.cache
def single() -> gym.Env:
    # Shared by tests in any order, and Gymnasium 1.4's own checker fails for good where the first
    # reset was refused, as for a day that the site does not have. `check_env` sees more anyway.
    return gym.make(ID, disable_env_checker=True)


@functools.cache
def three() -> gym.vector.VectorEnv:
    return gym.make_vec(ID, num_envs=3)


def actions(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1.0, 1.0, shape).astype(np.float32)


# --- Gymnasium -----------------------------------------------------------------------------------


def test_gymnasium_finds_nothing_wrong() -> None:
    check_env(single().unwrapped)


def test_a_day_has_96_steps_and_is_cut() -> None:
    """Time goes on: the last step is truncated, none terminates, and what is seen then is real."""
    env = single()
    obs, info = env.reset(seed=3)
    assert info.keys() == {"day"}
    assert type(info["day"]) is str
    assert info["day"] in np.array(shipped().days)[shipped().training_days]
    for t in range(T):
        assert env.observation_space.contains(obs)
        obs, reward, terminated, truncated, info = env.step(actions(t, 2))
        assert isinstance(reward, float)
        assert set(info) == {"co2_kg", "grid_import_kwh", "curtailed_kwh", "unmet_kwh"}
        assert all(isinstance(value, float) for value in info.values())
        assert (terminated, truncated) == (False, t == T - 1)
    assert env.observation_space.contains(obs)
    env.reset(options={"day": "2025-03-01"})
    for _ in range(T):
        last, *_ = env.step(np.array([1.0, 0.0], np.float32))
    next_day, _ = env.reset(options={"day": "2025-03-02"})
    # Charged on arrival, the vehicles of the next day's beginning stand there as they would.
    same = [NAMES.index(name) for name in (*CLOCK, "pv", "load", "price", "owed", "must")]
    np.testing.assert_allclose(last[same], next_day[same], atol=1e-5)


@pytest.mark.parametrize(("hours", "steps"), [(12, 48), (48, 192), (1.0, 4)])
def test_a_window_is_as_long_as_it_shall_be(hours: float, steps: int) -> None:
    env = gym.make(ID, disable_env_checker=True, hours=hours)
    env.reset(seed=1)
    cut = [env.step(actions(t, 2))[2:4] for t in range(steps)]
    assert cut == [(False, False)] * (steps - 1) + [(False, True)]
    vector = gym.make_vec(ID, num_envs=2, hours=hours)
    vector.reset(seed=1)
    cuts = [vector.step(actions(t, 2, 2))[3].tolist() for t in range(steps)]
    assert cuts == [[False, False]] * (steps - 1) + [[True, True]]


def test_a_held_out_stretch_is_played_as_evaluation_plays_it() -> None:
    site = shipped()
    day, (begin, end) = site.days[int(site.stretches[1, 0])], site.stretch_bounds[1].tolist()
    plan = evaluate(None, site).schedules["uncontrolled"][1]
    env, vector = gym.make(ID, disable_env_checker=True), gym.make_vec(ID, num_envs=2, hours=6)
    assert env.get_wrapper_attr("held_out")[1] == day
    for each, action in ((env, [1.0, 0.0]), (vector, [[1.0, 0.0]] * 2)):
        _, info = each.reset(options={"stretch": day})
        assert (np.array(info["day"]) == day).all()
        steps = [each.step(np.array(action, np.float32)) for _ in range(end - begin)]
        co2_kg = np.array([step[4]["co2_kg"] for step in steps])
        assert np.abs(co2_kg.T - plan.co2_kg).max() < 1e-4
        cut = np.array([step[3] for step in steps])
        assert cut[-1].all()
        assert not cut[:-1].any()
    *_, info = vector.step(np.zeros((2, 2), np.float32))
    assert set(info["day"]) <= set(np.array(site.days)[site.training_days]), "training goes on"
    assert not any(vector.step(np.zeros((2, 2), np.float32))[3].any() for _ in range(23))
    assert vector.step(np.zeros((2, 2), np.float32))[3].all()


def test_held_out_weeks_are_played_in_turn_and_a_seed_begins_with_the_first() -> None:
    site, idle = shipped(), np.array([1.0, 0.0], np.float32)
    env = gym.make(ID, disable_env_checker=True, weeks="held_out", hours=6)
    dates = env.get_wrapper_attr("held_out")
    assert [env.reset()[1]["day"] for _ in dates] == list(dates)
    assert env.reset()[1]["day"] == dates[0]
    for seed in (7, 8):
        assert env.reset(seed=seed)[1]["day"] == dates[0]
    _, info = env.reset()
    assert info["day"] == dates[1]
    begin, end = site.stretch_bounds[1].tolist()
    plan = evaluate(None, site).schedules["uncontrolled"][1]
    steps = [env.step(idle) for _ in range(end - begin)]
    assert [step[3] for step in steps] == [False] * (end - begin - 1) + [True]
    assert not any(step[2] for step in steps)
    assert np.array([step[4]["co2_kg"] for step in steps]) == pytest.approx(plan.co2_kg, abs=1e-4)
    assert env.reset(options={"day": "2025-03-01"})[1]["day"] == "2025-03-01"
    assert env.reset(options={"stretch": dates[5]})[1]["day"] == dates[5]
    assert env.reset()[1]["day"] == dates[2]


def test_a_vector_plays_a_held_out_week_each_and_goes_on_by_itself() -> None:
    env = gym.make_vec(ID, num_envs=3, weeks="held_out")
    dates = env.unwrapped.held_out  # pyright: ignore[reportAttributeAccessIssue]
    _, info = env.reset(seed=[1, 2, 3])
    assert info["day"].tolist() == list(dates[:3])
    idle = np.tile(np.array([1.0, 0.0], np.float32), (3, 1))
    cuts = np.array([env.step(idle)[3] for _ in range(7 * T)])
    assert cuts.sum() == cuts[-1].sum() == 3
    *_, info = env.step(idle)
    assert info["day"].tolist() == list(dates[3:6])
    _, info = env.reset()
    assert info["day"].tolist() == [*dates[6:8], dates[0]], "who is left over begins again"
    _, info = env.reset(seed=1)
    assert info["day"].tolist() == list(dates[:3])


def test_weeks_side_by_side_are_of_one_length() -> None:
    """One of the garage's eleven has 169 hours."""
    site = real("caltech-2019")
    env = gym.make_vec(ID, num_envs=4, site=str(site.directory), weeks="held_out")
    hours = dict(zip(env.unwrapped.held_out, np.diff(site.stretch_bounds).ravel() / 4, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(set(hours.values())) == [168, 169]
    played = [env.reset()[1]["day"].tolist() for _ in range(4)]
    assert {day for days in played for day in days} == set(hours)
    assert all(len({hours[day] for day in days}) == 1 for days in played)
    assert played == sorted(played)


@pytest.mark.parametrize("name", ["caltech-2019", "citylearn-5"])
def test_gymnasium_finds_nothing_wrong_in_held_out_weeks(name: str) -> None:
    directory = str(real(name).directory)
    check_env(gym.make(ID, site=directory, weeks="held_out", disable_env_checker=True).unwrapped)


def test_what_are_no_weeks_is_one_line() -> None:
    with pytest.raises(UserError, match="weeks test: must be training or held_out"):
        gym.make(ID, weeks="test")


def test_what_is_no_held_out_stretch_is_one_line() -> None:
    env, site = single(), shipped()
    day = site.days[int(site.stretches[0, 0]) + 1]
    with pytest.raises(UserError, match=f"no held-out stretch of iquitos begins on {day}; they"):
        env.reset(options={"stretch": day})


@pytest.mark.parametrize("name", ["caltech-2019", "citylearn-5"])
def test_gymnasium_finds_nothing_wrong_without_battery_or_sockets(name: str) -> None:
    env = gym.make(
        ID, site=str(real(name).directory), hours=6, announced=False, disable_env_checker=True
    )
    check_env(env.unwrapped)
    obs, info = env.reset(options={"day": real(name).days[40]})
    assert info == {"day": real(name).days[40]}
    for t in range(24):
        obs, reward, *_ = env.step(actions(t, 2))
        assert env.observation_space.contains(obs)
        assert np.isfinite(reward)


def test_a_seed_gives_the_same_day_again() -> None:
    env = single()

    def play(seed: int) -> np.ndarray:
        rows = [env.reset(seed=seed)[0]]
        rows += [env.step(actions(t, 2))[0] for t in range(10)]
        return np.stack(rows)

    assert np.array_equal(play(5), play(5))
    assert not np.array_equal(play(5), play(6))


def test_without_a_seed_every_reset_is_another_day() -> None:
    env = single()
    env.reset(seed=1)
    assert not np.array_equal(env.reset()[0], env.reset()[0])


def test_a_day_can_be_asked_for() -> None:
    env = single()
    first, info = env.reset(options={"day": "2025-03-01"})
    assert info == {"day": "2025-03-01"}
    again, _ = env.reset(options={"day": "2025-03-01"})
    assert np.array_equal(first, again)
    assert isinstance(env.unwrapped, ChargingSiteEnv)
    co2_kg = sum(env.step(np.array([1.0, 0.0], np.float32))[4]["co2_kg"] for _ in range(T))
    site, day = shipped(), shipped().days.index("2025-03-01")
    whole = through(site, uncontrolled).co2_kg[site.day_bounds[day] : site.day_bounds[day + 1]]
    assert co2_kg == pytest.approx(whole.sum(), rel=1e-5)
    # It begins with the battery that evaluation begins with.
    vector = three()
    assert isinstance(vector.unwrapped, ChargingSiteVectorEnv)
    vector.reset(options={"day": "2025-03-01"})
    state = vector.unwrapped.days.state
    assert state is not None
    np.testing.assert_allclose(state.soc, start_soc(site))


def test_a_day_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"day: 2031-01-01 is not a day of site iquitos.*2025-"):
        single().reset(options={"day": "2031-01-01"})


def test_the_single_environment_is_a_row_of_the_vector() -> None:
    vector, env = three(), single()
    vector.reset(options={"day": "2025-07-09"})
    env.reset(options={"day": "2025-07-09"})
    for t in range(T):
        several = actions(t, 3, 2)
        obs, reward, _, truncated, info = vector.step(several)
        own_obs, own_reward, _, own_truncated, own_info = env.step(several[0])
        np.testing.assert_array_equal(obs[0], own_obs)
        assert reward[0] == own_reward
        assert truncated[0] == own_truncated
        assert info["co2_kg"][0] == own_info["co2_kg"]


def test_the_vector_begins_new_days_by_itself() -> None:
    """NEXT_STEP: the step after the last ignores its actions and returns a reset."""
    vector = three()
    assert vector.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    assert isinstance(vector.unwrapped, ChargingSiteVectorEnv)
    vector.reset(seed=4)
    for _ in range(T - 1):
        obs, _, terminated, truncated, _ = vector.step(actions(0, 3, 2))
        assert not truncated.any()
        assert not terminated.any()
    obs, reward, terminated, truncated, info = vector.step(actions(0, 3, 2))
    assert truncated.all()
    assert not terminated.any()
    assert (reward != 0.0).all()
    assert set(info) == {"co2_kg", "grid_import_kwh", "curtailed_kwh", "unmet_kwh"}
    obs, reward, terminated, truncated, info = vector.step(actions(0, 3, 2))
    assert not (terminated | truncated).any()
    assert (reward == 0.0).all()
    assert info.keys() == {"day"}
    named, _ = vector.reset(options={"day": info["day"][0]})
    clock = [NAMES.index(name) for name in (*CLOCK, "pv", "load", "price", "owed")]
    np.testing.assert_array_equal(obs[0, clock], named[0, clock])
    assert vector.observation_space.contains(np.ascontiguousarray(obs))
    obs, reward, _, _, info = vector.step(actions(0, 3, 2))
    assert len(info["co2_kg"]) == 3


def test_a_vectors_seed_gives_the_same_days_again_also_after_an_autoreset() -> None:
    vector = three()

    def play(seed: int | list[int]) -> np.ndarray:
        rows = [vector.reset(seed=seed)[0]]
        rows += [vector.step(actions(t, 3, 2))[0] for t in range(T + 3)]
        return np.stack(rows)

    assert np.array_equal(play(9), play(9))
    assert not np.array_equal(play(9), play(10))
    several = play([9, 10, 11])
    assert np.array_equal(several, play([9, 10, 11]))
    assert np.array_equal(several[:, :2], play([9, 10, 12])[:, :2])
    assert not np.array_equal(several[:, 2], play([9, 10, 12])[:, 2])


def test_a_seed_keeps_its_days() -> None:
    """From version to version, or runs could not be resumed; training uses `SiteDays.reset`."""
    _, info = three().reset(seed=4)
    assert info["day"].tolist() == ["2025-05-11", "2025-12-25", "2025-03-18"]
    env = SiteDays(shipped(), 3)
    env.reset(4)
    days = [shipped().days[day] for day in drawn_days(env)]
    assert days == ["2025-06-10", "2025-02-12", "2025-09-18"]
    assert env.state is not None
    assert env.state.soc.tolist() == pytest.approx([0.59034097, 0.34285641, 0.1])


def test_a_list_of_seeds_gives_each_copy_the_days_of_the_single_environment() -> None:
    vector, env = three(), single()
    obs, info = vector.reset(seed=[7, 8, 7])
    for copy, seed in enumerate([7, 8, 7]):
        own_obs, own_info = env.reset(seed=seed)
        np.testing.assert_array_equal(obs[copy], own_obs)
        assert info["day"][copy] == own_info["day"]
    _, later = vector.reset()
    assert later["day"].tolist() == [env.reset()[1]["day"], later["day"][1], later["day"][0]]
    assert later["day"][0] != info["day"][0]
    _, mixed = vector.reset(seed=[None, 8, 8])
    assert mixed["day"][0] == env.reset()[1]["day"]
    assert mixed["day"].tolist()[1:] == [info["day"][1]] * 2


@pytest.mark.parametrize("seeds", [[], [1, 2], [1, 2, 3, 4]])
def test_seeds_of_another_number_are_refused(seeds: list[int]) -> None:
    says = f"seed: {len(seeds)} seeds for 3 environments; give one for each, or one number for all"
    with pytest.raises(UserError, match=says):
        three().reset(seed=seeds)


def test_a_site_is_read_and_its_tables_are_made_once() -> None:
    first, second = (gym.make_vec(ID, num_envs=number).unwrapped for number in (1, 2))
    assert isinstance(first, ChargingSiteVectorEnv)
    assert isinstance(second, ChargingSiteVectorEnv)
    assert first.days.site is second.days.site
    assert first.days.model is second.days.model


def test_the_docstring_has_every_feature() -> None:
    for feature in FEATURES:
        assert f" {feature.name} " in str(ChargingSiteVectorEnv.__doc__)


# --- SiteDays ------------------------------------------------------------------------------------


def drawn_days(env: SiteDays) -> list[int]:
    """Return which days the windows begin with."""
    days = np.searchsorted(env.site.day_bounds, env.place.numpy())
    assert (env.site.day_bounds[days] == env.place.numpy()).all(), "no day begins there"
    return days.tolist()


def play(env: SiteDays, action: tuple[float, float]) -> torch.Tensor:
    """Play the running windows to their end; returns the rewards [n, B]."""
    rewards = []
    while env.steps_left:
        rewards.append(env.step(torch.tensor([action]).expand(env.num_envs, 2)).reward)
    return torch.stack(rewards)


def test_no_training_day_comes_twice_before_each_came_once() -> None:
    training = shipped().training_days.tolist()
    days = SiteDays(shipped(), len(training))
    days.reset(0)
    assert sorted(drawn_days(days)) == training
    more = SiteDays(shipped(), len(training) + 50)
    more.reset(0)
    counts = np.bincount(drawn_days(more), minlength=365)
    assert counts[shipped().held_out].sum() == 0
    assert set(counts[training]) == {1, 2}


@pytest.mark.parametrize("hours", [1, 12, 24, 36, 48, 168])
def test_windows_never_meet_held_out_steps(hours: float) -> None:
    site = shipped()
    env = SiteDays(site, 2 * len(site.days), hours=hours)
    env.reset(0)
    begins = np.unique(env.place.numpy())
    assert set(begins) <= set(site.day_bounds[:-1])
    training = site.training_steps
    assert all(training[begin : begin + env.horizon].all() for begin in begins)
    # Every day that can begin one does.
    possible = [
        begin
        for begin in site.day_bounds[site.training_days]
        if begin + env.horizon <= site.n_steps and training[begin : begin + env.horizon].all()
    ]
    assert begins.tolist() == sorted(possible)


def test_a_day_of_23_hours_before_a_held_out_week_begins_no_window() -> None:
    site = small_site(days=5, load_kw=1.0, held_out=[3])
    bounds = np.array([0, 96, 192, 284, 380, 476])  # the third day has 92 steps
    site = dataclasses.replace(site, day_bounds=bounds)
    env = SiteDays(site, 20)
    env.reset(0)
    assert set(drawn_days(env)) == {0, 1, 4}
    shorter = SiteDays(site, 20, hours=23)
    shorter.reset(0)
    assert set(drawn_days(shorter)) == {0, 1, 2, 4}


def test_windows_that_find_no_room_are_refused_in_one_line() -> None:
    site = small_site(days=4, held_out=[1, 3])
    with pytest.raises(UserError, match=r"--env\.hours 25: no window of so many hours"):
        SiteDays(site, 2, hours=25)


@pytest.mark.parametrize("name", ["iquitos", "caltech-2019", "citylearn-5"])
def test_windows_begin_as_the_cheap_rule_has_left_the_site(name: str) -> None:
    """Half of the batteries do, the others begin where the site says; no vehicle is drawn anew."""
    site = shipped(name) if name == "iquitos" else real(name)
    soc, owed_kw = cheap_days(site)
    env = SiteDays(site, 200)
    for seed in (1, 2):
        env.reset(seed)
        state, days = env.state, drawn_days(env)
        assert state is not None
        np.testing.assert_allclose(state.owed_kw, owed_kw[days], atol=1e-3)
        if (battery := site.battery) is None:
            assert not state.soc.any()
            continue
        recorded = np.abs(state.soc.numpy() - soc[days]) < 1e-4
        assert 60 < recorded.sum() < 140
        anew = state.soc.numpy()[~recorded]
        low, high = battery.start_soc_min, battery.start_soc_max
        assert ((anew >= low) & (anew <= high)).all()
        assert anew.std() == pytest.approx((high - low) / 12**0.5, rel=0.25)


def cheap_days(site: Site) -> tuple[np.ndarray, np.ndarray]:
    """Run the cheap rule with greedy battery step by step, and keep the days' beginnings."""
    model = priced_model(site)
    choice = Choice("cheap" if site.sockets else "arrival", greedy=True)
    rule, battery = functools.partial(rbc_c, choice, outlook_of(site)), site.battery
    carry = start(model, site, np.array([0]), battery.soc_min if battery else 0.0)
    soc, owed_kw = [], []
    for steps in np.diff(site.day_bounds[:-1], prepend=0).tolist():
        if steps:
            _, carry = run(model, rule, carry, steps)
        soc.append(carry.soc.item())
        owed_kw.append(carry.owed_kw[0].numpy())
    return np.array(soc), np.stack(owed_kw)


def test_a_window_goes_on_across_a_days_boundary() -> None:
    """What was recorded is where windows begin; one of two days passes the second day by."""
    site = real("caltech-2019")
    one, two = SiteDays(site, 8), SiteDays(site, 8, hours=48)
    two.reset(3)
    one.begin(torch.tensor(drawn_days(two)), two.carry.soc, recorded=True)
    for env in (one, two):
        for _ in range(T + 1 if env is two else T):
            env.step(torch.tensor([[1.0, 0.0]]).expand(8, 2))
    assert two.steps_left == T - 1
    assert not one.steps_left
    behind = SiteDays(site, 8)
    behind.begin(torch.tensor(drawn_days(two)) + 1, two.carry.soc, recorded=True)
    assert (one.carry.owed_kw < behind.carry.owed_kw - 0.1).any(), "charged, where others waited"


def test_a_seed_means_the_same_days_with_and_without_a_battery() -> None:
    parts = {"days": 20, "step_minutes": 60}
    with_one, without = (
        SiteDays(random_site(1, **parts, **other), 8) for other in ({}, {"capacity_kwh": None})
    )
    for env in (with_one, without):
        env.reset(3)
    assert drawn_days(with_one) == drawn_days(without)
    assert len(set(drawn_days(with_one))) == 8


@pytest.mark.parametrize("hours", [6, 24, 48])
@pytest.mark.parametrize("rule", [uncontrolled, rbc_b])
def test_a_window_is_a_stretch_begun_at_that_day(hours: float, rule: Rule) -> None:
    """Step by step the same; who stands there owes what charging on arrival has left."""
    site = shipped()
    env, days, soc = SiteDays(site, 2, hours=hours), torch.tensor([3, 99]), torch.tensor([0.3, 0.6])
    env.begin(days, soc)
    assert env.state is not None
    begun = start(priced_model(site), site, site.day_bounds[days.numpy()], soc)
    assert torch.equal(env.state.owed_kw, begun.owed_kw)
    assert (env.state.owed_kw.sum(1) > 0.0).all()
    for row, day in enumerate(days.tolist()):
        owed_kwh = site.owed_on_arrival_kwh(int(site.day_bounds[day]))
        np.testing.assert_allclose(env.state.owed_kw[row] * 0.25, owed_kwh, rtol=1e-6)
    trace, ended = run(env.model, rule, begun, env.horizon)
    for t in range(env.horizon):
        assert env.state is not None
        result = env.step(rule(env.model, env.state))
        assert torch.equal(env.flows.grid_kw, trace.grid_kw[t])
        assert torch.equal(env.flows.soc, trace.soc[t])
        assert not result.terminated.any()
        assert result.truncated.tolist() == [float(t == env.horizon - 1)] * 2
        assert result.valid.tolist() == [1.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(env.carry.parts, ended.parts, strict=True))


def test_what_is_seen_at_a_windows_end_is_what_a_longer_one_sees_there() -> None:
    site, days, soc = shipped(), torch.tensor([3, 99]), torch.tensor([0.3, 0.6])
    seen = []
    for hours in (24, 48):
        env = SiteDays(site, 2, hours=hours)
        env.begin(days, soc)
        for _ in range(T):
            result = env.step(torch.tensor([[0.2, -0.1], [-0.4, 0.3]]))
        seen.append(result.obs)
    assert torch.equal(*seen)


@pytest.mark.parametrize("kind", ["powers", "moves"])
def test_steps_are_worked_out_alike_one_by_one_and_from_a_carry(kind: str) -> None:
    site = random_site(2, days=3, step_minutes=60)
    one, other = SiteDays(site, 2, action=kind), SiteDays(site, 2, action=kind)
    days, soc = torch.tensor([0, 1]), torch.tensor([0.3, 0.6])
    one.begin(days, soc)
    other.begin(days, soc)
    carry, moves, past = other.carry, other.moves, []
    for t in range(24):
        action = torch.from_numpy(actions(t, 2, one.action_dim))
        result = one.step(action)
        carry, moves, obs, reward, flowed = other.advance(carry, action, moves)
        past.append(flowed)
        assert torch.equal(result.obs, obs)
        assert torch.equal(result.reward, reward)
    other.go_on(carry, torch.stack(past), moves)
    assert other.steps_left == one.steps_left == 0
    for name, total in one.totals().items():
        assert torch.equal(total, other.totals()[name]), name


# --- what a window adds up to --------------------------------------------------------------------


@pytest.mark.parametrize("hours", [12, 24, 48])
def test_metrics_are_those_of_a_day(hours: float) -> None:
    site = shipped()
    env, days = SiteDays(site, 4, hours=hours), torch.arange(4)
    with pytest.raises(RuntimeError, match="no step"):
        env.totals()
    env.begin(days, torch.full((4,), 0.5))
    with pytest.raises(RuntimeError, match="no step"):
        env.totals()
    play(env, (1.0, 0.0))
    steps = env.horizon
    begun = start(env.model, site, site.day_bounds[:4], 0.5)
    trace, _ = run(env.model, uncontrolled, begun, steps)
    totals = env.totals()
    torch.testing.assert_close(totals["co2_kg"], trace.co2_kg.sum(0))
    torch.testing.assert_close(totals["uncontrolled_kg"], trace.co2_kg.sum(0))
    torch.testing.assert_close(totals["curtailed_kwh"], (-trace.grid_kw).relu().sum(0) / 4)
    torch.testing.assert_close(totals["grid_import_kwh"], trace.grid_kw.relu().sum(0) / 4)
    pv_kwh = [site.pv_kw[96 * day : 96 * day + steps].sum() / 4 for day in range(4)]
    np.testing.assert_allclose(totals["pv_kwh"], pv_kwh, rtol=1e-5)
    metrics, share = env.metrics(), hours / 24
    assert metrics["site/co2_vs_uncontrolled"] == pytest.approx(1.0, rel=1e-5)
    for tag, name in (
        ("site/co2_kg", "co2_kg"),
        ("site/uncontrolled_kg", "uncontrolled_kg"),
        ("site/grid_import_kwh", "grid_import_kwh"),
        ("site/curtailment_kwh", "curtailed_kwh"),
    ):
        assert metrics[tag] == pytest.approx(totals[name].mean().item() / share, rel=1e-6), tag
    used = 1.0 - totals["curtailed_kwh"].sum() / totals["pv_kwh"].sum()
    assert metrics["site/self_consumption"] == pytest.approx(used.item(), rel=1e-5)
    assert metrics["site/unmet_kwh"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["iquitos", "caltech-2019", "citylearn-5"])
@pytest.mark.parametrize("hours", [24, 48])
def test_uncontrolled_emits_what_uncontrolled_emits(name: str, hours: float) -> None:
    site = shipped(name) if name == "iquitos" else real(name)
    env = SiteDays(site, 16, hours=hours)
    env.begin(*env.draw(2, 16))
    play(env, (1.0, 0.0))
    assert env.metrics()["site/co2_vs_uncontrolled"] == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("hours", [24, 48])
def test_what_had_been_put_off_before_a_window_is_not_its_fault(hours: float) -> None:
    """Whoever charges that on arrival emits more than uncontrolled, and hardly more by this."""
    site = real("caltech-2019")
    env = SiteDays(site, 64, hours=hours)
    env.reset(2)
    began_kwh = env.carry.owed_kw.sum(1) * site.step_h
    play(env, (1.0, 0.0))
    assert env.metrics()["site/co2_vs_uncontrolled"] == pytest.approx(1.0, abs=0.02)
    mean_kg = site.carbon_kg_per_kwh[site.training_steps].mean()
    assert began_kwh.mean() * mean_kg > 0.02 * env.totals()["uncontrolled_kg"].mean()
    assert env.totals()["unmet_kwh"].max() < 1e-3


def flat_site(**parts: object) -> Site:
    """Two days without sun; a vehicle is there over midnight and can wait."""
    sessions = [(0, 0, 80, 140, 8.0, 2.0)]
    given = {"days": 3, "load_kw": 20.0, "sessions": sessions, "carbon": 0.4}
    return small_site(**(given | parts))  # pyright: ignore[reportArgumentType]


def test_draining_the_battery_by_a_windows_end_gains_nothing() -> None:
    """At a constant intensity what it gave is what it takes to charge it again, losses and all."""
    site = flat_site()
    env, days, soc = SiteDays(site, 1), torch.tensor([0]), torch.tensor([0.7])
    emitted = {}
    for wish in (0.0, -1.0):
        env.begin(days, soc)
        play(env, (1.0, wish))
        emitted[wish] = env.totals()["co2_kg"].item()
    # 24 kWh leave it, 19.2 are given and replace imports, 26.67 charge it again.
    lost_kg = 0.4 * (24.0 / 0.9 - 24.0 * 0.8)
    assert emitted[-1.0] - emitted[0.0] == pytest.approx(lost_kg, rel=1e-4)
    # Nor does filling it: what it holds more than at the beginning is worth nothing.
    env.begin(days, torch.tensor([0.3]))
    play(env, (1.0, 1.0))
    assert env.totals()["co2_kg"].item() > emitted[0.0] + 0.4 * 24.0


def test_deferring_vehicles_beyond_a_windows_end_gains_nothing() -> None:
    env, days, soc = SiteDays(flat_site(), 1), torch.tensor([0]), torch.tensor([0.5])
    emitted, unmet = [], []
    for wish in (1.0, 0.0, -1.0):
        env.begin(days, soc)
        play(env, (wish, 0.0))
        emitted.append(env.totals()["co2_kg"].item())
        unmet.append(env.totals()["unmet_kwh"].item())
    # The window ends at step 96, the vehicle leaves at 140: it owes 8, 5, 0 kWh by then.
    np.testing.assert_allclose(emitted, emitted[0], rtol=1e-6)
    assert unmet == [0.0, 0.0, 0.0]
    assert env.carry.owed_kw.sum().item() * 0.25 == pytest.approx(8.0)


def test_who_was_charged_before_the_window_is_not_charged_again() -> None:
    """Charging on arrival had 8 kWh in 16 steps of 0.5 by midnight: nothing is left."""
    env = SiteDays(flat_site(), 1)
    env.begin(torch.tensor([1]), torch.tensor([0.5]))
    assert not env.carry.owed_kw.any()
    play(env, (-1.0, 0.0))
    assert env.totals()["co2_kg"].item() == pytest.approx(0.4 * 20.0 * 24, rel=1e-5)


@pytest.mark.parametrize(
    ("device", "kept"),
    [
        ("cpu", True),
        pytest.param(
            "cuda",
            False,
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
        ),
    ],
)
def test_only_another_device_drops_the_running_day(device: str, kept: bool) -> None:
    days = SiteDays(shipped(), 1)
    days.begin(torch.tensor([0]), torch.tensor([0.5]))
    days.to(torch.device(device))
    assert (days.state is not None) is kept


def test_no_step_without_a_day() -> None:
    days = SiteDays(shipped(), 1)
    with pytest.raises(RuntimeError, match="no day is running"):
        days.step(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="no day is running"):
        _ = days.carry
    assert days.steps_left == 0


def test_a_day_can_be_differentiated_through_the_environment() -> None:
    days = SiteDays(shipped(), 2)
    weight = torch.zeros(len(FEATURES), 2, requires_grad=True)
    obs = days.begin(torch.tensor([4, 80]), torch.tensor([0.5, 0.4]))
    rewards = list[torch.Tensor]()
    for _ in range(T):
        obs, reward, *_ = days.step((obs @ weight).tanh())
        rewards.append(reward)
    torch.stack(rewards).mean().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert (weight.grad.abs().sum(0) > 0.0).all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_envs": 0}, r"--env\.num_envs 0: must be at least 1"),
        ({"hours": 0.5}, r"--env\.hours 0\.5: must be at least 1 and at most 168"),
        ({"hours": 169}, r"--env\.hours 169: must be at least 1 and at most 168"),
    ],
)
def test_an_environment_needs_days_and_hours(given: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_environment(**given)


def test_a_single_day_has_totals() -> None:
    env = SiteDays(shipped(), 1)
    env.reset(3)
    play(env, (0.0, -1.0))  # the battery is emptied, partly into a surplus
    metrics = env.metrics()
    assert metrics["site/co2_kg"] > 0.0
    assert 0.0 <= metrics["site/self_consumption"] <= 1.0
