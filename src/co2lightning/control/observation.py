"""What a controller knows at the beginning of a step, and nothing it could not know.

Measured now: PV, load, price, battery, vehicles plugged in. Expected: what the site's forecast says
of the next 24 hours, see `forecast`. The price is what the objective makes of an imported kWh, its
CO2 unless it was set otherwise.

Every feature is measured in kW, kWh or what its unit says, and given to the policy in units of its
own spread on this site: (value - centre) / spread. So a network sees numbers of order one on a site
of any size, and a 0 of whatever belongs to a part that the site has not.

Shapes: P steps of the site, L leads of a day, B at once, O features.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.forecast import (
    forecast,
    mean_of_last,
    slots,
    steps_per_lead,
    untouched,
    usual,
)
from co2lightning.control.moves import Moves, MoveTables, move_tables, moves_of, powers_of
from co2lightning.control.outlook import Outlook
from co2lightning.control.rules import Rule
from co2lightning.control.state import Powers, SiteModel, State
from co2lightning.errors import UserError, show
from co2lightning.site.model import DAY_H, Floats, Site


class _Feature(NamedTuple):
    name: str
    meaning: str
    unit: str
    part: str = ""  # of a site; without it the feature is a constant 0


_PRICE_H = 2, 6, 24
_MEAN_H = 2, 6, 24
_NET_H = 1, 2, 4, 8, 24
_SPARE_H = 2, 8, 24  # of them
_WAIT_H = 1.0, 4.0, 10.0


def _price_features() -> list[_Feature]:
    unit, names = "per kWh", list[_Feature]()
    for what in ("mean", "lowest", "highest"):
        for hours in _PRICE_H:
            meaning = f"{what} price expected in the next {hours} h - now"
            names.append(_Feature(f"price_{what}_{hours}_h", meaning, unit))
    for hours in _PRICE_H:
        meaning = f"share of the next {hours} h expected to be cheaper than now"
        names.append(_Feature(f"price_cheaper_{hours}_h", meaning, "-"))
    return names


def _mean_features(signal: str, meaning: str) -> list[_Feature]:
    return [
        _Feature(signal, f"{meaning} now", "kW"),
        _Feature(f"{signal}_unusual", f"{meaning} now - usual at this time", "kW"),
        *(
            _Feature(f"{signal}_{hours}_h", f"{meaning} expected in the next {hours} h - now", "kW")
            for hours in _MEAN_H
        ),
    ]


# Known from the clock, the meters, their past and the forecast; a table row per step.
_EXOGENOUS = (
    _Feature("hour_sin", "sine of the time of day", "-"),
    _Feature("hour_cos", "cosine of the time of day", "-"),
    _Feature("half_day_sin", "sine of twice the time of day", "-"),
    _Feature("half_day_cos", "cosine of twice the time of day", "-"),
    _Feature("weekend", "1 on Saturday and Sunday", "-"),
    _Feature("import_limit", "what may be imported now", "kW"),
    _Feature("price", "what an imported kWh adds to the objective now", "per kWh"),
    _Feature("price_unusual", "price now - usual at this time", "per kWh"),
    _Feature("price_last_day", "price now - mean of the last 24 h", "per kWh"),
    *_price_features(),
    _Feature("credit", "what an exported kWh takes off the objective now", "per kWh"),
    *_mean_features("pv", "PV power"),
    *_mean_features("load", "building load"),
    *(
        _Feature(f"surplus_{h}_h", f"PV above load expected in the next {h} h", "kWh")
        for h in _NET_H
    ),
    *(
        _Feature(f"deficit_{h}_h", f"load above PV expected in the next {h} h", "kWh")
        for h in _NET_H
    ),
)
# The state of the site.
_ENDOGENOUS = (
    _Feature("soc", "battery state of charge", "0-1", "battery"),
    _Feature("charge_limit", "power the battery can take", "kW", "battery"),
    _Feature("discharge_limit", "power the battery can give", "kW", "battery"),
    *(
        _Feature(f"room_{h}_h", f"surplus_{h}_h - room in the battery", "kWh", "battery")
        for h in _SPARE_H
    ),
    *(
        _Feature(f"store_{h}_h", f"energy in the battery - deficit_{h}_h", "kWh", "battery")
        for h in _SPARE_H
    ),
    _Feature("spare_surplus", "surplus_24_h - owed - room in the battery", "kWh"),
    _Feature("spare_store", "energy in the battery - deficit_24_h - owed", "kWh"),
    _Feature("surplus", "PV - load - must", "kW"),
    _Feature("owed", "energy owed to the vehicles present", "kWh", "sockets"),
    *(
        _Feature(f"owed_{h:g}_h", f"share of it that cannot wait {h:g} h", "0-1", "sockets")
        for h in _WAIT_H
    ),
    _Feature("must", "EV power the shield demands", "kW", "sockets"),
    _Feature("solar", "EV power that charges from the surplus", "kW", "sockets"),
    _Feature("cheap", "EV power that charges in cheap hours, sun counted as free", "kW", "sockets"),
    _Feature("could", "EV power the vehicles can take", "kW", "sockets"),
    _Feature("cheap_price", "EV power that charges in hours cheap without sun", "kW", "sockets"),
)
FEATURES: tuple[_Feature, ...] = _EXOGENOUS + _ENDOGENOUS
NAMES = tuple(feature.name for feature in FEATURES)

HIGHEST = 10.0
"""The largest an observed feature gets: what is beyond, a step in a thousand, is clamped."""

_LITTLE = 0.1  # of a socket's power
_RARE = 0.999  # this share of the steps shall not be clamped
_ROUNDING = 1e-9  # relative, of sums over a long series
_SAME = 1e-6  # what is cheaper by less is not
_ROWS_AT_ONCE = 4096


class Observer(NamedTuple):
    """The tables `observe` looks things up in, on the model's device."""

    moves: MoveTables
    exogenous: Tensor  # [len(_EXOGENOUS) + 6, P + 1], each step at its place in the model's tables
    scale: Tensor  # [O, 1] from kW and shares to features as they are observed
    shift: Tensor  # [O, 1]
    high: Tensor  # [O, 1]
    wait_steps: Tensor  # [3, 1, 1] of "cannot wait 1 hour", 4 and 10 hours
    little_kw: Tensor  # 0-dim, what hardly counts as owed: shares of it mean little
    centre: tuple[float, ...]  # O, in the features' units: observed is (value - centre) / spread
    spread: tuple[float, ...]  # O, in the features' units; 0 of what is always observed as 0
    chosen: Tensor | None = None  # of all features those that are given, in their order; None: all


