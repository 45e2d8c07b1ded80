"""DICOM pixel data and geometry. No other attribute is read, so no patient's attribute can reach an array or a message."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm.errors import DataError

Pixels = tuple[npt.NDArray[np.float32], tuple[float, ...] | None, npt.NDArray[np.float64] | None, int]

_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness")
_SERIES = ("SeriesInstanceUID", "ImagePositionPatient", "NumberOfFrames")
_PIXELS = (
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"),
    *("ModalityLUTSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor"),
    *("RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData"),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
# Slice gaps of one volume may differ by this share before a slice counts as missing.
_GAP_TOLERANCE = 0.1


def read_dicom(path: Path) -> Pixels:
    """Read one `.dcm` file: an image `(c, rows, columns)`, or `(c, frames, rows, columns)` if it has several frames.

    Stored values become real ones (rescale slope and intercept or the modality table); MONOCHROME1 is turned over within the
    range its bits can hold, so that more is brighter; colours become RGB.

    Returns:
        The array (float32), spacing in mm per spatial axis or None, affine (4, 4) to RAS+ mm for volumes or None, bits stored.

    Raises:
        DataError: the file is not DICOM, has no pixels, or its compression cannot be decoded here.
    """
    return _pixels(_load(path))


def read_series(folder: Path) -> Pixels:
    """Read a folder of single-frame `.dcm` files as one volume `(c, slices, rows, columns)`.

    Slices are put in the order of their position along the slice normal; file names do not matter.

    Raises:
        DataError: there are no slices, they do not belong to one regular volume, or one cannot be read.
    """
    files = series_files(folder)
    if not files:
        raise DataError("the folder holds no .dcm file")
    headers = [_load(file) for file in files]
    if any("ImagePositionPatient" not in h or "ImageOrientationPatient" not in h for h in headers):
        raise DataError("a slice states no position or orientation, so the slices cannot be put in order")
    first = headers[0]
    orientation = np.array(first.ImageOrientationPatient, dtype=np.float64)
    if any(not np.allclose(np.array(h.ImageOrientationPatient, dtype=np.float64), orientation, atol=1e-3) for h in headers):
        raise DataError("the slices have different orientations: keep one series per folder")
    positions = np.array([h.ImagePositionPatient for h in headers], dtype=np.float64)
    along = along_normal(headers)
    order = np.argsort(along, kind="stable")
    gap = _even_gap(along[order])
    slices = [_pixels(headers[i]) for i in order]
    if len({image[0].shape for image in slices}) > 1 or slices[0][0].ndim != 3:
        raise DataError("the slices differ in size or hold several frames: keep one series of single frames per folder")
    array = np.stack([image[0] for image in slices], axis=1)
    in_plane = slices[0][1]
    if in_plane is None:
        return array, None, None, slices[0][3]
    gap = gap or float(first.get("SliceThickness") or 1.0)
    step = (positions[order[-1]] - positions[order[0]]) / max(len(order) - 1, 1)
    affine = _affine(orientation, positions[order[0]], in_plane, step if len(order) > 1 else None, gap)
    return array, (gap, *in_plane), affine, max(image[3] for image in slices)


def along_normal(headers: Sequence[Any]) -> npt.NDArray[np.float64]:
    """Return where slices lie along the normal of the first, mm. Ascending, it is the order of `read_series`."""
    orientation = np.array(headers[0].ImageOrientationPatient, dtype=np.float64)
    positions = np.array([header.ImagePositionPatient for header in headers], dtype=np.float64)
    distance: npt.NDArray[np.float64] = positions @ np.cross(orientation[:3], orientation[3:])
    return distance


def is_series(folder: Path) -> bool:
    """Whether a folder holds several `.dcm` files that state one series, and their place in it. Damaged files do not count."""
    import pydicom

    # The number of a series is looked at, and goes nowhere.
    series: list[Any] = []
    for file in series_files(folder):
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_SERIES))
        # As `pixel_array`, the parser of damaged files raises what it likes. Who reads the series will say what is wrong.
        except Exception:
            series.append(None)
            continue
        if "ImagePositionPatient" not in header or int(header.get("NumberOfFrames") or 1) > 1:
            return False
        series.append(header.get("SeriesInstanceUID", ""))
    return len(series) > 1 and len({uid for uid in series if uid is not None}) == 1


def series_files(folder: Path) -> list[Path]:
    """Return the `.dcm` files directly in a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".dcm" and file.is_file())


def _load(path: Path) -> Any:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        return pydicom.dcmread(path, specific_tags=[*_PIXELS, *_GEOMETRY])
    except InvalidDicomError:
        raise DataError("not a DICOM file (no DICM prefix)") from None


