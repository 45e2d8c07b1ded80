"""FedYogi: FedAdam, but v <- v - (1 - beta2) Delta^2 sign(v - Delta^2).

Reddi et al., "Adaptive federated optimization", ICLR 2021, Algorithm 2. v moves by (1 - beta2) Delta^2 whatever v is, so after
a round of large changes it falls back more slowly than Adam's. It starts from tau^2: from 0 the first steps are far too long, or
hardly any. Options and defaults are `fedadam`'s.
"""

from typing import ClassVar

from torch import Tensor

from omnifm.federation.card import Card
from omnifm.federation.strategies.fedadam import FedAdam


class FedYogi(FedAdam):
    """Yogi at the server."""

    card: ClassVar[Card] = Card(
        paper="Reddi et al., ICLR 2021", server="two moments", search={"server_step": (0.001, 0.003, 0.01, 0.03)}
    )

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        """Additive, towards Delta^2."""
        return v - (1 - self.options.beta2) * square * (v - square).sign()
