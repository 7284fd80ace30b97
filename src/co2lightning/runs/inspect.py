"""Say what is wrong with a run and what a cut session left, and put it in order."""

import os

from co2lightning.errors import counted
from co2lightning.runs.branches import finish, half_archived, is_filled, unfinished
from co2lightning.runs.files import instead_of_file, stray, sweep, sync_directory
from co2lightning.runs.ledger import Ledger
from co2lightning.runs.lock import is_held
from co2lightning.runs.pieces import needless_pieces, verify_pieces
from co2lightning.runs.reading import (
    Layout,
    load_newest,
    read_checked,
    read_history,
    read_ledger,
    read_metadata,
)
from co2lightning.runs.seal import Damaged, check_content
from co2lightning.runs.writer import write_json


def verify(layout: Layout) -> list[str]:
    """Check every file; returns one line for each problem, none if all is well."""
    if archived := half_archived(layout):
        return verify(Layout(archived))
    running = is_held(layout.directory)
    if not layout.directory.is_dir():
        return [f"{layout.directory}: no such run"]
    problems = layout.misplaced()
    stored, wrong = read_history(layout)
    problems += wrong
    files = layout.episodes()
    for number in files:
        agent, row = (stored.agent, stored.episodes.get(number)) if stored else (None, None)
        path = layout.path(number)
        try:
            data, _ = read_checked(layout, "episode", number, row, agent)
            check_content(path, data)
        except FileNotFoundError:
            continue  # pruned while we looked
        except Damaged as error:
            problems.append(f"{path.name} is damaged ({error.reason})")
    ledger = read_ledger(layout)
    if started := _check_start(layout, ledger.agent if ledger.episodes else None):
        problems.append(f"{started.path.name} is damaged ({started.reason})")
    deleted = (n for n, e in ledger.episodes.items() if e.deleted and n not in files)
    problems += [f"{layout.path(number).name} is missing" for number in deleted]
    if stored and not running:
        lost = sorted(n for n in stored.kept() if n > ledger.last and n not in files)
        problems += [f"{layout.path(n).name} is in history.json but missing" for n in lost]
    problems += verify_pieces(layout, ledger, running)
    metadata, wrong = read_metadata(layout)
    problems += wrong
    last = metadata.get("last_episode", 0)
    if last > ledger.last and last not in layout.episodes() and not running:
        problems.append(f"metadata.json tells of episode {last}, which is missing")
    return problems


def _check_start(layout: Layout, agent: str | None) -> Damaged | None:
    """Say what is wrong with the file of what a run began with; older runs have none."""
    path = layout.path(0)
    try:
        check_content(path, read_checked(layout, "start", 0, agent=agent)[0])
    except FileNotFoundError:
        return None
    except Damaged as error:
        return error


def leftovers(layout: Layout) -> list[str]:
    """Say in a few words each what a session that was cut off left to the next start."""
    if is_held(layout.directory):
        return []
    if archived := half_archived(layout):
        return [f"being moved to {archived}"]
    found: list[str] = []
    stored, _ = read_history(layout)  # what is wrong with it `verify` says
    if stored:
        if any(session.status == "running" for session in stored.sessions):
            found.append("session not closed")
        if late := [n for n in layout.episodes() if n not in stored.episodes]:
            found.append(f"history.json {counted(len(late), 'episode')} behind")
    ledger = read_ledger(layout)
    if read_metadata(layout)[0].get("last_episode", ledger.last) < ledger.last:
        found.append("metadata.json behind")
    needless = needless_pieces(layout, ledger)
    if ledger.last + 1 in needless:
        found.append("replay piece of the next episode")
    if old := [n for n in needless if n <= ledger.replay_pruned_to]:
        found.append(f"{counted(len(old), 'replay piece')} no longer needed")
    strays = [*stray(layout.directory), *stray(layout.replay_directory), *unfinished(layout)]
    if strays:
        found.append(counted(len(strays), "temporary file"))
    return found


def recover(layout: Layout) -> list[str]:
    """Put a run in order whose lock is held, see `TrainingCheckpoint.recover`."""
    sweep(layout.directory)
    sweep(layout.replay_directory)
    messages = finish(layout)
    messages += _set_aside(layout)
    files = layout.episodes()
    stored, problems = read_history(layout)
    problems += read_metadata(layout)[1]
    newest, _, damaged = load_newest(layout)
    older: list[Damaged] = []
    ledger = read_ledger(layout, older, newest)
    ledger.close_dead()
    # Written first: what is moved or deleted below is missed by nobody if we are killed.
    if is_filled(layout.directory):
        write_json(layout, ledger)
    bad = {error.path for error in damaged}
    started = _check_start(layout, ledger.agent if ledger.episodes else None)
    messages += [_quarantine(layout, started)] if started else []
    for number in needless_pieces(layout, ledger):
        if layout.path(number) not in bad:
            layout.replay_path(number).unlink()
    end = f"continuing after episode {newest}"
    if not newest:
        end = "no good checkpoint is left, starting at episode 1"
    moved = [_quarantine(layout, error) for error in (*older, *damaged)]
    if moved:
        lost = max(files) - newest
        moved[-1] += f", {counted(lost, 'episode') + ' lost, ' if lost else ''}{end}"
    messages += moved
    stored = stored or Ledger("")
    marked = {n for n, e in stored.episodes.items() if e.deleted}
    gone = [n for n, e in ledger.episodes.items() if e.deleted and n not in marked]
    gone += [n for n in stored.kept() if n > newest and n not in files]
    if gone:
        names = ", ".join(layout.path(n).name for n in gone[:5])
        more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
        messages.append(f"{names}{more} missing, {end}")
    return messages + [f"{problem}; rebuilt from the checkpoints" for problem in problems]


def _quarantine(layout: Layout, error: Damaged) -> str:
    """Move a damaged file, and its replay piece, out of the way."""
    place = layout.damaged_directory
    place.mkdir(exist_ok=True)
    for source in dict.fromkeys((layout.replay_directory / error.path.name, error.path)):
        if os.path.lexists(source):
            prefix = "replay_" if source.parent == layout.replay_directory else ""
            number, target = 1, place / f"{prefix}{source.name}"
            while os.path.lexists(target):
                number += 1
                target = place / f"{prefix}{source.stem}-{number}{source.suffix}"
            os.rename(source, target)
    sync_directory(place)
    sync_directory(layout.directory)
    return f"{error.path.name} is damaged ({error.reason}); moved to {place}/"


def _set_aside(layout: Layout) -> list[str]:
    """Move what stands in the place of a file and is none, such as a link, out of the way."""
    files = [layout.history_file, layout.metadata_file]
    files += [*map(layout.path, (0, *layout.episodes())), *map(layout.replay_path, layout.pieces())]
    found = ((path, instead_of_file(path)) for path in files)
    return [_quarantine(layout, Damaged(path, problem)) for path, problem in found if problem]
