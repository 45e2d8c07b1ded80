import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from omnifm.data.cache import load_images
from omnifm.data.cohort import Cohort, Row, write_cohort
from omnifm.data.masks import grid_spacing, load_masks, resize_mask
from omnifm.errors import DataError
from tests.data.builders import noise, save_png, spec


def pictures(folder: Path, mask: np.ndarray, **changes: object) -> Cohort:
    save_png(folder / "a.png", noise(8, 12))
    save_png(folder / "m.png", mask.astype(np.uint8))
    keys = {"task": "segmentation", "classes": ("background", "x", "y"), "mask_kind": "semantic", **changes}
    write_cohort(folder, spec(**keys), [Row(id="a", split="train", image="a.png", mask="m.png")])
    return Cohort.read(folder)


def volumes(
    folder: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float], axis: int
) -> tuple[Cohort, np.ndarray]:
    mask = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    affine = np.diag([*spacing, 1.0])
    for name, array in (("v", noise(*shape).astype(np.int16)), ("m", mask)):
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    keys = {"task": "segmentation", "classes": ("background", "x", "y"), "mask_kind": "semantic", "slice_axis": axis}
    write_cohort(folder, spec(**keys), [Row(id="v", split="train", image="v.nii.gz", mask="m.nii.gz")])
    return Cohort.read(folder), mask


def test_the_nearest_pixel_is_the_one_that_holds_the_centre() -> None:
    mask = np.arange(6, dtype=np.int64)[None].repeat(4, axis=0)
    assert resize_mask(mask, 3, None)[0].tolist() == [[1, 3, 5]] * 3
    assert resize_mask(mask, 12, None)[0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert np.array_equal(resize_mask(mask[:, :4], 4, None)[0], mask[:, :4])


def test_resizing_agrees_with_pillow() -> None:
    mask = np.random.default_rng(0).integers(0, 5, (50, 37))
    expected = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((16, 16), Image.Resampling.NEAREST))
    assert np.array_equal(resize_mask(mask, 16, None)[0], expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_lie_where_the_images_are_and_know_their_size(axis: int, tmp_path: Path) -> None:
    shape, spacing = (4, 6, 10), (1.0, 2.0, 3.0)
    cohort, mask = volumes(tmp_path, shape, spacing, axis)
    found, images = load_masks(cohort, 4, tmp_path / "cache"), load_images(cohort, 4, 1, tmp_path / "cache")
    assert np.array_equal(found.slice_row, images.slice_row) and found.labels.shape == (shape[axis], 4, 4)
    planes = np.moveaxis(mask, axis, 0)
    pick = [np.minimum(((np.arange(4) + 0.5) * n / 4).astype(int), n - 1) for n in planes.shape[1:]]
    assert np.array_equal(found.labels, planes[:, pick[0]][:, :, pick[1]])
    others = [other for other in range(3) if other != axis]
    expected = [spacing[axis], *(spacing[other] * shape[other] / 4 for other in others)]
    np.testing.assert_allclose(found.spacing, [expected])


def test_a_picture_has_no_millimetres() -> None:
    assert grid_spacing((8, 8), (0.5, 0.5), 4, None) == (1.0, 1.0, 1.0)
    assert grid_spacing((8, 8, 8), None, 4, 0) == (1.0, 1.0, 1.0)


def test_instances_are_foreground(tmp_path: Path) -> None:
    mask = np.zeros((8, 12))
    mask[1:3, 1:3], mask[5:7, 8:10] = 1, 7
    cohort = pictures(tmp_path, mask, classes=("background", "nucleus"), mask_kind="instances")
    assert set(np.unique(load_masks(cohort, 8, tmp_path / "cache").labels)) == {0, 1}


def test_the_cache_follows_the_content(tmp_path: Path) -> None:
    mask = np.zeros((8, 12))
    cohort = pictures(tmp_path, mask)
    first = load_masks(cohort, 8, tmp_path / "cache").labels.copy()
    made = sorted((tmp_path / "cache").glob("*-mask-*.npy"))
    load_masks(cohort, 8, tmp_path / "cache")
    assert sorted((tmp_path / "cache").glob("*-mask-*.npy")) == made and len(made) == 1
    mask[:, :6] = 2
    save_png(tmp_path / "m.png", mask.astype(np.uint8))
    second = load_masks(Cohort.read(tmp_path), 8, tmp_path / "cache").labels
    assert not first.any() and second.any() and len(list((tmp_path / "cache").glob("*-mask-*.npy"))) == 2


def test_a_damaged_cache_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cohort = pictures(tmp_path, np.eye(8, 12))
    expected = load_masks(cohort, 8, tmp_path / "cache").labels.copy()
    (pixels,) = (tmp_path / "cache").glob("*-mask-*.npy")
    os.truncate(pixels, pixels.stat().st_size - 9)
    np.testing.assert_array_equal(load_masks(cohort, 8, tmp_path / "cache").labels, expected)
    assert "damaged" in caplog.text and expected.any()


def test_a_mask_that_cannot_be_is_named(tmp_path: Path) -> None:
    cohort = pictures(tmp_path, np.zeros((8, 11)))
    with pytest.raises(DataError, match=r"cohort tiny: row 'a': mask size 8 x 11 differs from the image's 8 x 12"):
        load_masks(cohort, 8, tmp_path / "cache")
