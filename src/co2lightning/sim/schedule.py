"""Runs of rules and policies: stretches of the series, and the whole of it in one go.

Shapes: P steps of the site, n steps of a run, B runs at once, W stretches, C columns of sockets.
"""

import functools
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from co2lightning.control.rules import Rule, rbc_b
from co2lightning.control.state import Carry, SiteModel, restore
from co2lightning.sim.objective import metered, priced_model
from co2lightning.sim.physics import step
from co2lightning.site.model import DAY_H, Floats, Ints, Site

_Values = TypeVar("_Values")


class _Run(NamedTuple, Generic[_Values]):
    """Runs as they went. Powers are means over a step."""

    ev_kw: _Values
    battery_kw: _Values  # at the AC side, charging positive
    grid_kw: _Values  # at the meter, import positive
    unmet_kw: _Values  # owed to vehicles that left at the end of the step
    misled_kw: _Values  # of it what is due to a wrong announcement
    soc: _Values  # 0-1, at the end of the step
    owed_kw: _Values  # to all vehicles present, at the beginning of the step
    co2_kg: _Values
    cost: _Values  # 0 without prices


Trace = _Run[Tensor]
"""Several runs; every field is [n, B]."""
Course = _Run[Floats]
"""One run; every field is [n]."""


@torch.inference_mode()
def run(model: SiteModel, rule: Rule, carry: Carry, steps: int) -> tuple[Trace, Carry]:
    """Run a rule, or any policy in its form, for some steps.

    Args:
        model: With prices, as `priced_model` makes it.
        rule: Decides.
        carry: Where each run begins.
        steps: n, how many.

    Returns:
        How it went, and where it stands after that.
    """
    columns: list[tuple[Tensor, ...]] = []
    state = restore(model, carry)
    for _ in range(steps):
        following, flows = step(model, state, rule(model, state))
        misled_kw = torch.zeros_like(flows.soc) if flows.misled_kw is None else flows.misled_kw
        flowed = flows.ev_kw, flows.battery_kw, flows.grid_kw, flows.unmet_kw, misled_kw, flows.soc
        columns.append((*flowed, state.owed_kw.sum(1)))
        state = following
    stacked = [torch.stack(column) for column in zip(*columns, strict=True)]
    co2_kg, cost = metered(model, carry.place, stacked[2])
    return Trace(*stacked, co2_kg=co2_kg, cost=cost), state.carry


def start(model: SiteModel, site: Site, places: Ints, soc: Tensor | float) -> Carry:
    """Return runs that begin at places [B], their vehicles owed what charging on arrival leaves.

    Args:
        soc: Of each run [B], or of all.
    """

    def owed_kw(owed_kwh: Callable[[int], Floats]) -> Tensor:
        owed = np.zeros((len(places), model.sockets.shape[-1]))
        for row, place in enumerate(places.tolist()):
            owed[row, : len(kwh)] = (kwh := owed_kwh(place)) / site.step_h
        return torch.as_tensor(owed, dtype=model.zero.dtype, device=model.device)

    return Carry(
        torch.tensor(places, device=model.device),
        torch.as_tensor(soc, device=model.device).to(model.zero.dtype).expand(len(places)).clone(),
        owed_kw(site.told_on_arrival_kwh),
        owed_kw(site.owed_on_arrival_kwh) if site.told else None,
    )


# --- the whole series ----------------------------------------------------------------------------

_SAME_SOC, _SAME_KW = 1e-6, 1e-4  # what rounding may leave between an end and a beginning


@functools.lru_cache(maxsize=8)
@torch.inference_mode()
def through(site: Site, rule: Rule) -> Course:
    """Run a rule through the whole series in one go, from `soc_min`.

    Pieces of a day run side by side, and again where the piece before ended otherwise than was
    assumed, until all ends meet: a battery that was full or empty has forgotten how it began.
    """
    model, per_piece = priced_model(site), site.steps(DAY_H)
    soc = site.battery.soc_min if site.battery else 0.0
    short = site.n_steps % per_piece or min(per_piece, site.n_steps)
    before, after = run(model, rule, start(model, site, np.array([0]), soc), short)
    places = np.arange(short, site.n_steps, per_piece)
    began = start(model, site, places, soc)
    if len(places):
        for first, part in zip(began.parts[1:], after.parts[1:], strict=True):
            first[0] = part[0]
    whole, ended = run(model, rule, began, per_piece)
    while len(moved := _let_ends_meet(model, whole, began, ended)):
        again = Carry(*(part[moved] for part in began.parts))
        trace, stood = run(model, rule, again, per_piece)
        for old, new in zip(whole, trace, strict=True):
            old[:, moved] = new
        for old, new in zip(ended.parts, stood.parts, strict=True):
            old[moved] = new
    columns = [torch.cat([a[:, 0], b.T.flatten()]) for a, b in zip(before, whole, strict=True)]
    return Course(*(column.double().cpu().numpy() for column in columns))


