"""What a client uploads: k-means centres of its spectral embeddings, never embeddings of single images (if n > k).

    min over centres v and assignment a:  sum_n || s_n - v_a(n) ||_2^2,   w_j = |{n : a(n) = j}|

s_n: the client's embeddings; v_j: prototypes, in the ball; w_j: how many images a prototype stands for. Lloyd's iteration from a
k-means++ start (D. Arthur, S. Vassilvitskii, SODA 2007), in float64 with the caller's generator: one seed, one answer.
"""

import torch
from torch import Tensor

from omnifm.errors import ConfigError
from omnifm.spectral.tokenizer import project_to_ball

_MAX_ITERATIONS = 50


def prototypes(
    s: Tensor, k: int, generator: torch.Generator, labels: Tensor | None = None, rho: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Summarise a client's embeddings by at most k prototypes.

    Args:
        s: (n, d_s), finite, n >= 1.
        k: prototypes wanted; fewer come back when there are fewer distinct embeddings.
        generator: a CPU generator from `omnifm.seeds`.
        labels: (n,) int64 classes. If given, every class gets its own prototypes, in proportion to its size and at least one.
        rho: radius of the ball.

    Returns:
        vectors (m, d_s) float32 with ||v|| <= rho, weights (m,) float32 summing to n; m <= k.

    Raises:
        ConfigError: k < 1, or there are more classes than prototypes.
        ValueError: s is empty or not finite.
    """
    if k < 1:
        raise ConfigError(f"prototypes: k must be at least 1, got {k}")
    if len(s) == 0 or not bool(torch.isfinite(s).all()):
        raise ValueError(f"prototypes need at least one embedding, all finite; got {tuple(s.shape)}")
    values = s.detach().double().cpu()
    if labels is None:
        centres, weights = _k_means(values, k, generator)
    else:
        classes, sizes = torch.unique(labels.cpu(), return_counts=True)
        shares = _shares(sizes.tolist(), k)
        groups = [values[labels.cpu() == label] for label in classes]
        found = [_k_means(group, share, generator) for group, share in zip(groups, shares, strict=True)]
        centres, weights = torch.cat([v for v, _ in found]), torch.cat([w for _, w in found])
    return project_to_ball(centres.float(), rho), weights.float()


def _shares(sizes: list[int], k: int) -> list[int]:
    """Divide k over classes: one each, the rest to whoever has most images per prototype so far (ties: the first class)."""
    if len(sizes) > k:
        raise ConfigError(f"prototypes: {len(sizes)} classes need at least as many prototypes per client, got k = {k}")
    shares = [1] * len(sizes)
    for _ in range(k - len(sizes)):
        load = [size / share for size, share in zip(sizes, shares, strict=True)]
        shares[load.index(max(load))] += 1
    return shares


def _k_means(values: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return centres (m, d) and sizes (m,) of the clusters that are not empty."""
    centres = _plus_plus(values, k, generator)
    assigned = torch.full((len(values),), -1)
    for _ in range(_MAX_ITERATIONS):
        nearest = torch.cdist(values, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        sizes = torch.bincount(assigned, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, assigned, values)
        # An empty cluster keeps its centre and may win members back; if not, it is left out below.
        centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), centres)
    sizes = torch.bincount(assigned, minlength=len(centres))
    return centres[sizes > 0], sizes[sizes > 0]


def _plus_plus(values: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw up to k distinct starting centres, each with probability proportional to its squared distance to those drawn."""
    first = int(torch.randint(len(values), (1,), generator=generator))
    chosen = [first]
    distance = (values - values[first]).square().sum(dim=1)
    while len(chosen) < k and bool(distance.max() > 0):
        # Searching the running sum by hand: torch.multinomial is limited to 2^24 categories and float probabilities.
        edge = torch.rand(1, generator=generator, dtype=torch.float64) * distance.sum()
        candidate = int(torch.searchsorted(distance.cumsum(0), edge, right=True).clamp_max(len(values) - 1))
        candidate = candidate if distance[candidate] > 0 else int(distance.argmax())
        chosen.append(candidate)
        distance = distance.minimum((values - values[candidate]).square().sum(dim=1))
    return values[chosen]
