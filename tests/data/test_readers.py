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


def test_tiff_where_white_is_zero_in_one_bit_and_in_sixteen_compressed(tmp_path: Path) -> None:
    drawn = GREY > 200
    tifffile.imwrite(tmp_path / "bits.tif", ~drawn, photometric="miniswhite")
    np.testing.assert_array_equal(read_mask(tmp_path / "bits.tif"), drawn)
    frame = Pillow.fromarray(65535 - DEEP)
    frame.save(tmp_path / "deep.tif", compression="tiff_lzw", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_image(tmp_path / "deep.tif").array[0], DEEP)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_tiff_in_other_colours_is_what_pillow_shows(tmp_path: Path, mode: str, compression: str) -> None:
    red = Pillow.new("RGB", (4, 3), (219, 40, 58))
    red.convert(mode).save(tmp_path / "x.tif", compression=compression)
    found = read_image(tmp_path / "x.tif").array[:, 1, 1]
    np.testing.assert_allclose(found, (219, 40, 58), atol=4)


def test_tiff_channels_are_dropped_only_where_they_are_transparency(tmp_path: Path) -> None:
    opaque = np.dstack([COLOUR, np.full(COLOUR.shape[:2], 255, np.uint8)])
    tifffile.imwrite(tmp_path / "rgba.tif", opaque, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.tif").array, first(COLOUR))
    for channels in (2, 4):
        stack = noise(channels, 6, 9, stream=5)
        tifffile.imwrite(tmp_path / "stains.tif", stack, imagej=True, metadata={"axes": "CYX"})
        with pytest.raises(DataError, match=r"stains.tif: shape \(.*\) is not one or three channels"):
            read_image(tmp_path / "stains.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "lzw.tif"])
def test_pictures_lie_as_a_viewer_shows_them(tmp_path: Path, name: str, orientation: int) -> None:
    """EXIF 2.32, table of tag 274: which side of the stored picture is the visual top and which the visual left."""
    stored = np.zeros((16, 24), np.uint8)
    stored[:8, :8] = 250
    seen = {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[orientation]
    exif = Pillow.Exif()
    exif[274] = orientation
    Pillow.fromarray(stored).save(tmp_path / name, exif=exif, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {}))
    array = read_image(tmp_path / name).array[0]
    assert array.shape == ((24, 16) if orientation > 4 else (16, 24))
    corners = [array[2, 2], array[2, -3], array[-3, 2], array[-3, -3]]
    assert int(np.argmax(corners)) == seen and sorted(corners)[2] < 30


def test_nifti_that_does_not_say_how_it_lies_and_one_in_microns(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOLUME, np.diag([2.0, 3.0, 4.0, 1.0]))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "silent.nii")
    found = read_image(tmp_path / "silent.nii")
    assert found.affine is None and found.spacing == (2.0, 3.0, 4.0)
    image = nibabel.Nifti1Image(VOLUME, np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "small.nii")
    found = read_image(tmp_path / "small.nii")
    assert found.affine is not None and found.spacing is not None
    np.testing.assert_allclose(found.spacing, (0.002, 0.003, 0.004))
    np.testing.assert_allclose(np.diag(found.affine), (0.002, 0.003, 0.004, 1))


def test_paths_that_cannot_be_opened_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(OSError: .*too long"):
        read_image(tmp_path / ("x" * 300 + ".png"))
    with pytest.raises(DataError, match=r"^x: not a PNG"):
        read_image(tmp_path / "x")


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


def test_a_mask_in_which_white_is_zero_is_refused_where_it_has_several_bits(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", GREY, photometric="miniswhite")
    with pytest.raises(DataError, match=r"x\.tif: a mask in which 0 is shown white .* save it as PNG"):
        read_mask(tmp_path / "x.tif")
    Pillow.fromarray(GREY).save(tmp_path / "y.tif", compression="tiff_lzw", tiffinfo={262: 0})
    with pytest.raises(DataError, match="shown white"):
        read_mask(tmp_path / "y.tif")


def test_masks_that_are_none(tmp_path: Path) -> None:
    save_png(tmp_path / "c.png", COLOUR)
    np.save(tmp_path / "f.npy", np.full((3, 3), 0.5))
    np.save(tmp_path / "n.npy", np.full((3, 3), np.nan))
    (tmp_path / "b.png").write_bytes(b"no")
    for name, text in (("c.png", "not colours"), ("f.npy", "not fractions"), ("n.npy", "not"), ("b.png", "cannot be read")):
        with pytest.raises(DataError, match=text):
            read_mask(tmp_path / name)
