"""What a person at a terminal reads: the live line, the plain lines, every command's help."""

import re
from collections.abc import Callable

import pytest

from conftest import COMMANDS, Outcome

Fit = Callable[..., Outcome]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def help_of(command: Fit, capsys: pytest.CaptureFixture[str], name: str) -> str:
    """Return a command's help; argparse ends the process after it, with 0."""
    if name == "fit":
        return command(name, "--help").out
    with pytest.raises(SystemExit) as end:
        command(name, "--help")
    assert not end.value.code
    return capsys.readouterr().out


def frames(outcome: Outcome) -> list[str]:
    """Return what the terminal showed, one after the other."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPE.sub("", outcome.out))]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_one_live_line(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    outcome = fit("PPO", "--episodes", "2")
    assert "\x1b[" in outcome.out
    (last,) = {frame for frame in frames(outcome) if frame.startswith("Episode 2/2")}
    whole = r"CO2= *[\d.]+ kg \([+-]\d+ %\) \| reward= *[\d.-]+ \| [\d.]+ s (left )?\d:\d\d:\d\d$"
    assert re.search(whole, last), "no figure is cut off"
    assert len(last) <= columns
    assert ("━" in last) == (columns == 120)
    assert not any(frame.startswith("Episode    2/2: ") for frame in frames(outcome))


def test_without_colours_or_a_terminal_lines_are_plain(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fit("PPO", "--episodes", "1").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    asked = fit("PPO", "--episodes", "1").out
    for out in (plain, asked):
        assert "\x1b" not in out
        assert re.search(r"^Episode    1/1: CO2= *[\d.]+ kg \(.*\) \| reward=.* s$", out, re.M)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_is_taken(
    command: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(command, capsys, name)
    assert max(map(len, text.splitlines())) <= 80
    example = re.search(rf"^example: co2lightning {name} (.+)$", text, re.M)
    assert example, text
    for flag in re.findall(r"--[\w.-]+", example[1]):
        assert flag in text or name == "fit-all"
    # Each option says what it is, on its line or on the next one.
    for option in re.findall(r"^  (-.*(?:\n {20,}.*)*)$", text, re.M):
        assert re.search(r"\S {2,}\S|\n", option), option


def test_the_list_of_commands_is_whole(command: Fit) -> None:
    text = command("--help").out
    assert max(map(len, text.splitlines())) <= 80
    listed = re.findall(r"^  ([a-z-]+) +\S", text, re.M)
    assert tuple(listed) == COMMANDS
    assert command("nonsense").err.endswith(f"choose one of {', '.join(COMMANDS)}\n")
    assert command().code == 2


@pytest.mark.parametrize("name", ["fit", "test", "history", "predict", "export"])
def test_help_names_units(command: Fit, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert re.search(r"\bkWh?\b|_kw\b", help_of(command, capsys, name))
