"""Global spectral knowledge retrieval: the k rows of the bank that are most like an image.

    S_g(s) = the k rows v_i of K with the largest cos(s, v_i) = <s, v_i> / (||s|| ||v_i||)

s: (b, d_s) spectral embeddings; K: the rows of other clients. Equal cosines go to the lower `row_id`. No gradient passes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from omnifm.spectral.rows import BankRows


@dataclass(frozen=True)
class Retrieved:
    """What a batch of queries found.

    Attributes:
        vectors: (b, k, d_s) float32, most similar first, without gradient.
        index: (b, k) int64, positions in the rows that were searched.
    """

    vectors: Tensor
    index: Tensor


def retrieve(s: Tensor, rows: BankRows, k: int) -> Retrieved:
    """Return each query's `k` most similar rows; all m rows, sorted, where k > m.

    Args:
        s: (b, d_s) queries.
        rows: m >= 1 rows in the order of `row_id`, so that a stable sort gives equal cosines to the lower one.
        k: how many rows, at least 1.

    Raises:
        ValueError: there is no row, or k < 1.
    """
    if len(rows) == 0 or k < 1:
        raise ValueError(f"retrieval needs at least one row and k >= 1, got {len(rows)} rows and k = {k}")
    with torch.no_grad(), torch.autocast(device_type=s.device.type, enabled=False):
        cosine = normalize(s.float(), dim=-1) @ normalize(rows.vectors, dim=-1).T
        index = cosine.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        return Retrieved(rows.vectors[index], index)


def retrieval_counts(index: Tensor, rows: BankRows) -> tuple[Tensor, Tensor]:
    """Return how often each row was retrieved, as a client reports it: per-row integers, never queries.

    Args:
        index: (..., k) int64 positions in `rows`, of one or more batches.
        rows: the rows that were searched.

    Returns:
        row ids (m,) int64 and counts (m,) int64, zeros included.
    """
    return rows.row_id, torch.bincount(index.flatten(), minlength=len(rows))
