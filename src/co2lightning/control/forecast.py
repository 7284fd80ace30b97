"""What a signal is expected to be: known ahead, or the site's own forecast from its past.

The own forecast is the usual value of that hour, and how far this day is from it: for each lead a
ridge regression, by the training days, on the deviation from the usual now, over the last hour,
over the last 24 h, and at the target's hour yesterday and a week ago. What a provider says is one
more regressor where it says something: who is wrong on training days is not believed. Rules,
features and MPC look at the same tables, and nobody else looks into the future.

Shapes: P steps of the site, L leads, F = 5 regressors, up to 7 with a provider.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from co2lightning.site.model import DAY_H, REACH_H, Floats, Ints, Site

_RIDGE = 1e-6  # of the mean square of the regressors
_LEAST_LEAD_MINUTES = 15
_SAME = 1e-6  # what is cheaper by less is not
_RARE_H = 1.0  # issues that are further apart count by their age
_ROWS_PER_REGRESSOR = 20  # with fewer a provider is not judged, and not believed


def usual(site: Site, values: Floats, weekends: bool, steps_more: int = 0) -> Floats:
    """Return the mean of the training steps of each slot of the wall clock, as a series.

    Args:
        site: The site.
        values: A signal [P].
        weekends: Whether weekdays and weekends are taken apart, as for a load.
        steps_more: How far the clock goes on beyond the series.

    Returns:
        [P + steps_more].
    """
    slot, weekend = slots(site, steps_more)
    known = site.training_steps
    plain = _means(values, known, slot)
    whole = float(values[known].mean()) if known.any() else 0.0  # for slots that none shows
    plain = np.where(np.isnan(plain), whole, plain)
    if not weekends:
        return plain
    apart = _means(values, known, slot + (int(slot.max()) + 1) * weekend)
    return np.where(np.isnan(apart), plain, apart)


def slots(site: Site, steps_more: int = 0) -> tuple[Ints, Ints]:
    """Return the step of the day and whether it is a weekend, of each step and of some more."""
    more = np.arange(1, steps_more + 1) * np.timedelta64(site.step_minutes, "m")
    local = np.concatenate([site.local, site.local[-1:] + more])
    day = local.astype("datetime64[D]")
    slot = (local - day).astype("timedelta64[m]").astype(np.int64) // site.step_minutes
    return slot, ((day.astype(np.int64) + 3) % 7 >= 5).astype(np.int64)  # 1970-01-01: a Thursday


def _means(values: Floats, known: NDArray[np.bool_], group: Ints) -> Floats:
    """Return the mean of the known steps [P] of each step's group, NaN where there is none."""
    own, n = group[: len(values)][known], int(group.max()) + 1
    counts = np.bincount(own, minlength=n)
    sums = np.bincount(own, values[known], n)
    return np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)[group]


@functools.lru_cache(maxsize=8)
def forecast(site: Site, signal: str) -> Floats:
    """Return what a signal is expected to be [P, L] at each lead after each step.

    Leads are the steps of the next 48 h; below 15-minute steps they are 15 minutes apart, and each
    stands for the steps up to it: it is known when all of these are, as their mean. The price of
    import is put together of carbon's and the price's forecast where either is told of before its
    time, so that what is known of one stays known beside the other.

    Args:
        site: The site.
        signal: Which of its series: "carbon_kg_per_kwh", "load_kw", "pv_kw", "import_price" ...
    """
    told = {*site.known_ahead, *site.provided}
    if signal == "import_price" and told & _PRICED.keys():
        weights = {column: getattr(site.objective, name) for column, name in _PRICED.items()}
        return sum(weight * forecast(site, column) for column, weight in weights.items() if weight)  # pyright: ignore
    column = "export_price_per_kwh" if signal == "export_credit" else signal
    since = site.known_ahead.get(column, "")
    plain = since in ("always", "usual")  # what is left to expect is the usual
    expected = _usual_ahead(site, signal) if plain else _own_forecast(site, signal)
    if since not in ("", "usual"):
        _put_known(site, signal, _known_until(site, since), expected)
    return expected


_PRICED = {"carbon_kg_per_kwh": "co2", "price_per_kwh": "cost"}
"""What the price of import is made of -> by which weight of the objective."""


