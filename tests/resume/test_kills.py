"""SIGKILL at every file call of what changes a run directory, its archive and its logs."""

import hashlib
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import fork
from test_exact import curves, state

from co2lightning.cli import main
from co2lightning.runs.run import TrainingCheckpoint
from conftest import TINY, Outcome, pruned

if sys.platform == "win32":
    pytest.skip("SIGKILL and fork", allow_module_level=True)

CHANGES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KEEP = 2
FIT = ["fit", "--model", "SAC", "--env.num_envs", "4", *TINY["SAC"]]


def open_run(place: Path, **options: Any) -> TrainingCheckpoint:
    return TrainingCheckpoint(
        place / "checkpoints" / "PPO", logs=place / "lightning_logs" / "PPO", **options
    )


def train(run: TrainingCheckpoint, count: int, best: int = 0) -> TrainingCheckpoint:
    """Do what a session does; the replay is full after two episodes."""
    with run.lock():
        run.recover()
        first = run.get_next_episode()
        run.begin_session(start_episode=first, device="cpu", info={"agent": "PPO"})
        if first == 1:
            run.save_start({"weights": torch.zeros(10)})
        for episode in range(first, first + count):
            run.save_checkpoint(
                {"weights": torch.full((10,), float(episode))},
                episode=episode,
                metrics={"co2_vs_uncontrolled": 0.1 if episode == best else 0.5, "reward": 1.0},
                replay={"rows": torch.full((4,), float(episode))},
                replay_capacity_episodes=2,
            )
        run.end_session("completed")
    return run


def make(place: Path) -> None:
    """Make a run of three episodes with curves, one of its files damaged once."""
    run = train(open_run(place), 3)
    assert run.logs is not None
    (run.logs / "test").mkdir(parents=True)
    (run.logs / "events.out.tfevents.1").write_text("the curves")
    (run.logs / "test" / "events.out.tfevents.2").write_text("the test")
    (run.directory / "damaged").mkdir()
    (run.directory / "damaged" / "episode_0003.pt").write_text("what once was")


def make_behind_links(place: Path) -> None:
    for name in ("checkpoints", "lightning_logs"):
        (place / name).mkdir(parents=True)
        (place / "large" / name).mkdir(parents=True)
        (place / name / "PPO").symlink_to(Path("..", "large", name))
    make(place)


def make_damaged(place: Path) -> None:
    make(place)
    run = open_run(place)
    for episode in (2, 3):
        run.path(episode).write_bytes(run.path(episode).read_bytes()[:-9])


def make_pruned(place: Path) -> None:
    make(place)
    shutil.rmtree(place / "checkpoints")
    train(open_run(place, keep_last=KEEP), 5, best=1)


def make_archived(place: Path) -> None:
    make(place)
    open_run(place).archive()


def prune(place: Path) -> None:
    """Let the best episode leave the window."""
    train(open_run(place, keep_last=KEEP), 1, best=6)


def adopt(place: Path) -> None:
    (archived,) = (place / "checkpoints" / "archive").iterdir()
    open_run(place).adopt(
        archived / "episode_0002.pt", place / "lightning_logs" / "archive" / archived.name
    )


Act = Callable[[Path], Any]
SCENES: dict[str, tuple[Act, Act]] = {
    "archive": (make, lambda place: open_run(place).archive()),
    "archive behind links": (make_behind_links, lambda place: open_run(place).archive()),
    "branch": (make, lambda place: open_run(place).branch(1)),
    "quarantine": (make_damaged, lambda place: open_run(place).recover()),
    "prune": (make_pruned, prune),
    "adopt": (make_archived, adopt),
}


def die_before(call: int) -> None:
    """Let this process kill itself before its file call of that number."""
    count = 0

    def count_and_die(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in CHANGES or (event == "open" and arguments[2] & WRITING):
            count += 1
            if count > call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_and_die)


def killed(act: Act, place: Path, call: int) -> bool:
    """Act in a forked process that dies before its file call of that number; say whether it did."""
    child = os.fork()
    if not child:
        die_before(call)
        act(place)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


def walk(place: str, scene: str) -> None:
    """Make the scene, and for each file call a copy of it in which the act died there."""
    made, act = SCENES[scene]
    made(Path(place, "before"))
    for call in itertools.count():
        copy = shutil.copytree(Path(place, "before"), Path(place, f"{call}"), symlinks=True)
        if not killed(act, copy, call):
            break
    os._exit(0)


def walk_twice(place: str, scene: str) -> None:
    """Kill the start that mends what every fourth kill left, too, at each of its calls."""
    made, act = SCENES[scene]
    made(Path(place, "before"))
    for first in itertools.count(step=4):
        copy = shutil.copytree(Path(place, "before"), Path(place, f"{first}"), symlinks=True)
        died = killed(act, copy, first)
        for second in itertools.count():
            again = shutil.copytree(copy, Path(place, f"{first}-{second}"), symlinks=True)
            if not killed(lambda place: open_run(place).recover(), again, second):
                break
        if not died:
            break
    os._exit(0)


