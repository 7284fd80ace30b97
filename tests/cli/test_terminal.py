"""What is printed steers no terminal, can be shown anywhere, and does not end what it tells of."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_history import train

from co2lightning.errors import UserError
from co2lightning.runs.run import TrainingCheckpoint
from conftest import TINY, Outcome, tree

Command = Callable[..., Outcome]
STEERS = (
    "\x1b]0;owned\x07\x9b2J\u202e\u2066\udce9\nPPO"  # a title, CSI, bidi, a byte that is no text
)
SHOWN = r"\x1b]0;owned\x07\x9b2J\u202e\u2066\udce9"
FULL = "error: standard output: No space left on device\n"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes and devices")


def harmless(outcome: Outcome) -> str:
    """Return all that was printed; no character of it is more than itself."""
    said = outcome.out + outcome.err
    assert all(line.isprintable() for line in said.split("\n")), said
    assert "Traceback" not in said
    return said


def hostile(name: str = "PPO") -> TrainingCheckpoint:
    """Write a run, without training, that steers wherever a text may stand."""
    run = TrainingCheckpoint(Path("checkpoints") / name)
    config = {STEERS: 1, "env.site": STEERS, "model.activation": STEERS, "env.id": STEERS}
    info = {"agent": STEERS, "seed": 0, "config": config, "site": {"name": STEERS, "sha256": "0"}}
    run.begin_session(start_episode=1, device=STEERS, info=info)
    content = {"run": info, "hyper_parameters": {STEERS: 1}, "epoch": 0}
    parts: dict[str, Any] = {"state_dict": {}, "optimizer_states": [], "loops": {}, "counters": {}}
    run.save_checkpoint(content | parts, episode=1, metrics={"reward": 1.0, "time_seconds": 0.1})
    run.end_session("completed")
    return run


@POSIX
@pytest.mark.parametrize(
    "words",
    [
        ("history",),
        ("history", "PPO"),
        ("history", STEERS),
        ("verify",),
        ("verify", "none"),
        ("test", "PPO"),
        ("test", "none"),
        ("test", "PPO", "--env.site", STEERS),
        ("predict", "PPO", "--day", STEERS),
        ("report",),
        ("report", "--output", f"{STEERS}/x"),
        ("fit", "--ckpt_path", "checkpoints/PPO/episode_0001.pt"),
        ("fit", "--model", "PPO", "--ckpt_path", "last"),
        ("fit", "--model", "PPO", "--name", STEERS, "--env.site", STEERS),
        ("fit-all", "--agents", STEERS),
        (STEERS,),
    ],
    ids=lambda words: " ".join(words).encode("unicode_escape").decode(),
)
def test_a_file_or_a_name_steers_no_terminal(command: Command, words: tuple[str, ...]) -> None:
    hostile()
    train(STEERS, [0.5])
    harmless(command(*words))


@POSIX
def test_what_is_escaped_is_shown(command: Command) -> None:
    train("a\x1b[2J\nb", [0.5])
    assert r" a\x1b[2J\nb " in harmless(command("history")).replace("\n", " ")
    assert r"a\x1b[2J\nb: ok, 1 checkpoint" in harmless(command("verify"))
    with pytest.raises(UserError) as caught:
        raise UserError(f"{STEERS}: no such thing")
    assert str(caught.value) == f"{SHOWN} PPO: no such thing"


@POSIX
def test_who_holds_a_run_is_shown(command: Command) -> None:
    import fcntl

    train("PPO", [0.5])
    with open("checkpoints/.PPO.lock", "w", encoding="utf-8") as lock:
        json.dump({"pid": STEERS, "host": STEERS, "since": STEERS}, lock)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = command("fit", "--model", "PPO", "--env.num_envs", "4")
    assert outcome.code == 2
    assert f"in use by process {SHOWN} PPO on {SHOWN} PPO since" in harmless(outcome)


def test_a_resume_shows_what_the_file_holds(command: Command, fit: Command) -> None:
    """Settings that this version does not know are named, whatever they are called."""
    fit("PPO", "--episodes", "1")
    path = Path("checkpoints/PPO/episode_0001.pt")
    content = TrainingCheckpoint.read(path)
    content["run"]["config"] |= {f"model.{STEERS}": STEERS}
    metrics = content.pop("metrics")
    other = TrainingCheckpoint("checkpoints/other")
    other.begin_session(start_episode=1, device="cpu", info=content["run"])
    other.save_checkpoint(content, episode=content.pop("episode"), metrics=metrics)
    other.end_session("completed")
    words = ["--env.num_envs", "4", *TINY["PPO"], "--name", "other", "--episodes", "1"]
    outcome = command("fit", "--model", "PPO", "--ckpt_path", "last", *words)
    assert outcome.code == 0, outcome.err
    assert SHOWN in harmless(outcome)


def run(
    words: str, place: Path, environment: dict[str, str], encoding: str = "ascii"
) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `co2lightning` is the command."""
    start = f"co2lightning() {{ '{sys.executable}' -m co2lightning \"$@\"; }}; "
    return subprocess.run(
        ["bash", "-c", start + words],
        cwd=place,
        env={**environment, "PYTHONIOENCODING": encoding},
        capture_output=True,
        encoding=encoding,
        timeout=120,
    )


@POSIX
@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"no-\xe9-\u591c"), ("cp1252", r"no-é-\u591c")]
)
def test_what_an_encoding_lacks_is_escaped(
    place: Path, environment: dict[str, str], encoding: str, shown: str
) -> None:
    train("no-é-夜", [0.5])
    found = run("co2lightning history; co2lightning history 夜", place, environment, encoding)
    assert shown in found.stdout
    assert rf"error: \u591c: no such run in checkpoints; there are: {shown}" in found.stderr
    assert "Traceback" not in found.stderr
    assert found.returncode == 2


@POSIX
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("co2lightning history | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("co2lightning history --json | head -1; exit ${PIPESTATUS[0]}", 0, ""),
        ("co2lightning --help | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("co2lightning history --help | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("co2lightning verify none 2>&1 | true; exit ${PIPESTATUS[0]}", 2, ""),
        ("co2lightning history >&-", 0, ""),
        ("co2lightning verify none 2>/dev/full", 2, ""),
        *(
            (f"co2lightning {words} >/dev/full", 1, FULL)
            for words in ("history", "history --json", "history --help", "verify")
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_lines_that_nobody_takes(
    place: Path, environment: dict[str, str], line: str, code: int, said: str
) -> None:
    train("PPO", [0.5])
    before = tree(place)
    found = run(line, place, environment)
    assert (found.returncode, found.stderr) == (code, said)
    assert tree(place) == before
