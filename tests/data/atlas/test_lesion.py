"""Lesions: placed in brain, bounded, on their side, pushing but not tearing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm.data.atlas.anatomy import HEALTHY, TISSUES, slice_grid, tissue_fractions
from omnifm.data.atlas.lesion import KINDS, Lesion, add_lesion, draw_lesion, pushed
from omnifm.seeds import numpy_generator

kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 10_000)


def drawn(kind: str, seed: int) -> Lesion:
    return draw_lesion(kind, numpy_generator(seed, "test lesion"))


@settings(max_examples=25)
@given(kind=kinds, seed=seeds)
def test_lesions_lie_in_brain_and_leave_skull_and_air_alone(kind: str, seed: int) -> None:
    lesion = drawn(kind, seed)
    points = slice_grid(float(lesion.centre[2]), 56)
    healthy = tissue_fractions(pushed(lesion, points))
    ill = add_lesion(healthy, lesion, points)
    assert ill.min() >= -1e-6
    np.testing.assert_allclose(ill.sum(axis=0), healthy.sum(axis=0), atol=1e-4)
    outside = healthy[:3].sum(axis=0) < 0.01
    assert ill[HEALTHY:, outside].sum() == 0.0
    area = (ill[HEALTHY:].sum(axis=0) > 0.3).sum() * 4.0**2
    assert area > 100.0  # square millimetres: visible in the slice through its centre


@settings(max_examples=25)
@given(kind=kinds, seed=seeds)
def test_side_and_region_are_those_of_the_centre_of_mass(kind: str, seed: int) -> None:
    lesion = drawn(kind, seed)
    points = slice_grid(float(lesion.centre[2]), 56)
    share = add_lesion(tissue_fractions(points), lesion, points)[HEALTHY:].sum(axis=0)
    x = float((share * points[..., 0]).sum() / share.sum())
    assert lesion.side == ("right" if x > 0 else "left")
    assert lesion.region in ("frontal", "parietal", "temporal", "occipital", "deep")


@pytest.mark.parametrize(
    ("kind", "rows"), [("tumour", {"core", "oedema"}), ("infarct", {"infarct"}), ("haemorrhage", {"blood", "oedema"})]
)
def test_each_kind_has_its_own_compartments(kind: str, rows: set[str]) -> None:
    lesion = drawn(kind, 3)
    points = slice_grid(float(lesion.centre[2]), 56)
    ill = add_lesion(tissue_fractions(points), lesion, points)[HEALTHY:]
    present = {name for name, row in zip(TISSUES[HEALTHY:], ill, strict=True) if row.max() > 0.3}
    assert rows <= present <= rows | ({"necrosis"} if kind == "tumour" else set())


def test_infarcts_do_not_cross_the_midline() -> None:
    for seed in range(12):
        lesion = drawn("infarct", seed)
        points = slice_grid(float(lesion.centre[2]), 56)
        share = add_lesion(tissue_fractions(points), lesion, points)[HEALTHY:].sum(axis=0)
        assert share[np.sign(lesion.centre[0]) * points[..., 0] < -3].max() < 0.01


def test_pushing_is_one_to_one_fades_away_and_spares_infarcts() -> None:
    distance = np.linspace(0, 120, 400, dtype=np.float32)
    direction = np.array([0.6, 0.8, 0.0], dtype=np.float32)
    for seed in range(20):
        lesion = drawn("tumour", seed)
        ray = lesion.centre + distance[None, :, None] * direction
        origin = np.linalg.norm(pushed(lesion, ray) - lesion.centre, axis=-1)[0]
        assert (np.diff(origin) > 0).all()
        assert (origin <= distance + 1e-3).all()  # tissue moves outwards
        assert origin[50] < 0.85 * distance[50]
        assert origin[-1] == pytest.approx(120.0, abs=0.1)
    infarct, points = drawn("infarct", 0), slice_grid(0.0, 8)
    np.testing.assert_array_equal(pushed(infarct, points), points)
