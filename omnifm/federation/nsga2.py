"""NSGA-II over binary masks: which client trains which layers, if it may train so many of those it has.

    maximise  sum_il S_il M_il        minimise  Var_l( sum_i M_il )        with  sum_l M_il = budget_i,  M <= allowed

Deb, Pratap, Agarwal, Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Transactions on
Evolutionary Computation 6(2), 2002: ranks by domination, crowding distance, binary tournaments, parents and children compete.
Children take each row from one of two parents and exchange a chosen for another layer in 1 / N of their rows, so that every mask
keeps its budget. Of masks with equal objectives one is kept, as long as there are others.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]


def best_of_rows(keys: Floats, allowed: Masks, budget: NDArray[np.int64]) -> Masks:
    """Return masks that take, in each row `(..., L)`, the allowed entries with the largest keys."""
    order = np.argsort(-np.where(allowed, keys, -np.inf), axis=-1, kind="stable")
    place = np.argsort(order, axis=-1, kind="stable")
    chosen: Masks = (place < budget[:, None]) & allowed
    return chosen


def objectives(masks: Masks, scores: Floats) -> Floats:
    """Return `(P, 2)`, both to be minimised: minus the sum of the chosen scores, and the variance of the layers' counts."""
    total = np.einsum("pil,il->p", masks, scores)
    # Rounded, so that the order of a sum makes no mask better than its equal.
    return np.stack([-total, masks.sum(axis=1).var(axis=1)], axis=1).round(12)


def ranks(values: Floats) -> NDArray[np.int64]:
    """Return by point how many fronts are before its own; 0 is the Pareto front. Copies of a point come last of all."""
    one, other = values[:, None], values[None]
    better: Masks = np.asarray((one <= other).all(axis=2) & (one < other).any(axis=2))
    rank = np.full(len(values), len(values))
    left = np.zeros(len(values), dtype=bool)
    left[np.unique(values, axis=0, return_index=True)[1]] = True
    front = 0
    while left.any():
        now = left & ~better[left].any(axis=0)
        rank[now], front = front, front + 1
        left &= ~now
    return rank


def crowding(values: Floats, rank: NDArray[np.int64]) -> Floats:
    """Return by point the size of the box between its neighbours in its front; infinite at both ends."""
    distance = np.zeros(len(values))
    for front in np.unique(rank):
        own = np.flatnonzero(rank == front)
        for column in values[own].T:
            order = own[np.argsort(column, kind="stable")]
            sizes = np.sort(column)
            distance[order[[0, -1]]] = np.inf
            distance[order[1:-1]] += (sizes[2:] - sizes[:-2]) / max(sizes[-1] - sizes[0], 1e-12)
    return distance


def standing(values: Floats) -> NDArray[np.int64]:
    """Return the order of points from best to worst: by rank, then the loneliest first."""
    rank = ranks(values)
    return np.lexsort((-crowding(values, rank), rank))


def knee(values: Floats) -> int:
    """Return the point furthest below the line between the ends of a front; of equals, the one with the larger score."""
    span = np.maximum(values.max(axis=0) - values.min(axis=0), 1e-12)
    scaled = ((values - values.min(axis=0)) / span).sum(axis=1).round(9)
    return int(np.lexsort((values[:, 0], scaled))[0])


def search(
    scores: Floats,
    allowed: Masks,
    budget: NDArray[np.int64],
    generator: np.random.Generator,
    population: int = 64,
    generations: int = 100,
) -> tuple[Masks, Floats]:
    """Return the masks `(F, N, L)` of the front that was found, and their objectives `(F, 2)`.

    Args:
        scores: S `(N, L)`.
        allowed: `(N, L)`, what a client has.
        budget: `(N,)`, how many layers a client trains; at most what it has.
        generator: of all that is drawn.
        population: masks that are kept.
        generations: how often.
    """
    shape = (population, *scores.shape)
    masks = best_of_rows(generator.random(shape), allowed, budget)
    masks[0] = best_of_rows(scores, allowed, budget)  # one end of the front
    masks = masks[standing(objectives(masks, scores))]
    for _ in range(generations):
        # The better of two, twice: mother and father. Masks stand in order.
        mothers, fathers = generator.integers(population, size=(2, population, 2)).min(axis=2)
        take = generator.random((population, len(scores), 1)) < 0.5
        children = np.where(take, masks[mothers], masks[fathers])
        _exchange(children, allowed, generator)
        masks = np.concatenate([masks, children])
        masks = masks[standing(objectives(masks, scores))[:population]]
    values = objectives(masks, scores)
    front = ranks(values) == 0
    return masks[front], values[front]


def _exchange(masks: Masks, allowed: Masks, generator: np.random.Generator) -> None:
    """In 1 / N of the rows, on average, replace a chosen entry by one that is allowed and not chosen."""
    keys = generator.random(masks.shape)
    leaves = np.where(masks, keys, -1.0).argmax(axis=2)
    comes = np.where(allowed & ~masks, keys, -1.0).argmax(axis=2)
    free = masks.any(axis=2) & (allowed & ~masks).any(axis=2)
    p, i = np.nonzero(free & (generator.random(free.shape) < 1 / masks.shape[1]))
    masks[p, i, leaves[p, i]], masks[p, i, comes[p, i]] = False, True
