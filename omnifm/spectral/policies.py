"""Which rows stay when the bank is over its capacity M: six rules, each a pure function of the rows.

    f_i = n_i / mean_j n_j                        relative retrieval frequency; the paper drops f_i < delta
    floor = M // (2 * modalities)                 rows that `quota` keeps of every modality that has them
    next center = argmax_i min_{j in chosen} ||v_i - v_j||      greedy k-center of `coreset`
    v <- (1 - a) v_old + a v_new                  `ema`, on the client's nearest old row

n_i: retrievals of row i, aged by the bank under `lfu_aging` and `quota`. Every rule breaks ties by arrival (`row_id`), the later
row first, and returns positions in ascending order, so rows stay in the order of their ids.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from omnifm.spectral.rows import BankRows

PolicyName = Literal["fifo", "lfu", "lfu_aging", "quota", "coreset", "ema"]


@dataclass(frozen=True)
class Limits:
    """What the policies may read besides the rows.

    Attributes:
        capacity: rows the bank may hold.
        modalities: number of modalities.
        young_rounds: a row of this many rounds or more is no longer young.
        delta: relative retrieval frequency below which the paper's rule drops a row, in [0, 1].
    """

    capacity: int
    modalities: int
    young_rounds: int
    delta: float


Policy = Callable[[BankRows, Limits, int], Tensor]


def fifo(rows: BankRows, limits: Limits, round_index: int) -> Tensor:
    """Keep the latest rows."""
    keys = zip(rows.round.tolist(), rows.row_id.tolist(), strict=True)
    return _first(_ranked(list(keys)), limits.capacity)


def lfu(rows: BankRows, limits: Limits, round_index: int) -> Tensor:
    """Keep the most retrieved rows, after dropping those whose relative frequency is under delta (the paper's rule).

    A row uploaded in this very round has not been offered to anybody yet and is not judged by delta.
    """
    offered = rows.round < round_index
    mean_count = rows.count[offered].mean() if bool(offered.any()) else torch.zeros(())
    rare = offered & (rows.count < limits.delta * mean_count)
    order = [i for i in _by_count(rows) if not rare[i]]
    return _first(order, limits.capacity)


def quota(rows: BankRows, limits: Limits, round_index: int) -> Tensor:
    """Keep a floor of rows per modality, then young rows while they fit, then the most retrieved.

    Within a modality the floor is filled in the same order: young first, then by count.
    """
    young = (round_index - rows.round < limits.young_rounds).tolist()
    order = sorted(_by_count(rows), key=lambda i: not young[i])
    modality = rows.modality.tolist()
    left = [limits.capacity // (2 * limits.modalities)] * limits.modalities
    floor: list[int] = []
    rest: list[int] = []
    for i in order:
        (floor if left[modality[i]] > 0 else rest).append(i)
        left[modality[i]] -= 1
    return _first(floor + rest, limits.capacity)


def coreset(rows: BankRows, limits: Limits, round_index: int) -> Tensor:
    """Keep a greedy k-center cover, from the row that stands for most samples (ties: the earlier row).

    Source: T. Gonzalez, "Clustering to minimize the maximum intercluster distance", TCS 1985 (within twice the optimal radius).
    """
    if len(rows) <= limits.capacity:
        return torch.arange(len(rows))
    vectors = rows.vectors.double()
    chosen = [int(rows.weight.argmax())]
    distance = torch.linalg.vector_norm(vectors - vectors[chosen[0]], dim=1)
    distance[chosen[0]] = -1.0
    while len(chosen) < limits.capacity:
        chosen.append(int(distance.argmax()))
        distance = distance.minimum(torch.linalg.vector_norm(vectors - vectors[chosen[-1]], dim=1))
        # Chosen rows get -1, so that exact duplicates (distance 0) can still fill the capacity, each once.
        distance[chosen] = -1.0
    return torch.tensor(sorted(chosen))


POLICIES: dict[PolicyName, Policy] = {
    "fifo": fifo,
    "lfu": lfu,
    "lfu_aging": lfu,
    "quota": quota,
    "coreset": coreset,
    # `ema` bounds rows per client when they arrive (`merge`); over capacity, the longest not renewed go.
    "ema": fifo,
}
AGEING_POLICIES: frozenset[PolicyName] = frozenset({"lfu_aging", "quota"})


def merge(rows: BankRows, new: BankRows, per_client: int, alpha: float) -> BankRows:
    """Merge one client's new rows into its nearest old ones by exponential moving average.

    Until the client has `per_client` rows of the modality, new rows are appended. A merged row keeps its id and count, takes
    the new round, and averages its weight like its vector. The ball is convex, so a merged row stays inside it.

    Args:
        rows: m rows of all clients.
        new: rows of one client and modality.
        per_client: rows a client may hold per modality.
        alpha: weight of the new row, in (0, 1].
    """
    for i in range(len(new)):
        row = new.select(torch.tensor([i]))
        own = ((rows.client == row.client) & (rows.modality == row.modality)).nonzero().flatten()
        if len(own) < per_client:
            rows = rows.append(row)
            continue
        nearest = own[torch.linalg.vector_norm(rows.vectors[own] - row.vectors, dim=1).argmin()]
        at = torch.arange(len(rows)) == nearest
        rows = replace(
            rows,
            vectors=torch.where(at[:, None], torch.lerp(rows.vectors, row.vectors, alpha), rows.vectors),
            weight=torch.where(at, torch.lerp(rows.weight, row.weight, alpha), rows.weight),
            round=torch.where(at, row.round, rows.round),
        )
    return rows


def _ranked(keys: list[tuple[float, ...]]) -> list[int]:
    """Return positions from the largest key to the smallest."""
    return sorted(range(len(keys)), key=keys.__getitem__, reverse=True)


def _by_count(rows: BankRows) -> list[int]:
    """Return positions from the most to the least retrieved; ties: the later round, then the later row."""
    return _ranked(list(zip(rows.count.tolist(), rows.round.tolist(), rows.row_id.tolist(), strict=True)))


def _first(order: list[int], capacity: int) -> Tensor:
    return torch.tensor(sorted(order[:capacity]), dtype=torch.int64)
