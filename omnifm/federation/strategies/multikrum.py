"""Multi-Krum: the mean of the models that have the closest neighbours.

    s(i) = sum_{j -> i} || theta_i - theta_j ||_2^2       over the n - f - 2 clients j closest to i
    theta^{t+1} = mean of the theta_i with the q smallest s(i), each of which counts the same

Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with adversaries: Byzantine tolerant gradient descent", NeurIPS 2017,
Section 4 (Krum; q = 1) and its Multi-Krum, for models after local training instead of gradients. f is the number of hostile
clients the rule is prepared for, `hostile` n rounded up. q = n - f unless `chosen` says otherwise. The guarantee needs
n > 2 f + 2: with fewer clients the rule still needs one neighbour, so f is at most n - 3, and its promise is only that a lone
stranger is not chosen. hostile = 0 is FedAvg with `federation.weighting = "equal"`, running statistics apart.

It chooses whole models: where honest clients see different modalities, one that is unlike all others is not chosen either; the
round's event says who was. A reply that is not finite is left out and counted, before n. Nothing is sent besides the model. The
server keeps a round's replies until it ends and compares each pair. Running statistics are no part of the distance and take the
median of all. In a federation of several tasks the tensors that the same clients hold are judged together.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from omnifm.federation import robust
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import OneMeanOptions, StrategyOptions


class MultiKrumOptions(OneMeanOptions):
    """How many are feared, how many are chosen."""

    hostile: float = Field(0.2, ge=0, lt=0.5, description="f, as a share of a round's clients.")
    chosen: int = Field(0, ge=0, description="q, models that are averaged; 0: n - f.")


class MultiKrum(robust.Robust):
    """The mean of those that have close neighbours."""

    card: ClassVar[Card] = Card(paper="Blanchard et al., NeurIPS 2017", search={"hostile": (0.1, 0.2, 0.3, 0.4)})
    Options: ClassVar[type[StrategyOptions]] = MultiKrumOptions
    options: MultiKrumOptions

    def _combine(self, server: ServerState, replies: Sequence[Reply]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        del server
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in robust.by_name(replies):
            groups.setdefault(tuple(i for i, reply in enumerate(replies) if name in reply.tensors), []).append(name)
        new: dict[str, Tensor] = {}
        chosen: set[str] = set()
        for holders, names in groups.items():
            parts = [{name: replies[i].tensors[name] for name in names} for i in holders]
            found = self._choose(parts)
            new |= robust.plain_mean([parts[i] for i in found])
            chosen |= {replies[holders[i]].client for i in found}
        return new, {"chosen": sorted(chosen)}

    def _choose(self, models: Sequence[dict[str, Tensor]]) -> list[int]:
        """Return the places of the chosen, in order."""
        n = len(models)
        f = max(0, min(robust.hostile_among(self.options.hostile, n), n - 3))
        count = min(self.options.chosen or n - f, n)
        if count == n:
            return list(range(n))
        # A model is no neighbour of its own; of one or two clients none has a neighbour too many.
        nearest = distances(models).fill_diagonal_(torch.inf).sort(dim=1).values[:, : max(1, n - f - 2)]
        return sorted(nearest.sum(dim=1).argsort(stable=True)[:count].tolist())


def distances(models: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return || theta_i - theta_j ||_2^2 for all pairs, `(n, n)` float64."""
    table = torch.zeros(len(models), len(models), dtype=torch.float64)
    for i, one in enumerate(models):
        for j in range(i):
            table[i, j] = table[j, i] = robust.square_distance(one, models[j], one)
    return table
