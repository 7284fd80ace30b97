"""`co2lightning fit`: train an agent, from a new start or a checkpoint."""

from co2lightning.agents import check_agent
from co2lightning.settings import parser
from co2lightning.terminal import tell
from co2lightning.train.fit import run_fit, which_agent
from co2lightning.train.signals import Interrupted, Signals


def main(argv: list[str]) -> int:
    """Run `co2lightning fit` and return its exit code."""
    given, rest = parser.split_arguments(argv)
    agent, recipe = given.get("agent"), given.get("config")
    if "-h" in rest or "--help" in rest:
        named = check_agent(agent or "PPO", "--model")
        parser.print_help(named, recipe or (f"{agent.lower()}.yaml" if agent else None))
        return 0
    agent = which_agent(agent, recipe, given.get("ckpt_path"))
    flags = parser.parse_flags(rest, agent)
    if "ckpt_path" in given:
        flags["ckpt_path"] = given["ckpt_path"]
    signals = Signals()
    try:
        run_fit(flags, agent=agent, config=recipe, signals=signals)
    except Interrupted as interrupted:
        if interrupted.exit_code:
            tell(f"Stopped by {interrupted}; --ckpt_path last continues")
        return interrupted.exit_code
    finally:
        signals.restore()
    return 0
