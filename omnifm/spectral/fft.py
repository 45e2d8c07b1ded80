"""The low-pass amplitude spectrum of an image, and the package's only Fourier transforms.

    A(fy, fx) = mean_c |F(x_c)(fy, fx)|,   F = rfft2 with norm "ortho" over the last two axes
    P = log(1 + A) on fy in [-band, band), fx in [0, band),   out = (P - mean P) / sqrt(var P + eps)

x_c: channel c of the image; F: the two-dimensional Fourier transform; P: the low-pass log amplitude of one image. The half-plane
fx >= 0 is enough because the spectrum of a real image is symmetric. The amplitude is `torch.abs` of the complex tensor: its
gradient is 0 at an exact zero, where sqrt(re^2 + im^2) gives NaN, and black backgrounds are full of exact zeros.
"""

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
