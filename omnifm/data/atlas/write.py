"""Writes the atlas: per kind of picture one cohort for each task, and two cohorts of registered pairs for fusion."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from omnifm.data.atlas.anatomy import Array
from omnifm.data.atlas.cohorts import FUSION_PAIRS, fusion_spec, specs
from omnifm.data.atlas.patient import LABELS, Patient, draw_patient, lesion_mask, slice_fractions, tissue_mask
from omnifm.data.atlas.questions import ask
from omnifm.data.atlas.scanner import CONTRASTS, Scanner, acquire, scanners
from omnifm.data.cohort import CohortSpec, Row, write_cohort
from omnifm.data.splits import assign_splits
from omnifm.errors import DataError
from omnifm.seeds import numpy_generator

SMALLEST_PATIENTS = 10
"""Per kind of picture; fewer than five patients per site would leave a site without a validation patient."""

SMALLEST_SIZE = 32

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Visit:
    """One patient at one site. `bench` is the scanner's place in `SCANNERS`' north-south order."""

    patient: Patient
    split: str
    bench: int


@dataclass(frozen=True)
class _Cohort:
    """A cohort being written: rows are collected, image files are written at once."""

    folder: Path
    spec: CohortSpec
    rows: list[Row] = field(default_factory=list)

    def save(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        return name


def make_atlas(folder: Path, patients: int, seed: int, size: int = 128, progress: Progress | None = None) -> list[Path]:
    """Write the simulated atlas: 25 cohorts for four tasks and 2 for fusion, each a sub-folder of `folder`.

    The same arguments give the same bytes. No patient appears under two kinds of picture; one patient's rows lie in one split.

    Args:
        folder: made if need be; cohorts already there under the same names are overwritten.
        patients: patients per kind of picture, divided between two sites.
        seed: another seed, other patients.
        size: pixels along each side of the square slices.
        progress: called after each patient with the number done and the total.

    Returns:
        The cohorts' folders: `atlas_cls_t1`, `atlas_seg_tissue_t1`, ..., `atlas_fusion_pet`.

    Raises:
        DataError: too few patients or pixels, or the folder cannot be made.
    """
    if patients < SMALLEST_PATIENTS:
        raise DataError(f"atlas: {patients} patients are too few: at least {SMALLEST_PATIENTS}")
    if size < SMALLEST_SIZE:
        raise DataError(f"atlas: slices of {size} pixels are too small: at least {SMALLEST_SIZE}")
    total = patients * (len(CONTRASTS) + len(FUSION_PAIRS))
    count = _Counter(total, progress)
    single = [path for c in CONTRASTS for path in _write_contrast(folder, c, patients, seed, size, count)]
    return single + [_write_pairs(folder, other, patients, seed, size, count) for other in FUSION_PAIRS]


class _Counter:
    def __init__(self, total: int, report: Progress | None) -> None:
        self._total, self._report, self._done = total, report, 0

    def step(self) -> None:
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total)


def _open(folder: Path, spec: CohortSpec, *subfolders: str) -> _Cohort:
    place = folder / spec.name
    try:
        for name in subfolders:
            (place / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"atlas: cannot make the folder {place}: {error.strerror}") from error
    return _Cohort(place, spec)


def _visits(group: str, patients: int, seed: int) -> list[_Visit]:
    """Draw a group's patients: labels in equal numbers at both sites, splits site by site and label by label."""
    rng = numpy_generator(seed, "atlas", "visits", group)
    visits = []
    for bench, names in enumerate(np.array_split(rng.permutation(patients), 2)):
        ids = [f"{group}-{number:04d}" for number in sorted(names.tolist())]
        labels = [LABELS[i % len(LABELS)] for i in rng.permutation(len(ids)).tolist()]
        splits = assign_splits([""] * len(ids), ids, labels, seed)
        drawn = (draw_patient(name, label, seed) for name, label in zip(ids, labels, strict=True))
        visits += [_Visit(patient, split, bench) for patient, split in zip(drawn, splits, strict=True)]
    return visits


def _write_contrast(folder: Path, contrast: str, patients: int, seed: int, size: int, count: _Counter) -> list[Path]:
    folders = {key: ("images", "masks") if spec.mask_kind else ("images",) for key, spec in specs(contrast).items()}
    cohorts = {key: _open(folder, spec, *folders[key]) for key, spec in specs(contrast).items()}
    for visit in _visits(contrast, patients, seed):
        scanner = scanners(contrast)[visit.bench]
        for index in range(len(visit.patient.levels)):
            _write_slice(cohorts, visit, scanner, index, seed, size)
        count.step()
    return [write_cohort(c.folder, c.spec, c.rows) for c in cohorts.values()]


