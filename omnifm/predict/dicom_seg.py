"""Masks as DICOM Segmentation objects (PS3.3 A.51), written by highdicom.

An object takes patient, study, frame of reference and the place of every frame from the images that the mask was made of, and
refers to them. It is for the archive that these images came from, and as confidential as they are.
"""

import hashlib
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm import __version__
from omnifm.data.dicom import frame_order, is_slice, series_files, slice_order
from omnifm.errors import ConfigError, DataError

_SCHEME = "99OMNIFM"  # 99...: a coding scheme of one's own (PS3.3 8.2)
_LONGEST = 64  # characters of a value of type LO
_SERIES_NUMBER = 9000
# Attributes that every object has, though perhaps empty (type 2); exports often lack them.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


def write_seg(path: Path, source: Path, mask: npt.NDArray[np.uint8], classes: Sequence[str], made_by: Mapping[str, Any]) -> None:
    """Write a mask as a binary segmentation with a segment for every class but background.

    Args:
        path: of the object.
        source: the DICOM file, or the folder of one series, that the mask was made of.
        mask: `(rows, columns)` or `(slices, rows, columns)` class numbers, slices in the order of `read_series`.
        classes: names of 0, 1, ...
        made_by: `config_hash`, `client` and `rounds` of the model.

    Raises:
        ConfigError: highdicom is not installed.
        DataError: the source lacks what a segmentation must refer to.
    """
    try:
        import highdicom
    except ModuleNotFoundError:
        raise ConfigError("masks of DICOM images need the extra: pip install 'omnifm[dicom]'") from None

    images = _sources(source)
    if mask.ndim == 3 and len(images) == 1 and "FrameOfReferenceUID" not in images[0]:
        raise DataError("has several frames and no frame of reference: a DICOM segmentation cannot say where its frames belong")
    mask = _as_stored(mask, images[0]) if len(images) == 1 else mask
    model = f"{made_by['config_hash']}/{made_by['client']}/{made_by['rounds']}"
    series = images[0].SeriesInstanceUID
    content = hashlib.sha256(mask.tobytes()).hexdigest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote the values they are about
            found = highdicom.seg.Segmentation(
                source_images=images,
                pixel_array=mask,
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[_segment(number, name) for number, name in enumerate(classes) if number],
                series_instance_uid=_uid(series, model),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=_uid(*(image.SOPInstanceUID for image in images), model, content),
                instance_number=1,
                manufacturer="omnifm",
                manufacturer_model_name="omnifm predict",
                software_versions=__version__,
                device_serial_number=str(made_by["config_hash"])[:_LONGEST],
                series_description=f"omnifm, model of {made_by['client']}"[:_LONGEST],
                content_label="SEGMENTATION",
                specific_character_set="ISO_IR 192",
            )
    # What highdicom and pydicom raise for an object that lacks something differs by what it is.
    except (ValueError, AttributeError, TypeError, KeyError, RuntimeError) as error:
        # Their text may hold a patient's attributes, and this line goes into a log and a file.
        problem = f"{type(error).__name__}; an attribute of patient or study may be malformed"
        raise DataError(f"a DICOM segmentation cannot refer to it ({problem})") from None
    found.save_as(path)


def _sources(source: Path) -> list[Any]:
    """Return the headers of the source, all attributes but the pixels, in the order of the mask's slices."""
    import pydicom

    files = series_files(source) if source.is_dir() else [source]
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    images = [header for header in headers if is_slice(header)]
    if lost := [keyword for image in images for keyword in _NEEDED if keyword not in image]:
        raise DataError(f"has no {lost[0]}, which a DICOM segmentation must refer to")
    for image in images:
        for keyword in _MAY_BE_EMPTY:
            if keyword not in image:
                setattr(image, keyword, "")
    return [images[place] for place in slice_order(images)] if source.is_dir() else images


def _as_stored(mask: npt.NDArray[np.uint8], header: Any) -> npt.NDArray[np.uint8]:
    """Return the mask of one file as the file holds its frames; a volume of one slice is a slice."""
    if mask.ndim == 2 or len(mask) == 1:
        return mask.reshape(mask.shape[-2:])
    order = frame_order(header)
    if order is None or len(order) != len(mask):
        return mask
    stored = np.empty_like(mask)
    stored[order] = mask
    return stored


def _segment(number: int, name: str) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    label = name[:_LONGEST]
    # What a cohort calls its classes is in no dictionary: the same name has the same code, and its meaning is the name.
    code = highdicom.sr.CodedConcept(hashlib.sha256(name.encode()).hexdigest()[:12], _SCHEME, label)
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=code,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="omnifm", family=codes.DCM.ArtificialIntelligence, version=__version__
        ),
    )


def _uid(*parts: str) -> str:
    """Return a UID that is a function of `parts`: the same mask of the same images by the same model is the same object."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(parts)).int}"
