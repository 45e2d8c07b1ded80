"""U2Fusion's loss (H. Xu et al., IEEE TPAMI 44 (2022) 502-518): be like both sources, more so like the one with more to see.

    g_i = mean_j mean_(k, h, w) (L * f_j(x_i))^2                   information of source i; f_j: five feature maps, L: Laplacian
    w   = softmax(g / c)                                              over the two sources, per picture; no gradient
    l   = mean over pictures of sum_i w_i [ (1 - SSIM(F, x_i)) + lam MSE(F, x_i) ]       lam = 20

f_j are VGG-16's maps before its five poolings, of the picture at 224 x 224; c is 3200 for two modalities. Without VGG's weights
they are the five levels of a Gaussian pyramid of grey levels: g is then the mean energy of five bands of detail.

Two terms that the paper has not, both off by default, pull towards what the eye takes for the fused picture where one source is
dark (as in L. Tang et al., PIAFusion, Information Fusion 83 (2022) 79-92):

    intensity = "maximum":   lam MSE(F, max(x_1, x_2))  in place of  lam sum_i w_i MSE(F, x_i)
    gradient = m > 0:        + m mean |d F - d*|,  d* = that d x_i of the two that is larger in size, for d in (d/dx, d/dy)

The elastic weight consolidation with which the paper learns one kind of pair after the other is not part of this: in a federation
the kinds are learned side by side.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, mse_loss, pad

Intensity = Literal["sources", "maximum"]
FeatureMaps = Callable[[Tensor], Sequence[Tensor]]

LEVELS = 5
_VGG_SIDE = 224
_BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)
_SSIM_TAPS, _SSIM_SIGMA = 11, 1.5


class FusionLoss:
    """The loss of fused pictures. It has no parameters of its own.

    Args:
        features: gives the maps f_j of grey pictures `(b, 1, h, w)` in [0, 1].
        c: scale on which differences of information count.
        lam: weight of the intensity term.
        intensity: which intensities F should have.
        gradient: weight m of the gradient term.
    """

    def __init__(self, features: FeatureMaps, c: float, lam: float, intensity: Intensity, gradient: float) -> None:
        self._features, self._c, self._lam, self._intensity, self._gradient = features, c, lam, intensity, gradient

    def __call__(self, fused: Tensor, sources: Tensor) -> Tensor:
        """Return the mean loss of F `(b, 1, h, w)` with its sources `(b, 2, h, w)`, all in [0, 1]; a scalar."""
        weights = self.weights(sources)
        pairs = [(weights[:, i], sources[:, i : i + 1]) for i in (0, 1)]
        loss = sum((w * (1 - similarity(fused, source)) for w, source in pairs), torch.zeros(()))
        if self._intensity == "sources":
            loss = loss + self._lam * sum((w * _mse(fused, source) for w, source in pairs), torch.zeros(()))
        else:
            loss = loss + self._lam * _mse(fused, sources.amax(dim=1, keepdim=True))
        total = loss.mean()
        return total + self._gradient * gradient_distance(fused, sources) if self._gradient else total

    @torch.no_grad()
    def weights(self, sources: Tensor) -> Tensor:
        """Return w `(b, 2)` of sources `(b, 2, h, w)`."""
        g = torch.stack([information(self._features(sources[:, i : i + 1])) for i in (0, 1)], dim=1)
        return (g / self._c).softmax(dim=1)


def information(maps: Sequence[Tensor]) -> Tensor:
    """Return g `(b,)`: the mean over maps of the mean squared Laplacian, at inner pixels.

    The Laplacian is a pixel's eight neighbours' mean minus itself. Maps are `(b, k, h, w)`.
    """
    return torch.stack([_laplacian(found).square().mean(dim=(1, 2, 3)) for found in maps]).mean(dim=0)


def _laplacian(found: Tensor) -> Tensor:
    around = avg_pool2d(found, 3, stride=1)
    centre = found[..., 1:-1, 1:-1]
    return (9 * around - centre) / 8 - centre


def gaussian_pyramid(grey: Tensor, levels: int = LEVELS) -> list[Tensor]:
    """Return `(b, 1, h, w)` in [0, 1] in grey levels 0..255, and `levels` - 1 times smoothed (1 4 6 4 1) / 16 and halved."""
    weights = torch.tensor(_BINOMIAL, dtype=grey.dtype, device=grey.device)
    window = torch.outer(weights, weights)[None, None] / weights.sum() ** 2
    found = [255 * grey]
    for _ in range(levels - 1):
        found.append(conv2d(pad(found[-1], (2, 2, 2, 2), mode="replicate"), window, stride=2))
    return found


def at_vgg_size(features: nn.Module) -> FeatureMaps:
    """Return `features` of pictures brought to 224 x 224 by nearest neighbour, as the paper's code does."""

    def maps(grey: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = features(interpolate(grey, size=(_VGG_SIDE, _VGG_SIDE), mode="nearest"))
        return found

    return maps


def similarity(fused: Tensor, source: Tensor) -> Tensor:
    """Return SSIM `(b,)` of `(b, 1, h, w)`, range 1 (C = .01^2, .03^2): Gaussian 11 x 11, sigma 1.5, inside the picture."""
    place = torch.arange(_SSIM_TAPS, dtype=fused.dtype, device=fused.device) - _SSIM_TAPS // 2
    window = (-(place**2) / (2 * _SSIM_SIGMA**2)).exp()
    window = window / window.sum()
    fields = torch.cat([fused, source, fused * fused, source * source, fused * source], dim=1)
    across = window.view(1, 1, 1, -1).expand(5, -1, -1, -1)
    mean = conv2d(conv2d(fields, across, groups=5), across.transpose(2, 3), groups=5)
    m_f, m_s, ff, ss, fs = mean.unbind(dim=1)
    s_f, s_s, s_fs = ff - m_f * m_f, ss - m_s * m_s, fs - m_f * m_s
    value = (2 * m_f * m_s + 1e-4) * (2 * s_fs + 9e-4) / ((m_f**2 + m_s**2 + 1e-4) * (s_f + s_s + 9e-4))
    return value.mean(dim=(1, 2))


def gradient_distance(fused: Tensor, sources: Tensor) -> Tensor:
    """Return the mean distance of F's differences between neighbours from the stronger of the sources', sign and all."""
    total = torch.zeros((), device=fused.device)
    for axis in (2, 3):
        wanted = sources.diff(dim=axis)
        strongest = wanted.gather(1, wanted.abs().argmax(dim=1, keepdim=True))
        total = total + (fused.diff(dim=axis) - strongest).abs().mean()
    return total / 2


def _mse(fused: Tensor, source: Tensor) -> Tensor:
    return mse_loss(fused, source, reduction="none").mean(dim=(1, 2, 3))
