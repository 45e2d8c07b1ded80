"""The head every simulated patient is made from: tissue fractions at any point of ICBM 152 space.

The template is the ICBM 152 2009a nonlinear symmetric average of 152 adults (Fonov et al., NeuroImage 54:313, 2011;
Fonov et al., NeuroImage 47:S102, 2009), as packaged in the nilearn wheel: a brain-masked T1 image and the grey- and
white-matter probability maps on a 1 mm grid. Cerebrospinal fluid is what is left of the brain; skull and scalp are
layers of fixed thickness around its smoothed hull, since the packaged T1 ends at the brain.

All coordinates are ICBM 152 millimetres: x to the patient's right, y to the front, z up.
"""

import gzip
import importlib.resources
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from omnifm.errors import DataError

Array = npt.NDArray[np.float32]

TISSUES = ("csf", "grey", "white", "bone", "marrow", "fat", "muscle", "core", "necrosis", "oedema", "infarct", "blood")
"""Names of the rows of a fraction stack; the first seven are healthy, the rest belong to lesions. Air is what is left."""

HEALTHY = 7
"""Number of rows of a fraction stack that are healthy tissue."""

FIELD_OF_VIEW = 224.0
"""Side of a slice, millimetres; at 128 pixels a pixel is 1.75 mm."""

# Middle of the brain in y: the field of view is centred on the head, not on the anterior commissure.
_CENTRE_Y = -17.0
_PACKAGE = "nilearn.datasets.data"
_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
# The hull closes sulci and the fissure between the hemispheres; both are narrower than 2 x 12 mm.
_CLOSING_MM = 12.0
# Depth outside the hull (mm) at which each layer of the head ends: about 6 mm of bone, then 6 mm of scalp.
_LAYERS = (("csf", 1.5), ("bone", 3.0), ("marrow", 5.5), ("bone", 7.0), ("fat", 10.5), ("muscle", 13.0))
# An average of 152 brains is smoother than any one of them; this exponent restores the tissue borders of a single brain.
_SHARPEN = 1.7


@dataclass(frozen=True)
class Template:
    """The packaged maps on their 1 mm grid, and the distance to the brain's hull on a 2 mm grid.

    Attributes:
        grey: probability of grey matter in 0..255, uint8 (197, 233, 189).
        white: probability of white matter, same shape and scale.
        depth: signed distance from the hull in mm, positive outside, float32, every second voxel.
        origin: coordinates in mm of voxel (0, 0, 0), float32 (3,).
    """

    grey: npt.NDArray[np.uint8]
    white: npt.NDArray[np.uint8]
    depth: Array
    origin: Array


@cache
def load_template() -> Template:
    """Return the packaged template, read once per process.

    Raises:
        DataError: the nilearn package, or one of its three files, is not installed.
    """
    t1, origin = _read("t1")
    grey, _ = _read("gm")
    white, _ = _read("wm")
    return Template(grey, white, _depth(t1[::2, ::2, ::2] > 0), origin)


def _read(name: str) -> tuple[npt.NDArray[np.uint8], Array]:
    import nibabel

    try:
        packed = importlib.resources.files(_PACKAGE).joinpath(_FILE.format(name)).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise DataError(f"the atlas needs {_FILE.format(name)} from the nilearn package: {error}") from error
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(packed))
    return np.asarray(image.dataobj, dtype=np.uint8), np.asarray(image.affine[:3, 3], dtype=np.float32)


def _depth(brain: npt.NDArray[np.bool_]) -> Array:
    """Signed distance in mm from the closed brain on a 2 mm grid, positive outside."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    dilated = 2.0 * distance_transform_edt(~brain) <= _CLOSING_MM
    hull = 2.0 * distance_transform_edt(dilated) > _CLOSING_MM
    outside = distance_transform_edt(~hull)
    inside = distance_transform_edt(hull)
    # The distance to a voxel mask has steps; a skull has none.
    return np.asarray(gaussian_filter(2.0 * (outside - inside), 1.5), dtype=np.float32)


def slice_grid(level: float, size: int) -> Array:
    """Return the coordinates of one axial slice's pixel centres, float32 (size, size, 3), millimetres.

    Radiological display: the front is at the top, the patient's right on the left of the image.

    Args:
        level: height of the slice above the anterior commissure, mm.
        size: pixels along each side.
    """
    pixel = FIELD_OF_VIEW / size
    steps = (0.5 * (size - 1) - np.arange(size)) * pixel
    y, x = np.meshgrid(steps + _CENTRE_Y, steps, indexing="ij")
    return np.stack([x, y, np.full_like(x, level)], axis=-1).astype(np.float32)


def tissue_fractions(points: Array, bone_scale: float = 1.0) -> Array:
    """Return the healthy tissue fractions at template points, float32 (len(TISSUES), h, w); lesion rows are zero.

    Args:
        points: template coordinates in mm, (h, w, 3).
        bone_scale: this patient's skull and scalp thickness over the average one.
    """
    template = load_template()
    grey = _sample(template.grey, points, template.origin, 1.0, 0.0) / 255.0
    white = _sample(template.white, points, template.origin, 1.0, 0.0) / 255.0
    depth = _sample(template.depth, points, template.origin, 2.0, 99.0)
    fractions = np.zeros((len(TISSUES), *points.shape[:2]), dtype=np.float32)
    inside = _within(depth, 0.0)
    sharp = np.stack([np.clip(1.0 - grey - white, 0.0, 1.0), grey, white]) ** _SHARPEN
    fractions[:3] = inside * sharp / sharp.sum(axis=0)
    for name, end in _LAYERS:
        reached = _within(depth, end * bone_scale)
        fractions[TISSUES.index(name)] += reached - inside
        inside = reached
    return fractions


def _within(depth: Array, end: float) -> Array:
    """Fraction of a 1.5 mm neighbourhood that lies above depth `end`."""
    return np.asarray(np.clip((end - depth) / 1.5 + 0.5, 0.0, 1.0), dtype=np.float32)


def _sample(volume: npt.NDArray[np.generic], points: Array, origin: Array, spacing: float, outside: float) -> Array:
    from scipy.ndimage import map_coordinates

    voxels = np.moveaxis((points - origin) / np.float32(spacing), -1, 0)
    sampled = map_coordinates(volume, voxels, output=np.float32, order=1, mode="constant", cval=outside)
    return np.asarray(sampled, dtype=np.float32)


def region(point: Array) -> str:
    """Name the part of the brain a template point lies in: `frontal`, `parietal`, `temporal`, `occipital` or `deep`.

    Borders are planes through the landmarks of Talairach and Tournoux (1988): the central sulcus slopes from about
    (50, -10, 30) to (5, -30, 70), the Sylvian fissure rises backwards, the parieto-occipital line stands at y = -65.
    """
    x, y, z = (float(v) for v in point)
    if abs(x) < 33.0 and -38.0 < y < 20.0 and z < 26.0:
        return "deep"
    if y < -65.0 and z < 40.0:
        return "occipital"
    if y < 18.0 and z < 8.0 - 0.25 * y:
        return "temporal"
    return "frontal" if y > -15.0 - 0.5 * max(z - 30.0, 0.0) else "parietal"
