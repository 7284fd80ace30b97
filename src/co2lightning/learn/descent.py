"""One update of an agent on a minibatch, eager or as one compiled graph.

Shapes: none of its own; gradients have the shapes of the parameters.
"""

# pyright: reportPrivateImportUsage=false
# torch's foreach functions bear underscores, and are in its documentation.
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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
    compiled, the formula stands here, since the kernel would be a call out of the graph. Both move
    the parameters and the optimizer's own state in place, so a checkpoint does not know which
    it was. What changes from episode to episode is a tensor, for a graph takes numbers for
    constants.

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
        self.parameters: list[nn.Parameter] = self.group["params"]
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
        """Bring the optimizer's state up to date; return the episode's figures.

        They are means over the updates that were taken, and how many were skipped.
        """
        if self.compiled:
            for step in self._steps[1:]:
                step.copy_(self._steps[0])
        if not self._figures:
            return {}
        figures, skipped = torch.stack(self._figures).split([len(self._names), 1], dim=1)
        taken = len(skipped) - skipped.sum()
        means = torch.where(skipped > 0.5, 0.0, figures).sum(0) / taken
        named = dict(zip(self._names, means.unbind(), strict=True))
        return named | {"skipped_updates": skipped.sum()}

    def skipped_in_a_row(self) -> int:
        """Return how many updates of the episode were skipped in a row; waits for the device."""
        row = longest = 0
        for skipped in torch.stack(self._figures)[:, -1].tolist():
            row = row + 1 if skipped else 0
            longest = max(longest, row)
        return longest

    def __call__(self, batch: Any) -> None:
        """Take one step on a minibatch, a tuple of tensors."""
        figures = self._update(batch)
        *self._names, _ = figures
        self._figures.append(torch.stack(list(figures.values())))

    def _update(self, batch: Any) -> dict[str, Tensor]:
        if self.compiled and self._shape is None:
            return self._compile(batch)
        if self._graph and batch[-1].shape == self._shape:
            return self._graph(batch)
        return self.update(batch)

    def update(self, batch: Any) -> dict[str, Tensor]:
        """Take one step; return the loss's figures and, last, whether it was `skipped`."""
        return self._take(batch, self.gradient, self.step)

    def _take(self, batch: Any, gradient: Callable[..., Any], step: Callable[..., Tensor]) -> Any:
        gradients, figures = gradient(batch)
        if self.average:
            gradients = self.average(gradients)
        return {**figures, "skipped": step(gradients)}

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
        norms = list(each) if self.compiled else torch._foreach_norm(gradients)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        skipped = torch.where(norm < math.inf, 0.0, 1.0)
        if self.max_norm is not None:
            torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        if self.compiled:
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
        """Take the step of Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1, if `finite`."""
        beta1, beta2 = self.group["betas"]
        t = self._steps[0].add_(finite)
        # 1 - beta^t, which loses its digits in float32 while t is small.
        size = self._rate / -torch.expm1(t * math.log(beta1))
        spread = (-torch.expm1(t * math.log(beta2))).sqrt()
        columns = zip(self.parameters, gradients, self._means, self._squares, strict=True)
        for parameter, gradient, *moments in columns:
            moved = [parameter, *moments]
            before = [tensor.clone() for tensor in moved]
            mean, square = moments
            # In place: a graph rounds the same formula otherwise where it is written otherwise.
            mean.lerp_(gradient, 1.0 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
            parameter.sub_(size * mean / (square.sqrt() / spread + self.group["eps"]))
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

    def _compile(self, batch: Any) -> dict[str, Tensor]:
        """Take the first step, compiled if the machine can."""
        self._shape = batch[-1].shape
        self.say("Compiling the update (some 20 s, once)")
        try:
            import torch._dynamo

            for tensor in (self._rate, self._steps[0], *self._means, *self._squares):
                torch._dynamo.mark_static_address(tensor)  # CUDA graphs would copy what may move
            graph_of = partial(as_graph, device=self._rate.device, record=True)
            if self.average:  # the ranks' message goes between two graphs
                gradient, step = graph_of(self.gradient), graph_of(self.step)
                graph = partial(self._take, gradient=gradient, step=step)
            else:
                graph = graph_of(self.update)
            with warnings.catch_warnings(action="ignore"):  # torch's about itself
                figures = graph(batch)
        except Exception as error:  # a compiler that is missing or fails; nothing was changed yet
            self.say(f"The update cannot be compiled: {why_not(error)}; training goes on without")
            self.compiled = False
            return self.update(batch)
        self._graph = graph
        return figures
