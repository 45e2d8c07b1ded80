"""FedProx: client i minimises L_i(theta) + (mu / 2) || theta - theta^t ||_2^2; the server is FedAvg.

Li et al., "Federated optimization in heterogeneous networks", MLSys 2020, Algorithm 2. The term enters as its gradient
mu (theta - theta^t), as in the authors' optimiser. mu = .01 as in the FedBN and OpenFedLLM comparisons; the paper's grid is
{.001, .01, .1, 1}. With AdamW the gradient is rescaled like any other, so the step is not the proximal objective's: use SGD to
compare with the paper.
"""

from typing import ClassVar

from pydantic import Field

from omnifm.federation.card import Card
from omnifm.federation.state import LocalJob
from omnifm.federation.strategy import Step, Strategy, StrategyOptions


class FedProxOptions(StrategyOptions):
    """FedProx's one number."""

    mu: float = Field(0.01, ge=0, description="Weight of the pull towards the received model.")


class FedProx(Strategy):
    """A pull towards the received model, added to the gradient."""

    card: ClassVar[Card] = Card(paper="Li et al., MLSys 2020", search={"mu": (0.001, 0.01, 0.1, 1.0)})
    Options: ClassVar[type[StrategyOptions]] = FedProxOptions
    options: FedProxOptions
    mean_suffices: ClassVar[bool] = True

    def begin(self, job: LocalJob) -> None:
        """Put theta^t where the model is, once."""
        parameters = dict(job.model.named_parameters())
        self._pairs = [(p, job.anchor[n].to(job.device)) for n, p in parameters.items() if n in job.anchor]

    def correct(self, step: Step) -> None:
        """grad <- grad + mu (theta - theta^t), shared parameters only."""
        for parameter, start in self._pairs if self.options.mu else ():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self.options.mu)
