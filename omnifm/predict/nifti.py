"""NIfTI files in the geometry of the image they are about.

A grid of other sizes over the same extent has its corners where they were. For n samples along an axis that become m,

    i = (j + 1/2) n / m - 1/2

is the old index of the new sample j, and A' = A @ S the new affine, S the matrix of these maps.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm.data.readers import Image

_COMMENT = 6  # NIfTI-1 extension code: plain text
_SCANNER = 1
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
Array = npt.NDArray[Any]


def write_mask(path: Path, mask: npt.NDArray[np.uint8], classes: Sequence[str], image: Image, source: Path | None) -> None:
    """Write class numbers, with the names as a JSON comment.

    Args:
        path: ends in .nii or .nii.gz.
        mask: `(*spatial)`, on the image's grid.
        classes: names of 0, 1, ...
        image: says the geometry where `source` does not.
        source: the NIfTI file whose affines, codes, voxel sizes and units are kept.
    """
    import nibabel

    header = _header(image, source)
    header.set_intent("label")
    names = json.dumps({"classes": list(classes)}, ensure_ascii=False)
    header.extensions.append(nibabel.nifti1.Nifti1Extension(_COMMENT, names.encode()))
    _save(path, mask, header)


def write_image(path: Path, found: npt.NDArray[np.float32], image: Image, source: Path | None) -> None:
    """Write a picture or volume `(c, *axes)` in [0, 1] over the extent of `image`: grey as float32, colours as 8-bit RGB."""
    header = _header(image, source)
    _stretch(header, image.array.shape[1:], found.shape[1:])
    if len(found) == 3:
        colours = np.rint(np.clip(np.moveaxis(found, 0, -1), 0, 1) * 255).astype(np.uint8)
        _save(path, np.ascontiguousarray(colours).view(_RGB)[..., 0], header)
    else:
        _save(path, found[0], header)


def _header(image: Image, source: Path | None) -> Any:
    """Return a header with the geometry of the source, and nothing else of it that could tell of a person."""
    import nibabel

    empty: Callable[[], Any] = nibabel.Nifti1Header
    header = empty()
    shape = image.array.shape[1:]
    header.set_data_shape(shape)
    if source is not None:
        old: Any = nibabel.Nifti1Image.from_filename(source).header
        geometry = ("pixdim", "xyzt_units", "qform_code", "sform_code", *(f"quatern_{axis}" for axis in "bcd"))
        for field in (*geometry, *(f"qoffset_{axis}" for axis in "xyz"), *(f"srow_{axis}" for axis in "xyz")):
            header[field] = old[field]
        return header
    header.set_zooms(image.spacing or (1.0,) * len(shape))
    if image.affine is not None:
        header.set_xyzt_units("mm")
        header.set_sform(image.affine, _SCANNER)
        header.set_qform(image.affine, _SCANNER)
    return header


def _stretch(header: Any, old: Sequence[int], new: Sequence[int]) -> None:
    """Let the header speak of `new` samples along each axis where there were `old`."""
    if tuple(old) == tuple(new):
        return
    ratio = np.ones(3)
    ratio[: len(old)] = np.array(old) / np.array(new)
    step = np.diag([*ratio, 1.0])
    step[:3, 3] = (ratio - 1) / 2
    (scanner, scanner_code), (aligned, aligned_code) = header.get_qform(coded=True), header.get_sform(coded=True)
    header.set_data_shape(new)
    header.set_zooms([zoom * r for zoom, r in zip(header.get_zooms(), ratio, strict=False)])
    if scanner is not None:
        header.set_qform(scanner @ step, int(scanner_code))
    if aligned is not None:
        header.set_sform(aligned @ step, int(aligned_code))


def _save(path: Path, array: Array, header: Any) -> None:
    import nibabel

    header.set_data_dtype(array.dtype)
    # No affine here: the header's own are kept, both of them, with their codes.
    make: Callable[[Array, None, Any], Any] = nibabel.Nifti1Image
    nibabel.save(make(array, None, header), path)
