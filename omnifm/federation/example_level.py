"""Example-level differential privacy in the local loop: DP-SGD, with gradients by example from Opacus (extra `privacy`).

    B ~ each example with probability q      g <- (sum_{x in B} g_x min(1, C / || g_x ||_2) + N(0, (z C)^2 I)) / (q n)

Abadi et al., "Deep learning with differential privacy", CCS 2016, Algorithm 1; n: the client's training examples, q = min(1,
batch size / n). Norms are over all weights that train, those that stay at the client too; a gradient that is not finite counts
as 0. A step may draw no example at all; it then is noise alone. Opacus keeps the gradient of every example of a batch: a batch
costs as many models of memory as it has examples. Draws and noise are the system's (`privacy.noise`), not Opacus's, whose own
are not meant to be secret.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from omnifm import seeds
from omnifm.config import PrivacyConfig
from omnifm.errors import ConfigError
from omnifm.federation.noise import stream_key
from omnifm.federation.state import LocalJob
from omnifm.privacy import crypto
from omnifm.privacy.accounting import stated

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardswish, nn.Dropout, nn.Dropout2d, nn.Dropout3d)
# What float64 norms of float32 gradients may be off by.
_ROUNDING = 1e-6
_LEAST = 1e-20
"""Smallest clip: beyond it noise and gradients come near what float32 rounds to nothing."""


class ExampleLevel:
    """Gradients of one model, made private.

    Args:
        model: it has hooks within `recording` alone.
        privacy: `example_clip` C and `example_noise` z.
        seed: of the run, used where the noise is to be repeatable.
        batch_size: expected size of a batch.

    Raises:
        ConfigError: the clip is too small, the extra is missing, or a layer has no gradient by example (BatchNorm mixes them).
    """

    def __init__(self, model: nn.Module, privacy: PrivacyConfig, seed: int, batch_size: int) -> None:
        if privacy.example_clip < _LEAST:
            raise ConfigError(
                f"privacy.example_clip = {privacy.example_clip:g}: at least {_LEAST:g}, or float32 rounds the noise off"
            )
        self._privacy, self._seed, self._batch_size = privacy, seed, batch_size
        self._model = model
        self._weights = [p for p in model.parameters() if p.requires_grad]
        for module in model.modules():
            if isinstance(module, _ACTIVATIONS):
                module.inplace = False  # the same numbers; a hook's input must not be written over
        self._samples = _with_hooks(model)
        self._samples.remove_hooks()
        self._forget()

    def rate(self, count: int) -> float:
        """Return q for a client of `count` examples."""
        return min(1.0, self._batch_size / count)

    def draw(self, job: LocalJob, step: int) -> Tensor:
        """Return the examples of a step: (k,) int64, k may be 0."""
        count = len(job.data.train)
        return torch.from_numpy(crypto.uniforms(self._key(job, "draw", step), count) < self.rate(count)).nonzero()[:, 0]

    def changes(self, job: LocalJob, step: int) -> torch.Generator:
        """Return what draws a step's random changes of images, known to nobody where the noise is not.

        Were it known, one image less would be other changes of all that come after it, and a step would tell of more than one
        example's clipped gradient.
        """
        return seeds.generator(int.from_bytes(self._key(job, "changes", step), "big"), "private batches")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the gradients of each example in a block."""
        self._samples.add_hooks(loss_reduction="mean")
        places = self._copy_outputs()
        try:
            with warnings.catch_warnings():
                # The first layer's input is an image, which needs no gradient; Opacus reads what comes from behind.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                yield
        finally:
            for parent, name, module in places:
                parent._modules[name] = module
            self._samples.remove_hooks()
            self._forget()

    def _copy_outputs(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """Let no layer with a hook hand on the very tensor its hook holds; return where the layers were.

        Residual networks add to a layer's output in place, which torch forbids on the output of a layer with a hook.
        """
        hooked = set(self._samples.iterate_submodules(self._model))
        places = [
            (parent, name, child)
            for parent in self._model.modules()
            for name, child in parent.named_children()
            if child in hooked
        ]
        for parent, name, child in places:
            parent._modules[name] = _Copied(child)
        return places

    def privatise(self, job: LocalJob) -> None:
        """Put the private gradient in the place of the one that backward left; after a draw of nothing too."""
        bound, expected = self._privacy.example_clip, self.rate(len(job.data.train)) * len(job.data.train)
        seen = [p for p in self._weights if getattr(p, "grad_sample", None) is not None]
        factor: Tensor | None = None
        if seen:
            norms = [torch.linalg.vector_norm(_of(p).flatten(1), dim=1, dtype=torch.float64) for p in seen]
            norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
            factor = _kept(bound / (norm * (1 + _ROUNDING)).clamp_min(bound))
        noise = self._noise(job)
        for place, p in enumerate(self._weights):
            total = noise[place].to(p.device)
            if factor is not None and getattr(p, "grad_sample", None) is not None:
                total = total + torch.einsum("b...,b->...", _of(p, left_out=factor == 0), factor)
            p.grad = (total / expected).to(p.dtype)
        self._forget()

    def _noise(self, job: LocalJob) -> list[Tensor]:
        sizes = [p.numel() for p in self._weights]
        scale = self._privacy.example_noise * self._privacy.example_clip
        if not scale:
            return [torch.zeros(p.shape) for p in self._weights]
        draws = torch.from_numpy(crypto.normals(self._key(job, "noise", job.steps), sum(sizes))) * scale
        return [part.view(p.shape).float() for part, p in zip(draws.split(sizes), self._weights, strict=True)]

    def _key(self, job: LocalJob, purpose: str, step: int) -> bytes:
        stream = (purpose, job.round, job.client, job.phase, step)
        return stream_key(self._privacy, self._seed, b"omnifm example noise 1", *stream)

    def _forget(self) -> None:
        """Drop what Opacus holds. Where no loss reaches a layer it would keep its inputs, and later count its passes wrong."""
        for module in self._model.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)
        for p in self._weights:
            p.grad_sample = None  # type: ignore[attr-defined]  # Opacus's
            p.__dict__.pop("_current_grad_sample", None)
            p._forward_counter = 0  # type: ignore[attr-defined]


