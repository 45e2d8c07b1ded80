"""DICOM pixel data and geometry. No other attribute is read, so no patient's attribute can reach an array or a message."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from omnifm.errors import DataError

_Affine = npt.NDArray[np.float64]
Pixels = tuple[npt.NDArray[np.float32], tuple[float, ...] | None, _Affine | None, int, _Affine | None]
"""Values, spacing, affine and bits as `readers.Image` has them, and the place of a single slice."""

_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness")
_SERIES = ("SeriesInstanceUID", "ImagePositionPatient", "NumberOfFrames", "SOPClassUID")
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_SEGMENTATION = _STORAGE + "66.4"
# Presentation states, registrations and segmentations, reports, documents, contours and plans (PS3.4 B.5).
_NO_PICTURES = tuple(_STORAGE + kind for kind in ("11.", "66", "88.", "104.", "481.3", "481.5"))
_PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit")
_PIXELS = (
    "SOPClassUID",
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"),
    *_PADDING,
    *("ModalityLUTSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor"),
    *("RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData"),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
# Slice gaps of one volume may differ by this share before a slice counts as missing.
_GAP_TOLERANCE = 0.1
_T = TypeVar("_T")
_REMEDY = {"slices": "keep one series per folder", "frames": "keep one volume per file"}


@dataclass(frozen=True)
class _Places:
    """Where slices lie, mm: the direction of rows and columns `(6,)`, the first pixel of each `(n, 3)`, what they are called."""

    orientation: _Affine
    positions: _Affine
    what: str


def read_dicom(path: Path) -> Pixels:
    """Read one `.dcm` file: an image `(c, rows, columns)`, or `(c, frames, rows, columns)` if it has several frames.

    Stored values become real ones (rescale slope and intercept or the modality table); MONOCHROME1 is turned over within the
    range its bits can hold, so that more is brighter; padding becomes as dark as the darkest pixel that is none; colours become
    RGB. Frames that state their places are put in their order along the normal.

    Returns:
        The array (float32), spacing in mm per spatial axis or None, affine (4, 4) to RAS+ mm for volumes or None, bits stored,
        and for a single slice the affine of (slice, row, column) or None.

    Raises:
        DataError: the file is not DICOM, has no pixels, is a segmentation, its frames are no regular volume, or its compression
            cannot be decoded here.
    """
    header = _load(path)
    if header.get("SOPClassUID") == _SEGMENTATION:
        raise DataError("is a DICOM segmentation, whose frames are segments: export it as NIfTI on the grid of its image")
    return _pixels(header)


def read_series(folder: Path) -> Pixels:
    """Read the single-frame slices among the `.dcm` files of a folder as one volume `(c, slices, rows, columns)`.

    Slices are put in the order of their position along the slice normal; file names do not matter. Reports, presentation states
    and segmentations that lie beside the slices are passed over.

    Raises:
        DataError: there are no slices, they do not belong to one regular volume, or one cannot be read.
    """
    files = series_files(folder)
    if not files:
        raise DataError("the folder holds no .dcm file")
    return read_slices(files)


def read_slices(files: Sequence[Path]) -> Pixels:
    """Read single-frame files as `read_series` does."""
    named = [(file, header) for file in files if is_slice(header := _told(file, _load, file))]
    headers = [header for _, header in named]
    if not headers:
        raise DataError("the folder holds no slice")
    lost = [file.name for file, h in named if "ImagePositionPatient" not in h or "ImageOrientationPatient" not in h]
    if lost:
        raise DataError(f"{lost[0]}: a slice states no position or orientation, so the slices cannot be put in order")
    places = _places([(h.ImageOrientationPatient, h.ImagePositionPatient) for h in headers], "slices")
    if len({header.get("SeriesInstanceUID", "") for header in headers}) > 1:
        raise DataError("the slices are of several series: keep one series per folder")
    order = along(places).argsort(kind="stable")
    slices = [_told(named[i][0], _pixels, headers[i]) for i in order]
    if not all(np.allclose(image[1] or 0, slices[0][1] or 0, rtol=1e-3) for image in slices):
        raise DataError("the slices have pixels of different sizes (PixelSpacing): keep one series per folder")
    if len({image[0].shape for image in slices}) > 1 or slices[0][0].ndim != 3:
        raise DataError("the slices differ in size or hold several frames: keep one series of single frames per folder")
    array = np.stack([image[0] for image in slices], axis=1)
    bits = max(image[3] for image in slices)
    return array, *_grid(places, slices[0][1], headers[0].get("SliceThickness")), bits, None


def _told(file: Path, read: Callable[[Any], _T], source: Any) -> _T:
    """Read one file of many, and say which one it is where it cannot be read."""
    try:
        return read(source)
    except DataError as error:
        raise DataError(f"{file.name}: {error}") from error
    # The text of a parser's error may hold a value of the file.
    except Exception as error:
        raise DataError(f"{file.name}: cannot be read ({type(error).__name__})") from None


def is_slice(header: Any) -> bool:
    """Whether a header is of a picture, or of one that is damaged; reports, presentation states and the like are none."""
    return not str(header.get("SOPClassUID", "")).startswith(_NO_PICTURES)


def slice_order(headers: Sequence[Any]) -> npt.NDArray[np.int64]:
    """Return in which order `read_slices` takes slices with these headers."""
    return along(_places([(h.ImageOrientationPatient, h.ImagePositionPatient) for h in headers], "slices")).argsort(kind="stable")


def frame_order(header: Any) -> npt.NDArray[np.int64] | None:
    """Return in which order `read_dicom` takes the frames of a file; None: as they are stored."""
    places = _frame_places(header)
    return None if places is None else along(places).argsort(kind="stable")


def _places(found: Sequence[tuple[Any, Any]], what: str) -> _Places:
    """Return orientation and positions of slices or frames. Raises DataError if they do not all lie alike."""
    orientations = np.array([orientation for orientation, _ in found], dtype=np.float64)
    if not np.allclose(orientations, orientations[0], atol=1e-3):
        raise DataError(f"the {what} have different orientations: {_REMEDY[what]}")
    return _Places(orientations[0], np.array([position for _, position in found], dtype=np.float64), what)


def along(places: _Places) -> npt.NDArray[np.float64]:
    """Return where slices lie along their normal, mm."""
    distance: npt.NDArray[np.float64] = places.positions @ np.cross(places.orientation[:3], places.orientation[3:])
    return distance


def _grid(places: _Places, in_plane: tuple[float, ...] | None, thickness: Any) -> tuple[tuple[float, ...] | None, _Affine | None]:
    """Return spacing and affine of a stack of slices. Raises DataError if they are not evenly spaced."""
    distance = along(places)
    order = distance.argsort(kind="stable")
    gap = _even_gap(distance[order], places.what)
    if in_plane is None:
        return None, None
    gap = gap or abs(float(thickness or 1.0))
    _require_one_row(places, distance, order, in_plane)
    step = (places.positions[order[-1]] - places.positions[order[0]]) / max(len(order) - 1, 1)
    affine = _affine(places.orientation, places.positions[order[0]], in_plane, step if len(order) > 1 else None, gap)
    return (gap, *in_plane), affine


def _require_one_row(places: _Places, distance: _Affine, order: npt.NDArray[np.int64], in_plane: tuple[float, ...]) -> None:
    """Raise DataError unless all slices begin on one straight line; it need not be their normal (a tilted gantry)."""
    first, last = order[0], order[-1]
    share = (distance - distance[first]) / max(distance[last] - distance[first], 1e-9)
    line = places.positions[first] + share[:, None] * (places.positions[last] - places.positions[first])
    aside = float(np.linalg.norm(places.positions - line, axis=1).max())
    if aside > min(in_plane) / 2:
        raise DataError(f"the {places.what} do not lie in one row, one is {aside:.1f} mm aside: {_REMEDY[places.what]}")


def _place(header: Any) -> _Affine | None:
    """Return the affine `(4, 4)` of (slice, row, column) of a single slice; None where it does not say how it lies."""
    orientation, position = (list(header.get(key) or ()) for key in ("ImageOrientationPatient", "ImagePositionPatient"))
    if len(orientation) != 6 or len(position) != 3:
        return None
    return _grid(_places([(orientation, position)], "slices"), _measures(header)[0], header.get("SliceThickness"))[1]


def _frame_places(header: Any) -> _Places | None:
    """Return the places of a file's frames; None where one does not state it (PS3.3 C.7.6.16.2.3 and .4)."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    found = []
    for frame in frames:
        plane = frame.get("PlanePositionSequence")
        orientation = frame.get("PlaneOrientationSequence") or shared.get("PlaneOrientationSequence")
        if not plane or not orientation:
            return None
        found.append((orientation[0].ImageOrientationPatient, plane[0].ImagePositionPatient))
    return _places(found, "frames") if len(found) > 1 else None


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
        if not is_slice(header):
            continue
        if "ImagePositionPatient" not in header or int(header.get("NumberOfFrames") or 1) > 1:
            return False
        series.append(header.get("SeriesInstanceUID", ""))
    return len(series) > 1 and len({uid for uid in series if uid is not None}) == 1


