"""FedAvgM: v <- beta v + Delta; theta^{t+1} = theta^t + eta v, with Delta the clients' mean change (see `fedopt`).

Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution for federated visual classification", arXiv 1909.06335,
2019, section 4.3. beta = .9, eta = 1 as in the table of Google's reference code (server SGD with momentum): plain momentum,
neither Nesterov's nor an exponential mean of the changes, whose steps are 1 / (1 - beta) times smaller.

private  nothing                    traffic  FedAvg's
server   v, as much as the model
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from omnifm.federation.card import Card
from omnifm.federation.fedopt import FedOpt
from omnifm.federation.strategy import OneMeanOptions, StrategyOptions


class FedAvgMOptions(OneMeanOptions):
    """FedAvgM's two numbers."""

    beta: float = Field(0.9, ge=0, lt=1, description="Share of the last step's v that goes on.")
    server_step: float = Field(1.0, gt=0, description="eta: theta <- theta + server_step * v.")


class FedAvgM(FedOpt):
    """Momentum at the server."""

    card: ClassVar[Card] = Card(
        paper="Hsu et al., 2019", server="momentum", search={"beta": (0.5, 0.9), "server_step": (0.3, 1.0)}
    )
    Options: ClassVar[type[StrategyOptions]] = FedAvgMOptions
    options: FedAvgMOptions
    _memory = ("v",)

    def _start(self, change: Tensor) -> tuple[Tensor, ...]:
        """v = 0."""
        return (torch.zeros_like(change),)

    def _step(self, mean: Tensor, change: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """mean + (eta v - Delta) is theta + eta v, and for beta = 0, eta = 1 the mean to the bit."""
        v = self.options.beta * memory[0] + change
        return mean + (self.options.server_step * v - change), v
