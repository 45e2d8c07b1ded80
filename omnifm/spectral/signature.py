"""Spectral neighbourhoods: who should learn from whom, read off the raw spectra without labels.

    u_i = mean over client i's images of P(x)              P: standardised low-pass log amplitude, `fft.py`
    C_ij = cos(u_i - u, u_j - u),  u = mean_i u_i          neighbourhoods: average linkage on 1 - C

u_i: the signature of client i; u: the federation's mean, which all images share (the 1/f envelope) and which hides the rest.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from omnifm.errors import DataError
from omnifm.spectral.fft import low_pass_amplitude

_BATCH = 256


def client_signature(images: Tensor | Iterable[Tensor], band: int = 16) -> Tensor:
    """Return the mean low-pass spectrum of a client's training images, as a running sum over batches.

    Args:
        images: (n, c, h, w), or batches of it; sizes may differ between batches.
        band: frequencies kept on each side.

    Returns:
        (2 * band * band,) float32.

    Raises:
        DataError: there is no image, the band does not fit, or the mean is not finite.
    """
    batches = torch.split(images, _BATCH) if isinstance(images, Tensor) else images
    total = torch.zeros(2 * band * band, dtype=torch.float64)
    num_images = 0
    with torch.no_grad():
        for batch in batches:
            total += low_pass_amplitude(batch, band).double().sum(dim=0).flatten().cpu()
            num_images += len(batch)
    if num_images == 0:
        raise DataError("a client's spectral signature needs at least one training image")
    if not bool(torch.isfinite(total).all()):
        raise DataError("a client's spectral signature is not finite: a training image holds NaN or infinity")
    return (total / num_images).float()


def cosine_table(signatures: Tensor) -> Tensor:
    """Return the cosine between clients after the federation's mean is removed.

    Args:
        signatures: (n, d).

    Returns:
        (n, n) float32, symmetric, 1 on the diagonal; a client that equals the mean has cosine 0 with all others.
    """
    values = signatures.double()
    unit = normalize(values - values.mean(dim=0), dim=1)
    table = (unit @ unit.T).clamp(-1.0, 1.0)
    table = (table + table.T) / 2
    return table.fill_diagonal_(1.0).float()


def cluster(signatures: Tensor, max_clusters: int, threshold: float = 0.6) -> Tensor:
    """Group clients by average-linkage agglomeration of 1 - cosine.

    Clusters merge while their mean cosine is at least `threshold`, and further while there are more than `max_clusters`. The
    default lies between what was seen within (.84 to .99) and across modalities (at most .53).

    Args:
        signatures: (n, d).
        max_clusters: at least 1.
        threshold: cosine in [-1, 1].

    Returns:
        (n,) int64 cluster of each client, numbered by first member; the order of the clients changes only the numbering.

    Raises:
        ValueError: `max_clusters` < 1.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if max_clusters < 1:
        raise ValueError(f"max_clusters must be at least 1, got {max_clusters}")
    if len(signatures) < 2:
        return torch.zeros(len(signatures), dtype=torch.int64)
    # Ties between distances fall by position, so positions must not depend on the caller's order: sort the clients first.
    order = np.lexsort(signatures.double().numpy().T)
    distance = 1.0 - cosine_table(signatures[torch.from_numpy(order)]).double().numpy()
    tree = linkage(squareform(distance, checks=False), method="average")
    labels = fcluster(tree, t=1.0 - threshold, criterion="distance")
    if labels.max() > max_clusters:
        labels = fcluster(tree, t=max_clusters, criterion="maxclust")
    found = np.empty(len(order), dtype=np.int64)
    found[order] = labels
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(int(label), len(numbers)) for label in found])
