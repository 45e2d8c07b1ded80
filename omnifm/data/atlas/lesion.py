"""Focal lesions: where they sit, which shape they have, and how they push the brain aside.

Three kinds, told apart by shape, place and appearance as in textbooks: a `tumour` (glioma: an irregular mass, necrotic when
large, in a sea of white-matter oedema), an `infarct` (a wedge with its base on the cortex, without mass effect, grey and
white matter alike) and a `haemorrhage` (a dense irregular clot, often in the basal ganglia, with a thin oedema rim).
"""

from dataclasses import dataclass

import numpy as np

from omnifm.data.atlas.anatomy import TISSUES, Array, region, tissue_fractions

KINDS = ("tumour", "infarct", "haemorrhage")

_CORE, _NECROSIS, _OEDEMA, _INFARCT, _BLOOD = (TISSUES.index(n) for n in ("core", "necrosis", "oedema", "infarct", "blood"))
_CSF, _GREY, _WHITE = 0, 1, 2
# A wedge points at the middle of its hemisphere's deep nuclei, where the middle cerebral artery's branches fan out.
_APEX = (24.0, -12.0)


@dataclass(frozen=True)
class Lesion:
    """One lesion, in template millimetres.

    Attributes:
        kind: one of `KINDS`.
        centre: middle of the mass or clot; of an infarct, a point halfway from its apex to the cortex. float32 (3,).
        radius: of the solid mass or clot, or half the height of an infarct, mm.
        rim: width of the oedema around it, mm; 0 for an infarct.
        necrosis: radius of a tumour's necrotic middle, mm; 0 for none.
        half_angle: of an infarct's wedge, radians.
        mass_effect: how far tissue is pushed away, as a share of the distance to the centre.
        strength: share of the tissue that has been replaced where the lesion is densest, in 0..1.
        blood_age: 0 for acute, 1 for early subacute blood.
        waves: random waves that make the border irregular, float32 (waves, 5): wave vector in rad/mm, phase, amplitude.
    """

    kind: str
    centre: Array
    radius: float
    rim: float
    necrosis: float
    half_angle: float
    mass_effect: float
    strength: float
    blood_age: float
    waves: Array

    @property
    def side(self) -> str:
        """The patient's side, `left` or `right`."""
        return "right" if self.centre[0] > 0 else "left"

    @property
    def region(self) -> str:
        """Part of the brain that holds the centre; see `anatomy.region`."""
        return region(self.centre)

    @property
    def reach(self) -> float:
        """Height above and below the centre up to which a slice shows the lesion well, mm."""
        return 0.55 * (self.radius + 0.5 * self.rim)


def draw_lesion(kind: str, rng: np.random.Generator) -> Lesion:
    """Draw a lesion of this kind in brain tissue, within the heights `-4..48` mm that slices cover.

    Args:
        kind: one of `KINDS`.
        rng: the patient's lesion stream.
    """
    centre = _draw_centre(kind, rng)
    radius = float({"tumour": rng.uniform(10, 18), "infarct": rng.uniform(15, 26), "haemorrhage": rng.uniform(9, 18)}[kind])
    tumour, infarct = kind == "tumour", kind == "infarct"
    waves = np.concatenate(
        [rng.normal(0.0, 1.6 / radius, (6, 3)), rng.uniform(0, 2 * np.pi, (6, 1)), rng.uniform(0.04, 0.14, (6, 1))], axis=1
    )
    return Lesion(
        kind=kind,
        centre=centre,
        radius=radius,
        rim=0.0 if infarct else float(rng.uniform(6, 13) if tumour else rng.uniform(2, 6)),
        necrosis=float(radius - rng.uniform(3.5, 6)) if tumour and radius > 11 else 0.0,
        half_angle=float(np.deg2rad(rng.uniform(17, 38))) if infarct else 0.0,
        mass_effect=0.0 if infarct else float(rng.uniform(0.25, 0.5)),
        strength=float(rng.uniform(0.65, 1.0) if infarct else rng.uniform(0.75, 1.0)),
        blood_age=float(rng.uniform(0.3, 1)),
        waves=waves.astype(np.float32),
    )


def _draw_centre(kind: str, rng: np.random.Generator) -> Array:
    """Draw points in one hemisphere until one lies where this kind of lesion is found."""
    deep = kind == "haemorrhage" and rng.uniform() < 0.6
    sign = rng.choice([-1.0, 1.0])
    while True:
        x, y, z = rng.uniform((20, -82, -4), (56, 48, 48))
        if deep:
            x, y, z = rng.uniform((15, -28, 0), (30, 12, 18))
        point = np.array([sign * x, y, z], dtype=np.float32)
        healthy = tissue_fractions(point[None, None])[:, 0, 0]
        if healthy[_GREY] + healthy[_WHITE] > 0.9 and (kind == "infarct" or deep or healthy[_WHITE] > 0.6):
            return point


