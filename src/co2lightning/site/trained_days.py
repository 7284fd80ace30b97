"""Which days a run was trained on, whatever its site's `held_out` says by now.

Checkpoints and metadata.json hold them under `trained_days`: for each site, by its name, intervals
such as "2025-01-01/2025-01-05"; null where an earlier version trained and did not write them down.
A day that `held_out` names only since then is not held out for this run: a stretch is judged only
if the run was trained on none of its days.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from co2lightning.errors import UserError
from co2lightning.site.model import Site

_INTERVAL = re.compile(r"(\d{4}-\d\d-\d\d)/(\d{4}-\d\d-\d\d)", re.ASCII)


def with_this_session(run: Mapping[str, Any], site: Site) -> dict[str, list[str] | None]:
    """Return the `trained_days` of a run that goes on with a site's training days.

    Args:
        run: What the checkpoint says of the run; empty for a new one.
        site: What it trains on from here.
    """
    known = _trained_days(run)
    trained = seen(run, site)
    if trained is None:
        return known | {site.name: None}
    intervals = known.get(site.name) or []
    new = (trained | ~site.held_out) & ~_within(intervals, site.days)
    days = [site.days[day] for day in np.flatnonzero(new)]
    return known | {site.name: sorted([*intervals, *_as_intervals(days)])}


def seen(run: Mapping[str, Any], site: Site) -> NDArray[np.bool_] | None:
    """Return whether a run was trained on each of a site's days, [D]; None if nobody knows."""
    intervals = _trained_days(run).get(site.name, [])
    if intervals is None and not isinstance(run.get("trained_days"), dict):  # of version 0.1.0
        return ~site.held_out if run["site"].get("sha256") == site.sha256 else None
    return None if intervals is None else _within(intervals, site.days)


def unseen(run: Mapping[str, Any], site: Site) -> tuple[Site, str | None]:
    """Return a site whose stretches are those a run was not trained on, and a remark.

    `held_out` stays as it is: what is worked out from the training days, for all agents, stays too.

    Raises:
        UserError: None is left.
    """
    trained = seen(run, site)
    count = len(site.stretches)
    weeks = _are_weeks(site)
    kind = "weeks" if weeks else "days"
    if trained is None:
        return site, (
            f"Which days of {site.name} the run was trained on was not written down: some of the "
            f"{count} held-out {kind} may be among them"
        )
    left = ~np.array([trained[begin:end].any() for begin, end in site.stretches])
    if not left.any():
        raise UserError(
            f"site.yaml: held_out: the run was trained on {'days of ' if weeks else ''}all {count} "
            f"held-out {kind} of {site.name}; name {kind} that were held out before"
        )
    if not (both := held_out_among(trained, site)):
        return site, None
    return replace(site, stretches=site.stretches[left]), (
        f"The run was trained on {both}; they are left out"
    )


def held_out_among(trained: NDArray[np.bool_], site: Site) -> str:
    """Say which part of a site's stretches days [D] meet that were trained on; "" if none."""
    count = sum(bool(trained[begin:end].any()) for begin, end in site.stretches)
    if not count:
        return ""
    part, kind = (f"days of {count}", "weeks") if _are_weeks(site) else (str(count), "days")
    return f"{part} of the {len(site.stretches)} held-out {kind} of {site.name}"


def _are_weeks(site: Site) -> bool:
    return all(end - begin == 7 for begin, end in site.stretches)


def _trained_days(run: Mapping[str, Any]) -> dict[str, list[str] | None]:
    """Return what a run says of each site; of version 0.1.0 only that it was on the one named."""
    stored, described = run.get("trained_days"), run.get("site")
    if not isinstance(stored, dict):
        stored = {described.get("name"): None} if isinstance(described, dict) else {}
    return {
        str(name): [text for text in texts if isinstance(text, str) and _INTERVAL.fullmatch(text)]
        if isinstance(texts, list)
        else None
        for name, texts in stored.items()
    }


def _within(intervals: Iterable[str], days: Sequence[str]) -> NDArray[np.bool_]:
    """Return whether each of `days`, ascending ISO dates, lies in one of the intervals."""
    within = np.zeros(len(days), dtype=np.bool_)
    for text in intervals:
        first, last = text.split("/")
        within[bisect_left(days, first) : bisect_right(days, last)] = True
    return within


def _as_intervals(days: Sequence[str]) -> list[str]:
    """Return the intervals of ascending ISO dates that follow each other without a gap."""
    dates = np.array(days, dtype="datetime64[D]")
    gaps = np.flatnonzero(np.diff(dates) != np.timedelta64(1, "D"))
    return [f"{part[0]}/{part[-1]}" for part in np.split(dates, gaps + 1) if len(part)]
