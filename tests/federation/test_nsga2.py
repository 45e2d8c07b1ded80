from itertools import accumulate, combinations, product

import numpy as np
import pytest

from omnifm.federation import nsga2


def every_mask(allowed: nsga2.Masks, budget: list[int]) -> nsga2.Masks:
    """All masks that keep their budgets."""
    rows = []
    for own, size in zip(allowed, budget, strict=True):
        choices = combinations(np.flatnonzero(own), size)
        rows.append([np.isin(np.arange(len(own)), choice) for choice in choices])
    return np.array(list(product(*rows)))


def pareto(values: nsga2.Floats) -> set[tuple[float, float]]:
    """The points that no other dominates: a staircase."""
    points = sorted({(float(a), float(b)) for a, b in values})
    lowest = [float("inf"), *accumulate((variance for _, variance in points), min)]
    return {point for point, before in zip(points, lowest, strict=False) if point[1] < before}


PROBLEMS = [
    (3, 4, [2, 2, 2], np.ones((3, 4), bool)),
    (4, 5, [1, 2, 2, 1], np.ones((4, 5), bool)),
    (3, 5, [2, 1, 2], np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]], bool)),
    (4, 6, [2, 2, 2, 2], np.ones((4, 6), bool)),  # 50,625 masks; what is drawn and inherited is not enough
    (2, 3, [3, 1], np.array([[1, 1, 1], [0, 0, 1]], bool)),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("clients", "layers", "budget", "allowed"), PROBLEMS)
def test_it_finds_the_whole_front_of_a_problem_that_can_be_enumerated(
    clients: int, layers: int, budget: list[int], allowed: nsga2.Masks, seed: int
) -> None:
    scores = np.random.default_rng(seed).dirichlet(np.full(layers, 0.5), size=clients) * allowed
    masks, values = nsga2.search(scores, allowed, np.array(budget), np.random.default_rng(9))
    everything = nsga2.objectives(every_mask(allowed, budget), scores)
    assert {(float(a), float(b)) for a, b in values} == pareto(everything)
    assert len(masks) == len(pareto(everything)) and not (masks & ~allowed).any()
    assert (masks.sum(axis=2) == budget).all()


def test_objectives_are_what_they_say() -> None:
    masks = np.array([[[1, 1, 0], [1, 0, 1]]], bool)
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    # Counts 2, 1, 1: mean 4/3.
    assert nsga2.objectives(masks, scores)[0].tolist() == pytest.approx([-1.6, (4 / 9 + 1 / 9 + 1 / 9) / 3])


def test_ranks_peel_fronts_and_put_copies_last() -> None:
    values = np.array([[0, 3], [1, 1], [3, 0], [1, 1], [2, 2], [3, 3], [0, 4]], float)
    assert nsga2.ranks(values).tolist() == [0, 0, 0, 7, 1, 2, 1]


def test_crowding_is_the_size_of_the_box_between_neighbours() -> None:
    values = np.array([[4, 0], [0, 4], [1, 2], [3, 1]], float)
    found = nsga2.crowding(values, np.zeros(4, int))
    assert np.isinf(found[:2]).all() and found[2:].tolist() == pytest.approx([3 / 4 + 3 / 4, 3 / 4 + 2 / 4])
    assert nsga2.standing(values).tolist()[2:] == [2, 3]


def test_the_knee_is_furthest_below_the_line_between_the_ends() -> None:
    assert nsga2.knee(np.array([[-4, 8], [-3, 1], [-2, 0.5], [0, 0]], float)) == 1
    assert nsga2.knee(np.array([[0, 0], [-4, 8]], float)) == 1, "with two ends alone, the one with the larger score"
    assert nsga2.knee(np.array([[-4, 8]], float)) == 0


def test_the_best_of_rows_are_allowed_and_as_many_as_the_budget() -> None:
    keys = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
    allowed = np.array([[1, 1, 1], [0, 1, 1]], bool)
    assert nsga2.best_of_rows(keys, allowed, np.array([2, 1])).tolist() == [[True, False, True], [False, False, True]]


def test_equal_seeds_find_equal_masks_and_more_generations_do_no_harm() -> None:
    scores = np.random.default_rng(0).dirichlet(np.full(28, 0.3), size=8)
    allowed, budget = np.ones((8, 28), bool), np.full(8, 4)
    found = [nsga2.search(scores, allowed, budget, np.random.default_rng(1), generations=n) for n in (100, 100, 0)]
    assert (found[0][0] == found[1][0]).all() and (found[0][1] == found[1][1]).all()
    first = nsga2.best_of_rows(scores, allowed, budget)[None]
    assert found[0][1][:, 0].min() == nsga2.objectives(first, scores)[0, 0], "one end is what greed finds"
    early, late = found[2][1], found[0][1]
    # Every point of the random start is met or beaten.
    assert all(((late <= point).all(axis=1)).any() for point in early)