def series_files(folder: Path) -> list[Path]:
    """Return the `.dcm` files directly in a folder, by name; hidden ones are none of them."""
    entries = (file for file in folder.iterdir() if file.suffix.lower() == ".dcm" and not file.name.startswith("."))
    return sorted(file for file in entries if file.is_file())


def _load(path: Path) -> Any:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        # The number of a series is looked at, and goes nowhere.
        return pydicom.dcmread(path, specific_tags=["SeriesInstanceUID", *_PIXELS, *_GEOMETRY])
    except InvalidDicomError:
        raise DataError("not a DICOM file (no DICM prefix)") from None


def _pixels(header: Any) -> Pixels:
    stored = _stored(header)
    frames = int(header.get("NumberOfFrames") or 1)
    colour = int(header.get("SamplesPerPixel", 1)) == 3 or header.PhotometricInterpretation == "PALETTE COLOR"
    stored = stored.reshape((frames, *stored.shape[-3 if colour else -2 :]))
    bits = 32 if "PixelData" not in header else int(header.BitsStored)
    if "PixelData" in header and int(header.get("HighBit", bits - 1)) != bits - 1:
        raise DataError("its values are not in the lowest bits (HighBit), as they were long ago: convert it")
    if colour:
        array = np.moveaxis(stored, -1, 0).astype(np.float32)
        bits = 8 if stored.dtype == np.uint8 else 16
    else:
        array, rescaled = _rescaled(stored, header, bits)
        array = array[None]
        # 8 bits say that 0 is black and 255 white; signed values have neither.
        bits = max(bits, 16) if rescaled or header.get("PixelRepresentation") else bits
    if frames == 1:
        return array[:, 0], _measures(header)[0], None, bits, _place(header)
    in_plane, gap, thickness = _measures(header)
    places = _frame_places(header)
    if places is not None and len(places.positions) == frames:
        return array[:, along(places).argsort(kind="stable")], *_grid(places, in_plane, thickness), bits, None
    gap = gap or thickness
    return array, (gap, *in_plane) if gap and in_plane else None, None, bits, None


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

    if "PixelData" in header and "PixelPaddingValue" in header:
        stored = _unpadded(stored, header)
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
    if "ModalityLUTSequence" in header:
        real = apply_modality_lut(stored, header).astype(np.float32)
    else:
        slope, intercept = float(header.get("RescaleSlope") or 1), float(header.get("RescaleIntercept") or 0)
        real = (stored * slope + intercept).astype(np.float32)
    return real, not np.array_equal(real, stored)


