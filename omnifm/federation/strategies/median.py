"""Median: theta^{t+1} is the coordinate-wise median of the clients' theta_i, each of which counts the same.

Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning: Towards optimal statistical rates", ICML 2018,
Algorithm 1, Option I (Definition 1). There the median is of gradients; here of models after local training, which is the same for
one step, as all start from one theta^t. Of an even number of clients it is the mean of the middle two. It withstands hostile
clients while they are fewer than half. With honest clients that differ, it is not their mean: a modality held by few is outvoted.

A reply that is not finite is left out and counted. Nothing is sent besides the model. The server keeps a round's replies until it
ends. Running statistics take the median too.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from omnifm.federation import robust
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState


class Median(robust.Robust):
    """The median in place of the mean."""

    card: ClassVar[Card] = Card(paper="Yin et al., ICML 2018")
    compares_numbers: ClassVar[bool] = True

    def _combine(self, server: ServerState, replies: Sequence[Reply]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        del server
        return {name: robust.median(tensors) for name, tensors in robust.by_name(replies).items()}, {}
