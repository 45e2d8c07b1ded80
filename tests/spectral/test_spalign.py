import math

import pytest
import torch

from omnifm.spectral.spalign import effective_rank, spectral_alignment, spread, variance_floor
from tests.spectral.examples import ball


def test_equation_5_by_hand() -> None:
    s = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    rows = torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
    # Centroids (.5, 1) and (0, .5): squared distances 1.25 and 0, their mean .625.
    assert float(spectral_alignment(s, rows)) == pytest.approx(0.625)


def test_the_gradient_is_2_over_b_times_the_difference_and_rows_get_none() -> None:
    s, rows = ball(3, 4).requires_grad_(), ball(6, 4, 1).view(3, 2, 4).requires_grad_()
    spectral_alignment(s, rows).backward()
    torch.testing.assert_close(s.grad, 2 / 3 * (s - rows.mean(dim=1)).detach())
    assert rows.grad is None


def test_float32_from_half_precision() -> None:
    assert spectral_alignment(ball(3, 4).bfloat16(), ball(3, 4).view(3, 1, 4).bfloat16()).dtype == torch.float32


def test_variance_floor_by_hand() -> None:
    s = torch.tensor([[0.0, 3.0], [0.0, -3.0]])
    # Deviations 0 and sqrt(18): only the first is under the floor of 1.
    assert float(variance_floor(s, 1.0)) == pytest.approx(0.5, abs=1e-4)
    assert float(variance_floor(10 * ball(50, 2), 0.1)) == 0.0


def test_variance_floor_is_finite_on_collapsed_and_single_embeddings() -> None:
    s = torch.zeros(4, 3, requires_grad=True)
    variance_floor(s, 1.0).backward()
    assert s.grad is not None and bool(torch.isfinite(s.grad).all())
    assert float(variance_floor(ball(1, 3), 1.0)) == 0.0


def test_effective_rank_of_known_spectra() -> None:
    cross = torch.cat([torch.eye(3), -torch.eye(3)])  # centred, three equal singular values
    assert effective_rank(cross) == pytest.approx(3.0)
    assert effective_rank(cross + 7.0) == pytest.approx(3.0)
    assert effective_rank(torch.outer(torch.arange(5.0), torch.ones(3))) == pytest.approx(1.0)
    assert effective_rank(torch.full((5, 3), 0.1)) == 0.0
    assert effective_rank(ball(1, 3)) == 0.0
    # Singular values in the ratio 3 : 1.
    p = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(p) == pytest.approx(math.exp(entropy))


def test_a_spread_tells_of_a_collapse_that_a_rank_does_not_see() -> None:
    s = ball(40, 6)
    assert spread(s, 1.0) == pytest.approx(float(s.double().var(dim=0, correction=0).sum()))
    shrunk = s.mean(dim=0) + 1e-2 * (s - s.mean(dim=0))
    assert effective_rank(shrunk) == pytest.approx(effective_rank(s), rel=1e-3)
    assert spread(shrunk, 1.0) == pytest.approx(1e-4 * spread(s, 1.0), rel=1e-3)
    assert spread(2 * s, 2.0) == pytest.approx(spread(s, 1.0)) and spread(torch.ones(5, 3), 1.0) == 0.0
    assert spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 1.0) == pytest.approx(1.0)
