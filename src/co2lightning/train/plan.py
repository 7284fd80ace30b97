"""What a session will do, worked out by reading only.

    Asked   the agent, its recipe and the flags
    Start   the episode it goes on from, read from disk and checked: `find_start`
    Plan    its settings, its last episode, what the user is told: `plan`, a pure function
    Built   its environment, agent and replay buffer, made once from the plan: `build`

Each of these steps refuses what cannot be, and none changes anything on disk.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from co2lightning.agents import agent_class, check_agent
from co2lightning.agents.agent import Agent
from co2lightning.agents.load import (
    SIZES,
    agent_of,
    restore_agent,
    rewarded_otherwise,
    stored_settings,
)
from co2lightning.agents.replay import fewest_rows, is_piece, pieces_of_ranks
from co2lightning.control.moves import ACTIONS, in_words
from co2lightning.errors import UserError
from co2lightning.learn.descent import worth_compiling
from co2lightning.learn.ranks import Rank
from co2lightning.places import local
from co2lightning.runs.ledger import MAX_EPISODES
from co2lightning.runs.run import TrainingCheckpoint
from co2lightning.settings.parser import check_stored, complete, run_settings, unknown_settings
from co2lightning.settings.recipe import Settings, read_recipe
from co2lightning.settings.words import as_flag
from co2lightning.sim.days import SiteDays, make_environment
from co2lightning.sim.interface import Environment
from co2lightning.sim.search import corner_of
from co2lightning.site import trained_days
from co2lightning.site.load import named_in
from co2lightning.train.save import restorable
from co2lightning.train.trainer import processes


@dataclass(frozen=True)
class Asked:
    """What a session was asked for."""

    agent: str
    config: str  # the recipe's name
    recipe: Settings
    flags: Settings  # win over what the run was started with, and that over the recipe

    @property
    def session(self) -> Settings:
        """All settings, whatever the run was started with."""
        return complete({**self.recipe, **self.flags}, self.agent)


@dataclass(frozen=True)
class Start:
    """The episode a session goes on from; 0 is what a run began with."""

    episode: int
    path: Path
    file: tuple[int, int, int]  # tells it from another file that has its name later
    settings: Settings
    target_episode: int
    stopped_by: tuple[str, str] | None  # a callback and, where known, why
    world_size: int
    notes: tuple[str, ...]
    content: dict[str, Any] = field(compare=False)


@dataclass(frozen=True)
class Plan:
    """What a session will do."""

    asked: Asked
    start: Start | None
    settings: Settings
    target: int  # the last episode
    notes: tuple[str, ...]

    @property
    def done(self) -> int:
        """Episodes that are done already."""
        return self.start.episode if self.start else 0


@dataclass(frozen=True)
class Built:
    """What a plan needs to be carried out."""

    plan: Plan
    rank: Rank
    settings: Settings  # the plan's, and whether to compile, which an agent's updates decide
    environment: Environment
    learner: Agent
    restored: dict[str, Any] | None  # the start's content, for Lightning
    replay: list[dict[str, Any]]  # what earlier episodes added to this rank's buffer, oldest first
    rows: list[int]  # of each of these, the fewest that a rank added
    notes: tuple[str, ...]


def which_agent(agent: str | None, config: str | None, ckpt_path: str | None) -> str:
    """Return the agent: the one named, else the recipe's, else the checkpoint's."""
    if agent is not None:
        check_agent(agent, "--model")
    if config is not None:
        named = read_recipe(config)[0]
        if agent not in (None, named):
            raise UserError(
                f"--model {agent}: {config} is a recipe of {named}; leave --config out for the "
                f"recipe of {agent}"
            )
        return named
    if agent is not None:
        return agent
    path = _checkpoint_file(ckpt_path)
    if path is None:
        raise UserError("fit needs --config, such as --config ppo.yaml, or --model, such as PPO")
    return agent_of(TrainingCheckpoint.read(path), path)


def _checkpoint_file(ckpt_path: str | None) -> Path | None:
    if ckpt_path in (None, "last", "best"):
        return None
    path = Path(local("--ckpt_path", str(ckpt_path)))
    if not path.is_file() and not path.is_dir():
        raise UserError(
            f"--ckpt_path {ckpt_path}: no such file; give last, best, or a file such as "
            "checkpoints/PPO/episode_0004.pt"
        )
    return path.resolve() if path.is_symlink() else path  # beside the file lies its run


def find_start(run: TrainingCheckpoint, asked: Asked) -> Start | None:
    """Read the episode to go on from; None where the session begins a new run."""
    ckpt_path = asked.flags.get("ckpt_path")
    if ckpt_path == "best":
        _, path, remarks = run.load_best_checkpoint()
        start = _read_start(path, asked.agent)
        return replace(start, notes=(*remarks, *start.notes))
    path = _checkpoint_file(ckpt_path)
    if path is None:
        newest = run.get_next_episode() - 1 if ckpt_path == "last" else 0
        return _read_start(run.path(newest), asked.agent) if newest else None
    start = _read_start(path, asked.agent)
    own = run.path(start.episode)
    if path.resolve() != own.resolve() and path.resolve().parent == run.directory.resolve():
        raise UserError(f"--ckpt_path {path}: a copy within the run; give {own}, or move the copy")
    return start


def _read_start(path: Path, agent: str) -> Start:
    """Read a checkpoint, perhaps of another version, perhaps not ours at all."""
    found = path.stat()
    content = TrainingCheckpoint.read(path)
    trained = agent_of(content, path)
    if trained != agent:
        raise UserError(
            f"{path}: a checkpoint of {trained}, not of {agent}; "
            f"use --config {trained.lower()}.yaml"
        )
    if why := rewarded_otherwise(content["run"]):
        raise UserError(
            f"{path}: {why}; test, predict, export and report take its policy, training cannot go "
            "on: leave --ckpt_path out to train anew"
        )
    run, episode, epoch = content["run"], content["episode"], content.get("epoch")
    if type(epoch) is not int or epoch != episode - 1:
        raise UserError(f"{path}: not an episode of co2lightning; its epoch is another one")
    stored = run_settings({str(key): value for key, value in run["config"].items()})
    notes = tuple(
        f"{path}: this version has no {key}; its {str(stored.pop(key))[:60]} is ignored"
        for key in unknown_settings(stored, agent)
    )
    # What the checkpoint does not know yet had the default's effect; nothing was ever compiled, and
    # no episode evaluated.
    known = {"model.compile": False, "evaluate_every": 0}
    known |= check_stored(stored, agent, str(path))
    target, world_size = run.get("target_episode"), run.get("world_size")
    match content.get("stopped_by"):
        case (str() as callback, str() as reason):
            stopped_by = callback, reason
        case _:
            stopped_by = None
    return Start(
        episode,
        path,
        (found.st_ino, found.st_size, found.st_mtime_ns),
        run_settings(complete(known, agent)),
        target if type(target) is int and target <= MAX_EPISODES else 0,
        stopped_by,
        world_size if type(world_size) is int else 1,
        notes,
        content,
    )


def plan(asked: Asked, start: Start | None) -> Plan:
    """Work out a session's settings and its last episode.

    Raises:
        UserError: The flags contradict each other, or what the run keeps.
    """
    agent, recipe, flags = asked.agent, asked.recipe, asked.flags
    kept = start.settings if start else {}
    settings = complete({**recipe, **kept, **flags}, agent)
    if (name := settings["env.id"]) is not None:
        for key, has in (("env.hours", "a time limit of its own"), ("evaluate_every", "no weeks")):
            if value := flags.get(key):
                raise UserError(f"{as_flag(key, value)}: is for sites; {name} has {has}")
    notes = list(start.notes) if start else []
    for key, value in recipe.items():
        if key in kept and kept[key] != value and key not in flags and value != "auto":
            flag = as_flag(key, value)
            notes.append(
                f"{asked.config} has {key} {value}, the run keeps {kept[key]}; {flag} applies it"
            )
    if start:
        if settings["model.compile"] == "auto":
            settings["model.compile"] = kept["model.compile"]
        notes += _changes(kept, settings, agent)
        module = str(kept["env.id"])
        if ":" in module and module not in (flags.get("env.id"), recipe.get("env.id")):
            raise UserError(
                f"{start.path}: its env.id names a module to import; if you trust it, give it "
                f"yourself: --env.id {module[:80]}"
            )
    return Plan(asked, start, settings, _target(asked, start), tuple(notes))


def _changes(before: Settings, after: Settings, agent: str) -> list[str]:
    """Return a line for each setting that a resume changes; refuse what it cannot change."""
    lines: list[str] = []
    for key, old in before.items():
        new = after[key]
        if new == old:
            continue
        if key.removeprefix("model.") in agent_class(agent).fixed_settings:
            raise UserError(
                f"{as_flag(key, new)}: the checkpoint was trained with {old} and its weights have "
                "that shape; leave the flag out, or start a new run"
            )
        lines.append(f"{key.split('.')[-1]}: {old} -> {new}")
    return lines


def _target(asked: Asked, start: Start | None) -> int:
    """Return the last episode of a session."""
    done = start.episode if start else 0
    total, by_flag = asked.flags.get("total_episodes"), "episodes" in asked.flags
    if total is not None and by_flag:
        raise UserError("--episodes and --total_episodes: give one of them")
    if start and start.stopped_by and not by_flag:
        # Ended on purpose: to go on would train one episode more at each start. Where a callback
        # did not say why, it may only have been out of time, so a total goes on.
        _, reason = start.stopped_by
        if total is None or (reason and total <= start.target_episode):
            return done
    if total is not None:
        return total
    if not by_flag and start and start.target_episode > done:
        return start.target_episode
    target = done + asked.session["episodes"]
    if target > MAX_EPISODES:
        raise UserError(f"--episodes: a run has at most {MAX_EPISODES:,} episodes")
    return target


def build(plan: Plan, rank: Rank) -> Built:
    """Make the environment and the agent of a plan, and read the agent's replay buffer.

    Raises:
        UserError: They cannot be made, do not fit the start, or a piece of the buffer is missing.
    """
    asked, start, settings, notes = plan.asked, plan.start, dict(plan.settings), list(plan.notes)
    kept_site = settings["env.id"] is None and "env.site" not in asked.flags
    with named_in(start.path if start and kept_site else None):
        environment = make_environment(**_group(settings, "env."))
    if start and isinstance(environment, SiteDays):
        known = stored_settings(start.content, start.path).get("observation_names", ())
        environment.show(known, str(start.path))
    options = {
        **{key: getattr(environment, key) for key in SIZES},
        "observation_names": environment.observation_names,
        "seed": settings["seed_everything"],
        **_group(settings, "model."),
    }
    if start:
        learner = restore_agent(start.content, start.path, options)
    else:
        learner = agent_class(asked.agent)(**options)
    if settings["model.compile"] == "auto":  # by the recipe, not by what a session was asked for
        episodes = complete(asked.recipe, asked.agent)["episodes"]
        worth = worth_compiling(episodes * learner.updates_per_episode(environment))
        settings["model.compile"] = learner.settings.compile = worth
    learner.train_on(environment)
    restored: dict[str, Any] | None = None
    replay, rows = list[dict[str, Any]](), list[int]()
    if start:
        if start.world_size != rank.world_size:
            raise UserError(
                f"{start.path}: trained on {processes(start.world_size)}, not on "
                f"{rank.world_size}; each has days and a replay buffer of its own, so a run keeps "
                f"their number: give --trainer.devices {start.world_size}, or start a new run"
            )
        if start.episode:
            restored = restorable(start.content, start.path, learner)
        if isinstance(environment, SiteDays):
            notes += _other_data(start, environment)
        if plan.target > start.episode:
            replay, rows = _load_replay(learner, start, settings["allow_partial_replay"], rank)
    return Built(plan, rank, settings, environment, learner, restored, replay, rows, tuple(notes))


def begin_at_corner(built: Built) -> str | None:
    """Let a fresh agent that weighs a site's moves begin at the best of them; returns it in words.

    None of any other agent, and where `--model.start even` was asked for.
    """
    environment, learner = built.environment, built.learner
    if built.plan.start or learner.settings.start == "even":
        return None
    if not isinstance(environment, SiteDays) or learner.action_dim != ACTIONS["moves"]:
        return None
    site = environment.site
    if (corner := corner_of(site)) is None:
        return None
    learner.begin_at(corner.action(*learner.first_action))
    return in_words(corner, site)


def _group(settings: Settings, prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)
    }


def _other_data(start: Start, environment: SiteDays) -> list[str]:
    """Return what is to be said where a site's data have changed since a run began."""
    site, run = environment.site, start.content["run"]
    known = run["site"].get("sha256") if isinstance(run.get("site"), dict) else None
    if known in (None, site.sha256):
        return []
    notes = [
        f"The data of site {site.name} are others than at episode {start.episode}; training goes "
        "on with these"
    ]
    trained = trained_days.seen(run, site)
    if trained is not None and (both := trained_days.held_out_among(trained, site)):
        notes.append(
            f"{both[0].upper()}{both[1:]} were trained on up to episode {start.episode}; test and "
            "report leave them out"
        )
    return notes


def _load_replay(
    learner: Agent, start: Start, allow_partial: bool, rank: Rank
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the newest replay pieces of a rank that fill the agent's buffer, and their rows."""
    replay, rows = list[dict[str, Any]](), list[int]()
    capacity = learner.replay_capacity
    if capacity is None:
        return replay, rows
    source = TrainingCheckpoint(start.path.parent)
    sizes = (learner.observation_dim, learner.action_dim)
    for episode, content in source.load_replay(range(start.episode, 0, -1), allow_partial):
        pieces = pieces_of_ranks(content)
        if len(pieces) != rank.world_size or not all(is_piece(piece, *sizes) for piece in pieces):
            if allow_partial:
                continue
            raise UserError(
                f"{source.replay_path(episode)}: not a replay piece of this run; "
                "--allow_partial_replay goes on without it"
            )
        replay.append(pieces[rank.number])
        rows.append(fewest_rows(content))
        if sum(rows) >= capacity:
            break
    return replay[::-1], rows[::-1]
