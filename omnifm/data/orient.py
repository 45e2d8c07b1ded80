"""Volumes turned so that all of a cohort lie as its first one does.

A file may store the same volume along other axes or backwards: DICOM series have slices first, most NIfTI files last. What is
read is permuted and flipped, never interpolated, until each axis of the array is nearest to the direction it is to have.
"""

import itertools
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm.data.cohort import Cohort
from omnifm.data.readers import Image, read_image, read_mask_image
from omnifm.errors import DataError

Affine = npt.NDArray[np.float64]
Stored = tuple[str, bool]
"""A row's id, and whether its flat image is stored by columns."""
_SPACING_TOLERANCE = 0.01


def turned(image: Image, like: Affine | None) -> Image:
    """Return a volume with its axes in the order and directions of `like`; as it is where either says nothing of directions."""
    turn = turn_between(image.affine, like)
    if turn is None or image.affine is None:
        return image
    affine = image.affine @ _nibabel().inv_ornt_aff(turn, image.array.shape[1:])
    spacing = image.spacing and tuple(image.spacing[int(place)] for place in np.argsort(turn[:, 0]))
    return replace(image, array=apply(image.array, turn), spacing=spacing, affine=affine)


def lying_as(other: Image, image: Image) -> Image:
    """Return a mask or second image on the grid of `image`: turned as it lies, and taken to lie alike where it does not say.

    Raises:
        DataError: it has another size, or its header puts it elsewhere, more than half the smallest voxel edge away; or of two
            flat ones one is stored by columns, or has pixels of another size.
    """
    if other.array.ndim == image.array.ndim == 3:
        _require_flat_fit(other, image)
    silent = other.affine is None or image.affine is None
    other = replace(other, affine=image.affine) if silent else turned(other, image.affine)
    size, wanted = other.array.shape[1:], image.array.shape[1:]
    if size != wanted:
        raise DataError(f"size {' x '.join(map(str, size))} differs from the image's {' x '.join(map(str, wanted))}")
    _require_one_place(other.affine, image.affine, wanted)
    _require_one_place(other.place, image.place, (1, *wanted))
    return other


def _require_one_place(other: Affine | None, image: Affine | None, shape: tuple[int, ...]) -> None:
    if other is None or image is None:
        return
    gap = _farthest(other - image, shape)
    if gap > np.linalg.norm(image[:3, :3], axis=0).min() / 2:
        raise DataError(f"lies up to {gap:.1f} mm from where the image lies: bring both onto one grid")


def _require_flat_fit(other: Image, image: Image) -> None:
    if other.by_columns != image.by_columns:
        raise DataError(
            "one of the two is a flat NIfTI, which is stored by columns, the other is stored by rows: save both alike"
        )
    if other.spacing and image.spacing and not np.allclose(other.spacing, image.spacing, rtol=_SPACING_TOLERANCE):
        sizes = (" x ".join(f"{step:g}" for step in one.spacing or ()) for one in (other, image))
        raise DataError("pixels of {} mm, the image's are of {} mm: bring both onto one grid".format(*sizes))


def without_pixels(image: Image) -> Image:
    """Return what an image says of itself, with as many axes: what is kept of a volume must not be large."""
    return replace(image, array=np.empty((0,) * image.array.ndim, dtype=np.float32))


def stored_otherwise(image: Image, first: Stored | None) -> str:
    """Return what is wrong with a flat image that a model would see transposed, since the first flat row is stored otherwise."""
    if first is None or image.array.ndim != 3 or image.by_columns == first[1]:
        return ""
    by_rows, by_columns = "stored by rows", "a flat NIfTI, which is stored by columns"
    own, other = (by_columns, by_rows) if image.by_columns else (by_rows, by_columns)
    return f"is {own}, and row '{first[0]}' is {other}: save all alike"


class Rows:
    """Images and masks of a cohort's rows as training sees them: every volume lies as that of the first row.

    Flat images, which say nothing of how they lie, are stored along the axes of the first row's, if that is one. The second image
    of a pair and masks lie as their image does; see `lying_as`.
    """

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort

    @cached_property
    def like(self) -> Affine | None:
        """How all volumes are to lie; None where the first is a picture, or does not say."""
        return self._first.affine if self._first else None

    @cached_property
    def _first(self) -> Image | None:
        return without_pixels(read_image(self.cohort.path(0))) if self.cohort.rows else None

    def require_stored_alike(self, image: Image) -> None:
        """Raise DataError if a flat image is stored along other axes than the first row's."""
        flat = self._first if self._first is not None and self._first.array.ndim == 3 else None
        if flat and (wrong := stored_otherwise(image, (self.cohort.rows[0].id, flat.by_columns))):
            raise DataError(wrong)

    def image(self, index: int, column: str = "image") -> Image:
        """Read `image` or `image_b` of a row. Raises DataError: it cannot be read, or does not fit the others."""
        found = read_image(self.cohort.path(index, column))
        self.require_stored_alike(found)
        if column != "image" and found.array.ndim == 4:
            found = lying_as(found, read_image(self.cohort.path(index)))
        return turned(found, self.like)

    def mask(self, index: int, column: str = "mask") -> tuple[npt.NDArray[np.int64], Image]:
        """Read a mask of a row, whole numbers `(*spatial)`, and its image. Raises DataError: as `image`."""
        image = read_image(self.cohort.path(index))
        found = lying_as(read_mask_image(self.cohort.path(index, column)), image)
        return turned(found, self.like).array[0].astype(np.int64), turned(image, self.like)


def _farthest(change: Affine, shape: tuple[int, ...]) -> float:
    """Return how far (mm) a change of the affine moves the corner of a grid that it moves most."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, length - 1) for length in shape))], dtype=np.float64)
    return float(np.linalg.norm(corners @ change[:3].T, axis=1).max())


def turn_between(start: Affine | None, end: Affine | None) -> npt.NDArray[np.float64] | None:
    """Return nibabel's `(3, 2)` table: new place and direction of each axis; None where nothing is to be done."""
    if start is None or end is None:
        return None
    axes = [_nibabel().io_orientation(affine) for affine in (start, end)]
    # A degenerate affine leaves an axis without a direction.
    if any(np.isnan(table).any() for table in axes):
        return None
    turn: npt.NDArray[np.float64] = _nibabel().ornt_transform(*axes)
    return None if np.array_equal(turn, [[0, 1], [1, 1], [2, 1]]) else turn


def apply(array: npt.NDArray[Any], turn: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Turn the last three axes of an array, as `turn_between` says."""
    front = array.ndim - 3
    found: npt.NDArray[Any] = _nibabel().apply_orientation(np.moveaxis(array, range(front), range(3, array.ndim)), turn)
    return np.ascontiguousarray(np.moveaxis(found, range(3, array.ndim), range(front)))


def _nibabel() -> Any:
    from nibabel import orientations

    return orientations
