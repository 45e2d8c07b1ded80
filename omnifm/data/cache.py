"""Decoded images on disk: decoded once, on one scale, opened as a read-only memory map by every later start and process."""

import hashlib
import json
import logging
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from omnifm.data.cohort import Cohort
from omnifm.data.manifest import PATH_COLUMNS
from omnifm.data.orient import Rows
from omnifm.data.readers import Image
from omnifm.errors import DataError

log = logging.getLogger(__name__)

# Part of every key: a new number makes every older file a stranger.
CACHE_FORMAT = 3
PERCENTILES = (0.5, 99.5)
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
_BATCH = 64
_RELEASE_BYTES = 4 * 2**20
Progress = Callable[[int, int], None]


class PixelMap(np.memmap[tuple[int, ...], np.dtype[np.float32]]):
    """A read-only memory map whose resident part stays small, however much of it is read over time.

    After every few MiB the pages are given back (Linux). They are clean and stay in the system's own cache, so that reading them
    again is a minor fault; without this a process grows by every image it has ever seen, until the system is short of memory.
    """

    _read = 0

    def __getitem__(self, index: Any) -> Any:
        """Return a plain array: rows copied out of the map, or for a basic index a view into it."""
        found = np.asarray(super().__getitem__(index))
        self._read += found.nbytes
        if self._read >= _RELEASE_BYTES and sys.platform == "linux":
            self._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # numpy has it, its stubs do not
            self._read = 0
        return found


@dataclass(frozen=True, eq=False)
class CachedImages:
    """A cohort's images as one memory map.

    Attributes:
        pixels: `(n_slices, c, size, size)` float32 in [0, 1], read-only.
        slice_row: `(n_slices,)` int64, the index into `Cohort.rows` of each slice; ascending, slices of a volume in order.
    """

    pixels: PixelMap
    slice_row: npt.NDArray[np.int64]


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/omnifm`, by default `~/.cache/omnifm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnifm"


def load_images(
    cohort: Cohort, size: int, channels: int, cache_dir: Path, column: str = "image", progress: Progress | None = None
) -> CachedImages:
    """Return the images of all rows, from the cache if it holds them.

    8-bit sources are divided by 255; others are scaled from their own 0.5 and 99.5 percentile (of the whole volume) to [0, 1]; a
    constant image becomes zeros. Volumes are cut along the cohort's `slice_axis`. Slices are resized to `size` x `size` with
    antialiased bicubic interpolation (Pillow). Colour becomes luminance where `channels` is 1, grey is repeated where it is 3.
    Volumes are turned to lie as the first row's, see `omnifm.data.orient`.

    The key is the SHA-256 of the files' contents, in row order, and of all parameters: it knows no path and no time. Files appear
    under their final name only when whole, so that two processes may build the same cache at once.

    Args:
        cohort: whose images.
        size: side of a slice in pixels.
        channels: 1 or 3.
        cache_dir: folder of the cache, made if need be.
        column: `image` or `image_b`.
        progress: called with rows done and rows in all, while decoding.

    Raises:
        DataError: an image cannot be read or is not finite (names the row), or the cache folder cannot be written.
    """
    if channels not in (1, 3) or size < 1 or column not in ("image", "image_b"):
        raise DataError(f"cannot cache column '{column}' with {channels} channels at {size} pixels")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        key = content_key(cohort, size, channels, column, cache_dir)
        base = cache_dir / f"{cohort.name}-{key[:32]}"
        found = _open(base)
        if found is None:
            _build(cohort, size, channels, column, base, progress)
            found = _open(base)
    except OSError as error:
        raise DataError(f"cache {cache_dir}: {error.strerror or error} ({error.filename})") from error
    if found is None:
        raise DataError(f"cache {base}.npy: damaged right after it was written; is the disk full or faulty?")
    return found


