"""Model predictive control through held-out stretches: seconds for each day, so side by side.

Every stretch is computed in one of several processes and kept as soon as it is done; what was
interrupted goes on with those that are missing.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from co2lightning.sim.kept import digest_of, find, store
from co2lightning.sim.mpc import mpc
from co2lightning.sim.objective import priced_model
from co2lightning.sim.schedule import Played, Schedule, play, start_soc
from co2lightning.site.model import Site

_FEW_STEPS = 500  # in all: done sooner than a process has started
_FIELDS = len(Schedule._fields)
_KIND = "mpc"


def play_mpc(
    site: Site,
    keep: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
    jobs: int | None = None,
) -> list[Played]:
    """Return how the held-out stretches go under model predictive control.

    Args:
        site: The site.
        keep: Directory where they are kept. One that cannot be read or written costs time alone.
        done: Is told how many are done, after each that is computed.
        jobs: How many processes at most; by default as many as there are cores.
    """
    bounds = [(begin, end) for begin, end in site.stretch_bounds.tolist()]
    keys = [_key(site, begin, end) for begin, end in bounds]
    found: dict[int, Played] = {}
    for row, (begin, end) in enumerate(bounds):
        if played := _find(keep, keys[row], site, end - begin):
            found[row] = played
    missing = [row for row in range(len(bounds)) if row not in found]
    with contextlib.closing(_each(site, bounds, missing, jobs or os.cpu_count() or 1)) as each:
        for row, played in each:
            found[row] = played
            plan = np.stack(played.schedule).ravel()
            numbers = np.concatenate([plan, [played.stored_kwh], played.owed_kwh])
            store(keep, _KIND, keys[row], numbers)
            done(len(found))
    return [found[row] for row in range(len(bounds))]


def _key(site: Site, begin: int, end: int) -> bytes:
    """Return the digest of what a stretch depends on: forecasts know of training days by date."""
    where = np.array([begin, end, start_soc(site)])
    days = site.local.astype("datetime64[m]").astype(np.int64), site.training_steps
    return digest_of(site, where, *days)


def _find(keep: Path | None, key: bytes, site: Site, steps: int) -> Played | None:
    count = _FIELDS * steps + 1 + len(site.sessions.used_sockets)
    if (numbers := find(keep, _KIND, key, count)) is None:
        return None
    plan, stored_kwh, owed_kwh = np.split(numbers, [_FIELDS * steps, _FIELDS * steps + 1])
    return Played(Schedule(*plan.reshape(_FIELDS, steps)), float(stored_kwh[0]), owed_kwh)


# --- processes -----------------------------------------------------------------------------------

_Bounds = Sequence[tuple[int, int]]


def _each(
    site: Site, bounds: _Bounds, rows: Sequence[int], jobs: int
) -> Generator[tuple[int, Played]]:
    """Yield stretches as they are done; in this process where others cannot be had."""
    left, jobs = set(rows), min(jobs, len(rows))
    if jobs > 1 and sum(bounds[row][1] - bounds[row][0] for row in rows) >= _FEW_STEPS:
        with contextlib.suppress(BrokenProcessPool, OSError), _pool(site, jobs) as pool:
            with _no_interrupt():  # a process begins with what is blocked here
                futures = {pool.submit(_of_process, *bounds[row]): row for row in rows}
            for future in as_completed(futures):
                played = future.result()
                left.discard(row := futures[future])
                yield row, played
    if left:
        one = _stretches(site)
        for row in sorted(left):
            yield row, one(*bounds[row])


def _stretches(site: Site) -> Callable[[int, int], Played]:
    model, rule = priced_model(site), mpc(site)
    return lambda begin, end: play(model, rule, site, np.array([[begin, end]]))[0]


@contextlib.contextmanager
def _pool(site: Site, jobs: int) -> Generator[ProcessPoolExecutor]:
    """Give a pool whose processes end with us, whatever ends us."""
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin_process, initargs=(site,))
    try:
        yield pool
        pool.shutdown()
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _no_interrupt() -> Generator[None]:
    """Let Ctrl-C wait; a process that is started meanwhile never gets it: we end it ourselves."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_of_site: dict[str, Callable[[int, int], Played]] = {}
"""In a process of the pool: plays a stretch, under "one"."""


def _begin_process(site: Site) -> None:
    torch.set_num_threads(1)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _of_site["one"] = _stretches(site)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _of_process(begin: int, end: int) -> Played:
    return _of_site["one"](begin, end)