class _Copied(nn.Module):
    """A layer whose output is a copy."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        copied: Tensor = self.layer(*inputs).clone()
        return copied


def _kept(share: Tensor) -> Tensor:
    """Return which share of each gradient is kept, float32; nothing of one that overflows, or that float32 cannot shorten so far.

    Weights can be made so that one image's gradient alone overflows. 0 times infinity is no number, and would tell of that image.
    """
    small = share.new_tensor(torch.finfo(torch.float32).tiny)
    return torch.where(share >= small, share, 0.0).float()  # C / inf is 0, and no comparison with NaN holds


def _of(p: nn.Parameter, left_out: Tensor | None = None) -> Tensor:
    """Return the gradients by example, (b, *shape), 0 for those left out; a layer used twice has two, which add up."""
    given: Tensor | list[Tensor] = p.grad_sample  # type: ignore[attr-defined]
    found = torch.stack(given).sum(dim=0) if isinstance(given, list) else given
    if left_out is None or not bool(left_out.any()):
        return found
    return found.masked_fill(left_out.view(-1, *[1] * (found.ndim - 1)), 0.0)


def _with_hooks(model: nn.Module) -> Any:
    try:
        from opacus.grad_sample import GradSampleModule
    except ModuleNotFoundError:
        raise ConfigError("privacy.example_clip needs the extra: pip install 'omnifm[privacy]'") from None
    if errors := GradSampleModule.validate(model, strict=False):
        first = " ".join(str(errors[0]).split())
        raise ConfigError(
            f"privacy.example_clip: the model has no gradients by example ({first[:160]}); set model.norm = 'group'"
        )
    return GradSampleModule(model, loss_reduction="mean", strict=True)


def record(privacy: PrivacyConfig, epsilons: Mapping[str, float]) -> dict[str, Any]:
    """Return what `metrics.json` says: the client with the largest epsilon speaks for all."""
    worst = max(epsilons, key=lambda client: epsilons[client])
    return {
        "epsilon": stated(epsilons[worst]),
        "client": worst,
        "delta": privacy.delta,
        "clip": privacy.example_clip,
        "noise_multiplier": privacy.example_noise,
        "noise": privacy.noise,
        "neighbours": "add or remove one training example of one client",
    }
