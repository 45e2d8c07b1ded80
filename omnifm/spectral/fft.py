"""The low-pass amplitude spectrum of an image, and the package's only Fourier transforms.

    A(fy, fx) = mean_c |F(x_c)(fy, fx)|,   F = rfft2 with norm "ortho" over the last two axes
    P = log(1 + A) on fy in [-band, band), fx in [0, band),   out = (P - mean P) / sqrt(var P + eps)

x_c: channel c of the image; F: the two-dimensional Fourier transform; P: the low-pass log amplitude of one image. The half-plane
fx >= 0 is enough because the spectrum of a real image is symmetric. The amplitude is `torch.abs` of the complex tensor: its
gradient is 0 at an exact zero, where sqrt(re^2 + im^2) gives NaN, and black backgrounds are full of exact zeros.
"""

import math

import torch
from torch import Tensor

from omnifm.errors import DataError

_EPS = 1e-6


def full_amplitude(image: Tensor) -> Tensor:
    """Return |F(x)| per channel on the half-plane, in float32 even under autocast.

    Args:
        image: (b, c, h, w), real.

    Returns:
        (b, c, h, w // 2 + 1), rows in FFT order (0, 1, ..., -1).
    """
    with torch.autocast(device_type=image.device.type, enabled=False):
        amplitude: Tensor = torch.fft.rfft2(image.float(), norm="ortho").abs()
        return amplitude


def low_pass_amplitude(image: Tensor, band: int) -> Tensor:
    """Return the standardised log amplitude of the lowest frequencies, averaged over channels.

    A black image gives zeros; any finite image gives finite values and gradients.

    Args:
        image: (b, c, h, w), real.
        band: number of frequencies kept on each side, in cycles per image; 2 * band <= h and band <= w // 2 + 1.

    Returns:
        (b, 2 * band, band) float32: mean 0 and variance 1 per image; row i is fy = i - band, column j is fx = j.

    Raises:
        DataError: the image is too small for the band.
    """
    height, width = image.shape[-2:]
    if band < 1 or 2 * band > height or band > width // 2 + 1:
        raise DataError(f"spectral band {band} does not fit an image of {height} x {width}: 2*band <= h and band <= w//2+1")
    amplitude = full_amplitude(image)[..., :band]
    rows = torch.cat((amplitude[..., height - band :, :], amplitude[..., :band, :]), dim=-2)
    return _standardise(rows.mean(dim=1).log1p())


def _standardise(spectrum: Tensor) -> Tensor:
    """Give each (rows, columns) map mean 0 and variance 1; a constant map becomes zeros."""
    centred = spectrum - spectrum.mean(dim=(-2, -1), keepdim=True)
    variance = centred.square().mean(dim=(-2, -1), keepdim=True)
    return centred * (variance + _EPS).rsqrt()


def circular_filter(tokens: Tensor, weight: Tensor) -> Tensor:
    """Multiply the spectrum of a token grid by a learnable complex filter: irfft2(rfft2(tokens) * weight).

    Source: Y. Rao et al., "Global Filter Networks for Image Classification", NeurIPS 2021.

    Args:
        tokens: (b, rows, columns, width) float32.
        weight: (rows, columns // 2 + 1, width, 2), real and imaginary part last (so that it averages and saves as a real tensor).

    Returns:
        (b, rows, columns, width) float32.
    """
    spectrum = torch.fft.rfft2(tokens, dim=(1, 2), norm="ortho") * torch.view_as_complex(weight)
    filtered: Tensor = torch.fft.irfft2(spectrum, s=tokens.shape[1:3], dim=(1, 2), norm="ortho")
    return filtered


def window_radius(share: float, height: int, width: int) -> int:
    """Return b = floor(share * min(height, width)), the radius of a low-frequency window; 0 is the mean brightness alone."""
    return math.floor(share * min(height, width))


def window_amplitude(image: Tensor, radius: int) -> Tensor:
    """Return |F(x)| of the frequencies with |fy| <= b and 0 <= fx <= b; the rest of the window follows by symmetry.

    Args:
        image: (n, c, h, w), real.
        radius: b; 2b < min(h, w).

    Returns:
        (n, c, 2b + 1, b + 1) float32, rows in FFT order (0, ..., b, -b, ..., -1).
    """
    amplitude = full_amplitude(image)
    return amplitude[..., _window_rows(amplitude.shape[-2], radius), : radius + 1]


def with_window(image: Tensor, amplitude: Tensor, share: float | Tensor = 1.0) -> Tensor:
    """Return the images with another amplitude in the low-frequency window, and the phase they have.

        F' = ((1 - share) |F| + share * amplitude) exp(i arg F)  in the window,  F' = F  outside

    Sources: the amplitude exchange of FDA (Yang and Soatto, CVPR 2020) and FedDG (Liu et al., CVPR 2021).

    Args:
        image: (n, c, h, w), real.
        amplitude: as from `window_amplitude`, for each image or one for all of them.
        share: 1 replaces, less interpolates; a number, or (n, 1, 1, 1).

    Returns:
        (n, c, h, w) float32, not clipped, in the memory format of `image`.
    """
    radius = amplitude.shape[-1] - 1
    with torch.autocast(device_type=image.device.type, enabled=False):
        spectrum = torch.fft.rfft2(image.float(), norm="ortho")
        rows = _window_rows(image.shape[-2], radius)
        window = spectrum[..., rows, : radius + 1]
        own = window.abs()
        mixed = own + share * (amplitude - own) if isinstance(share, Tensor) or share != 1.0 else amplitude.expand_as(own)
        spectrum[..., rows, : radius + 1] = torch.polar(mixed, window.angle())
        changed = torch.fft.irfft2(spectrum, s=image.shape[-2:], norm="ortho")
        return torch.empty_like(image, dtype=torch.float32).copy_(changed)


def _window_rows(height: int, radius: int) -> Tensor:
    return torch.cat((torch.arange(radius + 1), torch.arange(height - radius, height)))
