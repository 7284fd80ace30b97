"""What history should say, worked out from records and names of files, without a disk."""

from typing import Any

from co2lightning.runs.ledger import Ledger, rebuild


def record(episode: int, start: int = 1, **changes: Any) -> dict[str, Any]:
    """Return what the file of an episode says of itself."""
    session = {"session_timestamp": f"session at {start}", "start_episode": start, "device": "cpu"}
    session |= {"duration_seconds": float(episode), "previous_status": changes.pop("before", None)}
    metrics = {"episode": episode, "reward": -1.0}
    whole = {"episode": episode, "metrics": metrics, "session": session, "keep_last": None}
    return whole | {"pruned_to": 0, "replay_pruned_to": 0} | changes


def rebuilt(
    records: list[dict[str, Any]],
    ledger: Ledger | None = None,
    metadata: dict[str, Any] | None = None,
    running: bool = False,
) -> dict[str, Any]:
    by_episode = {record["episode"]: record for record in records}
    rows = {n: {"file": f"episode_{n:04d}.pt", "sha256": "0" * 64, "bytes": 1} for n in by_episode}
    ledger = ledger or Ledger("PPO")
    return rebuild(ledger, list(rows), by_episode, rows, metadata or {}, running).view()


def sessions(history: dict[str, Any]) -> list[tuple[int, int, str]]:
    return [(s["start_episode"], s["end_episode"], s["status"]) for s in history["trainings"]]


def test_sessions_and_how_they_ended_come_from_the_files() -> None:
    files = [record(1), record(2), record(3, 3, before="interrupted"), record(4, 4)]
    assert sessions(rebuilt(files)) == [
        *((1, 2, "interrupted"), (3, 3, "killed"), (4, 4, "killed")),
    ]
    assert sessions(rebuilt(files, running=True))[-1] == (4, 4, "running")
    last = {"session_timestamp": "session at 4", "status": "completed"}
    assert sessions(rebuilt(files, metadata=last))[-1] == (4, 4, "completed")
    assert sessions(rebuilt(files, metadata=last | {"session_timestamp": ""}))[-1][2] == "killed"


def test_a_missing_file_was_pruned_or_deleted_by_hand() -> None:
    rows = rebuilt([record(2), record(5, pruned_to=3)])["checkpoints"]
    assert [(row.get("pruned"), row.get("deleted")) for row in rows] == [
        *((True, None), (None, None), (True, None), (True, True), (None, None)),
    ]
    rows = rebuilt([record(3, keep_last=2)])["checkpoints"]
    assert [(row.get("pruned"), row.get("deleted")) for row in rows[:2]] == [(True, None)] * 2


def test_what_history_knows_stays_and_what_came_after_the_newest_file_goes() -> None:
    ledger = Ledger("PPO")
    for episode in (1, 2, 3):
        ledger.add(record(episode), {"file": f"episode_{episode:04d}.pt"})
    ledger.sessions[0].status = "completed"
    history = rebuild(ledger, [1, 2], {}, {}, {}, False).view()
    assert sessions(history) == [(1, 2, "completed")]
    assert history["total_episodes"] == len(history["checkpoints"]) == 2
