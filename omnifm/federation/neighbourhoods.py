"""Aggregation by spectral neighbourhoods: clients whose images have alike spectra share a mean.

    w_ij  = softmax_j( cos(a_i - a, c_j - a) / tau )        client i's weight in neighbourhood j
    m_j   = sum_i n_i w_ij theta_i / sum_i n_i w_ij         its running mean over a round's replies
    theta for client i = (1 - alpha) theta_global + alpha m_j,   alpha = N_j / (N_j + N_0)

a_i is the mean low-pass log-amplitude of client i's training images, a the mean over clients, c_j the mean of neighbourhood
j's members, N_j the examples it has learned from so far. The server holds one accumulator per neighbourhood, at most
`max_neighbourhoods`. A client alone in its neighbourhood gets the global mean; with `neighbourhood_alone = "own"` it keeps
what it sent, but for what the strategy names as common to all (OmniFM: the spectral path). What leaves a client for this is
one averaged amplitude spectrum, once.
"""

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from omnifm.errors import DataError, FederationError
from omnifm.federation.aggregation import RunningMean, step_towards
from omnifm.federation.messages import Reply
from omnifm.federation.state import Context, LocalJob, ServerState
from omnifm.spectral.signature import client_signature, cluster

_BATCH = 64


class NeighbourhoodOptions(BaseModel):
    """How neighbourhoods are formed and used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_neighbourhoods: int = Field(8, ge=1, description="The server holds at most this many models.")
    neighbourhood_threshold: float = Field(0.5, gt=-1, lt=1, description="Least mean cosine of two groups that become one.")
    neighbourhood_weights: Literal["soft", "hard"] = Field("soft", description="softmax(cosine / temperature), or one-hot.")
    neighbourhood_temperature: float = Field(0.1, gt=0)
    neighbourhood_shrinkage: float = Field(
        64.0, ge=0, description="Examples shown at which a neighbourhood counts as much as the global mean."
    )
    neighbourhood_alone: Literal["global", "own"] = Field(
        "global",
        description="A client without a peer gets the global mean; or keeps to its own, but for OmniFM's spectral path.",
    )
    neighbourhood_band: int = Field(16, ge=2, description="Lowest frequencies of the spectra that are compared.")


class Neighbourhoods:
    """Forms neighbourhoods once, then keeps one running mean for each. Its state is in `ServerState`."""

    def __init__(self, options: NeighbourhoodOptions, context: Context) -> None:
        self._options = options
        self._context = context
        self._means: dict[int, RunningMean] = {}
        self._examples: dict[int, int] = {}

    def describe(self, job: LocalJob) -> dict[str, Tensor]:
        """Return the client's mean low-pass spectrum, `(2 * band * band,)`; with a budget, noisy and of shortened spectra."""
        # With a budget one by one: no image may move a rounding of another's spectrum.
        index = torch.arange(len(job.data.train)).split(1 if job.release else _BATCH)
        images = (job.data.train.batch(part).image for part in index)
        band = self._options.neighbourhood_band
        try:
            if job.release is None:
                return {"signature": client_signature(images, band)}
            spectra = torch.stack([client_signature(image, band) for image in images])
            return job.release.told({"signature": job.release.mean(spectra, "spectrum", job.client).float()})
        except DataError as error:
            raise DataError(f"client {job.client}: {error}") from None

    def form(self, server: ServerState, signatures: Mapping[str, Tensor]) -> None:
        """Group the clients. Raises FederationError if a signature is missing, of another length, or not finite."""
        # Sums over clients run in the order of their ids, so that the order in the config changes no bit.
        clients = sorted(info.id for info in self._context.clients)
        length = 2 * self._options.neighbourhood_band**2
        for client in clients:
            found = signatures.get(client)
            if found is None or found.shape != (length,):
                raise FederationError(
                    f"client {client}: its mean spectrum is {'missing' if found is None else 'of another length'}"
                )
            if not bool(found.isfinite().all()):
                raise FederationError(f"client {client}: its mean spectrum is not finite")
        table = torch.stack([signatures[client] for client in clients])
        owner = cluster(table, self._options.max_neighbourhoods, self._options.neighbourhood_threshold)
        count = int(owner.max()) + 1
        weights = self._weights(table, owner, count)
        server.meta["neighbourhoods"] = {client: int(j) for client, j in zip(clients, owner.tolist(), strict=True)}
        server.meta["neighbourhood_weights"] = dict(zip(clients, weights.tolist(), strict=True))
        server.meta["neighbourhood_examples"] = [0.0] * count
        for j in range(count):
            self._keep(server, j, server.shared)

    def _weights(self, table: Tensor, owner: Tensor, count: int) -> Tensor:
        """Return w `(clients, neighbourhoods)`; rows sum to 1."""
        if self._options.neighbourhood_weights == "hard" or count == 1:
            return functional.one_hot(owner, count).double()
        centred = table.double() - table.double().mean(0)
        centroids = torch.stack([centred[owner == j].mean(0) for j in range(count)])
        cosine = functional.normalize(centred, dim=1) @ functional.normalize(centroids, dim=1).T
        return (cosine / self._options.neighbourhood_temperature).softmax(dim=1)

    @staticmethod
    def _keep(server: ServerState, j: int, tensors: Mapping[str, Tensor]) -> None:
        server.extra.update({f"neighbourhood/{j}/{name}": tensor for name, tensor in tensors.items()})

    def tensors_for(self, server: ServerState, client: str, common: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the client's neighbourhood mean, drawn to the global mean while the neighbourhood has seen few examples."""
        assigned = server.meta["neighbourhoods"]
        j = assigned[client]
        examples = server.meta["neighbourhood_examples"][j]
        alone = list(assigned.values()).count(j) == 1
        if examples == 0 or (alone and self._options.neighbourhood_alone == "global"):
            return server.shared
        alpha = examples / (examples + self._options.neighbourhood_shrinkage)
        own = {name: server.extra[f"neighbourhood/{j}/{name}"] for name in server.shared}
        if alone:
            # Without what even unlike modalities have in common, the client would be on its own.
            own |= {name: tensor for name, tensor in server.shared.items() if name in common}
        return {n: torch.lerp(server.shared[n], t, alpha) if t.is_floating_point() else t for n, t in own.items()}

    def begin_round(self) -> None:
        """Empty the accumulators."""
        self._means = {}
        self._examples = {}

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Add one reply to each neighbourhood by its weight there."""
        own = server.meta["neighbourhoods"][reply.client]
        # Kept apart until the round ends: what a client is sent must not depend on whose reply came before.
        self._examples[own] = self._examples.get(own, 0) + self._context.shown(reply.num_examples)
        own_weight = self._context.weight(reply.num_examples)
        for j, weight in enumerate(server.meta["neighbourhood_weights"][reply.client]):
            self._means.setdefault(j, RunningMean()).add(reply.tensors, own_weight * weight)

    def end_round(self, server: ServerState, step: float) -> None:
        """Replace the means of the neighbourhoods that had a member in this round."""
        # A neighbourhood is not moved by strangers alone: their tiny weights would be normalised to 1.
        for j in sorted(self._examples):
            server.meta["neighbourhood_examples"][j] += self._examples[j]
            old = {name: server.extra[f"neighbourhood/{j}/{name}"] for name in server.shared}
            self._keep(server, j, step_towards(old, self._means[j].value(), step))
