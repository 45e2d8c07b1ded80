"""MOON: a client's features are drawn to those of the received model, and away from those of its own last one.

    loss = L + mu mean_b -log( exp(cos(z, z_glob) / T) / (exp(cos(z, z_glob) / T) + exp(cos(z, z_prev) / T)) )
    z = P(mean of the tokens),  P: Linear(d, d), ReLU, Linear(d, dim)          of theta, theta^t and the client's last model

Li, He, Song, "Model-contrastive federated learning", CVPR 2021, Algorithm 1, and the authors' code: mu = 5 (their example for
CIFAR-10; the grid is {.001, .01, .1, 1, 5, 10}), T = .5, dim = 256. The other two networks are frozen and in evaluation mode, so
their BatchNorm moves no statistics; a port that leaves them in training has every client change the received model. A client
that trains for the first time has no last model: theta^t stands for it, the term is log 2 and its gradient 0. With partial
participation the last model may be many rounds old.

Adaptation: the authors' classifier reads z. Heads differ by task here, so P is a branch beside the head, and the network that
predicts is the same as under the other strategies. For segmentation and super-resolution the tokens are the bottleneck's.

traffic  P each way, beside the model
state    backbone and P of the client's last model, at the client
mu = 0 is FedAvg.
"""

import copy
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from omnifm.federation import sharing
from omnifm.federation.card import Card
from omnifm.federation.state import LocalJob
from omnifm.federation.strategy import Step, Strategy, StrategyOptions, Upload
from omnifm.federation.tap import Tap
from omnifm.tasks.base import Inputs, Model


class MOONOptions(StrategyOptions):
    """MOON's three numbers."""

    mu: float = Field(5.0, ge=0, description="Weight of the contrast.")
    temperature: float = Field(0.5, gt=0, description="T.")
    dim: int = Field(256, ge=1, description="Width of z.")


class Projection(Tap):
    """A path that changes nothing, with a branch P."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

    def project(self, tokens: Tensor) -> Tensor:
        """Return z `(b, dim)` of tokens `(b, l, d)`."""
        z: Tensor = self.layers(tokens.mean(dim=1))
        return z.float()


class Encoder(nn.Module):
    """A copy of what makes z, frozen. Its tensors have the names they have in the model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert isinstance(model.path, Projection)
        self.backbone, self.path = copy.deepcopy(model.backbone), copy.deepcopy(model.path)
        self.eval().requires_grad_(False)

    def forward(self, inputs: Inputs) -> Tensor:
        """Return z."""
        return self.path.project(self.backbone(inputs).tokens)


class MOON(Strategy):
    """FedAvg with a contrast of models."""

    card: ClassVar[Card] = Card(paper="Li et al., CVPR 2021", private="its last model", search={"mu": (0.1, 1.0, 5.0, 10.0)})
    Options: ClassVar[type[StrategyOptions]] = MOONOptions
    options: MOONOptions
    mean_suffices: ClassVar[bool] = True

    def setup(self, model: Model) -> None:
        """Add P."""
        model.path = Projection(model.backbone.token_dim, self.options.dim)

    def begin(self, job: LocalJob) -> None:
        """Copy theta^t, and put the client's last model beside it."""
        self._received = self._last = None
        if job.training and self.options.mu:
            self._received = Encoder(job.model)
            if job.state:
                self._last = Encoder(job.model)
                sharing.write(self._last, job.state)

    def penalty(self, step: Step) -> Tensor | None:
        """The contrast."""
        if self._received is None:
            return None
        path = step.job.model.path
        assert isinstance(path, Projection)
        z = path.project(step.output.trace)
        with torch.no_grad():
            received = self._received(step.batch.inputs)
            last = self._last(step.batch.inputs) if self._last else received
        return self.options.mu * contrast(z, received, last, self.options.temperature)

    def finish(self, job: LocalJob) -> Upload:
        """Keep this model for the next time."""
        if self._received is not None:
            job.state.clear()
            job.state.update(sharing.read(job.model, (n for n in self._received.state_dict() if n in job.anchor)))
        self._received = self._last = None
        return Upload()


def contrast(z: Tensor, received: Tensor, last: Tensor, temperature: float) -> Tensor:
    """Return the model-contrastive loss, the mean over rows `(b, dim)`."""
    near, far = (functional.cosine_similarity(z, other, dim=1) / temperature for other in (received, last))
    return (torch.logaddexp(near, far) - near).mean()
