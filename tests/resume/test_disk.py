"""Disks that are full and directories that cannot be written, both real, in the midst of a run."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

import pytest
from processes import fork
from test_exact import check_history, curves, shipped, state
from test_signals import Trainer, ended, reference_run

from co2lightning.runs.run import TrainingCheckpoint
from conftest import TINY

if not sys.platform.startswith("linux"):
    pytest.skip("mounts and capabilities of Linux", allow_module_level=True)

TOTAL = 5
DISK_KB = 4000
NO_NAMESPACES = 77


def mount_own(*disks: Path) -> None:
    """Mount disks of `DISK_KB` that only this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    new_user, new_mounts = 0x10000000, 0x00020000
    if libc.unshare(new_user | new_mounts):
        os._exit(NO_NAMESPACES)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    for disk in disks:
        disk.mkdir(parents=True)
        if libc.mount(b"none", bytes(disk), b"tmpfs", 0, f"size={DISK_KB}k".encode()):
            os._exit(NO_NAMESPACES)


def redirect(place: str) -> None:
    """Send the output to the files `out` and `err`."""
    for number, name in ((1, "out"), (2, "err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(os.path.join(place, name), flags), number)


def fill(place: str, agent: str, free_kb: int) -> None:
    """Train where only so much is free, keep what is left of it, make room and go on."""
    redirect(place)
    mount_own(Path(place, "disk"))
    os.chdir(Path(place, "disk"))
    from co2lightning.cli import main

    words = ["fit", "--model", agent, "--env.num_envs", "4", *TINY[agent]]
    words += ["--total_episodes", str(TOTAL), "--ckpt_path", "last"]
    balloon = Path("balloon")
    balloon.write_bytes(bytes(1024 * (DISK_KB - free_kb)))
    first = main(words)
    if Path("checkpoints", agent).is_dir():
        shutil.copytree(f"checkpoints/{agent}", f"{place}/full/{agent}")
    balloon.unlink()
    second = main(words)
    for directory in ("checkpoints", "lightning_logs"):
        shutil.copytree(directory, f"{place}/{directory}")
    os._exit(0 if (first in (1, 2), second) == (True, 0) else 100)


def check_full_disk(agent: str, place: Path, reference: Trainer, free_kb: int) -> int:
    """Fill the disk, go on; returns how many episodes stood in between."""
    place.mkdir()
    process = fork(fill, str(place), agent, free_kb)
    code = ended(process)
    if code == NO_NAMESPACES:
        pytest.skip("no mounts of our own on this machine")
    trainer = Trainer(agent, place)
    assert code == 0, trainer.errors() + trainer.read("out")
    assert trainer.errors().startswith("error: ")
    assert trainer.errors().count("\n") == 1, trainer.errors()
    assert "No space left on device" in trainer.errors()
    assert state(trainer.directory, TOTAL) == state(reference.directory, TOTAL)
    assert curves(agent, place) == curves(agent, reference.place)
    check_history(trainer.directory, TOTAL)
    full = TrainingCheckpoint(place / "full" / agent)
    if not full.directory.exists():
        return 0
    assert [line for line in full.verify() if not line.endswith("json is missing")] == []
    assert f"({full.get_next_episode() - 1} episode" in trainer.read("out") or not full.episodes()
    return len(full.episodes())


@pytest.mark.parametrize(
    ("agent", "free_kb"), [pytest.param("PPO", 130, marks=pytest.mark.slow), ("SAC", 500)]
)
def test_a_disk_that_fills_in_mid_run(
    agent: str, free_kb: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reference = reference_run(agent, tmp_path_factory.mktemp("reference"), TOTAL)
    place = tmp_path_factory.mktemp("full") / "run"
    assert 0 < check_full_disk(agent, place, reference, free_kb) < TOTAL


@pytest.mark.slow
@pytest.mark.parametrize("agent", shipped())
def test_a_disk_that_fills_at_any_write(
    agent: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reference = reference_run(agent, tmp_path_factory.mktemp("reference"), TOTAL)
    place = tmp_path_factory.mktemp("full")
    most_kb = 640 if agent == "SAC" else 136
    done = {
        check_full_disk(agent, place / str(free), reference, free)
        for free in range(4, most_kb, most_kb // 32)
    }
    assert done >= set(range(TOTAL - 1))


def use_mounted_directories(place: str) -> None:
    """Start a run anew and go back to an archived file where its directories are disks."""
    redirect(place)
    disks = [Path(place, base, "PPO") for base in ("checkpoints", "lightning_logs")]
    mount_own(*disks)
    for disk in disks:
        (disk / "lost+found").mkdir()
    os.chdir(place)
    from co2lightning.cli import main

    words = ["fit", "--model", "PPO", "--env.num_envs", "4", *TINY["PPO"], "--episodes"]
    run = TrainingCheckpoint("checkpoints/PPO")
    assert main([*words, "2"]) == 0
    assert not Path("checkpoints/archive").exists()
    assert main([*words, "1"]) == 0
    (archived,) = Path("checkpoints/archive").iterdir()
    assert TrainingCheckpoint(archived).episodes() == [1, 2]
    assert sorted(curves(f"archive/{archived.name}")["site/co2_kg"]) == [1, 2]
    assert main([*words, "1", "--ckpt_path", str(archived / "episode_0001.pt")]) == 0
    assert sorted(curves("PPO")["site/co2_kg"]) == run.episodes() == [1, 2]
    assert main([*words, "1", "--ckpt_path", "checkpoints/PPO/episode_0001.pt"]) == 0
    places = [run.directory, *Path("checkpoints/archive").iterdir()]
    for path in places:
        assert TrainingCheckpoint(path).verify() == []
        assert TrainingCheckpoint(path).leftovers() == []
    assert len(places) == 4
    assert all(os.path.ismount(disk) for disk in disks)
    os._exit(0)


def test_directories_that_are_disks_are_emptied_not_moved(place: Path) -> None:
    process = fork(use_mounted_directories, str(place))
    if ended(process) == NO_NAMESPACES:
        pytest.skip("no mounts of our own on this machine")
    assert process.exitcode == 0, (place / "err").read_text()


def without_override(place: str, words: list[str]) -> None:
    """Be the command of a user whom file modes bind, also where the tests run as root."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of capabilities, this process
    held = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, held) == 0
    dac_override = 1 << 1
    held[0] &= ~dac_override  # effective
    held[1] &= ~dac_override  # permitted
    assert libc.capset(header, held) == 0
    redirect(place)
    os.chdir(place)
    from co2lightning.cli import main

    os._exit(main(words))


@pytest.mark.parametrize("closed", ["checkpoints/PPO", "lightning_logs/PPO"])
def test_permission_lost_in_mid_run(
    closed: str, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trainer = Trainer("PPO", place)
    words = ["fit", "--model", "PPO", "--env.num_envs", "4", *TINY["PPO"], "--ckpt_path", "last"]
    process = fork(without_override, str(place), [*words, "--episodes", "1000"])
    trainer.wait_for(process, "checkpoints/PPO/episode_0002.pt")
    files = [place / closed, *(place / closed).glob("events*")]
    for path in files:
        path.chmod(0o555)
    assert ended(process) == 1
    assert trainer.errors().count("\n") == 1, trainer.errors()
    assert closed in trainer.errors()
    assert "Permission denied; what was saved before is safe" in trainer.errors()
    last = trainer.run.get_next_episode() - 1
    assert last >= 2
    assert trainer.run.verify() == []
    assert ended(fork(without_override, str(place), [*words, "--episodes", "1"])) == 2
    assert "cannot be written; give another place" in trainer.errors()
    for path in files:
        path.chmod(0o755)
    process = fork(without_override, str(place), [*words, "--total_episodes", str(last + 2)])
    assert ended(process) == 0, trainer.errors()
    check_history(trainer.directory, last + 2)
    reference = reference_run("PPO", tmp_path_factory.mktemp("reference"), last + 2)
    assert state(trainer.directory, last + 2) == state(reference.directory, last + 2)
    assert curves("PPO", place) == curves("PPO", reference.place)


def test_the_lock_of_a_colleague_and_a_disk_beside_which_nobody_may_write(place: Path) -> None:
    trainer = Trainer("PPO", place)
    words = ["fit", "--model", "PPO", "--env.num_envs", "4", *TINY["PPO"], "--episodes", "1"]
    mounted, lock = place / "mounted", place / "checkpoints" / ".PPO.lock"
    (mounted / "disk").mkdir(parents=True)
    mounted.chmod(0o555)
    lock.parent.mkdir()
    Path(trainer.directory).symlink_to(mounted / "disk")
    lock.touch(0o444)
    assert ended(fork(without_override, str(place), words)) == 2
    assert f"{lock}: the lock of this run is closed to you" in trainer.errors()
    assert f"chmod a+rw {lock}" in trainer.errors()
    lock.chmod(0o666)
    assert ended(fork(without_override, str(place), words)) == 0
    assert os.listdir(mounted) == ["disk"]
    assert trainer.run.verify() == []
