"""The command line: which command, which exit code.

Imports are lazy: `--help` and `history` need neither torch nor Lightning.
"""

import contextlib
import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from importlib import import_module
from types import FrameType
from typing import Any

from co2lightning.errors import TrainingError, UserError
from co2lightning.terminal import prepare, say, take_signals

_HELP = """\
usage: co2lightning COMMAND [options]

Train A2C, SAC and PPO controllers that cut the CO2 of a site with solar panels,
a battery and EV charging sockets. Every episode is checkpointed; training can
be cut anywhere and continued.

commands:
  fit      train an agent        co2lightning fit --config ppo.yaml
  fit-all  train all agents      co2lightning fit-all --episodes 5
  test     run on held-out weeks co2lightning test PPO
  report   all in one HTML file  co2lightning report --output report.html
  history  what was trained      co2lightning history
  verify   check a run's files   co2lightning verify PPO
  predict  a day's plan as CSV   co2lightning predict PPO --output schedule.csv
  export   a controller as ONNX  co2lightning export PPO --output policy.onnx
  site     look at a site        co2lightning site check iquitos

After a stop: co2lightning fit --config ppo.yaml --ckpt_path last
More:         co2lightning COMMAND --help
Curves:       tensorboard --logdir lightning_logs
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done. 2: what was asked cannot be. 129, 130, 143: SIGHUP, SIGINT, SIGTERM. 1: a defect, a
    training that cannot go on, or a disk that fails.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    prepare()
    previous = _end_on_signal()
    try:
        try:
            return _run(argv)
        finally:
            say()  # what argparse has printed may not be out yet
    except UserError as error:
        return _fail(error, 2)
    except TrainingError as error:
        return _fail(error, 1) if error.exit_code else 0
    except OSError as error:
        return _fail(_disk_line(error, training=argv[:1] in (["fit"], ["fit-all"])), 1)
    except KeyboardInterrupt:
        return 130
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        say(*_HELP.splitlines())
        return 0 if argv else 2
    if argv[0] == "--version":
        from co2lightning import __version__

        say(f"co2lightning {__version__}")
        return 0
    if argv[0] not in _COMMANDS:
        raise UserError(f"{argv[0]}: no such command; choose one of {', '.join(_COMMANDS)}")
    module, function = argv[0].replace("-", "_"), "main"
    if module == "verify":
        module, function = "history", "verify_main"
    with _importing():
        run = getattr(import_module(f"co2lightning.commands.{module}"), function)
    return run(argv[1:])


_COMMANDS = "fit", "fit-all", "test", "report", "history", "verify", "predict", "export", "site"


@contextlib.contextmanager
def _importing() -> Generator[None]:
    """Collect no garbage while torch and Lightning are imported.

    They make a million objects that stay; to go through them again and again, and once more at
    the end, takes two seconds.
    """
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):  # which Lightning reads at once
        if not (number := os.environ.get(name, "0")).isdecimal():
            raise UserError(f"{name} {number!r}: a launcher sets a number; unset it")
    if "lightning.pytorch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _fail(what: object, code: int) -> int:
    say(f"error: {' '.join(str(what).split())}", err=True)
    return code


def _disk_line(error: OSError, training: bool) -> str:
    line = str(error.strerror or error)
    if error.filename:
        line = f"{os.fsdecode(error.filename)}: {line}"
    if not training:
        return line
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{line}; the last whole episode is safe: make room, then --ckpt_path last continues"
    return f"{line}; what was saved before is safe, --ckpt_path last continues"


def _end_on_signal() -> dict[int, Any]:
    """Until training takes the signals over there is nothing to save: end at once.

    By the system's own action, for a solver or an import in C does not look at Python's handlers.
    The first process of a container has no such action.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        os._exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        return {}
    return take_signals(end if os.getpid() == 1 else signal.SIG_DFL)
