"""Processes of their own, forked from one that is warm (warm.py), or started from the shell."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["warm"])


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start `target` in a process forked from the warm one."""
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
        forkserver.ensure_running()  # the first time it starts the server, which finds warm.py
    process = SERVER.Process(target=_warm, args=(target, *arguments), daemon=True)
    process.start()
    return process


def _warm(target: Callable[..., None], *arguments: Any) -> None:
    assert "warm" in sys.modules, "the server did not warm up"
    target(*arguments)
