"""FedProto: no tensor of a model is ever sent; clients share the mean feature of each class, and keep theirs near everybody's.

    c_ij = mean of f over client i's training images of class j             C_j = sum_i n_ij c_ij / sum_i n_ij
    loss = L + lam mean_b || f_b - C_{y_b} ||_2^2 / d                       a class nobody has shown yet adds nothing

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang, "FedProto: Federated prototype learning across heterogeneous clients", AAAI 2022,
Algorithm 1. f `(d,)`: mean of the tokens. The distance is per image and per element, as in the authors' code (the paper's is of
class means). lam = 1 as published (.1 for CIFAR-10). c_ij are of the model after its local training, as in the algorithm; the
code gathers them on the way through the last epoch, and counts every client the same: `federation.weighting = "equal"`.

private  the whole model: what is evaluated is each client's own, by its own head, and there is no global model
traffic  C d numbers and C counts each way: a client tells how many images of each class it has
state    C_j at the server; a class that none of a round's clients has keeps its own
Not defined for a task that does not number its classes (all but classification). lam = 0 is `local`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from omnifm.errors import ConfigError, FederationError
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import Context, LocalJob, ServerState
from omnifm.federation.strategy import Step, Strategy, StrategyOptions, Upload
from omnifm.federation.tap import Tap
from omnifm.tasks.base import Model

_PROTOTYPES, _COUNTS, _KNOWN = "fedproto/prototypes", "fedproto/counts", "fedproto/known"
_BATCH = 64


class FedProtoOptions(StrategyOptions):
    """FedProto's one number."""

    lam: float = Field(1.0, ge=0, description="Weight of the distance to the class's prototype.")


class FedProto(Strategy):
    """Local training that looks at everybody's class means."""

    card: ClassVar[Card] = Card(
        paper="Tan et al., AAAI 2022",
        private="everything",
        up="class means",
        down="class means",
        server="class means",
        needs="numbered classes",
        search={"lam": (0.1, 0.5, 1.0, 2.0)},
    )
    Options: ClassVar[type[StrategyOptions]] = FedProtoOptions
    predicts_with_extra: ClassVar[bool] = False
    options: FedProtoOptions
    averages: ClassVar[bool] = False

    def __init__(self, options: FedProtoOptions, context: Context) -> None:
        super().__init__(options, context)
        if not context.label_count:
            raise ConfigError("strategies.fedproto: not defined for a task without class labels")

    def setup(self, model: Model) -> None:
        """Look at the tokens."""
        model.path = Tap()

    def private(self, model: Model) -> frozenset[str]:
        """Everything."""
        return frozenset(model.state_dict())

    # ------------------------------------------------------------------ the client
    def begin(self, job: LocalJob) -> None:
        """Look up C, if there is one yet."""
        known = job.received.get(_KNOWN)
        self._known = None if known is None else known.to(job.device)
        self._prototypes = job.received[_PROTOTYPES].to(job.device) if known is not None else torch.empty(0)

    def penalty(self, step: Step) -> Tensor | None:
        """How far the batch's features are from the prototypes of their classes."""
        if self._known is None or not self.options.lam:
            return None
        target = step.batch.target
        distance = (step.output.trace.float().mean(dim=1) - self._prototypes[target]).square().mean(dim=1)
        weighted: Tensor = self.options.lam * (distance * self._known[target]).mean()
        return weighted

    def finish(self, job: LocalJob) -> Upload:
        """Send the mean feature of each class, of the training images without augmentation."""
        backbone, train = job.model.backbone.eval(), job.data.train
        counts = torch.zeros(self.context.label_count, dtype=torch.int64)
        sums = torch.zeros(self.context.label_count, job.model.backbone.token_dim, dtype=torch.float64)
        for part in torch.arange(len(train)).split(_BATCH):
            batch = train.batch(part)
            with torch.no_grad():
                tokens = backbone(batch.to(job.device, torch.contiguous_format).inputs).tokens
            sums.index_add_(0, batch.target, tokens.mean(dim=1).cpu().double())
            counts += torch.bincount(batch.target, minlength=len(counts))
        if not bool(sums.isfinite().all()):
            raise FederationError(f"client {job.client}, round {job.round}: a feature is not finite")
        return Upload({_PROTOTYPES: (sums / counts.clamp_min(1)[:, None]).float(), _COUNTS: counts})

    # ------------------------------------------------------------------ the server
    def extra_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """C, once there is one."""
        del client
        return {n: t for n, t in server.extra.items() if n in (_PROTOTYPES, _KNOWN)}

    def begin_round(self, server: ServerState) -> None:
        """Wait for prototypes."""
        super().begin_round(server)
        self._sums: Tensor | None = None
        self._weights = torch.zeros(self.context.label_count, dtype=torch.float64)

    def vet(self, server: ServerState, reply: Reply) -> None:
        """Judge prototypes and counts."""
        vectors, counts = (reply.extra.get(name) for name in (_PROTOTYPES, _COUNTS))
        if vectors is None or counts is None:
            raise FederationError("its prototypes are missing, or how many images they stand for is")
        old = self._sums if self._sums is not None else server.extra.get(_PROTOTYPES)
        width = self.width or (vectors.shape[-1] if old is None else old.shape[1])
        if vectors.shape != (self.context.label_count, width) or not vectors.is_floating_point():
            raise FederationError(f"its prototypes have shape {tuple(vectors.shape)}, or are no fractions")
        if counts.shape != vectors.shape[:1] or counts.is_floating_point() or bool((counts < 0).any()):
            raise FederationError("the counts of its prototypes must be one whole number for each class")
        if not bool(vectors.isfinite().all()):
            raise FederationError("a prototype is not finite")
        self._require_known(reply, (_PROTOTYPES, _COUNTS))

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Add a client's prototypes, each by its number of images."""
        super().receive(server, reply)
        vectors, counts = reply.extra[_PROTOTYPES], reply.extra[_COUNTS]
        weights = torch.tensor([self.context.weight(n) if n else 0 for n in counts.tolist()], dtype=torch.float64)
        terms = vectors.double() * weights[:, None]
        self._sums = terms if self._sums is None else self._sums + terms
        self._weights += weights

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Make C of what came."""
        facts = super().end_round(server, round_index)
        assert self._sums is not None  # a round has a reply
        new, shown = (self._sums / self._weights.clamp_min(1)[:, None]).float(), self._weights > 0
        known = server.extra.get(_KNOWN, torch.zeros_like(shown))
        old = server.extra.get(_PROTOTYPES, torch.zeros_like(new))
        server.extra |= {_PROTOTYPES: torch.where(shown[:, None], new, old), _KNOWN: known | shown}
        return facts