def _let_ends_meet(model: SiteModel, whole: Trace, began: Carry, ended: Carry) -> Tensor:
    """Let each piece begin where the one before it ends; returns which [n] that has moved.

    Where a piece ends follows its beginning one to one unless its battery was full or empty, so
    one pass sees how far a change will reach.
    """
    most, least = model.soc_bounds[:, 0].tolist()
    inside = (whole.soc < most - _SAME_SOC) & (whole.soc > least + _SAME_SOC)
    free = inside.all(0).tolist()
    soc, end = began.soc.tolist(), ended.soc.tolist()
    for i in range(1, len(soc)):
        shift = soc[i - 1] - float(began.soc[i - 1]) if free[i - 1] else 0.0
        soc[i] = min(max(end[i - 1] + shift, min(least, end[i - 1])), max(most, end[i - 1]))
    wanted = torch.tensor(soc).to(began.soc)
    moved = (wanted - began.soc).abs() > _SAME_SOC
    owed = list(zip(ended.parts[2:], began.parts[2:], strict=True))
    for ends, begins in owed:
        moved[1:] |= ((ends[:-1] - begins[1:]).abs() > _SAME_KW).any(1)
    began.soc[moved] = wanted[moved]
    for ends, begins in owed:
        begins[1:] = torch.where(moved[1:, None], ends[:-1], begins[1:])
    return moved.nonzero().flatten()


@functools.lru_cache(maxsize=4)
def start_soc(site: Site) -> float:
    """Return the state of charge with which evaluation begins, 0 without a battery.

    The mean of what RBC B has at the beginnings of the training days when the whole series is run
    in one go from `soc_min`, to 0.01; of what vehicles truly take, so that the same is to be done
    whatever was said.
    """
    site = site.fitted_on or site
    if site.battery is None:
        return 0.0
    soc = np.concatenate([[site.battery.soc_min], through(site.truth, rbc_b).soc])
    return round(float(soc[site.day_bounds[site.training_days]].mean()), 2)


def start_kwh(site: Site) -> float:
    """Return what the battery holds then, 0 without one.

    As the physics holds it: whoever leaves it idle settles at 0.
    """
    return float(np.float32(start_soc(site))) * (site.battery.capacity_kwh if site.battery else 0.0)


# --- stretches -----------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """A stretch as it went; every field is [n]. Powers are means over a step."""

    ev_kw: Floats
    battery_kw: Floats  # at the AC side, charging positive
    grid_import_kw: Floats
    curtailed_kwh: Floats  # PV that found no use
    unmet_kwh: Floats  # owed to vehicles that left at the end of the step
    misled_kwh: Floats  # of it what is due to a wrong announcement
    soc: Floats  # 0-1, at the end of the step; 0 without a battery
    co2_kg: Floats  # of the import
    cost: Floats  # of import less export, in the site's currency; 0 without prices


class Played(NamedTuple):
    """A stretch as it went, and what is left at its end, arrivals of that moment included."""

    schedule: Schedule
    stored_kwh: float
    owed_kwh: Floats  # [C] truly


def play(model: SiteModel, rule: Rule, site: Site, bounds: Ints) -> list[Played]:
    """Run a rule, or any policy in its form, through stretches as evaluation begins them.

    Args:
        model: With prices, as `priced_model` makes it.
        rule: Decides.
        site: Its site.
        bounds: [W, 2] the first place of each stretch and the one after its last.
    """
    played: dict[int, Played] = {}
    lengths = bounds[:, 1] - bounds[:, 0]
    for length in np.unique(lengths).tolist():
        for some in np.array_split(own := np.flatnonzero(lengths == length), -(-len(own) // _ONCE)):
            begun = start(model, site, bounds[some, 0], start_soc(site))
            trace, ended = run(model, rule, begun, length)
            for i, row in enumerate(some.tolist()):
                played[row] = _played(site, trace, ended, i)
    return [played[row] for row in range(len(bounds))]


_ONCE = 64  # stretches; bounds the memory of a long year with many sockets


def _played(site: Site, trace: Trace, ended: Carry, row: int) -> Played:
    step_h = site.step_h
    of = Course(*(column[:, row].double().cpu().numpy() for column in trace))
    owed_kwh = ended.truly_owed_kw[row].double().cpu().numpy() * step_h
    plan = Schedule(
        ev_kw=of.ev_kw,
        battery_kw=of.battery_kw,
        grid_import_kw=np.maximum(of.grid_kw, 0.0),
        curtailed_kwh=np.maximum(-of.grid_kw, 0.0) * step_h,
        unmet_kwh=of.unmet_kw * step_h,
        misled_kwh=of.misled_kw * step_h,
        soc=of.soc,
        co2_kg=of.co2_kg,
        cost=of.cost,
    )
    capacity_kwh = site.battery.capacity_kwh if site.battery else 0.0
    stored_kwh = float(ended.soc[row]) * capacity_kwh
    return Played(plan, stored_kwh, owed_kwh[: len(site.sessions.used_sockets)])