Record = Callable[[Callable[[State], None]], None]
"""Shows the states that a site comes to when it is run in several ways, on the CPU."""


def build_observer(site: Site, model: SiteModel, outlook: Outlook, record: Record) -> Observer:
    """Build the feature tables of a site, on the CPU.

    Args:
        site: The site.
        model: Its model.
        outlook: What its moves expect.
        record: What the spread of the state's features is found with.
    """
    exogenous, step_h, dtype = _exogenous_features(site), site.step_h, torch.float32
    units = {f.name: step_h if f.unit == "kWh" else 1.0 for f in FEATURES}
    units |= dict.fromkeys((f.name for f in _EXOGENOUS), 1.0)
    units |= {"discharge_limit": -1.0, "surplus": -1.0}
    units |= {f"owed_{hours:g}_h": step_h / hours for hours in _WAIT_H}
    unit = np.array(list(units.values()))
    power_kw = max((sockets.max_kw for sockets in site.sockets), default=1.0)

    def column(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).unsqueeze(1)

    plain = Observer(
        moves=move_tables(site, model, outlook),
        exogenous=_table(site, exogenous),
        scale=column(unit),
        shift=column(np.zeros_like(unit)),
        high=column(np.full_like(unit, np.inf)),
        wait_steps=torch.tensor([[[hours / step_h]] for hours in _WAIT_H], dtype=dtype),
        little_kw=torch.tensor(_LITTLE * power_kw, dtype=dtype),
        centre=(),
        spread=(),
    )
    seen: list[Tensor] = []

    def see(state: State) -> None:
        features = observe(plain, model, state, moves_of(plain.moves, model, state))
        seen.append(features.T[len(_EXOGENOUS) :])

    record(see)
    states = torch.cat(seen, dim=1).double().numpy()
    clear = untouched(site)
    parts = [centre_and_spread(row[clear] for row in exogenous), centre_and_spread(states)]
    centre, spread = np.concatenate(parts, axis=1)
    absent = {"battery": site.battery is None, "sockets": not site.sockets}
    spread[[absent.get(f.part, False) for f in FEATURES]] = 0.0
    gain = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    return plain._replace(
        scale=column(unit * gain),
        shift=column(-centre * gain),
        high=column(np.full_like(unit, HIGHEST)),
        centre=tuple(centre.tolist()),
        spread=tuple(spread.tolist()),
    )


