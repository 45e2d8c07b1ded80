"""What a strategy may change, as hooks on the one round loop and the one local loop. The default of each hook is FedAvg.

A strategy object holds options and facts about the federation, never the state of a run: on the server that lives in
`ServerState`, at a client in `LocalJob.state`, and both are in the checkpoint.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from omnifm.errors import ConfigError, FederationError
from omnifm.federation.aggregation import RunningMean, step_towards
from omnifm.federation.card import Card
from omnifm.federation.effort import Effort, Phase
from omnifm.federation.messages import Reply
from omnifm.federation.neighbourhoods import NeighbourhoodOptions, Neighbourhoods
from omnifm.federation.state import Context, LocalJob, ServerState
from omnifm.spectral.rows import BankRows
from omnifm.tasks.base import Batch, Model, Output


class StrategyOptions(NeighbourhoodOptions):
    """Options every strategy has. The defaults are plain FedAvg."""

    aggregation: Literal["mean", "neighbours"] = Field("mean", description="One mean for all, or one per spectral neighbourhood.")
    server_step: float = Field(1.0, gt=0, le=1, description="theta <- theta + server_step * (mean - theta).")


class OneMeanOptions(StrategyOptions):
    """Options of a strategy whose server has a rule of its own for one model; spectral neighbourhoods are refused."""

    aggregation: Literal["mean"] = Field("mean", description="One model for all.")


def no_pass(batch: Batch) -> tuple[Output, Tensor]:
    """Stand in for a step's further pass where there is no task."""
    raise NotImplementedError(f"a batch of {len(batch.row)} has no task to pass through")


@dataclass(frozen=True)
class Step:
    """One optimiser step, as `penalty` and `correct` see it.

    Attributes:
        job: whose.
        batch: as `prepare` left it.
        output: the model's answer.
        again: a further pass: the model's answer to a batch and the task's loss, in the precision of the round. BatchNorm's
            running statistics stay as they are, whatever the number of passes.
    """

    job: LocalJob
    batch: Batch
    output: Output
    again: Callable[[Batch], tuple[Output, Tensor]] = no_pass


