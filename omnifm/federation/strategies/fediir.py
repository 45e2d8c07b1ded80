"""FedIIR: clients keep the gradient of their classifier near the mean of all clients', so that none learns a shortcut of its own.

    loss = L + penalty || grad_psi L - G ||_2^2          grad_psi L: of the batch, with respect to the head's own layers psi
    G <- ema G + (1 - ema) sum_i sum_b g_ib / sum_i B_i                          b = 1 .. B_i: the batches of client i

Guo, Guo, Cao, Wu, Chang, "Out-of-distribution generalization of federated learning via implicit invariant relationships", ICML
2023, and the authors' code: penalty = 1e-3 (grid 1e-4 to 1e-2), ema = .95, G = 0 at first. The penalty's own gradient goes
through grad_psi L into the backbone as well. A port that forgets to keep G has (1 - ema) times the mean for ever: not so here.

g_ib are taken at theta^t, in a pass over a client's examples before it trains, without augmentation. Along the way they would
shrink and turn: over five local epochs, on a toy problem, to a third of the length. Adaptation: there, the sampled clients send
them in an exchange of its own, and G is of this round. Here they come with the model, and G is used from the next round on; so it
is one round old, its clients may be others, and the first round is FedAvg. Every step passes its batch twice: attention is taken
apart in the second pass, as the fast one has no second derivative. psi is what personalised methods keep at the client; here it
is shared like all else. Models weigh as in FedAvg; the code counts every client the same: `federation.weighting = "equal"`.

traffic  psi each way, beside the model: the sum of gradients up, G down
state    G at the server

penalty = 0 is FedAvg, and sends nothing more.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnifm.errors import FederationError
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.sharing import names_under
from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategy import Step, Strategy, StrategyOptions, Upload

_MEAN, _SUM, _BATCHES = "fediir/mean/", "fediir/sum/", "fediir/batches"


class FedIIROptions(StrategyOptions):
    """FedIIR's two numbers."""

    penalty: float = Field(1e-3, ge=0, description="Weight of the distance of gradients.")
    ema: float = Field(0.95, ge=0, lt=1, description="What stays of the mean gradient from round to round.")


class FedIIR(Strategy):
    """FedAvg with matched gradients of the classifier."""

    card: ClassVar[Card] = Card(
        paper="Guo et al., ICML 2023",
        up="a gradient of the head",
        down="the mean gradient",
        server="the mean gradient",
        search={"penalty": (1e-4, 1e-3, 3e-3, 1e-2)},
    )
    Options: ClassVar[type[StrategyOptions]] = FedIIROptions
    predicts_with_extra: ClassVar[bool] = False
    options: FedIIROptions

    # ------------------------------------------------------------------ the client
    def begin(self, job: LocalJob) -> None:
        """Look up psi and G; nothing is summed yet."""
        own = names_under(job.model, job.model.head.own)
        self._psi = {n: p for n, p in job.model.named_parameters() if n in own and p.requires_grad}
        self._target = {n.removeprefix(_MEAN): t.to(job.device) for n, t in job.received.items() if n.startswith(_MEAN)}
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def penalty(self, step: Step) -> Tensor | None:
        """How far the batch's gradient is from G."""
        if not self.options.penalty or not self._psi:  # a task may freeze its head for a round
            return None
        if not step.job.steps:
            self._look(step)
        if not self._target:
            return None
        with sdpa_kernel(SDPBackend.MATH):
            _, loss = step.again(step.batch)
        gradients = self._gradients(loss, create_graph=True)
        terms = [(g - self._target[n]).square().sum() for n, g in gradients.items() if n in self._target]
        return self.options.penalty * torch.stack(terms).sum() if terms else None

    def _look(self, step: Step) -> None:
        """Sum the gradients of all batches. The model is still as received."""
        train, size = step.job.data.train, len(step.batch.row)
        for index in torch.arange(len(train)).split(size):
            if len(index) == 1 < size:
                continue  # BatchNorm cannot train on one
            _, loss = step.again(train.batch(index).to(step.job.device, torch.contiguous_format))
            self._sums = {n: self._sums.get(n, 0) + g for n, g in self._gradients(loss).items()}
            self._batches += 1

    def _gradients(self, loss: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(self._psi.values()), create_graph=create_graph, allow_unused=True)
        # A part of the head that is for other clients has no gradient.
        return {n: g.float() for n, g in zip(self._psi, found, strict=True) if g is not None}

    def finish(self, job: LocalJob) -> Upload:
        """Send the sum of gradients and of how many batches it is."""
        del job
        if not self.options.penalty:
            return Upload()
        sums = {_SUM + name: total.cpu() for name, total in self._sums.items()}
        return Upload({**sums, _BATCHES: torch.tensor(self._batches)})

    # ------------------------------------------------------------------ the server
    def extra_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """G of what the client holds, once there is one."""
        held = self.holds.get(client)
        mean = {n: t for n, t in server.extra.items() if n.startswith(_MEAN)}
        return mean if held is None else {n: t for n, t in mean.items() if n.removeprefix(_MEAN) in held}

    def begin_round(self, server: ServerState) -> None:
        """Wait for gradients."""
        super().begin_round(server)
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def vet(self, server: ServerState, reply: Reply) -> None:
        """Judge the sums of gradients. One that is not sent is not counted: a part of a head may have none."""
        sums, found = _sums_of(reply), reply.extra.get(_BATCHES, torch.tensor(0))
        counted = found.shape == () and not found.is_floating_point() and int(found) >= bool(sums)
        if self.options.penalty and (_BATCHES not in reply.extra or not counted):
            raise FederationError("of how many batches its gradients are is missing")
        held = self.holds.get(reply.client, server.shared.keys())
        for name, total in sums.items():
            if name not in server.shared or name not in held or total.shape != server.shared[name].shape:
                raise FederationError(f"the gradient of {name} has shape {tuple(total.shape)}, or is of what it does not have")
            if not total.is_floating_point() or not bool(total.isfinite().all()):
                raise FederationError(f"the gradient of {name} is not finite")
        self._require_known(reply, {_BATCHES, *map(_SUM.__add__, sums)} if self.options.penalty else ())

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Add tensors to the mean, and gradients to theirs."""
        super().receive(server, reply)
        batches = int(reply.extra.get(_BATCHES, 0))
        for name, total in _sums_of(reply).items():
            self._totals[name] = self._totals[name] + total if name in self._totals else total
            self._counts[name] = self._counts.get(name, 0) + batches

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Average, and move G."""
        facts = super().end_round(server, round_index)
        ema = self.options.ema
        for name, total in self._totals.items():
            new = (1 - ema) * total / self._counts[name]
            old = server.extra.get(_MEAN + name)
            server.extra[_MEAN + name] = new if old is None else ema * old + new
        return facts


def _sums_of(reply: Reply) -> dict[str, Tensor]:
    """Return the sums of gradients in a reply, by the names of the parameters."""
    return {name.removeprefix(_SUM): total for name, total in reply.extra.items() if name.startswith(_SUM)}
