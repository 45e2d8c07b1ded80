"""FedDyn: a linear term that every client learns over the rounds makes the clients' optima meet at the federation's.

    theta_i = argmin L_i(theta) - <g_i, theta> + (alpha / 2) || theta - theta^t ||_2^2
    g_i <- g_i - alpha (theta_i - theta^t)
    h <- h - (alpha / N) sum_i (theta_i - theta^t)          theta^{t+1} = (1 / m) sum_i theta_i - h / alpha

Acar et al., "Federated learning based on dynamic regularization", ICLR 2021, Algorithm 1; m clients take part, of the N that hold
a tensor. The argmin is the round's local training, and the terms enter as their gradient, alpha (theta - theta^t - g_i / alpha):
the norm is squared, and the quadratic is there whatever the weight decay, which belongs to L_i. g_i and h start from 0 and are
kept divided by alpha. alpha = .01 as published for CIFAR-10; its grid is {.001, .01, .1}. The published code divides alpha by a
client's share of the examples; here, as in the paper, it is the same for all. It clips gradients at 10: set optimiser.clip_norm.

private  g_i, as much as the model          traffic  FedAvg's
server   h, as much as the model

A tensor that no client moved while others were moved, being frozen, stays as it is, with its h: h / alpha would carry it on.

Clients count the same, however many examples they have. The rule is for parameters; buffers are FedAvg's, and weighed as in
FedAvg. With AdamW the terms are rescaled like any other gradient.

What is scored, and what a run leaves behind, is theta^{t+1} as in the algorithm (`scored` = "server"). It is noisy where few take
part: h / alpha is a sum over all rounds. The published code never scores it, but the mean of the round's models ("mean" here) and
the mean of all clients' last ones, for which a server would have to keep every client's. Clients train alike under both.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from omnifm.federation.aggregation import step_towards, trained
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategy import OneMeanOptions, Step, Strategy, StrategyOptions, Upload

LINEAR, SERVER = "feddyn/linear/", "feddyn/server/"


class FedDynOptions(OneMeanOptions):
    """FedDyn's number, and its model."""

    alpha: float = Field(0.01, gt=0, description="Weight of the quadratic term; the linear one learns in its proportion.")
    scored: Literal["server", "mean"] = Field("server", description="The scored model: theta, or the mean of a round's models.")

    @model_validator(mode="after")
    def _whole_step(self) -> Self:
        if self.scored == "mean" and self.server_step != 1:
            raise ValueError('scored = "mean" is of whole steps: set server_step = 1')
        return self


class FedDyn(Strategy):
    """FedAvg with dynamic regularisation."""

    card: ClassVar[Card] = Card(
        paper="Acar et al., ICLR 2021", private="a linear term", server="a linear term", search={"alpha": (0.001, 0.01, 0.1, 1.0)}
    )
    Options: ClassVar[type[StrategyOptions]] = FedDynOptions
    remembers_change: ClassVar[bool] = True
    options: FedDynOptions

    # ------------------------------------------------------------------ the client
    def begin(self, job: LocalJob) -> None:
        """Put theta^t + g_i / alpha, which the two terms pull to, where the model is."""
        if not job.training:
            return
        parameters = {n: p for n, p in job.model.named_parameters() if n in job.anchor}
        self._pairs = [(p, (job.anchor[n] + job.state.get(LINEAR + n, 0)).to(job.device)) for n, p in parameters.items()]

    def correct(self, step: Step) -> None:
        """grad <- grad - g_i + alpha (theta - theta^t), shared parameters only."""
        for parameter, target in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - target, alpha=self.options.alpha)

    def finish(self, job: LocalJob) -> Upload:
        """g_i / alpha <- g_i / alpha - (theta_i - theta^t)."""
        for name, parameter in job.model.named_parameters():
            if name in job.anchor:
                moved = parameter.detach().cpu().contiguous() - job.anchor[name]
                job.state[LINEAR + name] = job.state.get(LINEAR + name, 0) - moved
        return Upload()

    # ------------------------------------------------------------------ the server
    def start_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """Return theta^t; where the server keeps the mean of the models, that less h / alpha."""
        shared = super().start_for(server, client)
        return shared if self.options.scored == "server" else {n: self._started(server, n) for n in shared}

    def _started(self, server: ServerState, name: str) -> Tensor:
        kept = server.shared[name]
        dual = server.extra.get(SERVER + name) if self.options.scored == "mean" else None
        return kept if dual is None else kept - dual

    def begin_round(self, server: ServerState) -> None:
        """Nobody answered yet."""
        super().begin_round(server)
        self._counts: dict[str, int] = {}

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Count the client's parameters once."""
        self._receive_uniform(reply)
        for name in reply.tensors.keys() - self.buffers:
            self._counts[name] = self._counts.get(name, 0) + 1

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Move h by the clients' changes, the parameters to the mean less h / alpha."""
        del round_index
        after = self._mean.value()
        changes = {name: after[name] - self._started(server, name) for name in self._counts}
        ours = trained(changes)
        after |= {name: server.shared[name] for name in changes.keys() - ours.keys()}
        for name, moved in ours.items():
            share = self._counts[name] / self._holders(name)  # m / N
            known: Tensor | int = server.extra.get(SERVER + name, 0)
            server.extra[SERVER + name] = known - share * moved
            if self.options.scored == "server":
                after[name] = after[name] - server.extra[SERVER + name]
        server.shared = step_towards(server.shared, after, self.options.server_step)
        return {}
