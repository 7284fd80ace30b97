"""A run whose files an attacker has rewritten, seals and all: one line, and nothing of it runs."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import co2lightning
from co2lightning.errors import UserError
from co2lightning.runs import seal as sealing
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.settings import parser
from co2lightning.train.board import replace_scalars
from co2lightning.train.curves import Curves
from conftest import TINY, Outcome, tree
from forged import seal_content, unseal

Command = Callable[..., Outcome]
MARKER = "os.makedirs('RAN')"


class Payload:
    """Pickles to a call that leaves a marker."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; {MARKER}",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three episodes of SAC, once."""
    from co2lightning.settings.parser import parse_flags
    from co2lightning.train.fit import run_fit

    place = tmp_path_factory.mktemp("trained")
    dirs = [f"--checkpoints.dir={place}/checkpoints", f"--logs.dir={place}/lightning_logs"]
    words = ["--env.num_envs", "4", *TINY["SAC"], "--episodes", "3", *dirs]
    run_fit(parse_flags(words, "SAC"), agent="SAC", echo=lambda line: None)
    return place


@pytest.fixture
def run(trained: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingCheckpoint:
    shutil.copytree(trained, place, dirs_exist_ok=True)
    (place / "evil.py").write_text(f"import os; {MARKER}")
    monkeypatch.syspath_prepend(str(place))  # a name in a file could import it
    return TrainingCheckpoint("checkpoints/SAC")


def resume(command: Command, *words: str) -> Outcome:
    tiny = ("--env.num_envs", "4", *TINY["SAC"])
    words = words or ("--ckpt_path", "last", "--episodes", "1")
    outcome = command("fit", "--model", "SAC", *tiny, *words)
    assert not Path("RAN").exists()
    assert "Traceback" not in outcome.err
    assert outcome.err.count("\n") == (outcome.code != 0)
    return outcome


def rewrite(run: TrainingCheckpoint, path: Path, changes: dict[str, Any]) -> None:
    """Change the content of a file and make all hashes fit."""
    content, record = unseal(path)
    data = seal_content({**content, **changes}, record)
    path.write_bytes(data)
    history = sealing.read_json(run.directory / "history.json")
    row = history["checkpoints"][record["episode"] - 1]
    entry = row["replay"] if record["kind"] == "replay" else row
    entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (run.directory / "history.json").write_bytes(sealing.seal_json(json.dumps(history)))


def test_an_honest_rewrite_is_resumed(run: TrainingCheckpoint, command: Command) -> None:
    rewrite(run, run.path(3), {})
    rewrite(run, run.replay_path(3), {})
    assert run.verify() == []
    assert "Resuming SAC at episode 4" in resume(command).out


def test_a_pickle_in_the_newest_episode(run: TrainingCheckpoint, command: Command) -> None:
    rewrite(run, run.path(3), {"callbacks": Payload()})
    assert "episode_0003.pt is damaged (names '" in run.verify()[0]
    outcome = resume(command)
    assert outcome.code == 0
    assert "episode_0003.pt is damaged (names '" in outcome.out
    assert "1 episode lost, continuing after episode 2" in outcome.out
    Path("other.pt").write_bytes((run.directory / "damaged" / "episode_0003.pt").read_bytes())
    outcome = resume(command, "--ckpt_path", "other.pt")
    assert outcome.code == 2
    assert "other.pt is damaged" in outcome.err
    for load in (co2lightning.SAC.load_from_checkpoint, TrainingCheckpoint.read):
        with pytest.raises(UserError, match=r"other.pt is damaged"):
            load("other.pt")
    assert not Path("RAN").exists()


def test_a_record_of_odd_content_beside_a_missing_file(run: TrainingCheckpoint) -> None:
    """What a missing file had pruned stands in the newest one's record."""
    content, record = unseal(run.path(3))
    run.path(3).write_bytes(seal_content(content, {**record, "replay_pruned_to": "evil"}))
    run.path(1).unlink()
    assert len(run.load_history()["checkpoints"]) == 3
    assert "episode_0003.pt is damaged (its record is wrong" in run.verify()[0]


PIECES: list[dict[str, Any]] = [
    {"rows": Payload()},
    {"rows": "many"},
    {"rows": torch.zeros(3)},
    {"rows": torch.zeros(1, 1).expand(10**12, 1)},
    {"sizes": [10**12] * 5},
    {"sizes": None},
    {"began": -1},
    {"began": {}},
]


