"""Patients: reproducible, invertible head shapes, masks that follow the fractions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm.data.atlas.anatomy import TISSUES
from omnifm.data.atlas.lesion import KINDS
from omnifm.data.atlas.patient import LABELS, TISSUE_CLASSES, draw_patient, draw_warp, lesion_mask, slice_fractions, tissue_mask
from omnifm.seeds import numpy_generator


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), x=st.floats(-60, 60), y=st.floats(-90, 60), z=st.floats(-5, 50))
def test_inverse_undoes_the_warp(seed: int, x: float, y: float, z: float) -> None:
    warp = draw_warp(numpy_generator(seed, "test warp"))
    target = np.array([x, y, z], dtype=np.float32)
    np.testing.assert_allclose(warp(warp.inverse(target)[None, None])[0, 0], target, atol=0.3)


def test_warps_do_not_fold() -> None:
    """The Jacobian determinant, by finite differences, stays positive and near one."""
    lines = np.arange(-60, 61, 5, dtype=np.float32)
    grid = np.stack(np.meshgrid(lines, lines, indexing="ij"), axis=-1)
    for seed in range(10):
        warp = draw_warp(numpy_generator(seed, "test warp"))
        point = np.concatenate([grid, np.full_like(grid[..., :1], 15.0)], axis=-1)
        columns = [(warp(point + step) - warp(point - step)) / 1.0 for step in 0.5 * np.eye(3, dtype=np.float32)]
        determinant = np.linalg.det(np.stack(columns, axis=-1))
        assert determinant.min() > 0.3
        assert determinant.max() < 2.5


@pytest.mark.parametrize("label", LABELS)
def test_a_patient_is_a_function_of_name_label_and_seed(label: str) -> None:
    first, again, other = (draw_patient("p1", label, seed) for seed in (5, 5, 6))
    assert first.levels == again.levels != other.levels
    level = first.levels[1]
    np.testing.assert_array_equal(slice_fractions(first, level, 40), slice_fractions(again, level, 40))
    assert (first.lesion is None) == (label == "normal")
    if first.lesion is not None:
        assert first.lesion.kind == label


def test_every_slice_of_an_ill_patient_shows_the_lesion_and_no_slice_of_a_normal_one() -> None:
    for number in range(10):
        for label in LABELS:
            patient = draw_patient(f"p{number}", label, 0)
            areas = [int(lesion_mask(slice_fractions(patient, level, 64)).sum()) for level in patient.levels]
            assert all(area >= 8 for area in areas) if label in KINDS else areas == [0, 0, 0]


def test_masks_agree_with_fractions_and_each_other() -> None:
    patient = draw_patient("p3", "tumour", 1)
    fractions = slice_fractions(patient, patient.levels[1], 96)
    tissue, lesion = tissue_mask(fractions), lesion_mask(fractions)
    np.testing.assert_array_equal(tissue == TISSUE_CLASSES.index("lesion"), lesion == 1)
    for name in ("csf", "grey", "white"):
        pure = fractions[TISSUES.index(name)] > 0.75
        assert pure.any()
        assert (tissue[pure] == TISSUE_CLASSES.index(name)).all()
    skull = fractions[TISSUES.index("bone")] > 0.6
    assert skull.any()
    assert (tissue[skull] == 0).all()
    assert set(np.unique(tissue)) == {0, 1, 2, 3, 4}
