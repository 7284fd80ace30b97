"""Every part of an episode's file replaced by what does not belong there: a line or success."""

import contextlib
import math
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import co2lightning
from co2lightning.errors import UserError
from co2lightning.runs import seal as sealing
from co2lightning.runs.run import TrainingCheckpoint
from conftest import Outcome
from forged import seal_content, unseal

Path_ = tuple[Any, ...]
GOLDEN = Path(__file__).parents[1] / "golden" / "0.4.0"
SECONDS = 10.0  # of the processor, on a machine with other work; hostile files took minutes


def paths(value: Any, above: Path_ = ()) -> Iterator[Path_]:
    """Yield where every part of nested data is."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        yield (*above, key)
        if isinstance(part, dict | list | tuple):
            yield from paths(part, (*above, key))


def put(value: Any, path: Path_, part: Any) -> Any:
    """Return nested data with a part replaced; a part that is `...` is left out."""
    key, *rest = path
    if rest:
        part = put(value[key], tuple(rest), part)
    if not isinstance(value, dict):
        return type(value)(part if n == key else old for n, old in enumerate(value))
    kept = {k: old for k, old in value.items() if k != key}
    return kept if part is ... else {**kept, key: part}


def nested(levels: int, width: int, kind: type = list) -> Any:
    """Return lists in lists, each there `width` times and the same one."""
    value = kind()
    for _ in range(levels):
        value = kind([value] * width)
    return value


class LongHash:
    """Pickles to a dictionary whose key would be hashed for years; it must never be made."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter([(nested(40, 2, tuple), 1)])


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
PLAIN = [None, [], {}, -1, 3.0, 1e308, 10**401, 2**53 - 1, True, "x", [[[]]], {"a": [1]}, ...]
ODD = [
    *PLAIN,
    math.nan,
    torch.tensor(3),
    torch.zeros(3),
    torch.zeros(1).expand(10**9),
    {(1, 2): 3},
    {1: 2},
    set[Any](),
    [8] * 5000,
    CYCLE,
    nested(40, 2),
    nested(300, 1),
    LongHash(),
]


@pytest.fixture(scope="module")
def good() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of an episode and its record."""
    return unseal(GOLDEN / "PPO" / "episode_0002.pt")


@pytest.fixture
def forge(
    good: tuple[dict[str, Any], dict[str, Any]], place: Path
) -> Callable[[str, Path_, Any], Path]:
    """Return what makes a run whose newest episode has an odd part."""
    run = place / "checkpoints" / "PPO"
    run.mkdir(parents=True)
    shutil.copy(GOLDEN / "PPO" / "episode_0001.pt", run)

    def make(where: str, path: Path_, part: Any) -> Path:
        content, record = good
        if where == "record":
            record = put(record, path, part)
        else:
            content = put(content, path, part)
        (run / "episode_0002.pt").write_bytes(seal_content(content, record))
        return run / "episode_0002.pt"

    return make


def cases(good: tuple[dict[str, Any], dict[str, Any]]) -> list[tuple[str, Path_, Any]]:
    content, record = good
    found = [("content", path, part) for path in paths(content) for part in ODD]
    return found + [("record", path, part) for path in paths(record) for part in PLAIN]


def check(file: Path, *uses: Callable[[], Any]) -> None:
    """Each use succeeds or says in a line what is wrong, and soon."""
    for use in uses:
        began = time.process_time()
        said = str(file)
        try:
            use()
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        assert file.name in said or str(file.parent) in said
        assert time.process_time() - began < SECONDS


def reading(file: Path) -> list[Callable[[], Any]]:
    run = TrainingCheckpoint(file.parent)
    return [
        lambda: co2lightning.PPO.load_from_checkpoint(file),
        run.load_latest_checkpoint,
        run.load_history,
        run.load_metadata,
        run.verify,
    ]


@pytest.mark.parametrize(
    "step", [pytest.param(11, marks=pytest.mark.slow), 797], ids=["many", "a few"]
)
def test_reading_a_file_with_an_odd_part(
    good: tuple[dict[str, Any], dict[str, Any]],
    forge: Callable[[str, Path_, Any], Path],
    step: int,
) -> None:
    for case in cases(good)[::step]:
        with contextlib.suppress(OverflowError):  # pickle's, where there is no such file
            file = forge(*case)
            check(file, *reading(file))


WIDE = (16_384,) * 3
NAMED: list[tuple[str, Path_, Any]] = [
    ("content", ("run", "config", "model.hidden"), list(WIDE)),
    ("content", ("run", "config", "model.hidden"), [8] * 100_000),
    ("content", ("run", "config", "model.hidden"), None),
    ("content", ("run", "config", "model.gamma"), "0.5" * 9_000),
    ("content", ("run", "agent"), torch.zeros(30)),
    ("content", ("run", "other"), nested(40, 2)),
    ("content", ("run", "other"), CYCLE),
    ("content", ("run", "other"), LongHash()),
    ("content", ("state_dict", "log_std"), torch.zeros(2, dtype=torch.complex64)),
    ("content", ("optimizer_states", 0, "state", 0, "step"), torch.tensor(-1.0)),
    ("content", ("optimizer_states", 0, "state", 0, "exp_avg"), None),
    ("content", ("counters", "updates"), torch.tensor(3)),
    ("content", ("callbacks",), []),
    ("content", ("episode",), 2.0),
    ("record", ("pruned_to",), 2**53 - 1),
    ("record", ("pruned_to",), 2),
    ("record", ("metrics", "episode"), ...),
    ("record", ("session", "duration_seconds"), 10**401),
    ("record", ("session", "start_episode"), 3),
]


@pytest.mark.parametrize("case", NAMED, ids=lambda case: str(case[1][-1]))
def test_resuming_from_a_file_with_an_odd_part(
    forge: Callable[[str, Path_, Any], Path],
    command: Callable[..., Outcome],
    case: tuple[str, Path_, Any],
) -> None:
    file = forge(*case)
    check(file, lambda: co2lightning.PPO.load_from_checkpoint(file))
    began = time.process_time()
    outcome = command("fit", "--ckpt_path", str(shutil.copy(file, "other.pt")), "--name", "B")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith("error: other.pt")
    assert not Path("checkpoints/B").exists()
    assert time.process_time() - began < SECONDS


HYPERPARAMETERS: list[Any] = [
    ("hindsight_dim", -1),
    ("hindsight_dim", torch.zeros(3)),
    ("hidden", WIDE),
    ("hidden", (8,) * 9_999),
    ("hidden", None),
    ("activation", "evil"),
    ("observation_dim", ...),
    ("observation_dim", 10**9),
    ("seed", None),
    ("gamma", [0.9]),
    ("clip_range", torch.tensor(0.2)),
    (7, 7),
]


@pytest.mark.parametrize(("key", "value"), HYPERPARAMETERS, ids=lambda value: str(value)[:20])
def test_hyperparameters_that_are_none(
    forge: Callable[[str, Path_, Any], Path],
    command: Callable[..., Outcome],
    key: Any,
    value: Any,
) -> None:
    file = forge("content", ("hyper_parameters", key), value)
    with pytest.raises(UserError, match=r"episode_0002\.pt"):
        co2lightning.PPO.load_from_checkpoint(file)
    outcome = command("export", "PPO", "--output", "policy.onnx")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_loops_that_disagree_with_the_episode(
    forge: Callable[[str, Path_, Any], Path], command: Callable[..., Outcome]
) -> None:
    """Nor does the optimizer's own account of its settings count: both follow from the run."""
    file = forge("content", ("loops", "fit_loop", "epoch_progress"), {"current": "evil"})
    outcome = command("fit", "--ckpt_path", str(file), "--model.n_epochs", "1", "--episodes", "1")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Resuming PPO at episode 3 (2 episodes done)" in outcome.out
    assert TrainingCheckpoint(file.parent).verify() == []


