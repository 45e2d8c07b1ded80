"""Ditto: a client trains the global model as in FedAvg, and beside it a model v_i of its own that is pulled to the global one.

    theta^{t+1} = sum_i p_i theta_i          v_i <- v_i - eta (grad L_i(v_i) + lambda (v_i - theta^t))

Li et al., "Ditto: Fair and robust federated learning through personalization", ICML 2021, Algorithm 1. theta^t is the model as
received, not what the client has just made of it. v_i, running statistics included, is scored; theta is the global view.
lambda = 1 as in the published scripts; their grid is {.1, 1, 2}. The term enters as its gradient, for parameters alone; with
AdamW it is rescaled like any other gradient.

private  v_i, as much as the model          traffic  FedAvg's

Each stream has the effort of a round and an optimiser of its own: twice the work of FedAvg, and the loss of a round is the mean
over both. v_i starts from the first model that the client receives, and stays as it is while the client is not sampled. A client
that never was is scored with theta.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from omnifm.federation import sharing
from omnifm.federation.card import Card
from omnifm.federation.effort import Effort, Phase
from omnifm.federation.state import LocalJob
from omnifm.federation.strategy import Step, Strategy, StrategyOptions, Upload

OWN = "ditto/"
_PERSONAL = 1
"""Number of the phase that trains v_i. The global model comes first and sees the batches of FedAvg."""


class DittoOptions(StrategyOptions):
    """Ditto's one number."""

    personal_pull: float = Field(1.0, ge=0, description="lambda, the pull of a client's own model to the received one.")


class Ditto(Strategy):
    """FedAvg, and a model beside it that never leaves."""

    card: ClassVar[Card] = Card(
        paper="Li et al., ICML 2021", private="a second model", search={"personal_pull": (0.1, 0.5, 1.0, 2.0)}
    )
    Options: ClassVar[type[StrategyOptions]] = DittoOptions
    options: DittoOptions
    mean_suffices: ClassVar[bool] = True

    def begin(self, job: LocalJob) -> None:
        """Before training, put v_i and theta^t aside; before a score, put v_i into the model."""
        own = {name.removeprefix(OWN): tensor for name, tensor in job.state.items()}
        if not job.training:
            sharing.write(job.model, own)
            return
        kept = job.model.state_dict().keys()
        # Running statistics are v_i's own, whether or not the global model's are shared.
        self._names = (*job.anchor, *(n for n, _ in job.model.named_buffers() if n in kept and n not in job.anchor))
        self._own = own or sharing.read(job.model, self._names)
        parameters = dict(job.model.named_parameters())
        self._pairs = [(p, job.anchor[n].to(job.device)) for n, p in parameters.items() if n in job.anchor]

    def phases(self, job: LocalJob, effort: Effort) -> Sequence[Phase]:
        """The global model, then the client's own."""

        def exchange() -> None:
            self._theta = sharing.read(job.model, self._names)
            sharing.write(job.model, self._own)

        return Phase(effort), Phase(effort, before=exchange)

    def correct(self, step: Step) -> None:
        """grad <- grad + lambda (v_i - theta^t), for v_i."""
        if step.job.phase != _PERSONAL or not self.options.personal_pull:
            return
        for parameter, received in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - received, alpha=self.options.personal_pull)

    def finish(self, job: LocalJob) -> Upload:
        """Keep v_i; leave theta_i in the model, for the upload."""
        job.state.update({OWN + n: t for n, t in sharing.read(job.model, self._names).items()})
        sharing.write(job.model, self._theta)
        return Upload()
