"""Trimmed mean: theta^{t+1} is, coordinate by coordinate, the mean of the theta_i without the k smallest and the k largest.

    k = min( ceil(beta m), floor((m - 1) / 2) )                         m clients that hold the tensor, each counts the same

Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning: Towards optimal statistical rates", ICML 2018,
Algorithm 1, Option II (Definition 2), for models after local training instead of gradients. beta is at least the share of hostile
clients; .2 guards against one of five, and at its largest the rule is the median. Adaptation: the paper leaves whole numbers to
the reader; k is rounded up, so that beta > 0 never means no guard, while one value or two remain.

beta = 0 is FedAvg with `federation.weighting = "equal"`, running statistics apart: they take the median. A reply that is not
finite is left out and counted. Nothing is sent besides the model. The server keeps a round's replies until it ends.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from omnifm.federation import robust
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import OneMeanOptions, StrategyOptions


class TrimmedMeanOptions(OneMeanOptions):
    """How much is cut off."""

    beta: float = Field(0.2, ge=0, lt=0.5, description="Part of the clients that is cut off at each end.")


class TrimmedMean(robust.Robust):
    """The trimmed mean in place of the mean."""

    card: ClassVar[Card] = Card(paper="Yin et al., ICML 2018", search={"beta": (0.1, 0.2, 0.3, 0.4)})
    Options: ClassVar[type[StrategyOptions]] = TrimmedMeanOptions
    compares_numbers: ClassVar[bool] = True
    options: TrimmedMeanOptions

    def _combine(self, server: ServerState, replies: Sequence[Reply]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        del server
        if not self.options.beta:
            return robust.plain_mean([reply.tensors for reply in replies]), {}  # the same sum in the same order as FedAvg's
        return {name: self._trimmed(tensors) for name, tensors in robust.by_name(replies).items()}, {}

    def _trimmed(self, tensors: Sequence[Tensor]) -> Tensor:
        drop = robust.hostile_among(self.options.beta, len(tensors))
        return robust.trimmed(tensors, min(drop, (len(tensors) - 1) // 2))
