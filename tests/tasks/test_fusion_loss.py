"""U2Fusion's loss against slow and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from torch import Tensor

from omnifm.metrics.fusion_scores import structural_similarity
from omnifm.tasks.fusion_loss import (
    FusionLoss,
    at_vgg_size,
    gaussian_pyramid,
    gradient_distance,
    information,
    similarity,
)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def loss(**changes: object) -> FusionLoss:
    settings: dict[str, object] = {"c": 200.0, "lam": 20.0, "intensity": "sources", "gradient": 0.0}
    return FusionLoss(gaussian_pyramid, **{**settings, **changes})  # type: ignore[arg-type]


def test_information_is_the_mean_squared_laplacian() -> None:
    maps = [pictures(2, 3, 9, 7), pictures(2, 1, 5, 5, seed=1)]
    kernel = [[1 / 8, 1 / 8, 1 / 8], [1 / 8, -1, 1 / 8], [1 / 8, 1 / 8, 1 / 8]]
    for k in range(2):
        means = [
            np.mean([np.square(correlate(plane.double().numpy(), kernel)[1:-1, 1:-1]).mean() for plane in found[k]])
            for found in maps
        ]
        assert float(information(maps)[k]) == pytest.approx(sum(means) / 2, rel=1e-5)


def test_information_of_a_picture_without_detail_is_nothing() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    assert float(information([ramp])) == pytest.approx(0, abs=1e-9)


def test_the_pyramid_has_five_levels_in_grey_levels() -> None:
    levels = gaussian_pyramid(torch.full((1, 1, 64, 48), 0.5))
    assert [tuple(level.shape[2:]) for level in levels] == [(64, 48), (32, 24), (16, 12), (8, 6), (4, 3)]
    assert all(torch.allclose(level, torch.tensor(127.5)) for level in levels)
    fine = torch.zeros(1, 1, 64, 64)
    fine[..., ::2] = 1  # the finest stripes there are: gone at the second level
    assert float(gaussian_pyramid(fine)[1][..., 1:-1].std()) < 1e-3


def test_weights_are_a_softmax_of_information_over_c() -> None:
    sources = pictures(3, 2, 64, 64)
    sources[:, 1] *= 0.1
    g = torch.stack([information(gaussian_pyramid(sources[:, k : k + 1])) for k in (0, 1)], dim=1)
    for c in (50.0, 3200.0):
        weights = loss(c=c).weights(sources)
        expected = [1 / (1 + math.exp(-(float(a) - float(b)) / c)) for a, b in g]
        assert weights[:, 0].tolist() == pytest.approx(expected, rel=1e-4)
        assert torch.allclose(weights.sum(dim=1), torch.ones(3))
    # A wide scale makes the sources equals, a narrow one lets the richer win.
    assert float(loss(c=1e9).weights(sources)[0, 0]) == pytest.approx(0.5)
    assert float(loss(c=1e-3).weights(sources)[0, 0]) == 1


def test_similarity_is_that_of_the_metric() -> None:
    a, b = pictures(2, 1, 24, 20), pictures(2, 1, 24, 20, seed=1)
    planes = [255 * x[:, 0].double().numpy() for x in (a, b)]
    expected = [structural_similarity(source, fused) for fused, source in zip(*planes, strict=True)]
    assert similarity(a, b).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_loss_by_its_formula() -> None:
    fused, sources = pictures(2, 1, 64, 64, seed=2), pictures(2, 2, 64, 64)
    sources[0, 1] *= 0.2
    weights, total = loss().weights(sources), 0.0
    for n in range(2):
        for i in range(2):
            source = sources[n : n + 1, i : i + 1]
            near = float(similarity(fused[n : n + 1], source))
            total += float(weights[n, i]) * (1 - near + 20 * float((fused[n] - source[0]).square().mean()))
    assert float(loss()(fused, sources)) == pytest.approx(total / 2, rel=1e-5)


def test_nothing_is_lost_where_all_three_are_one() -> None:
    same = pictures(1, 1, 64, 64)
    for intensity in ("sources", "maximum"):
        assert float(loss(intensity=intensity, gradient=3.0)(same, same.expand(-1, 2, -1, -1))) == pytest.approx(0, abs=1e-6)


def test_maximum_pulls_towards_the_brighter_source() -> None:
    sources = pictures(1, 2, 64, 64)
    brighter, middle = sources.amax(dim=1, keepdim=True), sources.mean(dim=1, keepdim=True)

    def prefers_the_brighter(intensity: str) -> bool:
        of = loss(lam=100.0, intensity=intensity)
        return float(of(brighter, sources)) < float(of(middle, sources))

    assert prefers_the_brighter("maximum") and not prefers_the_brighter("sources")


def test_the_gradient_term_wants_the_stronger_gradient_with_its_sign() -> None:
    falling = torch.tensor([[0.9, 0.5, 0.1]]).expand(3, 3)
    weak = torch.tensor([[0.1, 0.2, 0.3]]).expand(3, 3)
    sources = torch.stack([falling, weak])[None]
    assert float(gradient_distance(falling[None, None], sources)) == pytest.approx(0, abs=1e-7)
    # dx is off by .4 + .1 everywhere, dy by nothing; the mean of both directions.
    assert float(gradient_distance(weak[None, None], sources)) == pytest.approx(0.25)
    assert float(gradient_distance(1 - falling[None, None], sources)) == pytest.approx(0.4)


def test_gradients_reach_the_fused_picture_alone() -> None:
    fused, sources = pictures(1, 1, 64, 64).requires_grad_(), pictures(1, 2, 64, 64, seed=1).requires_grad_()
    assert not loss().weights(sources).requires_grad
    loss(gradient=1.0)(fused, sources).backward()
    assert fused.grad is not None and bool(fused.grad.isfinite().all()) and float(fused.grad.abs().sum()) > 0


def test_black_pictures_have_finite_losses_and_gradients() -> None:
    fused = torch.full((1, 1, 64, 64), 0.5, requires_grad=True)
    loss(gradient=1.0)(fused, torch.zeros(1, 2, 64, 64)).backward()
    assert fused.grad is not None and bool(fused.grad.isfinite().all())


def test_vgg_sees_224_pixels_by_nearest_neighbour() -> None:
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, grey: Tensor) -> list[Tensor]:
            seen.append(grey)
            return [grey]

    at_vgg_size(Spy())(pictures(2, 1, 64, 64))
    assert seen[0].shape == (2, 1, 224, 224)
    assert set(seen[0][0].unique().tolist()) <= set(pictures(2, 1, 64, 64)[0].unique().tolist())
