"""FedDG: clients train on their images with the low-frequency amplitudes of other clients' images, one step ahead.

    F(x') = ((1 - s) |F(x)| + s A) exp(i arg F(x)) in the window |fx|, |fy| <= b = floor(L min(h, w))      A: of another client
    theta' = theta - a clip(grad L(x; theta)),   grad <- grad L(x; theta) + grad [ L(x'; theta') + w L_boundary ]

Liu et al., "FedDG: Federated domain generalization on medical image segmentation via episodic learning in continuous frequency
space", CVPR 2021, and the authors' code (ELCFS). Every image of a batch takes the amplitude of a random image of a random other
client, and is clipped to [0, 1]. The published loader makes two such copies of an image, the published training uses one of them
(`styles` = 1; with more, the outer losses are averaged). L = 0 and s = 1 as in that loader, so that only the mean brightness
travels; the published demonstration has L = .003 and s between 0 and 1 (`interpolate`: uniform for each image). 1/8 of a client's
images are in the bank. a = .001, elements of the gradient clipped to 100, w = .1. The gradient at theta' is first order, as in
the code: theta' - theta is a constant.

L_boundary exists for segmentation alone, where targets are masks; for all other tasks the outer loss is the task's. It is NT-Xent
with temperature .05 on the mean features of contours (the foreground's outermost pixels) and of the 5 pixels of background round
them, of x and of x'. Adaptations: features are the bottleneck's tokens instead of the decoder's last map, those of x are
constants, and all foreground classes are one.

traffic  a bank of windows: C (2b + 1) (b + 1) numbers for 1/8 of a client's images once, and all others' with every request
state    the bank at the server
private  nothing: amplitudes of single images are seen by every client. This is the privacy cost that other methods avoid

What is changed is `Batch.image`: super-resolution's patches and what a frozen trunk has seen beforehand stay as they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from omnifm import seeds
from omnifm.federation.amplitudes import check_windows, shape_name, windows_of
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategy import Step, Strategy, StrategyOptions
from omnifm.federation.tap import Tap
from omnifm.spectral.fft import with_window
from omnifm.tasks.base import Batch, Model

_AMPLITUDE = "feddg/amplitude/"
_BOUNDARY, _TEMPERATURE, _RING = 0.1, 0.05, 5


class FedDGOptions(StrategyOptions):
    """The window, the bank and the episode."""

    window: float = Field(0.0, ge=0, lt=0.5, description="L: radius of the window as a share of the image's side; 0: brightness.")
    interpolate: bool = Field(False, description="Mix both amplitudes, by a random share, instead of replacing.")
    styles: int = Field(1, ge=0, description="Copies of a batch in the style of others; 0: plain FedAvg.")
    bank_share: float = Field(0.125, gt=0, le=1, description="Part of a client's training images whose amplitudes it gives away.")
    inner_lr: float = Field(1e-3, ge=0, description="a: length of the step ahead.")
    inner_clip: float = Field(100.0, gt=0, description="Largest absolute value of a gradient's element in the step ahead.")


class FedDG(Strategy):
    """FedAvg with an outer step on images in other clients' style."""

    card: ClassVar[Card] = Card(
        paper="Liu et al., CVPR 2021",
        up="amplitudes of single images, once",
        down="amplitudes of other clients' images",
        server="amplitudes",
        search={"window": (0.0, 0.01), "interpolate": (False, True)},
    )
    Options: ClassVar[type[StrategyOptions]] = FedDGOptions
    predicts_with_extra: ClassVar[bool] = False
    options: FedDGOptions

    def setup(self, model: Model) -> None:
        """Look at the tokens, for the boundary term."""
        model.path = Tap()

    # ------------------------------------------------------------------ the bank
    @property
    def needs_description(self) -> bool:
        """The bank is filled before the first round."""
        return super().needs_description or self.options.styles > 0

    def describe(self, job: LocalJob) -> Mapping[str, Tensor]:
        """Amplitudes of a random part of the training images; the name says the images' shape, which sets the scale."""
        found = dict(super().describe(job))
        if self.options.styles:
            total = len(job.data.train)
            generator = seeds.generator(job.seed, "feddg", "bank", job.client)
            index = torch.randperm(total, generator=generator)[: math.ceil(self.options.bank_share * total)]
            image = job.data.train.batch(index.sort().values).image
            found[_AMPLITUDE + shape_name(image)] = windows_of(image, self.options.window)
        return found

    def described(self, server: ServerState, replies: Mapping[str, Reply]) -> None:
        """Keep every client's amplitudes."""
        super().described(server, replies)
        for client in sorted(info.id for info in self.context.clients) if self.options.styles else ():
            extra = replies[client].extra if client in replies else {}
            own = {n: t for n, t in extra.items() if n.startswith(_AMPLITUDE)}
            name, amplitudes = check_windows(client, "its part of the bank", own, _AMPLITUDE, self.options.window, 1)
            server.extra[f"{name}/{client}"] = amplitudes

    def extra_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """The bank without the client's own part."""
        bank = {n: t for n, t in server.extra.items() if n.startswith(_AMPLITUDE)}
        return {n: t for n, t in bank.items() if n.removeprefix(_AMPLITUDE).partition("/")[2] != client}

    # ------------------------------------------------------------------ the episode
    def correct(self, step: Step) -> None:
        """Add the gradient of the outer loss, taken one step ahead."""
        others = self._others(step)
        trained = [p for p in step.job.model.parameters() if p.grad is not None]
        if not others or not trained:
            return
        o = self.options
        start = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for p in trained:
                assert p.grad is not None
                p.sub_(p.grad.clamp(-o.inner_clip, o.inner_clip), alpha=o.inner_lr)
        for batch in others:
            output, loss = step.again(batch)
            boundary = boundary_loss(step.output.trace.detach(), output.trace, batch)
            # Adds to the gradient of the inner loss.
            ((loss if boundary is None else loss + _BOUNDARY * boundary) / len(others)).backward()
        with torch.no_grad():
            for p, here in zip(trained, start, strict=True):
                p.copy_(here)

    def _others(self, step: Step) -> list[Batch]:
        """Return the batch in the style of others, as many times as there are styles."""
        job = step.job
        prefix = f"{_AMPLITUDE}{shape_name(step.batch.image)}/"
        banks = [job.received[name] for name in sorted(job.received) if name.startswith(prefix)]
        generator = seeds.generator(job.seed, "feddg", job.round, job.client, job.steps)
        return [self._styled(step.batch, banks, generator) for _ in range(self.options.styles)] if banks else []

    def _styled(self, batch: Batch, banks: Sequence[Tensor], generator: torch.Generator) -> Batch:
        image = batch.image
        owner = torch.randint(len(banks), (len(image),), generator=generator).tolist()
        given = [banks[i][int(torch.randint(len(banks[i]), (1,), generator=generator))] for i in owner]
        share = torch.rand(len(image), 1, 1, 1, generator=generator).to(image.device) if self.options.interpolate else 1.0
        return batch._replace(image=with_window(image, torch.stack(given).to(image.device), share).clamp(0, 1))


