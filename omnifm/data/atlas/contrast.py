"""What each tissue looks like to each modality: relaxation times, Hounsfield units and tracer uptake.

Sources of the numbers
    MR, 1.5 T, healthy: Kwan, Evans, Pike, IEEE Trans Med Imaging 18:1085 (1999), the BrainWeb simulator.
    MR, 3 T, grey and white: Wansapura et al., J Magn Reson Imaging 9:531 (1999); muscle: Stanisz et al., Magn Reson Med
    54:507 (2005); CSF T1: Rooney et al., Magn Reson Med 57:308 (2007).
    MR, lesions: both times are longer than in brain in tumour, oedema and infarct (Bottomley et al., Med Phys 14:1, 1987);
    acute blood is dark on T2, early subacute blood also bright on T1 (Bradley, Radiology 189:15, 1993). The lesion rows are
    representative values inside the reviewed ranges, not one study's means.
    CT: grey about 38, white 28, CSF 5 HU (Brooks et al., J Comput Assist Tomogr 4:489, 1980, explain the difference by lipid
    content); clotted blood 60 to 80 HU (New and Aronow, Radiology 121:635, 1976).
    PET: FDG uptake of grey to white matter 4:1 as in the phantom of Hoffman et al. (IEEE Trans Nucl Sci 37:616, 1990); tumour
    above 1.5 times white matter marks high grade (Delbeke et al., Radiology 195:47, 1995).
"""

import math

import numpy as np
import numpy.typing as npt

from omnifm.data.atlas.anatomy import TISSUES

_RELAXATION_1_5T = {  # T1 ms, T2 ms, proton density
    "csf": (2569.0, 329.0, 1.0),
    "grey": (833.0, 83.0, 0.86),
    "white": (500.0, 70.0, 0.77),
    "bone": (500.0, 10.0, 0.06),
    "marrow": (350.0, 60.0, 0.55),
    "fat": (350.0, 70.0, 0.95),
    "muscle": (900.0, 47.0, 0.9),
    "core": (1000.0, 130.0, 0.88),
    "necrosis": (2000.0, 230.0, 0.95),
    "oedema": (1000.0, 125.0, 0.86),
    "infarct": (1150.0, 135.0, 0.9),
}
_RELAXATION_3T = {
    "csf": (4300.0, 1500.0, 1.0),
    "grey": (1331.0, 110.0, 0.86),
    "white": (832.0, 80.0, 0.77),
    "bone": (700.0, 8.0, 0.06),
    "marrow": (365.0, 60.0, 0.55),
    "fat": (380.0, 68.0, 0.95),
    "muscle": (1412.0, 50.0, 0.9),
    "core": (1500.0, 170.0, 0.88),
    "necrosis": (2900.0, 280.0, 0.95),
    "oedema": (1400.0, 180.0, 0.86),
    "infarct": (1550.0, 190.0, 0.9),
}
# Acute blood (deoxyhaemoglobin) and early subacute blood (intracellular methaemoglobin).
_BLOOD_ACUTE = (1150.0, 40.0, 0.85)
_BLOOD_SUBACUTE = (360.0, 42.0, 0.85)

_HOUNSFIELD = {
    "csf": 5.0,
    "grey": 38.0,
    "white": 28.0,
    "bone": 1000.0,
    "marrow": 400.0,
    "fat": -90.0,
    "muscle": 50.0,
    "core": 34.0,
    "necrosis": 17.0,
    "oedema": 19.0,
    "infarct": 20.0,
    "blood": 66.0,
}
_AIR_HOUNSFIELD = -1000.0

_UPTAKE = {  # relative to white matter
    "csf": 0.05,
    "grey": 4.0,
    "white": 1.0,
    "bone": 0.2,
    "marrow": 0.4,
    "fat": 0.25,
    "muscle": 0.6,
    "core": 4.4,
    "necrosis": 0.3,
    "oedema": 0.7,
    "infarct": 0.5,
    "blood": 0.05,
}


def inversion_recovery(t1: float, t2: float, density: float, tr: float, te: float, ti: float | None) -> float:
    """Return the magnitude signal of a spin echo, or of an inversion-recovery spin echo when `ti` is given.

    `S = PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2)`; without inversion `S = PD (1 - exp(-TR/T1)) exp(-TE/T2)`
    (TE much shorter than TR). All times in milliseconds.

    Example:
        >>> round(inversion_recovery(500.0, 70.0, 0.77, tr=500.0, te=12.0, ti=None), 3)
        0.41
    """
    recovered = 1.0 - math.exp(-tr / t1) if ti is None else 1.0 - 2.0 * math.exp(-ti / t1) + math.exp(-tr / t1)
    return density * abs(recovered) * math.exp(-te / t2)


def null_time(t1: float, tr: float) -> float:
    """Return the inversion time in ms at which a tissue of this T1 gives no signal: `T1 (ln 2 - ln(1 + exp(-TR/T1)))`."""
    return t1 * (math.log(2.0) - math.log1p(math.exp(-tr / t1)))


def csf_t1(tesla: float) -> float:
    """Return the T1 of cerebrospinal fluid in ms at 1.5 or 3 T."""
    return _relaxation(tesla)["csf"][0]


def _relaxation(tesla: float) -> dict[str, tuple[float, float, float]]:
    return _RELAXATION_1_5T if tesla < 2.0 else _RELAXATION_3T


def mr_signals(tesla: float, tr: float, te: float, ti: float | None, blood_age: float) -> npt.NDArray[np.float64]:
    """Return the MR signal of each of `TISSUES`, float64 (len(TISSUES),), in units of fully relaxed water.

    Args:
        tesla: field strength; below 2 the 1.5 T table is used.
        tr: repetition time, ms.
        te: echo time, ms.
        ti: inversion time, ms, or None for a spin echo.
        blood_age: 0 for acute, 1 for early subacute blood; rates (1/T1, 1/T2) are mixed.
    """
    table = dict(_relaxation(tesla))
    table["blood"] = _mix(_BLOOD_ACUTE, _BLOOD_SUBACUTE, blood_age)
    return np.array([inversion_recovery(*table[name], tr=tr, te=te, ti=ti) for name in TISSUES])


def _mix(a: tuple[float, float, float], b: tuple[float, float, float], weight: float) -> tuple[float, float, float]:
    t1, t2 = (1.0 / ((1.0 - weight) / x + weight / y) for x, y in zip(a[:2], b[:2], strict=True))
    return t1, t2, (1.0 - weight) * a[2] + weight * b[2]


def ct_values() -> npt.NDArray[np.float64]:
    """Return the density of each of `TISSUES` above that of air, float64 (len(TISSUES),), Hounsfield units."""
    return np.array([_HOUNSFIELD[name] - _AIR_HOUNSFIELD for name in TISSUES])


def pet_uptakes() -> npt.NDArray[np.float64]:
    """Return the FDG uptake of each of `TISSUES` relative to white matter, float64 (len(TISSUES),)."""
    return np.array([_UPTAKE[name] for name in TISSUES])
