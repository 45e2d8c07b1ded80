"""Volumes turned so that they lie as the training volumes do, and answers turned back.

A file may store the same volume along other axes or backwards: DICOM series have slices first, most NIfTI files last. What is
read is permuted and flipped, never interpolated, until each axis of the array is nearest to the direction it has in training.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm.data.readers import Image
from omnifm.tasks.base import Answer

Affine = npt.NDArray[np.float64]


def turned(image: Image, like: Affine | None) -> Image:
    """Return a volume with its axes in the order and directions of `like`; as it is where either says nothing of directions."""
    turn = _turn(image.affine, like)
    if turn is None or image.affine is None:
        return image
    affine = image.affine @ _nibabel().inv_ornt_aff(turn, image.array.shape[1:])
    spacing = image.spacing and tuple(image.spacing[int(place)] for place in np.argsort(turn[:, 0]))
    return replace(image, array=_apply(image.array, turn), spacing=spacing, affine=affine)


def turned_back(answer: Answer, image: Image, like: Affine | None) -> Answer:
    """Return an answer about `turned(image, like)` along the axes of `image`."""
    turn = _turn(like, image.affine)
    if turn is None:
        return answer
    mask = None if answer.mask is None else _apply(answer.mask, turn)
    return replace(answer, mask=mask, image=None if answer.image is None else _apply(answer.image, turn))


def _turn(start: Affine | None, end: Affine | None) -> npt.NDArray[np.float64] | None:
    """Return nibabel's `(3, 2)` table: new place and direction of each axis; None where nothing is to be done."""
    if start is None or end is None:
        return None
    axes = [_nibabel().io_orientation(affine) for affine in (start, end)]
    # A degenerate affine leaves an axis without a direction.
    if any(np.isnan(table).any() for table in axes):
        return None
    turn: npt.NDArray[np.float64] = _nibabel().ornt_transform(*axes)
    return None if np.array_equal(turn, [[0, 1], [1, 1], [2, 1]]) else turn


def _apply(array: npt.NDArray[Any], turn: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Turn the last three axes."""
    front = array.ndim - 3
    found: npt.NDArray[Any] = _nibabel().apply_orientation(np.moveaxis(array, range(front), range(3, array.ndim)), turn)
    return np.ascontiguousarray(np.moveaxis(found, range(3, array.ndim), range(front)))


def _nibabel() -> Any:
    from nibabel import orientations

    return orientations