def in_world(observer: Observer, site: Site, model: SiteModel, outlook: Outlook) -> Observer:
    """Return the observer of a site that looks things up in another world of it, on the CPU.

    What it measures in and which moves have a weight stay the site's own.

    Args:
        observer: Of the site itself.
        site: The other world.
        model: That world's.
        outlook: That world's.
    """
    moves = move_tables(site, model, outlook)._replace(mask=observer.moves.mask)
    return observer._replace(moves=moves, exogenous=_table(site, _exogenous_features(site)))


def _table(site: Site, exogenous: Sequence[Floats]) -> Tensor:
    """Return what `Observer` looks up of the exogenous features, each [P]."""
    row = {feature.name: values for feature, values in zip(_EXOGENOUS, exogenous, strict=True)}
    ahead_kw = [row[f"surplus_{hours}_h"] / site.step_h for hours in _SPARE_H]
    ahead_kw += [-row[f"deficit_{hours}_h"] / site.step_h for hours in _SPARE_H]
    table = np.vstack([*exogenous, *ahead_kw], dtype=np.float32, casting="same_kind")
    return torch.as_tensor(np.pad(table, ((0, 0), (0, 1)), mode="edge"))


def give(observer: Observer, names: Sequence[str], who: str = "the agent") -> Observer:
    """Return the observer that gives the features of these names, in this order.

    Args:
        observer: One that gives all.
        names: Of features; () are all.
        who: Was trained on them; begins the message.

    Raises:
        UserError: No site gives one of them.
    """
    if not names or tuple(names) == NAMES:
        return observer
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(
            f"{who}: trained on the observation {show(unknown[0])}, which this version does not "
            "give; train anew"
        )
    return observer._replace(
        chosen=torch.tensor([NAMES.index(n) for n in names], device=observer.scale.device)
    )


def centre_and_spread(values: Iterable[Floats]) -> Floats:
    """Return the mean of each of F features, each [M], and what it is divided by, [2, F].

    That is its standard deviation, or more where it has a long tail, so that no more than a step
    in a thousand is clamped; 0 of a feature that hardly changes.
    """
    found: list[tuple[float, float]] = []
    for feature in values:
        centre = feature.mean()
        tail = np.quantile(np.abs(feature - centre), _RARE) / HIGHEST
        spread = max(feature.std(), tail)
        found.append((centre, spread if spread >= 1e-4 * np.abs(feature).max() else 0.0))
    return np.array(found).T


def observe(observer: Observer, model: SiteModel, state: State, moves: Moves) -> Tensor:
    """Return the observations [B, O] of a state, each feature within its bounds."""
    # Features come first until the end: [B] rows are quick to stack, scale and clamp.
    table = observer.exogenous.index_select(1, state.place)
    exogenous, ahead_kw = table.split_with_sizes([len(_EXOGENOUS), 2 * len(_SPARE_H)])
    owed_kw = state.owed_kw.sum(1)
    # Surplus - room in the battery; energy in the battery - deficit.
    spare_kw = ahead_kw.unflatten(0, (2, -1)) - state.reach_kw.unsqueeze(1)
    # A vehicle with laxity 0 cannot wait for any of its energy, one with 4 h can for all.
    hurry = (observer.wait_steps - state.laxity).relu()
    features = torch.vstack(
        [
            exogenous,
            state.soc,
            state.battery_max_kw,
            state.battery_min_kw,
            spare_kw.flatten(0, 1),
            spare_kw[:, -1] - owed_kw,
            state.need_kw,
            owed_kw,
            (hurry * state.owed_kw).sum(2) / (owed_kw + observer.little_kw),
            moves.socket_kw.sum(2),
        ]
    )
    scaled = torch.addcmul(observer.shift, observer.scale, features)
    bounded = scaled.clamp(-observer.high, observer.high)
    if observer.chosen is not None:
        bounded = bounded.index_select(0, observer.chosen)
    return bounded.T


