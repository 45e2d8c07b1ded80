from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm import seeds
from omnifm.spectral.tokenizer import Mixing, SpectralTokenizer, project_to_ball
from tests.spectral.examples import images

MIXINGS = get_args(Mixing)


def build(mixing: Mixing = "mlp", rho: float = 1.0, normalise: bool = True) -> SpectralTokenizer:
    with seeds.scope(0, "tokenizer"):
        return SpectralTokenizer(8, dim=16, width=12, mixing=mixing, rho=rho, normalise=normalise)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 5.0), st.floats(0, 100), st.integers(1, 6))
def test_projection_is_the_nearest_point_of_the_ball(rho: float, scale: float, dim: int) -> None:
    vectors = scale * torch.randn(5, dim, generator=torch.Generator().manual_seed(dim))
    projected = project_to_ball(vectors, rho)
    assert bool((projected.norm(dim=1) <= rho * (1 + 1e-6)).all())
    inside = vectors.norm(dim=1) <= rho
    assert torch.equal(projected[inside], vectors[inside])
    torch.testing.assert_close(projected[~inside], rho * torch.nn.functional.normalize(vectors[~inside], dim=1))


def test_projection_has_a_finite_gradient_at_zero() -> None:
    zero = torch.zeros(2, 3, requires_grad=True)
    project_to_ball(zero, 1.0).sum().backward()
    torch.testing.assert_close(zero.grad, torch.ones(2, 3))


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_embeddings_stay_in_the_ball(mixing: Mixing, normalise: bool, rho: float) -> None:
    tokenizer = build(mixing, rho, normalise)
    for parameter in tokenizer.parameters():
        parameter.data.mul_(20)  # far from initialisation too
    batch = torch.cat([images(4), torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32), 1e4 * images(1)])
    s = tokenizer(batch)
    assert s.shape == (7, 16) and s.dtype == torch.float32 and bool(torch.isfinite(s).all())
    assert bool((s.norm(dim=1) <= rho * (1 + 1e-5)).all())


@pytest.mark.parametrize("mixing", MIXINGS)
def test_gradient_reaches_every_parameter(mixing: Mixing) -> None:
    tokenizer = build(mixing)
    (tokenizer(images(4)) * torch.randn(4, 16, generator=torch.Generator().manual_seed(1))).sum().backward()
    dead = [name for name, p in tokenizer.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert dead == []


@pytest.mark.parametrize("mixing", ["mlp", "global_filter"])
def test_mixing_tells_apart_what_a_mean_of_patches_cannot(mixing: Mixing) -> None:
    # Exchanging two patches of the spectrum leaves the mean over tokens as it was, unless tokens were mixed along frequency.
    def mixed(tokenizer: SpectralTokenizer, order: list[int]) -> torch.Tensor:
        tokens = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(2))[:, order]
        return tokenizer.mix(tokens).mean(dim=1)

    swapped = [1, 0, 2, 3, 4, 5, 6, 7]
    assert (mixed(build(mixing), swapped) - mixed(build(mixing), list(range(8)))).abs().max() > 1e-4
    torch.testing.assert_close(mixed(build("identity"), swapped), mixed(build("identity"), list(range(8))))


def test_patches_are_squares_of_the_spectrum() -> None:
    from omnifm.spectral.fft import low_pass_amplitude

    tokenizer = build("identity", rho=100.0, normalise=False)
    batch = images(2)
    spectrum = low_pass_amplitude(batch, 8)
    squares = [spectrum[:, y : y + 4, x : x + 4].flatten(1) for y in range(0, 16, 4) for x in range(0, 8, 4)]
    expected = tokenizer.project(torch.stack([tokenizer.embed(square) for square in squares]).mean(dim=0))
    torch.testing.assert_close(tokenizer(batch), expected)


def test_float32_under_autocast_and_the_same_numbers() -> None:
    tokenizer, batch = build(), images(3)
    expected = tokenizer(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(tokenizer(batch), expected, rtol=0, atol=0)


def test_a_patch_must_divide_the_band() -> None:
    with pytest.raises(ValueError, match="band 10 is not a multiple of the patch 4"):
        SpectralTokenizer(10, patch=4)
