"""Bicubic resampling against hand-computed weights, Pillow, torch and a slow reference."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from omnifm.data.resample import cubic, enlarged, low_resolution, resize, taps
from omnifm.seeds import generator

GOLDEN = {2: "09d1fee866dd29c7", 4: "fa2a135bb42ee54f", 8: "83d890fc3091f452"}


def picture(*shape: int, stream: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(0, "resample", stream))


def pattern() -> torch.Tensor:
    """A colour picture of 8-bit values that whole numbers alone define, so that anyone can make it."""
    y, x = np.mgrid[:64, :96]
    planes = [(x * y + 3 * x) % 256, (x * x + 5 * y) % 256, (255 * ((x // 8 + y // 8) % 2))]
    return torch.from_numpy(np.stack(planes).astype(np.float32) / 255)


def slow(line: list[float], target: int) -> list[float]:
    """Resample one line by the formula, in fractions, the picture mirrored as often as needed."""

    def k(t: Fraction) -> Fraction:
        t = abs(t)
        if t <= 1:
            return Fraction(3, 2) * t**3 - Fraction(5, 2) * t**2 + 1
        return Fraction(-1, 2) * t**3 + Fraction(5, 2) * t**2 - 4 * t + 2 if t <= 2 else Fraction(0)

    n, out = len(line), []
    ratio = Fraction(target, n)
    mirrored = line + line[::-1]
    for i in range(target):
        centre = (i + Fraction(1, 2)) / ratio - Fraction(1, 2)
        reach = range(-40 * n, 41 * n)
        weights = {j: w for j in reach if (w := k(min(Fraction(1), ratio) * (j - centre)))}
        out.append(float(sum(w * Fraction(mirrored[j % (2 * n)]) for j, w in weights.items()) / sum(weights.values())))
    return out


def test_the_kernel_by_hand() -> None:
    """k(1/4) = 3/128 - 5/32 + 1 = 111/128, k(5/4) = -9/128; half-way the weights are -1, 9, 9, -1 over 16."""
    assert cubic(np.array([0.0, 1, 2, 2.5])).tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(cubic(np.array([0.25, -1.25, 0.5, 1.5])), [111 / 128, -9 / 128, 9 / 16, -1 / 16])


def test_the_weights_of_halving_and_doubling_by_hand() -> None:
    """At 1/2 the kernel is read at 1/4, 3/4, 5/4, 7/4 to both sides and halved: 111, 29, -9, -3 over 256."""
    index, weights = taps(16, 8)
    assert index[3].tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    np.testing.assert_allclose(weights[3] * 256, [-3, -9, 29, 111, 111, 29, -9, -3])
    assert index[0].tolist() == [2, 1, 0, 0, 1, 2, 3, 4]  # mirrored, the edge doubled
    index, weights = taps(4, 8)
    used = weights[2] != 0
    assert index[2][used].tolist() == [0, 0, 1, 2] or index[2][used].tolist() == [1, 0, 1, 2]
    np.testing.assert_allclose(weights[2][used].sum(), 1)
    np.testing.assert_allclose(sorted(weights[2][used] * 128), [-9, -3, 29, 111])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=9), st.integers(1, 20))
def test_any_ratio_follows_the_formula(line: list[int], target: int) -> None:
    found = resize(torch.tensor([[line]], dtype=torch.float64), (1, target))
    np.testing.assert_allclose(found[0, 0].numpy(), slow([float(v) for v in line], target), atol=1e-9)


@pytest.mark.parametrize("size", [(32, 48), (16, 24), (24, 17), (128, 192), (64, 96)])
def test_inside_the_border_pillow_agrees(size: tuple[int, int]) -> None:
    image = picture(64, 96)
    pillow = np.asarray(Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BICUBIC))
    found = resize(image, size).numpy()
    edge = 3 if size[0] <= 64 else 6
    np.testing.assert_allclose(found[edge:-edge, edge:-edge], pillow[edge:-edge, edge:-edge], atol=2e-6)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_inside_the_border_torch_agrees_if_it_antialiases_and_not_otherwise(scale: int) -> None:
    image = picture(2, 3, 64, 128)
    small = (64 // scale, 128 // scale)
    found = resize(image, small)[..., 2:-2, 2:-2]
    with_, without = (
        interpolate(image, size=small, mode="bicubic", antialias=a, align_corners=False)[..., 2:-2, 2:-2] for a in (True, False)
    )
    torch.testing.assert_close(found, with_, atol=2e-6, rtol=0)
    assert (found - without).abs().max() > 0.1
    large = interpolate(image, scale_factor=scale, mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(enlarged(image, scale)[..., 16:-16, 16:-16], large[..., 16:-16, 16:-16], atol=2e-6, rtol=0)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_constant_stays_and_a_ramp_stays_a_ramp(scale: int) -> None:
    flat = torch.full((1, 16, 16), 0.3)
    torch.testing.assert_close(enlarged(flat, scale), torch.full((1, 16 * scale, 16 * scale), 0.3))
    torch.testing.assert_close(resize(flat, (16 // scale, 2)), torch.full((1, 16 // scale, 2), 0.3))
    ramp = torch.arange(64.0).expand(8, 64)
    steps = enlarged(ramp, scale)[0].diff()[3 * scale : -3 * scale]
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / scale), atol=1e-4, rtol=0)


def test_mirroring_and_turning_a_picture_mirrors_and_turns_the_small_one() -> None:
    image = picture(3, 32, 48)
    small = low_resolution(image, 4)
    assert torch.equal(low_resolution(image.flip(-1), 4), small.flip(-1))
    torch.testing.assert_close(low_resolution(image.mT, 4), small.mT, atol=1.01 / 255, rtol=0)


def test_low_resolution_pictures_have_8_bits() -> None:
    small = low_resolution(picture(1, 32, 32).round(), 2)
    assert small.min() >= 0 and small.max() <= 1  # a black and white picture overshoots before it is clipped
    assert (small * 255 - (small * 255).round()).abs().max() < 1e-4
    with pytest.raises(ValueError, match="33 x 32"):
        low_resolution(torch.zeros(1, 33, 32), 2)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_the_published_hash_of_a_low_resolution_picture(scale: int) -> None:
    """Whoever makes low-resolution pictures elsewhere can hold them against these digests (docs/tasks/super_resolution.md)."""
    small = (low_resolution(pattern(), scale) * 255).round().to(torch.uint8)
    assert hashlib.sha256(small.numpy().tobytes()).hexdigest()[:16] == GOLDEN[scale]
