"""Turning is a bookkeeping of axes: what is at a place in the patient stays at that place."""

import itertools
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from omnifm.data.cache import load_images
from omnifm.data.cohort import Cohort, Row, write_cohort
from omnifm.data.masks import load_masks
from omnifm.data.native import load_native
from omnifm.data.orient import Rows, turned
from omnifm.data.pairs import load_pairs
from omnifm.data.readers import Image
from omnifm.data.validate import validate
from omnifm.errors import DataError
from omnifm.predict.orient import turned_back
from omnifm.tasks.base import Answer
from tests.data.builders import spec
from tests.predict.files import rotated_affine

SHAPE = (2, 3, 4)
ORDERS = list(itertools.permutations(range(3)))


def image(affine: np.ndarray) -> Image:
    array = np.arange(24, dtype=np.float32).reshape(1, *SHAPE)
    return Image(np.concatenate([array, array + 100, array + 200]), tuple(np.linalg.norm(affine[:3, :3], axis=0)), affine, 16)


def other(order: tuple[int, ...], sign: int) -> np.ndarray:
    """Return the affine of a grid whose axes are those of `rotated_affine`, in another order, and perhaps backwards."""
    affine = np.eye(4)
    affine[:3, :3] = rotated_affine()[:3, list(order)] * (sign, 1, -sign)
    return affine


def placed(one: Image) -> dict[tuple[float, ...], tuple[float, ...]]:
    """Return the colours at each place, RAS mm."""
    assert one.affine is not None
    return {
        tuple(np.round(one.affine @ [*index, 1], 4)[:3].tolist()): tuple(one.array[:, *index].tolist())
        for index in np.ndindex(one.array.shape[1:])
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_turned_volume_lies_as_asked_and_nothing_moves(order: tuple[int, ...], sign: int) -> None:
    start, like = image(rotated_affine()), other(order, sign)
    found = turned(start, like)
    assert found.affine is not None and placed(found) == placed(start)
    steps = found.affine[:3, :3]
    cosines = (steps * like[:3, :3]).sum(0) / (np.linalg.norm(steps, axis=0) * np.linalg.norm(like[:3, :3], axis=0))
    np.testing.assert_allclose(cosines, 1)
    np.testing.assert_allclose(found.spacing, np.linalg.norm(steps, axis=0))
    answer = turned_back(Answer({}, found.array[0].astype(np.uint8), (), found.array), start, like)
    np.testing.assert_array_equal(answer.mask, start.array[0])
    np.testing.assert_array_equal(answer.image, start.array)


def test_without_directions_nothing_is_turned() -> None:
    start = image(rotated_affine())
    flat = rotated_affine()
    flat[:3, 1] = 0  # an axis that leads nowhere
    for like in (None, flat, rotated_affine()):
        assert turned(start, like) is start
    lost = Image(start.array, start.spacing, None, 16)
    assert turned(lost, other(ORDERS[3], 1)) is lost
    answer = Answer({})
    assert turned_back(answer, lost, other(ORDERS[3], 1)) is answer


def stored_twice(folder: Path) -> tuple[Cohort, np.ndarray, np.ndarray]:
    """Write a volume and its mask along two orders of axes: rows 0 and 1 agree in each, row 2 crosses image and mask."""
    volume, mask = np.arange(24, dtype=np.float32).reshape(SHAPE), (np.arange(24).reshape(SHAPE) % 3).astype(np.int16)
    table = np.array([[2, -1], [0, 1], [1, -1]])
    folder.mkdir()
    for name, array in (("v", volume), ("m", mask)):
        image = nibabel.Nifti1Image(array, rotated_affine())
        nibabel.save(image, folder / f"{name}0.nii")
        nibabel.save(image.as_reoriented(table), folder / f"{name}1.nii")
    pairs = [("v0", "m0"), ("v1", "m1"), ("v0", "m1"), ("v1", "m0")]
    rows = [Row(id=f"{i}", split="train", image=f"{v}.nii", mask=f"{m}.nii") for i, (v, m) in enumerate(pairs)]
    keys = {"task": "segmentation", "classes": ["0", "1", "2"], "mask_kind": "semantic", "slice_axis": 1}
    return Cohort.read(write_cohort(folder, spec(**keys), rows)), volume, mask


def test_all_volumes_and_masks_of_a_cohort_lie_as_the_first(tmp_path: Path) -> None:
    cohort, volume, mask = stored_twice(tmp_path / "c")
    assert validate(cohort.folder) == []
    reader = Rows(cohort)
    for index in range(4):
        np.testing.assert_array_equal(reader.image(index).array[0], volume)
        found, of = reader.mask(index)
        np.testing.assert_array_equal(found, mask)
        np.testing.assert_allclose(of.spacing, np.linalg.norm(rotated_affine()[:3, :3], axis=0), rtol=1e-6)
    images = load_images(cohort, 4, 1, tmp_path / "cache").pixels.reshape(4, 3, 4, 4)
    labels = load_masks(cohort, 4, tmp_path / "cache").labels.reshape(4, 3, 4, 4)
    native = load_native(cohort, 1, tmp_path / "cache").pixels.reshape(4, 3, 2, 4)
    for arrays in (images, labels, native):
        for index in (1, 2, 3):
            np.testing.assert_array_equal(arrays[index], arrays[0])


def test_a_mask_that_lies_elsewhere_is_refused_and_noise_in_a_header_is_not(tmp_path: Path) -> None:
    cohort, _, mask = stored_twice(tmp_path / "c")
    affine = rotated_affine()
    for shift, problems in ((0.0, 0), (0.2, 0), (3.0, 1)):
        affine[:3, 3] = rotated_affine()[:3, 3] + (shift, 0, 0)
        nibabel.save(nibabel.Nifti1Image(mask, affine), cohort.folder / "m0.nii")
        found = [str(problem) for problem in validate(cohort.folder)]
        assert len(found) == 2 * problems, "rows 0 and 3 have this mask"
    assert found[0].endswith("mask 'm0.nii': lies up to 3.0 mm from where the image lies: bring both onto one grid")
    with pytest.raises(DataError, match=r"row '0': mask lies up to 3\.0 mm"):
        load_masks(cohort, 4, tmp_path / "cache")


def test_the_second_image_of_a_pair_lies_as_its_first(tmp_path: Path) -> None:
    cohort, _, mask = stored_twice(tmp_path / "c")
    rows = [replace(row, image_b=row.mask, mask="", modality="CT-MRI") for row in cohort.rows]
    keys = spec(task="fusion", modality="CT-MRI", classes=None, slice_axis=1)
    cohort = Cohort.read(write_cohort(tmp_path / "c", keys, rows))
    assert validate(cohort.folder) == []
    pairs = load_pairs(cohort, 4, tmp_path / "cache")
    luminance, _ = pairs.read(np.arange(12))
    for index in (1, 2, 3):
        np.testing.assert_array_equal(luminance.reshape(4, 3, 2, 4, 4)[index], luminance.reshape(4, 3, 2, 4, 4)[0])
    np.save(cohort.folder / "m1.npy", mask)  # says nothing: it lies as its image
    silent = replace(cohort, rows=(replace(rows[0], image_b="m1.npy"),))
    np.testing.assert_array_equal(Rows(silent).image(0, "image_b").array[0], mask)