@dataclass(frozen=True)
class Upload:
    """What a client sends beyond its shared tensors."""

    extra: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Strategy:
    """FedAvg (McMahan et al., AISTATS 2017, Algorithm 1) as a set of hooks."""

    card: ClassVar[Card] = Card(paper="")
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    pooled: ClassVar[bool] = False
    """True: one model is trained on the data of all clients, gathered in one place."""
    averages: ClassVar[bool] = True
    """False: no two clients' tensors are ever averaged, so options of averaging are a mistake."""
    mean_suffices: ClassVar[bool] = False
    """True: of the shared tensors the server needs the clients' weighted mean alone, never one client's. It is declared, not
    inherited from FedAvg: a subclass may look at more."""
    compares_numbers: ClassVar[bool] = False
    """True: the server compares clients number by number, by sign or rank; numbers left as they were would mislead it."""
    remembers_change: ClassVar[bool] = False
    """True: client and server each add up the client's changes, and the sums must stay equal."""
    by_example: ClassVar[frozenset[str]] = frozenset()
    """Names of the client's hooks that it changes and that keep to single examples all the same: the penalty is a mean over a
    batch's examples, and what is sent besides goes through `LocalJob.release`."""
    tolerates_nonfinite: ClassVar[bool] = False
    """True: a reply that is not finite, or a client whose training is not, is left out of its round, and counted; by default
    it ends the run."""
    predicts_with_extra: ClassVar[bool] = True
    """False: what `extra_for` returns is for training alone, and is not sent with other requests."""
    buffers: frozenset[str] = frozenset()
    """Names of the tensors that are no parameters (running statistics, counters); set where the model is built."""
    common: frozenset[str] = frozenset()
    """Names of the tensors that even a client without a peer shares with everybody; `setup` knows them."""
    width: int = 0
    """Length of a token; set where the model is built. 0: not known."""
    holds: Mapping[str, frozenset[str]] = MappingProxyType({})
    """By client, the names of the tensors it has; a client that is not here has all. Set where the site is built."""

    def __init__(self, options: StrategyOptions, context: Context) -> None:
        if not self.averages and (options.aggregation != "mean" or options.server_step != 1):
            raise ConfigError(
                f"strategies.{type(self).__name__.lower()}: nothing is averaged; aggregation and server_step do not apply"
            )
        self.options = options
        self.context = context
        self.neighbourhoods = Neighbourhoods(options, context) if options.aggregation == "neighbours" else None

    # ------------------------------------------------------------------ the model, at every site
    def setup(self, model: Model) -> None:
        """Add modules to a freshly built model. Torch's global generator is seeded by the caller."""

    def private(self, model: Model) -> frozenset[str]:
        """Return the names of the tensors that never leave a client."""
        del model
        return frozenset()

    def globalise(self, model: Model) -> bool:
        """Make `model`, with shared tensors alone in place, the global model. False: the method has none."""
        return not self.private(model)

    # ------------------------------------------------------------------ at the client
    def describe(self, job: LocalJob) -> Mapping[str, Tensor]:
        """Return what the server should know of a client before the first round; asked only if `needs_description`."""
        return self.neighbourhoods.describe(job) if self.neighbourhoods else {}

    def begin(self, job: LocalJob) -> None:
        """Prepare a client's model for training or evaluation."""

    def phases(self, job: LocalJob, effort: Effort) -> Sequence[Phase]:
        """Return how the round's local training is cut up; called after `begin`. By default one phase that trains everything."""
        del job
        return (Phase(effort),)

    def prepare(self, job: LocalJob, batch: Batch) -> Batch:
        """Return a batch as the model shall see it, in training and in prediction alike; it is on the model's device."""
        del job
        return batch

    def penalty(self, step: Step) -> Tensor | None:
        """Return a scalar to add to the task loss, or None."""
        del step
        return None

    def correct(self, step: Step) -> None:
        """Change gradients after backward, before clipping and the optimiser's step."""

    def finish(self, job: LocalJob) -> Upload:
        """Return what else to upload after local training."""
        del job
        return Upload()

    # ------------------------------------------------------------------ at the server
    @property
    def needs_description(self) -> bool:
        """Whether clients are asked to `describe` before the first round."""
        return self.neighbourhoods is not None

    @property
    def uploads(self) -> str:
        """What a client sends beside its shared tensors, in words; empty: nothing. It matters where `mean_suffices`."""
        return "its mean spectrum" if self.neighbourhoods else ""

    @property
    def sends_prototypes(self) -> bool:
        """Whether `finish` sends prototypes, through `LocalJob.release` where there is a budget."""
        return False

    def unfit(self, *, by_example: bool) -> str:
        """Return which option cannot be had with a budget for spectra, or with gradients of single examples; empty: none."""
        del by_example
        return ""

    def outdates(self) -> str:
        """Return what the server does that makes no sense of what a client held back (error feedback); empty: nothing."""
        return ""

    def described(self, server: ServerState, replies: Mapping[str, Reply]) -> None:
        """Take in the descriptions of all clients, once."""
        if self.neighbourhoods:
            self.neighbourhoods.form(
                server, {c: reply.extra["signature"] for c, reply in replies.items() if "signature" in reply.extra}
            )

    def shared_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """Return the shared tensors that `client` gets."""
        return self.neighbourhoods.tensors_for(server, client, self.common) if self.neighbourhoods else server.shared

    def start_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """Return the shared tensors from which `client` trains; the same names as `shared_for`, which is what is scored."""
        return self.shared_for(server, client)

    def extra_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """Return the further tensors that `client` gets with a training request."""
        del server, client
        return {}

    def extra_for_prediction(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """Return the further tensors that `client` gets with any later request: by default those of training."""
        return self.extra_for(server, client) if self.predicts_with_extra else {}

    def begin_round(self, server: ServerState) -> None:
        """Start a round: empty accumulators."""
        del server
        self._mean = RunningMean()
        if self.neighbourhoods:
            self.neighbourhoods.begin_round()

    def vet(self, server: ServerState, reply: Reply) -> None:
        """Raise FederationError, in words without a name, if what a client sent beside its shared tensors does not fit.

        Called before `receive`; changes nothing, so that the round can go on without the client. Here nothing is expected. A
        strategy whose `finish` uploads something judges all of it in its own `vet`; `receive` may then take it as it is.
        """
        del server
        self._require_known(reply, ())

    @staticmethod
    def _require_known(reply: Reply, names: Collection[str]) -> None:
        """Raise FederationError if a client sent something besides `names`."""
        if odd := reply.extra.keys() - set(names):
            raise FederationError(f"tensor {min(odd)} is unknown")

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Take in one reply and let go of it."""
        self._mean.add(reply.tensors, self.context.weight(reply.num_examples))
        if self.neighbourhoods:
            self.neighbourhoods.receive(server, reply)

    def _receive_uniform(self, reply: Reply) -> None:
        """Take in one reply where the paper's mean is uniform: parameters count the same from all, buffers as in FedAvg."""
        buffers = {n: t for n, t in reply.tensors.items() if n in self.buffers}
        self._mean.add({n: t for n, t in reply.tensors.items() if n not in buffers}, 1)
        self._mean.add(buffers, self.context.weight(reply.num_examples))

    def _holders(self, name: str) -> int:
        """Return how many of the federation's clients have a tensor."""
        return sum(name in self.holds.get(info.id, (name,)) for info in self.context.clients)

    def blur(self, offsets: Mapping[str, Tensor]) -> None:
        """Move the mean of the round's replies, once, before the server makes anything of it (noise)."""
        self._mean.shift(offsets)

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Turn what was received into the next state. Returns facts for the round's event."""
        del round_index
        if self.neighbourhoods:
            self.neighbourhoods.end_round(server, self.options.server_step)
        server.shared = step_towards(server.shared, self._mean.value(), self.options.server_step)
        return {"neighbourhoods": server.meta.get("neighbourhoods")}

    def bank_rows(self, server: ServerState) -> BankRows | None:
        """Return the rows of the strategy's knowledge bank, for the run's record; None without a bank."""
        del server
        return None
