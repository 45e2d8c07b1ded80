"""Masks and pictures keep the place of the image they are about: read back with other libraries, voxel for voxel."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from omnifm.data.readers import Image, read_image, read_mask
from omnifm.errors import DataError
from omnifm.predict.writers import OutFolder, write_answer
from omnifm.tasks.base import Answer
from tests.predict.files import rotated_affine, write_nifti

CLASSES = ("background", "Läsion", "edema")
MADE_BY = {"config_hash": "ab" * 32, "client": "c-0", "rounds": 3}
SHAPE = (5, 6, 7)


def labels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, shape, dtype=np.uint8)


def write(out: Path, source: Path, answer: Answer, image: Image | None = None) -> dict[str, Path]:
    found = write_answer(OutFolder(out), "x", source, image or read_image(source), answer, MADE_BY)
    return {kind: out / name for kind, name in found.items()}


def codes(image: Any) -> tuple[int, int]:
    return int(image.header["qform_code"]), int(image.header["sform_code"])


@pytest.mark.parametrize(("qform", "sform"), [(1, 2), (1, 0), (0, 4), (0, 0)])
def test_a_nifti_mask_has_the_affines_codes_zooms_and_units_of_its_image(tmp_path: Path, qform: int, sform: int) -> None:
    second = rotated_affine() + np.eye(4)[[3, 0, 1, 2]] * 0.125  # a shear, which a qform cannot hold
    second[3] = (0, 0, 0, 1)
    source = write_nifti(tmp_path / "in.nii.gz", np.zeros(SHAPE, np.int16), qform=qform, sform=sform, second=second)
    mask = labels(*SHAPE)
    path = write(tmp_path / "out", source, Answer({}, mask, CLASSES))["mask"]
    assert path.name == "x-mask.nii.gz"
    old, new = nibabel.load(source), nibabel.load(path)
    np.testing.assert_array_equal(np.asarray(new.dataobj), mask)
    assert new.get_data_dtype() == np.uint8 and new.dataobj.slope == 1
    assert codes(new) == codes(old) == (qform, sform)
    np.testing.assert_array_equal(new.affine, old.affine)
    for name in ("get_qform", "get_sform"):
        for coded in (False, True):
            a, b = getattr(old, name)(coded=coded), getattr(new, name)(coded=coded)
            a, b = (a[0], b[0]) if coded else (a, b)
            assert (a is None and b is None) or np.array_equal(a, b)
    assert new.header.get_zooms() == old.header.get_zooms()
    assert new.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_array_equal(read_mask(path), mask)


def test_a_nifti_mask_names_its_classes_and_no_patient(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "in.nii", np.zeros(SHAPE, np.float32))
    path = write(tmp_path / "out", source, Answer({}, labels(*SHAPE), CLASSES))["mask"]
    found = nibabel.load(path)
    assert found.header.get_intent()[0] == "label"
    assert json.loads(found.header.extensions[0].get_content()) == {"classes": list(CLASSES)}
    import gzip

    assert b"Secret" not in gzip.decompress(path.read_bytes())


def corners(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return where the eight outer corners of a grid are; samples are boxes around their centres."""
    ends = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape], indexing="ij")).reshape(3, -1)
    return (affine @ np.vstack([ends, np.ones(8)]))[:3]


def test_an_enlarged_volume_fills_the_same_box(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "in.nii.gz", labels(*SHAPE).astype(np.int16))
    large = np.random.default_rng(1).random((1, 10, 12, 7), dtype=np.float32)
    path = write(tmp_path / "out", source, Answer({}, image=large))["image"]
    old, new = nibabel.load(source), nibabel.load(path)
    np.testing.assert_array_equal(new.get_fdata(dtype=np.float32), large[0])
    assert codes(new) == codes(old)
    for a, b in ((old.get_qform(), new.get_qform()), (old.get_sform(), new.get_sform())):
        np.testing.assert_allclose(corners(b, new.shape), corners(a, old.shape), atol=1e-4)
    np.testing.assert_allclose(new.header.get_zooms(), np.array(old.header.get_zooms()) / (2, 2, 1), rtol=1e-6)


