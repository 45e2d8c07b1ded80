"""FedAvg: theta^{t+1} = sum_i p_i theta_i, p_i = n_i / sum_j n_j.

McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017, Algorithm 1.
Everything is shared; nothing is sent besides the model.
"""

from typing import ClassVar

from omnifm.federation.card import Card
from omnifm.federation.strategy import Strategy


class FedAvg(Strategy):
    """Every hook is the default."""

    card: ClassVar[Card] = Card(paper="McMahan et al., AISTATS 2017")
    mean_suffices: ClassVar[bool] = True
