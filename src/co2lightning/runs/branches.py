"""Whole run directories: moved to the archive, gone back in, started from another one.

The logs go along. Whatever is moved is put in its place in one step, and nothing is deleted here
that does not stand there; an empty file `archive/.<name>.keeps-<episode>` says that a run is being
archived, to go on here with what is up to that episode. So a cut changes nothing, or `finish`
does the rest.
"""

import contextlib
import errno
import filecmp
import os
import re
import stat
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path

from co2lightning.errors import UserError
from co2lightning.runs.files import (
    discard,
    instead_of_file,
    read_file,
    sync_directory,
    write_atomic,
)
from co2lightning.runs.ledger import EPISODE_PATTERN, Ledger, parse_record
from co2lightning.runs.reading import (
    Layout,
    file_row,
    load_file,
    load_newest,
    local_file,
    read_checked,
    read_ledger,
)
from co2lightning.runs.seal import Damaged
from co2lightning.runs.writer import write_json

ROOM_IN_NAMES = 55  # bytes that an archive's name and its temporary ones add to a run's


def archive(layout: Layout) -> Path | None:
    """Move a run and its logs to the archive; returns the archived run if there was one."""
    is_run = is_filled(layout.directory)
    if not is_run and not (layout.logs and is_filled(layout.logs)):
        return None
    target = _put_away(layout, 0)
    return target if is_run else None


def branch(layout: Layout, episode: int) -> Path | None:
    """Archive a run, then drop what is later than `episode`; None if there is nothing later."""
    load_file(layout.path(episode))
    read_checked(layout, "episode", episode)
    ledger = read_ledger(layout)
    if layout.episodes()[-1] == episode:
        return None
    ledger.close_dead()
    write_json(layout, ledger)
    return _put_away(layout, episode)


def adopt(layout: Layout, source: Path, logs: Path | None) -> None:
    """Start a run from a file of another directory: link or copy its episodes up to that one."""
    if is_filled(layout.directory):
        raise UserError(f"{layout.directory} is not empty; archive it first")
    source = local_file(source)
    content, record, data = load_file(source)
    last = parse_record(source, record, "episode")
    other = Layout(source.parent)
    if other.path(last).name == source.name:
        ledger = read_ledger(other)
        ledger.trim(last)
    else:
        ledger = Ledger(record["agent"])
    if last not in ledger.episodes:
        ledger.add(record, file_row(data, record))
    ledger.close_dead()
    ledger.mark_missing(last, last)
    pieces = [other.replay_path(number) for number in other.pieces() if number <= last]
    paths = [*map(other.path, ledger.kept()), *pieces]
    files = {path.relative_to(other.directory).as_posix(): path for path in paths}
    files[other.path(last).name] = source
    with contextlib.suppress(Damaged, OSError):  # a run of an older version has none
        read_checked(other, "start", 0, agent=record["agent"])
        files[other.path(0).name] = other.path(0)
    with _building(layout.directory) as place:
        _share(files, place)
        write_json(Layout(place), ledger, content["run"])
    if logs and layout.logs and not is_filled(layout.logs):
        with _building(layout.logs) as place:
            _share(_files_in(logs), place)


