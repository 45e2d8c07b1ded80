"""What the tasks share when a case comes as files: which cohort's ways it is read in, and slices back on the image's grid."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from omnifm.data.cohort import Cohort
from omnifm.data.readers import Image
from omnifm.errors import ConfigError
from omnifm.tasks.base import TaskData

Planes = npt.NDArray[Any]


def only_image(images: Sequence[Image], question: str, task: str) -> Image:
    """Return the one image of a case. Raises ConfigError if more was given than the task reads."""
    if question:
        raise ConfigError(f"task {task} answers no question: leave out --question")
    if len(images) != 1:
        raise ConfigError(f"task {task} reads one image a case: leave out --with")
    return images[0]


def cohort_of(data: TaskData, client: str) -> Cohort:
    """Return the cohort that a client's rows are from. Raises DataError for a stranger."""
    return data.cohorts[data.plan(client).cohort]


def slices_of(slice_row: npt.NDArray[np.int64], rows: Sequence[int], most: int = 0) -> npt.NDArray[np.int64]:
    """Return where the slices of some rows are.

    Args:
        slice_row: `(slices,)` the row of each slice, ascending.
        rows: which are wanted, in any order.
        most: of each row this many slices, evenly spaced; 0: all.
    """
    wanted = np.asarray(rows, dtype=np.int64)
    # Rows ascend, so the slices of one are one run.
    first, last = (np.searchsorted(slice_row, wanted, side=side) for side in ("left", "right"))
    return np.concatenate([a + spaced(b - a, most) for a, b in zip(first, last, strict=True)] or [wanted])


def spaced(count: int, most: int) -> npt.NDArray[np.int64]:
    """Return `most` of 0 .. count - 1, evenly spaced: the middles of as many equal parts; all where `most` is 0 or too large."""
    if not 0 < most < count:
        return np.arange(count)
    return (2 * np.arange(most) + 1) * count // (2 * most)


def slice_size(image: Image, slice_axis: int | None) -> tuple[int, int]:
    """Return height and width of a slice of an image, or of the picture it is."""
    height, width = (n for axis, n in enumerate(image.array.shape[1:]) if image.array.ndim == 3 or axis != slice_axis)
    return height, width


def on_grid(planes: Planes, image: Image, slice_axis: int | None) -> Planes:
    """Put slices `(n, ..., h, w)` together as they were cut: `(..., *axes)`, axes in the order of the image's."""
    # The slices go to their place among the last three axes.
    together = planes[0] if image.array.ndim == 3 else np.moveaxis(planes, 0, (slice_axis or 0) - 3)
    return np.ascontiguousarray(together)


def resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `(n, c, h, w)` to `size`, linearly between pixel centres, antialiased where it becomes smaller."""
    if planes.shape[-2:] == size:
        return planes
    return functional.interpolate(planes, size=size, mode="bilinear", align_corners=False, antialias=True)


def case_rows(count: int) -> Tensor:
    """Return the row numbers of the slices of one case: they all belong together."""
    return torch.zeros(count, dtype=torch.int64)
