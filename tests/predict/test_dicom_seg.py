"""DICOM segmentations, read back with pydicom alone: every voxel lies where the source says, for the patient it says."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import DigitalXRayImageStorageForPresentation, EnhancedCTImageStorage, SecondaryCaptureImageStorage

from omnifm.data.dicom import is_series
from omnifm.data.readers import read_image
from omnifm.errors import ConfigError, DataError
from omnifm.predict.writers import OutFolder, write_answer
from omnifm.tasks.base import Answer
from tests.data.test_dicom import item
from tests.predict.files import ALONG_COLUMN, ALONG_ROW, GAP, ORIGIN, SPACING, dicom, position, series

CLASSES = ("background", "Läsion λ", "edema", "absent")
MADE_BY = {"config_hash": "ab" * 32, "client": "c-0", "rounds": 3}
SHAPE = (5, 6, 4)  # slices, rows, columns
# Values that tell slice, row and column, so that a mask made of them shows every confusion of axes.
VOLUME = np.arange(np.prod(SHAPE)).reshape(SHAPE)


def label(volume: np.ndarray) -> np.ndarray:
    """Return a mask that no flip and no swap leaves as it is; slice 2 is empty."""
    mask = np.where(volume % 7 == 0, 1, np.where(volume % 5 == 0, 2, 0)).astype(np.uint8)
    if mask.ndim == 3:
        mask[2] = 0
    return mask


def write(out: Path, source: Path, mask: np.ndarray | None = None) -> Any:
    image = read_image(source)
    mask = label(image.array[0].astype(int)) if mask is None else mask
    found = write_answer(OutFolder(out), "x", source, image, Answer({}, mask, CLASSES), MADE_BY)
    assert found == {"mask": "x-mask.dcm"}
    return pydicom.dcmread(out / "x-mask.dcm")


def voxels(seg: Any) -> dict[tuple[float, ...], int]:
    """Return the class at every place in the patient (LPS mm, rounded) that the object marks."""
    frames = seg.pixel_array.reshape((-1, seg.Rows, seg.Columns))
    shared = seg.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    down, across = (float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing)
    found: dict[tuple[float, ...], int] = {}
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        origin = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for row, column in np.argwhere(frame):
            place = origin + column * across * orientation[:3] + row * down * orientation[3:]
            key = tuple(np.round(place, 2).tolist())
            assert key not in found, "segments overlap"
            found[key] = number
    return found


def test_every_voxel_lies_where_the_source_has_it(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", VOLUME, (3, 0, 4, 2, 1))
    assert is_series(folder)
    seg = write(tmp_path / "out", folder)
    mask = label(VOLUME)
    expected = {tuple(np.round(position(*index), 2).tolist()): int(mask[tuple(index)]) for index in np.argwhere(mask)}
    assert voxels(seg) == expected
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices == pytest.approx(GAP)
    # The affine of the reader, RAS+, says the same.
    affine = read_image(folder).affine
    assert affine is not None
    for index in np.argwhere(mask)[:5]:
        ras = affine @ np.array([*index, 1])
        assert tuple(np.round(ras[:3] * (-1, -1, 1), 2).tolist()) in expected


def test_frames_refer_to_the_slices_they_were_made_of(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", VOLUME, (3, 0, 4, 2, 1))
    place_of = {}
    for file in folder.iterdir():
        source = pydicom.dcmread(file)
        place_of[source.SOPInstanceUID] = [float(v) for v in source.ImagePositionPatient]
    seg = write(tmp_path / "out", folder)
    for group in seg.PerFrameFunctionalGroupsSequence:
        uid = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert [float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient] == pytest.approx(place_of[uid])


def test_patient_study_and_frame_of_reference_are_the_sources(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", VOLUME, (0, 1, 2, 3, 4))
    seg, source = write(tmp_path / "out", folder), pydicom.dcmread(folder / "IM0.dcm")
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert str(seg[keyword].value) == str(source[keyword].value)
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert (seg.Modality, seg.SegmentationType, seg.SegmentsOverlap) == ("SEG", "BINARY", "NO")
    segments = {int(s.SegmentNumber): s for s in seg.SegmentSequence}
    assert {n: s.SegmentLabel for n, s in segments.items()} == {1: "Läsion λ", 2: "edema", 3: "absent"}
    assert {s.SegmentAlgorithmType for s in segments.values()} == {"AUTOMATIC"}
    assert segments[1].SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99OMNIFM"


def test_the_same_mask_is_the_same_object_and_another_one_is_not(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", VOLUME, (0, 1, 2, 3, 4))
    first, second = (write(tmp_path / f"out{k}", folder) for k in range(2))
    third = write(tmp_path / "out3", folder, np.ones(SHAPE, np.uint8))
    assert first.SOPInstanceUID == second.SOPInstanceUID != third.SOPInstanceUID
    assert first.SeriesInstanceUID == third.SeriesInstanceUID


def test_nothing_found_is_an_object_too(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", VOLUME, (0, 1, 2, 3, 4))
    seg = write(tmp_path / "out", folder, np.zeros(SHAPE, np.uint8))
    assert voxels(seg) == {}


def test_a_single_slice_and_a_film_without_a_place(tmp_path: Path) -> None:
    plane = VOLUME[1]
    orientation = {"ImageOrientationPatient": [*ALONG_ROW, *ALONG_COLUMN], "ImagePositionPatient": [*ORIGIN]}
    path = dicom(tmp_path / "one.dcm", plane, PixelSpacing=list(SPACING), SliceThickness=2.0, **orientation)
    mask = label(plane)
    expected = {tuple(np.round(position(0, *index), 2).tolist()): int(mask[tuple(index)]) for index in np.argwhere(mask)}
    assert voxels(write(tmp_path / "a", path)) == expected
    film = {"SOPClassUID": DigitalXRayImageStorageForPresentation, "FrameOfReferenceUID": None, "Modality": "DX"}
    path = dicom(tmp_path / "film.dcm", plane, **film)
    seg = write(tmp_path / "b", path)
    by_segment = {
        int(g.SegmentIdentificationSequence[0].ReferencedSegmentNumber): frame
        for g, frame in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True)
    }
    for number, frame in by_segment.items():
        np.testing.assert_array_equal(frame, mask == number)
    assert set(by_segment) == {1, 2}


def test_frames_of_one_file_are_marked_where_they_are_whatever_their_order(tmp_path: Path) -> None:
    order = (3, 0, 4, 1, 2)
    place = [item(PlanePositionSequence=[item(ImagePositionPatient=position(k, 0, 0).round(6).tolist())]) for k in order]
    shared = item(PlaneOrientationSequence=[item(ImageOrientationPatient=[*ALONG_ROW, *ALONG_COLUMN])])
    shared.PixelMeasuresSequence = [item(PixelSpacing=list(SPACING), SliceThickness=2.0)]
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": place}
    path = dicom(tmp_path / "e.dcm", VOLUME[list(order)], SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=5, **groups)
    np.testing.assert_array_equal(read_image(path).array[0], VOLUME)
    mask = label(VOLUME)
    expected = {tuple(np.round(position(*index), 2).tolist()): int(mask[tuple(index)]) for index in np.argwhere(mask)}
    assert voxels(write(tmp_path / "out", path)) == expected


def test_a_malformed_attribute_of_the_patient_is_told_without_its_value(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", VOLUME, (0, 1, 2, 3, 4))
    for file in folder.iterdir():
        sloppy = pydicom.dcmread(file)
        with pydicom.config.disable_value_validation():
            sloppy["PatientBirthDate"]._value = "1950-03-07 Smith"
            sloppy.save_as(file)
    with pytest.raises(DataError, match="an attribute of patient or study may be malformed") as caught:
        write(tmp_path / "out", folder)
    assert "Smith" not in str(caught.value) and caught.value.__cause__ is None


def test_exports_that_lack_what_may_be_empty_are_fine_and_what_may_not_be_is_one_line(tmp_path: Path) -> None:
    bare = dict.fromkeys(("PatientID", "PatientSex", "StudyID", "StudyDate", "AccessionNumber", "PatientName"))
    folder = series(tmp_path / "bare", VOLUME, (0, 1, 2, 3, 4), **bare)
    assert write(tmp_path / "a", folder).PatientID == ""
    folder = series(tmp_path / "anonymous", VOLUME, (0, 1, 2, 3, 4), StudyInstanceUID=None)
    with pytest.raises(DataError, match="has no StudyInstanceUID, which a DICOM segmentation must refer to"):
        write(tmp_path / "b", folder)
    capture = {"SOPClassUID": SecondaryCaptureImageStorage, "FrameOfReferenceUID": None, "NumberOfFrames": 5}
    path = dicom(tmp_path / "cine.dcm", VOLUME, **capture)
    with pytest.raises(DataError, match="has several frames and no frame of reference"):
        write(tmp_path / "c", path)
    assert not (tmp_path / "b").exists() or list((tmp_path / "b").iterdir()) == []


def test_without_highdicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = series(tmp_path / "ct", VOLUME, (0, 1, 2, 3, 4))
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("highdicom"):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"need the extra: pip install 'omnifm\[dicom\]'"):
        write(tmp_path / "out", folder)


def test_which_folders_are_one_series(tmp_path: Path) -> None:
    two = series(tmp_path / "two", VOLUME, (0, 1))
    dicom(two / "other.dcm", VOLUME[2], SeriesInstanceUID="1.2.9", ImagePositionPatient=[0, 0, 0])
    assert not is_series(two)
    damaged = series(tmp_path / "damaged", VOLUME, (0, 1, 2))
    (damaged / "IM1.dcm").write_bytes(b"")
    assert is_series(damaged), "so that the reader can say which file is damaged; never a volume without a slice"
    films = tmp_path / "films"
    films.mkdir()
    for k in range(2):
        dicom(films / f"{k}.dcm", VOLUME[k])
    assert not is_series(films)
    assert not is_series(tmp_path)
