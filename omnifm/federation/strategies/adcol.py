"""ADCOL: the server learns whose features are whose; clients learn features by which nobody can tell.

    client   min L(theta) + mu KL(u || D(f)),   u = (1/N, ..., 1/N),  f = mean of the tokens r       D stays as received
    server   min_D sum_p w_p CE(D(v_p), i_p) / sum_p w_p      v_p: sent by client i_p, standing for w_p of its images

Li, He, Song, "Adversarial collaborative learning on non-IID features", ICML 2023. `upload = "features"` is the paper's: D learns
from f of every image, as the passes of the last local epoch gave it, w_p = 1. That sends a vector for each image, a cost in
privacy: much of an image can be read from its f. `upload = "prototypes"`, the default, sends k-means centres of the features
alone, at most `prototypes` a client, so that a client uploads what it would to OmniFM's bank. D as in FL-bench: two layers of 512
without bias, with BatchNorm and ReLU, then one output per client; SGD with .01, 3 epochs a round, batches of 32; mu = .5.
`predicts = "modality"`: one output per modality.

traffic  up: K (d + 1) numbers, or n_i d with `features`; down: D, from the second round on
state    D at the server, and the latest prototypes of every client; features are used in their round and forgotten

A discriminator at the client would see one class, and its gradient reversed would say nothing: D has to be at the server.
Adaptations. In the first round there is no D yet. Prototypes are of features after local training, without augmentation. Where
a round is counted in steps, the features are those of the last passes, n_i at most.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from omnifm import seeds
from omnifm.errors import FederationError
from omnifm.federation.card import Card
from omnifm.federation.discriminator import discriminator, divergence_from_uniform, learn
from omnifm.federation.messages import Reply
from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategy import Step, Strategy, StrategyOptions, Upload
from omnifm.federation.tap import Tap
from omnifm.spectral.prototypes import prototypes
from omnifm.tasks.base import Model

_WEIGHTS, _PROTOTYPES, _COUNTS = "adcol/discriminator/", "adcol/prototypes/", "adcol/counts/"
_FEATURES, _SENT, _SENT_COUNTS = "adcol/features", "adcol/prototypes", "adcol/counts"
_BATCH = 32


class ADCOLOptions(StrategyOptions):
    """The adversarial term, what is uploaded, and the discriminator's training."""

    mu: float = Field(0.5, ge=0, description="Weight of the adversarial term.")
    predicts: Literal["client", "modality"] = Field("client", description="What the discriminator tells apart.")
    upload: Literal["prototypes", "features"] = Field("prototypes", description="Centres of the features, or all of them.")
    prototypes: int = Field(16, ge=1, description="K, prototypes a client uploads per round.")
    hidden: int = Field(512, ge=1, description="Width of the discriminator's two layers.")
    discriminator_lr: float = Field(0.01, gt=0, description="Learning rate of the discriminator.")
    discriminator_epochs: int = Field(3, ge=1, description="Passes over the prototypes after each round.")


