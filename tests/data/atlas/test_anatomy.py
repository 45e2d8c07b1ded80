"""The template's geometry against landmarks of the published brain atlas."""

import numpy as np
import pytest

from omnifm.data.atlas import anatomy
from omnifm.data.atlas.anatomy import FIELD_OF_VIEW, TISSUES, load_template, region, slice_grid, tissue_fractions
from omnifm.errors import DataError

# Landmarks in ICBM 152 coordinates, as in any textbook of functional imaging.
LANDMARKS = {
    (10, -90, 0): "occipital",  # primary visual cortex
    (40, 40, 25): "frontal",  # dorsolateral prefrontal cortex
    (38, -20, 55): "frontal",  # motor hand area
    (45, -34, 52): "parietal",  # somatosensory hand area
    (48, -60, 30): "parietal",  # angular gyrus
    (50, -20, 5): "temporal",  # Heschl's gyrus
    (-40, 12, -30): "temporal",  # temporal pole
    (-12, -18, 8): "deep",  # thalamus
    (26, 4, 2): "deep",  # putamen
}


def at(*point: float) -> dict[str, float]:
    fractions = tissue_fractions(np.array(point, dtype=np.float32)[None, None])[:, 0, 0]
    return dict(zip(TISSUES, fractions.tolist(), strict=True))


@pytest.mark.parametrize("point", LANDMARKS)
def test_regions_hold_their_landmarks(point: tuple[int, int, int]) -> None:
    assert region(np.array(point, dtype=np.float32)) == LANDMARKS[point]


@pytest.mark.parametrize("side", [-1, 1])
def test_known_points_are_of_the_right_tissue(side: int) -> None:
    assert at(side * 26, -22, 32)["white"] > 0.9  # corona radiata
    assert at(side * 25, 4, 0)["grey"] > 0.7  # putamen
    assert at(side * 10, 5, 16)["grey"] > 0.9  # head of the caudate nucleus
    assert at(side * 14, -12, 24)["csf"] > 0.9  # body of the lateral ventricle
    assert sum(at(side * 100, -17, 20).values()) == pytest.approx(0.0, abs=1e-5)  # air beside the head


def test_layers_of_the_head_follow_each_other_from_the_inside_out() -> None:
    """Walk from the middle outwards to the right: brain, CSF, inner table, marrow, outer table, fat, muscle, air."""
    points = slice_grid(20.0, 448)[224:225, :224][:, ::-1]
    fractions = tissue_fractions(points)[:, 0]
    peaks = [int(fractions[TISSUES.index(name)].argmax()) for name in ("marrow", "fat", "muscle")]
    bone = np.flatnonzero(fractions[TISSUES.index("bone")] > 0.6)
    last_brain = int(np.flatnonzero(fractions[1] + fractions[2] > 0.5).max())
    assert last_brain < bone.min() < peaks[0] < bone.max() < peaks[1] < peaks[2]
    assert 30 < bone.max() * 0.5 < 85  # millimetres from the midline


def test_fractions_are_shares() -> None:
    fractions = tissue_fractions(slice_grid(12.0, 96))
    assert fractions.dtype == np.float32
    assert fractions.min() >= -1e-6
    assert fractions.sum(axis=0).max() <= 1 + 1e-5
    assert fractions.sum(axis=0)[48, 48] == pytest.approx(1.0, abs=1e-5)


def test_a_thicker_skull_has_more_bone_and_no_more_brain() -> None:
    grid = slice_grid(20.0, 64)
    thin, thick = (tissue_fractions(grid, scale).sum(axis=(1, 2)) for scale in (0.8, 1.25))
    bone = TISSUES.index("bone")
    assert thick[bone] > 1.2 * thin[bone]
    np.testing.assert_allclose(thick[1:3], thin[1:3])


def test_the_grid_is_radiological_and_fills_the_field_of_view() -> None:
    grid = slice_grid(7.0, 10)
    assert grid.shape == (10, 10, 3)
    assert grid[0, 0, 0] > 0 > grid[0, -1, 0]  # the patient's right is on the left of the image
    assert grid[0, 0, 1] > grid[-1, 0, 1]  # the front is at the top
    assert grid[0, 0, 0] - grid[0, -1, 0] == pytest.approx(0.9 * FIELD_OF_VIEW)
    assert set(grid[..., 2].ravel().tolist()) == {7.0}


def test_the_template_is_the_packaged_one() -> None:
    """Against an independent reading of the file: shape, origin and the value at the voxel of one coordinate."""
    import importlib.resources

    import nibabel

    name = "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz"
    with importlib.resources.as_file(importlib.resources.files("nilearn.datasets.data").joinpath(name)) as path:
        image = nibabel.load(path)
        voxel = np.rint(np.linalg.inv(image.affine) @ [24, -20, 30, 1]).astype(int)[:3]
        expected = int(np.asarray(image.dataobj)[tuple(voxel)])
    template = load_template()
    assert template.white.shape == (197, 233, 189)
    assert template.white[tuple((np.array([24, -20, 30]) - template.origin).astype(int))] == expected
    assert load_template() is template


def test_a_missing_template_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "_PACKAGE", "nilearn.datasets.nowhere")
    with pytest.raises(DataError, match=r"the atlas needs mni_icbm152_t1.* from the nilearn package"):
        anatomy.load_template.__wrapped__()