def test_a_volume_without_a_header_keeps_its_spacing_or_says_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.arange(60.0).reshape(3, 4, 5))
    path = write(tmp_path / "a", tmp_path / "v.npy", Answer({}, labels(3, 4, 5), CLASSES))["mask"]
    assert codes(nibabel.load(path)) == (0, 0) and nibabel.load(path).header.get_zooms() == (1, 1, 1)
    volume = Image(np.zeros((1, 3, 4, 5), np.float32), (3.0, 1.0, 2.0), rotated_affine(), 12)
    film = np.random.default_rng(2).random((3, 3, 8, 10), dtype=np.float32)
    path = write(tmp_path / "b", tmp_path / "folder", Answer({}, image=film), volume)["image"]
    found = nibabel.load(path)
    np.testing.assert_allclose(corners(found.affine, found.shape), corners(rotated_affine(), (3, 4, 5)), atol=1e-4)
    pixels = np.asarray(found.dataobj)
    for k, name in enumerate("RGB"):
        np.testing.assert_array_equal(pixels[name], np.rint(film[k] * 255))


def test_a_png_mask_holds_numbers_colours_and_names(tmp_path: Path) -> None:
    Pillow.fromarray(labels(9, 8)).save(tmp_path / "in.png")
    mask = labels(9, 8)
    path = write(tmp_path / "out", tmp_path / "in.png", Answer({}, mask, CLASSES))["mask"]
    assert path.name == "x-mask.png"
    with Pillow.open(path) as found:
        assert found.mode == "P"
        np.testing.assert_array_equal(np.asarray(found), mask)
        assert json.loads(found.text["classes"]) == list(CLASSES)
        palette = np.array(found.getpalette()).reshape(-1, 3)
    assert palette[0].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in palette[:12].tolist()}) == 12
    np.testing.assert_array_equal(read_mask(path), mask)


@pytest.mark.parametrize(("bits", "channels", "name"), [(8, 1, "png"), (8, 3, "png"), (12, 1, "png"), (16, 3, "tiff")])
def test_pictures_have_the_depth_and_the_colours_of_their_source(bits: int, channels: int, name: str, tmp_path: Path) -> None:
    found = np.random.default_rng(3).random((channels, 6, 4), dtype=np.float32)
    image = Image(np.zeros((channels, 3, 2), np.float32), None, None, bits)
    path = write(tmp_path / "out", tmp_path / "in.dcm", Answer({}, image=found), image)["image"]
    assert path.name == f"x-image.{name}"
    white = 255 if bits == 8 else 65535
    if name == "tiff":
        pixels = np.moveaxis(tifffile.imread(path), -1, 0)
    else:
        pixels = read_image(path).array
        assert read_image(path).bits == (8 if bits == 8 else 16)
    np.testing.assert_array_equal(pixels, np.rint(found.astype(np.float64) * white))


def test_nothing_is_replaced_and_nothing_half_written_stays(tmp_path: Path) -> None:
    out = OutFolder(tmp_path / "out")
    out.write_json("a.json", {"x": 1})
    with pytest.raises(DataError, match=r"out/a\.json: is there already; --force replaces it"):
        out.write_json("a.json", {"x": 2})

    def half(path: Path) -> None:
        path.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"out/sub/b\.json: cannot be written \(No space left on device\)"):
        out.put("sub/b.json", half)

    def refused(path: Path) -> None:
        path.write_text("ha")
        raise KeyError("zooms")

    with pytest.raises(DataError, match=r"out/sub/b\.nii: cannot be written \(KeyError\)"):
        out.put("sub/b.nii", refused)
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["a.json"]
    assert json.loads((tmp_path / "out/a.json").read_text()) == {"x": 1}
    with pytest.raises(DataError, match="leaves the folder of answers"):
        out.write_json("../b.json", {})
    OutFolder(tmp_path / "out", force=True).write_json("a.json", {"x": 2})
    assert json.loads((tmp_path / "out/a.json").read_text()) == {"x": 2}
    with pytest.raises(ValueError, match="Out of range"):
        out.write_json("c.json", {"x": float("nan")})
