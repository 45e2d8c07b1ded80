import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm.errors import DataError
from omnifm.spectral.fft import (
    circular_filter,
    full_amplitude,
    low_pass_amplitude,
    window_amplitude,
    window_radius,
    with_window,
)
from tests.spectral.examples import images

SIZES = st.tuples(st.integers(9, 40), st.integers(9, 40))


def slow_low_pass(image: np.ndarray, band: int) -> np.ndarray:
    """Numpy's full fft2, signed frequencies looked up one by one."""
    _, height, width = image.shape
    spectrum = np.abs(np.fft.fft2(image.astype(np.float64))) / np.sqrt(height * width)
    out = np.empty((2 * band, band))
    for i, fy in enumerate(range(-band, band)):
        for j in range(band):
            out[i, j] = np.log1p(np.mean([channel[fy % height, j] for channel in spectrum]))
    return (out - out.mean()) / out.std()


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 3))
def test_equals_a_slow_reference_at_every_size_odd_ones_too(size: tuple[int, int], band: int, channels: int) -> None:
    batch = images(2, channels, *size)
    got = low_pass_amplitude(batch, band)
    assert got.dtype == torch.float32 and got.shape == (2, 2 * band, band)
    for image, spectrum in zip(batch.numpy(), got.numpy(), strict=True):
        np.testing.assert_allclose(spectrum, slow_low_pass(image, band), atol=2e-3)


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_parseval(size: tuple[int, int]) -> None:
    height, width = size
    batch = images(2, 3, height, width)
    power = full_amplitude(batch).double().square()
    twice = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)  # columns that stand for fx and -fx
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    energy = batch.double().square().sum(dim=(-2, -1))
    torch.testing.assert_close((power * twice).sum(dim=(-2, -1)), energy, rtol=1e-5, atol=0)


def test_neither_batch_nor_channels_are_transformed() -> None:
    batch = images(3, 2)
    whole = full_amplitude(batch)
    for b in range(3):
        for c in range(2):
            torch.testing.assert_close(whole[b, c], full_amplitude(batch[b : b + 1, c : c + 1])[0, 0])
    torch.testing.assert_close(low_pass_amplitude(batch, 8)[1], low_pass_amplitude(batch[1:2], 8)[0])


def test_a_grey_image_and_its_colour_copy_have_one_spectrum() -> None:
    grey = images(2)
    torch.testing.assert_close(low_pass_amplitude(grey.expand(-1, 3, -1, -1), 8), low_pass_amplitude(grey, 8))


def test_rows_and_columns_are_the_named_frequencies() -> None:
    y = torch.arange(32.0)[:, None]
    x = torch.arange(32.0)[None, :]
    wave = torch.cos(2 * torch.pi * (-3 * y + 5 * x) / 32)[None, None]
    spectrum = low_pass_amplitude(wave, 8)[0]
    assert divmod(int(spectrum.argmax()), 8) == (8 - 3, 5)


