"""BreaKHis (F. A. Spanhol et al., IEEE Trans. Biomed. Eng. 63 (2016) 1455-1462): breast histology at four magnifications.

    SRC/.../breast/{benign,malignant}/SOB/<subtype>/<slide>/<40X|100X|200X|400X>/SOB_B_TA-14-4659-40-001.png

A file's name says it all: procedure, B or M, subtype, year, slide, magnification, number. Pictures of one patient must not be
cut by a split, as published image-level lists do (all patients of their test pictures are in training). A patient is here year
and number of the slide without its letters: 22549AB and 22549CD are taken for one case, and 13412 is filed under two subtypes.
Columns `magnification`, `subtype`, `tumour` and `slide` serve as client axes (`partition = "by_column"`).
"""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omnifm.data.importers import Progress, Provenance, finish, make_spec, new_folder
from omnifm.data.manifest import Row
from omnifm.data.splits import assign_splits
from omnifm.errors import DataError

log = logging.getLogger(__name__)

MAGNIFICATIONS = ("40X", "100X", "200X", "400X")
SUBTYPES = {
    **{"A": "adenosis", "F": "fibroadenoma", "PT": "phyllodes_tumor", "TA": "tubular_adenoma"},
    **{"DC": "ductal_carcinoma", "LC": "lobular_carcinoma", "MC": "mucinous_carcinoma", "PC": "papillary_carcinoma"},
}
TUMOURS = {"B": "benign", "M": "malignant"}
_BENIGN = ("A", "F", "PT", "TA")
_NAME = re.compile(
    r"(?P<procedure>[A-Z]+)_(?P<tumour>[BM])_(?P<subtype>[A-Z]+)-(?P<year>\d+)-(?P<case>\d+)(?P<letters>[A-Za-z]*)"
    r"-(?P<magnification>\d+)-(?P<number>\d+)"
)
_PROVENANCE = Provenance(
    title="BreaKHis: breast tumours under the microscope, 40X to 400X",
    source="BreaKHis v1, Laboratory of Vision, Robotics and Imaging, UFPR, and P&D Laboratory, Parana, Brazil",
    citation="F. A. Spanhol, L. S. Oliveira, C. Petitjean, L. Heutte, A Dataset for Breast Cancer Histopathological Image "
    "Classification, IEEE Trans. Biomed. Eng. 63 (2016) 1455-1462",
    notes="Split by patient (year and number of the slide, without letters), not the image-level lists that are in use. "
    "See the publisher's page for the licence.",
)

Classes = Literal["subtypes", "tumours"]


@dataclass(frozen=True)
class _File:
    """What the name of a picture says."""

    path: Path
    tumour: str
    subtype: str
    slide: str
    patient: str
    magnification: str


def import_breakhis(
    source: Path,
    folder: Path,
    *,
    task: str = "classification",
    classes: Classes = "subtypes",
    magnifications: Sequence[str] = MAGNIFICATIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Copy BreaKHis into a new cohort, split by patient (65 / 10 / 25 %, per subtype).

    Args:
        source: the unpacked archive, or any folder of it that holds pictures.
        folder: the new cohort; its name is the cohort's.
        task: `classification` or `super_resolution`.
        classes: of a classification cohort: the eight `subtypes`, or `tumours`, benign and malignant.
        magnifications: those to take.
        seed: draws the split; written into the cohort, so that every run has the same.
        progress: called with pictures copied and pictures in all.

    Raises:
        DataError: no pictures, a name or folder that contradicts the layout (names the file), or `folder` is not empty.
    """
    if task not in ("classification", "super_resolution") or classes not in ("subtypes", "tumours"):
        raise DataError(f"BreaKHis becomes classification (of subtypes or tumours) or super_resolution, not {task} of {classes}")
    if unknown := [m for m in magnifications if m not in MAGNIFICATIONS]:
        raise DataError(f"magnification '{unknown[0]}': BreaKHis has {', '.join(MAGNIFICATIONS)}")
    files = [file for file in _files(source) if file.magnification in magnifications]
    if not files:
        raise DataError(f"{source}: holds no picture named like SOB_B_TA-14-4659-40-001.png ({', '.join(magnifications)})")
    labelled = task == "classification"
    names = tuple((SUBTYPES if classes == "subtypes" else TUMOURS).values()) if labelled else ()
    keys = {"name": re.sub(r"[^A-Za-z0-9_-]+", "_", folder.resolve().name), "task": task, "modality": "HISTO", "classes": names}
    spec = make_spec(keys, _PROVENANCE)
    splits = assign_splits([""] * len(files), [f.patient for f in files], [f.subtype for f in files], seed)
    new_folder(folder)
    (folder / "images").mkdir()
    rows = []
    for file, split in zip(files, splits, strict=True):
        image = f"images/{file.path.name}"
        shutil.copyfile(file.path, folder / image)
        label = (file.subtype if classes == "subtypes" else file.tumour) if labelled else ""
        extra = {"magnification": file.magnification, "subtype": file.subtype, "tumour": file.tumour, "slide": file.slide}
        rows.append(Row(id=file.path.stem, split=split, patient=file.patient, image=image, label=label, extra=extra))
        if progress is not None:
            progress(len(rows), len(files))
    return finish(folder, spec, rows)


def _files(source: Path) -> list[_File]:
    """Return the pictures below `source`, by name."""
    if not source.is_dir():
        raise DataError(f"{source}: is not a folder")
    found: dict[str, _File] = {}
    others = []
    for path in sorted(source.rglob("*.png"), key=lambda p: (p.name, str(p))):
        if path.name.startswith("."):
            continue
        match = _NAME.fullmatch(path.stem)
        if match is None:
            others.append(path)
            continue
        file = _understood(path, match)
        if path.name in found:
            raise DataError(f"{source}: {found[path.name].path} and {path} have the same name")
        found[path.name] = file
    if others:
        log.warning("%s: %d pictures are not named as BreaKHis's and are left out, the first: %s", source, len(others), others[0])
    return list(found.values())


def _understood(path: Path, match: re.Match[str]) -> _File:
    """Return what a name says. Raises DataError if it contradicts itself or the folders the file is in."""
    code, letter, magnification = match["subtype"], match["tumour"], f"{match['magnification']}X"
    if code not in SUBTYPES or magnification not in MAGNIFICATIONS or (code in _BENIGN) != (letter == "B"):
        raise DataError(f"{path}: '{letter}_{code}' at {magnification} is nothing that BreaKHis has")
    above = {part.lower() for part in path.parts[:-1]}
    said = {TUMOURS[letter], SUBTYPES[code], magnification.lower()}
    known = {*TUMOURS.values(), *SUBTYPES.values(), *(m.lower() for m in MAGNIFICATIONS)}
    if strange := sorted((above & known) - said):
        raise DataError(f"{path}: lies in folder '{strange[0]}', but its name says {', '.join(sorted(said))}")
    patient = f"{match['year']}-{match['case']}"
    return _File(path, TUMOURS[letter], SUBTYPES[code], patient + match["letters"], patient, magnification)