def pushed(lesion: Lesion, points: Array) -> Array:
    """Return where in the undisturbed template the tissue now at `points` came from, (h, w, 3).

    Tissue at distance r from the centre came from `r (1 - a exp(-(r / 2R)^2))`, R the radius and a the mass effect.
    """
    offset = points - lesion.centre
    spread = 2.0 * (lesion.radius + 0.3 * lesion.rim)
    near = np.exp(-np.sum(offset**2, axis=-1, keepdims=True) / spread**2)
    return np.asarray(points - lesion.mass_effect * near * offset, dtype=np.float32)


def add_lesion(fractions: Array, lesion: Lesion, points: Array) -> Array:
    """Replace healthy tissue by the lesion's compartments.

    Args:
        fractions: healthy fractions, (len(TISSUES), h, w), of the brain already pushed aside.
        lesion: the lesion.
        points: template coordinates before pushing, (h, w, 3).

    Returns:
        A new fraction stack of the same shape; its sum over tissues is unchanged where the head is solid.
    """
    result = fractions.copy()
    for row, share in _compartments(fractions, lesion, points):
        result *= 1.0 - share
        result[row] += share
    return result


def _compartments(healthy: Array, lesion: Lesion, points: Array) -> list[tuple[int, Array]]:
    """Rows and the shares they take, outermost first; a share replaces that part of whatever is there already."""
    brain = healthy[_GREY] + healthy[_WHITE]
    if lesion.kind == "infarct":
        return [(_INFARCT, lesion.strength * brain * _wedge(lesion, points))]
    offset = points - lesion.centre
    distance = np.sqrt(np.sum(offset**2, axis=-1)) * _roughness(lesion, points)
    # Masses stop at the skull, the fissure and the ventricles, whose walls they push; a soft threshold closes small sulci.
    room = np.clip(2.0 * brain, 0.0, 1.0)
    oedema = (_OEDEMA, 0.9 * healthy[_WHITE] * _ball(distance, lesion.radius + lesion.rim, 3.0))
    if lesion.kind == "haemorrhage":
        ring = (_OEDEMA, 0.85 * brain * _ball(distance, lesion.radius + lesion.rim, 1.5))
        return [ring, (_BLOOD, lesion.strength * room * _ball(distance, lesion.radius, 1.2))]
    mass = (_CORE, lesion.strength * room * _ball(distance, lesion.radius, 2.0))
    return [oedema, mass] + ([(_NECROSIS, 0.9 * room * _ball(distance, lesion.necrosis, 1.5))] if lesion.necrosis > 0 else [])


def _ball(distance: Array, radius: float, softness: float) -> Array:
    """1 well inside, 0 well outside, 0.5 at the radius."""
    return np.asarray(1.0 / (1.0 + np.exp(np.clip((distance - radius) * (2.0 / softness), -30, 30))), dtype=np.float32)


def _wedge(lesion: Lesion, points: Array) -> Array:
    """A cone sector from the apex through the centre out to the cortex, fading above and below."""
    apex = np.array([np.sign(lesion.centre[0]) * _APEX[0], _APEX[1]], dtype=np.float32)
    axis = lesion.centre[:2] - apex
    ray = points[..., :2] - apex
    length = np.sqrt(np.sum(ray**2, axis=-1)) + 1e-3
    cosine = np.einsum("hwc,c->hw", ray, axis / max(float(np.linalg.norm(axis)), 1e-3)) / length
    # The wedge is as rough as a ball: the angle and the height are stretched by the same waves.
    rough = _roughness(lesion, points)
    angle = np.arccos(np.clip(cosine, -1.0, 1.0)) * rough
    height = np.abs(points[..., 2] - lesion.centre[2]) * rough
    flank = _ball(np.degrees(angle), float(np.degrees(lesion.half_angle)), 5.0)
    # An artery supplies its own hemisphere.
    own_side = 1.0 - _ball(np.sign(lesion.centre[0]) * points[..., 0], 2.0, 1.0)
    return flank * own_side * _ball(height, lesion.radius, 3.0) * (1.0 - _ball(length, 9.0, 4.0))


def _roughness(lesion: Lesion, points: Array) -> Array:
    """Factor around 1 that makes a distance irregular: one plus a sum of random plane waves, (h, w)."""
    phases = np.einsum("hwc,kc->hwk", points - lesion.centre, lesion.waves[:, :3]) + lesion.waves[:, 3]
    return np.asarray(1.0 + np.einsum("hwk,k->hw", np.sin(phases), lesion.waves[:, 4]), dtype=np.float32)
