"""SCAFFOLD: clients step along g_i(y) - c_i + c, so that none drifts towards its own optimum; c_i and c are mean gradients.

    y <- y - eta_l (g_i(y) - c_i + c)          c_i^+ = c_i - c + (theta^t - y_i) / (K_i eta_l) = (1 / K_i) sum_k g_i(y_k)
    theta^{t+1} = theta^t + eta_g (1 / m) sum_i (y_i - theta^t)          c <- c + (1 / N) sum_i (c_i^+ - c_i)

Karimireddy et al., "SCAFFOLD: Stochastic controlled averaging for federated learning", ICML 2020, Algorithm 1 with option II; m
clients take part, of the N that hold a tensor. All control variates start from 0, eta_g = `server_step` = 1 as there.

For plain SGD the two forms of option II are the same number. The right one is computed here, over the K_i steps that were
taken: it is a mean gradient under momentum, AdamW and clipping as well, where theta^t - y_i is not K_i eta_l times one (after 100
steps with momentum .9 it is 9 times that). Weight decay is left to the optimiser: it is the same pull at all clients. c - c_i is
added to the gradient, before clipping; with AdamW it is rescaled like any other gradient. So where a client's loss has none
at all (segmentation's output of a class that its cohort does not have), AdamW takes a full step along c, however small c is.

private  c_i, as much as the model          traffic  the model and c down, the model and c_i^+ - c_i up: twice FedAvg's
server   c

Clients count the same, however many examples they have. Control variates are for parameters; buffers are FedAvg's, and weighed
as in FedAvg.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from omnifm.errors import FederationError
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategy import OneMeanOptions, Step, Strategy, StrategyOptions, Upload

CONTROL, CHANGE = "scaffold/control/", "scaffold/change/"


class Scaffold(Strategy):
    """FedAvg with control variates."""

    card: ClassVar[Card] = Card(
        paper="Karimireddy et al., ICML 2020",
        private="a control variate",
        up="the control variate's change",
        down="the server's control variate",
        server="a control variate",
        search={"server_step": (0.5, 1.0)},
    )
    Options: ClassVar[type[StrategyOptions]] = OneMeanOptions
    predicts_with_extra: ClassVar[bool] = False

    # ------------------------------------------------------------------ the client
    def begin(self, job: LocalJob) -> None:
        """Put c - c_i where the model is; no gradient was seen yet."""
        if not job.training:
            return
        own, received = job.state, job.received
        self._parameters = {n: p for n, p in job.model.named_parameters() if n in job.anchor}
        zero = {n: torch.zeros_like(t) for n, t in job.anchor.items() if n not in self.buffers}
        self._own = {n: own.get(CONTROL + n, nothing) for n, nothing in zero.items()}
        self._drift = {n: (received.get(CONTROL + n, zero[n]) - self._own[n]).to(job.device) for n in self._parameters}
        self._sums = {n: torch.zeros_like(p) for n, p in self._parameters.items()}

    def correct(self, step: Step) -> None:
        """grad <- grad - c_i + c, and a note of the gradient as it was."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._sums[name].add_(parameter.grad)
                parameter.grad.add_(self._drift[name])

    def finish(self, job: LocalJob) -> Upload:
        """Keep c_i^+, send c_i^+ - c_i."""
        after = {n: (s / job.steps).to("cpu").contiguous() for n, s in self._sums.items()}
        change = {n: after.get(n, own) - own for n, own in self._own.items()}
        job.state.update({CONTROL + n: t for n, t in after.items()})
        return Upload({CHANGE + n: t for n, t in change.items()})

    # ------------------------------------------------------------------ the server
    def extra_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """Return c, as far as the client holds its tensors; nothing before the first round, when it is 0."""
        held = self.holds.get(client)
        return {k: t for k, t in server.extra.items() if held is None or k.removeprefix(CONTROL) in held}

    def begin_round(self, server: ServerState) -> None:
        """Empty the sums."""
        super().begin_round(server)
        self._changes: dict[str, Tensor] = {}

    def vet(self, server: ServerState, reply: Reply) -> None:
        """Judge the change of the control variates."""
        self._require_known(reply, {CHANGE + name for name in reply.tensors.keys() - self.buffers})
        for name in reply.tensors.keys() - self.buffers:
            change = reply.extra.get(CHANGE + name)
            shape = reply.tensors[name].shape
            if change is None or change.shape != shape or not bool(change.isfinite().all()):
                what = "missing" if change is None else "not finite" if change.shape == shape else "of another shape"
                raise FederationError(f"tensor {CHANGE + name} is {what}")

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Count the client's parameters once, and add up the change of its control variates."""
        self._receive_uniform(reply)
        for name in reply.tensors.keys() - self.buffers:
            change = reply.extra[CHANGE + name]
            known = self._changes.get(name)
            self._changes[name] = change.double() if known is None else known.add_(change)

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Average the models; move c by the changes' sum over all clients that have the tensor, not only those that took part."""
        for name, total in self._changes.items():
            known = server.extra.get(CONTROL + name)
            moved = total / self._holders(name) + (0 if known is None else known)
            server.extra[CONTROL + name] = moved.to(server.shared[name].dtype)
        return super().end_round(server, round_index)
