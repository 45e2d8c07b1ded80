"""What each cohort of the atlas says about itself in `cohort.toml`."""

from omnifm.data.atlas.patient import LABELS, TISSUE_CLASSES
from omnifm.data.cohort import CohortSpec

FUSION_PAIRS = {"ct": "t2", "pet": "t1"}
"""Second image of a fusion pair, and the MR sequence it is paired with."""

_NAMES = {"t1": "T1-weighted MRI", "t2": "T2-weighted MRI", "flair": "FLAIR MRI", "ct": "CT", "pet": "FDG-PET"}
_MODALITY = {"ct": "CT", "pet": "PET"}
_SOURCE = "simulated by omnifm data make atlas from the ICBM 152 2009a nonlinear symmetric template packaged with nilearn"
_CITATION = (
    "Fonov V, Evans AC, Botteron K, Almli CR, McKinstry RC, Collins DL. Unbiased average age-appropriate atlases for pediatric "
    "studies. NeuroImage 54:313-327, 2011; Fonov VS, Evans AC, McKinstry RC, Almli CR, Collins DL. Unbiased nonlinear average "
    "age-appropriate brain templates from birth to adulthood. NeuroImage 47:S102, 2009."
)
# nilearn's own description says "unknown"; the template's authors grant these terms, whose text is SPDX HPND's.
_LICENCE = "HPND"
_NOTES = (
    "Simulated images, no patient was scanned; for testing and teaching, never for diagnosis. Lesions are drawn from simple "
    "shapes and tissue values from published tables. Template: Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging "
    "Centre, Montreal Neurological Institute, McGill University; use, copying, modification and distribution are permitted for "
    "any purpose without fee provided that this notice appears in all copies; no warranty. Axial slices, radiological display "
    "(the patient's right is on the left of the image); field of view 224 mm. "
)


_TASKS: dict[str, tuple[str, str, str, dict[str, object]]] = {  # key: task, title, further note, further keys
    "cls": ("classification", "Kind of lesion", "Every slice of a patient carries the patient's label.", {"classes": LABELS}),
    "seg_tissue": (
        "segmentation",
        "Tissues and lesion",
        "Masks give the most frequent tissue of a pixel before blurring and noise; skull, scalp and air are background.",
        {"classes": TISSUE_CLASSES, "mask_kind": "semantic"},
    ),
    "seg_lesion": (
        "segmentation",
        "Lesion",
        "Masks of normal patients are empty; a tumour's mask holds necrosis, solid mass and oedema.",
        {"classes": ("background", "lesion"), "mask_kind": "semantic"},
    ),
    "sr": ("super_resolution", "High-resolution slices", "16 bits; a finer and quieter protocol than the other cohorts'.", {}),
    "vqa": ("vqa", "Questions", "Left and right are the patient's; regions are bounded by planes, not by gyri.", {}),
}


def specs(contrast: str) -> dict[str, CohortSpec]:
    """Return the specs of one kind of picture's cohorts, by `cls`, `seg_tissue`, `seg_lesion`, `sr` and `vqa`.

    Args:
        contrast: one of `scanner.CONTRASTS`.
    """
    return {
        key: _spec(f"atlas_{key}_{contrast}", task, _MODALITY.get(contrast, "MRI"), f"{title}, {_NAMES[contrast]}", note, keys)
        for key, (task, title, note, keys) in _TASKS.items()
    }


def fusion_spec(functional: str) -> CohortSpec:
    """Return the spec of a fusion cohort.

    Args:
        functional: the second image, a key of `FUSION_PAIRS`.
    """
    modality = f"{_MODALITY[functional]}-MRI"
    title = f"Registered pairs, {_NAMES[FUSION_PAIRS[functional]]} and {_NAMES[functional]}"
    note = "Both images are of one slice of one patient on one pixel grid: registered by construction."
    return _spec(f"atlas_fusion_{functional}", "fusion", modality, title, note, {})


def _spec(name: str, task: str, modality: str, title: str, note: str, keys: dict[str, object]) -> CohortSpec:
    shared = {"format": 1, "licence": _LICENCE, "redistribution": "allowed", "source": _SOURCE, "citation": _CITATION}
    own = {"name": name, "task": task, "modality": modality, "title": f"{title} (simulated)", "notes": _NOTES + note}
    return CohortSpec.model_validate({**shared, **own, **keys})
