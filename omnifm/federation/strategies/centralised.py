"""Centralised: one model trained on everybody's images in one place. What a federation would have if privacy were no matter.

In a round it sees as many examples as the sampled clients would have seen, drawn at random from all of them, with the same
optimiser and learning rates: the budget of the other strategies, without their order. With `federation.local_steps` every
client has the same share of it, as it has of the others' steps, however many examples it holds.
"""

from typing import ClassVar

from omnifm.federation.card import Card
from omnifm.federation.strategy import Strategy


class Centralised(Strategy):
    """FedAvg with one client that holds all data."""

    card: ClassVar[Card] = Card(paper="all data in one place", needs="one network for all clients")
    pooled: ClassVar[bool] = True
    averages: ClassVar[bool] = False
