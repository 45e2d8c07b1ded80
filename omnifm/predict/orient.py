"""Slices turned to lie as those of training volumes, and answers turned back to lie as the image that they are about."""

from dataclasses import replace

import numpy as np

from omnifm.data.orient import Affine, apply, turn_between, turned
from omnifm.data.readers import Image
from omnifm.errors import DataError
from omnifm.tasks.base import Answer


def is_slice(image: Image) -> bool:
    """Whether an image `(c, rows, columns)` says how it lies, by an affine of (slice, row, column)."""
    return image.array.ndim == 3 and image.affine is not None


def turned_slice(image: Image, like: Affine | None, axis: int) -> Image:
    """Return a slice as the slices along `axis` of volumes that lie as `like`.

    Raises:
        DataError: it lies across them.
    """
    volume = turned(replace(image, array=image.array[:, None], spacing=(0.0, *(image.spacing or (1.0, 1.0)))), like)
    if volume.array.shape[1 + axis] != 1:
        raise DataError("this slice lies across those that the model was trained on: give the folder of its series")
    spacing = tuple(step for place, step in enumerate(volume.spacing or ()) if place != axis)
    return Image(np.take(volume.array, 0, axis=1 + axis), image.spacing and spacing, None, image.bits)


def turned_back(answer: Answer, image: Image, like: Affine | None, axis: int = 0) -> Answer:
    """Return an answer about an image as `turned` or `turned_slice` gave it along the axes of the image itself."""
    turn = turn_between(like, image.affine)
    if turn is None:
        return answer
    lone = is_slice(image)
    mask, found = answer.mask, answer.image
    if mask is not None:
        mask = apply(np.expand_dims(mask, axis), turn)[0] if lone else apply(mask, turn)
    if found is not None:
        found = apply(np.expand_dims(found, 1 + axis), turn)[:, 0] if lone else apply(found, turn)
    return replace(answer, mask=mask, image=found)
