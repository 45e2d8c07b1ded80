"""Images in the formats of hospitals, with geometry that no shortcut gets right: oblique, anisotropic, out of order."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

# A plane that is turned about two axes; rows and columns are orthogonal unit vectors in LPS.
ALONG_ROW = np.array([0.8, 0.48, -0.36])
ALONG_COLUMN = np.array([0.0, 0.6, 0.8])
NORMAL = np.cross(ALONG_ROW, ALONG_COLUMN)
ORIGIN = np.array([-31.5, 12.25, 104.0])
SPACING, GAP = (0.75, 1.25), 3.5  # between rows, between columns, between slices


def rotated_affine() -> np.ndarray:
    """Return an affine that turns, flips and stretches: no axis of the array runs along an axis of the patient."""
    a, b, c = 0.3, -0.7, 1.1
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = x @ y @ z @ np.diag([-0.5, 0.9, 2.5])
    affine[:3, 3] = (12.5, -40.0, 7.75)
    return affine


def write_nifti(path: Path, array: np.ndarray, *, qform: int = 1, sform: int = 2, second: np.ndarray | None = None) -> Path:
    """Write a volume with both affines; `second` is the sform where it differs. The description names a patient."""
    image = nibabel.Nifti1Image(array, None)
    image.set_qform(rotated_affine(), qform)
    image.set_sform(rotated_affine() if second is None else second, sform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"Secret Patient"
    nibabel.save(image, path)
    return path


def dicom(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    """Write one CT slice of a patient; a tag that is None is left out."""
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", CTImageStorage)
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    known: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "PatientName": "Müller^Zoë",
        "PatientID": "4711",
        "PatientBirthDate": "19700101",
        "PatientSex": "F",
        "StudyInstanceUID": "1.2.3.1",
        "SeriesInstanceUID": "1.2.3.2",
        "FrameOfReferenceUID": "1.2.3.3",
        "StudyID": "s",
        "StudyDate": "20200101",
        "StudyTime": "101500",
        "AccessionNumber": "a1",
        "Modality": "CT",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PixelData": pixels.astype(np.uint16).tobytes(),
    }
    for tag, value in {**known, **tags}.items():
        if value is not None:
            setattr(file, tag, value)
    file.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, volume: np.ndarray, order: tuple[int, ...], **tags: Any) -> Path:
    """Write `volume` `(slices, rows, columns)` as slices along `NORMAL`; `order[k]` is the slice in the k-th file by name."""
    folder.mkdir(parents=True)
    for k, place in enumerate(order):
        geometry: dict[str, Any] = {
            "ImageOrientationPatient": [*ALONG_ROW, *ALONG_COLUMN],
            "ImagePositionPatient": [float(f"{v:.6f}") for v in ORIGIN + place * GAP * NORMAL],
            "PixelSpacing": list(SPACING),
            "SliceThickness": 2.0,  # thinner than the gap: not what the distance is
            "InstanceNumber": k + 1,
        }
        dicom(folder / f"IM{k}.dcm", volume[place], **(geometry | tags))
    return folder


def position(place: int, row: int, column: int) -> np.ndarray:
    """Return where a voxel's centre is in the patient, LPS mm: PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1."""
    return ORIGIN + place * GAP * NORMAL + column * SPACING[1] * ALONG_ROW + row * SPACING[0] * ALONG_COLUMN
