"""The scanners of the simulated hospitals: from tissue fractions to the grey values a viewer would show."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omnifm.data.atlas.anatomy import FIELD_OF_VIEW, TISSUES, Array
from omnifm.data.atlas.contrast import csf_t1, ct_values, mr_signals, null_time, pet_uptakes

CONTRASTS = ("t1", "t2", "flair", "ct", "pet")
"""The five kinds of picture: three MR sequences, CT and FDG-PET."""

# Full width at half maximum of a Gaussian over its standard deviation.
_FWHM = 2.3548
# The brain window of a CT report: centre 40, width 80 HU (here above air, which is -1000 HU).
_WINDOW_LOW, _WINDOW_HIGH = 1000.0, 1080.0
# A research protocol for super-resolution targets: finer and quieter than the clinical one.
_SHARP_PSF, _SHARP_NOISE = 0.55, 0.3


NULL_CSF = -1.0
"""Value of `Scanner.ti` that stands for the inversion time at which CSF gives no signal."""


@dataclass(frozen=True)
class Scanner:
    """One machine at one hospital, with the protocol it runs.

    Attributes:
        site: its name in the `site` column.
        contrast: one of `CONTRASTS`.
        psf: in-plane resolution, full width at half maximum, mm.
        noise: MR, standard deviation per channel as a share of the white matter signal; CT, standard deviation in HU;
            PET, one over the expected counts in a pixel of white matter.
        tesla: MR field strength.
        tr, te: repetition and echo time, ms.
        ti: inversion time, ms; `NULL_CSF` for the one that nulls CSF; None for a spin echo.
        bias: MR, root mean square of the log receive field.
    """

    site: str
    contrast: str
    psf: float
    noise: float
    tesla: float = 1.5
    tr: float = 0.0
    te: float = 0.0
    ti: float | None = None
    bias: float = 0.0

    @property
    def modality(self) -> str:
        """The format's name of the modality: `MRI`, `CT` or `PET`."""
        return self.contrast.upper() if self.contrast in ("ct", "pet") else "MRI"

    @property
    def sequence(self) -> str:
        """`T1`, `T2` or `FLAIR`; empty for CT and PET."""
        return self.contrast.upper() if self.modality == "MRI" else ""


SCANNERS = (
    Scanner("north_t1", "t1", psf=1.3, noise=0.035, tesla=1.5, tr=400, te=12, bias=0.10),
    Scanner("south_t1", "t1", psf=1.0, noise=0.050, tesla=3.0, tr=2000, te=8, ti=950, bias=0.18),
    Scanner("north_t2", "t2", psf=1.3, noise=0.050, tesla=1.5, tr=4000, te=100, bias=0.10),
    Scanner("south_t2", "t2", psf=1.0, noise=0.040, tesla=3.0, tr=5000, te=90, bias=0.18),
    Scanner("north_flair", "flair", psf=1.6, noise=0.045, tesla=1.5, tr=9000, te=120, ti=NULL_CSF, bias=0.10),
    Scanner("south_flair", "flair", psf=1.3, noise=0.035, tesla=3.0, tr=9000, te=110, ti=NULL_CSF, bias=0.18),
    Scanner("north_ct", "ct", psf=1.2, noise=2.4),
    Scanner("south_ct", "ct", psf=2.0, noise=1.7),
    Scanner("north_pet", "pet", psf=4.5, noise=0.025),
    Scanner("south_pet", "pet", psf=6.5, noise=0.012),
)
"""Two hospitals' machines per contrast; they differ in field strength, resolution, noise and receive field."""


def scanners(contrast: str) -> tuple[Scanner, ...]:
    """Return the scanners of one contrast, north before south."""
    return tuple(s for s in SCANNERS if s.contrast == contrast)


