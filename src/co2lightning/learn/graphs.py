"""Functions as compiled graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def as_graph(
    function: Callable[..., Any], device: torch.device, *, record: bool = False
) -> Callable[..., Any]:
    """Return a function as one graph for the shapes of its first call, compiled then.

    Nothing that the graph takes for given may change afterwards, and no other shapes may come: it
    does not look. torch's own look at everything takes a tenth of a small network's update.

    Args:
        function: Takes and returns tensors, or tuples of them.
        device: Where the tensors are.
        record: On a GPU, record the kernels; what a call returns is overwritten by the next one.
    """
    from torch._dynamo import config

    config.trace_autograd_ops = True
    # It would cut a graph at every MB of weights, for hooks that no gradient here goes through
    # (see `ranks`); and half a graph cannot ask for the gradients of the whole.
    config.optimize_ddp = False

    def whole(*args: Any) -> Any:
        return function(*args)

    settings: dict[str, Any] = {
        "fullgraph": True,
        "dynamic": False,
        "isolate_recompiles": True,  # agents of one process would share one limit
        "options": {
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
            "triton.cudagraphs": record and device.type == "cuda",
            "cpp_wrapper": device.type == "cpu",  # a tenth, where kernels are many and small
            "size_asserts": False,
            "alignment_asserts": False,
        },
    }
    return torch.compile(whole, **settings)


def as_recording(
    function: Callable[..., tuple[Tensor, ...]], arguments: tuple[Tensor, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function whose kernels are recorded on a GPU and replayed as one; else itself.

    Args:
        function: Takes and returns tensors, and asks the GPU for nothing.
        arguments: To record with; later ones have their shapes.

    Raises:
        RuntimeError: The recording cannot be made, or does not give what it recorded.
    """
    if arguments[0].device.type != "cuda":
        return function
    expected = function(*arguments)
    # A recording reads where its first arguments are and writes where its first results are.
    own = tuple(argument.clone() for argument in arguments)
    recording: Any = torch.cuda.make_graphed_callables(function, own)

    def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(result.clone() for result in recording(*arguments))

    for given, result in zip(replay(*arguments), expected, strict=True):
        if not torch.equal(given, result):
            raise RuntimeError("a recording on the GPU gives other results than its functions")
    return replay


NO_COMPILER = "no C++ compiler was found"


def why_not(error: Exception) -> str:
    """Return in a few words why a function could not be compiled."""
    reason = " ".join(str(error).split())
    missing = "C++ compiler" in reason or "is not found" in reason
    return NO_COMPILER if missing else reason[:200]
