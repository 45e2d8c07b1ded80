"""A cohort's images at the size they have: never resized, decoded once, on one scale, as a read-only memory map.

Values and colours are treated as `omnifm.data.cache` treats them. Where all sources have 8 bits and no colours are mixed, the
file holds bytes (a quarter of the room); the values are the same. If sizes differ within a cohort, all images are cropped
centrally to the smallest height and the smallest width, so that they stack; `NativeImages.cropped` then says so in words.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm.data.cache import LUMINANCE, PERCENTILES, appears_whole, content_digests, sha256, to_planes
from omnifm.data.cohort import Cohort
from omnifm.data.orient import Rows
from omnifm.errors import DataError

log = logging.getLogger(__name__)

_FORMAT = 3
_BATCH = 64
_WHITE = 255
Window = tuple[int, int, int]
"""Position of an image, and the upper left corner of a window of it."""


@dataclass(frozen=True, eq=False)
class NativeImages:
    """All images of a cohort.

    Attributes:
        pixels: `(n_slices, c, h, w)`, uint8 0..255 or float32 in [0, 1], read-only.
        slice_row: `(n_slices,)` int64, the index into `Cohort.rows` of each slice; ascending, slices of a volume in order.
        cropped: what was cropped, in words; empty if nothing was.
    """

    pixels: np.memmap[Any, np.dtype[Any]]
    slice_row: npt.NDArray[np.int64]
    cropped: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.pixels.shape[2]), int(self.pixels.shape[3])

    def read(self, windows: Sequence[Window], height: int, width: int) -> npt.NDArray[np.float32]:
        """Return windows of some images, `(len(windows), c, height, width)` float32 in [0, 1]."""
        found = np.stack([self.pixels[image, :, top : top + height, left : left + width] for image, top, left in windows])
        return found.astype(np.float32) / np.float32(_WHITE) if found.dtype == np.uint8 else found


@dataclass(frozen=True)
class _Layout:
    """What all images together decide: height, width, whether bytes hold them, slices of each row, what was cropped."""

    height: int
    width: int
    bytes_do: bool
    slices_per_row: list[int]
    cropped: str


def load_native(cohort: Cohort, channels: int, cache_dir: Path) -> NativeImages:
    """Return the images of all rows, from the cache if it holds them.

    Colour becomes luminance where `channels` is 1, grey is repeated where it is 3. Volumes are cut along the cohort's
    `slice_axis`. The key is the SHA-256 of the files' contents and of all parameters; files appear under their final name only
    when whole.

    Raises:
        DataError: an image cannot be read or is not finite (names the row), or the cache folder cannot be written.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        digests = content_digests([cohort.path(i) for i in range(len(cohort.rows))], cohort.folder, cache_dir)
        settings = [_FORMAT, "native", channels, cohort.spec.slice_axis, PERCENTILES, LUMINANCE]
        key = hashlib.sha256(json.dumps([settings, digests]).encode()).hexdigest()
        base = cache_dir / f"{cohort.name}-native-{key[:32]}"
        found = _open(base)
        if found is None:
            _build(cohort, channels, base)
            found = _open(base)
    except OSError as error:
        raise DataError(f"cache {cache_dir}: {error.strerror or error} ({error.filename})") from error
    if found is None:
        raise DataError(f"cache {base}.npy: damaged right after it was written; is the disk full or faulty?")
    return found


def _planes(rows: Rows, index: int, channels: int) -> tuple[npt.NDArray[np.float32], bool]:
    """Return the slices of row `index`, `(n, channels, h, w)` in [0, 1], and whether bytes hold them without loss."""
    cohort = rows.cohort
    try:
        image = rows.image(index)
        planes = to_planes(image, channels, cohort.spec.slice_axis)
    except DataError as error:
        raise DataError(f"cohort {cohort.name}: row '{cohort.rows[index].id}': image {error}") from error
    mixed = image.array.shape[0] == 3 and channels == 1
    return np.repeat(planes, channels // planes.shape[1], axis=1), image.bits == 8 and not mixed


def _layout(cohort: Cohort, channels: int) -> _Layout:
    """Look at every image once: what is cut to what is known only when all sizes are."""
    sizes, counts, bytes_do = [], [], True
    for planes, exact in _decoded(cohort, channels):
        sizes.append(planes.shape[2:])
        counts.append(len(planes))
        bytes_do &= exact
    (height, width), largest = (map(int, pick(sizes, axis=0)) for pick in (np.min, np.max))
    tallest, widest = largest
    cropped = ""
    if (height, width) != (tallest, widest):
        smallest = cohort.rows[min(range(len(sizes)), key=lambda i: (min(sizes[i]), i))].id
        cropped = (
            f"cohort {cohort.name}: images have up to {tallest} x {widest} pixels and were cropped centrally to "
            f"{height} x {width} (row '{smallest}' is among the smallest)"
        )
    return _Layout(height, width, bytes_do, counts, cropped)


def _decoded(cohort: Cohort, channels: int) -> Iterator[tuple[npt.NDArray[np.float32], bool]]:
    reader = Rows(cohort)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In batches, so that no more than one batch of decoded images waits in memory.
        for start in range(0, len(cohort.rows), _BATCH):
            rows = range(start, min(start + _BATCH, len(cohort.rows)))
            yield from pool.map(lambda index: _planes(reader, index, channels), rows)


def _build(cohort: Cohort, channels: int, base: Path) -> None:
    plan = _layout(cohort, channels)
    shape = (sum(plan.slices_per_row), channels, plan.height, plan.width)
    with appears_whole(_file(base, "npy")) as stream:
        kind = "|u1" if plan.bytes_do else "<f4"
        np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
        for planes, _ in _decoded(cohort, channels):
            top, left = (planes.shape[2] - plan.height) // 2, (planes.shape[3] - plan.width) // 2
            cut = planes[:, :, top : top + plan.height, left : left + plan.width]
            stream.write(np.ascontiguousarray(np.rint(cut * _WHITE) if plan.bytes_do else cut, dtype=kind).tobytes())
    stat = _file(base, "npy").stat()
    record = {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": sha256(_file(base, "npy")),
        "slices_per_row": plan.slices_per_row,
        "cropped": plan.cropped,
    }
    with appears_whole(_file(base, "json")) as stream:
        stream.write(json.dumps(record).encode())


def _open(base: Path) -> NativeImages | None:
    """Return what is cached under `base`; None, after a warning, if it is damaged; None if there is nothing."""
    if not _file(base, "json").exists():
        return None
    try:
        record = json.loads(_file(base, "json").read_bytes())
        stat = _file(base, "npy").stat()
        if stat.st_size != record["size"]:
            raise ValueError("size differs")
        # Another time stamp: copied, rebuilt by another process, or tampered with. The content decides.
        if stat.st_mtime_ns != record["mtime_ns"] and sha256(_file(base, "npy")) != record["sha256"]:
            raise ValueError("content differs")
        pixels = np.lib.format.open_memmap(_file(base, "npy"), mode="r")
        slice_row = np.repeat(np.arange(len(record["slices_per_row"])), record["slices_per_row"]).astype(np.int64)
        if len(slice_row) != len(pixels):
            raise ValueError("shape differs")
        return NativeImages(pixels, slice_row, record["cropped"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("cache %s: damaged (%s); it is built again", _file(base, "npy").name, error)
        return None


def _file(base: Path, suffix: str) -> Path:
    return base.with_name(f"{base.name}.{suffix}")