class ADCOL(Strategy):
    """FedAvg with a discriminator at the server."""

    card: ClassVar[Card] = Card(
        paper="Li et al., ICML 2023",
        up="prototypes or features",
        down="a discriminator",
        server="a discriminator",
        search={"mu": (0.1, 0.5), "predicts": ("client", "modality")},
    )
    Options: ClassVar[type[StrategyOptions]] = ADCOLOptions
    predicts_with_extra: ClassVar[bool] = False
    options: ADCOLOptions

    def setup(self, model: Model) -> None:
        """Look at the tokens."""
        model.path = Tap()

    # ------------------------------------------------------------------ the client
    def begin(self, job: LocalJob) -> None:
        """Build the discriminator that came with the request."""
        found = {n.removeprefix(_WEIGHTS): t for n, t in job.received.items() if n.startswith(_WEIGHTS)}
        self._judge = self._discriminator(found).to(job.device).eval().requires_grad_(False) if found else None
        self._seen: list[Tensor] = []

    def penalty(self, step: Step) -> Tensor | None:
        """How far the discriminator is from having no idea."""
        features = step.output.trace.float().mean(dim=1)
        if self.options.upload == "features":
            self._seen.append(features.detach().cpu())
            while sum(map(len, self._seen)) > len(step.job.data.train):
                del self._seen[0]  # of an epoch before
        if self._judge is None or not self.options.mu:
            return None
        return self.options.mu * divergence_from_uniform(self._judge(features))

    def finish(self, job: LocalJob) -> Upload:
        """Send the client's features, or what sums them up."""
        features = torch.cat(self._seen) if self._seen else _features(job)
        self._seen = []
        if not bool(features.isfinite().all()):
            raise FederationError(f"client {job.client}, round {job.round}: a feature is not finite")
        if self.options.upload == "features":
            return Upload({_FEATURES: features})
        generator = seeds.generator(job.seed, "adcol", job.round, job.client)
        vectors, counts = prototypes(features, self.options.prototypes, generator, rho=math.inf)
        return Upload({_SENT: vectors, _SENT_COUNTS: counts})

    # ------------------------------------------------------------------ the server
    def extra_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """The discriminator, once there is one."""
        del client
        return {n: t for n, t in server.extra.items() if n.startswith(_WEIGHTS)}

    def begin_round(self, server: ServerState) -> None:
        """Wait for features."""
        super().begin_round(server)
        self._came: dict[str, Tensor] = {}

    def vet(self, server: ServerState, reply: Reply) -> None:
        """Judge the features, or what sums them up."""
        what = self.options.upload
        vectors, counts = self._sent(reply)
        most = self.options.prototypes if what == "prototypes" else reply.num_examples
        if vectors is None or counts is None:
            raise FederationError(f"its {what} are missing, or how many images they stand for is")
        fits = vectors.dim() == 2 and 1 <= len(vectors) <= most and vectors.shape[1] == self._width(server, vectors)
        if not fits or not vectors.is_floating_point():
            raise FederationError(f"its {what} have shape {tuple(vectors.shape)}, or are no fractions")
        if counts.shape != vectors.shape[:1] or not bool((counts > 0).all()):
            raise FederationError("the counts of its prototypes must be one positive number for each")
        if not bool(vectors.isfinite().all()) or not bool(counts.isfinite().all()):
            raise FederationError(f"a value of its {what} is not finite")
        self._require_known(reply, (_FEATURES,) if what == "features" else (_SENT, _SENT_COUNTS))

    def _sent(self, reply: Reply) -> tuple[Tensor | None, Tensor | None]:
        """Return what a client sent, and of how many images each row is."""
        if self.options.upload == "prototypes":
            return reply.extra.get(_SENT), reply.extra.get(_SENT_COUNTS)
        features = reply.extra.get(_FEATURES)
        return features, None if features is None or not features.dim() else torch.ones(len(features))

    def _width(self, server: ServerState, vectors: Tensor) -> int:
        """Return the length of a feature; where nothing says it, that of `vectors`."""
        known = {**server.extra, **self._came, _SENT: vectors}
        wide = (t.shape[1] for n, t in known.items() if n.startswith((_PROTOTYPES, _WEIGHTS + "0.weight", _SENT)))
        return self.width or next(wide)

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Put what a client sent aside until the round ends."""
        super().receive(server, reply)
        vectors, counts = self._sent(reply)
        assert vectors is not None and counts is not None  # `vet` has seen it
        self._came |= {_PROTOTYPES + reply.client: vectors, _COUNTS + reply.client: counts}

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Average, then train the discriminator on the round's features, or the latest prototypes of all clients."""
        facts = super().end_round(server, round_index)
        known = self._came
        if self.options.upload == "prototypes":
            server.extra.update(self._came)
            known = server.extra
        # In the order of ids, so that the order in the config changes nothing.
        clients = sorted(n.removeprefix(_PROTOTYPES) for n in known if n.startswith(_PROTOTYPES))
        vectors, counts = (torch.cat([known[kind + c] for c in clients]) for kind in (_PROTOTYPES, _COUNTS))
        sizes = torch.tensor([len(known[_COUNTS + c]) for c in clients])
        target = torch.tensor([self._number(c) for c in clients]).repeat_interleave(sizes)
        accuracy = self._learn(server, vectors, target, counts, round_index)
        self._came = {}
        return {**facts, "discriminator": {self.options.upload: len(vectors), "accuracy": accuracy}}

    def _number(self, client: str) -> int:
        if self.options.predicts == "modality":
            return self.context.modality_index(client)
        return sorted(info.id for info in self.context.clients).index(client)

    def _learn(self, server: ServerState, vectors: Tensor, target: Tensor, counts: Tensor, round_index: int) -> float:
        """Train the discriminator, keep it, return its accuracy on what it was trained on."""
        saved = {n.removeprefix(_WEIGHTS): t for n, t in server.extra.items() if n.startswith(_WEIGHTS)}
        judge, o = self._discriminator(saved, vectors.shape[1]), self.options
        generator = seeds.generator(self.context.seed, "adcol", "discriminator", round_index)
        lr, epochs = o.discriminator_lr, o.discriminator_epochs
        accuracy = learn(judge, vectors, target, counts, lr=lr, epochs=epochs, generator=generator)
        server.extra.update({_WEIGHTS + n: t.detach().clone() for n, t in judge.state_dict().items()})
        return accuracy

    def _discriminator(self, state: Mapping[str, Tensor], width: int = 0) -> nn.Sequential:
        """Return the discriminator in a given state, or the untrained one for features of length `width`."""
        outputs = len(self.context.clients if self.options.predicts == "client" else self.context.modalities)
        width = state["0.weight"].shape[1] if state else width
        with seeds.scope(self.context.seed, "adcol", "init"):
            return discriminator(width, self.options.hidden, outputs, state)


def _features(job: LocalJob) -> Tensor:
    """Return the mean token of every training image, `(n, d)`."""
    backbone, train = job.model.backbone.eval(), job.data.train
    found = []
    with torch.no_grad():
        for part in torch.arange(len(train)).split(_BATCH):
            batch = train.batch(part).to(job.device, torch.contiguous_format)
            found.append(backbone(batch.inputs).tokens.float().mean(dim=1).cpu())
    return torch.cat(found)