def as_rule(observer: Observer, act: Callable[[Tensor], Tensor]) -> Rule:
    """Return what acts on observations [B, O], with actions [B, A], in the form of a rule."""

    def rule(model: SiteModel, state: State) -> Tensor | Powers:
        moves = moves_of(observer.moves, model, state)
        action = act(observe(observer, model, state, moves))
        return powers_of(observer.moves, model, state, moves, action)

    return rule


# --- what is known beforehand --------------------------------------------------------------------


def _exogenous_features(site: Site) -> list[Floats]:
    """Return len(_EXOGENOUS) of [P]; a step's value uses what is known at that step only."""
    _, weekend = slots(site)
    since_midnight = (site.local - site.local.astype("datetime64[D]")).astype("timedelta64[m]")
    angle = 2 * np.pi * (since_midnight.astype(np.int64) / 60 + site.step_h / 2) / DAY_H
    return [
        np.sin(angle),
        np.cos(angle),
        np.sin(2 * angle),
        np.cos(2 * angle),
        weekend.astype(np.float64),
        site.import_limit_kw,
        *_price(site),
        site.export_credit,
        *_power(site, "pv_kw", weekends=False),
        *_power(site, "load_kw", weekends=True),
        *_net(site),
    ]


def _leads(site: Site, hours: float) -> int:
    """Return how many leads of the forecast these hours are, at least one."""
    return max(1, round(site.steps(hours) / steps_per_lead(site)))


def _price(site: Site) -> list[Floats]:
    now = site.import_price
    expected = forecast(site, "import_price")[:, : _leads(site, DAY_H)]
    changes = [
        now - usual(site, now, weekends=False),
        now - mean_of_last(now, site.steps(DAY_H)),
    ]
    within = [expected[:, : _leads(site, hours)] for hours in _PRICE_H]
    for summary in (np.mean, np.min, np.max):
        changes += [summary(ahead, axis=1) - now for ahead in within]
    cheaper = [(ahead < now[:, None] - _SAME).mean(axis=1) for ahead in within]
    return [now, *(_plain(site, change, now) for change in changes), *cheaper]


def _power(site: Site, signal: str, *, weekends: bool) -> list[Floats]:
    now = getattr(site, signal)
    expected = forecast(site, signal)
    changes = [now - usual(site, now, weekends)]
    changes += [expected[:, : _leads(site, hours)].mean(axis=1) - now for hours in _MEAN_H]
    return [now, *(_plain(site, change, now) for change in changes)]


def _plain(site: Site, change: Floats, now: Floats) -> Floats:
    """Return a change without what is nothing but rounding, as of a constant signal."""
    most = np.abs(now[site.training_steps]).max(initial=0.0)
    return np.where(np.abs(change) > _ROUNDING * most, change, 0.0)


def _net(site: Site) -> list[Floats]:
    """Return surplus and deficit expected in the next hours in kWh, each [P]."""
    load_kw, pv_kw = forecast(site, "load_kw"), forecast(site, "pv_kw")
    lead_h, a_day = steps_per_lead(site) * site.step_h, _leads(site, DAY_H)
    found = np.empty((2, len(_NET_H), site.n_steps))
    for first in range(0, site.n_steps, _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        net_kw = load_kw[rows, :a_day] - np.maximum(pv_kw[rows, :a_day], 0.0)
        for column, hours in enumerate(_NET_H):
            ahead = net_kw[:, : _leads(site, hours)]
            found[0, column, rows] = lead_h * np.maximum(-ahead, 0.0).sum(axis=1)
            found[1, column, rows] = lead_h * np.maximum(ahead, 0.0).sum(axis=1)
    return list(found.reshape(-1, site.n_steps))
