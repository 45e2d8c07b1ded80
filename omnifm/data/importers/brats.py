"""BraTS and FeTS2022 folders as published: per subject four NIfTI sequences and a label map.

    SRC/FeTS2022_01151/FeTS2022_01151_t1.nii.gz, ..._t1ce, ..._t2, ..._flair, ..._seg      (BraTS 2020-2021, FeTS 2021-2022)
    SRC/BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz, ...-t1c, ...-t2w, ...-t2f, ...-seg      (BraTS 2023 and later)
    SRC/partitioning_1.csv, partitioning_2.csv with the columns Partition_ID, Subject_ID      (FeTS: which institution)

The cohort format has one image per row, so each sequence becomes a cohort: `FOLDER/brats_t1`, ... One with the institutions
as clients (`partition = "natural"`) is FeTS; all four, one client each, are the cross-modality variant. Rows carry the subject
as patient, whatever the time point, and the reader splits by patient, so a subject is in the same split in all four.

Labels: 1 necrotic core (NCR), 2 oedema (ED), 4 or 3 enhancing tumour (ET), which becomes 3. ET with both numbers is refused.
"""

import csv
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omnifm.data.importers import Progress, Provenance, finish, make_spec, new_folder
from omnifm.data.manifest import Row
from omnifm.errors import DataError

SEQUENCES = ("t1", "t1ce", "t2", "flair")
CLASSES = ("background", "NCR", "ED", "ET")
_NAMES = {"t1": "t1|t1n", "t1ce": "t1ce|t1c", "t2": "t2|t2w", "flair": "flair|t2f", "seg": "seg"}
_SUFFIX = re.compile(r"[_-](?P<kind>[A-Za-z0-9]+)\.nii(\.gz)?")
_TIME_POINT = re.compile(r"(?P<patient>BraTS-[A-Za-z]+-\d+)-\d+")
_PROVENANCE = {
    "licence": "unverified",
    "redistribution": "testing-only",
    "source": "BraTS / FeTS challenge folder, imported as published",
    "citation": "U. Baid et al., arXiv:2107.02314, 2021; S. Pati et al., The Federated Tumor Segmentation (FeTS) challenge, "
    "arXiv:2105.05874, 2021",
    "notes": "Label 4 (ET) is 3 here. One cohort per sequence; a subject has the same split in all of them.",
}


@dataclass(frozen=True)
class _Subject:
    """A subject's files by sequence, `seg` the labels; and its institution, empty if unknown."""

    id: str
    files: dict[str, Path]
    site: str


def import_brats(
    source: Path,
    folder: Path,
    *,
    sequences: Sequence[str] = SEQUENCES,
    partition: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Copy a BraTS or FeTS folder into one new cohort per sequence.

    Args:
        source: the folder that holds the subjects' folders.
        folder: where the cohorts' folders are made; it must be new or empty.
        sequences: which of `t1`, `t1ce`, `t2`, `flair`.
        partition: 1 or 2 takes the institutions from `partitioning_1.csv` or `_2.csv` in `source`; None: no institutions.
        progress: called with subjects done and subjects in all.

    Returns:
        The folders of the cohorts.

    Raises:
        DataError: no subjects, a missing file, a subject without institution, an unknown label, or `folder` is not empty.
    """
    if unknown := sorted(set(sequences) - set(SEQUENCES)):
        raise DataError(f"sequence {unknown[0]!r}: known are {', '.join(SEQUENCES)}")
    subjects = _subjects(source, sequences, _institutions(source, partition) if partition else {})
    new_folder(folder)
    rows: dict[str, list[Row]] = {name: [] for name in sequences}
    for done, subject in enumerate(subjects, 1):
        labels = _labels(subject)
        for name in sequences:
            rows[name].append(_write(folder / f"brats_{name}", name, subject, labels))
        if progress is not None:
            progress(done, len(subjects))
    return [_finish(folder / f"brats_{name}", name, rows[name]) for name in sequences]


def _subjects(source: Path, sequences: Sequence[str], sites: dict[str, str]) -> list[_Subject]:
    found = []
    for place in sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else ():
        files = _files(place)
        if not files:
            continue
        if missing := [name for name in (*sequences, "seg") if name not in files]:
            raise DataError(f"{place.name}: has no {missing[0]} file ({place.name}_{missing[0]}.nii.gz)")
        if sites and place.name not in sites:
            raise DataError(f"{place.name}: is not in the table of institutions")
        found.append(_Subject(place.name, files, sites.get(place.name, "")))
    if not found:
        raise DataError(f"{source}: holds no subjects in the layout SUBJECT/SUBJECT_t1.nii.gz (or SUBJECT-t1n.nii.gz)")
    return found


def _files(place: Path) -> dict[str, Path]:
    kinds = {kind: name for name, kinds in _NAMES.items() for kind in kinds.split("|")}
    files: dict[str, Path] = {}
    for path in sorted(place.iterdir()):
        match = _SUFFIX.fullmatch(path.name.removeprefix(place.name))
        if match and (name := kinds.get(match["kind"].lower())):
            files[name] = path
    return files


def _institutions(source: Path, partition: int) -> dict[str, str]:
    path = source / f"partitioning_{partition}.csv"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if not table or not {"Partition_ID", "Subject_ID"} <= set(table[0]):
        raise DataError(f"{path}: expected the columns Partition_ID and Subject_ID")
    return {row["Subject_ID"].strip(): row["Partition_ID"].strip() for row in table}


def _labels(subject: _Subject) -> Any:
    """Return the label map as a NIfTI image of uint8, ET = 3, on the grid it came on."""
    import nibabel

    path = subject.files["seg"]
    try:
        image: Any = nibabel.Nifti1Image.from_filename(path)
        labels = np.asarray(image.dataobj)
    # Decoders of damaged files raise what they like.
    except Exception as error:
        raise DataError(f"{path.name}: cannot be read ({type(error).__name__})") from error
    values = set(np.unique(labels).tolist())
    if not values <= {0, 1, 2, 3, 4} or {3, 4} <= values:
        shown = ", ".join(f"{value:g}" for value in sorted(values))
        raise DataError(f"{path.name}: labels {shown}; expected 0, 1, 2 and 4 (or 3) for the enhancing tumour")
    mapped = np.where(labels == 4, 3, labels).astype(np.uint8)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    made: Any = type(image)(mapped, image.affine, header)
    return made


def _write(folder: Path, name: str, subject: _Subject, labels: Any) -> Row:
    import nibabel

    suffix = ".nii.gz" if subject.files[name].name.endswith(".gz") else ".nii"
    image, mask = f"images/{subject.id}{suffix}", f"masks/{subject.id}.nii.gz"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(subject.files[name], folder / image)
    nibabel.save(labels, folder / mask)
    return Row(id=subject.id, patient=_patient(subject.id), site=subject.site, image=image, mask=mask)


def _patient(subject: str) -> str:
    """Return whom a folder is about: BraTS 2023 and later add a time point to the number, `BraTS-GLI-00000-000`."""
    match = _TIME_POINT.fullmatch(subject)
    return match["patient"] if match else subject


def _finish(folder: Path, name: str, rows: list[Row]) -> Path:
    keys = {
        "name": folder.name,
        "task": "segmentation",
        "modality": "MRI",
        "classes": CLASSES,
        "mask_kind": "semantic",
        "slice_axis": 2,
    }
    provenance = Provenance(title=f"Brain tumours, {name} (BraTS / FeTS layout)", **_PROVENANCE)
    return finish(folder, make_spec(keys, provenance), rows)
