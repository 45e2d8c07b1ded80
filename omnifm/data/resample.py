"""Antialiased bicubic resampling as MATLAB's `imresize` defines it: the one definition of "low resolution" in this package.

    y_i = sum_j w_ij x_j / sum_j w_ij,   w_ij = k( min(1, r) (j - c_i) ),   c_i = (i + 1/2) / r - 1/2
    k(t) = 3/2 |t|^3 - 5/2 |t|^2 + 1                     |t| <= 1
         = -1/2 |t|^3 + 5/2 |t|^2 - 4 |t| + 2        1 < |t| <= 2                (R. Keys, 1981, a = -1/2)

r: output over input, a ratio of whole numbers; rows and columns one after the other. On reduction the kernel is as many times
wider, which keeps what is finer than the new grid from coming back as false detail. Beyond its border a picture is mirrored with
its edge doubled ("symmetric"). `torch.nn.functional.interpolate` without `antialias`, OpenCV's INTER_CUBIC (a = -3/4) and Pillow
at the border (weights cut off) give other pictures, and with them other scores.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_REACH = 2
WHITE = 255.0


def cubic(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return Keys' kernel k(t) with a = -1/2."""
    t = np.abs(t)
    inner, outer = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t <= 1, inner, np.where(t <= _REACH, outer, 0.0))


def taps(length: int, target: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return for each of `target` outputs which inputs it reads and with which weights, both `(target, p)`.

    Args:
        length: inputs along the axis.
        target: outputs; r = target / length exactly.
    """
    ratio = Fraction(target, length)
    narrow = min(Fraction(1), ratio)
    span = 2 * math.ceil(_REACH / narrow) + 1
    # In whole numbers, so that no rounding decides which pixels an output sees: c_i = ((2i + 1) length - target) / (2 target).
    numerator = (2 * np.arange(target) + 1) * length - target
    offsets = np.floor_divide(numerator, 2 * target)[:, None] + np.arange(span) - span // 2
    distance = (2 * target * offsets - numerator[:, None]) / (2 * target)
    weights = cubic(distance * float(narrow))
    seen = np.abs(weights).max(axis=0) > 0
    weights, offsets = weights[:, seen], offsets[:, seen]
    place = np.mod(offsets, 2 * length)
    return np.where(place < length, place, 2 * length - 1 - place), weights / weights.sum(axis=1, keepdims=True)


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the last two axes.

    Sums are added tap by tap in a fixed order, not by a matrix product, so a machine's BLAS has no say in the last bits.

    Args:
        image: `(..., h, w)`, floating point.
        size: height and width of the answer.

    Returns:
        `(..., *size)`; sharp edges overshoot the range of `image`.
    """
    for axis, target in ((-2, size[0]), (-1, size[1])):
        if image.shape[axis] != target:
            image = _along(image, axis, target)
    return image


def _along(image: Tensor, axis: int, target: int) -> Tensor:
    index, weights = taps(image.shape[axis], target)
    shape = (-1, 1) if axis == -2 else (-1,)
    place = torch.from_numpy(np.ascontiguousarray(index.T)).to(image.device)
    weight = torch.from_numpy(np.ascontiguousarray(weights.T)).to(image.device, image.dtype)
    total = image.index_select(axis, place[0]) * weight[0].view(shape)
    for where, share in zip(place[1:], weight[1:], strict=True):
        total += image.index_select(axis, where) * share.view(shape)
    return total


def low_resolution(image: Tensor, scale: int) -> Tensor:
    """Return the low-resolution picture of one in [0, 1]: `(..., h, w)` to `(..., h / scale, w / scale)`.

    Clipped and rounded to 8 bits, as the files of published low-resolution sets are.

    Raises:
        ValueError: a side is no multiple of `scale`.
    """
    height, width = image.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(f"a picture of {height} x {width} has no whole number of pixels at 1/{scale}")
    small = resize(image, (height // scale, width // scale))
    return (small.clamp(0, 1) * WHITE).round() / WHITE


def enlarged(image: Tensor, scale: int) -> Tensor:
    """Return the bicubic enlargement of `(..., h, w)`, `(..., scale h, scale w)`; not clipped."""
    height, width = image.shape[-2:]
    return resize(image, (scale * height, scale * width))