@pytest.mark.parametrize("changes", PIECES, ids=lambda value: str(value)[:40])
def test_a_replay_piece(run: TrainingCheckpoint, command: Command, changes: dict[str, Any]) -> None:
    rewrite(run, run.replay_path(2), changes)
    if isinstance(changes.get("rows"), Payload):
        assert "replay/episode_0002.pt is damaged (names '" in run.verify()[0]
    before = tree(Path())
    outcome = resume(command)
    assert outcome.code == 2
    assert "replay/episode_0002.pt" in outcome.err
    assert tree(Path()) == before
    words = ("--ckpt_path", "last", "--episodes", "1", "--allow_partial_replay")
    assert resume(command, *words).code == 0


CONTENTS: list[dict[str, Any]] = [
    {"hyper_parameters": {"_class_path": "evil.Agent", "_instantiator": "evil.make"}},
    {"hyper_parameters": {"observation_dim": Payload}},
    {"run": {"agent": "evil.Agent", "config": {}}},
    {"run": {"agent": "SAC", "config": {"env.id": "evil:Env-v0"}}},
    {"run": {"agent": "SAC", "config": {"env.site": "https://example.org/site"}}},
    {"run": {"agent": "SAC", "config": {"env.site": {"class_path": "evil.Site"}}}},
    {"run": {"agent": "SAC", "config": {"trainer.accelerator": {"class_path": "evil.X"}}}},
    {"run": {"agent": "SAC", "config": {"model.gamma": float("nan")}}},
    {"run": {"agent": "SAC", "config": {"model.hidden": [10**9] * 9}}},
    {"state_dict": {"actor.0.weight": torch.zeros(1).expand(10**12)}},
    {"loops": {"fit_loop": {"epoch_progress": "evil"}}},
]


@pytest.mark.parametrize("changes", CONTENTS, ids=lambda value: str(value)[:60])
def test_an_episode_of_odd_content(
    run: TrainingCheckpoint, command: Command, changes: dict[str, Any]
) -> None:
    """What could be imported or not be allocated is refused or has no effect."""
    rewrite(run, run.path(3), changes)
    resume(command)
    with contextlib.suppress(UserError):
        co2lightning.SAC.load_from_checkpoint(run.path(3))
    assert not Path("RAN").exists()


IMPORTS: list[Any] = [
    "evil.X",
    "evil:X",
    '{"class_path": "evil.X"}',
    {"class_path": "evil.X", "init_args": {}},
    [{"class_path": "evil.X"}],
    {"evil.X": {"class_path": "evil.X"}},
]


@pytest.mark.parametrize("agent", ["A2C", "SAC", "PPO"])
def test_no_setting_of_a_file_imports(run: TrainingCheckpoint, agent: str) -> None:
    keys = [*parser.complete({}, agent), "model", "env", "trainer", "config", "model.evil.X"]
    assert {"trainer.callbacks", "trainer.strategy", "model.gamma", "env.id"} <= set(keys)
    for key, value in itertools.product(keys, IMPORTS):
        with contextlib.suppress(UserError):
            taken = parser.check_stored({key: value}, agent, "file.pt")
            assert taken.keys() == set() or taken == {key: value} == {key: str(value)}
        assert not Path("RAN").exists(), (key, value)
    with pytest.raises(UserError):  # what a user says is imported
        parser.check_settings({"trainer.callbacks": IMPORTS[-2]}, agent, "fit")
    assert Path("RAN").exists()
    del sys.modules["evil"]


def test_only_settings_of_the_run_are_taken_from_a_file(
    run: TrainingCheckpoint, command: Command
) -> None:
    kept = torch.load(run.path(3), weights_only=True)["run"]
    keys = [key for key in parser.complete({}, "SAC") if key not in kept["config"]]
    evil = {key: [{"class_path": "evil.X"}] for key in keys}
    rewrite(run, run.path(3), {"run": {**kept, "config": {**kept["config"], **evil}}})
    assert "trainer.callbacks" in evil
    assert "Resuming SAC at episode 4" in resume(command).out


