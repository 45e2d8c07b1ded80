"""FedOpt's server: the clients' mean change is a pseudo-gradient, with which an optimiser takes a step.

    Delta = sum_i p_i (theta_i - theta^t)          theta^{t+1} = theta^t + step(Delta)

Reddi et al., "Adaptive federated optimization", ICLR 2021, Algorithms 1 and 2. p_i is FedAvg's weight. Parameters alone are moved
by the rule: a running variance that an adaptive step has moved may be negative, so buffers are FedAvg's mean, or maximum. The
memory of the optimiser is in the server's state by tensor; of a tensor that no client of a round holds, it stays as it is. So
does a tensor that no client moved while others were moved, being frozen in this round: momentum would carry it on.
"""

from typing import Any, ClassVar

from torch import Tensor

from omnifm.federation.aggregation import trained
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import Strategy


class FedOpt(Strategy):
    """FedAvg at the clients, an optimiser at the server."""

    mean_suffices: ClassVar[bool] = True
    _memory: ClassVar[tuple[str, ...]]
    """What the optimiser remembers of every parameter."""

    def _start(self, change: Tensor) -> tuple[Tensor, ...]:
        """Return the memory before the first step, of the shape of `change`."""
        raise NotImplementedError

    def _step(self, mean: Tensor, change: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the next parameter, then its memory, from the clients' mean and Delta = mean - theta^t."""
        raise NotImplementedError

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Move the parameters by the rule, the rest to the mean."""
        del round_index
        after = self._mean.value()
        changes = {name: after[name] - server.shared[name] for name in sorted(after.keys() - self.buffers)}
        for name, change in trained(changes).items():
            keys = [f"{type(self).__name__.lower()}/{what}/{name}" for what in self._memory]
            known = keys[0] in server.extra
            memory = tuple(server.extra[key] for key in keys) if known else self._start(change)
            after[name], *kept = self._step(after[name], change, memory)
            server.extra.update(zip(keys, kept, strict=True))
        server.shared = server.shared | after
        return {}
