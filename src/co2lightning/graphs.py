"""Functions as compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def as_graph(
    function: Callable[..., Any], *, cudagraphs: bool = False, cpp_wrapper: bool = False
) -> Callable[..., Any]:
    """Return a function as one graph for the shapes of its first call, compiled then.

    Nothing that the graph takes for given may change afterwards, and no other shapes may come: it
    does not look. torch's own look at everything takes a tenth of a small network's update.

    Args:
        function: Takes and returns tensors, or tuples of them.
        cudagraphs: Record the kernels; what a call returns is then overwritten by the next one.
        cpp_wrapper: Call the kernels from C++, which pays where they are many and small.

    Raises:
        RuntimeError: This machine has no C++ compiler.
    """
    import torch._dynamo.config
    from torch._inductor.cpp_builder import get_cpp_compiler

    get_cpp_compiler()  # raises where there is none
    torch._dynamo.config.trace_autograd_ops = True
    # It would cut a graph at every MB of weights, for hooks that no gradient here goes through
    # (see `ranks`); and half a graph cannot ask for the gradients of the whole.
    torch._dynamo.config.optimize_ddp = False
    settings: dict[str, Any] = {
        "fullgraph": True,
        "dynamic": False,
        "isolate_recompiles": True,  # agents of one process would share one limit
        "options": {
            "guard_filter_fn": lambda guards: [False] * len(guards),
            "triton.cudagraphs": cudagraphs,
            "cpp_wrapper": cpp_wrapper,
            "size_asserts": False,
            "alignment_asserts": False,
        },
    }
    return torch.compile(function, **settings)


NO_COMPILER = "no C++ compiler was found"


def why_not(error: Exception) -> str:
    """Return in a few words why a function could not be compiled."""
    reason = " ".join(str(error).split())
    missing = "C++ compiler" in reason or "is not found" in reason
    return NO_COMPILER if missing else reason[:200]
