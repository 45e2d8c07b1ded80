"""FedGMA: where clients disagree on the sign of an update, the server takes a shorter step.

    A = | mean_i sign(Delta_i) |              M = 1 where A >= tau, else A              Delta_i = theta_i - theta^t
    theta^{t+1} = theta^t + server_step M sum_i p_i Delta_i

Tenison, Sreeramadas, Mugunthan, Oyallon, Rish, Belilovsky, "Gradient masked averaging for federated learning", TMLR 2023. In A
every client has one vote; p_i are FedAvg's weights. With m clients A is one of about m / 2 values; tau = .4 is the lowest of the
thresholds {.4, .6, .8} in use. An unofficial implementation zeroes, client by client, what is against the majority: not so here.

tau = 0 is FedAvg. Nothing is sent besides the model, nothing is private. Running statistics are averaged without a mask. In a
federation of several tasks the votes on a tensor are those of the clients that hold it.
"""

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from omnifm.federation.aggregation import step_towards
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import OneMeanOptions, Strategy, StrategyOptions


class FedGMAOptions(OneMeanOptions):
    """FedGMA's threshold."""

    tau: float = Field(0.4, ge=0, le=1, description="Agreement from which on an element takes the whole step.")


class FedGMA(Strategy):
    """FedAvg whose step is scaled, element by element."""

    card: ClassVar[Card] = Card(paper="Tenison et al., TMLR 2023", search={"tau": (0.2, 0.4, 0.6, 0.8)})
    Options: ClassVar[type[StrategyOptions]] = FedGMAOptions
    compares_numbers: ClassVar[bool] = True
    options: FedGMAOptions

    def begin_round(self, server: ServerState) -> None:
        """Empty the ballot box."""
        super().begin_round(server)
        self._signs: dict[str, Tensor] = {}
        self._voters: dict[str, int] = {}

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Add tensors to the mean and signs to the votes."""
        super().receive(server, reply)
        for name, tensor in reply.tensors.items():
            if tensor.is_floating_point() and name not in self.buffers:
                sign = (tensor - server.shared[name]).sign().to(torch.int16)
                self._signs[name] = self._signs[name] + sign if name in self._signs else sign
                self._voters[name] = self._voters.get(name, 0) + 1

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Step by the masked mean."""
        del round_index
        mean, step = self._mean.value(), self.options.server_step
        agreement = {name: signs.abs().double() / self._voters[name] for name, signs in self._signs.items()}
        new = step_towards(server.shared, {n: t for n, t in mean.items() if n not in agreement}, step)
        for name, agreed in agreement.items():
            old = server.shared[name]
            scale = step * self._mask(agreed, mean[name] != old)
            new[name] = torch.lerp(old, mean[name], scale.to(old.dtype))
        server.shared = new
        total = sum(agreed.numel() for agreed in agreement.values())
        # Exactly rounded, so that the order of the tensors changes no bit.
        return {"agreement": math.fsum(float(agreed.sum()) for agreed in agreement.values()) / max(total, 1)}

    def _mask(self, agreed: Tensor, moves: Tensor) -> Tensor:
        """Return M of one tensor. `moves`: where the mean update is not 0."""
        del moves
        return torch.where(agreed >= self.options.tau, 1.0, agreed)
