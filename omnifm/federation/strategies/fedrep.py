"""FedRep: first the head trains on a backbone that stands still, then the backbone under the new head; the backbone is averaged.

    psi_i <- argmin_psi L_i(phi^t, psi)
    phi_i <- a little of descent on L_i(phi, psi_i), from phi^t          phi^{t+1} = sum_i p_i phi_i

Collins et al., "Exploiting shared representations for personalized federated learning", ICML 2021, Algorithm 1. A part that
stands still is as in prediction: its BatchNorm normalises with the running statistics and does not move them. The published code
only takes its gradients away, so that the statistics of phi drift while the head trains.

private  the head, or the last layers that the task calls its own          traffic  the backbone

The effort is that of every other strategy, cut in two: `head_share` of the local epochs for the head, rounded, each part at least
one. .8 makes 4 + 1 of five; as published for CIFAR-10, 10 + 1 of eleven, it would be .9. Local steps are cut likewise. A single
epoch is cut by examples: the head sees `head_share` of as many as the client has, the backbone the others, each drawn anew. Of
one step, or of fewer than four examples, nothing can be cut, and both parts train together, as in FedPer. So it is where a task
lets one of the two stand still (a frozen backbone, a tuning in two stages).

There is no global model. A client that was never sampled has the head it started with.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from pydantic import Field

from omnifm.federation.card import Card
from omnifm.federation.effort import Effort, Phase
from omnifm.federation.sharing import BATCH_NORMS, names_under
from omnifm.federation.state import LocalJob
from omnifm.federation.strategy import Strategy, StrategyOptions
from omnifm.tasks.base import Model


class FedRepOptions(StrategyOptions):
    """FedRep's one number."""

    head_share: float = Field(0.8, gt=0, lt=1, description="Share of the local effort that the head gets, before the backbone.")


class FedRep(Strategy):
    """FedPer, one part after the other."""

    card: ClassVar[Card] = Card(paper="Collins et al., ICML 2021", private="head", search={"head_share": (0.2, 0.4, 0.6, 0.8)})
    Options: ClassVar[type[StrategyOptions]] = FedRepOptions
    options: FedRepOptions
    mean_suffices: ClassVar[bool] = True

    def private(self, model: Model) -> frozenset[str]:
        """The head."""
        return names_under(model, model.head.own)

    def phases(self, job: LocalJob, effort: Effort) -> Sequence[Phase]:
        """Head, then backbone."""
        cut = self._cut(effort, len(job.data.train))
        head = self.private(job.model)
        body = frozenset(name for name, _ in job.model.named_parameters()) - head
        trained = {name for name, parameter in job.model.named_parameters() if parameter.requires_grad}
        if cut is None or not (trained & head and trained & body):
            return (Phase(effort),)
        return tuple(
            Phase(part, names, partial(self._still, job.model, names is head))
            for part, names in zip(cut, (head, body), strict=True)
        )

    def _still(self, model: Model, head_trains: bool) -> None:
        """Let BatchNorm move in the part that trains, and nowhere else."""
        if head_trains:
            # At the start of training. Norms that a task keeps still for good are left alone, then and later.
            self._norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.training]
        own = set(model.head.own.modules())
        for norm in self._norms:
            norm.train((norm in own) == head_trains)

    def _cut(self, effort: Effort, examples: int) -> tuple[Effort, Effort] | None:
        """Return the head's and the backbone's effort; None if there is too little to cut."""
        if effort.steps:
            head = self._share(effort.steps, 1)
            return (replace(effort, steps=head), replace(effort, steps=effort.steps - head)) if head else None
        if effort.epochs > 1:
            head = self._share(effort.epochs, 1)
            return replace(effort, epochs=head), replace(effort, epochs=effort.epochs - head)
        whole = min(examples, effort.budget or examples)
        head = self._share(whole, 2)  # BatchNorm cannot train on one
        return (replace(effort, budget=head), replace(effort, budget=whole - head)) if head else None

    def _share(self, whole: int, least: int) -> int:
        """Return the head's share of `whole`, at least `least` for either part; 0 if that is too much."""
        return 0 if whole < 2 * least else min(max(round(self.options.head_share * whole), least), whole - least)
