"""Spectral alignment: pull an image's spectral embedding to what was retrieved for it, and watch for collapse.

    L_align = mean_b || s_b - (1/k) sum_j S_g[b, j] ||_2^2                        (the paper's Eq. 5)
    L_floor = mean_i max(0, floor - std_b(s_bi))                                  optional
    erank(s) = exp( - sum_i p_i log p_i ),  p_i = sigma_i / sum_j sigma_j         of the centred s
    spread(s) = mean_i || s_i - mean s ||^2 / rho^2

s: (b, d_s) embeddings; S_g: (b, k, d_s) retrieved prototypes, constants; sigma_i: singular values. Alignment alone is solved
by a constant s, so rank and spread are logged and the floor can be switched on. The rank does not know the scale: embeddings
that shrink towards one point keep it, and the spread tells.
"""

import torch
from torch import Tensor

_EPS = 1e-8


def spectral_alignment(s: Tensor, retrieved: Tensor) -> Tensor:
    """Return the mean squared distance between s and the centroid of its retrieved prototypes.

    Args:
        s: (b, d_s).
        retrieved: S_g, (b, k, d_s); no gradient passes into it.

    Returns:
        A float32 scalar.
    """
    target = retrieved.detach().float().mean(dim=1)
    return (s.float() - target).square().sum(dim=-1).mean()


def variance_floor(s: Tensor, floor: float) -> Tensor:
    """Return the hinge that keeps each dimension's standard deviation over the batch at `floor` or above.

    With ||s|| <= rho the mean squared deviation over dimensions is at most rho^2 / d_s, so a floor above rho / sqrt(d_s) cannot
    be met. A batch of one has no spread to speak of and gives 0.

    Source: A. Bardes, J. Ponce, Y. LeCun, "VICReg", ICLR 2022 (its variance term).

    Args:
        s: (b, d_s).
        floor: standard deviation asked for.

    Returns:
        A float32 scalar.
    """
    if len(s) < 2:
        return torch.zeros((), device=s.device)
    deviation = (s.float().var(dim=0) + _EPS).sqrt()
    return (floor - deviation).clamp_min(0.0).mean()


def effective_rank(s: Tensor) -> float:
    """Return the effective rank of the centred embeddings: 0 if all are equal, at most min(n - 1, d_s).

    Source: O. Roy, M. Vetterli, "The effective rank", EUSIPCO 2007.

    Args:
        s: (n, d_s), n >= 1.
    """
    values = s.detach().double()
    scale = float(values.abs().max())
    singular = torch.linalg.svdvals(values - values.mean(dim=0))
    total = float(singular.sum())
    # What rounding leaves of equal rows is not a spread.
    if total <= _EPS * scale:
        return 0.0
    return float(torch.special.entr(singular / total).sum().exp())


def spread(s: Tensor, rho: float) -> float:
    """Return how far the embeddings lie from their mean, squared, in units of the ball's radius: 0 if all are equal, at most 1.

    Args:
        s: (n, d_s), n >= 1, in the ball.
        rho: its radius.
    """
    values = s.detach().double()
    return float((values - values.mean(dim=0)).square().sum(dim=1).mean()) / rho**2