def contents(place: Path, pattern: str) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in place.rglob(pattern)}


def check(before: Path, place: Path, scene: str) -> None:
    """See that what a kill left is no damage, and that the next start loses and leaves nothing."""
    run = open_run(place)
    problems = run.verify() if run.directory.is_dir() or run.half_archived() else []
    damaged = {"episode_0002.pt", "episode_0003.pt"} if scene == "quarantine" else set()
    assert [line for line in problems if line.split()[0].split("/")[-1] not in damaged] == []

    run.recover()
    assert (run.verify() if run.directory.is_dir() else []) == run.leftovers() == []
    total = sum(s["episodes_count"] for s in run.load_history()["trainings"])
    assert total == len(run.episodes()) + len(pruned(run)) == run.get_next_episode() - 1
    assert not [p for p in place.rglob(".*") if not p.name.endswith(".lock")]
    assert contents(before, "*tfevents*") <= contents(place, "*tfevents*")
    if scene != "prune":
        assert contents(before, "*.pt") <= contents(place, "*.pt")

    archives = sorted((place / "checkpoints" / "archive").glob("*"))
    shown = sorted(p.name for p in (place / "lightning_logs" / "archive").glob("*"))
    assert [path.name for path in archives] == shown, "episodes and curves go together"
    for archived in archives:
        assert TrainingCheckpoint(archived).verify() == []
        assert TrainingCheckpoint(archived).episodes() == [1, 2, 3]
    drawn = (place / "lightning_logs" / "PPO" / "events.out.tfevents.1").exists()
    match scene:
        case "archive" | "archive behind links":
            assert (run.episodes(), drawn) == (([], False) if archives else ([1, 2, 3], True))
            assert not list(run.directory.glob("*")) or not archives
            assert run.directory.is_symlink() == ("links" in scene)
        case "branch":
            assert (run.episodes(), drawn) == ([1] if archives else [1, 2, 3], True)
        case "quarantine":
            assert (run.episodes(), drawn) == ([1], True)
        case "prune":
            assert run.episodes() in ([1, 4, 5], [5, 6], [1, 4, 5, 6], [1, 5, 6], [4, 5, 6])
        case _:
            assert run.episodes() in ([], [1, 2])
            assert drawn <= (run.episodes() != [])


def check_all(walked: Callable[..., None], place: Path, scene: str) -> None:
    process = fork(walked, str(place), scene)
    process.join()
    assert process.exitcode == 0
    before = place / "before"
    places = [path for path in place.iterdir() if path != before]
    assert len(places) > 10
    for copy in places:
        check(before, copy, scene)


SLOW = {"archive behind links", "adopt", "prune"}


@pytest.mark.parametrize(
    "scene", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in SCENES]
)
def test_a_kill_at_any_file_call_is_mended_by_the_next_start(tmp_path: Path, scene: str) -> None:
    check_all(walk, tmp_path, scene)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_so_is_a_second_kill_at_any_file_call_of_that_start(tmp_path: Path, scene: str) -> None:
    check_all(walk_twice, tmp_path, scene)


def train_and_branch(place: str) -> None:
    """Train SAC, then kill `fit` from its first episode at every fourth file call."""
    before = Path(place, "before")
    before.mkdir()
    os.chdir(before)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    assert main([*FIT, "--episodes", "3"]) == 0
    branch = [*FIT, "--episodes", "1", "--ckpt_path", "checkpoints/SAC/episode_0001.pt"]

    def go_back(copy: Path) -> None:
        os.chdir(copy)
        assert main(branch) == 0

    for call in itertools.count(step=4):
        copy = shutil.copytree(before, Path(place, f"{call}"))
        if not killed(go_back, copy, call):
            break
    os._exit(0)


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill_at_any_file_call_of_going_back(
    tmp_path: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = fork(train_and_branch, str(tmp_path))
    process.join()
    assert process.exitcode == 0
    reference = state(str(tmp_path / "before" / "checkpoints" / "SAC"), 3)
    ended = 0
    for place in set(tmp_path.iterdir()) - {tmp_path / "before"}:
        monkeypatch.chdir(place)
        assert command("verify").code == 0
        outcome = command(*FIT, "--ckpt_path", "last", "--total_episodes", "3")
        assert outcome.code == 0, outcome.err
        ended += "The last start was cut off; the episodes after 1 were moved to" in outcome.out
        assert state("checkpoints/SAC", 3) == reference
        assert sorted(curves("SAC")["site/co2_kg"]) == [1, 2, 3]
        for archived in Path("checkpoints").glob("archive/*"):
            assert state(str(archived), 3) == reference
            assert sorted(curves(f"archive/{archived.name}")["site/co2_kg"]) == [1, 2, 3]
        assert command("verify").code == 0
    assert ended > 2
