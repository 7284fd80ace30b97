"""Where files lie: on this machine's disks, in the user's home directory where a `~` says so."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from test_words import help_of

import co2lightning
from co2lightning import UserError
from co2lightning.runs.run import TrainingCheckpoint
from conftest import COMMANDS, TINY, Outcome, tree
from small_site import write_site

Command = Callable[..., Outcome]
FLAGS = [
    *("fit --ckpt_path", "fit --checkpoints.dir", "fit --logs.dir", "fit --env.site"),
    *("fit-all --checkpoints.dir", "history --checkpoints.dir", "verify --checkpoints.dir"),
    *("test --ckpt_path", "test --checkpoints.dir", "test --logs.dir", "test --steps"),
    *("report --output", "report --figures", "report --checkpoints.dir"),
    *("predict --output", "predict --observations", "predict --ckpt_path"),
    *("predict --checkpoints.dir", "export --output", "export --ckpt_path"),
    "export --checkpoints.dir",
]


def refused(command: Command, *words: str) -> str:
    before = tree(Path())
    outcome = command(*words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert tree(Path()) == before
    return outcome.err


@pytest.mark.parametrize("which", FLAGS)
def test_a_url_is_no_place(command: Command, which: str) -> None:
    name, flag = which.split()
    first = {"fit": ["--config", "ppo.yaml"], "history": [], "verify": [], "fit-all": []}
    words = [*first.get(name, ["PPO"]), *(["--output", "a"] if name == "export" else [])]
    for url in ("s3://bucket/x", "gs://bucket/x", "file:///data/x"):
        said = refused(command, name, *words, flag, url)
        named = "site" if flag == "--env.site" else flag
        assert said == f"error: {named} {url}: only local files and directories, not a URL\n"
    assert f"{flag} ~no-such-user/x: there is no such user" in refused(
        command, name, *words, f"{flag}=~no-such-user/x"
    ).replace("error: site", "--env.site")


def test_no_flag_that_takes_a_place_is_forgotten(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in COMMANDS[1:]:
        text = help_of(command, capsys, name)
        found = re.findall(r"^  (--\S+) (?:FILE|DIR)\b", text, re.M)
        assert {f"{name} {flag}" for flag in found} <= set(FLAGS)


def test_the_home_directory(
    fit: Command, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home := Path("home").absolute()))
    monkeypatch.setenv("USERPROFILE", str(home))
    home.mkdir()
    write_site(home / "site")
    recipe = "agent: PPO\nlogs: {dir: ~/logs}\nenv: {site: ~/site}\n"
    (home / "mine.yaml").write_text(recipe)
    fit("PPO", "--episodes", "1", "--config", "~/mine.yaml", "--checkpoints.dir", "~/runs")
    assert set(tree(home)) >= {"runs/PPO/episode_0001.pt", "logs/PPO"}
    assert command("verify", "--checkpoints.dir=~/runs").out == "PPO: ok, 1 checkpoint\n"
    words = ("--ckpt_path", "~/runs/PPO/episode_0001.pt", "--output", "~/day.csv")
    assert command("predict", "PPO", *words).code == 0
    assert (home / "day.csv").is_file()
    assert {path.name for path in Path().iterdir()} == {"home"}
    assert TrainingCheckpoint("~/runs/PPO").get_next_episode() == 2
    co2lightning.PPO.load_from_checkpoint("~/runs/PPO/episode_0001.pt")


def test_a_run_whose_site_has_moved_names_the_flag(fit: Command, command: Command) -> None:
    fit("PPO", "--episodes", "1", "--env.site", str(write_site(Path("there").absolute())))
    Path("there").rename("here")
    moved = ("predict PPO", "test PPO", "export PPO --output a.onnx", "report")
    again = f"fit --model PPO --ckpt_path last --env.num_envs 4 {' '.join(TINY['PPO'])}"
    for words in (*moved, again):
        said = refused(command, *words.split())
        file = Path("checkpoints/PPO/episode_0001.pt")
        assert said.startswith(f"error: {file}: site ")
        assert said.endswith("; --env.site gives its place here\n")
    said = refused(command, "predict", "PPO", "--env.site", "nowhere")
    assert said.startswith("error: site nowhere: no such folder")
    assert command("predict", "PPO", "--env.site", "here").code == 0
    fit("PPO", "--ckpt_path", "last", "--episodes", "1", "--env.site", "here")
    assert command("predict", "PPO").code == 0


def test_from_python() -> None:
    for use in (
        co2lightning.PPO.load_from_checkpoint,
        co2lightning.TrainingCheckpoint,
        co2lightning.load_site,
        lambda url: co2lightning.evaluate(print, url),
        lambda url: co2lightning.evaluate(print, keep=url),
        lambda url: co2lightning.fit({"config": "ppo.yaml", "logs.dir": url}),
    ):
        for place in ("s3://bucket/x", Path("s3://bucket/x"), "~no-such-user/x"):
            with pytest.raises(UserError, match=r"not a URL|there is no such user"):
                use(place)
