"""A2C, SAC, PPO and APG controllers that cut the CO2 of a charging site, on PyTorch Lightning.

`import co2lightning` registers `co2lightning/ChargingSite-v0` with Gymnasium. The public names
load what they need when they are first used, so importing the package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import gymnasium

if TYPE_CHECKING:
    from co2lightning.agents.a2c import A2C as A2C
    from co2lightning.agents.apg import APG as APG
    from co2lightning.agents.ppo import PPO as PPO
    from co2lightning.agents.sac import SAC as SAC
    from co2lightning.errors import TrainingError as TrainingError
    from co2lightning.errors import UserError as UserError
    from co2lightning.report.evaluate import evaluate as evaluate
    from co2lightning.runs.run import TrainingCheckpoint as TrainingCheckpoint
    from co2lightning.sim.gymnasium import ChargingSiteEnv as ChargingSiteEnv
    from co2lightning.sim.gymnasium import ChargingSiteVectorEnv as ChargingSiteVectorEnv
    from co2lightning.site.load import load_site as load_site
    from co2lightning.train.fit import fit as fit

__version__ = "0.5.0"

_HOME = {
    "A2C": "agents.a2c",
    "APG": "agents.apg",
    "PPO": "agents.ppo",
    "SAC": "agents.sac",
    "ChargingSiteEnv": "sim.gymnasium",
    "ChargingSiteVectorEnv": "sim.gymnasium",
    "TrainingCheckpoint": "runs.run",
    "TrainingError": "errors",
    "UserError": "errors",
    "evaluate": "report.evaluate",
    "fit": "train.fit",
    "load_site": "site.load",
}
"""Public name -> the module it lives in."""


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


gymnasium.register(
    id="co2lightning/ChargingSite-v0",
    entry_point="co2lightning.sim.gymnasium:ChargingSiteEnv",
    vector_entry_point="co2lightning.sim.gymnasium:ChargingSiteVectorEnv",
)
