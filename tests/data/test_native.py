"""Images at the size they have: exact values, one size per cohort, and a cache that trusts nothing but contents."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnifm.data.cache import load_images
from omnifm.data.cohort import Cohort, Row, write_cohort
from omnifm.data.native import load_native
from omnifm.errors import DataError
from tests.data.builders import noise, save_png, spec


def pictures(folder: Path, *sizes: tuple[int, ...], **changes: Any) -> Cohort:
    """Write a super-resolution cohort of noise images of the given sizes."""
    rows = []
    for i, size in enumerate(sizes):
        save_png(folder / f"images/{i}.png", noise(*size, stream=i))
        rows.append(Row(id=f"r{i}", split="train", image=f"images/{i}.png"))
    return Cohort.read(write_cohort(folder, spec(task="super_resolution", classes=None, **changes), rows))


def arrays(folder: Path, *volumes: np.ndarray, **changes: Any) -> Cohort:
    rows = []
    (folder / "images").mkdir(parents=True)
    for i, volume in enumerate(volumes):
        np.save(folder / f"images/{i}.npy", volume)
        rows.append(Row(id=f"r{i}", split="train", image=f"images/{i}.npy"))
    return Cohort.read(write_cohort(folder, spec(task="super_resolution", classes=None, **changes), rows))


def test_8_bit_images_arrive_as_they_are_and_as_bytes(tmp_path: Path) -> None:
    images = load_native(pictures(tmp_path / "c", (20, 30), (20, 30)), 1, tmp_path / "cache")
    assert images.pixels.dtype == np.uint8 and images.size == (20, 30) and images.cropped == ""
    assert not images.pixels.flags.writeable
    np.testing.assert_array_equal(images.pixels[:, 0], [noise(20, 30, stream=i) for i in (0, 1)])
    found = images.read([(1, 2, 3), (0, 0, 0)], 5, 7)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0, 0], noise(20, 30, stream=1)[2:7, 3:10].astype(np.float32) / 255)


def test_grey_is_repeated_and_colour_becomes_luminance(tmp_path: Path) -> None:
    grey = load_native(pictures(tmp_path / "g", (8, 9)), 3, tmp_path / "cache")
    np.testing.assert_array_equal(grey.pixels[0], np.stack([noise(8, 9)] * 3))
    colours = pictures(tmp_path / "c", (8, 9, 3))
    coloured = load_native(colours, 3, tmp_path / "cache")
    np.testing.assert_array_equal(coloured.pixels[0], np.moveaxis(noise(8, 9, 3), -1, 0))
    mixed = load_native(colours, 1, tmp_path / "cache")
    assert mixed.pixels.dtype == np.float32
    np.testing.assert_allclose(mixed.pixels[0, 0] * 255, noise(8, 9, 3) @ [0.299, 0.587, 0.114], atol=1e-3)


def test_values_are_those_of_the_square_cache(tmp_path: Path) -> None:
    """16-bit values are scaled by percentiles, in the same way as for every other task."""
    rng_volume = noise(16, 16, stream=3).astype(np.float32) * 7.5 - 100
    cohort = arrays(tmp_path / "c", rng_volume)
    native, square = load_native(cohort, 1, tmp_path / "cache"), load_images(cohort, 16, 1, tmp_path / "cache")
    assert native.pixels.dtype == np.float32
    np.testing.assert_array_equal(native.pixels, square.pixels)


def test_unlike_sizes_are_cropped_to_the_smallest_about_the_centre(tmp_path: Path) -> None:
    images = load_native(pictures(tmp_path / "c", (20, 30), (24, 26), (31, 40)), 1, tmp_path / "cache")
    assert images.size == (20, 26)
    np.testing.assert_array_equal(images.pixels[0, 0], noise(20, 30, stream=0)[:, 2:28])
    np.testing.assert_array_equal(images.pixels[1, 0], noise(24, 26, stream=1)[2:22])
    np.testing.assert_array_equal(images.pixels[2, 0], noise(31, 40, stream=2)[5:25, 7:33])
    assert "up to 31 x 40 pixels and were cropped centrally to 20 x 26 (row 'r0'" in images.cropped
    again = load_native(Cohort.read(tmp_path / "c"), 1, tmp_path / "cache")
    assert again.cropped == images.cropped


def test_volumes_are_cut_into_slices(tmp_path: Path) -> None:
    volumes = [noise(6, 7, n, stream=n).astype(np.float32) for n in (4, 2)]  # a last axis of 3 would be colours
    cohort = arrays(tmp_path / "c", *volumes, slice_axis=2)
    images = load_native(cohort, 1, tmp_path / "cache")
    assert images.pixels.shape == (6, 1, 6, 7) and images.slice_row.tolist() == [0, 0, 0, 0, 1, 1]
    with pytest.raises(DataError, match=r"row 'r0': image is a volume, and cohort.toml has no slice_axis"):
        load_native(arrays(tmp_path / "d", *volumes), 1, tmp_path / "cache")


def test_contents_are_the_key(tmp_path: Path) -> None:
    cohort = pictures(tmp_path / "c", (8, 9), (8, 9))
    load_native(cohort, 1, tmp_path / "cache")
    files = {path.name for path in (tmp_path / "cache").glob("*.npy")}
    load_native(pictures(tmp_path / "moved" / "c", (8, 9), (8, 9)), 1, tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").glob("*.npy")} == files
    save_png(tmp_path / "c" / "images/1.png", noise(8, 9, stream=7))
    changed = load_native(cohort, 1, tmp_path / "cache")
    np.testing.assert_array_equal(changed.pixels[1, 0], noise(8, 9, stream=7))
    load_native(cohort, 3, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3


@pytest.mark.parametrize("harm", ["cut", "altered", "record"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    cohort = pictures(tmp_path / "c", (8, 9))
    load_native(cohort, 1, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*native*.npy")
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-3])
    elif harm == "altered":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.with_suffix(".json").write_text("{")
    with caplog.at_level(logging.WARNING):
        images = load_native(cohort, 1, tmp_path / "cache")
    assert "it is built again" in caplog.text
    np.testing.assert_array_equal(images.pixels[0, 0], noise(8, 9))


def test_what_cannot_be_read_names_the_row(tmp_path: Path) -> None:
    cohort = pictures(tmp_path / "c", (8, 9), (8, 9))
    (tmp_path / "c" / "images/1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cohort tiny: row 'r1': image 1.png: cannot be read"):
        load_native(cohort, 1, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))
    not_finite = arrays(tmp_path / "d", np.array([[0.0, np.nan]], dtype=np.float32))
    with pytest.raises(DataError, match="row 'r0': image holds NaN"):
        load_native(not_finite, 1, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache"):
        load_native(pictures(tmp_path / "c", (8, 9)), 1, tmp_path / "file")
