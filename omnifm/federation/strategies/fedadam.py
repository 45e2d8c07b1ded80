"""FedAdam: theta^{t+1} = theta^t + eta m / (sqrt(v) + tau), with Delta the clients' mean change (see `fedopt`) and

    m <- beta1 m + (1 - beta1) Delta          v <- beta2 v + (1 - beta2) Delta^2

Reddi et al., "Adaptive federated optimization", ICLR 2021, Algorithm 2. m starts from 0, v from tau^2, and neither is corrected
for its start, as there. beta1 = .9, beta2 = .99, tau = 1e-3 are the paper's. eta and tau are tuned together, eta over
{.001, .01, .1} and tau over {1e-4, 1e-3, 1e-2}: tau is the change that counts as large, and every larger one moves its
parameter by about eta. With a handful of clients .1 often diverges in the first round, so eta = .01 here.

private  nothing                        traffic  FedAvg's
server   m and v, twice the model
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from omnifm.federation.card import Card
from omnifm.federation.fedopt import FedOpt
from omnifm.federation.strategy import OneMeanOptions, StrategyOptions


class FedAdamOptions(OneMeanOptions):
    """FedAdam's and FedYogi's numbers."""

    server_step: float = Field(0.01, gt=0, description="eta: theta <- theta + server_step * m / (sqrt(v) + tau).")
    beta1: float = Field(0.9, ge=0, lt=1, description="Share of m that goes on from round to round.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Share of v that goes on from round to round.")
    tau: float = Field(1e-3, gt=0, description="Adaptivity: the larger, the less; v starts from its square.")


class FedAdam(FedOpt):
    """Adam at the server."""

    card: ClassVar[Card] = Card(
        paper="Reddi et al., ICLR 2021", server="two moments", search={"server_step": (0.001, 0.003, 0.01, 0.03)}
    )
    Options: ClassVar[type[StrategyOptions]] = FedAdamOptions
    options: FedAdamOptions
    _memory = ("m", "v")

    def _start(self, change: Tensor) -> tuple[Tensor, ...]:
        """m = 0, v = tau^2."""
        return torch.zeros_like(change), torch.full_like(change, self.options.tau**2)

    def _step(self, mean: Tensor, change: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step of Algorithm 2."""
        o = self.options
        m = o.beta1 * memory[0] + (1 - o.beta1) * change
        v = self._second(memory[1], change.square())
        return mean - change + o.server_step * m / (v.sqrt() + o.tau), m, v

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the next second moment, from the last and Delta^2."""
        return self.options.beta2 * v + (1 - self.options.beta2) * square