def _write_slice(cohorts: dict[str, _Cohort], visit: _Visit, scanner: Scanner, index: int, seed: int, size: int) -> None:
    patient = visit.patient
    fractions = slice_fractions(patient, patient.levels[index], size)
    row = _row(visit, scanner.site, scanner.modality, scanner.sequence, index)
    clinical = _png(_scan(fractions, patient, scanner, index, seed), 255)
    sharp = _png(_scan(fractions, patient, scanner, index, seed, sharp=True), 65535)
    pictures = {"cls": clinical, "seg_tissue": clinical, "seg_lesion": clinical, "sr": sharp}
    images = {key: cohorts[key].save(f"images/{row.id}.png", data) for key, data in pictures.items()}
    masks = {"seg_tissue": tissue_mask(fractions), "seg_lesion": lesion_mask(fractions)}
    for key, mask in masks.items():
        name = cohorts[key].save(f"masks/{row.id}.png", _encode(mask))
        cohorts[key].rows.append(replace(row, image=images[key], mask=name))
    cohorts["cls"].rows.append(replace(row, image=images["cls"], label=patient.label))
    cohorts["sr"].rows.append(replace(row, image=images["sr"]))
    # One slice is enough to ask about: more would repeat the same answers.
    if index == len(patient.levels) // 2:
        _write_questions(cohorts["vqa"], row, visit, scanner, clinical, seed)


def _write_questions(cohort: _Cohort, row: Row, visit: _Visit, scanner: Scanner, image: bytes, seed: int) -> None:
    name = cohort.save(f"images/{row.id}.png", image)
    rng = numpy_generator(seed, "atlas", "questions", visit.patient.name)
    for number, question in enumerate(ask(scanner, visit.patient.lesion, rng)):
        asked = replace(row, id=f"{row.id}-q{number}", image=name, question=question.text, answer=question.answer, organ="brain")
        cohort.rows.append(replace(asked, answer_type=question.answer_type, question_type=question.question_type))


def _write_pairs(folder: Path, functional: str, patients: int, seed: int, size: int, count: _Counter) -> Path:
    """Write one fusion cohort: the same slice of the same patient in MR and in CT or PET, on one pixel grid."""
    spec, mr = fusion_spec(functional), FUSION_PAIRS[functional]
    cohort = _open(folder, spec, "images", "images_b")
    for visit in _visits(f"fusion_{functional}", patients, seed):
        patient, anatomical = visit.patient, scanners(mr)[visit.bench]
        for index, level in enumerate(patient.levels):
            fractions = slice_fractions(patient, level, size)
            site = anatomical.site.removesuffix(f"_{mr}")
            row = _row(visit, site, spec.modality or "", anatomical.sequence, index)
            first = _png(_scan(fractions, patient, anatomical, index, seed), 255)
            second = _png(_scan(fractions, patient, scanners(functional)[visit.bench], index, seed), 255)
            image, image_b = (cohort.save(f"{sub}/{row.id}.png", d) for sub, d in (("images", first), ("images_b", second)))
            cohort.rows.append(replace(row, image=image, image_b=image_b))
        count.step()
    return write_cohort(cohort.folder, spec, cohort.rows)


def _scan(fractions: Array, patient: Patient, scanner: Scanner, index: int, seed: int, sharp: bool = False) -> Array:
    rng = numpy_generator(seed, "atlas", "scan", patient.name, scanner.site, index, int(sharp))
    return acquire(fractions, scanner, patient.lesion.blood_age if patient.lesion else 0.0, rng, sharp)


def _row(visit: _Visit, site: str, modality: str, sequence: str, index: int) -> Row:
    patient = visit.patient
    extra = {"sequence": sequence, "lesion": patient.label, "level_mm": f"{patient.levels[index]:.1f}"}
    name = patient.name
    return Row(id=f"{name}-{index}", split=visit.split, patient=name, site=site, modality=modality, extra=extra)


def _png(image: Array, top: int) -> bytes:
    """Encode grey values in 0..1 with 8 bits (`top` 255) or 16 bits (65535)."""
    grey = np.round(image * top)
    return _encode(grey.astype(np.uint8) if top == 255 else grey.astype(np.uint16))


def _encode(image: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()
