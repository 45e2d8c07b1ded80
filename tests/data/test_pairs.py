"""Registered pairs: luminance of both, colour of the other."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnifm.data.cohort import Cohort, Row, write_cohort
from omnifm.data.pairs import load_pairs, to_rgb, to_ycbcr
from omnifm.errors import DataError
from tests.data.builders import noise, save_png, spec


def fusion(folder: Path, count: int = 3, colour: bool = True) -> Cohort:
    rows = []
    for i in range(count):
        save_png(folder / f"mri/{i}.png", noise(16, 16, stream=i))
        save_png(folder / f"pet/{i}.png", noise(16, 16, *((3,) if colour else ()), stream=100 + i))
        rows.append(Row(id=f"r{i}", split="train", image=f"mri/{i}.png", image_b=f"pet/{i}.png"))
    return Cohort.read(write_cohort(folder, spec(task="fusion", modality="PET-MRI", classes=None), rows))


def test_colours_are_those_of_pillow() -> None:
    """Pillow's YCbCr is BT.601, full range, as JPEG has it; it cuts to 8 bits."""
    rgb = noise(12, 9, 3)
    expected = np.moveaxis(np.asarray(Image.fromarray(rgb).convert("YCbCr"), dtype=np.float32), -1, 0) / 255
    found = to_ycbcr(np.moveaxis(rgb, -1, 0).astype(np.float32) / 255)
    # Pillow has the neutral colour at 128 of 255, here it is 1/2.
    assert np.abs(found[0] - expected[0]).max() <= 1.01 / 255
    assert np.abs(found[1:] - (expected[1:] - 0.5 / 255)).max() <= 1.1 / 255


def test_there_and_back() -> None:
    rgb = np.moveaxis(noise(7, 5, 3), -1, 0).astype(np.float32) / 255
    np.testing.assert_allclose(to_rgb(to_ycbcr(rgb)), rgb, atol=1e-6)
    np.testing.assert_allclose(to_ycbcr(np.stack([rgb, rgb]))[1], to_ycbcr(rgb))
    grey = np.repeat(rgb[:1], 3, axis=0)
    np.testing.assert_allclose(to_ycbcr(grey), np.stack([rgb[0], *2 * [np.full((7, 5), 0.5)]]), atol=1e-6)


def test_colours_that_there_are_not_are_clipped() -> None:
    blue = to_ycbcr(np.array([0.0, 0, 1], dtype=np.float32).reshape(3, 1, 1))
    blue[0] = 0.9
    assert to_rgb(blue).ravel().tolist() == pytest.approx([0.786, 0.786, 1.0], abs=1e-3)


def test_pairs_hold_the_anatomical_picture_first(tmp_path: Path) -> None:
    pairs = load_pairs(fusion(tmp_path / "c"), 16, tmp_path / "cache")
    luminance, chroma = pairs.read(np.array([2, 0]))
    assert luminance.shape == chroma.shape == (2, 2, 16, 16) and luminance.dtype == np.float32
    np.testing.assert_allclose(luminance[0, 0] * 255, noise(16, 16, stream=2), atol=1e-4)
    rgb = to_rgb(np.concatenate([luminance[1, 1:], chroma[1]]))
    np.testing.assert_allclose(np.moveaxis(rgb, 0, -1) * 255, noise(16, 16, 3, stream=100), atol=1e-3)
    assert pairs.row.tolist() == [0, 1, 2]


def test_a_grey_pair_has_no_colour(tmp_path: Path) -> None:
    luminance, chroma = load_pairs(fusion(tmp_path / "c", colour=False), 8, tmp_path / "cache").read(np.array([0]))
    assert luminance.shape == (1, 2, 8, 8) and np.abs(chroma - 0.5).max() < 1e-6


def test_volumes_of_unequal_depth_are_no_pair(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c/a.npy", noise(3, 8, 8))
    np.save(tmp_path / "c/b.npy", noise(4, 8, 8))
    rows = [Row(id="v", split="train", image="a.npy", image_b="b.npy")]
    keys = spec(task="fusion", modality="CT-MRI", classes=None, slice_axis=0)
    try:
        cohort = Cohort.read(write_cohort(tmp_path / "c", keys, rows))
        with pytest.raises(DataError, match="row 'v': image_b size 4 x 8 x 8 differs from the image's 3 x 8 x 8"):
            load_pairs(cohort, 8, tmp_path / "cache")
    finally:
        np.save(tmp_path / "c/b.npy", noise(3, 8, 8, stream=1))
    assert load_pairs(cohort, 8, tmp_path / "cache").row.tolist() == [0, 0, 0]
