"""TrainingCheckpoint in one process: files that verify themselves, history, retention, archive."""

import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from co2lightning.errors import UserError
from co2lightning.runs import seal as sealing
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.runs.seal import Damaged
from conftest import pruned
from forged import seal_zip

WEIGHTS = {"state_dict": {"weight": torch.arange(6000.0)}, "epoch": 3, "loops": {"a": (1, None)}}


def open_run(place: Path, **options: Any) -> TrainingCheckpoint:
    return TrainingCheckpoint(
        place / "checkpoints" / "PPO", logs=place / "lightning_logs" / "PPO", **options
    )


def figures(episode: int, share: float | None = None) -> dict[str, float]:
    values = {"co2_kg": 300.0 - episode, "reward": -400.0 + episode, "time_seconds": 0.4}
    return values if share is None else values | {"co2_vs_uncontrolled": share}


def train(
    place: Path,
    count: int,
    *,
    status: str | None = "completed",
    replay: bool = False,
    capacity: int | None = None,
    shares: dict[int, float] | None = None,
    **options: Any,
) -> TrainingCheckpoint:
    """Run one session of `count` episodes; status None leaves it as a killed process does."""
    run = open_run(place, **options)
    with run.lock():
        run.recover()
        first = run.get_next_episode()
        info = {"agent": "PPO", "seed": 7, "config": {"lr": 3e-4}, "versions": {"torch": "2"}}
        run.begin_session(start_episode=first, device="cpu", info=info)
        for episode in range(first, first + count):
            run.save_checkpoint(
                WEIGHTS,
                episode=episode,
                metrics=figures(episode, (shares or {}).get(episode)),
                replay={"obs": torch.full((5,), float(episode))} if replay else None,
                replay_capacity_episodes=capacity,
            )
        if status is not None:
            run.end_session(status)
    if status is None:
        left = shutil.copytree(run.directory, place / "left")
        run.end_session("failed")
        shutil.rmtree(run.directory)
        left.rename(run.directory)
    return open_run(place, **options)


def assert_sums(run: TrainingCheckpoint) -> None:
    """The product's invariant: sessions' episodes = total = valid files + pruned ones."""
    history = run.load_history()
    total = sum(session["episodes_count"] for session in history["trainings"])
    assert total == history["total_episodes"] == len(run.episodes()) + len(pruned(run))
    assert run.load_metadata()["total_episodes_trained"] == total


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# --- one file -----------------------------------------------------------------------------------


def test_a_file_opens_with_plain_torch_and_has_the_contract_fields(tmp_path: Path) -> None:
    run = train(tmp_path, 2)
    content = torch.load(run.path(2), weights_only=True)
    assert torch.equal(content["state_dict"]["weight"], WEIGHTS["state_dict"]["weight"])
    assert content["episode"] == 2
    assert content["metrics"] == figures(2)
    assert content["run"]["config"] == {"lr": 3e-4}
    assert set(content["session"]) >= {"session_timestamp", "start_episode", "device"}
    assert len(content["timestamp"]) == len("2026-01-24T20:33:32-05:00")
    row = run.load_history()["checkpoints"][1]
    data = run.path(2).read_bytes()
    assert row == {
        "file": "episode_0002.pt",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }


def test_2000_bit_flips_are_all_detected(tmp_path: Path) -> None:
    run = train(tmp_path, 1)
    good = run.path(1).read_bytes()
    tail = [8 * len(good) - 1 - i for i in range(900)]  # the comment and the digest, every bit
    bits = tail + random.Random(0).sample(range(8 * len(good)), 1100)
    target = tmp_path / "flipped.pt"
    for bit in bits:
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        target.write_bytes(data)
        with pytest.raises(Damaged):
            sealing.read_sealed(target)


def test_truncation_at_every_4_kib_and_near_the_end_is_detected(tmp_path: Path) -> None:
    run = train(tmp_path, 1)
    good = run.path(1).read_bytes()
    target = tmp_path / "short.pt"
    for size in {*range(0, len(good), 4096), *range(len(good) - 200, len(good))}:
        target.write_bytes(good[:size])
        with pytest.raises(Damaged):
            run.read(target)
    target.write_bytes(good + b"\0")
    with pytest.raises(Damaged):
        run.read(target)


