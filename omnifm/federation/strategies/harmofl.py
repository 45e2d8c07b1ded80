"""HarmoFL: images get one amplitude at low frequencies, the clients' mean; steps are taken with the gradient of a worse place.

    F(x') = A exp(i arg F(x)) in the window |fx|, |fy| <= b = floor(L min(h, w))        A = mean_i A_i,  A_i = mean_x |F(x)|
    g = grad L(theta),  theta' = theta + alpha g / || g ||_2,  theta <- theta - lr grad L(theta')

Jiang, Wang, Dou, "HarmoFL: Harmonizing local and global drifts in federated learning on heterogeneous medical images", AAAI 2022,
and the authors' code. The mean over clients is plain, in A and in the server's model, whatever `federation.weighting` says.
L = 0 as the code calls it: only the mean brightness is harmonised; alpha = .05. A step takes two passes.

traffic  the window of A_i once, and of A with every request: C (2b + 1) (b + 1) numbers
state    A at the server

Adaptations. A_i is the mean over all training images, sent before the first round, where the code keeps a running mean during it
and freezes A after; so the first round sees harmonised images too. BatchNorm's statistics are those of the first pass alone.
What is changed is `Batch.image`: super-resolution's patches and what a frozen trunk has seen beforehand stay as they are.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from omnifm.errors import FederationError
from omnifm.federation.aggregation import RunningMean
from omnifm.federation.amplitudes import check_windows, shape_name, windows_of
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import Context, LocalJob, ServerState
from omnifm.federation.strategy import Step, Strategy, StrategyOptions
from omnifm.spectral.fft import with_window
from omnifm.tasks.base import Batch

_AMPLITUDE = "harmofl/amplitude/"
_BATCH = 256


class HarmoFLOptions(StrategyOptions):
    """HarmoFL's two halves."""

    amplitude_norm: bool = Field(True, description="Give all images the federation's mean amplitude.")
    window: float = Field(0.0, ge=0, lt=0.5, description="L: radius of the window as a share of the image's side; 0: brightness.")
    log_mean: bool = Field(False, description="Means are of log(1 + amplitude).")
    perturbation: float = Field(0.05, ge=0, description="alpha: how far the worse place is; 0: the gradient is that of here.")


class HarmoFL(Strategy):
    """FedAvg with equal weights, amplitude normalisation and weight perturbation."""

    card: ClassVar[Card] = Card(
        paper="Jiang et al., AAAI 2022",
        up="a mean amplitude, once",
        down="the mean amplitude",
        server="the mean amplitude",
        search={"amplitude_norm": (True, False), "perturbation": (0.01, 0.05)},
    )
    Options: ClassVar[type[StrategyOptions]] = HarmoFLOptions
    options: HarmoFLOptions

    def __init__(self, options: HarmoFLOptions, context: Context) -> None:
        super().__init__(options, replace(context, weighting="equal"))

    # ------------------------------------------------------------------ amplitude normalisation
    @property
    def needs_description(self) -> bool:
        """The mean amplitude is known before the first round."""
        return super().needs_description or self.options.amplitude_norm

    def describe(self, job: LocalJob) -> Mapping[str, Tensor]:
        """The client's mean amplitude in the window; its name says the images' shape, which sets the scale."""
        found = dict(super().describe(job))
        if not self.options.amplitude_norm:
            return found
        total, shape = torch.zeros(()), ""
        for part in torch.arange(len(job.data.train)).split(_BATCH):
            image = job.data.train.batch(part).image
            shape = shape_name(image)
            amplitude = windows_of(image, self.options.window).double()
            total = total + (amplitude.log1p() if self.options.log_mean else amplitude).sum(dim=0)
        found[_AMPLITUDE + shape] = (total / len(job.data.train)).float()
        return found

    def described(self, server: ServerState, replies: Mapping[str, Reply]) -> None:
        """Average the amplitudes of the clients whose images have one shape."""
        super().described(server, replies)
        if not self.options.amplitude_norm:
            return
        mean = RunningMean()
        for client in sorted(info.id for info in self.context.clients):
            extra = replies[client].extra if client in replies else {}
            own = {n: t for n, t in extra.items() if n.startswith(_AMPLITUDE)}
            mean.add(dict([check_windows(client, "its mean amplitude", own, _AMPLITUDE, self.options.window, 0)]), 1)
        found = mean.value()
        server.extra.update({n: t.expm1() for n, t in found.items()} if self.options.log_mean else found)

    def extra_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """The federation's mean amplitude."""
        del client
        return {n: t for n, t in server.extra.items() if n.startswith(_AMPLITUDE)}

    def prepare(self, job: LocalJob, batch: Batch) -> Batch:
        """Give the images the federation's amplitude."""
        if not self.options.amplitude_norm:
            return batch
        amplitude = job.received.get(_AMPLITUDE + shape_name(batch.image))
        if amplitude is None:
            raise FederationError(f"client {job.client}: there is no mean amplitude for images of {shape_name(batch.image)}")
        return batch._replace(image=with_window(batch.image, amplitude.to(batch.image.device)))

    # ------------------------------------------------------------------ weight perturbation
    def correct(self, step: Step) -> None:
        """Replace the gradient by that of the worse place."""
        alpha = self.options.perturbation
        trained = [p for p in step.job.model.parameters() if p.grad is not None]
        if not alpha or not trained:
            return
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(_gradient(p)) for p in trained]))
        start = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for p in trained:
                p.add_(_gradient(p) * (alpha / (norm + 1e-12)))
                p.grad = None
        step.again(step.batch)[1].backward()
        with torch.no_grad():
            for p, here in zip(trained, start, strict=True):
                p.copy_(here)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
