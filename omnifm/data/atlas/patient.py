"""A simulated patient: a warped head, perhaps with a lesion, and the slices taken of it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omnifm.data.atlas.anatomy import HEALTHY, TISSUES, Array, slice_grid, tissue_fractions
from omnifm.data.atlas.lesion import KINDS, Lesion, add_lesion, draw_lesion, pushed
from omnifm.seeds import numpy_generator

LABELS = ("normal", *KINDS)
"""Classes of the classification cohorts."""

TISSUE_CLASSES = ("background", "csf", "grey", "white", "lesion")
"""Names of the values of a tissue mask."""

SLICES = 3
"""Axial slices per patient."""

# Shape differences between adults: about 4 % in size, a few degrees of head tilt, several millimetres locally.
_SCALE_SD = 0.035
_TILT_SD = np.deg2rad((2.0, 2.0, 4.0))
_WAVES = ((10, 40.0, 1.7), (14, 16.0, 0.8))  # number, wavelength scale in mm, root mean square in mm
# A lesion need not replace all of the tissue: from this share on a pixel belongs to it.
_LESION_SHARE = 0.3
_VENTRICLES = np.array([[11.0, -8.0, 22.0], [-11.0, -8.0, 22.0]], dtype=np.float32)


@dataclass(frozen=True)
class Warp:
    """A smooth map from a patient's millimetres to template millimetres: affine, plus waves, plus ventricle size.

    Attributes:
        matrix: float32 (3, 3).
        vectors: wave vectors in rad/mm, float32 (waves, 3).
        phases: float32 (waves,).
        shifts: displacement amplitudes in mm, float32 (waves, 3).
        ventricles: how much larger (positive) or smaller than average the ventricles are, as a share.
    """

    matrix: Array
    vectors: Array
    phases: Array
    shifts: Array
    ventricles: float

    def __call__(self, points: Array) -> Array:
        """Return the template points of patient points, float32 (h, w, 3)."""
        moved = np.einsum("ij,hwj->hwi", self.matrix, points)
        angles = np.einsum("hwj,kj->hwk", points, self.vectors) + self.phases
        moved += np.einsum("hwk,ki->hwi", np.sin(angles), self.shifts)
        for centre in _VENTRICLES:
            offset = moved - centre
            near = np.exp(-np.sum(offset**2, axis=-1, keepdims=True) / np.float32(18.0**2))
            moved -= self.ventricles * near * offset * np.array([1.0, 0.3, 0.3], dtype=np.float32)
        return np.asarray(moved, dtype=np.float32)

    def inverse(self, point: Array) -> Array:
        """Return the patient point (3,) that maps to a template point, by fixed-point iteration to about 0.1 mm."""
        guess = point.copy()
        for _ in range(12):
            guess = guess + point - self(guess[None, None])[0, 0]
        return guess


def draw_warp(rng: np.random.Generator) -> Warp:
    """Draw one patient's head shape."""
    tilt_x, tilt_y, tilt_z = rng.normal(0.0, _TILT_SD)
    skew = np.array([[0, -tilt_z, tilt_y], [tilt_z, 0, -tilt_x], [-tilt_y, tilt_x, 0]])
    scale = np.diag(1.0 + rng.normal(0.0, _SCALE_SD) + rng.normal(0.0, 0.015, 3))
    vectors, shifts = [], []
    for count, wavelength, size in _WAVES:
        vectors.append(rng.normal(0.0, 1.0 / wavelength, (count, 3)))
        shifts.append(rng.normal(0.0, size * np.sqrt(2.0 / count), (count, 3)))
    return Warp(
        matrix=((np.eye(3) + skew) @ scale).astype(np.float32),
        vectors=np.concatenate(vectors).astype(np.float32),
        phases=rng.uniform(0, 2 * np.pi, sum(w[0] for w in _WAVES)).astype(np.float32),
        shifts=np.concatenate(shifts).astype(np.float32),
        ventricles=float(rng.uniform(-0.25, 0.6)),
    )


@dataclass(frozen=True)
class Patient:
    """All that is decided about a patient before anything is scanned.

    Attributes:
        name: the patient's id.
        label: one of `LABELS`.
        lesion: None for a normal patient.
        warp: the head's shape.
        bone_scale: skull and scalp thickness over average.
        levels: heights of the slices, mm above the anterior commissure in the patient's own frame.
    """

    name: str
    label: str
    lesion: Lesion | None
    warp: Warp
    bone_scale: float
    levels: tuple[float, ...]


def draw_patient(name: str, label: str, seed: int) -> Patient:
    """Draw a patient; a function of its arguments alone.

    Args:
        name: the patient's id, unique in the atlas.
        label: one of `LABELS`.
        seed: the atlas's seed.
    """
    rng = numpy_generator(seed, "atlas", "patient", name)
    warp = draw_warp(rng)
    # Normal patients draw a lesion too, and leave it out: their slices lie at the same heights as everyone's.
    drawn = draw_lesion(label if label in KINDS else str(rng.choice(KINDS)), rng)
    level = float(warp.inverse(drawn.centre)[2])
    spread = np.linspace(-1.0, 1.0, SLICES) * drawn.reach + rng.uniform(-1.5, 1.5)
    levels = tuple(float(v) for v in level + spread)
    return Patient(name, label, drawn if label in KINDS else None, warp, float(rng.uniform(0.8, 1.25)), levels)


def slice_fractions(patient: Patient, level: float, size: int) -> Array:
    """Return the tissue fractions of one slice, float32 (len(TISSUES), size, size); what is missing to 1 is air."""
    points = patient.warp(slice_grid(level, size))
    if patient.lesion is None:
        return tissue_fractions(points, patient.bone_scale)
    healthy = tissue_fractions(pushed(patient.lesion, points), patient.bone_scale)
    return add_lesion(healthy, patient.lesion, points)


def lesion_mask(fractions: Array) -> npt.NDArray[np.uint8]:
    """Return 1 where a substantial share (0.3) of the tissue belongs to a lesion, 0 elsewhere, uint8 (h, w).

    For a tumour this is the whole tumour: necrosis, solid mass and oedema.
    """
    return np.asarray(fractions[HEALTHY:].sum(axis=0) > _LESION_SHARE, dtype=np.uint8)


def tissue_mask(fractions: Array) -> npt.NDArray[np.uint8]:
    """Return the index into `TISSUE_CLASSES` of the most frequent tissue, uint8 (h, w); skull, scalp and air are 0."""
    brain = fractions[: TISSUES.index("white") + 1]
    inside = brain.sum(axis=0) + fractions[HEALTHY:].sum(axis=0) > 0.5
    mask = np.where(inside, 1 + brain.argmax(axis=0), 0)
    mask = np.where(lesion_mask(fractions) == 1, TISSUE_CLASSES.index("lesion"), mask)
    return np.asarray(mask, dtype=np.uint8)
