"""Masks of a segmentation cohort on the network's grid, beside the images of `omnifm.data.cache` and cached in its way.

A mask is cut into the same slices as its image and resized by taking the nearest pixel, so that no class appears that is not
there. Instance masks become foreground (value > 0). The size of a voxel on that grid comes from the image's header.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from omnifm.data.cache import appears_whole, content_key
from omnifm.data.cohort import Cohort
from omnifm.data.orient import Rows
from omnifm.errors import DataError

log = logging.getLogger(__name__)

_FORMAT = 2
Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class CachedMasks:
    """A cohort's masks.

    Attributes:
        labels: `(n_slices, size, size)` uint8, class numbers of the cohort, a read-only memory map.
        slice_row: `(n_slices,)` int64, the manifest row of each slice, as in `CachedImages`.
        spacing: `(rows, 3)` float32, millimetres between slices, rows and columns on this grid; ones for pictures and where
            the header does not say.
    """

    labels: Labels
    slice_row: npt.NDArray[np.int64]
    spacing: npt.NDArray[np.float32]


def load_masks(cohort: Cohort, size: int, cache_dir: Path, column: str = "mask") -> CachedMasks:
    """Return the masks of all rows, from the cache if it holds them.

    Args:
        cohort: a segmentation cohort.
        size: side of a slice in pixels.
        cache_dir: folder of the cache, made if need be.
        column: `mask` or `mask_b`.

    Raises:
        DataError: a mask cannot be read or holds a value above 255 (names the row), or the cache cannot be written.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        settings = json.dumps([_FORMAT, cohort.spec.mask_kind, column])
        parts = [settings, *(content_key(cohort, size, 1, name, cache_dir) for name in ("image", column))]
        base = cache_dir / f"{cohort.name}-mask-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"
        record, pixels = base.with_name(f"{base.name}.json"), base.with_name(f"{base.name}.npy")
        found = _open(record, pixels)
        if found is None:
            _build(cohort, size, column, record, pixels)
            found = _open(record, pixels)
    except OSError as error:
        raise DataError(f"cache {cache_dir}: {error.strerror or error} ({error.filename})") from error
    if found is None:
        raise DataError(f"cache {pixels}: damaged right after it was written; is the disk full or faulty?")
    return found


def _open(record: Path, pixels: Path) -> CachedMasks | None:
    """Return what is cached; None, after a warning, if it is damaged; None if there is nothing."""
    if not record.exists() or not pixels.exists():
        return None
    try:
        facts = json.loads(record.read_bytes())
        labels = np.load(pixels, mmap_mode="r", allow_pickle=False)
        counts = np.asarray(facts["slices_per_row"], dtype=np.int64)
        if counts.sum() != len(labels):
            raise ValueError("shape differs")
        return CachedMasks(labels, np.repeat(np.arange(len(counts)), counts), np.asarray(facts["spacing"], dtype=np.float32))
    except (ValueError, KeyError, TypeError) as error:
        log.warning("cache %s: damaged (%s); it is built again", pixels.name, error)
        return None


def _build(cohort: Cohort, size: int, column: str, record: Path, pixels: Path) -> None:
    rows = Rows(cohort)
    found = [_row(rows, index, size, column) for index in range(len(cohort.rows))]
    with appears_whole(pixels) as stream:
        np.save(stream, np.concatenate([slices for slices, _ in found]), allow_pickle=False)
    facts = {"slices_per_row": [len(slices) for slices, _ in found], "spacing": [spacing for _, spacing in found]}
    with appears_whole(record) as stream:
        stream.write(json.dumps(facts).encode())


def _row(rows: Rows, index: int, size: int, column: str) -> tuple[Labels, tuple[float, float, float]]:
    cohort = rows.cohort
    try:
        mask, image = rows.mask(index, column)
        mask = (mask > 0).astype(np.int64) if cohort.spec.mask_kind == "instances" else mask
        if mask.min() < 0 or mask.max() > 255:
            raise DataError(f"holds class {mask.max() if mask.max() > 255 else mask.min()}; 0 to 255 are possible")
        return resize_mask(mask, size, cohort.spec.slice_axis), grid_spacing(
            mask.shape, image.spacing, size, cohort.spec.slice_axis
        )
    except DataError as error:
        raise DataError(f"cohort {cohort.name}: row '{cohort.rows[index].id}': {column} {error}") from error


def resize_mask(mask: npt.NDArray[np.int64], size: int, slice_axis: int | None) -> Labels:
    """Cut `(*spatial)` class numbers into slices and resize each to the nearest: `(n, size, size)` uint8."""
    planes = mask[None] if mask.ndim == 2 else np.moveaxis(mask, slice_axis or 0, 0)
    rows, columns = (_nearest(length, size) for length in planes.shape[1:])
    return np.ascontiguousarray(planes[:, rows][:, :, columns].astype(np.uint8))


def _nearest(length: int, size: int) -> npt.NDArray[np.int64]:
    """Return for each of `size` pixels the one of `length` that holds its centre."""
    return np.minimum(((np.arange(size) + 0.5) * length / size).astype(np.int64), length - 1)


def grid_spacing(
    shape: tuple[int, ...], spacing: tuple[float, ...] | None, size: int, slice_axis: int | None
) -> tuple[float, float, float]:
    """Return millimetres between slices, rows and columns after resizing to `size`; ones for a picture or an unknown spacing."""
    if len(shape) == 2 or spacing is None or len(spacing) != len(shape):
        return 1.0, 1.0, 1.0
    axis = slice_axis or 0
    row, column = (other for other in range(3) if other != axis)
    return float(spacing[axis]), spacing[row] * shape[row] / size, spacing[column] * shape[column] / size