def _pixels(header: Any) -> Pixels:
    stored = _stored(header)
    frames = int(header.get("NumberOfFrames") or 1)
    colour = int(header.get("SamplesPerPixel", 1)) == 3 or header.PhotometricInterpretation == "PALETTE COLOR"
    stored = stored.reshape((frames, *stored.shape[-3 if colour else -2 :]))
    bits = 32 if "PixelData" not in header else int(header.BitsStored)
    if colour:
        array = np.moveaxis(stored, -1, 0).astype(np.float32)
        bits = 8 if stored.dtype == np.uint8 else 16
    else:
        array, rescaled = _rescaled(stored, header, bits)
        array = array[None]
        bits = max(bits, 16) if rescaled else bits
    spacing, affine = _geometry(header, frames)
    return array if frames > 1 else array[:, 0], spacing, affine, bits


def _stored(header: Any) -> npt.NDArray[Any]:
    from pydicom.pixels.processing import apply_color_lut

    try:
        pixels = header.pixel_array
        return apply_color_lut(pixels, header) if header.PhotometricInterpretation == "PALETTE COLOR" else pixels
    # What pydicom's and other decoders raise differs by transfer syntax and by damage.
    except Exception as error:
        syntax = header.file_meta.get("TransferSyntaxUID")
        named = f", compression {syntax.name}" if syntax is not None else ""
        raise DataError(f"pixel data cannot be decoded ({type(error).__name__}{named})") from None


def _rescaled(stored: npt.NDArray[Any], header: Any, bits: int) -> tuple[npt.NDArray[np.float32], bool]:
    """Apply slope and intercept, per frame where the file states them so; tell whether that changed anything."""
    from pydicom.pixels.processing import apply_modality_lut

    if header.PhotometricInterpretation == "MONOCHROME1" and "PixelData" in header:
        signed = int(header.PixelRepresentation)
        # The two ends of the range that the bits can hold change places: unsigned 0 and 2^b - 1, signed -2^(b-1) and 2^(b-1) - 1.
        stored = (-1 if signed else 2**bits - 1) - stored.astype(np.int64)
    groups = [_rescale_group(item) for item in header.get("PerFrameFunctionalGroupsSequence") or []]
    if not any(groups):
        groups = [_rescale_group(item) for item in header.get("SharedFunctionalGroupsSequence") or []] * len(stored)
    if len(groups) == len(stored) and all(groups):
        factors = np.array([group for group in groups if group], dtype=np.float64).reshape(-1, 2, 1, 1)
        return (stored * factors[:, 0] + factors[:, 1]).astype(np.float32), bool((factors != [[[1]], [[0]]]).any())
    if "ModalityLUTSequence" not in header and "RescaleSlope" not in header:
        return stored.astype(np.float32), False
    real = apply_modality_lut(stored, header).astype(np.float32)
    return real, not np.array_equal(real, stored)


def _rescale_group(item: Any) -> tuple[float, float] | None:
    group = item.get("PixelValueTransformationSequence")
    return (float(group[0].RescaleSlope), float(group[0].RescaleIntercept)) if group else None


def _geometry(header: Any, frames: int) -> tuple[tuple[float, ...] | None, npt.NDArray[np.float64] | None]:
    measures = header
    for item in header.get("SharedFunctionalGroupsSequence") or []:
        measures = (item.get("PixelMeasuresSequence") or [header])[0]
    if not measures.get("PixelSpacing"):
        return None, None
    in_plane = tuple(float(step) for step in measures.PixelSpacing)
    if frames == 1:
        return in_plane, None
    gap = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness")
    return ((float(gap), *in_plane), None) if gap else (None, None)


def _even_gap(along: npt.NDArray[np.float64]) -> float:
    """Return the distance between slices (mm) at sorted positions, 0 for a single slice."""
    gaps = np.diff(along)
    if len(gaps) == 0:
        return 0.0
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        raise DataError("two slices lie at the same position: keep one series per folder")
    if np.abs(gaps - usual).max() > _GAP_TOLERANCE * usual:
        raise DataError(f"the slices are not evenly spaced (gaps of {gaps.min():.2f} to {gaps.max():.2f} mm): is one missing?")
    return float(gaps.mean())


def _affine(
    orientation: npt.NDArray[np.float64],
    origin: npt.NDArray[np.float64],
    in_plane: tuple[float, ...],
    step: npt.NDArray[np.float64] | None,
    gap: float,
) -> npt.NDArray[np.float64]:
    """Return the affine of array axes (slice, row, column); DICOM's left and posterior become RAS+ (PS3.3 C.7.6.2.1.1)."""
    along_row, along_column = orientation[:3], orientation[3:]
    affine = np.eye(4)
    affine[:3, 0] = step if step is not None else np.cross(along_row, along_column) * gap
    affine[:3, 1] = along_column * in_plane[0]
    affine[:3, 2] = along_row * in_plane[1]
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
