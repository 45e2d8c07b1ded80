"""Signals against the physics they come from and the orderings every radiologist knows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnifm.data.atlas.anatomy import TISSUES
from omnifm.data.atlas.contrast import csf_t1, ct_values, inversion_recovery, mr_signals, null_time, pet_uptakes

times = st.floats(200.0, 5000.0)


def relaxed(start: float, milliseconds: float, t1: float) -> float:
    """Longitudinal magnetisation after free relaxation, in units of equilibrium."""
    return 1.0 + (start - 1.0) * math.exp(-milliseconds / t1)


@given(t1=times, t2=st.floats(20.0, 2000.0), tr=st.floats(3000.0, 12000.0), ti=st.floats(50.0, 2900.0), te=st.floats(5.0, 150.0))
def test_signal_is_what_the_pulse_train_leaves(t1: float, t2: float, tr: float, ti: float, te: float) -> None:
    """Play 180 - TI - 90 - (TR - TI) until it is steady, and read the transverse part at TE."""
    longitudinal = 1.0
    for _ in range(3):
        longitudinal = relaxed(-longitudinal, ti, t1)
        transverse, longitudinal = longitudinal, 0.0
        longitudinal = relaxed(longitudinal, tr - ti, t1)
    expected = 0.8 * abs(transverse) * math.exp(-te / t2)
    assert inversion_recovery(t1, t2, 0.8, tr=tr, te=te, ti=ti) == pytest.approx(expected, abs=1e-9)


@given(t1=times, tr=st.floats(500.0, 12000.0))
def test_null_time_nulls(t1: float, tr: float) -> None:
    assert inversion_recovery(t1, 100.0, 1.0, tr=tr, te=10.0, ti=null_time(t1, tr)) == pytest.approx(0.0, abs=1e-9)


def test_spin_echo_extremes() -> None:
    """A very long TR and very short TE leave the proton density; no recovery leaves nothing."""
    assert inversion_recovery(800.0, 80.0, 0.7, tr=1e6, te=1e-6, ti=None) == pytest.approx(0.7)
    assert inversion_recovery(800.0, 80.0, 0.7, tr=1e-6, te=1.0, ti=None) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("tesla", [1.5, 3.0])
def test_textbook_orderings(tesla: float) -> None:
    ti = 950.0 if tesla > 2 else None
    t1 = dict(zip(TISSUES, mr_signals(tesla, 2000.0 if ti else 400.0, 10.0, ti, 1.0), strict=True))
    t2 = dict(zip(TISSUES, mr_signals(tesla, 4500.0, 95.0, None, 0.0), strict=True))
    nulled = null_time(csf_t1(tesla), 9000.0)
    flair = dict(zip(TISSUES, mr_signals(tesla, 9000.0, 115.0, nulled, 0.0), strict=True))
    assert t1["fat"] > t1["white"] > t1["grey"] > t1["csf"]
    assert t2["csf"] > t2["grey"] > t2["white"] > t2["bone"]
    assert flair["csf"] < 0.01 < flair["white"] < flair["grey"]
    for lesion in ("core", "oedema", "infarct"):
        assert t1[lesion] < t1["white"]
        assert t2[lesion] > 1.1 * t2["grey"]
        assert flair[lesion] > 1.2 * flair["grey"]
    assert t2["blood"] < 0.7 * t2["white"]
    assert t1["blood"] > t1["white"]


def test_blood_brightens_on_t1_with_age() -> None:
    blood = TISSUES.index("blood")
    signals = [mr_signals(1.5, 400.0, 12.0, None, age)[blood] for age in (0.0, 0.5, 1.0)]
    assert signals == sorted(signals)
    assert signals[2] > 1.5 * signals[0]


def test_density_and_uptake_orderings() -> None:
    density = dict(zip(TISSUES, (ct_values() - 1000.0).tolist(), strict=True))
    assert density["fat"] < 0 < density["csf"] < density["white"] < density["grey"] < density["blood"] < density["bone"]
    assert density["infarct"] < density["white"]
    assert 60 <= density["blood"] <= 80
    uptake = dict(zip(TISSUES, pet_uptakes().tolist(), strict=True))
    assert uptake["grey"] / uptake["white"] == 4.0
    assert uptake["blood"] < uptake["necrosis"] < uptake["infarct"] < uptake["white"] < uptake["grey"] <= uptake["core"]
