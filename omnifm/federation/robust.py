"""What strategies that withstand hostile clients have in common.

A reply that is not finite is left out of its round and counted. The others are kept until the round ends, all of them: unlike a
mean, no order statistic is a running sum. Running statistics are open to attack like weights, so they take the coordinate-wise
median, whatever the rule for weights; whole-number counters take the maximum, as always. In a federation of several tasks each
tensor is judged among the clients that hold it. No rule weighs clients by their number of examples, which is what a client says
of itself, unless it says so.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from omnifm.federation.aggregation import RunningMean, step_towards
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import OneMeanOptions, Strategy, StrategyOptions


class Robust(Strategy):
    """FedAvg with another way to make one model of a round's replies."""

    Options: ClassVar[type[StrategyOptions]] = OneMeanOptions
    tolerates_nonfinite: ClassVar[bool] = True

    def _combine(self, server: ServerState, replies: Sequence[Reply]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return new weights by name, and facts for the round's event. `replies` have weights alone; there is at least one."""
        raise NotImplementedError

    def begin_round(self, server: ServerState) -> None:
        """Wait for replies."""
        super().begin_round(server)
        self._replies: list[Reply] = []
        self._rest: dict[str, list[Tensor]] = {}

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Keep a reply, its weights apart from all else."""
        weights = {n: t for n, t in reply.tensors.items() if t.is_floating_point() and n not in self.buffers}
        self._replies.append(Reply(reply.kind, reply.round, reply.client, reply.num_examples, weights))
        for name in reply.tensors.keys() - weights.keys():
            self._rest.setdefault(name, []).append(reply.tensors[name])

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Combine what was kept."""
        del round_index
        weights, facts = self._combine(server, self._replies)
        rest = {n: median(t) if t[0].is_floating_point() else torch.stack(t).amax(dim=0) for n, t in self._rest.items()}
        server.shared = step_towards(server.shared, weights | rest, self.options.server_step)
        return facts


def by_name(replies: Sequence[Reply]) -> dict[str, list[Tensor]]:
    """Return each tensor of all clients that sent it, in the order of the replies."""
    found: dict[str, list[Tensor]] = {}
    for reply in replies:
        for name, tensor in reply.tensors.items():
            found.setdefault(name, []).append(tensor)
    return found


def trimmed(tensors: Sequence[Tensor], drop: int) -> Tensor:
    """Return, coordinate by coordinate, the mean of the values without the `drop` smallest and the `drop` largest."""
    kept = torch.stack(list(tensors)).sort(dim=0).values[drop : len(tensors) - drop]
    return kept.mean(dim=0, dtype=torch.float64).to(tensors[0].dtype)


def median(tensors: Sequence[Tensor]) -> Tensor:
    """Return the coordinate-wise median; of an even number, the mean of the middle two."""
    return trimmed(tensors, (len(tensors) - 1) // 2)


def plain_mean(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean in which each counts the same."""
    mean = RunningMean()
    for one in tensors:
        mean.add(one, 1)
    return mean.value()


def square_distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """Return || theta - theta' ||_2^2 over the named tensors, exactly rounded: their order changes no bit."""
    return math.fsum(float(torch.linalg.vector_norm(one[name].double() - other[name])) ** 2 for name in names)


def hostile_among(share: float, clients: int) -> int:
    """Return how many of `clients` a share is, rounded up: a fifth of four clients is one, not none."""
    return math.ceil(round(share * clients, 9))