def to_slices(image: Image, size: int, channels: int, slice_axis: int | None) -> npt.NDArray[np.float32]:
    """Scale, cut and resize one image: `(c, *spatial)` -> `(n, channels, size, size)` in [0, 1].

    Raises:
        DataError: a value is NaN or infinite, or a volume comes without `slice_axis`.
    """
    planes = to_planes(image, channels, slice_axis)
    resized = np.stack([[_resize(channel, size) for channel in plane] for plane in planes])
    return np.repeat(resized, channels // resized.shape[1], axis=1)


def to_planes(image: Image, channels: int, slice_axis: int | None) -> npt.NDArray[np.float32]:
    """Scale and cut one image: `(c, *spatial)` -> `(n, c, h, w)` in [0, 1]; colour becomes luminance where `channels` is 1.

    Raises:
        DataError: as `to_slices`.
    """
    array = unit_range(image)
    if array.shape[0] == 3 and channels == 1:
        array = np.tensordot(np.array(LUMINANCE, dtype=np.float32), array, axes=1)[None]
    if array.ndim == 4 and slice_axis is None:
        raise DataError("is a volume, and cohort.toml has no slice_axis to cut it along")
    return np.moveaxis(array, slice_axis + 1, 0) if array.ndim == 4 and slice_axis is not None else array[None]


def unit_range(image: Image) -> npt.NDArray[np.float32]:
    """Return the values of `image` on the scale 0 to 1, as `load_images` describes; the shape stays.

    Raises:
        DataError: a value is NaN or infinite.
    """
    array = image.array
    if not np.isfinite(array).all():
        raise DataError("holds NaN or infinite values")
    low, high = float(array.min()), float(array.max())
    if low == high:
        return np.zeros_like(array)
    if image.bits == 8:
        low, high = 0.0, 255.0
    else:
        inner_low, inner_high = np.percentile(array, PERCENTILES)
        # A lesion on an empty background can be rarer than the percentiles reach: then the full range counts.
        low, high = (float(inner_low), float(inner_high)) if inner_high > inner_low else (low, high)
    return np.asarray(np.clip((array - low) / (high - low), 0.0, 1.0), dtype=np.float32)


def _resize(plane: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    from PIL import Image as Pillow

    if plane.shape == (size, size):
        return plane
    source = Pillow.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    # Bicubic weights are partly negative, so edges overshoot.
    return np.clip(np.asarray(source.resize((size, size), Pillow.Resampling.BICUBIC), dtype=np.float32), 0.0, 1.0)


def content_key(cohort: Cohort, size: int, channels: int, column: str, cache_dir: Path) -> str:
    """Return a digest of a cohort's files in `column`, of the settings and of how this module scales."""
    # How a second image lies depends on its first.
    columns = ("image",) if column == "image" else ("image", column)
    paths = [cohort.path(index, name) for name in columns for index in range(len(cohort.rows))]
    digests = content_digests(paths, cohort.folder, cache_dir)
    settings = [CACHE_FORMAT, size, channels, cohort.spec.slice_axis, PERCENTILES, LUMINANCE, "bicubic"]
    return hashlib.sha256(json.dumps([settings, digests]).encode()).hexdigest()


def content_digests(paths: Sequence[Path], folder: Path, cache_dir: Path) -> list[str]:
    """Return the SHA-256 of each image's bytes; a file whose size and times are those of the last look is not read again."""
    memo_file = cache_dir / f"seen-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    memo = _read_memo(memo_file)
    seen = dict(memo)
    digests = [_digest(path, seen) for path in paths]
    if seen != memo:
        with appears_whole(memo_file) as stream:
            stream.write(json.dumps(seen).encode())
    return digests


def cohort_contents(cohort: Cohort, cache_dir: Path) -> str:
    """Return one SHA-256 of all files that a cohort's rows name, masks too.

    Raises:
        DataError: a file cannot be read, or the cache folder cannot be written.
    """
    paths = [cohort.path(i, column) for column in PATH_COLUMNS for i, row in enumerate(cohort.rows) if row.value(column)]
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        digests = content_digests(paths, cohort.folder, cache_dir)
    except OSError as error:
        raise DataError(f"cache {cache_dir}: {error.strerror or error} ({error.filename})") from error
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _read_memo(path: Path) -> dict[str, list[Any]]:
    try:
        memo = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        log.warning("cache %s: damaged; the images are hashed again", path.name)
        return {}
    return memo if isinstance(memo, dict) else {}


def _digest(path: Path, seen: dict[str, list[Any]]) -> str:
    from omnifm.data.dicom import series_files

    if path.is_dir():
        return hashlib.sha256("".join(_digest(file, seen) for file in series_files(path)).encode()).hexdigest()
    try:
        stat = path.stat()
        known = seen.get(str(path))
        if known is not None and known[:-1] == _facts(stat):
            return str(known[-1])
        digest = sha256(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    # The suffix chooses the reader, so it is part of what the bytes mean.
    seen[str(path)] = [*_facts(stat), digest + path.suffix.lower()]
    return digest + path.suffix.lower()


def _facts(stat: os.stat_result) -> list[int]:
    """What changes whenever a file's content does. Copying tools set the time of modification; nobody sets that of change."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _build(cohort: Cohort, size: int, channels: int, column: str, base: Path, progress: Progress | None) -> None:
    counts: list[int] = []
    with appears_whole(_pixel_file(base)) as stream:
        _write_header(stream, (0, channels, size, size))
        for slices in _decoded(cohort, size, channels, column):
            stream.write(np.ascontiguousarray(slices, dtype="<f4").tobytes())
            counts.append(len(slices))
            if progress is not None:
                progress(len(counts), len(cohort.rows))
        end = stream.tell()
        stream.seek(0)
        # numpy leaves room in the header for the first axis to grow, so the rewritten header has the same length.
        _write_header(stream, (sum(counts), channels, size, size))
        if end - stream.tell() != 4 * sum(counts) * channels * size * size:
            raise DataError(f"cache {base}.npy: header and pixels do not fit")
    stat = _pixel_file(base).stat()
    digest = sha256(_pixel_file(base))
    record = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest, "slices_per_row": counts}
    with appears_whole(_record_file(base)) as stream:
        stream.write(json.dumps(record).encode())


def _write_header(stream: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _decoded(cohort: Cohort, size: int, channels: int, column: str) -> Iterator[npt.NDArray[np.float32]]:
    rows = Rows(cohort)

    def decode(index: int) -> npt.NDArray[np.float32]:
        try:
            return to_slices(rows.image(index, column), size, channels, cohort.spec.slice_axis)
        except DataError as error:
            raise DataError(f"cohort {cohort.name}: row '{cohort.rows[index].id}': {column} {error}") from error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In batches, so that no more than one batch of decoded images waits in memory.
        for start in range(0, len(cohort.rows), _BATCH):
            yield from pool.map(decode, range(start, min(start + _BATCH, len(cohort.rows))))


def _open(base: Path) -> CachedImages | None:
    """Return what is cached under `base`; None, after a warning, if it is damaged; None if there is nothing."""
    if not _record_file(base).exists():
        return None
    try:
        record = json.loads(_record_file(base).read_bytes())
        path = _pixel_file(base)
        stat = path.stat()
        if stat.st_size != record["size"]:
            raise ValueError("size differs")
        # Another time stamp: copied, rebuilt by another process, or tampered with. The content decides.
        if stat.st_mtime_ns != record["mtime_ns"] and sha256(path) != record["sha256"]:
            raise ValueError("content differs")
        pixels = np.lib.format.open_memmap(path, mode="r").view(PixelMap)
        slice_row = np.repeat(np.arange(len(record["slices_per_row"])), record["slices_per_row"]).astype(np.int64)
        if len(slice_row) != len(pixels) or 4 * math.prod(pixels.shape) > stat.st_size:
            raise ValueError("shape differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("cache %s: damaged (%s); it is built again", _pixel_file(base).name, error)
        return None
    return CachedImages(pixels, slice_row)


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pixel_file(base: Path) -> Path:
    return base.with_name(f"{base.name}.npy")


def _record_file(base: Path) -> Path:
    return base.with_name(f"{base.name}.json")


@contextmanager
def appears_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under `path` only once it is written to the end; on an error nothing is left."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", mode="w+b", delete=False) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        except BaseException:
            os.unlink(stream.name)
            raise
    os.replace(stream.name, path)