def test_an_environment_to_import_is_for_the_user_to_name(
    run: TrainingCheckpoint, command: Command
) -> None:
    kept = torch.load(run.path(3), weights_only=True)["run"]["config"]
    evil = {"agent": "SAC", "config": {**kept, "env.id": "evil:Env-v0"}}
    rewrite(run, run.path(3), {"run": evil})
    outcome = resume(command)
    assert outcome.code == 2
    assert "its env.id names a module to import" in outcome.err
    assert "--env.id evil:Env-v0" in outcome.err


@pytest.mark.parametrize(
    "name", ["../../../victim.pt", "/victim.pt", "episode_0001.pt/../../../victim.pt", "a\0b"]
)
def test_names_in_the_history_lead_nowhere(
    run: TrainingCheckpoint, command: Command, name: str
) -> None:
    Path("victim.pt").write_bytes(b"precious")
    history = sealing.read_json(run.directory / "history.json")
    history["checkpoints"][0]["file"] = name
    (run.directory / "history.json").write_bytes(sealing.seal_json(json.dumps(history)))
    outcome = resume(
        command, "--ckpt_path", "last", "--episodes", "1", "--checkpoints.keep_last", "1"
    )
    assert outcome.code == 0
    assert "history.json is damaged" in outcome.out
    assert Path("victim.pt").read_bytes() == b"precious"
    assert set(os.listdir()) == {"checkpoints", "lightning_logs", "evil.py", "victim.pt"}


def test_links_in_place_of_files_are_not_followed_to_write(
    run: TrainingCheckpoint, command: Command
) -> None:
    Path("victim").write_bytes(b"precious")
    for name in ("history.json", "metadata.json", "episode_0004.pt", "replay/episode_0004.pt"):
        (run.directory / name).unlink(missing_ok=True)
        (run.directory / name).symlink_to(Path("victim").resolve())
    outcome = resume(command)
    assert outcome.code == 0
    assert Path("victim").read_bytes() == b"precious"
    assert run.verify() == []


def put(kind: str, path: Path) -> None:
    """Put something at `path` that no file of ours is, as an unpacked archive may bring it."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(Path("victim").resolve())
    elif kind == "link to a directory":
        path.symlink_to(Path("victims").resolve())
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.mkdir()
        (path / "held").write_text("something")


@pytest.fixture
def victims(place: Path) -> Callable[[], None]:
    """Make files that are none of ours; what is returned checks that they stand as they were."""
    Path("victims").mkdir()
    for path in (Path("victim"), Path("victims/episode_0004.pt"), Path("victims/.a.tmp")):
        path.write_bytes(b"precious")
    before = tree(Path("victims")), Path("victim").read_bytes()

    def check() -> None:
        assert (tree(Path("victims")), Path("victim").read_bytes()) == before

    return check


KINDS = ("link", "link to a directory", "FIFO", "directory")


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_place_of_a_file_is_not_opened(
    run: TrainingCheckpoint, victims: Callable[[], None], command: Command, kind: str
) -> None:
    files = ("history.json", "metadata.json", "episode_0004.pt", "replay/episode_0004.pt")
    strays = (".history.json.7.tmp", "replay/.a.tmp", "../.SAC.tmp")
    strays += ("../archive/.SAC-20260101T000000Z.tmp", f".history.json.{os.getpid()}.tmp")
    for name in files + strays:
        put(kind, run.directory / name)
    before = tree(Path("checkpoints"))
    assert command("history", "SAC").code == 0
    shown = command("verify", "SAC")
    assert shown.code == 1
    for name in files[:3]:
        assert f"{name} is damaged (" in shown.out
    assert tree(Path("checkpoints")) == before
    outcome = resume(command)
    assert outcome.code == 0
    assert "Resuming SAC at episode 4" in outcome.out
    assert "metadata.json is damaged (a" in outcome.out
    assert run.verify() == []
    assert not [name for name in strays if os.path.lexists(run.directory / name)]
    moved = {path.name for path in (run.directory / "damaged").iterdir()}
    assert moved == {*files[:3], "replay_episode_0004.pt"}
    victims()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lock", ["checkpoints/.SAC.lock", "lightning_logs/.SAC.lock"])
def test_what_stands_in_the_place_of_a_lock_is_refused(
    run: TrainingCheckpoint, victims: Callable[[], None], command: Command, kind: str, lock: str
) -> None:
    put(kind, Path(lock))
    before = tree(run.directory)
    outcome = resume(command)
    assert outcome.code == 2
    assert f"{lock}: a" in outcome.err
    assert command("verify", "SAC").code == command("history", "SAC").code == 0
    assert tree(run.directory) == before
    victims()


def test_a_lock_with_a_second_name_is_not_written_into(
    run: TrainingCheckpoint, victims: Callable[[], None]
) -> None:
    Path("checkpoints/.SAC.lock").unlink()
    os.link("victim", "checkpoints/.SAC.lock")
    refused = pytest.raises(UserError, match="in use by another process")
    with run.lock(), refused, TrainingCheckpoint("checkpoints/SAC").lock():
        pass
    victims()


@pytest.mark.parametrize("name", ["replay", "damaged"])
def test_a_directory_of_the_run_that_is_a_link_is_refused(
    run: TrainingCheckpoint, victims: Callable[[], None], command: Command, name: str
) -> None:
    shutil.rmtree(run.directory / name, ignore_errors=True)
    put("link to a directory", run.directory / name)
    before = tree(Path())
    outcome = resume(command, "--ckpt_path", "last", "--episodes", "1", "--allow_partial_replay")
    assert outcome.code == 2
    assert f"{name} is a link, not a directory" in outcome.err
    assert f"{name} is a link, not a directory" in run.verify()
    assert tree(Path()) == before
    victims()


@pytest.mark.parametrize("episode", [0, 1])
@pytest.mark.parametrize("link", ["archive/SAC-20260101T000000Z", "archive"])
def test_an_archive_that_is_the_run_itself_costs_no_episode(
    run: TrainingCheckpoint, command: Command, episode: int, link: str
) -> None:
    """A stranger's note says that an archiving was cut off, and a link that all was archived."""
    Path("checkpoints", link).parent.mkdir(exist_ok=True)
    Path("checkpoints", link).symlink_to(run.directory.resolve())
    if link == "archive":
        (run.directory / "SAC-20260101T000000Z").symlink_to(".")
    Path(f"checkpoints/archive/.SAC-20260101T000000Z.keeps-{episode}").touch()
    outcome = resume(command)
    assert outcome.code == 0
    assert run.episodes() == [1, 2, 3, 4]
    assert run.verify() == []


