"""DICOM written with pydicom: values, order, geometry, and that nothing about the patient comes out."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)

from omnifm.data.dicom import is_series
from omnifm.data.readers import read_image, read_mask
from omnifm.errors import DataError

NAME = "Secret^Patient"
PLANE = (np.arange(12).reshape(3, 4) * 300).astype(np.uint16)


def write(path: Path, pixels: np.ndarray, *, bits: int = 12, photometric: str = "MONOCHROME2", **tags: Any) -> Path:
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    file.SOPClassUID, file.SOPInstanceUID = SecondaryCaptureImageStorage, file.file_meta.MediaStorageSOPInstanceUID
    file.PatientName, file.PatientID, file.PatientBirthDate = NAME, "SecretID", "19700101"
    file.SamplesPerPixel = 3 if photometric == "RGB" else 1
    file.PhotometricInterpretation = photometric
    if photometric == "RGB":
        file.PlanarConfiguration = 0
    plane_end = pixels.ndim - (1 if photometric == "RGB" else 0)
    file.Rows, file.Columns = pixels.shape[plane_end - 2 : plane_end]
    if plane_end == 3:
        file.NumberOfFrames = pixels.shape[0]
    file.BitsAllocated = 8 * pixels.dtype.itemsize
    file.BitsStored, file.HighBit = bits, bits - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    for tag, value in tags.items():
        # Tags of which the standard leaves open whether they are signed.
        if tag.startswith("PixelPadding") and value >= 2**15:
            file.add_new(tag, "US", value)
        else:
            setattr(file, tag, value)
    file.PixelData = pixels.tobytes()
    file.save_as(path, enforce_file_format=True)
    return path


def test_slope_and_intercept_give_hounsfield_units(tmp_path: Path) -> None:
    path = write(tmp_path / "x.dcm", PLANE, RescaleSlope=2, RescaleIntercept=-1024, PixelSpacing=[0.5, 0.7])
    image = read_image(path)
    np.testing.assert_array_equal(image.array[0], PLANE * 2.0 - 1024)
    assert image.spacing == (0.5, 0.7)
    assert image.bits == 16
    assert read_image(write(tmp_path / "y.dcm", PLANE)).bits == 12


@pytest.mark.parametrize(("dtype", "total"), [(np.uint16, 4095), (np.int16, -1)])
def test_monochrome1_is_turned_over_within_its_bits(tmp_path: Path, dtype: type, total: int) -> None:
    stored = (PLANE.astype(np.int64) - (2000 if dtype is np.int16 else 0)).astype(dtype)
    image = read_image(write(tmp_path / "x.dcm", stored, photometric="MONOCHROME1"))
    np.testing.assert_array_equal(image.array[0], total - stored.astype(float))


def test_eight_bits_stay_eight_bits_and_colours_stay_colours(tmp_path: Path) -> None:
    grey = (PLANE // 16).astype(np.uint8)
    assert read_image(write(tmp_path / "g.dcm", grey, bits=8)).bits == 8
    colour = np.stack([grey, grey // 2, 255 - grey], axis=-1)
    image = read_image(write(tmp_path / "c.dcm", colour, bits=8, photometric="RGB"))
    np.testing.assert_array_equal(image.array, np.moveaxis(colour, -1, 0))
    film = read_image(write(tmp_path / "f.dcm", np.stack([colour, colour // 3]), bits=8, photometric="RGB"))
    np.testing.assert_array_equal(film.array, np.moveaxis(np.stack([colour, colour // 3]), -1, 0))


def test_several_frames_are_a_volume_with_their_own_slopes(tmp_path: Path) -> None:
    frames = np.stack([PLANE, PLANE + 1])
    plain = read_image(write(tmp_path / "p.dcm", frames, PixelSpacing=[1, 2], SpacingBetweenSlices=3))
    np.testing.assert_array_equal(plain.array, frames[None])
    assert plain.spacing == (3.0, 1.0, 2.0)
    groups = []
    for slope in (1, 10):
        group, item = Dataset(), Dataset()
        item.RescaleSlope, item.RescaleIntercept, item.RescaleType = slope, -5, "US"
        group.PixelValueTransformationSequence = [item]
        groups.append(group)
    enhanced = read_image(write(tmp_path / "e.dcm", frames, PerFrameFunctionalGroupsSequence=groups))
    np.testing.assert_array_equal(enhanced.array[0], frames * np.array([1.0, 10.0]).reshape(2, 1, 1) - 5)


def item(**tags: Any) -> Dataset:
    found = Dataset()
    for tag, value in tags.items():
        setattr(found, tag, value)
    return found


def enhanced(path: Path, places: list[float], **tags: Any) -> Path:
    """Write axial frames of one file; frame k, whose values tell its place, lies at z = places[k]."""
    plane = item(PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])])
    plane.PixelMeasuresSequence = [item(PixelSpacing=[0.5, 0.75], SliceThickness=5)]
    frames = [item(PlanePositionSequence=[item(ImagePositionPatient=[1, 2, z])]) for z in places]
    pixels = np.stack([PLANE + round(10 * z) for z in places]).astype(np.uint16)
    groups = {"SharedFunctionalGroupsSequence": [plane], "PerFrameFunctionalGroupsSequence": frames}
    return write(path, pixels, **(groups | tags))


def test_frames_that_state_their_places_are_put_in_order(tmp_path: Path) -> None:
    image = read_image(enhanced(tmp_path / "e.dcm", [0, 5, 2.5, 7.5]))
    np.testing.assert_array_equal(image.array[0], [PLANE + z for z in (0, 25, 50, 75)])
    assert image.spacing == (2.5, 0.5, 0.75)
    assert image.affine is not None
    # Slice 2, row 1, column 3: x = 1 + 3*.75, y = 2 + 1*.5, z = 5 (LPS), then RAS+.
    np.testing.assert_allclose(image.affine @ [2, 1, 3, 1], [-3.25, -2.5, 5.0, 1.0])
    for places, text in (
        ([0, 2, 2, 4], "two frames lie at the same position: keep one volume per file"),
        ([0, 2, 6, 8], "frames are not evenly"),
    ):
        with pytest.raises(DataError, match=text):
            read_image(enhanced(tmp_path / "e.dcm", places))


def test_a_negative_distance_is_a_distance(tmp_path: Path) -> None:
    path = write(tmp_path / "nm.dcm", np.stack([PLANE, PLANE]), PixelSpacing=[1, 2], SpacingBetweenSlices=-4.5)
    assert read_image(path).spacing == (4.5, 1.0, 2.0)


def test_a_segmentation_is_no_image_and_no_slice(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", [0, 2, 4])
    expected = read_image(folder).array
    seg = write(folder / "seg.dcm", np.stack([PLANE] * 3), SOPClassUID=SegmentationStorage)
    report = write(folder / "report.dcm", PLANE, SOPClassUID=BasicTextSRStorage)
    text = pydicom.dcmread(report)
    del text.PixelData, text.Rows, text.Columns
    text.save_as(report)
    (folder / "._0.dcm").write_bytes(b"a Mac's notes")
    assert is_series(folder)
    np.testing.assert_array_equal(read_image(folder).array, expected)
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"seg\.dcm: is a DICOM segmentation, whose frames are segments: export it as NIfTI"):
            read(seg)


def test_the_one_bad_slice_of_many_is_named(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", [0, 2, 4])
    whole = (folder / "7.dcm").read_bytes()
    for damaged in (whole[:-6], whole[:200], b"x" * 200):
        (folder / "7.dcm").write_bytes(damaged)
        with pytest.raises(DataError, match=r"^s: 7\.dcm: "):
            read_image(folder)


def series(folder: Path, positions: list[float], **tags: Any) -> Path:
    """Coronal slices (normal +y) whose file names and order of writing say nothing about their place."""
    folder.mkdir()
    for k, y in enumerate(positions):
        geometry: dict[str, Any] = {"ImagePositionPatient": [10, y, 30], "PixelSpacing": [0.5, 0.7]}
        geometry["ImageOrientationPatient"] = [1, 0, 0, 0, 0, -1]
        write(folder / f"{(k * 7) % 10}.dcm", PLANE + int(y), **(geometry | tags))
    return folder


def test_a_folder_of_slices_is_one_volume_in_the_order_of_positions(tmp_path: Path) -> None:
    image = read_image(series(tmp_path / "s", [4, 0, 6, 2]))
    np.testing.assert_array_equal(image.array[0], [PLANE + y for y in (0, 2, 4, 6)])
    assert image.spacing == (2.0, 0.5, 0.7)
    assert image.affine is not None
    # Slice 1, row 2, column 3 by the formula of PS3.3 C.7.6.2.1.1 (LPS: x 10 + 3*.7, y 0 + 2, z 30 - 2*.5), then RAS+.
    np.testing.assert_allclose(image.affine @ [1, 2, 3, 1], [-12.1, -2.0, 29.0, 1.0])
    alone = read_image(series(tmp_path / "one", [4], SliceThickness=5))
    assert alone.array.shape == (1, 1, 3, 4)
    assert alone.spacing == (5.0, 0.5, 0.7)


@pytest.mark.parametrize(
    ("positions", "text"),
    [([0, 2, 2, 4], "same position"), ([0, 2, 6, 8], "not evenly spaced"), ([], "no .dcm file")],
)
def test_a_folder_that_is_not_one_regular_volume(tmp_path: Path, positions: list[float], text: str) -> None:
    with pytest.raises(DataError, match=rf"^s: .*{text}"):
        read_image(series(tmp_path / "s", positions))


def test_slices_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", [0, 2])
    geometry = {"ImagePositionPatient": [10, 4, 30], "PixelSpacing": [0.5, 0.7]}
    write(folder / "z.dcm", PLANE, ImageOrientationPatient=[0, 1, 0, 0, 0, -1], **geometry)
    with pytest.raises(DataError, match="different orientations"):
        read_image(folder)
    write(folder / "z.dcm", PLANE[:2], ImageOrientationPatient=[1, 0, 0, 0, 0, -1], **geometry)
    with pytest.raises(DataError, match="differ in size"):
        read_image(folder)
    write(folder / "z.dcm", PLANE)
    with pytest.raises(DataError, match="no position or orientation"):
        read_image(folder)


def test_slices_of_another_series_or_size_or_row_are_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", [0, 4, 8], SeriesInstanceUID="1.2.3")
    geometry = {"ImagePositionPatient": [10, 12, 30], "ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "PixelSpacing": [0.5, 0.7]}
    whole = {"SeriesInstanceUID": "1.2.3", **geometry}
    write(folder / "z.dcm", PLANE, **whole)
    assert read_image(folder).array.shape == (1, 4, 3, 4)
    for changes, text in (
        ({"SeriesInstanceUID": "1.2.4"}, "several series"),
        ({"PixelSpacing": [0.5, 1.4]}, r"pixels of different sizes \(PixelSpacing\)"),
        ({"ImagePositionPatient": [12, 12, 30]}, r"do not lie in one row, one is \d+\.\d mm aside"),
    ):
        write(folder / "z.dcm", PLANE, **(whole | changes))
        with pytest.raises(DataError, match=rf"^s: .*{text}: keep one series per folder"):
            read_image(folder)


def test_a_tilted_gantry_is_one_row(tmp_path: Path) -> None:
    for k in range(4):
        geometry = {
            "ImagePositionPatient": [0, 3 * k, k],
            "ImageOrientationPatient": [1, 0, 0, 0, 0, -1],
            "PixelSpacing": [0.5, 0.7],
        }
        write(tmp_path / f"{k}.dcm", PLANE, **geometry)
    assert read_image(tmp_path).array.shape == (1, 4, 3, 4)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(("padding", "limit"), [(-2000, None), (63536, None), (-2000, -1998), (-1998, -2000)])
def test_padding_is_as_dark_as_what_was_seen(tmp_path: Path, photometric: str, padding: int, limit: int | None) -> None:
    """It would set the scale otherwise. 63536 is -2000 written without a sign."""
    stored = (PLANE.astype(np.int64) - 1000).astype(np.int16)
    padded = stored.copy()
    padded[0, :2] = (-2000, -1999) if limit else -2000
    seen = stored.ravel()[2:]
    darkest = seen.max() if photometric == "MONOCHROME1" else seen.min()
    tags = {"PixelPaddingValue": padding} | ({"PixelPaddingRangeLimit": limit} if limit else {})
    path = write(tmp_path / "x.dcm", padded, bits=16, photometric=photometric, RescaleSlope=1, RescaleIntercept=-24, **tags)
    found = read_image(path).array[0]
    expected = stored.copy()
    expected[0, :2] = darkest
    real = (-1 - expected.astype(float) if photometric == "MONOCHROME1" else expected) - 24
    np.testing.assert_array_equal(found, real)


def test_all_padding_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "x.dcm", np.full((3, 4), 7, np.uint16), PixelPaddingValue=7)
    np.testing.assert_array_equal(read_image(path).array[0], 7)


def test_values_in_other_bits_and_signed_bytes_and_half_a_rescale(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.dcm: its values are not in the lowest bits"):
        read_image(write(tmp_path / "x.dcm", PLANE, HighBit=15))
    signed = read_image(write(tmp_path / "s.dcm", np.arange(-6, 6, dtype=np.int8).reshape(3, 4), bits=8))
    assert signed.bits == 16 and signed.array.min() == -6
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.dcm", PLANE, RescaleSlope=2)).array[0], PLANE * 2.0)
    np.testing.assert_array_equal(read_image(write(tmp_path / "b.dcm", PLANE, RescaleIntercept=-5)).array[0], PLANE - 5.0)


def test_damaged_files_say_so_without_the_patient(tmp_path: Path) -> None:
    path = write(tmp_path / "x.dcm", PLANE)
    whole = path.read_bytes()
    texts = []
    for damaged in (whole[:-6], whole[:200], b"", whole.replace(b"MONOCHROME2", b"NONSENSE   ")):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            read_image(path)
        texts.append(f"{caught.value!r} {caught.value.__cause__!r}")
    assert not any(secret in text for text in texts for secret in ("Secret", "19700101"))


def test_only_pixels_and_geometry_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.dcm", PLANE)
    read = pydicom.dcmread
    seen: list[Dataset] = []
    monkeypatch.setattr(pydicom, "dcmread", lambda *args, **kwargs: seen.append(read(*args, **kwargs)) or seen[-1])
    read_image(path)
    assert len(seen) == 1
    assert NAME in str(read(path))
    assert "Secret" not in str(seen[0])
