"""AND-mask: the server moves only what clients agree on the sign of, and moves it further for what stays.

    A = | mean_i sign(Delta_i) |         M = 1 where A >= tau, else 0         Delta_i = theta_i - theta^t
    theta^{t+1} = theta^t + server_step (M / mean(M)) sum_i p_i Delta_i       mean(M): of the tensor

Parascandolo, Neitz, Orvieto, Gresele, Schölkopf, "Learning explanations that are hard to vary", ICLR 2021, as in DomainBed (the
mean over each parameter, tau = 1), for updates after local training instead of gradients of environments. There Adam follows and
takes the scale out again; here nothing does, so where few elements agree their steps are long: `rescale = false` leaves
1 / mean(M) out. In A every client has one vote; p_i are FedAvg's weights. With m clients, tau = 1 asks all of them.

Adaptation: elements that do not move at all have no sign and are left out of mean(M); so a lone client keeps its own model.
tau = 0 is FedAvg. Nothing is sent besides the model, nothing is private. Running statistics are averaged without a mask.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from omnifm.federation.card import Card
from omnifm.federation.strategies.fedgma import FedGMA, FedGMAOptions
from omnifm.federation.strategy import StrategyOptions


class AndMaskOptions(FedGMAOptions):
    """The AND-mask's threshold."""

    tau: float = Field(1.0, ge=0, le=1, description="Agreement from which on an element moves.")
    rescale: bool = Field(True, description="Divide by the share of elements that move.")


class AndMask(FedGMA):
    """FedGMA with a hard mask."""

    card: ClassVar[Card] = Card(paper="Parascandolo et al., ICLR 2021", search={"tau": (0.4, 0.6, 0.8, 1.0)})
    Options: ClassVar[type[StrategyOptions]] = AndMaskOptions
    options: AndMaskOptions

    def _mask(self, agreed: Tensor, moves: Tensor) -> Tensor:
        mask = (agreed >= self.options.tau).double()
        share = float(mask[moves].mean()) if bool(moves.any()) else 0.0
        return mask / share if self.options.rescale and share else mask
