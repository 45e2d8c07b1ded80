"""Clipped mean: FedAvg of updates that are cut to a length, so that no client pulls harder than the others.

    theta^{t+1} = theta^t + sum_i p_i Delta_i min(1, M / || Delta_i ||_2),          Delta_i = theta_i - theta^t

Sun, Kairouz, Suresh, McMahan, "Can you really backdoor federated learning?", arXiv 1911.07963, 2019: norm thresholding of updates
(the noise that may go with it is left out). The paper's M is a number that is known to suit; `bound` = 0 takes the median of the
round's norms instead, which hostile clients cannot move far while they are fewer than half. p_i are FedAvg's weights, as in the
paper: who does not trust a client's number of examples sets `federation.weighting = "equal"`. With a `bound` that no update
reaches it is FedAvg, running statistics apart.

The direction of an update is not judged: a client that turns it round slows the others down and is not shut out. A reply that is
not finite is left out and counted. Nothing is sent besides the model. The server keeps a round's replies until it ends. The norm
is over all weights that a client holds; running statistics are no part of it and take the median.
"""

import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from omnifm.federation import robust
from omnifm.federation.aggregation import RunningMean, shortened, update_norm
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import OneMeanOptions, StrategyOptions


class ClippedMeanOptions(OneMeanOptions):
    """The longest update."""

    bound: float = Field(0.0, ge=0, description="M; 0: the median of the round's norms.")


class ClippedMean(robust.Robust):
    """The mean of clipped updates."""

    card: ClassVar[Card] = Card(paper="Sun et al., 2019", search={"bound": (0.0, 1.0, 3.0, 10.0)})
    Options: ClassVar[type[StrategyOptions]] = ClippedMeanOptions
    options: ClippedMeanOptions

    def _combine(self, server: ServerState, replies: Sequence[Reply]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        norms = [update_norm(reply.tensors, server.shared) for reply in replies]
        bound = self.options.bound or statistics.median(norms)
        mean = RunningMean()
        clipped = []
        for reply, norm in zip(replies, norms, strict=True):
            if norm > bound:
                clipped.append(reply.client)
            mean.add(shortened(reply.tensors, server.shared, bound), self.context.weight(reply.num_examples))
        return mean.value(), {"bound": bound, "clipped": clipped}