def _put_away(layout: Layout, episode: int) -> Path:
    """Archive a run and its logs, and keep here what is up to `episode`."""
    name = f"{layout.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    number, free = 1, name
    while any(os.path.lexists(place) for _, place in _archives(layout, free)):
        number += 1
        free = f"{name}-{number}"
    target = layout.directory.parent / "archive" / free
    target.parent.mkdir(exist_ok=True)
    note = target.parent / f".{target.name}.keeps-{episode}"
    os.close(os.open(note, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    sync_directory(target.parent)
    _carry_out(layout, target, episode)
    note.unlink()
    return target


def _carry_out(layout: Layout, target: Path, episode: int) -> None:
    """Archive what is not yet in the archive, then drop it here; may be done again."""
    archives = _archives(layout, target.name)
    for source, place in archives:
        if is_filled(source) and not os.path.lexists(place):
            _transfer(source, place, keep=episode > 0)
    if episode:
        ledger = read_ledger(layout)
        ledger.trim(episode)
        for number in sorted({*layout.episodes(), *layout.pieces()}, reverse=True):
            if number > episode:
                for path in (layout.path(number), layout.replay_path(number)):
                    _delete_copy(path, target / path.relative_to(layout.directory))
        newest = load_newest(layout)[1]
        write_json(layout, ledger, newest and newest["run"])
        return
    for source, place in archives:
        for name, path in _files_in(source).items():
            _delete_copy(path, place / name)
        for directory, _, _ in os.walk(source, topdown=False):
            with contextlib.suppress(OSError):  # a link, a disk, not empty
                os.rmdir(directory)


def _archives(layout: Layout, name: str) -> list[tuple[Path, Path]]:
    """Return the run directory and the logs, each with the place of that name to archive it."""
    places = [place for place in (layout.directory, layout.logs) if place is not None]
    return [(place, place.parent / "archive" / name) for place in places]


def half_archived(layout: Layout) -> Path | None:
    """Return the archive of a run that was cut off when all was in it; `finish` goes on."""
    for _, target, _ in _notes(layout):
        if any(os.path.lexists(place) for _, place in _archives(layout, target.name)):
            return target
    return None


def finish(layout: Layout) -> list[str]:
    """End what was cut off; returns a line for each archive."""
    for stage in _stages(layout):
        discard(stage)
    ended: list[str] = []
    for note, target, episode in _notes(layout):
        if half_archived(layout) == target:
            _carry_out(layout, target, episode)
            what = f"the episodes after {episode} were" if episode else "the run was"
            ended.append(f"The last start was cut off; {what} moved to {target}")
        discard(note)
    return ended


def unfinished(layout: Layout) -> list[Path]:
    """Return the files and directories that a cut left beside the run and in the archive."""
    return _stages(layout) + [note for note, _, _ in _notes(layout)]


def _notes(layout: Layout) -> list[tuple[Path, Path, int]]:
    """Return what a cut `_put_away` left: its note, its target, the episode it goes back to."""
    note = re.compile(rf"\.({_archive_name(layout)})\.keeps-(\d{{1,6}})", re.ASCII)
    place = layout.directory.parent / "archive"
    found = map(note.fullmatch, sorted(os.listdir(place)) if place.is_dir() else [])
    return [(place / m[0], place / m[1], int(m[2])) for m in found if m]


def _stages(layout: Layout) -> list[Path]:
    """Return what a cut `adopt`, `archive` or `branch` left half built."""
    own = re.compile(rf"\.{_archive_name(layout)}\.tmp", re.ASCII)
    found: list[Path] = []
    for source, place in _archives(layout, "any"):
        names = os.listdir(place.parent) if place.parent.is_dir() else []
        found += [place.parent / name for name in names if own.fullmatch(name)]
        found += filter(os.path.lexists, [source.parent / f".{layout.name}.tmp"])
    return found


def _archive_name(layout: Layout) -> str:
    return rf"{re.escape(layout.name)}-\d{{8}}T\d{{6}}Z(?:-\d+)?"


def is_filled(directory: Path) -> bool:
    """Say whether a directory holds files; a prepared one, empty or with lost+found, does not."""
    return bool(_files_in(directory))


@contextlib.contextmanager
def _building(target: Path) -> Generator[Path]:
    """Give a directory to build in, then put it in the place of `target` in one step.

    Where `target` is a link or a disk of its own, it stays and is what is built in.
    """
    try:
        if target.is_dir():
            target.rmdir()
    except OSError:
        yield target
        return
    stage = target.parent / f".{target.name}.tmp"
    if os.path.lexists(stage):
        discard(stage)
    stage.mkdir(parents=True)
    try:
        yield stage
        os.rename(stage, target)
    except BaseException:
        with contextlib.suppress(OSError):
            discard(stage)
        raise
    sync_directory(target.parent)


def _files_in(directory: Path) -> dict[str, Path]:
    """Return the regular files below a directory under their names in it."""
    found: dict[str, Path] = {}
    for place, _, names in os.walk(directory):
        paths = (Path(place, name) for name in sorted(names))
        regular = (path for path in paths if stat.S_ISREG(path.lstat().st_mode))
        found |= {path.relative_to(directory).as_posix(): path for path in regular}
    return found


def _share(files: dict[str, Path], place: Path) -> None:
    """Link files into a directory, or copy them where that cannot be; a run's episodes last."""
    for name in sorted(files, key=lambda name: (bool(EPISODE_PATTERN.fullmatch(name)), name)):
        if instead_of_file(files[name]):
            continue
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(files[name], path)
        except OSError:  # another disk, or one without links
            write_atomic(path, read_file(files[name]))
    for directory in {(place / name).parent for name in files}:
        sync_directory(directory)


def _transfer(source: Path, target: Path, *, keep: bool) -> None:
    """Bring all of a directory to `target` in one step, and leave it here where it cannot move."""
    target.parent.mkdir(exist_ok=True)
    if not keep and not source.is_symlink():
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):  # a disk of its own; another disk
                raise
        else:
            sync_directory(target.parent)
            sync_directory(source.parent)
            return
    with _building(target) as place:
        _share(_files_in(source), place)


def _delete_copy(path: Path, original: Path) -> None:
    """Delete a file that stands elsewhere, too, and is not reached there by a link to itself."""
    if os.path.realpath(path) == os.path.realpath(original):
        return
    with contextlib.suppress(FileNotFoundError):
        if path.samefile(original) or filecmp.cmp(path, original, shallow=False):
            path.unlink()