def test_a_user_may_name_a_checkpoint_by_a_link(run: TrainingCheckpoint, command: Command) -> None:
    Path("good.pt").symlink_to(run.path(2).resolve())
    assert co2lightning.SAC.load_from_checkpoint("good.pt").updates
    outcome = resume(command, "--ckpt_path", "good.pt", "--episodes", "1")
    assert "Resuming SAC at episode 3" in outcome.out
    assert run.verify() == []


def test_odd_things_among_the_curves_neither_stop_nor_lead_anywhere(
    run: TrainingCheckpoint, victims: Callable[[], None], command: Command
) -> None:
    logs = Path("lightning_logs/SAC")
    put("FIFO", logs / "events.out.tfevents.1700000000.host.1.0")
    put("link to a directory", logs / "events.out.tfevents.1700000001.host.1.0")
    for name in ("events.out.tfevents.5", "events.out.tfevents.\u00b2.x", "x.episode_one"):
        put("link", logs / name)
    assert resume(command, "--ckpt_path", str(run.path(2)), "--episodes", "1").code == 0
    (archived,) = Path("lightning_logs/archive").iterdir()
    assert all(path.is_file() and not path.is_symlink() for path in archived.iterdir())
    put("link to a directory", logs / "test")
    with pytest.raises(NotADirectoryError):
        replace_scalars(logs / "test", {"test/co2_kg": 1.0}, [3], "*")
    victims()


def test_curves_in_a_file_of_any_name_are_completed(place: Path) -> None:
    logs = place / "logs" / "PPO"

    def complete(*episodes: int) -> list[Path]:
        history = [{"episode": episode, "reward": 1.0} for episode in episodes]
        Curves("logs", "PPO", len(history), history=history)
        return sorted(logs.iterdir())

    (file,) = complete(1)
    file.rename(logs / "events.out.tfevents.1700000000.host.copy")
    assert len(complete(1, 2, 3)) == 2
    assert len(complete(1, 2, 3)) == 2
