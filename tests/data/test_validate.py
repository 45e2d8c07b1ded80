"""What shows only when the images are opened, and that the checker finds all of it at once."""

import re
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from omnifm.data.cohort import Cohort, Row, write_cohort
from omnifm.data.orient import Rows
from omnifm.data.validate import Problem, require_valid, validate
from omnifm.errors import DataError
from tests.data.builders import classification, noise, save_png, spec
from tests.data.test_dicom import write as write_dicom


def lines(folder: Path) -> list[str]:
    return [str(problem) for problem in validate(folder)]


def test_a_sound_cohort_has_no_problem_and_progress_ends_at_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert validate(classification(tmp_path, 70), lambda done, total: seen.append((done, total))) == []
    assert seen == [(64, 70), (70, 70)]


def test_each_image_fault_has_its_line(tmp_path: Path) -> None:
    folder = classification(tmp_path / "c", 6)
    save_png(folder / "images/0.png", np.full((8, 8), 7, dtype=np.uint8))
    (folder / "images/1.png").unlink()
    whole = (folder / "images/2.png").read_bytes()
    (folder / "images/2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images/3.png").unlink()
    (folder / "images/3.png").symlink_to(save_png(tmp_path / "out.png", noise(8, 8)))
    found = lines(folder)
    assert found[0] == "manifest.csv row 2: image 'images/0.png': constant, every value is 7"
    assert found[1] == "manifest.csv row 3: image 'images/1.png': file is missing"
    assert found[2].startswith("manifest.csv row 4: image 'images/2.png': cannot be read (")
    assert found[3] == "manifest.csv row 5: image 'images/3.png': a symbolic link leaves the cohort folder"
    assert len(found) == 4


def test_structural_and_pixel_faults_come_together(tmp_path: Path) -> None:
    folder = classification(tmp_path, 6, row=lambda i: {"label": "z", "image": "../x.png"} if i == 3 else {})
    (folder / "images/4.png").unlink()
    assert [text.split(":")[0] for text in lines(folder)] == ["manifest.csv row 5", "manifest.csv row 5", "manifest.csv row 6"]