def _unpadded(stored: npt.NDArray[Any], header: Any) -> npt.NDArray[Any]:
    """Return the stored values with padding (PS3.3 C.7.5.1.1.2) as dark as the darkest pixel that is none.

    It says where nothing was measured, mostly by a number far from all that was, and would set the scale of the picture.
    """
    ends = sorted(_as_stored(header[key].value, header) for key in _PADDING if key in header)
    padding = (stored >= ends[0]) & (stored <= ends[-1])
    if not padding.any() or padding.all():
        return stored
    seen = stored[~padding]
    return np.where(padding, seen.max() if header.PhotometricInterpretation == "MONOCHROME1" else seen.min(), stored)


def _as_stored(value: Any, header: Any) -> int:
    """Return a padding value as a pixel has it: files write it signed or unsigned, or leave that open."""
    number = int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
    size: int = 2 ** int(header.BitsAllocated)
    return (number + size // 2) % size - size // 2 if int(header.PixelRepresentation) else number % size


def _rescale_group(item: Any) -> tuple[float, float] | None:
    group = item.get("PixelValueTransformationSequence")
    return (float(group[0].RescaleSlope), float(group[0].RescaleIntercept)) if group else None


def _measures(header: Any) -> tuple[tuple[float, ...] | None, float, float]:
    """Return in mm the distances of rows and columns (None: not stated), of slices, and their thickness (0: not stated)."""
    measures = header
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        first = (header.get(groups) or [{}])[0]
        measures = (first.get("PixelMeasuresSequence") or [measures])[0]
    in_plane = tuple(float(step) for step in measures.PixelSpacing) if measures.get("PixelSpacing") else None
    # Nuclear medicine writes a negative distance where slices run the other way.
    gap, thickness = (abs(float(measures.get(key) or 0)) for key in ("SpacingBetweenSlices", "SliceThickness"))
    return in_plane, gap, thickness


def _even_gap(along: npt.NDArray[np.float64], what: str) -> float:
    """Return the distance between slices (mm) at sorted positions, 0 for a single slice."""
    gaps = np.diff(along)
    if len(gaps) == 0:
        return 0.0
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        raise DataError(f"two {what} lie at the same position: {_REMEDY[what]}")
    if np.abs(gaps - usual).max() > _GAP_TOLERANCE * usual:
        raise DataError(f"the {what} are not evenly spaced (gaps of {gaps.min():.2f} to {gaps.max():.2f} mm): is one missing?")
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
