"""The noisy Lloyd step: what one image can change, by brute force, and what is made of sums."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnifm import seeds
from omnifm.spectral.lloyd import bound, contributions, first_centres, step
from tests.spectral.examples import ball

DIM = 5


def sums(s: Tensor, centres: Tensor, clip: float) -> Tensor:
    """Return y by a loop in plain Python, image by image."""
    total = [[0.0] * (DIM + 1) for _ in centres]
    for line in s.tolist():
        distance = [sum((a - b) ** 2 for a, b in zip(line, centre, strict=True)) for centre in centres.tolist()]
        norm = math.sqrt(sum(a * a for a in line))
        factor = min(1.0, clip / norm) if norm else 1.0
        place = distance.index(min(distance))
        for i, value in enumerate([*(a * factor for a in line), clip / 2]):
            total[place][i] += value
    return torch.tensor(total, dtype=torch.float64)


def by_step(s: Tensor, centres: Tensor, clip: float) -> Tensor:
    added, place = contributions(s, centres, clip)
    return torch.zeros(len(centres), DIM + 1, dtype=torch.float64).index_add_(0, place, added)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.floats(0.05, 4.0), st.floats(0.1, 30.0), st.integers(0, 10**6))
def test_no_image_changes_the_sums_by_more_than_the_bound(n: int, k: int, clip: float, scale: float, seed: int) -> None:
    s, centres = scale * ball(n, DIM, seed), first_centres(k, DIM, 1.0, seeds.generator(seed, "centres"))
    whole = by_step(s, centres, clip)
    torch.testing.assert_close(whole, sums(s, centres, clip), atol=1e-9, rtol=1e-9)
    for gone in range(n):
        kept = torch.arange(n) != gone
        moved = float((whole - by_step(s[kept], centres, clip)).norm())
        assert moved <= bound(clip) * (1 + 1e-9)
        # The bound is met by every image that is at least as long as the clip: it is not too large either.
        if float(s[gone].norm()) >= clip:
            assert moved >= bound(clip) * (1 - 1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10), st.integers(0, 10**6))
def test_what_an_image_adds_does_not_depend_on_the_others(n: int, seed: int) -> None:
    s, centres = ball(n, DIM, seed), first_centres(4, DIM, 1.0, seeds.generator(seed, "centres"))
    together = contributions(s, centres, 0.7)
    for i in range(n):
        alone = contributions(s[i : i + 1], centres, 0.7)
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])


def test_the_first_centres_are_on_the_sphere_and_of_the_generator_alone() -> None:
    centres = first_centres(50, 8, 2.0, seeds.generator(1, "centres"))
    torch.testing.assert_close(centres.norm(dim=1), torch.full((50,), 2.0))
    assert torch.equal(centres, first_centres(50, 8, 2.0, seeds.generator(1, "centres")))


def test_without_noise_a_step_is_lloyds() -> None:
    s, centres = ball(60, DIM, 3), first_centres(6, DIM, 1.0, seeds.generator(3, "centres"))
    found = step(by_step(s, centres, 1.0), centres, 1.0, 0.0, 1.0)
    nearest = torch.cdist(s, centres).argmin(dim=1)
    used = nearest.unique()
    torch.testing.assert_close(found.vectors, torch.stack([s[nearest == j].mean(dim=0) for j in used]), atol=1e-6, rtol=1e-5)
    assert found.weight.tolist() == [float((nearest == j).sum()) for j in used]
    torch.testing.assert_close(found.centres[used], found.vectors)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.floats(0.1, 100.0), st.floats(0.2, 3.0), st.integers(0, 10**6))
def test_whatever_the_noise_rows_are_those_a_bank_takes(k: int, deviation: float, rho: float, seed: int) -> None:
    g = seeds.generator(seed, "noise")
    noisy = deviation * torch.randn(k, DIM + 1, generator=g, dtype=torch.float64)
    centres = first_centres(k, DIM, rho, g)
    found = step(noisy, centres, 1.0, deviation, rho)
    assert 1 <= len(found.vectors) == len(found.weight) <= k and bool((found.weight >= 1).all())
    assert float(found.vectors.norm(dim=1).max()) <= rho * (1 + 1e-6)
    assert found.centres.shape == (k, DIM) and float(found.centres.norm(dim=1).max()) <= rho * (1 + 1e-6)


def test_a_count_within_its_noise_makes_no_row() -> None:
    noisy = torch.zeros(3, DIM + 1, dtype=torch.float64)
    noisy[:, -1] = torch.tensor([30.0, 3.0, 6.0]) / 2  # images; the noise on a count is 2 deviations of y
    assert step(noisy, torch.zeros(3, DIM), 1.0, 1.0, 1.0).weight.tolist() == [30.0, 6.0]
    assert step(noisy, torch.zeros(3, DIM), 1.0, 50.0, 1.0).weight.tolist() == [30.0]