class Payload:
    """Pickles to a call of os.system that leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def seal(data: bytes) -> bytes:
    """Give a foreign zip a valid seal, as an attacker would."""
    record = {"kind": "episode", "agent": "PPO", "episode": 1, "metrics": {}, "pruned_to": 0}
    record |= {"session": {"session_timestamp": "", "start_episode": 1, "device": "cpu"}}
    record["session"]["duration_seconds"] = 0
    return seal_zip(data, record | {"replay_pruned_to": 0})


def rezip(
    code: bytes | None = None, compression: int = zipfile.ZIP_STORED, **extra: bytes
) -> bytes:
    """Return a torch.save zip with its pickle replaced, or compressed, or with more entries."""
    source, target = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.namelist():
            replacement = code if entry == "archive/data.pkl" else None
            new.writestr(entry, old.read(entry) if replacement is None else replacement)
        for name, data in extra.items():
            new.writestr(f"archive/{name}", data)
    return target.getvalue()


def hostile(marker: Path) -> dict[str, bytes]:
    system = pickle.dumps({"state_dict": Payload(marker)}, protocol=2)
    recent = pickle.dumps({"state_dict": Payload(marker)}, protocol=4)
    return {
        "empty": b"",
        "text": b"hello",
        "bare pickle": system,
        "no seal": rezip(),
        "pickle without seal": rezip(system),
        "pickle": seal(rezip(system)),
        "pickle protocol 4": seal(rezip(recent)),
        "bare pickle with seal": seal(system),
        "bomb": seal(rezip(compression=zipfile.ZIP_DEFLATED, zeros=bytes(10_000_000))),
        "allocation": seal(rezip(b"c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R.")),
        "no dictionary": seal(rezip(b"]q\x00.")),
        "garbage code": seal(rezip(b"\xff\xfe")),
        "deep code": seal(rezip(b"(" * 200_000 + b".")),
        "no entries": seal(b"PK\x05\x06" + bytes(18)),
        "lying directory": seal(rezip()[:-12] + b"\xff" * 8 + bytes(4)),
        "record is a list": rezip()[:-2] + b"\x05\0co2lightning [] sha256=",
    }


@pytest.mark.parametrize("kind", list(hostile(Path("x"))))
def test_a_hostile_file_is_one_line_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    run = train(tmp_path, 1)
    marker = tmp_path / "marker"
    run.path(2).write_bytes(hostile(marker)[kind])
    with pytest.raises(Damaged) as error:
        run.read(run.path(2))
    assert "\n" not in str(error.value)
    assert "episode_0002.pt" in str(error.value)
    latest = run.load_latest_checkpoint()
    assert latest is not None
    assert latest["episode"] == 1
    assert run.verify()
    messages = run.recover()
    assert len(messages) == 1
    assert "continuing after episode 1" in messages[0]
    assert run.verify() == []
    assert not marker.exists()


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 37, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes")
@pytest.mark.parametrize("seal", [False, True])
def test_a_file_larger_than_the_memory_is_one_line(
    command: Callable[..., Any], place: Path, bounded_memory: None, seal: bool
) -> None:
    run = train(place, 1)
    sealed = run.path(1).read_bytes()
    with open(run.path(2), "wb") as file:
        file.write(sealed[:4])
        file.seek(1 << 42)
        file.write(sealed[-80:] if seal else b"end")
    outcome = command("verify")
    assert outcome.code == 1
    if seal:
        assert "episode_0002.pt: larger than the memory" in outcome.err
    else:
        assert "episode_0002.pt is damaged (no checksum at its end" in outcome.out


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("https://example.org/episode_0001.pt", "not a URL"),
        ("s3://bucket/x.pt", "not a URL"),
        ("missing.pt", "No such file"),
        (".", "not a file"),
        ("/dev/null", "not a file"),
        ("nul\0byte", "null"),
    ],
)
def test_what_is_no_local_file_is_refused_in_one_line(path: str, says: str) -> None:
    for given in (path, Path(path)):
        with pytest.raises(UserError, match=says):
            TrainingCheckpoint.read(given)


def test_content_that_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(ValueError, match="plain data"):
        run.save_checkpoint({"path": Path("x")}, episode=1, metrics={})
    assert run.episodes() == []
    run.save_checkpoint(WEIGHTS, episode=1, metrics={"nan": float("nan"), "co2_kg": 1})
    run.end_session("failed")
    assert run.load_history()["trainings"][0]["metrics"] == [
        {"episode": 1, "nan": None, "co2_kg": 1.0}
    ]


def test_reading_history_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    run = train(tmp_path, 2)
    (run.directory / "history.json").unlink()
    code = (
        "import sys; from co2lightning.runs.run import TrainingCheckpoint\n"
        f"run = TrainingCheckpoint({str(run.directory)!r})\n"
        "assert run.load_history()['total_episodes'] == 2; run.load_metadata(); run.verify()\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what file systems lack ---------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_a_lock_is_open_to_whom_the_files_are(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        run = train(tmp_path, 1)
    finally:
        os.umask(before)
    for path in (run.path(1), *tmp_path.glob("*/.PPO.lock")):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_everybody_reads_and_nobody_writes(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import fcntl

    def flock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    run = train(Path(), 2)
    monkeypatch.setattr(fcntl, "flock", flock)
    assert command("history", "PPO").code == 0
    assert command("verify").out == "PPO: ok, 2 checkpoints\n"
    with pytest.raises(UserError, match=r"\.PPO\.lock: this file system has no locks \("):
        run.archive()
    assert run.verify() == run.leftovers() == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
def test_only_a_disk_that_fails_stops_at_the_sync_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            train(tmp_path, 1)
    else:
        assert train(tmp_path, 2, replay=True).verify() == []


# --- history and metadata -----------------------------------------------------------------------


def test_history_and_metadata_say_what_the_contract_says(tmp_path: Path) -> None:
    train(tmp_path, 5, shares={1: 0.9, 2: 0.5, 3: 0.7})
    run = train(tmp_path, 5, status="interrupted")
    history = run.load_history()
    assert history == {
        k: v
        for k, v in json.loads((run.directory / "history.json").read_text()).items()
        if k != "sha256_above"
    }
    assert (history["schema_version"], history["agent"]) == (1, "PPO")
    first, second = history["trainings"]
    assert (first["start_episode"], first["end_episode"], first["episodes_count"]) == (1, 5, 5)
    assert (second["start_episode"], second["end_episode"]) == (6, 10)
    assert [first["status"], second["status"]] == ["completed", "interrupted"]
    assert second["metrics"][0] == {"episode": 6, **figures(6)}
    metadata = run.load_metadata()
    assert metadata["last_episode"] == metadata["total_episodes_trained"] == 10
    assert metadata["best_episode"]["episode"] == 2
    assert metadata["final_metrics"] == figures(10)
    assert (metadata["seed"], metadata["configuration"]) == (7, {"lr": 3e-4})
    assert run.verify() == []
    assert_sums(run)


def test_best_falls_back_to_the_highest_reward(tmp_path: Path) -> None:
    assert train(tmp_path, 4).load_metadata()["best_episode"]["episode"] == 4


def test_an_empty_run_reads_as_one_without_episodes(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    assert run.load_latest_checkpoint() is None
    assert (run.get_next_episode(), run.episodes(), run.recover()) == (1, [], [])
    assert run.load_history()["trainings"] == []
    assert run.load_metadata()["last_episode"] == 0
    assert run.archive() is None
    assert not run.is_running()
    assert not run.directory.exists()


@pytest.mark.parametrize("lost", ["both", "history.json", "metadata.json"])
def test_a_lost_file_is_rebuilt_from_the_episodes(tmp_path: Path, lost: str) -> None:
    train(tmp_path, 3, status="interrupted", replay=True)
    train(tmp_path, 2, status=None)
    run = train(tmp_path, 2, status="completed")
    history, metadata = run.load_history(), run.load_metadata()
    for file in ("history.json", "metadata.json"):
        if lost in ("both", file):
            (run.directory / file).unlink()
    if lost == "both":  # how the last session ended stood only there
        history["trainings"][-1]["status"] = metadata["status"] = "killed"
    for view in (history, run.load_history()):
        for session in view["trainings"]:
            session["duration_seconds"] = 0
    rebuilt = run.load_history()
    for session in rebuilt["trainings"]:
        session["duration_seconds"] = 0
    assert rebuilt == history
    assert run.load_metadata() | {"last_training": 0} == metadata | {"last_training": 0}
    assert len(run.recover()) == (2 if lost == "both" else 1)
    assert run.verify() == []
    assert_sums(run)


def corruptions(text: str) -> list[bytes]:
    """Corrupt JSON, without and with a valid seal."""
    bodies = [
        "{}",
        "[1, 2]",
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "[" * 100_000 + "{}",
        text.replace('"schema_version": 1', '"schema_version": 2'),
        text.replace('"episode_0002.pt"', '"../../../etc/passwd"'),
        text.replace('"episode_0002.pt"', '"/etc/passwd"'),
        text.replace('"episode_0002.pt"', '"episode_0002.pt/../x"'),
        text.replace('"reward": -398.0', '"reward": NaN'),
        text.replace('"reward": -398.0', '"reward": 1e999'),
        text.replace('"reward": -398.0', '"reward": "<script>"'),
        text.replace('"reward": -398.0', '"reward": ' + "9" * 5000),
        text.replace('"reward": -398.0', '"reward": ' + "9" * 4000),
        text.replace('"reward": -398.0', '"reward": {}'),
        text.replace('"start_episode": 1', '"start_episode": true'),
        text.replace('"start_episode": 1', '"start_episode": -1'),
        text.replace('"end_episode": 3', '"end_episode": 4'),
        text.replace('"total_episodes": 3', '"total_episodes": 4'),
        text.replace('"trainings": [', '"trainings": [1,'),
        text.replace('"trainings": [', '"trainings": [], "other": ['),
        text.replace('"checkpoints": [', '"checkpoints": {}, "other": ['),
        text.replace('"status": "completed"', '"status": "fine"'),
        text.replace('"sha256": "', '"sha256": "zz'),
        text.replace('"bytes": ', '"bytes": -'),
        text.replace('"agent": "PPO"', '"agent": 5'),
        text.replace('"agent": "PPO"', '"agent": "' + "x" * 5000 + '"'),
    ]
    sealed = [sealing.seal_json(body) for body in bodies]
    return [b"", b"\0" * 500, b"\xff\xfe", text.encode()[:-50], *map(str.encode, bodies), *sealed]


def test_corrupt_or_hostile_history_is_rebuilt_never_a_traceback(tmp_path: Path) -> None:
    run = train(tmp_path, 3)
    good = run.load_history()
    text = json.dumps(good)
    path = run.directory / "history.json"
    for number, data in enumerate(corruptions(text)):
        path.write_bytes(data)
        history = run.load_history()
        for session in history["trainings"]:
            session["duration_seconds"] = good["trainings"][0]["duration_seconds"]
        assert history == good, f"corruption {number}"
        assert run.verify(), f"corruption {number}"
        messages = run.recover()
        assert any("history.json" in message for message in messages), f"corruption {number}"
        assert run.verify() == []


def test_corrupt_or_hostile_metadata_is_rebuilt_never_a_traceback(tmp_path: Path) -> None:
    run = train(tmp_path, 2)
    good = run.load_metadata()
    path = run.directory / "metadata.json"
    for data in corruptions(json.dumps(good))[:10]:
        path.write_bytes(data)
        assert run.load_metadata()["last_episode"] == 2
        run.recover()
        assert run.verify() == []
    path.write_bytes(sealing.seal_json('{"agent": ["PPO"], "status": {}, "session_timestamp": 5}'))
    (run.directory / "history.json").unlink()
    assert run.load_history()["agent"] == "PPO"
    run.recover()
    assert run.verify() == []


def test_every_bit_flip_of_the_json_files_is_detected(tmp_path: Path) -> None:
    run = train(tmp_path, 2)
    for name in ("history.json", "metadata.json"):
        path = run.directory / name
        good = path.read_bytes()
        bits = random.Random(1).sample(range(8 * len(good)), 300)
        for bit in bits + list(range(8 * len(good) - 800, 8 * len(good))):
            data = bytearray(good)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"."):
                sealing.read_json(path)


# --- damage -------------------------------------------------------------------------------------


def test_damaged_newest_files_are_moved_and_the_cost_is_said(tmp_path: Path) -> None:
    run = train(tmp_path, 7, replay=True)
    flip(run.path(7), 40_001)
    assert run.recover() == [
        f"episode_0007.pt is damaged (checksum differs); moved to {run.directory}/damaged/, "
        "1 episode lost, continuing after episode 6"
    ]
    assert run.get_next_episode() == 7
    run = train(tmp_path, 1, replay=True)
    for episode in (6, 7):
        run.path(episode).write_bytes(b"")
    messages = run.recover()
    assert len(messages) == 2
    assert "2 episodes lost, continuing after episode 5" in messages[-1]
    assert sorted(p.name for p in (run.directory / "damaged").iterdir()) == [
        *("episode_0006.pt", "episode_0007-2.pt", "episode_0007.pt"),
        *("replay_episode_0006.pt", "replay_episode_0007-2.pt", "replay_episode_0007.pt"),
    ]
    assert run.verify() == []
    assert_sums(run)


def test_a_good_file_of_another_episode_or_agent_is_foreign(tmp_path: Path) -> None:
    run = train(tmp_path, 3)
    shutil.copy(run.path(2), run.path(4))
    assert "it is episode 2" in run.recover()[0]
    other = TrainingCheckpoint(tmp_path / "SAC")
    for episode in range(1, 5):
        other.save_checkpoint(WEIGHTS, episode=episode, metrics={})
    other.end_session("completed")
    shutil.copy(other.path(4), run.path(4))
    assert "run of 'SAC'" in run.recover()[0]
    assert run.get_next_episode() == 4
    shutil.copy(other.path(3), run.path(3))
    assert any("episode_0003.pt" in problem for problem in run.verify())


def test_all_damaged_is_said_and_never_silent(tmp_path: Path) -> None:
    run = train(tmp_path, 2)
    for episode in (1, 2):
        run.path(episode).write_bytes(b"x")
    with pytest.raises(UserError, match="none of them good"):
        run.load_latest_checkpoint()
    assert "no good checkpoint is left, starting at episode 1" in run.recover()[-1]
    assert run.load_latest_checkpoint() is None
    assert train(tmp_path, 1).verify() == []


def test_a_missing_middle_episode_is_named(tmp_path: Path) -> None:
    run = train(tmp_path, 4)
    run.path(2).unlink()
    assert "episode_0002.pt is missing" in run.verify()
    assert run.recover() == ["episode_0002.pt missing, continuing after episode 4"]
    assert_sums(run)
    assert run.verify() == ["episode_0002.pt is missing"]


def test_figures_of_files_deleted_by_hand_are_kept(tmp_path: Path) -> None:
    run = train(tmp_path, 6, replay=True, shares={n: 0.9 - n / 100 for n in range(1, 7)} | {2: 0.1})
    before = run.load_history()["trainings"]
    spare = run.path(3).read_bytes()
    for episode in range(1, 5):
        run.path(episode).unlink()
    missing = [f"episode_000{n}.pt is missing" for n in range(1, 5)]
    assert run.verify() == missing
    names = ", ".join(line.split()[0] for line in missing)
    assert run.recover() == [f"{names} missing, continuing after episode 6"]
    assert run.recover() == [], "it is said once"
    run = train(tmp_path, 1, replay=True)
    assert run.verify() == missing
    assert run.load_history()["trainings"][:1] == before
    assert run.load_metadata()["best_episode"]["episode"] == 2
    rows = run.load_history()["checkpoints"]
    assert [(row.get("pruned"), row.get("deleted")) for row in rows] == [(True,) * 2] * 4 + [
        (None, None)
    ] * 3
    assert [number for number, _ in run.load_replay(range(1, 8))] == list(range(1, 8))
    assert_sums(run)
    (run.directory / "history.json").unlink()
    assert run.verify() == ["history.json is missing", *missing], "their pieces belong to them"
    run.recover()
    assert_sums(run)
    run.path(3).write_bytes(spare)
    assert run.verify() == [line for line in missing if "0003" not in line]
    assert run.recover() == []
    assert_sums(run)


def test_deleted_newest_files_are_named_and_trained_again(tmp_path: Path) -> None:
    run = train(tmp_path, 8, replay=True)
    for episode in (2, 7, 8):
        run.path(episode).unlink()
    names = "episode_0002.pt, episode_0007.pt, episode_0008.pt"
    assert run.recover() == [f"{names} missing, continuing after episode 6"]
    run = train(tmp_path, 2, replay=True)
    assert run.verify() == ["episode_0002.pt is missing"]
    assert_sums(run)


def test_what_keep_last_deletes_is_not_taken_for_deleted_by_hand(tmp_path: Path) -> None:
    run = train(tmp_path, 6)
    run.path(2).unlink()
    run = train(tmp_path, 4, keep_last=2, shares={10: 0.1})
    assert (run.episodes(), pruned(run)) == ([9, 10], list(range(1, 9)))
    assert run.verify() == ["episode_0002.pt is missing"]
    assert_sums(run)


def test_verify_names_damage_in_the_middle_and_recover_leaves_it(tmp_path: Path) -> None:
    run = train(tmp_path, 4, replay=True)
    flip(run.path(2), 9000)
    flip(run.replay_path(3), 3000)
    run.replay_path(4).unlink()
    assert run.verify() == [
        "episode_0002.pt is damaged (checksum differs)",
        "replay/episode_0003.pt is damaged (checksum differs)",
        "replay/episode_0004.pt is missing",
    ]
    assert run.recover() == []
    (run.directory / "history.json").unlink()  # now all files are read
    assert any("moved to" in message for message in run.recover())
    assert_sums(run)


def test_a_kill_before_the_first_episode_is_not_damage(tmp_path: Path) -> None:
    run = train(tmp_path, 0, status=None)
    for file in ("metadata.json", "history.json"):  # written in the other order
        (run.directory / file).unlink()
        assert run.verify() == []
        assert "history.json" not in " ".join(run.leftovers())
    assert run.recover() == []
    assert run.verify() == run.leftovers() == []


def test_a_killed_session_is_closed_and_counted_from_the_files(tmp_path: Path) -> None:
    run = train(tmp_path, 3, status=None)
    assert json.loads((run.directory / "history.json").read_text())["total_episodes"] == 0
    assert run.load_history()["total_episodes"] == 3  # readers see the files
    for stray in (".episode_0004.pt.99.tmp", "replay/.episode_0004.pt.99.tmp"):
        (run.directory / "replay").mkdir(exist_ok=True)
        (run.directory / stray).write_bytes(b"torn")
    run.replay_path(4).write_bytes(b"written before its episode")
    assert run.verify() == []
    assert run.leftovers() == [
        *("session not closed", "history.json 3 episodes behind", "metadata.json behind"),
        *("replay piece of the next episode", "2 temporary files"),
    ]
    run.replay_path(5).write_bytes(b"which no kill leaves")
    assert run.verify() == ["replay/episode_0005.pt belongs to no episode"]
    with run.lock():
        assert run.leftovers() == []
    assert run.recover() == []
    assert run.verify() == run.leftovers() == []
    assert run.load_history()["trainings"][0]["status"] == "killed"
    assert not list(run.directory.rglob(".*"))
    assert not run.replay_path(4).exists()
    assert_sums(run)


# --- replay, retention --------------------------------------------------------------------------


def test_replay_pieces_come_back_in_order_and_a_missing_one_is_named(tmp_path: Path) -> None:
    run = train(tmp_path, 4, replay=True)
    pieces = list(run.load_replay([3, 2, 4]))
    assert [number for number, _ in pieces] == [3, 2, 4]
    assert [piece["obs"][0].item() for _, piece in pieces] == [3.0, 2.0, 4.0]
    shutil.copy(run.replay_path(2), run.replay_path(3))
    with pytest.raises(UserError, match=r"replay/episode_0003.pt.*--allow_partial_replay"):
        list(run.load_replay(range(2, 5)))
    run.replay_path(3).unlink()
    with pytest.raises(UserError, match=r"episode_0003.pt is missing.*--allow_partial_replay"):
        list(run.load_replay(range(2, 5)))
    assert [n for n, _ in run.load_replay(range(2, 5), allow_partial=True)] == [2, 4]


def test_replay_is_read_as_it_is_asked_for_and_the_history_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, 6, replay=True)
    read: list[str] = []
    opened = os.open

    def spy(path: Any, *arguments: Any, **options: Any) -> int:
        read.append(Path(path).name)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", spy)
    pieces = run.load_replay(range(6, 0, -1))
    for _ in range(3):
        next(pieces)
    assert read == ["history.json", "episode_0006.pt", "episode_0005.pt", "episode_0004.pt"]


def test_keep_last_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    shares = {n: 0.5 + n / 100 for n in range(1, 9)} | {3: 0.1}
    run = train(tmp_path, 8, keep_last=2, replay=True, capacity=4, shares=shares)
    assert run.episodes() == [3, 7, 8]
    assert pruned(run) == [1, 2, 4, 5, 6]
    assert sorted(p.name for p in (run.directory / "replay").iterdir())[0] == "episode_0005.pt"
    history = run.load_history()
    assert len(history["trainings"][0]["metrics"]) == 8
    assert history["checkpoints"][0]["pruned"] is True
    assert run.verify() == []
    assert_sums(run)
    (run.directory / "history.json").unlink()
    assert_sums(run)
    assert run.recover() == ["history.json is missing; rebuilt from the checkpoints"]
    assert pruned(run) == [1, 2, 4, 5, 6]
    assert run.verify() == []
    run = train(tmp_path, 2, keep_last=2, shares={10: 0.05})
    assert run.episodes() == [9, 10]
    assert run.verify() == []
    assert_sums(run)
    with pytest.raises(UserError, match="keep_last"):
        open_run(tmp_path, keep_last=0)


def test_a_kill_after_pruning_is_not_taken_for_missing_files(tmp_path: Path) -> None:
    train(tmp_path, 4)
    run = train(tmp_path, 3, keep_last=2, status=None)  # history.json still lists 1 to 4
    assert run.episodes() == [6, 7]
    assert run.recover() == []
    assert pruned(run) == [1, 2, 3, 4, 5]
    assert len(run.load_history()["trainings"][0]["metrics"]) == 4
    assert run.verify() == []
    assert_sums(run)


def test_damage_to_all_kept_files_falls_back_to_the_best(tmp_path: Path) -> None:
    run = train(tmp_path, 6, keep_last=1, shares={2: 0.1, 4: 0.4})
    assert run.episodes() == [2, 6]
    flip(run.path(6), 800)
    assert "4 episodes lost, continuing after episode 2" in run.recover()[0]
    assert run.verify() == []
    assert_sums(run)
    assert train(tmp_path, 1).verify() == []


# --- archive, branch, adopt ---------------------------------------------------------------------


def test_archive_moves_run_and_logs_and_overwrites_nothing(tmp_path: Path) -> None:
    targets: list[Path] = []
    for _ in range(3):
        run = train(tmp_path, 2)
        assert run.logs is not None
        run.logs.mkdir(parents=True)
        (run.logs / "events").write_text("x")
        target = run.archive()
        assert target is not None
        targets.append(target)
        assert not run.directory.exists()
        assert (run.logs.parent / "archive" / target.name / "events").exists()
    assert len(set(targets)) == 3
    assert all(TrainingCheckpoint(target).verify() == [] for target in targets)
    assert targets[0].parent == tmp_path / "checkpoints" / "archive"


def test_logs_in_the_run_or_around_it_are_refused_also_behind_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "PPO")
    for logs in ("PPO", "PPO/PPO", ".", "link", "link/x"):
        with pytest.raises(UserError, match=r"give two directories apart"):
            TrainingCheckpoint(tmp_path / "PPO", logs=tmp_path / logs)
    TrainingCheckpoint(tmp_path / "PPO", logs=tmp_path / "PPO-2")


def test_branch_archives_the_old_future_as_a_whole_run(tmp_path: Path) -> None:
    train(tmp_path, 4, replay=True)
    run = train(tmp_path, 6, replay=True)
    before = run.load_history()
    target = run.branch(3)
    assert target is not None
    old = TrainingCheckpoint(target)
    assert old.verify() == []
    assert old.load_history() == before
    assert len(list(old.load_replay(range(1, 11)))) == 10
    assert (run.episodes(), run.get_next_episode()) == ([1, 2, 3], 4)
    assert run.verify() == []
    assert_sums(run)
    assert run.branch(3) is None
    with pytest.raises(UserError, match=r"episode_0009.pt: No such"):
        run.branch(9)
    after = train(tmp_path, 2, replay=True)
    assert [s["start_episode"] for s in after.load_history()["trainings"]] == [1, 4]
    assert after.verify() == []
    assert old.verify() == []  # shared files are replaced, never written into


def test_adopt_takes_the_episodes_up_to_an_archived_file(tmp_path: Path) -> None:
    train(tmp_path, 3, replay=True)
    run = train(tmp_path, 3, replay=True)
    target = run.archive()
    assert target is not None
    run.adopt(target / "episode_0005.pt")
    assert run.episodes() == [1, 2, 3, 4, 5]
    assert run.verify() == []
    assert len(list(run.load_replay(range(1, 6)))) == 5
    assert train(tmp_path, 1, replay=True).verify() == []
    assert TrainingCheckpoint(target).verify() == []
    with pytest.raises(UserError, match="archive it first"):
        run.adopt(target / "episode_0005.pt")


def test_adopt_a_single_copied_file_counts_what_it_stands_for(tmp_path: Path) -> None:
    run = train(tmp_path, 5)
    copy = tmp_path / "copy.pt"
    shutil.copy(run.path(4), copy)
    run.archive()
    run.adopt(copy)
    assert (run.episodes(), pruned(run), run.get_next_episode()) == ([4], [1, 2, 3], 5)
    assert run.verify() == []
    run = train(tmp_path, 2)
    (run.directory / "history.json").unlink()
    assert pruned(run) == [1, 2, 3]
    assert_sums(run)
    flip(copy, 800)
    run.archive()
    with pytest.raises(Damaged):
        run.adopt(copy)
    assert run.episodes() == []


def test_a_cut_branch_or_adopt_leaves_nothing_half_built(tmp_path: Path) -> None:
    run = train(tmp_path, 3)
    archive = tmp_path / "checkpoints" / "archive"
    half = [archive / ".PPO-20260101T000000Z.tmp", tmp_path / "checkpoints" / ".PPO.tmp"]
    others = archive / ".PPO-night-20260101T000000Z.tmp"
    for place in (*half, others):
        place.mkdir(parents=True)
    run.recover()
    assert not any(place.exists() for place in half)
    assert others.exists()


def test_sums_hold_after_every_chain(tmp_path: Path) -> None:
    rng = random.Random(3)
    train(tmp_path, 2)
    for _ in range(12):
        status = rng.choice(["completed", "interrupted", "failed", None])
        keep = rng.choice([None, None, 3])
        run = train(tmp_path, rng.randint(1, 3), status=status, keep_last=keep)
        match rng.randint(0, 4):
            case 0:
                flip(run.path(run.episodes()[-1]), 4000)
            case 1:
                (run.directory / "history.json").write_text("{")
            case 2:
                run.branch(run.episodes()[len(run.episodes()) // 2])
            case _:
                pass
        run.recover()
        assert run.verify() == run.leftovers() == []
        assert_sums(run)
        assert run.load_history()["total_episodes"] == run.get_next_episode() - 1


def test_wrong_order_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path, 2)
    with pytest.raises(ValueError, match="3 is next"):
        run.begin_session(start_episode=5, device="cpu", info={})
    assert not run.is_running()
    with pytest.raises(ValueError, match="3 is next"):
        run.save_checkpoint(WEIGHTS, episode=2, metrics={})
    run.begin_session(start_episode=3, device="cpu", info={"agent": "PPO"})
    with pytest.raises(ValueError, match="3 is next"):
        run.save_checkpoint(WEIGHTS, episode=4, metrics={})
    assert run.is_running()
    run.end_session("completed")
    assert not run.is_running()
