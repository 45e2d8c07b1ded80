"""Pictures sorted into folders: SRC/class/*, SRC/{train,val,test}/class/*, or without classes for super-resolution."""

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from omnifm.data.importers import Progress, Provenance, finish, make_spec, new_folder
from omnifm.data.manifest import Row
from omnifm.errors import DataError

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".npy", ".nii", ".nii.gz", ".dcm")
SPLIT_NAMES = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}


def import_folder(
    source: Path,
    folder: Path,
    *,
    modality: str,
    provenance: Provenance,
    task: str = "classification",
    patient_pattern: str = "",
    slice_axis: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Copy pictures from a tree of folders into a new cohort.

    Args:
        source: SRC/class/* or SRC/{train,val,test}/class/* (also training, valid, validation, testing); for super-resolution
            SRC/* or SRC/{train,val,test}/*. Hidden files are passed over, other files that are no pictures with a warning.
        folder: the new cohort; its name is the cohort's.
        modality: of all pictures.
        provenance: title, licence and the like.
        task: `classification` or `super_resolution`.
        patient_pattern: a regular expression searched in each path below SRC; its first group (or all it matches) is the
            patient. Empty: unknown, but `.dcm` files in a folder below the class's are taken for one patient's.
        slice_axis: for volumes.
        progress: called with pictures copied and pictures in all.

    Raises:
        DataError: no pictures, a picture at the wrong depth or without a patient, or `folder` is not empty.
    """
    if task not in ("classification", "super_resolution"):
        raise DataError(f"task '{task}': folders of pictures hold classification or super_resolution; others need a manifest")
    paths = _pictures(source)
    splits = {path.parts[0] for path in paths}
    split_layout = all(part.lower() in SPLIT_NAMES for part in splits) and all(len(path.parts) > 1 for path in paths)
    rows = [_row(path, split_layout, task, _compiled(patient_pattern)) for path in paths]
    if not split_layout and (unknown := sum(not row.patient for row in rows)):
        log.warning("%s: %d pictures name no patient (--patient): one person's may be in both train and test", source, unknown)
    classes = sorted({row.label for row in rows if row.label})
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", folder.resolve().name)
    keys = {"name": name, "task": task, "modality": modality, "classes": classes, "slice_axis": slice_axis}
    spec = make_spec(keys, provenance)
    new_folder(folder)
    for done, (path, row) in enumerate(zip(paths, rows, strict=True), start=1):
        target = folder / row.image
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target)
        if progress is not None:
            progress(done, len(rows))
    return finish(folder, spec, rows)


def _pictures(source: Path) -> Sequence[PurePosixPath]:
    if not source.is_dir():
        raise DataError(f"{source}: is not a folder")
    files = [PurePosixPath(file.relative_to(source).as_posix()) for file in sorted(source.rglob("*")) if file.is_file()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    pictures = [path for path in visible if path.name.lower().endswith(SUFFIXES)]
    others = [str(path) for path in visible if not path.name.lower().endswith(SUFFIXES)]
    if others:
        log.warning("%s: %d files are no pictures and are left out, the first: %s", source, len(others), others[0])
    if not pictures:
        raise DataError(f"{source}: holds no picture ({', '.join(SUFFIXES)})")
    return pictures


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise DataError(f"patient pattern '{pattern}' is not a regular expression: {error}") from error


def _row(path: PurePosixPath, split_layout: bool, task: str, patient: re.Pattern[str] | None) -> Row:
    folders = path.parts[:-1]
    split = SPLIT_NAMES[folders[0].lower()] if split_layout else ""
    folders = folders[1:] if split_layout else folders
    if task == "classification" and not folders:
        raise DataError(f"{path}: lies in no class folder (SRC/class/* or SRC/train/class/*)")
    below = folders[1:] if task == "classification" else folders
    # Slices of one scan are of one person, though nothing said who that is: the folder below the class stands for the person.
    scan = "/".join(folders[: len(folders) - len(below) + 1]) if below and path.suffix.lower() == ".dcm" else ""
    return Row(
        id=str(path),
        split=split,
        patient=_patient(path, patient) if patient else scan,
        image=f"images/{path}",
        label=folders[0] if task == "classification" else "",
    )


def _patient(path: PurePosixPath, pattern: re.Pattern[str]) -> str:
    match = pattern.search(str(path))
    text = match.group(1 if pattern.groups else 0) if match else ""
    if not text:
        raise DataError(f"{path}: the patient pattern '{pattern.pattern}' finds no patient in this path")
    return str(text)
