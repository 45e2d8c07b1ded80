"""Local only: every client trains its own model in its own rounds; nothing is ever sent.

The sanity row: a federation that does not beat it gains nothing. A client trains when the schedule samples it, so it sees as
many examples as under any other strategy.
"""

from typing import ClassVar

from omnifm.federation.card import Card
from omnifm.federation.strategy import Strategy
from omnifm.tasks.base import Model


class Local(Strategy):
    """The whole model is private."""

    card: ClassVar[Card] = Card(paper="each client alone", private="everything")
    averages: ClassVar[bool] = False

    def private(self, model: Model) -> frozenset[str]:
        """Everything."""
        return frozenset(model.state_dict())
