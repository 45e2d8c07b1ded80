"""FedBN: everything but BatchNorm is averaged; its scale, shift and running statistics stay with their client.

    theta = (theta_BN, theta_rest)          theta_rest^{t+1} = sum_i p_i theta_rest,i          theta_BN,i^{t+1} = theta_BN,i

Li et al., "FedBN: Federated learning on non-IID features via local batch normalization", ICLR 2021, Algorithm 1. Layers are found
by their type: the published code asks whether a name has `bn` in it, which misses torchvision's `downsample.1`. A model without
BatchNorm is refused, since there it would be FedAvg.

private  BatchNorm's tensors            traffic  the rest of the model

There is no global model. A client that was never sampled has the BatchNorm it started with.
"""

from typing import ClassVar

from omnifm.federation.card import Card
from omnifm.federation.sharing import BATCH_NORMS, names_of_type
from omnifm.federation.strategy import Strategy
from omnifm.tasks.base import Model


class FedBN(Strategy):
    """BatchNorm layers are private."""

    card: ClassVar[Card] = Card(paper="Li et al., ICLR 2021", private="BatchNorm", needs="a network with BatchNorm")
    mean_suffices: ClassVar[bool] = True

    def private(self, model: Model) -> frozenset[str]:
        """All tensors of BatchNorm layers. Raises ConfigError if there are none."""
        return names_of_type(model, BATCH_NORMS, "BatchNorm (set model.norm = 'batch', or take another strategy)")