def test_an_object_that_hides_methods_in_a_dictionary(
    good: tuple[dict[str, Any], dict[str, Any]], place: Path
) -> None:
    """A file can give a dictionary attributes, which torch and its own methods' callers heed."""
    content, record = good
    hidden = {"items": 3, "_metadata": {"actor": {"assign_to_params_buffers": True}}}

    class Hiding:
        def __reduce__(self) -> tuple[Any, ...]:
            return OrderedDict, (), hidden, None, iter(content["state_dict"].items())

    Path("odd.pt").write_bytes(seal_content({**content, "state_dict": Hiding()}, record))
    assert torch.load("odd.pt", weights_only=True)["state_dict"].items == 3
    loaded = TrainingCheckpoint.read("odd.pt")["state_dict"]
    assert type(loaded) is dict
    agent = co2lightning.PPO.load_from_checkpoint("odd.pt")
    assert agent.get_submodule("actor").layers[0][0] is agent.get_parameter("actor.weights.0")


def test_large_honest_content_is_still_saved_and_read(place: Path) -> None:
    """Many episodes' notes of a user's callback, and what a generator's state needs."""
    run = TrainingCheckpoint("checkpoints/PPO")
    notes = {"notes": [{"kg": 1.0, "kwh": 2.0} for _ in range(30_000)], "generator": 2**127}
    run.save_checkpoint({"callbacks": {"mine": notes}}, episode=1, metrics={})
    began = time.process_time()
    assert TrainingCheckpoint.read(run.path(1))["callbacks"]["mine"] == notes
    assert time.process_time() - began < SECONDS
    with pytest.raises(ValueError, match="neither texts nor whole numbers"):
        run.save_checkpoint({"callbacks": {(1, 2): 3}}, episode=2, metrics={})
    run.end_session("failed")


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e400", "[" * 90 + "]" * 90])
def test_json_that_could_not_be_shown_or_written_again(place: Path, number: str) -> None:
    run = shutil.copytree(GOLDEN / "PPO", place / "PPO")
    text = (run / "metadata.json").read_text().replace('"versions"', f'"odd": {number}, "versions"')
    (run / "metadata.json").write_bytes(sealing.seal_json(text[: text.rindex(",")] + "}"))
    with pytest.raises(ValueError, match=r"large|no number|nested"):
        sealing.read_json(run / "metadata.json")
    assert TrainingCheckpoint(run).load_metadata()["last_episode"] == 2
