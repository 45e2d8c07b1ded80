from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm import seeds
from omnifm.errors import ConfigError
from omnifm.spectral.prototypes import prototypes
from tests.spectral.examples import ball


def generator(seed: int = 0) -> torch.Generator:
    return seeds.generator(seed, "prototypes")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 1000))
def test_at_most_k_in_the_ball_and_every_sample_counted(n: int, k: int, seed: int) -> None:
    vectors, weights = prototypes(ball(n, 6, seed), k, generator(seed))
    assert len(vectors) == len(weights) == min(n, k)
    assert bool((vectors.norm(dim=1) <= 1 + 1e-6).all())
    assert float(weights.sum()) == n and bool((weights >= 1).all())
    # The weighted mean of cluster means is the mean of the data, whatever the clusters.
    torch.testing.assert_close((weights[:, None] * vectors).sum(dim=0) / n, ball(n, 6, seed).mean(dim=0), atol=1e-5, rtol=0)


def test_well_separated_clusters_are_found_exactly() -> None:
    centres = torch.eye(4) * 0.8
    noise = 0.01 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    s = centres.repeat(10, 1) + noise
    vectors, weights = prototypes(s, 4, generator())
    order = vectors.argmax(dim=1).argsort()
    assert weights.tolist() == [10.0] * 4
    torch.testing.assert_close(vectors[order], torch.stack([s[i::4].mean(dim=0) for i in range(4)]))


def test_never_worse_than_twice_the_best_clustering_of_a_small_set() -> None:
    s = ball(8, 2, 3)

    def cost(labels: list[int]) -> float:
        t = torch.tensor(labels)
        return sum(float((s[t == c] - s[t == c].mean(dim=0)).square().sum()) for c in set(labels))

    best = min(cost(list(labels)) for labels in product(range(2), repeat=8))
    vectors, _ = prototypes(s, 2, generator())
    assert float(torch.cdist(s, vectors).min(dim=1).values.square().sum()) <= 2 * best + 1e-6


def test_fewer_samples_than_k_are_their_own_prototypes() -> None:
    s = ball(3, 5)
    vectors, weights = prototypes(s, 16, generator())
    torch.testing.assert_close(vectors[vectors[:, 0].argsort()], s[s[:, 0].argsort()])
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_equal_samples_give_one_prototype() -> None:
    vectors, weights = prototypes(ball(1, 5).expand(9, 5), 4, generator())
    assert weights.tolist() == [9.0]
    torch.testing.assert_close(vectors, ball(1, 5))


def test_a_cluster_that_lloyd_empties_is_left_out() -> None:
    # One of 3000 random sets on a line in which a centre loses all its samples on the way.
    g = seeds.generator(1744, "x")
    s = torch.randint(-3, 4, (14, 1), generator=g) + 0.01 * torch.randint(0, 5, (14, 1), generator=g).double()
    vectors, weights = prototypes(s, 6, seeds.generator(1744, "k"), rho=10.0)
    assert len(vectors) == 5 and bool((weights >= 1).all()) and float(weights.sum()) == 14


def test_one_seed_one_answer() -> None:
    s = ball(50, 6)
    first, again, other = (prototypes(s, 5, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_per_class_never_mixes_classes_and_shares_by_size() -> None:
    labels = torch.tensor([3] * 30 + [8] * 9 + [1])
    s = 0.5 * torch.eye(3)[torch.tensor([0] * 30 + [1] * 9 + [2])] + 0.01 * ball(40, 3)
    vectors, weights = prototypes(s, 6, generator(), labels)
    assert vectors.argmax(dim=1).tolist() == [2, 0, 0, 0, 1, 1] or vectors.argmax(dim=1).tolist() == [2, 0, 0, 0, 0, 1]
    owner = vectors.argmax(dim=1)
    assert [float(weights[owner == i].sum()) for i in range(3)] == [30.0, 9.0, 1.0]


def test_embeddings_outside_the_ball_give_prototypes_inside() -> None:
    vectors, _ = prototypes(5 * ball(10, 4), 3, generator(), rho=0.5)
    assert float(vectors.norm(dim=1).max()) <= 0.5 + 1e-6


def test_impossible_requests_are_errors() -> None:
    with pytest.raises(ConfigError, match="3 classes need at least as many"):
        prototypes(ball(6, 4), 2, generator(), torch.tensor([0, 1, 2, 0, 1, 2]))
    with pytest.raises(ConfigError, match="at least 1"):
        prototypes(ball(6, 4), 0, generator())
    with pytest.raises(ValueError, match="at least one embedding"):
        prototypes(torch.empty(0, 4), 2, generator())
    with pytest.raises(ValueError, match="all finite"):
        prototypes(torch.full((2, 4), float("inf")), 2, generator())
