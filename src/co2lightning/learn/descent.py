"""One update of an agent on a minibatch, eager or as one compiled graph.

Shapes: none of its own; gradients have the shapes of the parameters.
"""

# pyright: reportPrivateImportUsage=false
# torch's foreach functions bear underscores, and are in its documentation.
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam

from co2lightning.learn.graphs import as_graph, why_not

# Measured on one core of a server: what an update saves, what the first episode waits for.
_SAVED_SECONDS, _WARM_UP_SECONDS = 1e-3, 30.0


def worth_compiling(updates: int) -> bool:
    """Say whether so many updates repay the wait for the compiler, twice over to be sure."""
    return updates * _SAVED_SECONDS >= 2.0 * _WARM_UP_SECONDS


class _Learner(Protocol):
    """What is needed of an agent."""

    def loss(self, batch: Any, /) -> tuple[Tensor, dict[str, Tensor]]: ...

    def follow(self) -> None: ...


class Descent:
    """Takes an agent's parameters down its loss: gradient, clipping, Adam, what follows.

    An update whose gradient is not finite moves neither parameters nor the optimizer's state. That
    is decided on the device, and from the ranks' mean: nothing waits for it, all decide alike.

    Eager and compiled run the same lines but for Adam's: eager, that is torch's fused kernel;
    compiled, torch's formula, since the kernel would be a call out of the graph. Both move the
    parameters and the optimizer's own state in place, so a checkpoint does not know which it was.
    What changes from episode to episode is a tensor, for a graph takes numbers for constants.

    Args:
        agent: Has the loss, and `follow`, which is called after each step.
        optimizer: Adam with one group of parameters.
        max_norm: The gradient's norm is clipped to this; None leaves it.
        compiled: As one graph, for the shape of the first minibatch; others run eagerly.
        average: Averages gradients over the ranks of a distributed run; None where there is one.
        say: Receives a line for the user.
    """

    def __init__(
        self,
        agent: _Learner,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None,
        compiled: bool,
        average: Callable[[list[Tensor]], list[Tensor]] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.agent = agent
        self.optimizer = optimizer
        (self.group,) = optimizer.param_groups
        self.parameters: list[Tensor] = self.group["params"]
        self.max_norm = max_norm
        self.compiled = compiled
        self.average = average
        self.say = say
        self._graph: Callable[[Any], dict[str, Tensor]] | None = None
        self._shape: torch.Size | None = None
        self._rate = torch.tensor(0.0, device=self.parameters[0].device)
        if compiled:
            self._take_up_state()
        self.begin(self.group["lr"])

    def begin(self, rate: float) -> None:
        """Begin an episode with a learning rate."""
        self.group["lr"] = rate
        self._rate.fill_(rate)
        self._names: list[str] = []
        self._figures: list[Tensor] = []  # of each update, the last whether it was skipped

    def end(self) -> dict[str, Tensor]:
        """Return the means of the figures over the updates taken, and how many were skipped."""
        if not self._figures:
            return {}
        figures, skipped = torch.stack(self._figures).split([len(self._names), 1], dim=1)
        taken = len(skipped) - skipped.sum()
        means = torch.where(skipped > 0.5, 0.0, figures).sum(0) / taken
        named = dict(zip(self._names, means.unbind(), strict=True))
        return named | {"skipped_updates": skipped.sum()}

    def skipped_in_a_row(self) -> int:
        """Return how many updates of the episode were skipped in a row; waits for the device."""
        skipped = torch.stack(self._figures)[:, -1].tolist()
        return max(sum(map(int, row)) for _, row in itertools.groupby(skipped))

    def __call__(self, batch: Any) -> None:
        """Take one step on a minibatch, a tuple of tensors."""
        figures = self._in_graph(batch) if self.compiled else None
        if figures is None:
            gradients, figures = self.gradient(batch)
            if self.average:
                gradients = self.average(gradients)
            figures["skipped"] = self.step(gradients)
        *self._names, _ = figures
        self._figures.append(torch.stack(list(figures.values())))

    def gradient(self, batch: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the gradients of the loss and its figures."""
        loss, figures = self.agent.loss(batch)
        gradients = list(torch.autograd.grad(loss, self.parameters))
        return gradients, {name: figure.detach() for name, figure in figures.items()}

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> Tensor:
        """Clip the gradients, take Adam's step, let the agent follow.

        Returns:
            1.0 if the step was skipped, since the gradients were not finite; else 0.0.
        """
        each = map(torch.linalg.vector_norm, gradients)
        norms = list(each) if torch.compiler.is_compiling() else torch._foreach_norm(gradients)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        skipped = torch.where(norm < math.inf, 0.0, 1.0)
        if self.max_norm is not None:
            torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        if torch.compiler.is_compiling():
            self._adam(gradients, skipped < 0.5)
        else:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            # What torch's own scaler of gradients says to the kernel: 1 takes no step.
            self.optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        self.agent.follow()
        return skipped

    def _adam(self, gradients: list[Tensor], finite: Tensor) -> None:
        """Take torch's own step, traced into the graph, if `finite`."""
        moved = [*self.parameters, *self._means, *self._squares, *self._steps]
        before = [tensor.clone() for tensor in moved]
        beta1, beta2 = self.group["betas"]
        adam(
            self.parameters,
            gradients,
            self._means,
            self._squares,
            [],
            self._steps,
            foreach=False,
            capturable=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self._rate.clamp(min=1e-30),  # by which it divides; a schedule may end at 0
            weight_decay=0.0,
            eps=self.group["eps"],
            maximize=False,
        )
        for tensor, old in zip(moved, before, strict=True):
            tensor.copy_(torch.where(finite, tensor, old))

    def _take_up_state(self) -> None:
        """Take hold of the optimizer's state, made as torch makes it at the first step."""
        for parameter in self.parameters:
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        # Their data, not the tensors themselves: compiling marks what it takes for its own, and a
        # checkpoint refuses tensors with marks.
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        self._steps: list[Tensor] = [state["step"].data for state in states]
        self._means: list[Tensor] = [state["exp_avg"].data for state in states]
        self._squares: list[Tensor] = [state["exp_avg_sq"].data for state in states]

    def _in_graph(self, batch: Any) -> dict[str, Tensor] | None:
        """Take one step as a graph; return its figures, None where that cannot be."""
        if self._graph is not None:
            return self._graph(batch) if batch[-1].shape == self._shape else None
        self.say("Compiling the update (some 20 s, once)")
        try:
            self._shape = batch[-1].shape
            self._graph = self._compiled_update()
            with warnings.catch_warnings(action="ignore"):  # torch's about itself
                return self._graph(batch)
        except Exception as error:  # a compiler that is missing or fails; nothing was changed yet
            self.say(f"The update cannot be compiled: {why_not(error)}; training goes on without")
            self.compiled = False
            return None

    def _compiled_update(self) -> Callable[[Any], dict[str, Tensor]]:
        """Return what an update is as a graph, compiled at its first call."""
        import torch._dynamo

        for tensor in (self._rate, *self._steps, *self._means, *self._squares):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs would copy what may move
        graph_of = partial(as_graph, device=self._rate.device, record=True)
        gradient, step, average = self.gradient, self.step, self.average
        if average:  # the ranks' message goes between two graphs
            gradient, step = graph_of(gradient), graph_of(step)

        def update(batch: Any) -> dict[str, Tensor]:
            gradients, figures = gradient(batch)
            return {**figures, "skipped": step(average(gradients) if average else gradients)}

        return update if average else graph_of(update)