def _usual_ahead(site: Site, signal: str) -> Floats:
    """Return what is usual at each lead after each step, [P, L]."""
    slots = usual(site, getattr(site, signal), signal == "load_kw", site.steps(REACH_H))
    each = steps_per_lead(site)
    ahead = [slots[lead:][: site.n_steps] for lead in range(each, site.steps(REACH_H) + 1, each)]
    return np.stack(ahead, axis=1)


def _own_forecast(site: Site, signal: str) -> Floats:
    """Return the regression's forecast [P, L], provider's issues among its regressors."""
    values = getattr(site, signal)
    a_day, per_lead = site.steps(DAY_H), steps_per_lead(site)
    leads = np.arange(per_lead, site.steps(REACH_H) + 1, per_lead)
    n = site.n_steps
    slots = usual(site, values, signal == "load_kw", int(leads[-1]))
    off = values - slots[:n]
    known = site.training_steps
    hour, day = (mean_of_last(off, steps) for steps in (site.steps(1.0), a_day))
    day_known = mean_of_last(known.astype(float), a_day) == 1.0
    day_known[: a_day - 1] = False
    now = np.stack([off, hour, day])
    expected = np.empty((n, len(leads)))
    for column, lead in enumerate(leads.tolist()):
        back = -(-lead // a_day) * a_day - lead  # from now to the target's hour on the last day
        week = 7 * a_day - lead
        regressors = np.stack([*now, _before(off, back), _before(off, week)])
        target, there = _before(off, -lead), _before(known.astype(float), -lead)
        good = day_known & (there == 1.0)
        for steps in (back, week):
            good &= _before(known.astype(float), steps) == 1.0
        ahead = slots[lead : lead + n]
        weights = _fitted(regressors[:, good], target[good])
        expected[:, column] = ahead + weights @ regressors
        if signal not in site.provided:
            continue
        said, age_h = provided(site, signal, lead)
        issued = np.floor(np.arange(n) - np.nan_to_num(age_h) / site.step_h + _SAME).astype(
            np.int64
        )
        good &= ~np.isnan(said) & ((issued < 0) | known[np.maximum(issued, 0)])
        # One that is older than any that was right or wrong on training days is not believed.
        says = np.flatnonzero(age_h <= age_h[good].max(initial=-1.0))
        good = good[says]
        more = _of_provider(said[says] - ahead[says], age_h[says], off[says], good)
        regressors = np.concatenate([regressors[:, says], more])
        if good.sum() >= _ROWS_PER_REGRESSOR * len(regressors):
            weights = _fitted(regressors[:, good], target[says[good]])
            expected[says, column] = ahead[says] + weights @ regressors
    return expected


def _fitted(regressors: Floats, target: Floats) -> Floats:
    """Return the weights of a ridge regression."""
    gram = regressors @ regressors.T
    gram += _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.lstsq(gram, regressors @ target, rcond=None)[0]


def provided(site: Site, signal: str, lead: int) -> tuple[Floats, Floats]:
    """Return what the provider's newest issue says of so many steps later, and its age in h, [P].

    Where it says nothing of that step, what it says of the nearest one before it that the lead
    stands for; NaN where it says nothing at all.
    """
    step_s = 60 * site.step_minutes
    place = np.arange(site.n_steps)
    now_s = site.begin_s + step_s * place
    said, age_h = site.provided[signal].newest(place + lead, now_s)
    for back in range(1, steps_per_lead(site)):
        silent = np.flatnonzero(np.isnan(said))
        about = silent + lead - back
        said[silent], age_h[silent] = site.provided[signal].newest(about, now_s[silent])
    return said, age_h


def _of_provider(off: Floats, age_h: Floats, own: Floats, good: NDArray[np.bool_]) -> Floats:
    """Return a provider's regressors [1 or 2, N]: its deviation, and that by age where it matters.

    Less what it is off in the mean of the good rows, and brought to the size of the site's own
    deviation there, so that the ridge treats all alike, whatever a provider's unit.
    """
    if not good.any():
        return off[None]
    off = off - off[good].mean()
    more = np.stack([off, off * age_h]) if np.ptp(age_h[good]) >= _RARE_H else off[None]
    sizes = np.sqrt(np.mean(more[:, good] ** 2, axis=1, keepdims=True))
    return more * np.divide(np.sqrt(np.mean(own[good] ** 2)), sizes, where=sizes > 0, out=sizes)


def _put_known(site: Site, signal: str, until: Ints, expected: Floats) -> None:
    """Write what is known of a signal until some step [P] into its forecast [P, L]."""
    values, each = getattr(site, signal), steps_per_lead(site)
    place = np.arange(site.n_steps)
    for at in range(expected.shape[1]):
        lead = (at + 1) * each
        known = np.flatnonzero(place + lead < until)
        steps = known[:, None] + np.arange(lead - each + 1, lead + 1)
        expected[known, at] = values[steps].mean(axis=1)


def _known_until(site: Site, since: str) -> Ints:
    """Return the first step that is not known ahead at each step, [P]."""
    if since == "always":
        return np.full(site.n_steps, site.n_steps)
    day = site.local.astype("datetime64[D]")
    hours, minutes = map(int, since.split(":"))
    told = site.local - day >= np.timedelta64(60 * hours + minutes, "m")
    days = np.maximum.accumulate(day.astype(np.int64))
    # What has been told stays known when clocks go back.
    last = np.maximum.accumulate(days + told)
    return np.searchsorted(days, last, side="right")


def steps_per_lead(site: Site) -> int:
    """Return how many steps each lead of a site's forecast stands for."""
    return site.steps(_LEAST_LEAD_MINUTES / 60)


def untouched(site: Site) -> NDArray[np.bool_]:
    """Return the training steps [P] whose forecast looks back on nothing held out.

    All training steps where there are none such.
    """
    known = site.training_steps
    clear = known & (mean_of_last(known.astype(float), site.steps(7 * DAY_H)) == 1.0)
    return clear if clear.any() else known


def to_come(values: Floats, steps: int) -> Floats:
    """Return what a perfect forecast of values [P] says of the next so many steps, [P, steps].

    `inf` beyond the series.
    """
    padded = np.concatenate([values[1:], np.full(steps, np.inf)])
    return np.lib.stride_tricks.sliding_window_view(padded, steps)


def cheaper(
    now: Floats, expected: Floats, steps_per_lead: int = 1, unit: float = 1.0
) -> NDArray[np.int16]:
    """Return how many of the next steps are expected to be cheaper than each, [P + 1, n + 1].

    Column k counts among the next k of n = L x `steps_per_lead` steps; the row beyond the series
    is that of its last step.

    Args:
        now: What each step costs [P].
        expected: What the steps of the next L leads are expected to cost [P, L], `inf` where
            nobody knows.
        steps_per_lead: How many steps each lead stands for.
        unit: Of the costs, such that what differs by less than 1e-6 of it is the same.
    """
    each = (expected < now[:, None] - _SAME * unit).repeat(steps_per_lead, axis=1)
    counts = np.zeros((len(now) + 1, each.shape[1] + 1), dtype=np.int16)
    each.cumsum(axis=1, dtype=np.int16, out=counts[:-1, 1:])
    counts[-1] = counts[-2]
    return counts


def mean_of_last(values: Floats, steps: int) -> Floats:
    """Return the mean of each step and those before it, `steps` in all, or what there is.

    Added up within blocks: what is further away leaves no rounding.
    """
    n = len(values)
    blocks = np.pad(values, (0, -n % steps)).reshape(-1, steps)
    until = blocks.cumsum(axis=1).ravel()[:n]
    since = np.zeros_like(blocks)  # of each step what follows it in its block
    since[:, :-1] = blocks[:, :0:-1].cumsum(axis=1)[:, ::-1]
    until[steps:] += since.ravel()[: max(n - steps, 0)]
    return until / np.minimum(np.arange(1, n + 1), steps)


def _before(values: Floats, steps: int) -> Floats:
    """Return the values so many steps earlier, 0 beyond the series; later ones if below 0."""
    shifted, left = np.zeros_like(values), max(len(values) - abs(steps), 0)
    if steps >= 0:
        shifted[steps:] = values[:left]
    else:
        shifted[:left] = values[-steps:]
    return shifted