@pytest.mark.parametrize(("bad", "text"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_values_that_are_no_numbers(tmp_path: Path, bad: float, text: str) -> None:
    folder = classification(tmp_path, 2, row=lambda i: {"image": "x.npy"} if i else {})
    np.save(folder / "x.npy", np.where(np.eye(4) > 0, bad, 1.0))
    assert len(lines(folder)) == 1
    assert text in lines(folder)[0]


def test_a_volume_needs_a_slice_axis(tmp_path: Path) -> None:
    for axis, count in ((None, 1), (2, 0)):
        folder = classification(tmp_path / str(axis), 2, slice_axis=axis, row=lambda i: {"image": "x.nii"} if i else {})
        nibabel.save(nibabel.Nifti1Image(noise(3, 4, 5), np.eye(4)), folder / "x.nii")
        assert len(lines(folder)) == count


def segmentation(folder: Path, mask: np.ndarray, kind: str, second: np.ndarray | None = None) -> Path:
    save_png(folder / "i.png", noise(8, 10))
    np.save(folder / "m.npy", mask)
    if second is not None:
        np.save(folder / "b.npy", second)
    rows = [Row("r", "train", image="i.png", mask="m.npy", mask_b="" if second is None else "b.npy")]
    return write_cohort(folder, spec(task="segmentation", classes=("background", "x", "y"), mask_kind=kind), rows)


def test_mask_faults(tmp_path: Path) -> None:
    good = np.arange(80).reshape(8, 10) % 3
    assert lines(segmentation(tmp_path / "1", good, "semantic", good)) == []
    assert lines(segmentation(tmp_path / "2", good * 2, "semantic")) == [
        "manifest.csv row 2: mask 'm.npy': value outside classes: 4 (the classes are 0 to 2)"
    ]
    assert lines(segmentation(tmp_path / "3", good * 99, "instances")) == []
    assert lines(segmentation(tmp_path / "4", good - 1, "instances")) == [
        "manifest.csv row 2: mask 'm.npy': value outside classes: -1 (objects are numbered from 1)"
    ]
    assert lines(segmentation(tmp_path / "5", good, "semantic", good.T)) == [
        "manifest.csv row 2: mask_b 'b.npy': size 10 x 8 differs from the image's 8 x 10"
    ]
    (tmp_path / "1" / "m.npy").unlink()
    assert lines(tmp_path / "1") == ["manifest.csv row 2: mask 'm.npy': file is missing"]


def test_fused_images_have_one_size(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", noise(8, 10))
    save_png(tmp_path / "b.png", noise(8, 11))
    pair = [Row("r", "test", image="a.png", image_b="b.png")]
    write_cohort(tmp_path, spec(task="fusion", modality="CT-MRI", classes=None), pair)
    assert lines(tmp_path) == ["manifest.csv row 2: image_b 'b.png': size 8 x 11 differs from the image's 8 x 10"]


def test_flat_pairs_have_one_pixel_size_and_one_place(tmp_path: Path) -> None:
    pixels = noise(8, 8).astype(np.uint16)
    place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, 5], "PixelSpacing": [0.5, 0.5]}
    write_dicom(tmp_path / "a.dcm", pixels, **place)
    write_cohort(
        tmp_path,
        spec(task="fusion", modality="CT-MRI", classes=None),
        [Row("r", "test", image="a.dcm", image_b="b.dcm")],
    )
    for changes, text in (
        ({}, ""),
        ({"PixelSpacing": [0.98, 0.98]}, "pixels of 0.98 x 0.98 mm, the image's are of 0.5 x 0.5 mm: bring both onto one grid"),
        ({"ImagePositionPatient": [0, 0, 85]}, "lies up to 80.0 mm from where the image lies: bring both onto one grid"),
    ):
        write_dicom(tmp_path / "b.dcm", pixels, **(place | changes))
        assert lines(tmp_path) == ([f"manifest.csv row 2: image_b 'b.dcm': {text}"] if text else [])


def test_a_flat_nifti_goes_with_another_one_alone(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[1, 2] = 1
    save_png(tmp_path / "a.png", noise(8, 8))
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / "m.nii")
    keys = spec(task="segmentation", classes=("background", "x"), mask_kind="semantic")
    write_cohort(tmp_path, keys, [Row("r", "train", image="a.png", mask="m.nii")])
    (line,) = lines(tmp_path)
    assert "mask 'm.nii': one of the two is a flat NIfTI, which is stored by columns" in line
    nibabel.save(nibabel.Nifti1Image(noise(8, 8).astype(np.float32), np.eye(4)), tmp_path / "a.nii")
    write_cohort(tmp_path, keys, [Row("r", "train", image="a.nii", mask="m.nii")])
    assert lines(tmp_path) == []


@pytest.mark.parametrize("first", ["png", "nii"])
def test_flat_images_of_a_cohort_are_all_stored_along_the_same_axes(first: str, tmp_path: Path) -> None:
    """The first flat row decides; a volume before it, and one among them, have headers that say how they lie."""
    for name in "abc":
        save_png(tmp_path / f"{name}.png", noise(8, 10))
        nibabel.save(nibabel.Nifti1Image(noise(8, 10).astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii")
    nibabel.save(nibabel.Nifti1Image(noise(4, 4, 4).astype(np.float32), np.eye(4)), tmp_path / "v.nii")
    other = "nii" if first == "png" else "png"
    names = ["v.nii", f"a.{first}", "v.nii", f"b.{first}", f"c.{other}"]
    rows = [Row(f"r{i}", "train", image=name, label="a") for i, name in enumerate(names)]
    cohort = Cohort.read(write_cohort(tmp_path, spec(slice_axis=0), rows))
    kinds = {"png": "stored by rows", "nii": "a flat NIfTI, which is stored by columns"}
    said = f"is {kinds[other]}, and row 'r1' is {kinds[first]}: save all alike"
    assert lines(tmp_path) == [f"manifest.csv row 6: image 'c.{other}': {said}"]
    reader = Rows(replace(cohort, rows=cohort.rows[1:]))
    assert [reader.image(i).array.ndim for i in range(3)] == [3, 4, 3]
    with pytest.raises(DataError, match=f"^{re.escape(said)}$"):
        reader.image(3)
    assert Rows(cohort).image(4).array.ndim == 3, "a first row that is a volume says nothing of flat ones"
    write_cohort(tmp_path, spec(slice_axis=0), rows[:-1])
    assert lines(tmp_path) == []


def test_where_the_first_volume_says_nothing_no_other_may(tmp_path: Path) -> None:
    volume = noise(4, 4, 4).astype(np.float32)
    np.save(tmp_path / "a.npy", volume)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "b.nii")
    files = ("a.npy", "b.nii")
    rows = [Row(name, "train", image=name, label="normal") for name in files]
    write_cohort(tmp_path, spec(slice_axis=0, classes=("normal", "ill")), rows)
    assert lines(tmp_path) == [
        "manifest.csv row 3: image 'b.nii': says how it lies, and the first row's does not: put one that does first"
    ]
    write_cohort(tmp_path, spec(slice_axis=0, classes=("normal", "ill")), rows[::-1])
    assert lines(tmp_path) == []


def test_an_image_of_many_questions_is_reported_once(tmp_path: Path) -> None:
    rows = [Row(f"q{k}", "train", image="gone.png", question="?", answer="no", answer_type="closed") for k in range(3)]
    write_cohort(tmp_path, spec(task="vqa", classes=None), rows)
    assert lines(tmp_path) == ["manifest.csv row 2: image 'gone.png': file is missing"]


def test_a_run_refuses_with_one_line(tmp_path: Path) -> None:
    good, bad = (Cohort.read(classification(tmp_path / name)) for name in ("g", "b"))
    require_valid([good, bad])
    for k in (1, 2):
        (bad.folder / f"images/{k}.png").unlink()
    with pytest.raises(DataError, match=r"^cohort tiny: 2 problems, the first: manifest\.csv row 3: image") as caught:
        require_valid([good, bad])
    assert "\n" not in str(caught.value)


def test_a_problem_is_one_line_even_if_its_text_is_not() -> None:
    assert str(Problem("f", 3, "a\n b")) == "f row 3: a b"


def test_the_real_cohorts_are_sound(shared_data: Path) -> None:
    assert [p for name in ("seg_lung_xray", "fusion_ct_mri", "sr_histology") for p in validate(shared_data / name)] == []
