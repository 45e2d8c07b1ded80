"""Every file kind, against the library that wrote it; damaged files; masks."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from omnifm.data.readers import read_image, read_mask
from omnifm.errors import DataError
from tests.data.builders import noise, save_png

GREY = noise(6, 9)
COLOUR = noise(6, 9, 3, stream=1)
DEEP = noise(6, 9, stream=2).astype(np.uint16) * 257
VOLUME = noise(4, 6, 9, stream=3)


def first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "npy"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_eight_bit_pictures_keep_their_values(tmp_path: Path, suffix: str, pixels: np.ndarray) -> None:
    path = tmp_path / f"x.{suffix.upper() if suffix == 'png' else suffix}"
    if suffix == "npy":
        np.save(path, pixels)
    else:
        Pillow.fromarray(pixels).save(path)
    image = read_image(path)
    assert image.array.dtype == np.float32
    assert image.bits == 8
    np.testing.assert_array_equal(image.array, first(pixels))


def test_jpeg_is_near_what_was_written(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (40, 1))
    Pillow.fromarray(ramp).save(tmp_path / "x.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "x.jpg").array[0] - ramp).max() < 8


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "CMYK", "1"])
def test_other_picture_modes_become_grey_or_colour(tmp_path: Path, mode: str) -> None:
    Pillow.fromarray(COLOUR).convert(mode).save(tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}")
    image = read_image(next(tmp_path.iterdir()))
    assert image.array.shape == ((1 if mode in ("LA", "1") else 3), 6, 9)
    assert image.array.max() > 200


def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path) -> None:
    Pillow.fromarray(DEEP).save(tmp_path / "x.png")
    tifffile.imwrite(tmp_path / "x.tif", DEEP)
    tifffile.imwrite(tmp_path / "c.tif", COLOUR.astype(np.uint16) * 257, photometric="rgb")
    np.save(tmp_path / "x.npy", DEEP)
    for name in ("x.png", "x.tif", "x.npy"):
        image = read_image(tmp_path / name)
        assert image.bits == 16, name
        np.testing.assert_array_equal(image.array[0], DEEP)
    np.testing.assert_array_equal(read_image(tmp_path / "c.tif").array, first(COLOUR) * 257.0)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_tiff(tmp_path: Path, compression: str) -> None:
    Pillow.fromarray(GREY).save(tmp_path / "x.tif", compression=compression)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif").array[0], GREY)


def test_tiff_where_white_is_zero(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", GREY, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif").array[0], 255.0 - GREY)


def test_stacks_are_volumes(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", VOLUME, photometric="minisblack")
    frames = [Pillow.fromarray(plane) for plane in VOLUME]
    frames[0].save(tmp_path / "lzw.tif", save_all=True, append_images=frames[1:], compression="tiff_lzw")
    np.save(tmp_path / "x.npy", VOLUME.astype(np.float64))
    for name in ("x.tif", "lzw.tif", "x.npy"):
        np.testing.assert_array_equal(read_image(tmp_path / name).array, VOLUME[None], err_msg=name)
    assert read_image(tmp_path / "x.npy").bits == 32


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_nifti_with_geometry_and_slope(tmp_path: Path, name: str) -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (-10, 20, 5)
    nibabel.save(nibabel.Nifti1Image(VOLUME, affine), tmp_path / name)
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image.array, VOLUME[None])
    assert image.spacing == (2.0, 3.0, 4.0)
    assert image.affine is not None
    np.testing.assert_allclose(image.affine, affine)
    assert image.bits == 16
    sloped = nibabel.Nifti1Image(VOLUME.astype(np.int16), affine)
    sloped.header.set_slope_inter(0.5, -7)
    nibabel.save(sloped, tmp_path / name)
    np.testing.assert_allclose(read_image(tmp_path / name).array[0], 0.5 * VOLUME - 7)
    assert read_image(tmp_path / name).bits == 32


def test_nifti_series_of_one_is_a_volume_and_of_two_is_not(tmp_path: Path) -> None:
    for count in (1, 2):
        nibabel.save(nibabel.Nifti1Image(np.stack([VOLUME] * count, axis=-1), np.eye(4)), tmp_path / f"{count}.nii")
    assert read_image(tmp_path / "1.nii").array.shape == (1, 4, 6, 9)
    with pytest.raises(DataError, match="holds a series"):
        read_image(tmp_path / "2.nii")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.bmp", "x.npy", "x.nii", "x.nii.gz"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6])
def test_truncated_files_are_one_line(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    pixels = noise(64, 64)
    if name.endswith(".npy"):
        np.save(path, pixels)
    elif ".nii" in name:
        nibabel.save(nibabel.Nifti1Image(np.stack([pixels] * 4), np.eye(4)), path)
    else:
        Pillow.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DataError, match=rf"^{name}: cannot be read") as caught:
        read_image(path)
    assert "\n" not in str(caught.value).strip()


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match=r"x\.txt: not a PNG"):
        read_image(tmp_path / "x.txt")
    with pytest.raises(DataError, match=r"gone\.png: file is missing"):
        read_image(tmp_path / "gone.png")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "c.npy", np.ones((3, 3), dtype=complex))
    np.save(tmp_path / "v.npy", np.ones(5))
    np.save(tmp_path / "e.npy", np.ones((0, 5)))
    for name in "ocve":
        with pytest.raises(DataError, match=rf"^{name}\.npy: "):
            read_image(tmp_path / f"{name}.npy")


def test_masks_keep_their_numbers(tmp_path: Path) -> None:
    classes = np.arange(54).reshape(6, 9).astype(np.uint8) % 4
    save_png(tmp_path / "grey.png", classes)
    palette = Pillow.fromarray(classes)
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    palette.save(tmp_path / "palette.png")
    save_png(tmp_path / "triple.png", np.repeat(classes[..., None], 3, axis=2))
    np.save(tmp_path / "real.npy", classes.astype(np.float64))
    for name in ("grey.png", "palette.png", "triple.png", "real.npy"):
        mask = read_mask(tmp_path / name)
        assert mask.dtype == np.int64
        np.testing.assert_array_equal(mask, classes, err_msg=name)
    save_png(tmp_path / "bits.png", classes > 1)
    np.testing.assert_array_equal(read_mask(tmp_path / "bits.png"), classes > 1)


def test_masks_that_are_none(tmp_path: Path) -> None:
    save_png(tmp_path / "c.png", COLOUR)
    np.save(tmp_path / "f.npy", np.full((3, 3), 0.5))
    np.save(tmp_path / "n.npy", np.full((3, 3), np.nan))
    (tmp_path / "b.png").write_bytes(b"no")
    for name, text in (("c.png", "not colours"), ("f.npy", "not fractions"), ("n.npy", "not"), ("b.png", "cannot be read")):
        with pytest.raises(DataError, match=text):
            read_mask(tmp_path / name)
