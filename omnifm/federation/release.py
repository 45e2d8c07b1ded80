"""What a client tells of its images' spectra, with noise of a budget of its own: sums by the Gaussian mechanism.

    Y_j = sum_{n: a(n) = j} clip(g_n, B) + N(0, (z B h)^2 I)          h = 1, or the number of the client's images

One image more or less changes one Y_j by at most B: with h = 1 the noise is z sensitivities (C. Dwork, A. Roth, "The algorithmic
foundations of differential privacy", 2014, Appendix A). With client-level privacy h is the number of images, and what is told the
mean Y / h: whatever a client's images are, it lies in a ball of B, so another client's is at most 2 B away and the noise z / 2 of
that. The number of images counts as known, as for the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnifm.config import PrivacyConfig
from omnifm.federation.noise import stream_key
from omnifm.privacy import crypto

# What float64 norms may be off by, so that a contribution is never longer than the bound.
_ROUNDING = 1e-12


@dataclass
class Passed:
    """What went through a release while one request was answered.

    Attributes:
        noises: of each release, the noise in sensitivities of one image.
        names: of the tensors that are made of noisy sums and of nothing else.
    """

    noises: list[float] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


class Release:
    """A client's noisy sums. Args: `privacy`: clip and noise; `seed`: of the run, used where the noise is to be repeatable."""

    def __init__(self, privacy: PrivacyConfig, seed: int) -> None:
        self._privacy, self._seed = privacy, seed
        self._passed = Passed()

    def watch(self) -> Passed:
        """Return what is filled from now on, until the next call, with what goes through here."""
        self._passed = Passed()
        return self._passed

    def told(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that are about to leave, noted as made of the noisy sums alone; others count as told without noise."""
        self._passed.names |= tensors.keys()
        return dict(tensors)

    @property
    def clip(self) -> float:
        """C, the longest spectrum of an image."""
        return self._privacy.prototype_clip

    @property
    def rounds(self) -> int:
        """Rounds in which a client sends prototypes."""
        return self._privacy.prototype_releases

    def deviation(self, bound: float, images: int) -> float:
        """Return the standard deviation of the noise on each number of the sums."""
        return self._privacy.prototype_noise * bound * (images if self._privacy.clip else 1)

    def sums(self, added: Tensor, place: Tensor, slots: int, bound: float, *purpose: str | int) -> Tensor:
        """Return noisy sums by slot, `(slots, d)` float64.

        Args:
            added: `(n, d)`, what each image adds; each line a function of its image alone.
            place: `(n,)` int64, the slot of each image, a function of the image alone too.
            slots: their number, which depends on no image.
            bound: B; longer lines are shortened to it.
            purpose: names the stream of the noise: what for, which round, whose.
        """
        values = added.double()
        norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        values = values * (bound / (norm * (1 + _ROUNDING)).clamp_min(bound))
        total = torch.zeros(slots, values.shape[1], dtype=torch.float64).index_add_(0, place, values)
        scale = self.deviation(bound, len(values))
        self._passed.noises.append(self._privacy.prototype_noise * (len(values) if self._privacy.clip else 1))
        if not scale:
            return total
        key = stream_key(self._privacy, self._seed, b"omnifm spectra noise 1", *purpose)
        return total + scale * torch.from_numpy(crypto.normals(key, total.numel())).view(total.shape)

    def mean(self, spectra: Tensor, *purpose: str | int) -> Tensor:
        """Return the noisy mean of `(n, d)` spectra, each shortened to the clip: `(d,)` float64."""
        return self.sums(spectra, torch.zeros(len(spectra), dtype=torch.int64), 1, self.clip, *purpose)[0] / len(spectra)