def boundary_loss(tokens: Tensor, others: Tensor, batch: Batch) -> Tensor | None:
    """Return the contrast between contours and what surrounds them; None where targets are no masks, or no image has both.

    Args:
        tokens: of the images, `(b, l, d)`, on a square grid.
        others: of the images in another style, the same.
        batch: with masks `(b, h, w)` as target, 0 is background.
    """
    side, mask = math.isqrt(tokens.shape[1]), batch.target
    if mask.is_floating_point() or mask.shape != batch.image[:, 0].shape or side * side != tokens.shape[1]:
        return None
    inside = (mask > 0).float()[:, None]
    eroded = -functional.max_pool2d(-inside, 3, 1, 1)
    dilated = functional.max_pool2d(inside, 2 * _RING + 1, 1, _RING)
    parts = [functional.adaptive_avg_pool2d(part, side).flatten(1) for part in (inside - eroded, dilated - inside)]
    both = (parts[0].sum(dim=1) > 0) & (parts[1].sum(dim=1) > 0)
    if not bool(both.any()):
        return None
    shares = torch.stack([part[both] / part[both].sum(dim=1, keepdim=True) for part in parts])  # (2, n, l)
    means = torch.cat([torch.einsum("knl,nld->knd", shares, t[both].float()) for t in (tokens, others)], dim=1)
    kind = torch.arange(2, device=tokens.device).repeat_interleave(means.shape[1])
    return nt_xent(functional.normalize(means.flatten(0, 1), dim=1), kind)


def nt_xent(z: Tensor, kind: Tensor) -> Tensor:
    """Return the mean over all pairs of one kind of -log( exp(s_ij) / (exp(s_ij) + sum_k exp(s_ik)) ), k: of another kind.

    s_ij = z_i z_j / temperature, z `(m, d)` of length 1.
    """
    similar = z @ z.t() / _TEMPERATURE
    alike = kind[:, None] == kind[None]
    unlike = similar.masked_fill(alike, -math.inf).logsumexp(dim=1, keepdim=True)
    pairs = alike & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (torch.logaddexp(similar, unlike) - similar)[pairs].mean()