def acquire(fractions: Array, scanner: Scanner, blood_age: float, rng: np.random.Generator, sharp: bool = False) -> Array:
    """Scan one slice.

    Args:
        fractions: tissue fractions, float32 (len(TISSUES), h, w).
        scanner: the machine.
        blood_age: see `contrast.mr_signals`; only MR sees it.
        rng: the scan's stream: receive field, noise and small differences between patients' tissues.
        sharp: use the research protocol (0.55 times the blur, 0.3 times the noise) of the super-resolution cohorts.

    Returns:
        Displayed grey values in 0..1, float32 (h, w).
    """
    psf = scanner.psf * (_SHARP_PSF if sharp else 1.0)
    noise = scanner.noise * (_SHARP_NOISE if sharp else 1.0)
    if scanner.modality == "CT":
        return _ct(fractions, psf, noise, rng)
    if scanner.modality == "PET":
        return _pet(fractions, psf, noise, rng)
    return _mr(fractions, scanner, psf, noise, blood_age, rng)


def _mr(fractions: Array, scanner: Scanner, psf: float, noise: float, blood_age: float, rng: np.random.Generator) -> Array:
    """Rician noise (Gudbjartsson and Patz, Magn Reson Med 34:910, 1995): the modulus of a complex Gaussian channel."""
    ti = null_time(csf_t1(scanner.tesla), scanner.tr) if scanner.ti == NULL_CSF else scanner.ti
    signals = mr_signals(scanner.tesla, scanner.tr, scanner.te, ti, blood_age)
    white = signals[TISSUES.index("white")]
    brain = signals[: TISSUES.index("white") + 1].max()
    image = _blur(_mixture(fractions, signals, 0.03, rng), psf) * _receive_field(fractions.shape[1], scanner.bias, rng)
    real, imaginary = rng.normal(0.0, noise * white, (2, *image.shape))
    ceiling = brain * {"t1": 1.3, "t2": 1.05, "flair": 1.7}[scanner.contrast] * rng.uniform(0.92, 1.08)
    return _displayed(np.hypot(image + real, imaginary) / ceiling)


def _ct(fractions: Array, psf: float, noise: float, rng: np.random.Generator) -> Array:
    values = _blur(_mixture(fractions, ct_values(), 0.0, rng), psf) + rng.normal(0.0, 1.0)
    # Filtered back-projection leaves noise that is correlated over about two pixels.
    grain = _blur(rng.normal(0.0, 1.0, values.shape).astype(np.float32), 1.5 * FIELD_OF_VIEW / values.shape[1])
    return _displayed((values + grain * (noise / grain.std()) - _WINDOW_LOW) / (_WINDOW_HIGH - _WINDOW_LOW))


def _pet(fractions: Array, psf: float, noise: float, rng: np.random.Generator) -> Array:
    """Counts are Poisson at the detector's resolution; a 4 mm post-filter, as in clinical practice, correlates them."""
    uptake = pet_uptakes()
    expected = _blur(_mixture(fractions, uptake, 0.06, rng), psf)
    counts = rng.poisson(np.maximum(expected, 0.0) / noise) * noise
    ceiling = 1.05 * uptake[TISSUES.index("grey")] * rng.uniform(0.9, 1.1)
    return _displayed(_blur(counts.astype(np.float32), 4.0) / ceiling)


def _mixture(fractions: Array, values: npt.NDArray[np.float64], spread: float, rng: np.random.Generator) -> Array:
    """Partial-volume mean of tissue values; each tissue's value differs between patients by `spread` (a share)."""
    own = values * (1.0 + rng.normal(0.0, spread, values.shape))
    return np.asarray(np.einsum("t,thw->hw", own.astype(np.float32), fractions), dtype=np.float32)


def _receive_field(size: int, strength: float, rng: np.random.Generator) -> Array:
    """Smooth positive factor over the field of view: the exponential of a random quadratic, (size, size)."""
    y, x = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    terms = np.stack([x, y, x * y, x**2 - 1 / 3, y**2 - 1 / 3])
    log_field = np.einsum("k,khw->hw", rng.normal(0.0, strength, len(terms)), terms)
    return np.asarray(np.exp(log_field), dtype=np.float32)


def _blur(image: Array, fwhm: float) -> Array:
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(image, fwhm / _FWHM * image.shape[1] / FIELD_OF_VIEW), dtype=np.float32)


def _displayed(image: npt.NDArray[np.floating]) -> Array:
    return np.asarray(np.clip(image, 0.0, 1.0), dtype=np.float32)
