"""Image files to arrays. Values are left as they are; `omnifm.data.cache` puts them on one scale."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm.errors import DataError

RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
_TIFF_SUFFIXES = (".tif", ".tiff")
SUFFIXES = (*NIFTI_SUFFIXES, ".dcm", *_TIFF_SUFFIXES, ".npy", *RASTER_SUFFIXES)
"""Endings of the names, in lower case, of all files that `read_image` reads."""
_GREY_MODES = {"1": "L", "L": "L", "LA": "L", "I;16": "I;16", "I;16L": "I;16", "I;16B": "I;16B", "I": "I", "F": "F"}
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
_MODE_BITS = {"1": 8, "L": 8, "LA": 8, "I": 32, "F": 32}


@dataclass(frozen=True, eq=False)
class Image:
    """A decoded image or volume.

    Attributes:
        array: `(c, *spatial)` float32, c 1 or 3, two or three spatial axes; 8-bit sources keep 0..255.
        spacing: millimetres between samples along each spatial axis, None where the file does not say.
        affine: `(4, 4)`, from the indices of the three spatial axes to millimetres right, anterior and superior (RAS+).
        bits: bits per value at the source: 8, 16 or 32, or what DICOM states (12, ...). 8 says that 255 is white; so NIfTI counts
            as 16 at least, and floating point as 32.
        place: of a flat image, the affine `(4, 4)` from (slice, row, column) to the same millimetres, where the file says it.
        by_columns: whether the first axis of a flat image runs along its columns, as NIfTI stores it, not down its rows.
    """

    array: npt.NDArray[np.float32]
    spacing: tuple[float, ...] | None
    affine: npt.NDArray[np.float64] | None
    bits: int
    place: npt.NDArray[np.float64] | None = None
    by_columns: bool = False


def read_image(path: Path) -> Image:
    """Read PNG, JPEG, BMP, TIFF, NPY, NIfTI or DICOM, or a folder of single-frame DICOM slices as one volume.

    Raises:
        DataError: the file is missing, of another kind, truncated, or has neither one nor three channels.
    """
    return _read(path)


def _read(path: Path, reader: Callable[[Path], Image] | None = None) -> Image:
    try:
        image = (reader or _reader(path))(path)
    except FileNotFoundError:
        raise DataError(f"{path.name}: file is missing") from None
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    # Decoders of damaged files raise what they like, SyntaxError (PNG), EOFError, zlib.error and struct.error among it.
    except Exception as error:
        raise _unreadable(path, error) from error
    if image.array.shape[0] not in (1, 3) or image.array.ndim not in (3, 4) or image.array.size == 0:
        raise DataError(f"{path.name}: shape {image.array.shape} is not one or three channels in two or three dimensions")
    return image


def read_mask(path: Path) -> npt.NDArray[np.int64]:
    """Read the values of a mask as they are stored, `(*spatial)`; raises what `read_mask_image` raises."""
    return np.asarray(read_mask_image(path).array[0], dtype=np.int64)


def read_mask_image(path: Path) -> Image:
    """Read a mask: whole numbers of shape `(1, *spatial)`, palette indices rather than colours where there is a palette.

    Raises:
        DataError: as `read_image`; or the values are colours or fractions.
    """
    if path.suffix.lower() in RASTER_SUFFIXES and path.is_file():
        indices = _palette_indices(path)
        if indices is not None:
            return indices
    image = _read(path, partial(_read_tiff, mask=True) if path.name.lower().endswith(_TIFF_SUFFIXES) else None)
    array = image.array
    if not np.array_equal(array, np.broadcast_to(array[:1], array.shape)):
        raise DataError(f"{path.name}: a mask holds class values, not colours")
    if not np.array_equal(array[0], np.rint(array[0])):
        raise DataError(f"{path.name}: a mask holds whole numbers, not fractions")
    return replace(image, array=array[:1])


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.name}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})")


def _reader(path: Path) -> Callable[[Path], Image]:
    name = path.name.lower()
    if name.endswith(NIFTI_SUFFIXES):
        return _read_nifti
    if path.is_dir() or name.endswith(".dcm"):
        return _read_dicom
    if name.endswith(_TIFF_SUFFIXES):
        return _read_tiff
    if name.endswith(".npy"):
        return _read_npy
    if name.endswith(RASTER_SUFFIXES):
        return _read_raster
    raise DataError("not a PNG, JPEG, TIFF, BMP, NPY, NIfTI (.nii, .nii.gz) or DICOM (.dcm) file")


def _read_dicom(path: Path) -> Image:
    from omnifm.data.dicom import read_dicom, read_series

    return Image(*(read_series(path) if path.is_dir() else read_dicom(path)))


def read_slice(path: Path) -> Image:
    """Read a `.dcm` file as `read_image` does, with an affine `(4, 4)` of (slice, row, column) also where it has one frame.

    Raises:
        DataError: as `read_image`.
    """
    found = read_image(path)
    return found if found.array.ndim == 4 else replace(found, affine=found.place)


def _read_raster(path: Path) -> Image:
    from PIL import Image as Pillow

    with Pillow.open(path) as source:
        return _from_pillow(_upright(source))


def _upright(source: Any) -> Any:
    """Return a picture as every viewer shows it: cameras store it as they were held, and say so beside the pixels (EXIF)."""
    from PIL import ImageOps

    if getattr(source, "n_frames", 1) > 1:
        return source
    source.load()
    try:
        return ImageOps.exif_transpose(source)
    # The pixels are sound. A camera's notes that cannot be read say nothing, to us as to a viewer.
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return source


def _from_pillow(source: Any) -> Image:
    frames = []
    for frame in range(getattr(source, "n_frames", 1)):
        source.seek(frame)
        grey = _GREY_MODES.get(source.mode)
        pixels = np.asarray(source.convert(grey or "RGB"), dtype=np.float32)
        frames.append(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0))
    bits = 16 if source.mode.startswith("I;16") else _MODE_BITS.get(source.mode, 8)
    return Image(frames[0] if len(frames) == 1 else np.stack(frames, axis=1), None, None, bits)


def _palette_indices(path: Path) -> Image | None:
    from PIL import Image as Pillow

    try:
        with Pillow.open(path) as source:
            indexed = source.mode in ("P", "1")
            return Image(np.asarray(_upright(source), dtype=np.float32)[None], None, None, 8) if indexed else None
    except FileNotFoundError:
        raise DataError(f"{path.name}: file is missing") from None
    except Exception as error:
        raise _unreadable(path, error) from error


def _read_tiff(path: Path, *, mask: bool = False) -> Image:
    import tifffile
    from PIL import Image as Pillow

    with tifffile.TiffFile(path) as source:
        page: Any = source.pages.first
        white_is_zero = page.photometric.name == "MINISWHITE"
        if mask and white_is_zero and page.bitspersample > 1:
            # As numbers 0 is the background, as a picture (ImageJ's inverting table) the largest number is.
            raise DataError("a mask in which 0 is shown white (TIFF MINISWHITE) can be read two ways: save it as PNG")
        turn = int(page.tags["Orientation"].value) if "Orientation" in page.tags else 1
        # Pillow carries LZW and JPEG decoders, which tifffile lacks, and knows other colours; tifffile keeps 16 bits per colour,
        # which Pillow does not.
        packed = page.compression.name not in ("NONE", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS")
        if not packed and page.photometric.name in ("MINISBLACK", "MINISWHITE", "RGB"):
            series = source.series[0]
            array = series.asarray()
            array = _inverted(array) if white_is_zero else array
            alpha = len(page.extrasamples) == 1 and page.extrasamples[0].name in ("ASSOCALPHA", "UNASSALPHA")
            axis = series.axes.find("S") if "S" in series.axes else series.axes.find("C")
            array = _channels_first(array, axis)
            array = _turned(array[:-1] if alpha else array, turn)
            return Image(array.astype(np.float32), None, None, _bits(array.dtype))
        # Pillow mixes up rows and columns of such a file.
        if turn > 4 and not packed:
            raise DataError("lies on its side (TIFF tag Orientation): save it upright")
    with Pillow.open(path) as frames:
        image = _from_pillow(frames)
    # Of grey with up to 8 bits Pillow makes what is seen; with 16 it leaves the numbers as they are.
    return replace(image, array=65535 - image.array) if white_is_zero and image.bits == 16 else image


def _turned(array: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Return `(..., h, w)` upright; TIFF 6.0, tag 274: which sides of the picture the first row and the first column are."""
    array = np.swapaxes(array, -2, -1) if orientation > 4 else array
    rows, columns = (slice(None, None, -1 if orientation in turned else 1) for turned in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return array[..., rows, columns]


def _inverted(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype.kind == "b":
        return ~array
    return np.iinfo(array.dtype).max - array if array.dtype.kind == "u" else array


def _channels_first(array: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Bring the channel axis (-1: none) to the front, drop further axes of length one."""
    array = array[None] if axis < 0 else np.moveaxis(array, axis, 0)
    long_axes = tuple(i for i in range(1, array.ndim) if array.shape[i] == 1)
    return np.squeeze(array, axis=long_axes) if array.ndim > 4 else array


def _bits(dtype: np.dtype[Any]) -> int:
    return 8 if dtype == np.uint8 else 32 if dtype.kind == "f" or dtype.itemsize > 2 else 16


def _read_npy(path: Path) -> Image:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise DataError("an .npy image must be an array of real numbers")
    coloured = array.ndim >= 3 and array.shape[-1] == 3
    return Image(_channels_first(array, array.ndim - 1 if coloured else -1).astype(np.float32), None, None, _bits(array.dtype))


def _read_nifti(path: Path) -> Image:
    import nibabel

    source: Any = nibabel.Nifti1Image.from_filename(path)
    if source.header.get_data_dtype().kind not in "uif":
        raise DataError("NIfTI of colours or complex numbers is not supported")
    plain = source.dataobj.slope == 1 and source.dataobj.inter == 0
    # NIfTI holds measurements, not shades for a screen: 8-bit values have no agreed white either.
    bits = max(_bits(source.header.get_data_dtype()), 16) if plain else 32
    array = np.asarray(source.dataobj, dtype=np.float32)
    array = array.reshape(array.shape[:3]) if array.ndim > 3 and array.size == np.prod(array.shape[:3]) else array
    if array.ndim > 3:
        raise DataError(f"NIfTI of shape {array.shape} holds a series: write one file per volume")
    millimetres = _MILLIMETRES.get(source.header.get_xyzt_units()[0], 1.0)
    spacing = tuple(float(step) * millimetres for step in source.header.get_zooms()[: array.ndim])
    # Both codes 0: the file does not say how it lies, and nibabel's answer is a guess.
    stated = array.ndim == 3 and (int(source.header["qform_code"]) or int(source.header["sform_code"]))
    affine = np.diag([millimetres] * 3 + [1.0]) @ np.asarray(source.affine, dtype=np.float64) if stated else None
    return Image(array[None], spacing, affine, bits, by_columns=array.ndim == 2)
