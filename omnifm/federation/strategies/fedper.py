"""FedPer: the backbone phi is averaged, the head psi_i stays with its client.

Arivazhagan et al., "Federated learning with personalization layers", arXiv 1912.00818, 2019. Both are trained jointly; the upload
is phi alone. A client that was never sampled still has the head it started with. There is no global model.
"""

from typing import ClassVar

from omnifm.federation.card import Card
from omnifm.federation.sharing import names_under
from omnifm.federation.strategy import Strategy
from omnifm.tasks.base import Model


class FedPer(Strategy):
    """The head is private."""

    card: ClassVar[Card] = Card(paper="Arivazhagan et al., 2019", private="head")
    mean_suffices: ClassVar[bool] = True

    def private(self, model: Model) -> frozenset[str]:
        """The head, or the last layers that the task calls its own."""
        return names_under(model, model.head.own)
