"""Registered pairs of a fusion cohort: an anatomical picture and another of the same slice, which may be in colour.

Only luminance is fused; colour is kept aside to be put back for people. ITU-R BT.601, full range, everything in [0, 1]:

    Y = .299 R + .587 G + .114 B,   Cb = 1/2 + (B - Y) / 1.772,   Cr = 1/2 + (R - Y) / 1.402
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from omnifm.data.cache import LUMINANCE, CachedImages, load_images
from omnifm.data.cohort import Cohort
from omnifm.errors import DataError

Planes = npt.NDArray[np.float32]

_RED, _GREEN, _BLUE = LUMINANCE


@dataclass(frozen=True, eq=False)
class ImagePairs:
    """All pairs of a cohort, as two memory maps that are read when asked.

    Attributes:
        anatomical: `(n, 1, size, size)`, of column `image`.
        other: `(n, 3, size, size)`, of column `image_b`; grey ones have three equal channels.
        row: `(n,)` int64, the manifest row of each pair; ascending. Registered volumes give one pair per slice.
    """

    anatomical: CachedImages
    other: CachedImages

    @property
    def row(self) -> npt.NDArray[np.int64]:
        """The manifest row of each pair."""
        return self.anatomical.slice_row

    def read(self, places: npt.NDArray[np.int64]) -> tuple[Planes, Planes]:
        """Return luminance of both `(b, 2, size, size)`, anatomical first, and the other's Cb and Cr, `(b, 2, size, size)`."""
        coloured = to_ycbcr(self.other.pixels[places])
        luminance = np.concatenate([self.anatomical.pixels[places], coloured[:, :1]], axis=1)
        return luminance, np.ascontiguousarray(coloured[:, 1:])


def load_pairs(cohort: Cohort, size: int, cache_dir: Path) -> ImagePairs:
    """Decode the pairs of a cohort once, to `size` pixels a side; see `omnifm.data.cache` for values, keys and resizing.

    Raises:
        DataError: a picture cannot be read, or a row's two volumes have different numbers of slices (names the row).
    """
    anatomical = load_images(cohort, size, 1, cache_dir)
    other = load_images(cohort, size, 3, cache_dir, column="image_b")
    counts = [np.bincount(images.slice_row, minlength=len(cohort.rows)) for images in (anatomical, other)]
    if (unlike := np.flatnonzero(counts[0] != counts[1])).size:
        first = int(unlike[0])
        slices = f"image has {counts[0][first]} slices, image_b {counts[1][first]}"
        raise DataError(f"cohort {cohort.name}: row '{cohort.rows[first].id}': {slices}")
    return ImagePairs(anatomical, other)


def to_ycbcr(rgb: Planes) -> Planes:
    """Return Y, Cb, Cr of red, green, blue, `(..., 3, h, w)` in [0, 1]. Grey gives 1/2 for both colours."""
    red, green, blue = np.moveaxis(rgb, -3, 0)
    y = _RED * red + _GREEN * green + _BLUE * blue
    planes = [y, 0.5 + (blue - y) / (2 * (1 - _BLUE)), 0.5 + (red - y) / (2 * (1 - _RED))]
    return np.stack(planes, axis=-3).astype(np.float32)


def to_rgb(ycbcr: Planes) -> Planes:
    """Return red, green, blue in [0, 1] of Y, Cb, Cr, `(..., 3, h, w)`; colours that a screen has not are clipped."""
    y, cb, cr = np.moveaxis(ycbcr, -3, 0)
    red = y + 2 * (1 - _RED) * (cr - 0.5)
    blue = y + 2 * (1 - _BLUE) * (cb - 0.5)
    green = (y - _RED * red - _BLUE * blue) / _GREEN
    rgb: Planes = np.clip(np.stack([red, green, blue], axis=-3), 0, 1).astype(np.float32)
    return rgb