def test_a_translation_changes_no_amplitude() -> None:
    batch = images(2)
    torch.testing.assert_close(low_pass_amplitude(batch.roll((5, 9), (2, 3)), 8), low_pass_amplitude(batch, 8), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_intensity_scale_barely_moves_the_shape_of_the_spectrum(scale: float) -> None:
    batch = images(4)
    a, b = low_pass_amplitude(batch, 8).flatten(1), low_pass_amplitude(scale * batch, 8).flatten(1)
    assert bool((torch.nn.functional.cosine_similarity(a, b) > 0.97).all())
    torch.testing.assert_close(b.mean(dim=1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(b.std(dim=1, correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_black_backgrounds_have_finite_gradients() -> None:
    square = torch.zeros(1, 1, 32, 32)
    square[..., 8:24, 8:24] = 1.0
    assert bool((full_amplitude(square) == 0).any()), "the example needs exact zeros to be one"
    square.requires_grad_()
    (low_pass_amplitude(square, 8) * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert square.grad is not None and bool(torch.isfinite(square.grad).all()) and bool(square.grad.abs().sum() > 0)


@pytest.mark.parametrize("value", [0.0, 1.0, -1000.0])
def test_constant_images_are_finite_and_black_ones_zero(value: float) -> None:
    flat = torch.full((1, 1, 16, 16), value, requires_grad=True)
    spectrum = low_pass_amplitude(flat, 4)
    spectrum.square().sum().backward()
    assert bool(torch.isfinite(spectrum).all())
    assert flat.grad is not None and bool(torch.isfinite(flat.grad).all())
    if value == 0.0:
        assert bool((spectrum == 0).all())


@pytest.mark.parametrize(("height", "width", "band"), [(15, 32, 8), (32, 13, 8), (32, 32, 0)])
def test_a_band_that_does_not_fit_is_an_error(height: int, width: int, band: int) -> None:
    with pytest.raises(DataError, match=f"band {band} does not fit an image of {height} x {width}"):
        low_pass_amplitude(images(1, 1, height, width), band)


def test_the_largest_band_that_fits_is_accepted() -> None:
    assert low_pass_amplitude(images(1, 1, 16, 14), 8).shape == (1, 16, 8)


def test_float32_under_autocast_and_from_half_precision() -> None:
    batch = images(2)
    expected = low_pass_amplitude(batch, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(low_pass_amplitude(batch, 8), expected, rtol=0, atol=0)
    assert low_pass_amplitude(batch.bfloat16(), 8).dtype == torch.float32


def test_the_circular_filter_is_a_convolution() -> None:
    g = torch.Generator().manual_seed(0)
    tokens, kernel = torch.randn(1, 6, 4, 2, generator=g), torch.randn(6, 4, 2, generator=g)
    weight = torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)))
    expected = torch.zeros_like(tokens)
    for dy in range(6):
        for dx in range(4):
            expected += tokens.roll((dy, dx), (1, 2)) * kernel[dy, dx]
    torch.testing.assert_close(circular_filter(tokens, weight), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(SIZES, st.floats(0, 0.49), st.floats(0, 1))
def test_a_window_is_exchanged_as_in_numpy(size: tuple[int, int], window: float, share: float) -> None:
    """Numpy's full fft2, the square window cut out of the shifted spectrum, as in the published code."""
    x, other = images(2, 3, *size, seed=1), images(2, 3, *size, seed=2)
    b = window_radius(window, *size)
    found = with_window(x, window_amplitude(other, b), share)
    f, g = (np.fft.fftshift(np.fft.fft2(t.double().numpy()), axes=(-2, -1)) for t in (x, other))
    amplitude, phase = np.abs(f), np.angle(f)
    cy, cx = size[0] // 2, size[1] // 2
    place = np.s_[..., cy - b : cy + b + 1, cx - b : cx + b + 1]
    amplitude[place] = (1 - share) * amplitude[place] + share * np.abs(g)[place]
    expected = np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * phase), axes=(-2, -1)))
    assert np.abs(expected.imag).max() < 1e-9
    np.testing.assert_allclose(found.numpy(), expected.real, atol=3e-5)


def test_the_window_of_radius_zero_is_the_mean_brightness() -> None:
    x = images(3, 2, 12, 9, seed=3)
    torch.testing.assert_close(window_amplitude(x, 0)[..., 0, 0], x.mean(dim=(2, 3)) * (12 * 9) ** 0.5)
    changed = with_window(x, torch.full((2, 1, 1), 0.25 * (12 * 9) ** 0.5))
    torch.testing.assert_close(changed, x - x.mean(dim=(2, 3), keepdim=True) + 0.25)


def test_an_image_with_its_own_amplitude_is_itself_and_black_stays_finite() -> None:
    x = images(2, 1, 16, 16, seed=4)
    torch.testing.assert_close(with_window(x, window_amplitude(x, 5)), x, atol=2e-6, rtol=0)
    assert bool(with_window(torch.zeros(1, 1, 8, 8), window_amplitude(x[:1], 2)).isfinite().all())
