"""One Lloyd step of k-means whose sums may carry noise: prototypes whose sensitivity to one image is known.

    a(n) = argmin_j || s_n - c_j ||        y_j = sum_{n: a(n) = j} (clip(s_n, C), C / 2)        v_j = Pi(y_j[:d] / m_j)

c_j: centres that depend on no image of this step; clip(s, C) = s min(1, C / ||s||); m_j = 2 y_j[d] / C: images of centre j; Pi:
projection onto the ball of rho. One image, more or less, changes one y_j, by at most C sqrt(5) / 2. What is made of y costs
nothing more. A. Blum, C. Dwork, F. McSherry, K. Nissim, "Practical privacy: the SuLQ framework", PODS 2005; D. Su, J. Cao, N. Li,
E. Bertino, H. Jin, "Differentially private k-means clustering", CODASPY 2016 (DPLloyd; there with Laplace's noise). The half
gives the counts a fifth of the squared norm.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from omnifm.spectral.tokenizer import project_to_ball

_HALF = 0.5
_LEAST_DEVIATIONS = 2.0
"""A centre counts if so many standard deviations of its count's noise are below its count."""


class Step(NamedTuple):
    """What a step makes of noisy sums.

    Attributes:
        vectors: `(m, d)` float32, in the ball, 1 <= m <= k.
        weight: `(m,)` float32, images of each, at least 1.
        centres: `(k, d)` float32, for the next step; those without images stay where they were.
    """

    vectors: Tensor
    weight: Tensor
    centres: Tensor


def first_centres(k: int, dim: int, rho: float, generator: torch.Generator) -> Tensor:
    """Return `(k, d)` random points of the sphere, which depend on nobody's images."""
    return (rho * normalize(torch.randn(k, dim, generator=generator, dtype=torch.float64), dim=1)).float()


def bound(clip: float) -> float:
    """Return the largest norm of what one image adds."""
    return clip * math.sqrt(1 + _HALF**2)


def contributions(s: Tensor, centres: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return what each image adds, `(n, d + 1)` float64, and to which centre, `(n,)` int64.

    Each line depends on its own image alone: distances are taken line by line, so that no other image moves a rounding.

    Args:
        s: `(n, d)`.
        centres: `(k, d)`.
        clip: C.
    """
    values = s.double()
    distance = (values[:, None] - centres.double()).square().sum(dim=2)
    added = torch.cat([project_to_ball(values, clip), torch.full((len(s), 1), _HALF * clip, dtype=torch.float64)], dim=1)
    return added, distance.argmin(dim=1)


def step(sums: Tensor, centres: Tensor, clip: float, deviation: float, rho: float) -> Step:
    """Return the rows that noisy sums stand for. At least one: that of the largest count.

    Args:
        sums: y with noise, `(k, d + 1)`.
        centres: those that images were assigned to.
        clip: C.
        deviation: of the noise on each number of y.
        rho: radius of the ball.
    """
    scale = _HALF * clip
    count = sums[:, -1] / scale
    kept = count >= max(1.0, _LEAST_DEVIATIONS * deviation / scale)
    kept[count.argmax()] = True
    weight = count.clamp_min(1.0)
    rows = project_to_ball(sums[:, :-1] / weight[:, None], rho).float()
    return Step(rows[kept], weight[kept].float(), torch.where(kept[:, None], rows, centres.float()))
