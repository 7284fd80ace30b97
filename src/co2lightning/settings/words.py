"""What a user did wrong, in one line that says what would be right."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from co2lightning.agents.ranges import Kind, in_words

# What Lightning's Trainer has and fit has not, and what other tools call it: what to do instead.
_BY_WHAT_TO_DO = {
    "training goes by episodes; use --episodes or --total_episodes": """
        max_epochs max_steps min_epochs min_steps max_time epochs num_epochs total_timesteps""",
    "nothing is validated while training; co2lightning test evaluates a run": """
        num_sanity_val_steps check_val_every_n_epoch val_check_interval limit_val_batches
        limit_test_batches limit_predict_batches inference_mode""",
    "for a short trial use --episodes 1 --env.num_envs 2": """
        fast_dev_run limit_train_batches overfit_batches""",
    "every episode is saved; --checkpoints.keep_last says how many stay": """
        enable_checkpointing barebones save_top_k save_last save_freq""",
    "curves go to TensorBoard; --logs.dir says where": """
        logger tensorboard_log log_dir logdir model_registry enable_autolog_hparams""",
    "days are simulated side by side: --env.num_envs; --trainer.devices makes processes": """
        n_envs num_workers workers""",
    "use --trainer.accelerator and --trainer.devices": "device gpus",
    "use --ckpt_path last": "resume resume_from_checkpoint",
    "use --model.hidden": "net_arch policy_kwargs",
    "figures are logged after every episode": "log_every_n_steps",
    "the live line is for terminals; a pipe or a file gets plain lines": "enable_progress_bar",
    "no summary is printed": "enable_model_summary",
    "it prints a line for each episode": "verbose",
    "use --checkpoints.dir and --logs.dir": "default_root_dir",
    "those that save and connect are co2lightning's own": "plugins",
    "the updates are the agent's own, see --model.learning_rate and on": "accumulate_grad_batches",
    "use --model.max_grad_norm, which A2C and PPO have": "gradient_clip_val",
    "gradients are clipped by their norm: --model.max_grad_norm": "gradient_clip_algorithm",
    "the networks have no batch norm": "sync_batchnorm",
    "each process draws days of its own": "use_distributed_sampler",
    "every episode draws its days anew": "reload_dataloaders_every_n_epochs",
    "use --seed_everything": "seed",
    "critics see what policies see since 0.4.0; leave it out": "hindsight",
    "use --model.learning_rate": "lr",
}
INSTEAD = {name: what for what, names in _BY_WHAT_TO_DO.items() for name in names.split()}


def as_flag(key: str, value: Any) -> str:
    """Return the flag that sets a value, as one types it."""
    text = (
        value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
    )
    return f"--{key} {text}"


def closest(key: str, kinds: Mapping[str, Kind], prefix: str = "") -> str:
    """Say what to use in place of a key that is none."""
    if instead := INSTEAD.get(key.split(".")[-1]):
        return f": {instead}"
    known = [*kinds, "config", "model"]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:  # the group forgotten: learning_rate
        close = [name for name in known if name.split(".")[-1] == key][:1]
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def one_line(message: str, kinds: Mapping[str, Kind], prefix: str) -> str:
    """Turn jsonargparse's pages into one line that names the flag and what would be right."""
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown:
        flag = unknown[1].partition("=")[0]
        if not flag.startswith("--"):
            return f"{flag} is not a flag of fit; flags begin with --, such as --episodes 5"
        return f"{flag} is not a flag of fit{closest(flag[2:], kinds, '--')}"
    text = " ".join(line.strip(" -\t") for line in message.splitlines())
    key = re.search(r'key "([^"]+)"|[Aa]rgument "?(?:--)?([\w.]+)', text)
    name = key and (key[1] or key[2])
    value = re.search(r"Given value: (.*)", text) or re.search(r"Got value: (.*)", text)
    wanted, _ = kinds.get(name or "", (None, None))
    if wanted is not None and (problems := problems_in(message)):
        return f"{prefix}{name}: {problems[:200]}"
    if wanted is not None and value:
        return f"{prefix}{name} {value[1][:80]}: must be {in_words(wanted)}"
    if wanted is not None and "expected one argument" in text:
        return f"{prefix}{name} needs a value: {in_words(wanted)}"
    return f"{prefix}{name}: {text[:200]}" if name else text[:200]


def problems_in(message: str) -> str:
    """Return what is wrong with a class that was given, without the types it might be instead."""
    found = re.findall(r"^( *)- (.*(?:\n\1 +\S.*)*)", message, re.M)
    others = ("Expected a ", "Not a valid subclass of ")
    return "; ".join(" ".join(text.split()) for _, text in found if not text.startswith(others))
