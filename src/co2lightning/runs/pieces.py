"""The replay on disk: for each episode a file of what it added to an agent's replay buffer."""

from collections.abc import Generator, Iterable, Mapping

from co2lightning.errors import UserError
from co2lightning.runs.files import write_atomic
from co2lightning.runs.ledger import Episode, Ledger, Row
from co2lightning.runs.reading import Layout, hash_row, read_checked, read_ledger
from co2lightning.runs.seal import Damaged, check_content, load_content, seal_checkpoint


def save_piece(layout: Layout, agent: str, episode: int, content: Row) -> Row:
    """Save the piece of an episode; returns what the episode's own file says of it."""
    data = seal_checkpoint(content, {"kind": "replay", "agent": agent, "episode": episode})
    layout.replay_directory.mkdir(exist_ok=True)
    write_atomic(layout.replay_path(episode), data)
    return hash_row(data)


def load_pieces(
    layout: Layout, known: Mapping[int, Episode], episodes: Iterable[int], allow_partial: bool
) -> Generator[tuple[int, Row]]:
    """Yield each of `episodes` with its piece; `known` is what history says of them."""
    for number in episodes:
        path = layout.replay_path(number)
        try:
            data, _ = read_checked(layout, "replay", number, known.get(number))
            content = load_content(path, data)
        except (Damaged, FileNotFoundError) as error:
            if allow_partial:
                continue
            reason = str(error) if isinstance(error, Damaged) else f"{path} is missing"
            raise UserError(
                f"{reason}: the replay buffer cannot be restored exactly; "
                "--allow_partial_replay goes on without it"
            ) from None
        yield number, content


def verify_pieces(layout: Layout, ledger: Ledger, running: bool) -> list[str]:
    """Return one line for each piece that is missing, damaged or of no episode."""
    problems: list[str] = []
    for number, entry in ledger.episodes.items():
        if entry.file.get("replay") is None or number <= ledger.replay_pruned_to:
            continue
        path = layout.replay_path(number)
        try:
            check_content(path, read_checked(layout, "replay", number, entry)[0])
        except FileNotFoundError:
            if number > read_ledger(layout).replay_pruned_to:  # else pruned while we looked
                problems.append(f"replay/{path.name} is missing")
        except Damaged as error:
            problems.append(f"replay/{path.name} is damaged ({error.reason})")
    if not running:
        orphans = set(layout.pieces()) - ledger.episodes.keys() - {ledger.last + 1}
        names = [layout.replay_path(number).name for number in sorted(orphans)]
        problems += [f"replay/{name} belongs to no episode" for name in names]
    return problems


def needless_pieces(layout: Layout, ledger: Ledger) -> list[int]:
    """Return the pieces of episodes never written, and what a cut pruning has left."""
    return [n for n in layout.pieces() if n > ledger.last or n <= ledger.replay_pruned_to]


def prune_pieces(layout: Layout, ledger: Ledger, last: int) -> None:
    """Delete the pieces up to that of `last`, and say so in the history."""
    for number in range(ledger.replay_pruned_to + 1, last + 1):
        layout.replay_path(number).unlink(missing_ok=True)
    ledger.replay_pruned_to = last
